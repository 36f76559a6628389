"""MoDist against slow loops from the specification, and videos that tell their frames."""
import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fame
import modist
from common import Item, Video, to_float01, unnormalize
from conftest import FakeFlow, FakeVideo, noise, numbers, seeded, slow_gradient, tiny_video
from modist import Config, MoDist, motion_maps, projection, sample_clips, two_starts
from test_contrast import tiny
from test_fame import dot, slow_info_nce


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def clips_uint8(clips=8, frames=5, size=16):
    return (noise(clips, 3, frames, size, size) * 255).byte()


# ---- flow edges and motion maps --------------------------------------------------------------------------------------

def slow_edges(u, v, clip):
    (ux, uy), (vx, vy) = slow_gradient(u, middle=2), slow_gradient(v, middle=2)
    return torch.from_numpy(np.minimum(np.sqrt(ux ** 2 + uy ** 2 + vx ** 2 + vy ** 2), clip) / clip).float()


@pytest.mark.parametrize("clip", [0.3, 2.0])
def test_motion_maps_of_each_kind_equal_loops(clip):
    clips, flow = clips_uint8(2, 4, 6), FakeFlow()
    values = clips.numpy().astype(float) / 255
    expected = np.abs(values[:, :, 1:] - values[:, :, :-1]).mean(1)
    for x in (clips, to_float01(clips)):
        maps = motion_maps(x, None, "frame_diff")                               # needs no flow
        assert maps.shape == (2, 3, 3, 6, 6) and np.allclose(maps.numpy(), expected[:, None], atol=1e-6)
    edges = motion_maps(clips, flow, "flow_edge", clip)
    assert edges.shape == (2, 3, 3, 6, 6) and len(flow.asked) == 1 and torch.equal(flow.asked[0], clips)
    assert edges.max() == 1 or clip > 1
    assert torch.equal(motion_maps(clips, flow), motion_maps(clips, flow, "flow_edge", 1.0))
    for b, t, channel in product(range(2), range(3), range(3)):
        u, v = flow(clips)[b, t].tolist()
        torch.testing.assert_close(edges[b, channel, t], slow_edges(u, v, clip), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("w", [11, 22])
def test_flow_maps_are_scaled_by_the_width_and_cut(w):
    field = 3 * normal(2, 3, 2, 4, w)
    maps = motion_maps(clips_uint8(2, 4, 8), lambda clips: field, "flow")
    assert maps.shape == (2, 3, 3, 4, w) and maps.min() == -1 and maps.max() == 1
    for b, t, i, j in product(range(2), range(3), range(4), range(w)):
        u, v = field[b, t, :, i, j].tolist()
        expected = [min(max(value * 11 / w, -1), 1) for value in (u, v, math.sqrt(u * u + v * v))]
        assert maps[b, :, t, i, j].tolist() == pytest.approx(expected, abs=1e-5)


# ---- loss and heads --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("info_nce", [fame.info_nce, modist.info_nce])
def test_info_nce_equals_a_loop_and_is_finite_and_exact_for_extreme_values(info_nce):
    query, key, negatives = (F.normalize(normal(n, 4, seed=n), dim=1) for n in (5, 6, 11))
    key = key[:5]
    for T in (0.07, 0.2, 1.0):
        expected = slow_info_nce(query.tolist(), key.tolist(), negatives.tolist(), T)
        assert info_nce(query, key, negatives, T).item() == pytest.approx(expected, rel=1e-5)
    one = torch.eye(4)[:2].requires_grad_()
    for key, negatives, expected in ((-one, one[:1].expand(3, 4), (2e4 + math.log(3) + 1e4 + math.log(3)) / 2),
                                     (one, -one[:1].expand(3, 4), 0.0)):
        loss = info_nce(one, key.detach(), negatives.detach(), 1e-4)
        assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert torch.autograd.grad(loss, one)[0].isfinite().all()


def test_heads_start_as_released():
    torch.manual_seed(0)
    head = projection(256)
    assert [(m.in_features, m.out_features) for m in (head[0], head[2])] == [(256, 2048), (2048, 128)]
    for layer in (head[0], head[2]):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02) and (layer.bias == 0).all()
    x = normal(3, 256)
    torch.testing.assert_close(head(x), (x @ head[0].weight.T).clamp(min=0) @ head[2].weight.T, atol=1e-6, rtol=1e-4)


class Net(nn.Linear):
    """Vectors (B, 5) -> (B, dim)."""

    def __init__(self, dim):
        super().__init__(5, dim)
        self.dim = dim


def vectors_model(v1, v2, m1=None, m2=None, **changes):
    """A model that gets these inputs, whatever the clips; its keys differ from the queries."""
    torch.manual_seed(0)
    model = MoDist(Net(6), None if m1 is None else Net(7), None,
                   **{**dict(queue=16, momentum=0.75, outputs=4, temperature=0.2), **changes})
    for name, p in model.named_parameters():
        if name.startswith("keys.") or "head" in name:                          # heads: off the tiny init
            p.data.add_(0.1 * torch.randn(p.shape))
    model.inputs = lambda clips, generator: ((v1, v2), (m1, m2))
    return model


