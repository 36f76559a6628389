"""FAME against slow loops written from the paper and its code, the released code's numbers, and the truth of the toy data."""
import colorsys
import copy
import math
from collections import Counter
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms.v2 import functional as tv

import common
import fame
from common import (BACKBONES, Bottleneck, ConvNet, Env, Queue, ResNet3D, RowGenerator, UserError, VITS,
                    all_reduce_mean, blur, colour_jitter, ema_update, load_weights, make_backbone, make_optimizer,
                    normalize, parse_config, random_resized_crop, resume_or_init, to_float01, toy_video, wrap_model)
from fame import FAME, RECIPES, Config, colour_bins, derangement, foreground_mask, frame_difference, info_nce, merge, spread
from conftest import golden_arrays, seeded

torch.set_num_threads(1)
CPU = torch.device("cpu")
VIT = dict(image_size=16, frames=4, patch_size=8, tubelet_size=2, dim=24, depth=1, heads=3)
LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1, 1)


def tiny(encoder=None, seed=0, **changes):
    torch.manual_seed(seed)
    return FAME(encoder or make_backbone(**VIT), **{**dict(queue=16, momentum=0.9, outputs=8), **changes})


def with_batch_norm():
    stem = nn.Sequential(nn.Conv3d(3, 6, (1, 4, 4), (1, 4, 4)), nn.BatchNorm3d(6), nn.ReLU())
    return ConvNet(dict(stem=stem, layer=nn.Sequential(nn.Conv3d(6, 8, 3), nn.BatchNorm3d(8), nn.ReLU())), 8, {})


def noise(*shape, seed=0, least=0.0, most=1.0):
    return least + (most - least) * torch.rand(*shape, generator=seeded(seed))


def clips_uint8(batch=8, frames=4, size=16, seed=0):
    return (noise(batch, 3, frames, size, size, seed=seed) * 255).byte()


def moving_square(B=2, T=4, H=24, W=24, seed=0):
    """Coloured clips in which something moves: a square on a background of patches, and a little noise."""
    ground = F.interpolate(noise(B, 3, 4, 4, seed=seed), (H, W))
    clips = ground[:, :, None].repeat(1, 1, T, 1, 1)
    for b, t in product(range(B), range(T)):
        clips[b, :, t, 5 + b:13 + b, 3 + 2 * t:10 + 2 * t] = noise(3, 1, 1, seed=seed + 10 + b)
    return (clips + 0.02 * noise(B, 3, T, H, W, seed=seed + 1)).clamp(0, 1)


@pytest.fixture(scope="module")
def toys():
    """64 toy videos of `test` (64, 3, F, H, W) in [0, 1], where the sprite is (64, F, H, W), and their classes."""
    videos, truths = zip(*[toy_video(0, "test", i) for i in range(64)])
    inside = np.stack([common._toy_depth(truth, slice(None)) > 0 for truth in truths])
    clips = to_float01(torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3))
    return clips, torch.from_numpy(inside).float(), [int(truth["label"]) for truth in truths]


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
    both, either = ((mask + golden["mask"]) == 2).sum((1, 2)), ((mask + golden["mask"]) > 0).sum((1, 2))
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
    r, sigma = k // 2, k / 3
    def mirror(i, n):
        return -i if i < 0 else 2 * (n - 1) - i if i >= n else i
    taps = {(dy, dx): math.exp(-(dy ** 2 + dx ** 2) / (2 * sigma ** 2)) for dy, dx in product(range(-r, r + 1), repeat=2)}
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
        p_front, p_back = in_front[bins[p]] / (len(front) + 1e-8), (in_back[bins[p]] + 1) / (len(back) + 1000 + 1e-8)
        P[p] = p_front / (p_back + p_front)
    soft = slow_spread(P)
    return sorted(pixels, key=lambda p: soft[p])[len(pixels) - int(beta * len(pixels)):], soft


@pytest.mark.parametrize("beta, hue_scale, size", [(0.5, 1.0, (24, 24)), (0.3, 2 * math.pi, (24, 24)), (0.13, 1.0, (22, 47)),
                                                   (0.9, 0.5, (41, 40))])
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


@pytest.mark.parametrize("hue_scale", [1.0, 2 * math.pi])
def test_hue_saturation_and_value_are_those_of_colorsys(hue_scale):
    corners = list(product((0, 0.2, 0.55, 1), repeat=3))                        # greys, pure colours, two equal maxima
    colours = torch.cat([torch.tensor(corners), noise(3000, 3)])
    bins = colour_bins(colours.T[None, :, None], hue_scale)[0].tolist()
    places = [slow_place(*colour, hue_scale) for colour in colours.double().tolist()]
    grey = [r == g == b for r, g, b in colours.tolist()]
    sure = [g or all(abs(v % 1 - 0.5) > 1e-4 for v in place) for g, place in zip(grey, places)]
    wrong = [(c, b) for c, b, p, s in zip(colours.tolist(), bins, places, sure) if s and b != slow_bin(p)]
    assert not wrong and np.mean(sure) > 0.99 and 0 < min(bins) and max(bins) < 1000


def test_hue_is_not_only_right_up_to_the_bins():
    turns = torch.arange(0, 1, 1 / 720)                                         # full colours: x, y lie on a circle
    colours = torch.tensor([colorsys.hsv_to_rgb(h, 1, 1) for h in turns.double().tolist()])
    for k in range(1, 60, 7):                                                   # magnified: the bins move k times as fast
        bins = colour_bins(colours.T[None, :, None], k)[0].tolist()
        places = [slow_place(*c, k) for c in colours.double().tolist()]
        assert all(b == slow_bin(p) for b, p in zip(bins, places) if all(abs(v % 1 - 0.5) > 1e-3 for v in p))


def inputs(kind, H, W):
    clip = torch.full((3, 5, H, W), dict(white=1.0, grey=0.5).get(kind, 0.0))
    if kind == "random":
        clip = noise(3, 5, H, W)
    if kind == "static":
        clip = noise(3, 1, H, W).expand(3, 5, H, W).clone()
    if kind == "one pixel":
        clip[:, 2, 3, 4] = 1.0
    return clip


KINDS = ["random", "black", "white", "grey", "static", "one pixel"]


@pytest.mark.parametrize("beta", [0.1, 0.3, 0.5, 0.77])
@pytest.mark.parametrize("H, W", [(24, 24), (20, 31), (8, 8)])
def test_the_mask_has_exactly_its_area_whatever_the_clip(beta, H, W):
    for kind in KINDS:
        mask, soft = foreground_mask(inputs(kind, H, W)[None], beta)
        assert mask.sum() == int(beta * H * W) and set(mask.unique().tolist()) == {0.0, 1.0}, kind
        assert mask.shape == soft.shape == (1, H, W) and soft.isfinite().all() and soft.min() >= 0 and soft.max() <= 1, kind


