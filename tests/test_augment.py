"""RandAugment, random erasing, mixup and cutmix against slow loops written from the specification, and their statistics."""
import math
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import common
from common import RAND_AUGMENT, RowGenerator, box_mask, mix, rand_augment, random_erasing, symmetric_beta
from finetune import soft_targets
from conftest import seeded

torch.set_num_threads(1)
NAMES = ["autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "colour", "contrast",
         "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"]


def noise_clips(*shape, seed=0, last=False):
    """uint8 clips (B, 3, T, H, W); last=True: with colours last in memory, as they come from the loader."""
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return clips.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3) if last else clips


def scene(height=11, width=17, seed=0):
    """A frame (3, H, W) uint8: noise, darker in one colour, with some pixels black and white."""
    frame = noise_clips(3, height, width, seed=seed)
    frame[1] = frame[1] // 3 + 40
    frame[:, 0, 0], frame[:, 1, 1], frame[0, 2, 2], frame[0, 3, 3] = 0, 255, 127, 128
    return frame


def distance(a, b):
    """Kolmogorov and Smirnov's distance of two samples, or of a sample and a distribution function."""
    a = torch.as_tensor(a, dtype=torch.float64).sort().values
    if callable(b):
        below = torch.arange(len(a) + 1) / len(a)
        return max((below[1:] - b(a)).max(), (b(a) - below[:-1]).max()).item()
    b = torch.as_tensor(b, dtype=torch.float64).sort().values
    at = torch.cat([a, b])
    return (torch.searchsorted(a, at, right=True) / len(a) - torch.searchsorted(b, at, right=True) / len(b)).abs().max().item()


def beta_cdf(a, cells=20000):
    """Distribution function of Beta(a, a).  With x = sin(t)^2 its density in t is (sin t cos t)^(2 a - 1)."""
    t = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells * math.pi / 2
    mass = (t.sin() * t.cos()) ** (2 * a - 1)
    total = torch.cat([torch.zeros(1), mass.cumsum(0) / mass.sum()])
    return lambda x: total[(x.clamp(0, 1).sqrt().asin() / (math.pi / 2) * cells).round().long()]


# ---- the ops, one pixel at a time ----------------------------------------------------------------------------------

def grey_of(frame, y, x):
    r, g, b = (frame[c, y, x].item() for c in range(3))
    return 0.299 * r + 0.587 * g + 0.114 * b