def vectors(B=4, seed=0):
    """v1, v2, m1, m2 (B, 5), related, so that the losses differ from chance."""
    base = normal(B, 5, seed=seed)
    return [base + 0.7 * normal(B, 5, seed=seed + 1 + i) for i in range(4)]


def embed(networks, x, name, head):
    """Embeddings as lists, one by one."""
    with torch.no_grad():
        rows = [networks[head](networks[name](row[None]))[0] for row in x]
    return [(z / z.square().sum().sqrt()).tolist() for z in rows]


@pytest.mark.parametrize("cross_weight, motion_motion, motion", [
    (1.0, False, True), (0.3, False, True), (0.3, True, True), (0.0, True, True), (1.0, False, False)])
def test_loss_statistics_and_queues_equal_a_plain_computation(cross_weight, motion_motion, motion):
    inputs = vectors() if motion else vectors()[:2]
    model = vectors_model(*inputs, cross_weight=cross_weight, motion_motion=motion_motion)
    queues = [getattr(model, name) for name in ("queue", "motion_queue")[:1 + motion]]
    before = [queue.keys.tolist() for queue in queues]
    loss, stats = model(torch.zeros(1))

    def embeddings(networks):
        pairs = zip((0, 2), (("encoder", "head"), ("motion", "motion_head"))[:1 + motion])
        return [embed(networks, inputs[i + (networks is model.keys)], *names) for i, names in pairs]
    (zv, *zm), (kv, *km), (Qv, *Qm) = embeddings(model._modules), embeddings(model.keys), before
    expected, top1 = dict(rgb=slow_info_nce(zv, kv, Qv, 0.2)), dict(top1=zv)
    if motion:
        expected["cross"] = slow_info_nce(zv, *km, *Qm, 0.2) + slow_info_nce(*zm, kv, Qv, 0.2)
        top1["cross_top1"] = zm[0]
    if motion_motion:
        expected["motion"] = slow_info_nce(*zm, *km, *Qm, 0.2)
    total = expected["rgb"] + cross_weight * expected.get("cross", 0) + expected.get("motion", 0)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    for name, queries in top1.items():                                          # the nearest second moment's RGB
        right = [max(range(4), key=lambda j: dot(q, kv[j])) == i for i, q in enumerate(queries)]
        expected[name] = 100 * np.mean(right)
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(expected, rel=1e-5)
    for queue, keys, old in zip(queues, (kv, *km), before):                     # each into its own
        assert queue.pointer == 4 and torch.equal(queue.keys[4:], torch.tensor(old)[4:])
        torch.testing.assert_close(queue.keys[:4], torch.tensor(keys), atol=1e-5, rtol=1e-5)