def test_what_moves_is_found():
    clips = torch.full((1, 3, 6, 48, 48), 0.2)
    for t in range(6):
        clips[0, :, t, 10:22, 8 + 3 * t:20 + 3 * t] = torch.tensor([0.9, 0.3, 0.1]).view(3, 1, 1)
    mask = foreground_mask(clips, 0.25)[0][0]
    assert mask[10:22, 8:35].mean() > 0.95
    difference = frame_difference(inputs("one pixel", 24, 24)[None])[0]
    assert difference[3, 4] == pytest.approx(6 / 4) and (difference > 0).sum() == 1


def test_each_clip_gets_the_mask_it_would_get_alone():
    clips = torch.cat([torch.stack([inputs(kind, 24, 24) for kind in ("random", "one pixel")]), moving_square(2, 5)])
    mask, soft = foreground_mask(clips, 0.3)
    for i in range(len(clips)):
        alone, s = foreground_mask(clips[i:i + 1], 0.3)
        torch.testing.assert_close(s[0], soft[i], atol=1e-5, rtol=0)
        assert (alone[0] != mask[i]).sum() <= 2, "rounding may swap two pixels"


def test_colours_matter_only_with_their_hue_scale():
    colour, grey = moving_square(2, 4), moving_square(2, 4).mean(1, keepdim=True).expand(-1, 3, -1, -1, -1)
    once, twice = (foreground_mask(colour, 0.3, scale)[1] for scale in (1.0, 2 * math.pi))
    assert not torch.allclose(once, twice, atol=0.01), "they are different angles"
    assert torch.equal(*(foreground_mask(grey, 0.3, scale)[0] for scale in (1.0, 2 * math.pi))), "grey has no angle"


# ---- merging ---------------------------------------------------------------------------------------------------------

def test_merge_copies_every_pixel_from_one_clip_or_the_other_frame_by_frame():
    clips, permutation = noise(3, 3, 4, 5, 6), torch.tensor([2, 0, 1])
    mask = (noise(3, 5, 6, seed=1) < 0.4).float()
    merged, before = merge(clips, mask, permutation), clips.clone()
    for b, c, t, i, j in product(range(3), range(3), range(4), range(5), range(6)):
        source = b if mask[b, i, j] else permutation[b]
        assert merged[b, c, t, i, j] == clips[source, c, t, i, j]
    assert torch.equal(clips, before) and 0 < mask.mean() < 1


def test_merge_with_nothing_and_everything_masked():
    clips, permutation = noise(3, 3, 2, 4, 4), torch.tensor([1, 2, 0])
    assert torch.equal(merge(clips, torch.ones(3, 4, 4), permutation), clips)
    assert torch.equal(merge(clips, torch.zeros(3, 4, 4), permutation), clips[permutation])


@pytest.mark.parametrize("count", range(2, 21))
def test_nobody_is_their_own_partner_and_everybody_is_one(count):
    for seed in range(10):
        partner = derangement(count, seeded(seed))
        assert partner.shape == (count,) and sorted(partner.tolist()) == list(range(count))
        assert (partner != torch.arange(count)).all()


def test_the_generator_decides_who_is_partner():
    assert torch.equal(derangement(20, seeded(3)), derangement(20, seeded(3)))
    assert not torch.equal(derangement(20, seeded(3)), derangement(20, seeded(4)))
    generator = seeded(3)
    assert not torch.equal(derangement(20, generator), derangement(20, generator))


def test_every_other_clip_is_partner_equally_often():
    generator, count = seeded(), torch.zeros(5, 5)
    for _ in range(2000):
        count[torch.arange(5), derangement(5, generator)] += 1
    others = count[~torch.eye(5, dtype=torch.bool)]
    assert (count.diag() == 0).all() and ((others - 500).abs() < 100).all()


# ---- toy data --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("beta", [0.3, 0.5])
def test_the_mask_holds_the_sprite_on_toy_data(toys, beta):
    videos, inside, labels = toys
    cfg, rng = parse_config(Config, RECIPES, []), np.random.default_rng(0)
    starts = rng.integers(videos.shape[2] - (cfg.frames - 1) * cfg.stride, size=len(videos))
    frames = torch.from_numpy(starts[:, None] + cfg.stride * np.arange(cfg.frames))                   # (64, T)
    row = torch.arange(len(videos))[:, None]
    clips, sprite = videos.transpose(1, 2)[row, frames].transpose(1, 2), inside[row, frames]
    mask, _ = foreground_mask(clips, beta)
    held = ((sprite * mask[:, None]).sum((2, 3)) / sprite.sum((2, 3))).mean(1)                        # (64,)
    per_class = [round(held[np.array(labels) == c].mean().item(), 2) for c in range(8)]
    assert (held >= 0.85).float().mean() >= 0.9, f"{(held >= 0.85).sum()} of 64, mean {held.mean():.3f}, {per_class}"


# ---- InfoNCE ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("K, T", [(1, 0.1), (7, 0.07), (64, 1.0)])
def test_loss_is_log_of_how_many_there_are_if_all_are_equally_similar(K, T):
    e = F.normalize(torch.ones(5, 8), dim=1)
    assert info_nce(e, e, e[:1].expand(K, 8), T).item() == pytest.approx(math.log(K + 1), abs=1e-5)


def test_loss_of_perfect_pairs_among_orthogonal_negatives():
    e = torch.eye(8)
    assert info_nce(e[:3], e[:3], e[3:].repeat(4, 1), 0.1).item() == pytest.approx(math.log(1 + 20 * math.exp(-10)), rel=1e-3)
    assert info_nce(e[:3], -e[:3], e[3:], 0.1).item() == pytest.approx(10 + math.log(5 + math.exp(-10)), rel=1e-5)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def slow_info_nce(query, key, negatives, T):
    """Lists of vectors -> loss, pair by pair."""
    losses = []
    for q, k in zip(query, key):
        positive, others = dot(q, k), [dot(q, n) for n in negatives]
        total = math.exp(positive / T) + sum(math.exp(o / T) for o in others)
        losses.append(-math.log(math.exp(positive / T) / total))
    return sum(losses) / len(losses)


def unit_vectors(n, dim=8, seed=0):
    return F.normalize(torch.randn(n, dim, generator=seeded(seed)), dim=1)


@pytest.mark.parametrize("T", [0.07, 0.2, 1.0])
def test_info_nce_equals_a_loop_over_the_pairs(T):
    query, negatives = unit_vectors(9), unit_vectors(13, seed=2)
    key = F.normalize(query + 0.5 * unit_vectors(9, seed=1) * torch.arange(9.0)[:, None], dim=1)
    expected = slow_info_nce(query.tolist(), key.tolist(), negatives.tolist(), T)
    assert info_nce(query, key, negatives, T).item() == pytest.approx(expected, rel=1e-5)


# ---- queue and key encoder -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, batches", [(7, [3, 3, 3, 3]), (5, [8]), (5, [2, 12, 2, 1]), (4, [4, 4]), (6, [1] * 13), (1, [3]),
                                           (3, [2, 3, 7, 6])])
def test_queue_holds_the_last_keys_oldest_at_the_pointer(size, batches):
    torch.manual_seed(0)
    queue = Queue(size, 2)
    assert queue.pointer == 0 and torch.allclose(queue.keys.norm(dim=1), torch.ones(size))
    expected, number = queue.keys.tolist(), 0
    for batch in batches:
        keys = torch.arange(number, number + 2 * batch).float().view(batch, 2)
        number, expected = number + 2 * batch, (expected + keys.tolist())[-size:]
        queue.enqueue(keys)
        assert queue.keys.roll(-int(queue.pointer), 0).tolist() == expected and 0 <= queue.pointer < size