def slow_colour(name, frame, v):
    """The ops that keep pixels where they are; Pillow's definitions."""
    H, W = frame.shape[1:]
    out, factor, size = torch.zeros_like(frame), 1 + 0.9 * v, abs(v)
    mean = sum(grey_of(frame, y, x) for y in range(H) for x in range(W)) / (H * W)
    for c in range(3):
        values = frame[c].flatten().tolist()
        low, high = min(values), max(values)
        step = (len(values) - values.count(high)) // 255
        for y in range(H):
            for x in range(W):
                p = frame[c, y, x].item()
                if name == "autocontrast":
                    q = (p - low) * 255 / (high - low)
                elif name == "equalize":
                    q = (sum(value < p for value in values) + step // 2) // step if step else p
                elif name == "invert":
                    q = 255 - p
                elif name == "posterize":
                    bits = 4 - int(4 * size)
                    q = p // 2 ** (8 - bits) * 2 ** (8 - bits)
                elif name == "solarize":
                    q = 255 - p if p >= 256 - int(256 * size) else p
                elif name == "solarize_add":
                    q = p + int(110 * size) if p < 128 else p
                elif name == "brightness":
                    q = factor * p
                elif name == "contrast":
                    q = mean + factor * (p - mean)
                elif name == "colour":
                    q = grey_of(frame, y, x) + factor * (p - grey_of(frame, y, x))
                elif name == "sharpness":
                    smooth = p
                    if 0 < y < H - 1 and 0 < x < W - 1:
                        around = sum(frame[c, y + i, x + j].item() for i in (-1, 0, 1) for j in (-1, 0, 1))
                        smooth = (around + 4 * p) / 13
                    q = smooth + factor * (p - smooth)
                out[c, y, x] = int(min(255, max(0, q)))
    return out


def slow_move(name, frame, v):
    """The ops that move pixels: where each output pixel's middle comes from (Pillow's directions), bilinear, grey outside."""
    H, W = frame.shape[1:]
    out, cos, sin = torch.zeros_like(frame), math.cos(math.radians(30 * v)), math.sin(math.radians(30 * v))
    for y in range(H):
        for x in range(W):
            u, w = x + 0.5, y + 0.5
            if name == "rotate":                                     # y points down: what was below comes to the right
                u, w = (W / 2 + cos * (u - W / 2) - sin * (w - H / 2), H / 2 + sin * (u - W / 2) + cos * (w - H / 2))
            u, w = {"shear_x": (u + 0.3 * v * w, w), "shear_y": (u, w + 0.3 * v * u), "rotate": (u, w),
                    "translate_x": (u + 0.45 * v * W, w), "translate_y": (u, w + 0.45 * v * H)}[name]
            left, top = math.floor(u - 0.5), math.floor(w - 0.5)
            for c in range(3):
                total = 0
                for j in (top, top + 1):
                    for i in (left, left + 1):
                        value = frame[c, j, i].item() if 0 <= j < H and 0 <= i < W else 128
                        total += value * (1 - abs(u - 0.5 - i)) * (1 - abs(w - 0.5 - j))
                out[c, y, x] = round(total)
    return out


MOVES = ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"]


@pytest.mark.parametrize("name", NAMES)
def test_op_equals_slow_loop(name):
    frame = scene(24, 24, 1) if name == "equalize" else scene()      # equalize does nothing to fewer than 255 pixels
    for v in (0.0, 0.33, -0.7, 0.7, 1.0, -1.0)[:1 if name in ("autocontrast", "equalize", "invert") else None]:
        expected = (slow_move if name in MOVES else slow_colour)(name, frame, v)
        result = RAND_AUGMENT[name](frame[None], v)[0]
        exact = name in ("equalize", "invert", "posterize", "solarize", "solarize_add")
        assert result.dtype == torch.uint8 and (result.int() - expected.int()).abs().max() <= (0 if exact else 1), v
        if v == 0 and name not in ("autocontrast", "equalize", "invert", "posterize"):
            assert torch.equal(result, frame)                        # magnitude 0 is identity ...
        if name == "posterize" and v == 0:
            assert torch.equal(result, frame & 0xf0)                 # ... but for posterize, which always keeps 4 bits or fewer
        if v and name not in ("solarize_add", "posterize", "solarize"):
            assert not torch.equal(result, RAND_AUGMENT[name](frame[None], -v)[0])       # the sign matters


def test_more_magnitude_changes_more():
    frame = scene(24, 24) // 4 + 90                                  # nothing is clipped: grey levels 90 to 153
    smooth = torch.arange(24).mul(6).byte() + torch.zeros(1, 3, 24, 24, dtype=torch.uint8)
    smooth = smooth // 2 + smooth.mT // 2                            # a ramp, for what moves
    for name in NAMES[3:]:
        x = smooth if name in MOVES else frame[None]
        change = [(RAND_AUGMENT[name](x, v).int() - x.int()).abs().sum().item() for v in (0.1, 0.5, 0.9)]
        assert change[0] <= change[1] <= change[2] and change[0] < change[2], name


def test_no_op_depends_on_other_frames_or_layout():
    clip = noise_clips(1, 3, 4, 20, 26)[0]
    clip[:, 2] //= 4                                                 # frames of different brightness
    frames = clip.transpose(0, 1)
    for name, op in RAND_AUGMENT.items():
        result = op(frames, 0.6)
        assert torch.equal(result, torch.cat([op(frame[None], 0.6) for frame in frames])), name
        loader_layout = clip.permute(1, 2, 3, 0).contiguous().permute(0, 3, 1, 2)
        assert torch.equal(result, op(loader_layout, 0.6)), name


# ---- RandAugment ---------------------------------------------------------------------------------------------------

def recorded(monkeypatch, clips=3000, **settings):
    """What RandAugment would do: per clip the list of (name, v) that it applied."""
    calls = {}

    def recorder(name):
        def op(frames, v):
            calls.setdefault(frames.flatten()[0].item() * 256 + frames.flatten()[1].item(), []).append((name, v))
            return frames
        return op
    monkeypatch.setattr(common, "RAND_AUGMENT", {name: recorder(name) for name in RAND_AUGMENT})
    number = torch.arange(clips)
    batch = torch.stack([number // 256, number % 256, number], 1).byte()[:, :, None, None, None]       # a clip says which it is
    assert torch.equal(rand_augment(batch, seeded(1), **settings), batch)
    return [calls.get(i, []) for i in range(clips)]


def test_rand_augment_frequencies(monkeypatch):
    assert list(RAND_AUGMENT) == NAMES
    plans = recorded(monkeypatch)
    applied = [call for plan in plans for call in plan]
    n = len(applied)
    assert abs(n / 12000 - 0.5) < 5 * 0.5 / math.sqrt(12000)
    counts = Counter(name for name, _ in applied)
    for name in NAMES:
        assert abs(counts[name] / n - 1 / 15) < 5 * math.sqrt(1 / 15 / n)
        signs = [v > 0 for other, v in applied if other == name]
        assert abs(sum(signs) / len(signs) - 0.5) < 5 * 0.5 / math.sqrt(len(signs))
    lengths = Counter(map(len, plans))                               # of 4 with probability 1/2, independently
    for k in range(5):
        assert abs(lengths[k] / 3000 - math.comb(4, k) / 16) < 5 * math.sqrt(math.comb(4, k) / 16 / 3000)
    pairs = [(plan[0][0], plan[1][0]) for plan in plans if len(plan) > 1]
    assert abs(sum(a == b for a, b in pairs) / len(pairs) - 1 / 15) < 5 * math.sqrt(1 / 15 / len(pairs))   # with replacement
    sizes = torch.tensor([abs(v) for _, v in applied], dtype=torch.float64)
    normal = torch.distributions.Normal(0.7, 0.05)
    assert distance(sizes, lambda x: normal.cdf(x)) < 1.95 / math.sqrt(n)
    assert len({tuple(plan) for plan in plans if plan}) == sum(map(bool, plans))         # no two clips alike


def test_rand_augment_magnitudes(monkeypatch):
    for ops, magnitude in ((1, 23), (3, 17)):                        # MCL
        plans = recorded(monkeypatch, 200, ops=ops, magnitude=magnitude, std=0, p=1, scale=30)
        assert all(len(plan) == ops for plan in plans)
        assert all(abs(v) == pytest.approx(magnitude / 30) for plan in plans for _, v in plan)
    sizes = [abs(v) for plan in recorded(monkeypatch, 500, magnitude=9, std=4) for _, v in plan]
    assert max(sizes) == 1 and sum(size == 1 for size in sizes) / len(sizes) == pytest.approx(0.40, abs=0.08)   # P(N > .25)
    sizes = [abs(v) for plan in recorded(monkeypatch, 500, magnitude=1, std=4) for _, v in plan]
    assert min(sizes) == 0 and sum(size == 0 for size in sizes) / len(sizes) == pytest.approx(0.40, abs=0.08)
    assert not any(recorded(monkeypatch, 50, p=0))


@pytest.mark.parametrize("value, name, v", [(0.0, "autocontrast", 0.0), (1 - 2**-24, "translate_y", -1.0)])
def test_rand_augment_extreme_draws(monkeypatch, value, name, v):
    monkeypatch.setattr(common, "rand", lambda rows, *shape, **_: torch.full((rows, *shape), value))
    assert recorded(monkeypatch, 2, std=5, p=1) == [[(name, v)] * 4] * 2
    assert all(abs(v) == pytest.approx(0.7) for _, v in recorded(monkeypatch, 1, std=0, p=1)[0])


def test_rand_augment_applies_ops_in_order():
    clips = noise_clips(6, 3, 2, 18, 22)
    draw = torch.rand(6, 4, 4, generator=seeded(5))
    for i, clip in enumerate(clips):
        frames = clip.transpose(0, 1)
        for which, whether, _, sign in draw[i].tolist():
            frames = RAND_AUGMENT[NAMES[int(15 * which)]](frames, 0.7 if sign < 0.5 else -0.7) if whether < 0.5 else frames
        assert (rand_augment(clips, seeded(5), std=0)[i].int() - frames.transpose(0, 1).int()).abs().max() <= 1


@pytest.mark.parametrize("last", [False, True])
def test_rand_augment_is_alike_in_all_frames(last):
    clips = noise_clips(24, 3, 1, 20, 28, last=last).expand(-1, -1, 5, -1, -1)
    before = clips.clone()
    out = rand_augment(clips, seeded(2), p=0.9)
    assert out.dtype == torch.uint8 and out.shape == clips.shape and torch.equal(clips, before)
    assert (out == out[:, :, :1]).all() and sum(not torch.equal(a, b) for a, b in zip(out, clips)) > 20


def test_rand_augment_is_a_function_of_generator_and_row():
    clips = noise_clips(6, 3, 2, 16, 16)
    whole = rand_augment(clips, seeded(3, 0, 6))
    assert torch.equal(whole, rand_augment(clips, seeded(3))) and not torch.equal(whole, rand_augment(clips, seeded(4)))
    for first, rows in ((0, 3), (3, 3), (1, 4), (5, 1)):
        assert torch.equal(rand_augment(clips[first:first + rows], seeded(3, first, 6)), whole[first:first + rows])
    assert torch.equal(whole, rand_augment(noise_clips(6, 3, 2, 16, 16, last=True), seeded(3)))
    same = rand_augment(clips[:1].repeat(8, 1, 1, 1, 1), seeded(3), p=1)
    assert len({tuple(clip.flatten().tolist()) for clip in same}) > 6            # equal clips, different fates


def test_rand_augment_is_the_same_under_autocast():
    clips = noise_clips(16, 3, 2, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = rand_augment(clips, seeded(), p=1)
    assert torch.equal(out, rand_augment(clips, seeded(), p=1))


# ---- Random erasing ------------------------------------------------------------------------------------------------

def boxes_of(erased):
    """Masks (B, H, W) -> (height, width, top, left) of each; fails unless each is one full box."""
    found = []
    for mask in erased:
        y, x = mask.nonzero().T
        height, width = (y.max() - y.min() + 1).item(), (x.max() - x.min() + 1).item()
        assert mask.sum() == height * width
        found.append((height, width, y.min().item(), x.min().item()))
    return found


def slow_erasing_box(H, W, rng, area=(0.02, 1 / 3), aspect=(0.3, 3.3)):
    for _ in range(10):
        size, ratio = H * W * rng.uniform(*area), math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        h, w = round(math.sqrt(size * ratio)), round(math.sqrt(size / ratio))
        if h < H and w < W:
            return h, w, rng.randint(0, H - h), rng.randint(0, W - w)


@pytest.mark.parametrize("aspect", [(0.3, 3.3), (0.3, 1.2)])
def test_erasing_boxes_are_distributed_as_in_the_slow_loop(aspect):
    H, W, n, rng = 36, 48, 3000, random.Random(0)
    out = random_erasing(torch.full((1, 1, 1, 1, 1), 7.0).expand(2 * n, 1, 1, H, W), seeded(), p=0.5, aspect=aspect)[:, 0, 0]
    ours = boxes_of((out != 7)[(out != 7).flatten(1).any(1)])
    slow = [slow_erasing_box(H, W, rng, aspect=aspect) for _ in range(n)]
    limit = 1.95 * math.sqrt(1 / n + 1 / len(ours))
    for what in (lambda h, w, y, x: h * w, lambda h, w, y, x: h / w, lambda h, w, y, x: y / (H - h),
                 lambda h, w, y, x: x / (W - w), lambda h, w, y, x: h, lambda h, w, y, x: w,
                 lambda h, w, y, x: y / (H - h) - x / (W - w)):
        assert distance([what(*box) for box in ours], [what(*box) for box in slow]) < limit
    for h, w, y, x in ours:                                          # sides are rounded by up to half a pixel
        assert h < H and w < W and (h - 0.5) * (w - 0.5) <= H * W / 3 and (h + 0.5) * (w + 0.5) >= 0.02 * H * W
        assert (h - 0.5) / (w + 0.5) <= aspect[1] and (h + 0.5) / (w - 0.5) >= aspect[0]
    assert min(y for *_, y, _ in ours) == 0 and max(y + h for h, _, y, _ in ours) == H       # up to the edges
    assert min(x for *_, x in ours) == 0 and max(x + w for _, w, _, x in ours) == W


def test_erasing_frequency_and_noise():
    clips = torch.full((2000, 1, 1, 10, 10), 7.0)
    share = (random_erasing(clips, seeded(1)) != 7).flatten(1).any(1).float().mean().item()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 2000)
    clips = torch.full((12, 3, 6, 40, 40), 7.0)
    out = random_erasing(clips, seeded(2), p=1)
    erased = out != 7
    assert (erased == erased[:, :1, :1]).all() and (clips == 7).all()            # one box in all frames and colours
    for clip, mask in zip(out, erased[:, 0, 0]):
        noise = clip[:, :, mask]                                     # (3, T, pixels): new in every frame, colour and pixel
        assert len(set(noise.flatten().tolist())) > 0.99 * noise.numel()
    noise = out[erased]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert torch.equal(random_erasing(clips, seeded(), p=1, area=(2, 3)), clips)         # no draw fits
    assert torch.equal(random_erasing(clips, p=0), clips)


def test_erasing_takes_the_first_draw_that_fits(monkeypatch):
    draw = torch.zeros(1, 23)
    draw[0, 3:13] = torch.tensor([1, 1, 1, 0.5, 0.1, 1, 0.9, 1, 1, 0.2])         # areas; only .5, .1 and .2 fit
    draw[0, 13:] = 0.5                                               # aspect 1
    monkeypatch.setattr(common, "rand", lambda *_, **__: draw)
    out = random_erasing(torch.full((1, 1, 1, 20, 20), 7.0), area=(0.0, 1.6), aspect=(0.5, 2))
    assert boxes_of(out[:, 0, 0] != 7) == [(18, 18, 0, 0)]           # sqrt(0.8 * 400) = 17.9


def test_erasing_is_a_function_of_generator_and_row():
    clips = torch.randn(6, 3, 2, 12, 12)
    whole = random_erasing(clips, seeded(3, 0, 6), p=0.7)
    assert torch.equal(whole, random_erasing(clips, seeded(3), p=0.7))
    assert not torch.equal(whole, random_erasing(clips, seeded(4), p=0.7))
    for first, rows in ((0, 3), (3, 3), (1, 4), (5, 1)):
        assert torch.equal(random_erasing(clips[first:first + rows], seeded(3, first, 6), p=0.7), whole[first:first + rows])


# ---- Mixup and cutmix ----------------------------------------------------------------------------------------------

def test_soft_targets():
    labels = torch.tensor([2, 0, 4, 4])
    targets = soft_targets(labels, 5, 0.1)
    for row, label in zip(targets, labels):
        assert row.tolist() == pytest.approx([0.92 if c == label else 0.02 for c in range(5)])
    logits = torch.randn(4, 5)
    torch.testing.assert_close(F.cross_entropy(logits, targets), F.cross_entropy(logits, labels, label_smoothing=0.1))
    assert torch.equal(soft_targets(labels, 5, 0.0), F.one_hot(labels, 5).float())


@pytest.mark.parametrize("a", [0.3, 0.8, 1.0])
def test_symmetric_beta(a):
    n = 20000
    sample = symmetric_beta(torch.rand(n, 32, 2, generator=seeded(int(10 * a))), a)
    assert sample.shape == (n,) and sample.min() >= 0 and sample.max() <= 1
    assert distance(sample, beta_cdf(a)) < 1.63 / math.sqrt(n)       # 1 %
    for other in (0.2, 0.5, 1.5):                                    # the distance does tell distributions apart
        assert distance(sample, beta_cdf(other)) > 1.63 / math.sqrt(n)


def mixed(seed, B=4, H=13, W=18, **settings):
    """Clips that show their own number, mixed -> (weight of the own clip (H, W), weight of the own targets)."""
    number = torch.arange(B, dtype=torch.float32)
    clips, targets = number.view(B, 1, 1, 1, 1).expand(B, 3, 2, H, W), soft_targets(torch.arange(B) + 1, B + 2)
    out, soft = mix(clips, targets, seeded(seed), **settings)
    own = (out[0, 0, 0] - (B - 1)) / (0 - (B - 1))
    expected = torch.zeros(B, 3, 2, H, W)
    for i in range(B):
        for y in range(H):
            for x in range(W):
                expected[i, :, :, y, x] = own[y, x] * i + (1 - own[y, x]) * (B - 1 - i)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)     # the same in all clips, colours and frames
    torch.testing.assert_close(soft.sum(1), torch.ones(B))
    lam = own.mean()
    torch.testing.assert_close(soft, torch.stack([lam * targets[i] + (1 - lam) * targets[B - 1 - i] for i in range(B)]))
    return own


def slow_cutmix(H, W, a, rng):
    """The partner's share and the box's middle (clipped)."""
    ratio = math.sqrt(1 - rng.betavariate(a, a))
    h, w, y, x = int(H * ratio), int(W * ratio), rng.randrange(H), rng.randrange(W)
    top, bottom, left, right = max(0, y - h // 2), min(H, y + h // 2), max(0, x - w // 2), min(W, x + w // 2)
    return (bottom - top) * (right - left) / (H * W), top + bottom, left + right


def test_mix_targets_follow_the_pixels():
    modes = Counter()
    for seed in range(40):
        own = mixed(seed)
        cut = ((own == 0) | (own == 1)).all()
        modes["cutmix" if cut else "mixup"] += 1
        if cut and (own == 0).any():
            boxes_of([own == 0])
        elif not cut:
            torch.testing.assert_close(own, torch.full_like(own, own[0, 0]))
    assert min(modes.values()) > 8
    for B in (1, 3):
        clips, targets = torch.randn(B, 3, 2, 4, 4), torch.rand(B, 5)
        for seed in range(6):
            out, soft = mix(clips, targets, seeded(seed))
            torch.testing.assert_close(out[B // 2], clips[B // 2])               # the middle of an odd batch
            torch.testing.assert_close(soft[B // 2], targets[B // 2])


def test_mix_frequencies_and_distributions():
    H, W, n, rng = 24, 30, 1200, random.Random(1)
    clips = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1, 1).expand(2, 1, 1, H, W)
    targets = torch.eye(2)

    def run(first, **settings):
        results = [mix(clips, targets, seeded(first + k), **settings) for k in range(n)]
        return torch.stack([out[0, 0, 0] for out, _ in results]), torch.stack([soft[0, 0] for _, soft in results])

    own, lam = run(0)                                                # defaults
    cut = ((own == 0) | (own == 1)).flatten(1).all(1)
    assert abs(cut.float().mean() - 0.5) < 5 * 0.5 / math.sqrt(n)
    assert distance(lam[~cut], beta_cdf(0.8)) < 1.95 / math.sqrt((~cut).sum())
    torch.testing.assert_close(own.flatten(1).mean(1), lam)
    own, lam = run(n, switch=1, prob=1.0)
    slow = [slow_cutmix(H, W, 1.0, rng) for _ in range(n)]
    limit = 1.95 * math.sqrt(2 / n)
    assert distance(1 - lam, [share for share, _, _ in slow]) < limit
    boxes = boxes_of(own[lam < 1] == 0)
    slow = [box for box in slow if box[0]]
    assert distance([2 * y + h for h, _, y, _ in boxes], [y for _, y, _ in slow]) < limit
    assert distance([2 * x + w for _, w, _, x in boxes], [x for _, _, x in slow]) < limit
    assert distance([2 * x + w - 2 * y - h for h, w, y, x in boxes], [x - y for _, y, x in slow]) < limit
    assert all(h % 2 == 0 for h, _, y, _ in boxes if 0 < y < H - h) and all(w % 2 == 0 for _, w, _, x in boxes if 0 < x < W - w)
    own, lam = run(0, prob=0.3)
    cut = ((own == 0) | (own == 1)).flatten(1).all(1) & (lam < 1)
    assert abs((lam < 1).float().mean() - 0.3) < 0.08 and (own[lam == 1] == 1).all()
    assert abs(cut.float().mean() - 0.15) < 0.05
    own, lam = run(0, switch=0, mixup=0.3)
    assert distance(lam, beta_cdf(0.3)) < 1.95 / math.sqrt(n) and ((own - lam[:, None, None]).abs() < 1e-5).all()
    assert distance(run(0, switch=1, cutmix=0.3)[1], [1 - slow_cutmix(H, W, 0.3, rng)[0] for _ in range(n)]) < limit


def test_mix_draws_are_those_of_the_first_row():
    found = {}
    for first, rows in ((0, 6), (0, 2), (2, 2), (2, 4), (4, 2)):
        ends = torch.arange(rows) < rows // 2                        # first half 1, second half 0: shows the weight
        clips, targets = ends.float().view(-1, 1, 1, 1, 1).expand(-1, 3, 2, 12, 12), ends.float()[:, None]
        out, soft = mix(clips, targets, seeded(7, first, 6))
        found[first, rows] = soft[0].item(), *out[0].flatten().tolist()
        assert all(torch.equal(a, b) for a, b in zip((out, soft), mix(clips, targets, seeded(7, first, 6))))
    assert found[0, 6] == found[0, 2] and found[2, 2] == found[2, 4] and len(set(found.values())) == 3


def test_box_mask():
    column = [torch.tensor([[v] for v in values]) for values in ((1, -2), (2, 4), (3, 4), (2, 9))]
    masks = box_mask(*column, 5, 6)
    for k, (top, left, height, width) in enumerate(((1, 2, 3, 2), (-2, 4, 4, 9))):
        for y in range(5):
            for x in range(6):
                assert masks[k, y, x] == (top <= y < top + height and left <= x < left + width)
