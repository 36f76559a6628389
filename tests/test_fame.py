"""FAME against slow loops written from the paper, the released code's numbers, and the truth of the toy data."""
import colorsys
import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import fame
from common import Item, Video, parse_config, to_float01, toy_video
from conftest import golden_arrays, noise, numbers, seeded, tiny_video
from fame import (RECIPES, Config, colour_bins, derangement, foreground_mask, frame_difference, merge, preview,
                  sample_clips, spread)
from test_contrast import tiny


def clips_uint8(clips=8, seed=0):
    return (noise(clips, 3, 4, 16, 16, seed=seed) * 255).byte()


def moving_square(B=2, T=4, H=24, W=24):
    """Coloured clips in which something moves: a square on a background of patches, and a little noise."""
    clips = F.interpolate(noise(B, 3, 4, 4), (H, W))[:, :, None].repeat(1, 1, T, 1, 1)
    for b, t in product(range(B), range(T)):
        clips[b, :, t, 5 + b:13 + b, 3 + 2 * t:10 + 2 * t] = noise(3, 1, 1, seed=10 + b)
    return (clips + 0.02 * noise(B, 3, T, H, W, seed=1)).clamp(0, 1)


# ---- the released code -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=["fame_gray.npz", "fame_colour_b0.3.npz"])
def golden(request):
    content = golden_arrays(request.param)
    return dict(content, clips=to_float01(content["clip_u8"]), beta=0.3 if "0.3" in request.param else 0.5)


def test_difference_and_seeds_equal_the_released_code(golden):
    difference = frame_difference(golden["clips"])
    torch.testing.assert_close(difference, golden["diff"], atol=1e-5, rtol=0)
    torch.testing.assert_close(spread(difference), golden["seed_map"], atol=1e-5, rtol=0)


def test_colour_histograms_equal_the_released_code(golden):
    bins = colour_bins(golden["clips"].mean(2), 2 * math.pi)
    seed, N = golden["seed_map"].flatten(1), bins.shape[1]
    for name, pixels in (("hist_fg", seed.topk(int(0.5 * N))), ("hist_bg", seed.topk(int(0.1 * N), largest=False))):
        got = torch.stack([b[i].bincount(minlength=1000) for b, i in zip(bins, pixels.indices)])
        assert got.sum() == golden[name].sum() and (got - golden[name]).abs().sum() <= 1e-3 * got.sum()


def test_soft_map_and_mask_equal_the_released_code(golden):
    mask, soft = foreground_mask(golden["clips"], golden["beta"], 2 * math.pi)
    torch.testing.assert_close(soft, golden["soft"], atol=5e-3, rtol=0)
    both, either = (((mask + golden["mask"]) > least).sum((1, 2)) for least in (1, 0))
    assert (both / either >= 0.999).all() and (mask.sum((1, 2)) == golden["mask"].sum((1, 2))).all()


def test_merged_clips_equal_the_released_formula(golden):
    clips, mask = golden["clips"], golden["mask"][:, None, None].float()
    perm = golden.get("perm", torch.tensor([0]))                                # one clip alone is its own partner
    assert torch.equal(merge(clips, golden["mask"].float(), perm), clips * mask + clips[perm] * (1 - mask))


# ---- foreground ------------------------------------------------------------------------------------------------------