def test_queue_is_written_in_place_at_the_pointer():
    queue = Queue(7, 2)
    before, place = queue.keys.clone(), queue.keys.data_ptr()
    queue.enqueue(torch.ones(3, 2))
    assert queue.pointer == 3 and torch.equal(queue.keys[3:], before[3:]) and (queue.keys[:3] == 1).all()
    queue.enqueue(torch.full((5, 2), 2.0))
    assert queue.pointer == 1 and queue.keys[:, 0].tolist() == [2, 1, 1, 2, 2, 2, 2] and queue.keys.data_ptr() == place


def test_queue_is_saved_and_goes_on():
    torch.manual_seed(0)
    queue, other = Queue(7, 2), Queue(7, 2)
    queue.enqueue(unit_vectors(5, 2))
    state = copy.deepcopy(queue.state_dict())
    assert set(state) == {"keys", "pointer"} and not [*queue.parameters()]
    other.load_state_dict(state)
    for q in (queue, other):
        q.enqueue(unit_vectors(4, 2, seed=1))
    assert torch.equal(queue.keys, other.keys) and queue.pointer == other.pointer == 2


def test_keys_that_are_not_finite_become_zero():
    queue = Queue(4, 2)
    queue.enqueue(torch.tensor([[math.nan, math.nan], [math.inf, 0.5], [-math.inf, -0.5]]))
    assert queue.keys[:3].tolist() == [[0, 0], [0, 0.5], [0, -0.5]]


@pytest.mark.parametrize("momentum, updates", [*product([0.999, 0.9, 0.3, 0.0, 1.0], [math.inf]), (0.9, 1), (0.9, 4), (0.9, 10),
                                               (0.9, 11), (0.0, 7)])
def test_ema_moves_parameters_and_float_buffers_only(momentum, updates):
    def net(seed):
        torch.manual_seed(seed)
        net = with_batch_norm()
        for tensor in [*net.parameters(), *net.buffers()]:
            tensor.data.copy_(torch.rand(tensor.shape) if tensor.is_floating_point() else torch.tensor(7 + seed))
        return net
    target, source = net(0), net(1)
    before, given = (copy.deepcopy(n.state_dict()) for n in (target, source))
    ema_update(target, source, momentum, *([torch.tensor(updates)] if updates < math.inf else []))
    parameters, counted = dict(target.named_parameters()), 0
    for name, value in target.state_dict().items():
        if value.is_floating_point():
            m = momentum if name in parameters else min(momentum, 1 - 1 / updates)
            torch.testing.assert_close(value, m * before[name] + (1 - m) * given[name], atol=1e-6, rtol=0)
            assert m > 0 or torch.equal(value, given[name])
        else:
            counted += 1
            assert torch.equal(value, before[name])
        assert torch.equal(source.state_dict()[name], given[name])
    assert counted == 2 and not any(p.grad_fn for p in target.parameters())


def test_statistics_that_are_not_finite_do_not_reach_the_keys():
    target, source = with_batch_norm(), with_batch_norm()
    for buffer in source.buffers():
        if buffer.is_floating_point():
            buffer.fill_(3).view(-1)[0] = math.nan                              # as a step that was skipped leaves them
    ema_update(target, source, 0.5)
    assert all(b.isfinite().all() for net in (target, source) for b in net.buffers())
    assert target.stem[1].running_mean.tolist() == pytest.approx([0, 1.5, 1.5, 1.5, 1.5, 1.5])


def test_every_stage_is_compiled_for_queries_and_for_keys(monkeypatch):
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile(self, backend="eager", **how))
    monkeypatch.setattr(common.shutil, "which", lambda name: name)
    common.can_compile.cache_clear()
    model = FAME(make_backbone("r2plus1d_50", 32, 8, width=0.125), merge=False, queue=16)
    net = common.wrap_model(model, common.Env(torch.device("cpu"), 0, 1, None), compile=True)
    for step in range(2):
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, error_on_recompile=step > 0):
            net(torch.randint(256, (8, 3, 8, 32, 32), dtype=torch.uint8))[0].backward()
    common.can_compile.cache_clear()


def test_keys_start_as_a_copy_and_are_not_trained():
    model = tiny()
    for name, value in model.keys.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    mine = {p.data_ptr() for p in [*model.encoder.parameters(), *model.head.parameters()]}
    assert not mine & {p.data_ptr() for p in model.keys.parameters()}
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"encoder", "head"}


def test_update_keys_is_a_moving_average_of_encoder_and_head():
    model = tiny(momentum=0.75)
    before = copy.deepcopy(model.keys.state_dict())
    for p in [*model.encoder.parameters(), *model.head.parameters()]:
        p.data.add_(1)
    model.update_keys()
    for name, p in model.keys.named_parameters():
        torch.testing.assert_close(p.data, before[name] + 0.25)
    model.update_keys(momentum=0)
    for name, value in model.keys.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_gradient_reaches_all_of_the_encoder_and_head_and_nothing_else():
    for encoder in (make_backbone(**VIT), with_batch_norm()):
        model = tiny(encoder)
        model(clips_uint8(), seeded())[0].backward()
        for name, p in model.named_parameters():
            if name.startswith("keys."):
                assert p.grad is None, name
            else:
                assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
        assert not model.queue.keys.requires_grad and model.queue.keys.grad_fn is None


def test_statistics_hold_no_graph():
    _, stats = tiny()(clips_uint8(), seeded())
    assert [name for name, value in stats.items() if value.requires_grad] == []


def test_running_statistics_of_the_keys_change_only_with_update_keys():
    model, history = tiny(with_batch_norm(), momentum=0.6), []
    keys, net = model.keys["encoder"], model.encoder
    for update in range(1, 5):
        model.train()
        before, own = copy.deepcopy(keys.state_dict()), net.stem[1].running_mean.clone()
        model(clips_uint8(seed=update), seeded(update))
        assert net.training and not any(m.training for m in keys.modules())
        assert all(torch.equal(v, before[k]) for k, v in keys.state_dict().items())
        assert not torch.equal(own, net.stem[1].running_mean)
        model.update_keys()
        history.append(net.stem[1].running_var.clone())
        expected = 0.6 * before["stem.1.running_var"] + 0.4 * history[-1] if update > 2 else sum(history) / update
        torch.testing.assert_close(keys.stem[1].running_var, expected)


def test_a_key_does_not_depend_on_the_rest_of_the_batch():
    model, clips = tiny(with_batch_norm(), merge=False).train(), clips_uint8(8)
    model(clips, seeded(0, 0, 4))
    together = model.queue.keys[:8].clone()                                     # second views, then first ones
    model.queue.pointer.zero_()
    model(clips[4:], seeded(0, 2, 4))
    torch.testing.assert_close(model.queue.keys[:4], together[[2, 3, 6, 7]], atol=1e-6, rtol=0)