# ---- what the networks get -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("step, expected", [(1, range(8)), (2, [0, 2, 4, 6]), (4, [0, 4]), (8, [0])])
def test_rgb_gets_every_nth_frame_but_the_last_and_motion_every_pair(step, expected):
    clips = torch.zeros(6, 3, 9, 12, 12, dtype=torch.uint8)
    for i, t in product(range(6), range(9)):                                    # neighbours differ by 2 t + 1
        clips[i, :, t] = t * t + 100 * (i % 2) + 10 * (i // 2)
    rgb, maps = tiny("modist", motion_input="frame_diff", rgb_step=step, colour=0.0).inputs(clips, seeded())
    for moment, (x, m) in enumerate(zip(rgb, maps, strict=True)):
        shown = unnormalize(x)[..., 0, 0] * 255                                 # (video, channel, time)
        for video in range(3):
            assert np.allclose(shown[video], [t * t + 100 * moment + 10 * video for t in expected], atol=0.05)
        assert np.allclose(m[..., 0, 0] * 255, [[range(1, 17, 2)] * 3] * 3, atol=1e-3) and m.shape[2:] == (8, 12, 12)


@pytest.mark.parametrize("motion_input", ["frame_diff", "flow_edge"])
def test_flips_are_shared_by_the_modalities_and_drawn_per_moment_and_colours_are_rgb_s_alone(motion_input):
    clips = torch.full((120, 3, 3, 10, 10), 40, dtype=torch.uint8)              # only the bright left half changes
    clips[:, :, 0, :, :5], clips[:, :, 1, :, :5], clips[:, :, 2, :, :5] = 120, 160, 120
    models = [tiny("modist", motion_input=motion_input, edge_clip=4.0, rgb_step=1, colour=c) for c in (0.0, 1.0)]
    (rgb, maps), (other, same) = (model.inputs(clips, seeded()) for model in models)
    assert all(torch.equal(a, b) for a, b in zip(maps, same)) and not torch.allclose(rgb[0], other[0], atol=0.1)
    assert not torch.equal(other[0][:, :, :, :, 4], other[1][:, :, :, :, 4]), "each moment has colours of its own"
    if motion_input == "flow_edge":                                             # edges say nothing about the side
        asked, = models[0].flow.asked
        assert asked.dtype == torch.uint8 and motion_maps(asked, FakeFlow(), "flow_edge", 4.0).equal(torch.cat(maps))
        maps = asked.float().diff(dim=2).abs().chunk(2)
    flipped = []
    for x, m in zip(rgb, maps):
        right = [a[..., 5:].mean((1, 2, 3, 4)) > a[..., :5].mean((1, 2, 3, 4)) for a in (unnormalize(x), m.abs())]
        assert torch.equal(*right)
        flipped.append(right[0])
    counts = [((flipped[0] == a) & (flipped[1] == b)).sum().item() for a, b in product((True, False), repeat=2)]
    assert sum(counts) == 60 and min(counts) >= 4                               # all four, 15 expected of each


# ---- moments of a video and clips ------------------------------------------------------------------------------------

def test_two_starts_are_uniform_within_their_bounds_and_come_in_both_orders():
    rng, draws = np.random.default_rng(0), 12000
    pairs = np.array([two_starts(20, 10, rng) for _ in range(draws)])
    shift, first = np.abs(pairs[:, 0] - pairs[:, 1]), pairs.min(1)
    counts = np.bincount(shift, minlength=21)
    assert counts[:5].sum() == 0 and (np.abs(counts[5:] - draws / 16) < 5 * math.sqrt(draws / 16)).all()
    for s in (5, 12, 18):
        starts, share = np.bincount(first[shift == s], minlength=21 - s), counts[s] / (21 - s)
        assert len(starts) == 21 - s and (np.abs(starts - share) < 5 * math.sqrt(share)).all()
    assert abs((pairs[:, 0] < pairs[:, 1]).mean() - 0.5) < 0.03
    for room, fps, bounds, expected in (
            (90, 10, (2.0, 3.0), range(20, 31)), (90, 7.5, (0.5, 0.9), (4, 5, 6)), (90, 3, (0.4, 0.5), (2,)),
            (40, 30, (), range(15, 41)), (9, 30, (), (9,)), (0, 30, (), (0,)), (60, 3, (), range(2, 31))):
        pairs = [[int(x) for x in two_starts(room, fps, rng, *bounds)] for _ in range(400)]
        assert {abs(a - b) for a, b in pairs} == set(expected) and all(0 <= x <= room for pair in pairs for x in pair)


def settings(**changes):
    return Config(**{**dict(motion_frames=4, motion_stride=4, frames=2, image_size=16, max_crop=1.0), **changes})


@pytest.mark.parametrize("fps, rate", [(15, 30.0), (25, 30.0), (60, 30.0), (60, 0.0), (25, 15.0)])
def test_strides_are_those_at_the_frame_rate_of_the_settings(tmp_path, fps, rate):
    steps, starts = [4 * k * (fps / rate if rate else 1) for k in range(5)], []
    with Video(tiny_video(tmp_path / "a.mp4", 60, fps)) as video:
        for seed in range(8):
            clips = sample_clips(video, Item(""), np.random.default_rng(seed), settings(fps=rate))
            assert clips.shape == (2, 5, 16, 16, 3) and clips.dtype == np.uint8
            for shown in numbers(clips):
                assert all(abs(n - min(shown[0] + step, 59)) <= 0.5 for n, step in zip(shown, steps))
            starts.append(numbers(clips)[:, 0])
    room = max(0, 59 - round(steps[-1]))
    allowed = {s for s in range(room + 1) if 0.5 <= s / fps <= 10} or {room}
    assert all(abs(a - b) in allowed and max(a, b) <= room for a, b in starts)
    assert {a < b for a, b in starts} == {True, False} or room == 0


def test_clips_lie_within_the_item_and_short_ones_repeat_the_last_frame(tmp_path):
    rng, starts = np.random.default_rng(0), []
    with Video(tiny_video(tmp_path / "a.mp4", 60, 30)) as video:
        for _ in range(12):                                                     # frames 12 to 42
            shown = numbers(sample_clips(video, Item("", start=0.4, stop=1.4), rng, settings(motion_stride=1)))
            assert shown.min() >= 12 and shown.max() <= 42 and (np.diff(shown) == 1).all()
            starts += shown[:, 0].tolist()
        short = numbers(sample_clips(video, Item("", start=0.0, stop=0.3), rng, settings()))
    assert min(starts) < 17 and max(starts) > 33 and short.tolist() == [[0, 4, 8, 9, 9]] * 2


def test_each_clip_has_a_crop_of_its_own_as_large_as_wanted():
    cfg = settings(repeats=100, min_crop=0.2, max_crop=0.766, min_shift=1.0, max_shift=2.0)
    video = FakeVideo(2000, 480, 640, 30.0)
    sample_clips(video, Item(""), np.random.default_rng(0), cfg)
    indices, boxes = zip(*video.views(5))
    shares = [(x2 - x1) * (y2 - y1) / (480 * 640) for x1, y1, x2, y2 in boxes]
    assert len(boxes) == 200 and len(set(boxes)) > 190
    assert 0.195 < min(shares) < 0.25 and 0.72 < max(shares) < 0.77
    assert all(30 <= abs(a[0] - b[0]) <= 60 for a, b in zip(indices[::2], indices[1::2]))