def slow_spread(x):
    """Rows of numbers -> the same, blurred and scaled to [0, 1]: pixel by pixel, tap by tap."""
    H, W = len(x), len(x[0])
    k = (int(0.1 * min(H, W)) // 2) * 2 + 1
    r, sigma = range(-(k // 2), k // 2 + 1), k / 3

    def mirror(i, n):
        return -i if i < 0 else 2 * (n - 1) - i if i >= n else i
    taps = {(dy, dx): math.exp(-(dy ** 2 + dx ** 2) / (2 * sigma ** 2)) for dy, dx in product(r, r)}
    total, out = sum(taps.values()), np.zeros((H, W))
    for i, j in product(range(H), range(W)):
        out[i, j] = sum(w / total * x[mirror(i + dy, H)][mirror(j + dx, W)] for (dy, dx), w in taps.items())
    out -= out.min()
    return out / (out.max() + 1e-8)


def slow_place(r, g, b, hue_scale):
    """Where a colour is in the table of bins, before rounding: hue and saturation disc, value; each 1 .. 10."""
    h, _, v = colorsys.rgb_to_hsv(r, g, b)
    s, angle = (max(r, g, b) - min(r, g, b)) / (max(r, g, b) + 1e-8), h * 2 * math.pi * hue_scale
    return 9 * (s * math.cos(angle) + 1) / 2 + 1, 9 * (s * math.sin(angle) + 1) / 2 + 1, 9 * v + 1


def slow_bin(place):
    a, b, c = map(round, place)
    return a + 10 * (b - 1) + 100 * (c - 1)


def slow_mask(clip, beta, hue_scale):
    """clip (3, T, H, W) -> pixels of the mask, soft (H, W)."""
    _, T, H, W = clip.shape
    pixels = list(product(range(H), range(W)))
    D = [[sum(abs(clip[c, t, i, j] - clip[c, t + 1, i, j]) for c in range(3) for t in range(T - 1)) / (T - 1)
          for j in range(W)] for i in range(H)]
    seed = slow_spread(D)
    order = sorted(pixels, key=lambda p: seed[p])
    front, back = order[len(pixels) - int(0.5 * len(pixels)):], order[:int(0.1 * len(pixels))]
    bins = {(i, j): slow_bin(slow_place(*[clip[c, :, i, j].mean() for c in range(3)], hue_scale)) for i, j in pixels}
    in_front, in_back = Counter(bins[p] for p in front), Counter(bins[p] for p in back)
    P = np.zeros((H, W))
    for p in pixels:
        p_front, p_back = in_front[bins[p]] / len(front), (in_back[bins[p]] + 1) / (len(back) + 1000)
        P[p] = p_front / (p_back + p_front)
    soft = slow_spread(P)
    return sorted(pixels, key=lambda p: soft[p])[len(pixels) - int(beta * len(pixels)):], soft


@pytest.mark.parametrize("beta, hue_scale, size", [
    (0.5, 1.0, (24, 24)), (0.3, 2 * math.pi, (24, 24)), (0.13, 1.0, (22, 47)), (0.9, 0.5, (41, 40))])
def test_foreground_mask_equals_slow_loops_over_the_pixels(beta, hue_scale, size):
    clips = torch.cat([moving_square(1, 4, *size), noise(1, 3, 4, *size)])
    mask, soft = foreground_mask(clips, beta, hue_scale)
    for clip, m, s in zip(clips.double().numpy(), mask, soft):
        chosen, expected = slow_mask(clip, beta, hue_scale)
        torch.testing.assert_close(s, torch.from_numpy(expected).float(), atol=1e-4, rtol=0)
        threshold = min(expected[p] for p in chosen)
        sure = torch.from_numpy(abs(expected - threshold) > 1e-4)               # ties may fall either way
        assert torch.equal(m[sure] > 0, torch.from_numpy(expected > threshold)[sure]) and sure.float().mean() > 0.8
        assert s[m > 0].min() >= s[m == 0].max() and m.sum() == len(chosen)
    for i in range(2):                                                          # each clip as if it were alone
        torch.testing.assert_close(foreground_mask(clips[i:i + 1], beta, hue_scale)[1][0], soft[i], atol=1e-5, rtol=0)


def inputs(kind, H, W):
    clip = torch.full((3, 5, H, W), dict(white=1.0, grey=0.5).get(kind, 0.0))
    if kind in ("random", "static"):
        clip = noise(3, 5 if kind == "random" else 1, H, W).expand(3, 5, H, W).clone()
    if kind == "one pixel":
        clip[:, 2, 3, 4] = 1.0
    return clip


@pytest.mark.parametrize("kind", ["random", "black", "white", "grey", "static", "one pixel"])
def test_the_mask_has_exactly_its_area_whatever_the_clip(kind):
    for beta, (H, W) in product((0.1, 0.3, 0.77), ((24, 24), (20, 31), (8, 8))):
        mask, soft = foreground_mask(inputs(kind, H, W)[None], beta)
        assert mask.sum() == int(beta * H * W) and set(mask.unique().tolist()) == {0.0, 1.0}
        assert mask.shape == soft.shape == (1, H, W) and soft.isfinite().all() and soft.min() >= 0 and soft.max() <= 1


@pytest.mark.parametrize("beta", [0.3, 0.5])
def test_the_mask_holds_the_sprite_on_toy_data(beta):
    cfg, rng, held = parse_config(Config, RECIPES, []), np.random.default_rng(0), []
    for index in range(64):
        video, truth = toy_video(0, "test", index)                              # (F, H, W, 3)
        start = rng.integers(len(video) - (cfg.frames - 1) * cfg.stride)
        shown = slice(start, start + cfg.frames * cfg.stride, cfg.stride)
        sprite = torch.from_numpy(common._toy_depth(truth, shown) > 0).float()  # (T, H, W)
        clip = to_float01(torch.from_numpy(video[shown]).permute(3, 0, 1, 2))
        mask = foreground_mask(clip[None], beta)[0]
        held.append(((sprite * mask).sum((1, 2)) / sprite.sum((1, 2))).mean().item())
    assert np.mean(np.array(held) >= 0.85) >= 0.9


def test_merge_copies_every_pixel_from_one_clip_or_the_other_frame_by_frame():
    clips, permutation = noise(3, 3, 4, 5, 6), torch.tensor([2, 0, 1])
    mask = (noise(3, 5, 6, seed=1) < 0.4).float()
    merged, before = merge(clips, mask, permutation), clips.clone()
    for b, c, t, i, j in product(range(3), range(3), range(4), range(5), range(6)):
        source = b if mask[b, i, j] else permutation[b]
        assert merged[b, c, t, i, j] == clips[source, c, t, i, j]
    assert torch.equal(clips, before) and 0 < mask.mean() < 1


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_nobody_is_their_own_partner_and_everybody_else_is_equally_often(count):
    generator, often, rounds = seeded(), torch.zeros(count, count), 400 * (count - 1)
    for _ in range(rounds):
        partner = derangement(count, generator)
        assert partner.shape == (count,) and sorted(partner.tolist()) == list(range(count))
        often[torch.arange(count), partner] += 1
    others = often[~torch.eye(count, dtype=torch.bool)]
    assert (often.diag() == 0).all() and ((others - 400).abs() < 100).all()
    assert torch.equal(derangement(count, seeded(3)), derangement(count, seeded(3)))


# ---- FAME ------------------------------------------------------------------------------------------------------------

def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def slow_info_nce(query, key, negatives, T):
    """Lists of vectors -> mean over pairs of -log e^(qk/T) / (e^(qk/T) + sum_n e^(qn/T))."""
    losses = []
    for q, k in zip(query, key):
        own, others = math.exp(dot(q, k) / T), [math.exp(dot(q, n) / T) for n in negatives]
        losses.append(-math.log(own / (own + sum(others))))
    return sum(losses) / len(losses)


def test_only_the_first_view_is_merged_after_the_flip_and_before_colours_change(monkeypatch):
    for name in ("blur", "normalize"):
        monkeypatch.setattr(fame, name, lambda clips, *_: clips)
    monkeypatch.setattr(fame, "flip", lambda clips, generator, p: (clips.flip(-1) if p else clips, None))
    monkeypatch.setattr(fame, "colour_jitter", lambda clips, generator, **strengths: 1 - clips)
    clips = (moving_square(8, 4, 20, 20) * 255).byte()
    mirrored = to_float01(clips.flip(-1))
    first, second = tiny("fame", beta=0.3).views(clips, seeded(5))
    partner, (mask, _) = derangement(4, seeded(5)), foreground_mask(mirrored[::2], 0.3)
    assert torch.equal(first, 1 - merge(mirrored[::2], mask, partner)) and torch.equal(second, 1 - mirrored[1::2])
    first, second = tiny("fame", merge=False).views(clips, seeded(5))
    assert torch.equal(first, 1 - mirrored[::2]) and torch.equal(second, 1 - mirrored[1::2])
    assert torch.equal(tiny("fame", merge=False, flip=0.0).views(clips)[0], 1 - mirrored[::2].flip(-1))


@pytest.mark.parametrize("merged", [True, False])
def test_loss_statistics_and_queue_equal_a_computation_by_hand(merged):
    model, clips = tiny("fame", merge=merged, temperature=0.2, queue=16), clips_uint8()
    model(clips_uint8(seed=9), seeded(9))                                       # something in the queue
    for p in model.encoder.parameters():
        p.data.add_(0.02 * torch.randn(p.shape, generator=seeded(1)))           # keys differ from queries
    negatives = model.queue.keys.clone()
    loss, stats = model(clips, seeded(2))

    def encode(encoder, head, view):
        return [(z / z.norm()).tolist() for z in (head(encoder(clip[None]))[0].detach() for clip in view)]
    first, second = model.views(clips, seeded(2))
    q1, q2 = (encode(model.encoder, model.head, view) for view in (first, second))
    k1, k2 = (encode(model.keys["encoder"], model.keys["head"], view) for view in (first, second))
    expected = (slow_info_nce(q1, k2, negatives.tolist(), 0.2) + slow_info_nce(q2, k1, negatives.tolist(), 0.2)) / 2
    near = [[dot(q, k) for k in k2] for q in q1]
    assert loss.item() == pytest.approx(expected, rel=1e-4) and set(stats) == {"similarity", "top1"}
    assert stats["similarity"].item() == pytest.approx(np.mean([row[i] for i, row in enumerate(near)]), abs=1e-5)
    assert stats["top1"].item() == pytest.approx(100 * np.mean([row[i] == max(row) for i, row in enumerate(near)]))
    assert model.queue.pointer == 0 and torch.equal(model.queue.keys[:8], negatives[:8])
    torch.testing.assert_close(model.queue.keys[8:], torch.tensor(k2 + k1), atol=1e-5, rtol=0)


def test_pairs_of_clips_have_the_frames_of_their_stride_and_starts_of_their_own(tmp_path):
    cfg = Config(frames=4, stride=3, image_size=16, repeats=2)
    with Video(tiny_video(tmp_path / "a.mp4", 40)) as video:
        clips = sample_clips(video, Item(""), np.random.default_rng(0), cfg)
    shown = numbers(clips)
    assert clips.shape == (4, 4, 16, 16, 3) and (np.diff(shown) == 3).all() and len(set(shown[:, 0])) > 2


def test_preview_shows_each_step_from_the_frame_to_the_merged_clip(monkeypatch):
    kept, clips = [], (moving_square(6, 5) * 255).byte()
    monkeypatch.setattr(fame, "save_sheet", lambda *args: kept.extend(args))
    preview(tiny("fame", beta=0.3), clips, "x.png")
    (path, rows), first = kept, to_float01(clips)[::2]
    mask, soft = foreground_mask(first, 0.3)
    for b, other in enumerate(first.roll(1, 0)):
        maps = [x[b] / x[b].max() for x in (frame_difference(first), soft, mask)]
        merged = [torch.where(mask[b] > 0, first[b, :, t], other[:, t]) for t in (0, 2, 4)]
        expected = [first[b, :, 0], *[m.expand(3, -1, -1) for m in maps], other[:, 0], *merged]
        torch.testing.assert_close(rows[b], torch.stack(expected))
    assert path == "x.png" and len(rows) == 3