# ---- FAME ------------------------------------------------------------------------------------------------------------

def plain(monkeypatch):
    """Views without flip, jitter, blur and normalisation."""
    monkeypatch.setattr(fame, "flip", lambda clips, generator: (clips, None))
    monkeypatch.setattr(fame, "colour_jitter", lambda clips, generator, **_: clips)
    monkeypatch.setattr(fame, "blur", lambda clips, generator: clips)
    monkeypatch.setattr(fame, "normalize", lambda clips, config: clips)


def test_only_the_first_view_is_merged(toys, monkeypatch):
    plain(monkeypatch)
    clips = toys[0][:8, :, :16:2]
    first, second = tiny(beta=0.3).views(clips, seeded(5))
    partner, (mask, _) = derangement(4, seeded(5)), foreground_mask(clips[::2], 0.3)
    assert torch.equal(second, clips[1::2]) and torch.equal(first, merge(clips[::2], mask, partner))
    for b in range(4):
        here = mask[b].bool()
        assert torch.equal(first[b][:, :, here], clips[2 * b][:, :, here])
        assert torch.equal(first[b][:, :, ~here], clips[2 * partner[b]][:, :, ~here])


def test_no_merge_leaves_both_views_as_they_are(monkeypatch):
    plain(monkeypatch)
    clips = clips_uint8()
    first, second = tiny(merge=False).views(clips, seeded())
    assert torch.equal(first, clips[::2].float() / 255) and torch.equal(second, clips[1::2].float() / 255)


def test_the_mask_is_found_before_colours_change_and_after_the_flip(monkeypatch):
    seen, order = [], []
    monkeypatch.setattr(fame, "foreground_mask", lambda clips, *a: seen.append(clips) or foreground_mask(clips, *a))
    for name in ("flip", "foreground_mask", "merge", "colour_jitter", "blur", "normalize"):
        def step(*args, name=name, function=getattr(fame, name), **kwargs):
            order.append(name)
            return function(*args, **kwargs)
        monkeypatch.setattr(fame, name, step)
    clips = clips_uint8()
    tiny().views(clips, seeded())
    for found, clip in zip(seen[0], clips[::2]):
        assert torch.equal(found, to_float01(clip)) or torch.equal(found, to_float01(clip).flip(-1))
    assert order == ["flip", "flip", "foreground_mask", "merge", *["colour_jitter", "blur", "normalize"] * 2]


@pytest.mark.parametrize("merged", [True, False])
def test_loss_statistics_and_queue_equal_a_computation_by_hand(merged):
    model, clips = tiny(merge=merged, temperature=0.2), clips_uint8()
    model(clips_uint8(seed=9), seeded(9))                                       # something in the queue
    for p in model.encoder.parameters():
        p.data.add_(0.02 * torch.randn(p.shape, generator=seeded(1)))           # keys differ from queries
    negatives, pointer = model.queue.keys.clone(), int(model.queue.pointer)
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
    assert pointer == 8 and model.queue.pointer == 0 and torch.equal(model.queue.keys[:8], negatives[:8])
    torch.testing.assert_close(model.queue.keys[8:], torch.tensor(k2 + k1), atol=1e-5, rtol=0)


def test_own_keys_are_not_among_the_negatives_of_the_step():
    model, clips = tiny(merge=False), clips_uint8()
    model.views = lambda *_: [normalize(clips[::2])] * 2                        # perfect pairs: keys equal queries
    model.queue.keys.zero_()
    loss, stats = model(clips, seeded())
    assert loss.item() == pytest.approx(math.log(1 + 16 * math.exp(-10)), rel=0.01) and stats["top1"] == 100
    assert (model.queue.keys[:8].norm(dim=1) > 0.99).all() and (model.queue.keys[8:] == 0).all()


def test_loss_is_the_same_with_the_views_exchanged():
    losses, views = [], [normalize(clips_uint8(4, seed=s)) for s in (1, 2)]
    for order in (views, views[::-1]):
        model = tiny()
        for p in model.encoder.parameters():
            p.data.add_(0.02 * torch.randn(p.shape, generator=seeded(1)))
        model.views = lambda *_: order
        losses.append(model(clips_uint8(), seeded())[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_a_clip_gets_does_not_depend_on_how_the_batch_is_split():
    model, clips = tiny(merge=False), clips_uint8(12)
    whole = model.views(clips, seeded(3, 0, 6))
    for first, rows in ((0, 2), (2, 3), (5, 1)):
        part = model.views(clips[2 * first:2 * (first + rows)], seeded(3, first, 6))
        for view, expected in zip(part, whole):
            torch.testing.assert_close(view, expected[first:first + rows], atol=1e-6, rtol=0)
    assert not torch.equal(whole[0], model.views(clips, seeded(4, 0, 6))[0])


def test_autocast_does_not_change_views_and_the_loss_stays_float32(monkeypatch):
    views, losses, rounded, own = [], [], [], FAME.views
    monkeypatch.setattr(fame, "info_nce", lambda *args: rounded.append(torch.is_autocast_enabled("cpu")) or info_nce(*args))
    for enabled in (False, True):
        model = tiny()
        model.views = lambda *args: views.append(own(model, *args)) or views[-1]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, stats = model(clips_uint8(), seeded())
        losses.append(loss.item())
        assert loss.dtype == stats["similarity"].dtype == model.queue.keys.dtype == torch.float32
    assert rounded == [False] * 4
    for exact, inside in zip(*views):
        assert torch.equal(exact, inside) and inside.dtype == torch.float32
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[1] != losses[0]


def test_a_saved_model_goes_on_exactly():
    model, other = tiny(), tiny(seed=1)
    model(clips_uint8(), seeded())
    model.encoder.norm.bias.data.add_(1)
    model.update_keys()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    results = [[m(clips_uint8(seed=s), seeded(s))[0].item() for s in (1, 2)] for m in (model, other)]
    assert results[0] == results[1] and torch.equal(model.queue.keys, other.queue.keys)


def two_steps(rank, world, folder):
    """Two steps of SGD on this process's share of 4 pairs; what the first process has in the end goes to a file."""
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    model = tiny(merge=False, queue=13, outputs=8)
    optimizer = make_optimizer("sgd", model, 0.5, 1e-4, CPU)
    optimizer.register_step_post_hook(lambda *_: model.update_keys())
    net, rows, losses, queues = wrap_model(model, Env(CPU, rank, world, None), False), 4 // world, [], []
    for step in range(2):
        clips = clips_uint8(seed=step)[2 * rank * rows:2 * (rank + 1) * rows]
        loss, _ = net(clips, seeded(step, rank * rows, 4))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(all_reduce_mean(loss.detach()))
        queues += [model.queue.keys.clone(), model.queue.pointer.clone()]
    torch.save([*losses, *queues, *model.state_dict().values()], f"{folder}/{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(two_steps, (2, str(tmp_path)), nprocs=2)
    two_steps(0, 1, tmp_path)
    one, *two = [torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt")]
    for expected, a, b in zip(one, *two, strict=True):
        assert torch.equal(a, b), "the processes hold the same"
        torch.testing.assert_close(a, expected, atol=1e-5, rtol=1e-5)
    assert one[3] == 8 and one[5] == 3 and not torch.equal(one[2], one[4])


# ---- colours ---------------------------------------------------------------------------------------------------------

OFF = dict(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, grey=0.0)


def still(B=6, T=3, H=5, W=7, least=0.35, most=0.6, seed=0):
    """Clips of equal frames in colours so moderate that nothing clamps."""
    return noise(B, 3, 1, H, W, least=least, most=most, seed=seed).repeat(1, 1, T, 1, 1)


def frames_of(clip):
    return clip.transpose(0, 1)


def luma(clips):
    return (clips * LUMA).sum(-4)


def test_jitter_is_the_same_for_all_frames_and_another_one_for_each_clip():
    clips, order = noise(4, 3, 6, 5, 7), torch.tensor([3, 0, 5, 1, 4, 2])
    out = colour_jitter(clips, seeded())
    torch.testing.assert_close(colour_jitter(clips[:, :, order], seeded()), out[:, :, order], atol=1e-6, rtol=0)
    equal = colour_jitter(still(4), seeded(), p=1.0, grey=0.0)
    assert torch.equal(equal[:, :, 0], equal[:, :, 2])
    ratios = colour_jitter(still(1).expand(16, -1, -1, -1, -1), seeded(), p=1.0).mean((1, 2, 3, 4))
    assert ratios.unique().numel() == 16 and ratios.max() - ratios.min() > 0.1


def test_each_clip_gets_the_colours_it_would_get_alone():
    clips = noise(6, 3, 2, 5, 7)
    out = colour_jitter(clips, seeded(0, 0, 6))
    for i in range(6):
        torch.testing.assert_close(colour_jitter(clips[i:i + 1], seeded(0, i, 6))[0], out[i], atol=1e-6, rtol=0)


@pytest.mark.parametrize("changes", [dict(p=1.0, **OFF), dict(p=0.0, grey=0.0)])
def test_jitter_of_no_strength_or_probability_is_the_identity(changes):
    clips = noise(20, 3, 2, 5, 7)
    torch.testing.assert_close(colour_jitter(clips, seeded(), **changes), clips, atol=2e-6, rtol=0)


def test_grey_clips_have_equal_colours_and_the_luma_of_before():
    clips = noise(20, 3, 2, 5, 7)
    out = colour_jitter(clips, seeded(), p=0.0, grey=1.0)
    torch.testing.assert_close(out, luma(clips)[:, None].expand_as(out), atol=1e-5, rtol=0)
    some = colour_jitter(noise(2000, 3, 1, 1, 2), seeded(), p=0.0, grey=0.2)
    assert ((some.amax(1) - some.amin(1)).amax((1, 2, 3)) < 1e-4).float().mean().item() == pytest.approx(0.2, abs=0.03)


def test_brightness_is_torchvision_s():
    clips = still(8)
    out = colour_jitter(clips, seeded(), p=1.0, **{**OFF, "brightness": 0.4})
    for clip, got in zip(clips, out):
        factor = (got / clip).mean().item()
        assert 0.6 <= factor <= 1.4
        torch.testing.assert_close(frames_of(got), tv.adjust_brightness(frames_of(clip), factor), atol=1e-5, rtol=0)


def test_contrast_is_torchvision_s_around_the_mean_of_all_frames():
    clips = still(8)
    out = colour_jitter(clips, seeded(), p=1.0, **{**OFF, "contrast": 0.4})
    for clip, got in zip(clips, out):
        factor = ((got.amax() - got.amin()) / (clip.amax() - clip.amin())).item()
        assert 0.6 <= factor <= 1.4
        torch.testing.assert_close(frames_of(got), tv.adjust_contrast(frames_of(clip), factor), atol=2e-4, rtol=0)
    two = torch.cat([still(1, 1, least=0.3, most=0.31), still(1, 1, least=0.7, most=0.71)], 2)        # dark, then bright
    out = colour_jitter(two, seeded(1), p=1.0, **{**OFF, "contrast": 0.4})
    before, after = two[0].mean((0, 2, 3)), out[0].mean((0, 2, 3))
    assert after.mean().item() == pytest.approx(before.mean().item(), abs=1e-3)
    assert (after[1] - after[0]).item() != pytest.approx((before[1] - before[0]).item(), abs=1e-3)


def test_saturation_is_torchvision_s():
    clips = still(8)
    out = colour_jitter(clips, seeded(), p=1.0, **{**OFF, "saturation": 0.4})
    for clip, got in zip(clips, out):
        colour, changed = clip - luma(clip), got - luma(got)
        factor = ((colour * changed).sum() / colour.square().sum()).item()
        assert 0.6 <= factor <= 1.4
        torch.testing.assert_close(frames_of(got), tv.adjust_saturation(frames_of(clip), factor), atol=2e-4, rtol=0)


@pytest.mark.parametrize("order", [*permutations(("brightness", "contrast", "saturation"))], ids="-".join)
def test_all_three_are_torchvision_s_in_any_order(order):
    clips, factors = still(4, least=0.4, most=0.5), {}
    for name in order:                                                          # the same seed: the same draws
        out = colour_jitter(clips, seeded(), p=1.0, **{**OFF, name: 0.4})
        mean = luma(clips).mean((1, 2, 3)).view(-1, 1, 1, 1, 1)
        grey = dict(brightness=0 * clips, contrast=mean, saturation=luma(clips)[:, None])[name]
        x, y = clips - grey, out - grey
        factors[name] = ((x * y).sum((1, 2, 3, 4)) / x.square().sum((1, 2, 3, 4))).tolist()
    out = colour_jitter(clips, seeded(), p=1.0, **{**OFF, **dict.fromkeys(order, 0.4)})
    for i, clip in enumerate(clips):
        expected = frames_of(clip)
        for name in order:
            expected = getattr(tv, f"adjust_{name}")(expected, factors[name][i])
        torch.testing.assert_close(frames_of(out[i]), expected, atol=5e-4, rtol=0)


def chroma(clips):
    """I and Q of the NTSC's YIQ as one complex number."""
    r, g, b = clips.double().unbind(-4)
    return torch.complex(0.5959 * r - 0.2746 * g - 0.3213 * b, 0.2115 * r - 0.5227 * g + 0.3112 * b)


def test_hue_turns_the_colours_around_their_luma():
    clips = still(200, 1, 3, 4, least=0.4, most=0.6)
    out = colour_jitter(clips, seeded(), p=1.0, **{**OFF, "hue": 0.1})
    torch.testing.assert_close(luma(out), luma(clips), atol=1e-3, rtol=0)
    turn = chroma(out) / chroma(clips)
    torch.testing.assert_close(turn.abs(), torch.ones_like(turn.abs()), atol=2e-3, rtol=0)
    angle = turn.angle().flatten(1)
    assert (angle - angle[:, :1]).abs().max() < 2e-3 and angle.abs().max() <= 2 * math.pi * 0.1 + 1e-3
    assert angle.min() < -0.55 and angle.max() > 0.55 and abs(angle.mean()) < 0.1


@pytest.mark.parametrize("hue, factor", [(1.0, 1), (0.5, -1), (0.25, 1j), (2.0, 1)])
def test_hue_is_in_turns(monkeypatch, hue, factor):
    monkeypatch.setattr(common, "rand", lambda *shape, generator, device: torch.ones(shape))          # the largest amounts
    clips = still(3, least=0.45, most=0.55)
    out = colour_jitter(clips, None, p=2.0, **{**OFF, "hue": hue})
    expected = chroma(clips) * factor
    assert min((chroma(out) - e).abs().max() for e in (expected, chroma(clips) * complex(factor).conjugate())) < 1e-4
    assert (luma(out) - luma(clips)).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_factors_are_uniform_and_a_fifth_of_the_clips_keeps_its_colours(monkeypatch, name):
    clips = noise(1, 3, 1, 2, 2, least=0.35, most=0.6).repeat(2000, 1, 1, 1, 1)
    out = colour_jitter(clips, seeded(), **{**OFF, name: 0.4})
    x, y = clips.flatten(1)[0], out.flatten(1)
    grey = dict(brightness=torch.zeros_like(x), contrast=luma(clips).mean().expand_as(x),
                saturation=luma(clips)[0].expand(3, -1, -1, -1).flatten())[name]
    factor = ((y - grey) * (x - grey)).sum(1) / (x - grey).square().sum()
    changed = (factor - 1).abs() > 1e-4
    assert changed.float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert factor.min() > 0.598 and factor.max() < 1.402
    assert factor[changed].mean().item() == pytest.approx(1, abs=0.02)
    assert factor[changed].std().item() == pytest.approx(0.8 / math.sqrt(12), abs=0.01)


def test_jitter_stays_in_range_and_keeps_shape():
    clips = noise(30, 3, 2, 4, 5)
    out = colour_jitter(clips, seeded(), 0.9, 0.9, 0.9, 0.5, p=1.0)
    assert out.shape == clips.shape and out.min() == 0 and out.max() == 1 and out.isfinite().all()


@pytest.mark.parametrize("size", [24, 64, 112])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_blur_equals_torchvision(size, sigma):
    clips, k = noise(2, 3, 2, size, size), int(0.1 * size) // 2 * 2 + 1
    got = blur(clips, seeded(), p=1.0, sigma=(sigma, sigma))
    torch.testing.assert_close(got.transpose(1, 2), tv.gaussian_blur(clips.transpose(1, 2), [k, k], [sigma, sigma]),
                               atol=1e-5, rtol=0)


def test_blur_of_no_probability_is_exactly_the_identity_and_constants_stay():
    clips = noise(4, 3, 2, 24, 32)
    assert torch.equal(blur(clips, seeded(), p=0.0), clips)
    constant = noise(4, 3, 2, 1, 1).expand(-1, -1, -1, 64, 64)
    torch.testing.assert_close(blur(constant, seeded(), p=1.0), constant, atol=1e-6, rtol=0)


def test_blur_is_drawn_per_clip_and_alike_for_all_frames_and_colours():
    clips = torch.zeros(400, 3, 2, 20, 20)
    clips[:, :, :, 10, 10] = 1
    peak = blur(clips, seeded())[:, :, :, 10, 10]                               # (400, 3, 2)
    assert (peak == peak[:, :1, :1]).all() and (peak[:, 0, 0] == 1).float().mean().item() == pytest.approx(0.58, abs=0.08)
    assert peak.unique().numel() > 150                                          # widths below 0.25 px show nothing
    torch.testing.assert_close(blur(clips[7:9], seeded(0, 7, 400)), blur(clips, seeded(0, 0, 400))[7:9])


@pytest.mark.parametrize("height, width, area, ratio", [(240, 320, (0.2, 1), (3 / 4, 4 / 3)), (64, 64, (0.5, 1), (3 / 4, 4 / 3)),
                                                        (360, 200, (0.3, 0.766), (0.5, 2))])
def test_random_crops_are_inside_and_as_large_and_wide_as_wanted(height, width, area, ratio):
    rng, shares, aspects, corners = np.random.default_rng(0), [], [], []
    for _ in range(800):
        x1, y1, x2, y2 = random_resized_crop(height, width, rng, area, ratio)
        w, h = x2 - x1, y2 - y1
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height and all(int(v) == v for v in (x1, y1, x2, y2))
        if (w, h) == (width, height):
            continue                                                            # nothing fitted
        shares.append(w * h / (width * height))
        aspects.append(w / h)
        corners.append((x1 / max(1, width - w), y1 / max(1, height - h)))
    rounding = 1 + 1.5 / (0.4 * min(height, width))
    assert len(shares) > 700 and area[0] / rounding <= min(shares) and max(shares) <= area[1] * rounding
    assert ratio[0] / rounding <= min(aspects) and max(aspects) <= ratio[1] * rounding
    assert min(shares) < area[0] + 0.1 and min(aspects) < 0.85 and max(aspects) > 1.15
    assert np.allclose(np.mean(corners, 0), 0.5, atol=0.06) and np.min(corners) < 0.02 and np.max(corners) > 0.98


def test_a_crop_that_never_fits_is_the_whole_frame():
    rng = np.random.default_rng(0)
    assert random_resized_crop(40, 80, rng, (1, 1), (0.5, 0.5)) == (0, 0, 80, 40)
    assert random_resized_crop(50, 50, rng, (1, 1), (1, 1)) == (0, 0, 50, 50)


# ---- backbones -------------------------------------------------------------------------------------------------------

def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def on_meta(name, *args, **options):
    with torch.device("meta"):
        return make_backbone(name, *args, **options)


def test_parameter_counts_are_those_of_the_papers():
    assert {name: count(on_meta(name)) for name in ("slow_r50", "r2plus1d_50", "r2plus1d_18")} == dict(
        slow_r50=31_672_128, r2plus1d_50=27_308_672, r2plus1d_18=31_300_125)
    with torch.device("meta"):
        model = FAME(make_backbone("slow_r50"), queue=8)
    assert count(model.encoder, model.head) == 36_130_752                       # MoDist's head is the same


@pytest.mark.parametrize("name, frames, size, expected", [
    ("slow_r50", 8, 64, (2048, 4, 2, 2)), ("slow_r50", 32, 224, (2048, 16, 7, 7)), ("r2plus1d_50", 16, 64, (2048, 4, 2, 2)),
    ("r2plus1d_50", 32, 224, (2048, 8, 7, 7)), ("r2plus1d_18", 16, 112, (512, 2, 7, 7)), ("r3d_18", 16, 112, (512, 2, 7, 7)),
    ("s3d", 16, 224, (1024, 2, 7, 7)), ("vit_tiny", 8, 64, (192, 4, 4, 4)), ("vit_small", 16, 112, (384, 8, 7, 7))])
def test_shapes_of_the_feature_maps(name, frames, size, expected):
    net, clips = on_meta(name, size, frames), torch.zeros(2, 3, frames, size, size, device="meta")
    assert net.forward_map(clips).shape == (2, *expected) and net(clips).shape == (2, net.dim) and net.dim == expected[0]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_network_can_be_rebuilt_from_its_config_and_given_a_head(name):
    net = on_meta(name, 64, 8)
    with torch.device("meta"):
        again, classifier = make_backbone(**net.config), make_backbone(**net.config, num_classes=5)
    shapes = {k: v.shape for k, v in net.state_dict().items()}
    assert {k: v.shape for k, v in again.state_dict().items()} == shapes and again.config == net.config and again.dim == net.dim
    assert type(again) is type(net) and all(isinstance(v, (str, int, float, tuple)) for v in net.config.values())
    extra = {k: tuple(v.shape) for k, v in classifier.state_dict().items() if k not in shapes}
    assert extra.pop("head.weight") == (5, net.dim) and extra.pop("head.bias") == (5,)
    assert all(k.startswith("fc_norm.") for k in extra)
    assert classifier(torch.zeros(2, 3, 8, 64, 64, device="meta")).shape == (2, 5)


@pytest.mark.parametrize("name", ["slow_r50", "r2plus1d_50"])
def test_width_multiplies_all_channels_and_stays_in_the_config(name):
    full, narrow = on_meta(name), on_meta(name, width=0.125)
    assert narrow.dim == 256 and narrow.config["width"] == 0.125
    for (key, a), b in zip(full.state_dict().items(), narrow.state_dict().values(), strict=True):
        if a.ndim:
            assert b.shape[0] == a.shape[0] // 8, key
        if a.ndim > 1:
            assert b.shape[1] == (3 if key == "stem.conv1.weight" else a.shape[1] // 8) and b.shape[2:] == a.shape[2:], key
    with torch.device("meta"):
        again = make_backbone(**narrow.config)
    assert again.dim == 256 and count(again) == count(narrow)


@pytest.mark.parametrize("name", ["slow_r50", "r2plus1d_50"])
def test_inflated_weights_give_the_image_network_s_features_of_single_frames(name):
    torch.manual_seed(0)
    image = torchvision.models.resnet50().eval()
    for module in image.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.uniform_(0.5, 1.0)
    flat, net = image.state_dict(), on_meta(name)
    state = {k: v for k, v in net.state_dict().items()}
    for key, empty in state.items():
        source = key.replace("stem.", "").replace(".conv2.0.", ".conv2.")
        if ".conv2.1." in key:                                                  # the temporal one: identity
            kernel = torch.zeros(empty.shape)
            kernel[:, :, 1, 0, 0] = torch.eye(len(kernel))
        elif empty.ndim == 5:                                                   # at the middle, of 4 taps the second
            kernel = torch.zeros(empty.shape)
            kernel[:, :, (empty.shape[2] - 1) // 2] = flat[source]
        else:
            kernel = flat[source]
        state[key] = kernel
    net.load_state_dict(state, assign=True)
    clip, step, first = torch.randn(1, 3, 8, 64, 64, generator=seeded()), *dict(slow_r50=(2, 0), r2plus1d_50=(4, 1))[name]
    image.fc = nn.Identity()
    with torch.no_grad():
        got = net.double().eval().forward_map(clip.double()).mean((3, 4))[0].T  # float32 rounds by 1e-5 on some machines
        expected = image.double()(clip[0].transpose(0, 1)[first::step].double())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def slow_conv(x, conv):
    """Conv3d without bias, tap by tap: x (B, C, T, H, W)."""
    pads = [p for size in conv.padding[::-1] for p in (size, size)]
    x, weight = F.pad(x, pads), conv.weight
    shape = [(n - k) // s + 1 for n, k, s in zip(x.shape[2:], weight.shape[2:], conv.stride)]
    out = torch.zeros(len(x), len(weight), *shape)
    for t, i, j in product(*map(range, weight.shape[2:])):
        window = [slice(o, o + s * (n - 1) + 1, s) for o, s, n in zip((t, i, j), conv.stride, shape)]
        out += torch.einsum("bcthw,oc->bothw", x[:, :, *window], weight[:, :, t, i, j])
    return out


@pytest.mark.parametrize("inputs, width, stride, time, split", [
    (12, 3, 1, 3, False), (12, 3, 1, 1, False), (6, 4, 2, 3, False), (12, 3, 1, 3, True), (16, 8, 2, 3, True),
    (6, 3, 1, 3, True)])
def test_bottleneck_equals_a_computation_by_hand(inputs, width, stride, time, split):
    torch.manual_seed(0)
    block = Bottleneck(inputs, width, stride, time, split).eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm3d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.uniform_(0.5, 1.5)

    def norm(x, bn):
        mean, var, weight, bias = (v.view(-1, 1, 1, 1) for v in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias
    x = torch.randn(2, inputs, 4, 6, 5, generator=seeded())
    with torch.no_grad():
        y = norm(slow_conv(x, block.conv1), block.bn1).clamp(min=0)
        for conv in (block.conv2 if split else [block.conv2]):
            y = slow_conv(y, conv)
        y = norm(slow_conv(norm(y, block.bn2).clamp(min=0), block.conv3), block.bn3)
        same = stride == 1 and inputs == 4 * width
        assert (block.downsample is None) == same
        shortcut = x if same else norm(slow_conv(x, block.downsample[0]), block.downsample[1])
        torch.testing.assert_close(block(x), (y + shortcut).clamp(min=0), atol=1e-4, rtol=1e-4)
    kernels = [tuple(m.kernel_size) for m in block.modules() if isinstance(m, nn.Conv3d)][:4 if split else 3]
    assert kernels == ([(1, 1, 1), (1, 3, 3), (3, 1, 1), (1, 1, 1)] if split else [(time, 1, 1), (1, 3, 3), (1, 1, 1)])


def test_blocks_of_slow_r50_start_as_the_identity():
    torch.manual_seed(0)
    net, other = ResNet3D("slow_r50", 0.0625), ResNet3D("r2plus1d_50", 0.0625)
    for train in (True, False):
        blocks = [m for m in net.train(train).modules() if isinstance(m, Bottleneck)]
        plain = [b for b in blocks if b.downsample is None]
        assert len(blocks) == 16 and len(plain) == 12
        for block in plain:
            x = noise(2, block.conv1.in_channels, 2, 4, 4)
            assert torch.equal(block(x), x)
    block = other.layer1[1].eval()
    assert not torch.equal(block(noise(2, 16, 2, 4, 4)), noise(2, 16, 2, 4, 4))


@pytest.mark.parametrize("name, size", [("r2plus1d_18", 32), ("r3d_18", 32), ("s3d", 64)])
def test_torchvision_s_weights_load_and_give_its_features(name, size, tmp_path):
    torch.manual_seed(0)
    public = getattr(torchvision.models.video, name)(num_classes=3).eval()
    net, state = on_meta(name), public.state_dict()
    missing, unexpected = net.load_state_dict(state, strict=False, assign=True)
    assert not missing and {k.split(".")[0] for k in unexpected} == {"classifier" if name == "s3d" else "fc"}
    if name == "s3d":
        public.avgpool, public.classifier = nn.AdaptiveAvgPool3d(1), nn.Identity()
    public.fc = nn.Identity()
    with torch.no_grad():
        clips = torch.randn(2, 3, 16 if name == "s3d" else 8, size, size, generator=seeded())
        torch.testing.assert_close(net.eval()(clips), public(clips), atol=1e-5, rtol=1e-4)
    if name == "s3d":                                                           # as a file, too
        torch.save(state, tmp_path / "public.pt")
        report = load_weights(make_backbone(name, num_classes=5), tmp_path / "public.pt")
        assert report.missing == ["head.weight", "head.bias"] and len(report.loaded) == len(net.state_dict())


@pytest.mark.parametrize("name", ["resnet50", "", "vit", "R3D_18"])
def test_an_unknown_backbone_is_named_with_the_choices(name):
    with pytest.raises(UserError) as caught:
        make_backbone(name, 64, 8)
    assert f"--backbone {name}:" in str(caught.value) and all(choice in str(caught.value) for choice in (*VITS, *BACKBONES))


# ---- a run's settings ------------------------------------------------------------------------------------------------

def test_sgd_trains_what_is_trained_with_decay_on_everything():
    model = tiny()
    optimizer = make_optimizer("sgd", model, 0.3, 1e-4, CPU)
    for group in optimizer.param_groups:
        assert isinstance(optimizer, torch.optim.SGD) and not group["nesterov"] and group["dampening"] == 0
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.9, 1e-4)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in [*model.encoder.parameters(), *model.head.parameters()]}


def test_adamw_has_no_decay_on_vectors_and_leaves_the_keys_out():
    model = tiny()
    optimizer = make_optimizer("adamw", model, 0.3, 0.05, CPU)
    assert isinstance(optimizer, torch.optim.AdamW)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    trained = [*model.encoder.parameters(), *model.head.parameters()]
    assert decay == {id(p): 0.05 if p.ndim > 1 else 0.0 for p in trained} and len(optimizer.param_groups) == 2
    assert all(g["betas"] == (0.9, 0.95) and g["lr"] == 0.3 for g in optimizer.param_groups)


@pytest.mark.parametrize("name", ["adam", "SGD", "lars", ""])
def test_an_unknown_optimizer_is_an_error_of_the_user(name):
    with pytest.raises(UserError, match="choose sgd or adamw"):
        make_optimizer(name, tiny(), 0.1, 0.1, CPU)


def config(*argv):
    return parse_config(Config, RECIPES, argv)


def test_a_vit_gets_its_own_optimizer_but_keeps_the_recipe_and_the_flags():
    vit, cfg = RECIPES["vit"], config("--data", "ucf101", "--backbone", "vit_small")
    assert (cfg.data, cfg.backbone, cfg.queue) == ("ucf101", "vit_small", 2048)
    assert vit["optimizer"] == "adamw" and {k: getattr(cfg, k) for k in vit} == vit
    cfg = config("--data", "ucf101", "--backbone", "vit_small", "--optimizer", "sgd", "--queue", "9", "--lr", "0.5")
    assert (cfg.optimizer, cfg.queue, cfg.lr, cfg.weight_decay) == ("sgd", 9, 0.5, vit["weight_decay"])


def test_a_convolutional_network_gets_the_defaults_of_the_paper():
    for argv in ([], ["--backbone", "s3d"]):
        cfg = config("--data", "k400", *argv)
        assert (cfg.optimizer, cfg.weight_decay, cfg.queue, cfg.temperature, cfg.momentum) == ("sgd", 1e-4, 65536, 0.1, 0.999)
        assert cfg.lr * cfg.batch / 256 == pytest.approx(0.01) and (cfg.epochs, cfg.beta, cfg.merge) == (200, 0.5, True)
    assert config("--data", "ucf101").queue == 2048 and config("--data", "ucf101").optimizer == "sgd"


@pytest.mark.parametrize("backbone", [None, "vit_tiny", "r3d_18"])
def test_the_toy_recipe_keeps_its_own_values_over_those_for_vits(backbone):
    cfg = config(*(["--backbone", backbone] if backbone else []))
    expected = {**RECIPES["toy"], **(dict(backbone=backbone) if backbone else {})}
    assert cfg.data == "toy" and {k: getattr(cfg, k) for k in expected} == expected
    overlay = RECIPES["vit"] if cfg.backbone.startswith("vit") else {k: getattr(Config, k) for k in RECIPES["vit"]}
    assert all(getattr(cfg, k) == overlay[k] for k in overlay if k not in RECIPES["toy"])


def test_one_s_own_videos_take_the_custom_recipe(tmp_path):
    for backbone, optimizer in (("r3d_18", "sgd"), ("vit_tiny", "adamw")):
        cfg = config("--data", str(tmp_path), "--backbone", backbone)
        assert cfg.optimizer == optimizer and {k: getattr(cfg, k) for k in RECIPES["custom"]} == RECIPES["custom"]


# ---- starting from weights -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("network", [lambda: make_backbone(**VIT), with_batch_norm])
def test_init_from_a_checkpoint_of_fame_takes_everything(network, tmp_path):
    source, model = tiny(network(), seed=1), tiny(network(), seed=2)
    for p in source.encoder.parameters():
        p.data.add_(0.1)                                                        # so the keys lag behind
    source(clips_uint8(), seeded())
    torch.save(dict(model=source.state_dict(), step=3), tmp_path / "last.pt")
    assert resume_or_init(None, str(tmp_path / "last.pt"), model, None, None) == 0
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not torch.equal(*(next(net.parameters()) for net in (model.encoder, model.keys["encoder"])))


@pytest.mark.parametrize("prefix", ["", "encoder.", "module.encoder_q."])
def test_init_from_an_encoder_alone_is_copied_into_the_keys(prefix, tmp_path):
    source, model = tiny(with_batch_norm(), seed=1), tiny(with_batch_norm(), seed=2)
    source(clips_uint8(), seeded())                                             # running statistics, too
    state = {prefix + k: v for k, v in source.encoder.state_dict().items()}
    torch.save(dict(model=state), tmp_path / "encoder.pt")
    queue, head = model.queue.keys.clone(), copy.deepcopy(model.head.state_dict())
    assert resume_or_init(None, str(tmp_path / "encoder.pt"), model, None, None) == 0
    for name, value in source.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], value), name
        if value.is_floating_point():
            assert torch.equal(model.keys["encoder"].state_dict()[name], value), name
    for name, value in head.items():
        assert torch.equal(model.head.state_dict()[name], value) and torch.equal(model.keys["head"].state_dict()[name], value)
    assert torch.equal(model.queue.keys, queue)


def test_continuing_takes_everything_from_the_checkpoint():
    source, model = tiny(seed=1), tiny(seed=2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizers = [make_optimizer("sgd", m, 0.1, 0, CPU) for m in (source, model)]
    source(clips_uint8(), seeded())[0].backward()
    optimizers[0].step()
    content = dict(model=source.state_dict(), optimizer=optimizers[0].state_dict(), scaler=scaler.state_dict(), step=7,
                   backbone=source.encoder.config)
    assert resume_or_init(content, "not read", model, optimizers[1], scaler) == 7
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in source.state_dict().items())
    buffers = [[o.state[p]["momentum_buffer"] for p in o.param_groups[0]["params"]] for o in optimizers]
    assert all(torch.equal(a, b) for a, b in zip(*buffers)) and buffers[0]
