"""MCL against slow loops written from the specification, the released code's numbers, and the truth of the toy data."""
import copy
import math
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.io import read_image
from torchvision.transforms import functional as tv

import mcl
from common import (Bottleneck, Item, ResNet3D, RowGenerator, Video, collate, crop_resize, load_weights, make_backbone,
                    resume_or_init, to_device, to_float01, toy_video, unnormalize)
from mcl import (CURVE, GRID, MCL, Config, alignment_loss, alignment_map, clip_map, hot_box, motion_boundary, motion_crop,
                 motion_target, preview, random_starts, sample_clips, split, tournament)
from conftest import error_of, golden_arrays, numbers, seeded, toy_flow

torch.set_num_threads(1)
VIT = dict(image_size=16, frames=4, patch_size=8, tubelet_size=2, dim=24, depth=2, heads=3)


def noise(*shape, seed=0, least=0.0, most=1.0, dtype=torch.float32):
    return least + (most - least) * torch.rand(*shape, generator=seeded(seed), dtype=dtype)


# ---- motion maps -----------------------------------------------------------------------------------------------------

def slow_boundary(flow):
    """flow (T, 2, h, w) -> (h, w): Prewitt gradients of the sum over time, one pixel after the other."""
    T, _, h, w = flow.shape
    out = np.zeros((h, w))
    for i, j in product(range(h), range(w)):
        for c in range(2):
            def at(dy, dx):
                return sum(flow[t, c, min(max(i + dy, 0), h - 1), min(max(j + dx, 0), w - 1)] for t in range(T))
            gx = sum(at(k, 1) - at(k, -1) for k in (-1, 0, 1)) / 6
            gy = sum(at(1, k) - at(-1, k) for k in (-1, 0, 1)) / 6
            out[i, j] += math.sqrt(gx ** 2 + gy ** 2)
    return out


def slow_cells(image, gh, gw):
    """Mean of each cell; where the grid does not divide the image, cells overlap."""
    h, w = image.shape
    rows = [slice(i * h // gh, -(-(i + 1) * h // gh)) for i in range(gh)]
    columns = [slice(j * w // gw, -(-(j + 1) * w // gw)) for j in range(gw)]
    return np.array([[image[r, c].mean() for c in columns] for r in rows])


@pytest.mark.parametrize("h, w", [(6, 9), (1, 5), (2, 2)])
def test_motion_boundary_equals_slow_loops(h, w):
    flow = noise(2, 3, 2, h, w, least=-4, most=4)
    expected = np.stack([slow_boundary(f) for f in flow.double().numpy()])
    assert np.allclose(motion_boundary(flow).numpy(), expected, atol=1e-5)
    assert np.allclose(motion_boundary(flow[0]).numpy(), expected[0], atol=1e-5)


def test_motion_boundary_is_in_pixels_per_pixel():
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(11.0), indexing="ij")
    flow = torch.stack([0.3 * x - 0.4 * y, 0.2 * x])[None]                      # gradients of length 0.5 and 0.2
    torch.testing.assert_close(motion_boundary(flow)[1:-1, 1:-1], torch.full((7, 9), 0.7))
    torch.testing.assert_close(motion_boundary(flow.repeat(3, 1, 1, 1)), 3 * motion_boundary(flow))


def test_what_all_pixels_share_and_what_moves_to_and_fro_is_no_motion():
    flow = noise(2, 4, 2, 12, 12, least=-3, most=3)
    pan = torch.tensor([7.0, -11.0]).view(2, 1, 1) * torch.arange(1.0, 5).view(4, 1, 1, 1)
    assert motion_boundary(pan.expand(4, 2, 12, 12)).abs().max() == 0
    assert motion_target(pan.expand(1, 4, 2, 12, 12), (2, 3, 3)).abs().max() == 0
    torch.testing.assert_close(motion_boundary(flow + pan), motion_boundary(flow), atol=2e-5, rtol=0)
    assert motion_boundary(torch.cat([flow, -flow], 1)).abs().max() < 1e-5
    assert motion_boundary(torch.cat([flow, -flow], 1)[:, :5]).abs().max() > 0.1


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_mirrored_flow_gives_the_mirrored_map(sign):
    flow = noise(2, 4, 2, 10, 14, least=-3, most=3)
    mirrored = flow.flip(-1) * torch.tensor([sign, 1.0]).view(2, 1, 1)
    torch.testing.assert_close(motion_boundary(mirrored), motion_boundary(flow).flip(-1))
    torch.testing.assert_close(motion_target(mirrored, (2, 5, 7)), motion_target(flow, (2, 5, 7)).flip(-1))


@pytest.mark.parametrize("T, grid, h, w", [(8, (4, 3, 2), 6, 8), (4, (1, 2, 2), 6, 6), (3, (3, 7, 7), 9, 10),
                                              (6, (2, 1, 4), 3, 4)])
def test_motion_target_equals_slow_loops(T, grid, h, w):
    flow = noise(2, T, 2, h, w, least=-4, most=4)
    per = T // grid[0]
    expected = [[slow_cells(slow_boundary(f[per * k:per * (k + 1)]), *grid[1:]) for k in range(grid[0])]
                for f in flow.double().numpy()]
    assert np.allclose(motion_target(flow, grid).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("T, grid", [(6, (4, 2, 2)), (2, (4, 2, 2)), (9, (2, 2, 2))])
def test_frames_that_do_not_fall_into_groups_are_an_error_of_the_user(T, grid):
    message = error_of(motion_target, torch.zeros(1, T, 2, 8, 8), grid)
    assert str(T) in message and str(grid[0]) in message and "--frames" in message


def test_motion_target_equals_the_released_code():
    golden = golden_arrays("mcl_motion_target.npz")
    flow = torch.stack([golden["u"], golden["v"]], 1).float()[None]             # the kernel there is not divided by 6
    torch.testing.assert_close(6 * motion_target(flow)[0], golden["target"], atol=1e-3, rtol=1e-5)
    assert motion_target(flow).shape == (1, *GRID) and golden["target"].max() > 1


@pytest.mark.parametrize("h, w, ring", [(224, 224, 8), (28, 56, 2), (21, 20, 1)])
def test_clip_map_is_the_mean_over_pairs_without_a_ring(h, w, ring):
    flow = noise(2, 3, 2, h, w, least=-4, most=4)
    expected = []
    for clip in flow:
        total = sum(motion_boundary(pair[None]).double().numpy() for pair in clip) / 3    # magnitudes do not cancel
        total[:ring], total[-ring:], total[:, :ring], total[:, -ring:] = 0, 0, 0, 0
        expected.append(slow_cells(total, 7, 7))
    got = clip_map(flow)
    assert got.shape == (2, 7, 7) and np.allclose(got.numpy(), expected, atol=1e-5)
    assert torch.allclose(clip_map(torch.cat([flow[:, :1], -flow[:, :1]], 1)), clip_map(flow[:, :1]), atol=1e-6)


# ---- alignment -------------------------------------------------------------------------------------------------------

def slow_alignment_map(gradient):
    B, C, t, h, w = gradient.shape
    P = np.zeros((B, t, h, w))
    for b, k in product(range(B), range(t)):
        weights = [sum(gradient[b, c, k, i, j] for i in range(h) for j in range(w)) / (h * w) for c in range(C)]
        for i, j in product(range(h), range(w)):
            P[b, k, i, j] = max(0.0, sum(weights[c] * gradient[b, c, k, i, j] for c in range(C)))
    return P


def slow_cosine(a, b):
    a, b = np.ravel(a), np.ravel(b)
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b)) / length if length else 0.0


def slow_alignment(P, M, attention):
    """-> the three cosines, means over the batch."""
    rows = []
    for p, m in zip(P, M):
        motion = [step.sum() for step in m]
        if attention == "softmax":
            weight = [math.exp(x - max(motion)) for x in motion]
        else:
            weight = motion
        weight = [x / sum(weight) if sum(weight) else 0.0 for x in weight]
        rows.append([sum(a * slow_cosine(p[k], m[k]) for k, a in enumerate(weight)),
                     slow_cosine(sum(p) / len(p), sum(m) / len(m)), slow_cosine([step.sum() for step in p], motion)])
    return dict(zip(("st", "s", "t"), np.mean(rows, 0)))


def maps(*shape, seed=0, sparse=0.3, size=1.0):
    values = noise(*shape, seed=seed, dtype=torch.float64)
    return size * values * (noise(*shape, seed=seed + 1) > sparse)


def test_alignment_equals_the_released_code():
    golden = golden_arrays("mcl_alignment.npz")
    P = alignment_map(golden["grad"])
    loss, cosines = alignment_loss(P, golden["tgt"], "softmax")
    assert P.dtype == torch.float64 and (P - golden["pred"]).abs().max() <= 1e-9 and (loss - golden["loss"]).abs() <= 1e-9
    for name in ("st", "s", "t"):
        assert (cosines[name] - golden[f"sim_{name}"].mean()).abs() <= 1e-9


@pytest.mark.parametrize("shape", [(2, 5, 3, 4, 6), (1, 1, 1, 2, 3), (3, 4, 2, 1, 1)])
def test_alignment_map_equals_slow_loops(shape):
    gradient = torch.randn(shape, generator=seeded(), dtype=torch.float64)
    got = alignment_map(gradient)
    assert got.shape == (shape[0], *shape[2:]) and got.min() >= 0
    assert np.allclose(got.numpy(), slow_alignment_map(gradient.numpy()), atol=1e-12)
    assert torch.allclose(alignment_map(-3 * gradient), 9 * got)


@pytest.mark.parametrize("attention", ["l1", "softmax"])
@pytest.mark.parametrize("shape, sparse", [((3, 4, 3, 5), 0.0), ((3, 4, 3, 5), 0.8), ((2, 1, 2, 2), 0.3), ((40, 2, 2, 1), 0.5)])
def test_alignment_loss_equals_slow_loops(attention, shape, sparse):
    P, M = maps(*shape, seed=1, sparse=sparse), maps(*shape, seed=3, sparse=sparse, size=2.0)
    loss, cosines = alignment_loss(P, M, attention)
    expected = slow_alignment(P.numpy(), M.numpy(), attention)
    assert {k: v.item() for k, v in cosines.items()} == pytest.approx(expected, abs=1e-10)
    assert loss.item() == pytest.approx(3 - sum(expected.values()), abs=1e-10) and 0 <= loss <= 3


@pytest.mark.parametrize("attention", ["l1", "softmax"])
def test_alignment_loss_is_zero_for_equal_maps_and_three_for_none(attention):
    M = maps(3, 4, 7, 7, sparse=0)
    for factor in (1.0, 1e-3, 50.0):
        assert alignment_loss(factor * M, M, attention)[0].abs() < 1e-9
    assert alignment_loss(torch.zeros_like(M), M, attention)[0] == 3
    half = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    half[0][..., 0], half[1][..., 1] = 1, 1                                     # elsewhere, but at the right time
    assert alignment_loss(*half, attention)[0] == 2


def test_the_time_steps_count_by_their_share_of_the_motion_or_its_softmax():
    P, M = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    P[0, 0, 0, 0], P[0, 1, 0, 0], M[0, 0, 0, 0], M[0, 1, 0, 1] = 1, 1, 3, 1     # right at step 0 only
    assert alignment_loss(P, M)[1]["st"].item() == pytest.approx(0.75)
    assert alignment_loss(P, M, "l1")[1]["st"].item() == pytest.approx(0.75)
    assert alignment_loss(P, M, "softmax")[1]["st"].item() == pytest.approx(1 / (1 + math.exp(-2)))


def test_neither_the_scale_of_the_gradient_nor_that_of_motion_matters():
    gradient, M = torch.randn(3, 6, 4, 7, 7, generator=seeded()), maps(3, 4, 7, 7).float()
    expected = alignment_loss(alignment_map(gradient), M)[0]
    slope = None
    for power in range(-10, 11, 2):
        g = (gradient * 10.0 ** power).requires_grad_()
        loss, _ = alignment_loss(alignment_map(g), M)
        loss.backward()
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
        slope = g.grad * 10.0 ** power if slope is None else slope
        torch.testing.assert_close(g.grad * 10.0 ** power, slope, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(alignment_loss(alignment_map(gradient), M * 10.0 ** power)[0], expected, atol=1e-5, rtol=0)
    assert slope.abs().max() > 1e-3
    P = alignment_map(gradient)
    assert alignment_loss(P, 9 * M, "softmax")[0] != alignment_loss(P, M, "softmax")[0]


@pytest.mark.parametrize("attention", ["l1", "softmax"])
@pytest.mark.parametrize("kind", ["no P", "step of no P", "no M", "step of no M", "neither", "1e-25"])
def test_the_gradient_is_finite_whatever_is_zero(attention, kind):
    gradient, M = torch.randn(2, 3, 4, 3, 3, generator=seeded()), maps(2, 4, 3, 3).float()
    if kind in ("no P", "neither"):
        gradient[0] = 0
    if kind in ("no M", "neither"):
        M[0] = 0
    if kind == "step of no P":
        gradient[:, :, 1] = 0
    if kind == "step of no M":
        M[:, 2] = 0
    if kind == "1e-25":                                                         # its square is not in fp32
        gradient *= 1e-25
    gradient.requires_grad_()
    loss, cosines = alignment_loss(alignment_map(gradient), M, attention)
    loss.backward()
    assert loss.isfinite() and gradient.grad.isfinite().all() and -1e-5 <= loss <= 3 + 1e-5
    assert all(-1e-5 <= value <= 1 + 1e-5 for value in cosines.values())


# ---- sampling in time ------------------------------------------------------------------------------------------------

def test_the_clip_with_more_motion_wins_with_probability_085():
    scores = noise(40000, 3, 2)
    chosen = tournament(scores, seeded(1))
    assert chosen.shape == (40000, 3) and chosen.dtype == torch.long and set(chosen.unique().tolist()) == {0, 1}
    larger = torch.tensor([[int(a[1] > a[0]) for a in row] for row in scores.tolist()])
    for column in range(3):                                                     # sd 0.0018
        assert (chosen == larger)[:, column].float().mean().item() == pytest.approx(0.7 + 0.3 / 2, abs=0.009)
    won = (chosen == larger).float()
    assert abs(torch.corrcoef(won.T)[0, 1]) < 0.02, "the three clips are drawn independently"
    assert (tournament(scores, seeded(2), p=1.0) == larger).all()
    assert (tournament(scores, seeded(2), p=0.0) == larger).float().mean().item() == pytest.approx(0.5, abs=0.008)
    assert set(tournament(torch.zeros(100, 1, 2), seeded()).unique().tolist()) == {0, 1}, "ties: any"


def test_the_choice_of_a_batch_does_not_depend_on_how_it_is_split():
    scores = noise(6, 3, 2)
    whole = tournament(scores, seeded(5, 0, 6))
    assert torch.equal(whole, torch.cat([tournament(scores[:2], seeded(5, 0, 6)), tournament(scores[2:], seeded(5, 2, 6))]))


@pytest.mark.parametrize("first, last, span, K", [(0, 99, 32, 2), (7, 80, 32, 1), (3, 68, 32, 2), (0, 65, 32, 2), (5, 45, 4, 1)])
def test_the_anchor_is_in_one_half_and_the_others_in_order_in_the_other(first, last, span, K):
    frames, rng, seen, labels = last - first + 1, np.random.default_rng(0), {}, []
    halves = [range(first, first + frames // 2), range(first + frames // 2, last + 1)]
    for _ in range(3000):
        starts, before = random_starts(first, last, span, K, rng)
        assert starts.shape == (3, K)
        for clip, half in ((0, halves[not before]), (1, halves[before]), (2, halves[before])):
            for start in starts[clip]:
                assert start in half and start + span in half               # the frame for flow, too
                seen.setdefault((clip, bool(before)), []).append(int(start))
        assert max(starts[1]) <= min(starts[2]), "k1 before k2, whichever candidates win"
        labels.append(before)
    assert np.mean(labels) == pytest.approx(0.5, abs=0.05)
    for before in (False, True):                                                # the label tells where the anchor is
        for half, found in ((halves[not before], seen[0, before]), (halves[before], seen[1, before] + seen[2, before])):
            possible = half[:len(half) - span]
            share, fair = np.bincount(np.array(found) - possible[0], minlength=len(possible)) / len(found), 1 / len(possible)
            assert len(share) == len(possible) and (abs(share - fair) < 5 * (fair / len(found)) ** 0.5).all(), "uniform"


@pytest.mark.parametrize("first, last, span, K", [(0, 64, 32, 2), (0, 40, 32, 2), (2, 34, 32, 1), (9, 30, 32, 2), (4, 4, 8, 1)])
def test_in_a_short_video_the_anchor_is_at_one_end(first, last, span, K):
    rng, seen = np.random.default_rng(0), set()
    for _ in range(1500):
        starts, before = random_starts(first, last, span, K, rng)
        assert starts.shape == (3, K) and (np.diff(starts[1:].ravel()) >= 0).all()
        others = starts[1:]
        assert starts[0].max() <= others.min() if before else starts[0].min() >= others.max()
        assert ((starts >= first) & (starts <= max(first, last - span))).all()
        seen |= {int(s) for s in starts.ravel()}
    assert seen == set(range(first, max(first, last - span) + 1)), "inside wherever possible, and all of it"


def write_video(path, frames, height, width):
    """Frame n is grey 8 + 4 n at the top left quarter, and 16 darker elsewhere."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", 10, width=width, height=height, pix_fmt="yuv420p", options={"qp": "0"})
        for n in range(frames):
            picture = np.full((height, width, 3), 8 + 4 * n, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        file.mux(stream.encode())
    return path


def settings(**changes):
    return Config(**{**dict(frames=4, stride=2, frame_height=24, frame_width=32), **changes})


@pytest.mark.parametrize("motion_clips, repeats, frames", [(True, 2, 40), (False, 1, 40), (True, 1, 5)])
def test_clips_of_a_real_video_have_the_frames_of_their_starts(tmp_path, motion_clips, repeats, frames):
    cfg, K = settings(motion_clips=motion_clips, repeats=repeats), 2 if motion_clips else 1
    with Video(str(write_video(tmp_path / "a.mp4", frames, 48, 96))) as video:
        for seed in range(4):
            rng = np.random.default_rng(seed)
            out = sample_clips(video, Item(str(tmp_path / "a.mp4"), 0, 0, math.inf), rng, cfg, curve=True)
            assert out["clips"].shape == (3 * K * repeats, 5, 24, 32, 3) and out["clips"].dtype == np.uint8
            assert out["order"].shape == (repeats,) and out["order"].dtype == np.int64
            assert out["spans"].shape == (repeats, 3, K, 2) and out["spans"].dtype == np.float32
            found = numbers(out["clips"]).reshape(repeats, 3, K, 5)
            start = found[..., :1]
            assert (found == np.minimum(start + 2 * np.arange(5), frames - 1)).all()
            ends = np.concatenate([start, start + 8], -1) / frames              # frame n covers n .. n + 1
            assert np.allclose(out["spans"], ends.clip(0, 1), atol=1e-6)
            if frames > 20:
                before = start[:, 0].max((1, 2)) < start[:, 1:].min((1, 2, 3))
                after = start[:, 0].min((1, 2)) > start[:, 1:].max((1, 2, 3))
                assert (before == (out["order"] == 1)).all() and (after == (out["order"] == 0)).all()
            pairs = numbers(out["curve"])[:CURVE].reshape(CURVE, 2)
            assert pairs[0, 0] == 0 and (np.diff(pairs[:, 0]) >= 0).all() and pairs[-1, 1] == frames - 1
            assert (pairs[:, 1] == np.minimum(pairs[:, 0] + 2, frames - 1)).all()


def test_an_item_is_sampled_within_its_time_span(tmp_path):
    with Video(str(write_video(tmp_path / "a.mp4", 60, 32, 32))) as video:
        for seed in range(10):
            rng = np.random.default_rng(seed)
            found = numbers(sample_clips(video, Item("", 0, 2.0, 4.0), rng, settings())["clips"])     # at 10 per second
            assert found.min() >= 20 and found.max() <= 40


@pytest.mark.parametrize("height, width, size", [(48, 96, (24, 32)), (240, 320, (240, 320)), (100, 50, (24, 32)),
                                                 (57, 57, (64, 64)), (256, 340, (240, 320)),
                                                 (1080, 1920, (240, 320)), (20, 30, (64, 64))])
def test_the_largest_window_of_the_aspect_is_used_at_a_random_place(monkeypatch, height, width, size):
    calls = []
    monkeypatch.setattr(mcl, "read_views", lambda video, indices, boxes, size: calls.append((indices, boxes, size)) or 0)
    video = SimpleNamespace(info=SimpleNamespace(frames=50, height=height, width=width))
    cfg, places = settings(frame_height=size[0], frame_width=size[1], repeats=2), []
    for seed in range(150):
        sample_clips(video, Item("", 0, 0, math.inf), np.random.default_rng(seed), cfg)
        indices, boxes, asked = calls[-1]
        assert asked == size and len(indices) == len(boxes) == 12
        boxes = np.array(boxes)
        assert (boxes[:6] == boxes[0]).all() and (boxes[6:] == boxes[6]).all(), "all candidates of a sample alike"
        for x1, y1, x2, y2 in boxes[[0, 6]]:
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            assert x2 - x1 == width or y2 - y1 == height, "the largest"
            assert abs((x2 - x1) - (y2 - y1) * size[1] / size[0]) < 1 + size[1] / size[0]
            places.append((x1 / max(1, width - (x2 - x1)), y1 / max(1, height - (y2 - y1))))
    w, h = boxes[0, 2:] - boxes[0, :2]
    assert (w, h) == (width, height) or any(a != b for a, b in zip(places[::2], places[1::2])), "a place per sample"
    for place, free in zip(np.array(places).T, (width - w, height - h)):
        if free == 0:
            assert (place == 0).all()
        else:
            assert place.min() < 0.03 and place.max() > 0.97 and place.mean() == pytest.approx(0.5, abs=0.1)


# ---- sampling in space -----------------------------------------------------------------------------------------------

def slow_hot_box(m):
    """-> (x1, y1, x2, y2) in cells, share"""
    gh, gw = m.shape
    cells = sorted(product(range(gh), range(gw)), key=lambda p: -m[p])[:math.floor(0.1 * gh * gw)]
    y, x = zip(*cells)
    box = min(x), min(y), max(x) + 1, max(y) + 1
    area = (box[2] - box[0]) * (box[3] - box[1])
    share = 0.9 if area <= 4 else 0.8 if area <= 8 else 0.7 if area <= 12 else 0.0
    return box, share if m.max() > 0 else 0.0


def peaks(count, seed=0, grid=(7, 7)):
    """Maps with a hot spot of some size somewhere: all shares occur."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:grid[0], :grid[1]]
    cy, cx, s = rng.uniform(0, 6, (count, 1, 1)), rng.uniform(0, 6, (count, 1, 1)), rng.uniform(0.3, 4, (count, 1, 1))
    spots = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / s ** 2) + rng.uniform(0, 0.3, (count, 1, 1)) * rng.random((count, *grid))
    return torch.from_numpy(spots + 1e-6 * rng.random((count, *grid))).float()


@pytest.mark.parametrize("grid", [(7, 7), (5, 9)])
def test_hot_box_is_the_tight_box_of_the_hottest_tenth(grid):
    found = peaks(400, grid=grid)
    boxes, shares = hot_box(found)
    for m, box, share in zip(found.numpy(), boxes, shares):
        expected = slow_hot_box(m)
        assert tuple(box.tolist()) == expected[0] and share.item() == pytest.approx(expected[1])
    assert {round(s, 1) for s in shares.tolist()} == {0.0, 0.7, 0.8, 0.9}


@pytest.mark.parametrize("rows, columns, share", [(2, 2, 0.9), (1, 4, 0.9), (1, 5, 0.8), (2, 4, 0.8), (3, 3, 0.7), (3, 4, 0.7),
                                                  (2, 7, 0.0), (4, 4, 0.0)])
def test_the_larger_the_box_the_less_of_it_is_wanted(rows, columns, share):
    m = torch.zeros(1, 7, 7)
    for i, j in ((0, 0), (0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1)):
        m[0, 2 + i, j] += 1
    m[0, 2:2 + rows, :columns] += 0.01 * noise(rows, columns)                   # so that four cells are hottest
    box, got = hot_box(m)
    assert box.tolist() == [[0, 2, columns, 2 + rows]] and got.item() == pytest.approx(share)


def test_nothing_is_wanted_where_nothing_moves():
    assert hot_box(torch.zeros(2, 7, 7))[1].tolist() == [0, 0]
    assert hot_box(torch.full((1, 7, 7), 1e-20) * (torch.arange(49).view(7, 7) < 2))[1] >= 0


def slow_cover(box, hot):
    (x1, y1, x2, y2), (a1, b1, a2, b2) = box, hot
    return (max(0, min(x2, a2) - max(x1, a1)) / (a2 - a1)) * (max(0, min(y2, b2) - max(y1, b1)) / (b2 - b1))


def in_pixels(m, H, W):
    (x1, y1, x2, y2), share = slow_hot_box(m)
    gh, gw = m.shape
    return (x1 * W / gw, y1 * H / gh, x2 * W / gw, y2 * H / gh), share


@pytest.mark.parametrize("H, W, least, places", [(240, 320, 0.2, 40), (64, 64, 0.5, 40), (90, 51, 0.2, 5)])
def test_a_crop_is_the_first_of_its_places_that_holds_enough_or_the_best(H, W, least, places):
    N, found = 1000, peaks(1000, seed=1)
    boxes = motion_crop(found, H, W, seeded(3), least, places)
    generator, held, exact = seeded(3), 0, 0
    sizes, spots = torch.rand(N, 2, 20, generator=generator).numpy(), torch.rand(N, 2, places, generator=generator).numpy()
    assert boxes.shape == (N, 4) and torch.equal(boxes, boxes.round())
    for m, box, size, spot in zip(found.numpy(), boxes.tolist(), sizes, spots):
        x1, y1, x2, y2 = box
        w, h = x2 - x1, y2 - y1
        assert 0 <= x1 < x2 <= W and 0 <= y1 < y2 <= H
        for a, r in size.T.astype(float):                                       # the first size that fits
            area, aspect = H * W * (least + (1 - least) * a), math.exp((2 * r - 1) * math.log(4 / 3))
            want = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if want[0] <= W and want[1] <= H:
                break
        exact += want == (w, h)
        assert abs(want[0] - w) <= 1 and abs(want[1] - h) <= 1
        hot, share = in_pixels(m, H, W)
        corners = [(math.floor(x * np.float32(W - w + 1)), math.floor(y * np.float32(H - h + 1))) for x, y in spot.T]
        cover = [slow_cover((x, y, x + w, y + h), hot) for x, y in corners]
        assert (x1, y1) in corners
        got = slow_cover(box, hot)
        enough = [c for c in cover if c >= share - 1e-5]
        assert got >= share - 1e-5 if enough else got >= max(cover) - 1e-5
        earlier = [c for c in cover[:corners.index((x1, y1))] if c >= share + 1e-5]
        assert not earlier, "the first"
        held += share > 0 and got >= share
    assert exact > 0.99 * N and held > 0.3 * N


def quantile_distance(a, b):
    """Kolmogorov and Smirnov's."""
    both = np.sort(np.concatenate([a, b]))
    return abs(np.searchsorted(np.sort(a), both, "right") / len(a) - np.searchsorted(np.sort(b), both, "right") / len(b)).max()


@pytest.mark.parametrize("H, W, least", [(240, 320, 0.2), (100, 80, 0.5)])
def test_sizes_are_those_of_a_random_resized_crop_whatever_the_motion(H, W, least):
    rng, crops = np.random.default_rng(0), []
    while len(crops) < 20000:
        area, aspect = H * W * rng.uniform(least, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= W and h <= H:
            crops.append((rng.integers(0, W - w + 1), rng.integers(0, H - h + 1), w, h))
    expected = np.array(crops, float).T
    for m in (peaks(5000), torch.zeros(5000, 7, 7)):
        x1, y1, x2, y2 = motion_crop(m, H, W, seeded(1), least).double().numpy().T
        w, h = x2 - x1, y2 - y1
        assert quantile_distance(w * h, expected[2] * expected[3]) < 0.03
        assert quantile_distance(w / h, expected[2] / expected[3]) < 0.03
    for got, wanted in zip((x1, y1), expected):                                 # where nothing moves: anywhere
        assert quantile_distance(got, wanted) < 0.03


@pytest.mark.parametrize("cells, likely, by_chance", [((0, 0), 0.40, 0.04), ((0, 1), 0.86, 0.14)])
def test_a_hot_corner_is_held_far_more_often_than_by_chance(cells, likely, by_chance):
    N, H, W, (i, j), rng = 3000, 224, 224, cells, np.random.default_rng(0)
    m = torch.zeros(N, 7, 7)
    m[:, i:i + 2, j:j + 2] = 1
    hot = 32 * j, 32 * i, 32 * j + 64, 32 * i + 64

    def slow(places):
        """The rule: the first of some places that holds 0.9 of four cells."""
        held = 0
        for _ in range(N):
            w = h = H + 1
            while w > W or h > H:
                area, aspect = H * W * rng.uniform(0.2, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
                w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            spots = zip(rng.integers(0, W - w + 1, places).tolist(), rng.integers(0, H - h + 1, places).tolist())
            held += any(slow_cover((x, y, x + w, y + h), hot) >= 0.9 for x, y in spots)
        return held / N
    for maps, places, expected in ((m, 40, likely), (0 * m, 1, by_chance)):
        got = np.mean([slow_cover(box, hot) >= 0.9 for box in motion_crop(maps, H, W, seeded(0)).tolist()])
        assert got == pytest.approx(slow(places), abs=0.045) and got == pytest.approx(expected, abs=0.03)


def test_crops_that_never_fit_take_the_whole_side_they_exceed():
    boxes = motion_crop(peaks(200), 32, 320, seeded(), min_area=1.0)            # 87 .. 117 pixels wide and high
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (h == 32).all() and w.min() >= 87 and w.max() <= 117 and (boxes >= 0).all() and (boxes[:, 2] <= 320).all()
    tall = motion_crop(peaks(200), 320, 32, seeded(), min_area=1.0)
    assert (tall[:, 2] - tall[:, 0] == 32).all() and (tall[:, 3] <= 320).all()


def test_crops_are_decided_by_the_generator_and_not_by_how_a_batch_is_split():
    m = peaks(6)
    whole = motion_crop(m, 64, 64, seeded(4, 0, 6))
    assert torch.equal(whole, motion_crop(m, 64, 64, seeded(4))) and not torch.equal(whole, motion_crop(m, 64, 64, seeded(5)))
    halves = [motion_crop(m[:3], 64, 64, seeded(4, 0, 6)), motion_crop(m[3:], 64, 64, seeded(4, 3, 6))]
    assert torch.equal(whole, torch.cat(halves)) and len(set(map(tuple, whole.tolist()))) > 3


# ---- cutting ---------------------------------------------------------------------------------------------------------

def slow_crop(image, box, size):
    """image (C, H, W): bilinear between pixel centres, the border goes on."""
    C, H, W = image.shape
    x1, y1, x2, y2 = box
    out = np.zeros((C, size, size))
    for i, j in product(range(size), range(size)):
        y = min(max(y1 + (i + 0.5) * (y2 - y1) / size - 0.5, 0), H - 1)
        x = min(max(x1 + (j + 0.5) * (x2 - x1) / size - 0.5, 0), W - 1)
        top, left = min(int(y), H - 2), min(int(x), W - 2)
        v, u = y - top, x - left
        out[:, i, j] = ((1 - v) * ((1 - u) * image[:, top, left] + u * image[:, top, left + 1])
                        + v * ((1 - u) * image[:, top + 1, left] + u * image[:, top + 1, left + 1]))
    return out


def test_crop_resize_equals_slow_loops_and_mirrors():
    maps, size = noise(5, 2, 11, 14), 6
    boxes = torch.tensor([[0, 0, 14, 11], [3, 2, 9, 8], [2.5, 1.25, 13.5, 4], [10, 0, 14, 11], [1, 9, 3, 11]])
    got = crop_resize(maps, boxes, size)
    for image, box, cut in zip(maps.double().numpy(), boxes.tolist(), got.numpy()):
        assert np.allclose(cut, slow_crop(image, box, size), atol=1e-4)
    flipped = torch.tensor([True, False, True, True, False])
    mixed = crop_resize(maps, boxes, size, flipped)
    for a, b, f in zip(got, mixed, flipped):
        torch.testing.assert_close(a.flip(-1) if f else a, b, atol=1e-4, rtol=0)


def test_crop_resize_without_scaling_is_plain_slicing():
    maps = noise(3, 4, 20, 30)
    boxes = torch.tensor([[0, 0, 8, 8], [22, 12, 30, 20], [7, 5, 15, 13]])
    for image, (x1, y1, x2, y2), cut in zip(maps, boxes.tolist(), crop_resize(maps, boxes, 8)):
        torch.testing.assert_close(cut, image[:, y1:y2, x1:x2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("box, size", [((0, 0, 30, 20), 12), ((0, 0, 30, 20), 50), ((6, 4, 22, 16), 32), ((6, 4, 22, 16), 8)])
def test_crop_resize_is_torchvision_s(box, size):
    maps, (x1, y1, x2, y2) = noise(1, 3, 20, 30), box
    expected = tv.resized_crop(maps, y1, x1, y2 - y1, x2 - x1, [size, size], antialias=False)
    got = crop_resize(maps, torch.tensor([box]), size)
    edge = 0 if box == (0, 0, 30, 20) else max(0, math.ceil(size / (2 * min(x2 - x1, y2 - y1))))      # it cuts first
    inside = slice(edge, size - edge)
    torch.testing.assert_close(got[..., inside, inside], expected[..., inside, inside], atol=1e-4, rtol=0)


# ---- models for the rest ---------------------------------------------------------------------------------------------

class FakeFlow:
    """Something like flow that is made of the colours of both frames, and what it was asked for."""

    def __init__(self, size=1):
        self.asked, self.size = [], size

    def __call__(self, clips):
        self.asked.append(clips.detach().clone())
        x = to_float01(clips).float()
        flow = torch.stack([5 * x[:, 0, 1:] - 2 * x[:, 1, :-1], 3 * x[:, 2, 1:] * x[:, 0, :-1]], 2)
        return F.avg_pool2d(flow.flatten(0, 1), self.size).unflatten(0, flow.shape[:2])


def tiny(encoder=None, seed=0, flow=None, **changes):
    torch.manual_seed(seed)
    defaults = dict(steps=10, queue=32, momentum=0.9, outputs=8, order_weight=1.0)
    return MCL(encoder or make_backbone(**VIT), flow or FakeFlow(), **{**defaults, **changes})


def narrow(name="r2plus1d_50", seed=0):
    """A ResNet of an eighth of the channels, with norms that are not those of the start."""
    torch.manual_seed(seed)
    net = ResNet3D(name, 0.125, 32, 8)
    return with_statistics(net)


def with_statistics(net):
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.0)
            for tensor in (module.bias, module.running_mean):
                tensor.data.uniform_(-0.2, 0.2)
    return net


def videos(B=3, K=2, frames=4, H=24, W=32, seed=0):
    generator = seeded(seed)
    ground = F.interpolate(torch.rand(3 * K * B, 3, frames + 1, 5, 6, generator=generator), (frames + 1, H, W))
    order = torch.randint(2, (B,), generator=generator)
    return dict(clips=(255 * ground).byte(), order=order)


def spied(model):
    """-> what its embed, view and query_motion are given and give, call by call."""
    record = {}
    for name in ("embed", "view", "query_motion"):
        def run(*args, name=name, method=getattr(model, name)):
            out = method(*args)
            record.setdefault(name, []).append((args, out))
            return out
        object.__setattr__(model, name, run)
    return record


# ---- choice of clips and views ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("frames", [4, 8, 16])
def test_maps_are_of_four_pairs_of_neighbours_evenly_over_the_clip(frames):
    model = tiny()
    clips = torch.arange(frames + 1).view(1, 1, -1, 1, 1) * 10 + torch.arange(12).view(12, 1, 1, 1, 1)
    model.choose(clips.expand(12, 3, -1, 32, 32).byte().contiguous(), seeded())
    asked, = model.flow.asked
    assert asked.shape == (12 * 4, 3, 2, 32, 32)
    first = asked.view(12, 4, 3, 2, 32, 32)[:, :, 0, :, 0, 0].int() - torch.arange(12).view(12, 1, 1)
    expected = [[10 * t, 10 * (t + 1)] for t in {4: (0, 1, 2, 3), 8: (1, 3, 5, 7), 16: (2, 6, 10, 14)}[frames]]
    assert first.tolist() == [expected] * 12


def test_choose_takes_the_winners_and_their_maps():
    model, batch = tiny(), videos(5)
    clips, found, every, chosen = model.choose(batch["clips"], seeded(2))
    candidates = batch["clips"].view(5, 3, 2, 3, 5, 24, 32)
    first = [0, 1, 2, 3]
    for b, c, k in product(range(5), range(3), range(2)):
        pairs = torch.stack([FakeFlow()(candidates[b, c, k][None, :, t:t + 2])[0] for t in first])     # (4, 1, 2, h, w)
        torch.testing.assert_close(every[b, c, k], clip_map(pairs[:, 0][None])[0])
        if chosen[b, c] == k:
            assert torch.equal(clips[b, c], candidates[b, c, k]) and torch.equal(found[b, c], every[b, c, k])
    assert torch.equal(chosen, tournament(every.mean((3, 4)), seeded(2)))
    assert clips.shape == (5, 3, 3, 5, 24, 32) and found.shape == (5, 3, 7, 7) and 0 < chosen.sum() < 15


@pytest.mark.parametrize("motion_clips, motion_crops", [(True, True), (True, False), (False, True), (False, False)])
def test_switches_of_motion_set_candidates_boxes_and_what_flow_is_for(motion_clips, motion_crops):
    model = tiny(motion_clips=motion_clips, motion_crops=motion_crops, align_weight=0.0)
    batch = videos(4, 2 if motion_clips else 1)
    record = spied(model)
    loss, stats = model(batch, seeded(1))
    loss.backward()
    assert len(model.flow.asked) == (motion_clips or motion_crops) and "query_motion" not in record
    assert not [name for name in stats if name.startswith("align")] and loss.isfinite()
    for (clips, motion, _), _ in list(record["view"]):
        generator = seeded(9)
        assert motion.shape == (4, 7, 7) and clips.shape == (4, 3, 4, 24, 32)
        got, plain = (model.view(clips, m, seeded(9))[1] for m in (motion, torch.zeros_like(motion)))
        assert torch.equal(got, motion_crop(motion if motion_crops else 0 * motion, 24, 32, generator, 0.2))
        assert motion_crops or torch.equal(got, plain)
    assert (record["view"][0][0][1].max() > 0) == (motion_clips or motion_crops)


def test_a_view_is_the_crop_mirrored_or_not_and_normalised(monkeypatch):
    monkeypatch.setattr(mcl, "blur", lambda clips, generator: clips)
    model, clips, m = tiny(colour=0.0), videos(40, 1, 4)["clips"][:40, :, :4], peaks(40)
    view, box, flipped = model.view(clips, m, seeded(3))
    assert view.shape == (40, 3, 4, 16, 16) and 0.25 < flipped.float().mean() < 0.75
    for t in range(4):
        expected = crop_resize(clips[:, :, t].float() / 255, box, 16)
        expected = torch.stack([e.flip(-1) if f else e for e, f in zip(expected, flipped)])
        torch.testing.assert_close(unnormalize(view)[:, :, t], expected, atol=1e-4, rtol=0)
    mean, std = view.new_tensor((0.485, 0.456, 0.406)), view.new_tensor((0.229, 0.224, 0.225))
    black = model.view(torch.zeros_like(clips), m, seeded(3))[0]
    torch.testing.assert_close(black[0, :, 0, 0, 0], -mean / std)


def test_colours_and_blur_of_a_view_are_the_published_ones(monkeypatch):
    called = []
    monkeypatch.setattr(mcl, "colour_jitter", lambda x, g, b, c, s, h, grey: called.append((b, c, s, h, grey)) or x)
    monkeypatch.setattr(mcl, "blur", lambda x, g: called.append("blur") or x)
    for colour in (1.0, 0.5):
        tiny(colour=colour).view(videos(2, 1)["clips"][:2], peaks(2), seeded())
    assert called == [(0.4, 0.4, 0.4, 0.1, 0.2), "blur", (0.2, 0.2, 0.2, 0.05, 0.1), "blur"]


@pytest.mark.parametrize("size", [1, 2])
def test_the_flow_of_the_query_is_cut_and_mirrored_like_the_query(monkeypatch, size):
    monkeypatch.setattr(mcl, "blur", lambda clips, generator: clips)
    class Bright(FakeFlow):                                                     # flow where the first frame is bright
        def __call__(self, clips):
            flow = to_float01(clips)[:, :2, :-1].transpose(1, 2)
            return F.avg_pool2d(flow.flatten(0, 1), size).unflatten(0, flow.shape[:2])
    model = tiny(flow=Bright(), colour=0.0)
    clips = torch.zeros(30, 3, 5, 24, 32, dtype=torch.uint8)
    for b in range(30):                                                         # a spot of four pixels that moves
        for t in range(5):
            clips[b, :, t, 2 * (b % 10):2 * (b % 10) + 4, 2 * (t + b % 11):2 * (t + b % 11) + 4] = 255
    view, box, flipped = model.view(clips[:, :, :-1], torch.zeros(30, 7, 7), seeded())
    flow, seen = model.query_motion(clips, box, flipped), unnormalize(view)[:, :2].transpose(1, 2)
    assert flow.shape == (30, 4, 2, 16, 16) and 5 < flipped.sum() < 25
    if size == 1:
        torch.testing.assert_close(flow, seen, atol=1e-4, rtol=0)
    else:                                                                       # coarser, but at the same place
        x = torch.arange(16.0)
        whole = ((flow[..., [0, -1]].sum((3, 4)) + flow[..., [0, -1], :].sum((3, 4))) < 1e-4) & (seen.sum((3, 4)) > 3)
        for dim in (3, 4):
            centres = [(maps.sum(7 - dim) * x).sum(-1) / maps.sum((3, 4)).clamp(min=1e-6) for maps in (flow, seen)]
            torch.testing.assert_close(centres[0][whole], centres[1][whole], atol=0.3, rtol=0)
        assert whole.sum() > 20


def test_what_a_video_gets_does_not_depend_on_how_the_batch_is_split():
    model, batch = tiny(), videos(4)
    def drawn(clips, generator):
        clips, found, *_ = model.choose(clips, generator)
        return [out for i in (0, 0, 1, 2) for out in model.view(clips[:, i], found[:, i], generator)]
    whole = drawn(batch["clips"], seeded(7, 0, 4))
    parts = drawn(batch["clips"][:6], seeded(7, 0, 4)), drawn(batch["clips"][6:], seeded(7, 1, 4))
    for a, *b in zip(whole, *parts):
        torch.testing.assert_close(a.float(), torch.cat(b).float(), atol=1e-6, rtol=0)


# ---- the losses ------------------------------------------------------------------------------------------------------

def slow_softmax_loss(positive, negatives, T):
    return -math.log(math.exp(positive / T) / (math.exp(positive / T) + sum(math.exp(n / T) for n in negatives)))


def slow_losses(record, queue, batch, model, T):
    """-> inter, intra, order, P, M from the embeddings and the flow of a step; keys (3 B, outputs) of the inter head."""
    (_, keys), (_, (X, q)) = [next((args, out) for args, out in record["embed"] if args[0] is encoder)
                              for encoder in (model.keys["encoder"], model.encoder)]
    k = {name: value.double().numpy() for name, value in keys[1].items()}
    own = {name: value.detach().double().numpy() for name, value in q.items()}
    B, queue = len(own["inter"]), queue.double().numpy()
    inter = np.mean([slow_softmax_loss(own["inter"][b] @ k["inter"][j * B + b], [own["inter"][b] @ n for n in queue], T)
                     for b in range(B) for j in range(3)])
    intra = np.mean([slow_softmax_loss(own["intra"][b] @ k["intra"][b], [own["intra"][b] @ k["intra"][j * B + b]], T)
                     for b in range(B) for j in (1, 2)])
    order, weight, bias = 0, *(p.detach().double().numpy() for p in (model.order.weight, model.order.bias))
    for b in range(B):
        joined = np.concatenate([own["order"][b], k["order"][B + b], k["order"][2 * B + b]])
        logits = weight @ (joined / np.linalg.norm(joined)) + bias
        order += (math.log(sum(np.exp(logits))) - logits[batch["order"][b]]) / B
    similarity = (q["inter"] * keys[1]["inter"][:B]).sum()
    P = slow_alignment_map(torch.autograd.grad(similarity, X, retain_graph=True)[0].double().numpy())
    return inter, intra, order, P, keys[1]["inter"]


@pytest.mark.parametrize("attention", ["l1", "softmax"])
@pytest.mark.parametrize("updates, warmup, network", [(0, 0, "vit"), (3, 5, "vit"), (5, 5, "r2plus1d_50"), (4, 0, "r2plus1d_50")])
def test_loss_statistics_and_queue_equal_a_computation_by_hand(attention, updates, warmup, network):
    encoder, frames = (None, 4) if network == "vit" else (narrow(), 8)
    model = tiny(encoder, steps=10, warmup=warmup, order_weight=0.7, align_weight=0.4, attention=attention, temperature=0.3)
    model.updates.fill_(updates)
    record, batch, before = spied(model), videos(3, frames=frames), model.queue.keys.clone()
    loss, stats = model(batch, seeded(4))
    inter, intra, order, P, keys = slow_losses(record, before, batch, model, 0.3)
    (_, flow), = record["query_motion"]
    grid, per = P.shape[1:], frames // P.shape[1]
    M = np.array([[slow_cells(slow_boundary(f[per * k:per * (k + 1)]), *grid[1:]) for k in range(grid[0])]
                  for f in flow.double().numpy()])
    cosines = slow_alignment(P, M * (38.25 if attention == "softmax" else 1), attention)
    expected = dict(inter=inter, intra=intra, order=order, **{f"align_{k}": v for k, v in cosines.items()})
    assert {k: stats[k].item() for k in expected} == pytest.approx(expected, rel=2e-3, abs=2e-4)
    total = inter + intra + 0.7 * updates / 10 * order + (2 if updates < warmup else 1) * 0.4 * (3 - sum(cosines.values()))
    assert loss.item() == pytest.approx(total, rel=1e-3) and loss.dtype == torch.float32
    assert stats["zero_maps"].item() == pytest.approx((P.reshape(3, -1).max(1) == 0).mean())
    assert stats["map_norm"].item() == pytest.approx(np.mean([np.linalg.norm(p) for p in P]), rel=1e-3)
    assert not [name for name, value in stats.items() if value.requires_grad]
    assert torch.equal(model.queue.keys[:9], keys) and torch.equal(model.queue.keys[9:], before[9:]) and model.queue.pointer == 9


def test_query_and_keys_are_views_of_the_right_clips():
    model, batch = tiny(), videos(3)
    record = spied(model)
    model(batch, seeded(4))
    clips, found, *_ = model.choose(batch["clips"], seeded(4))
    views = list(record["view"])
    for i, ((given, motion, _), _) in zip((0, 0, 1, 2), views, strict=True):
        assert torch.equal(given, clips[:, i, :, :-1]) and torch.equal(motion, found[:, i])
    (given, box, flipped), flow = record["query_motion"][0]
    assert torch.equal(given, clips[:, 0]) and torch.equal(box, views[0][1][1]) and torch.equal(flipped, views[0][1][2])
    embedded = {args[0] is model.encoder: args for args, _ in record["embed"]}
    assert torch.equal(embedded[True][2], views[0][1][0])
    assert torch.equal(embedded[False][2], torch.cat([views[i][1][0] for i in (1, 2, 3)]))
    assert embedded[True][1] is model.heads and embedded[False][1] is model.keys["heads"]
    assert not torch.equal(views[0][1][1], views[1][1][1]), "the query and its key have crops of their own"


def test_embeddings_are_of_length_one_by_each_head():
    model = tiny()
    clips = noise(2, 3, 4, 16, 16)
    X, q = model.embed(model.encoder, model.heads, clips)
    feature = split(model.encoder, clips)[1](X)
    for name, head in model.heads.items():
        hidden = (feature @ head[0].weight.T + head[0].bias).clamp(min=0) @ head[2].weight.T + head[2].bias
        torch.testing.assert_close(q[name], hidden / hidden.norm(dim=1, keepdim=True))
    assert set(q) == {"inter", "intra", "order"} and X.shape == (2, 96, 2, 2, 2)


def test_gradient_reaches_all_that_is_trained_and_no_key():
    for encoder, frames in ((None, 4), (narrow(), 8)):
        model = tiny(encoder)
        model.updates.fill_(5)
        model(videos(4, frames=frames), seeded())[0].backward()
        for name, p in model.named_parameters():
            if name.startswith("keys."):
                assert p.grad is None and not p.requires_grad, name
            else:
                assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
        assert not model.queue.keys.requires_grad


def gradients(model, batch, seed=2):
    model.zero_grad()
    model(batch, seeded(seed))[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_order_loss_trains_the_query_and_its_classifier_only():
    def run(weight):
        model = tiny(order_weight=weight, align_weight=0.0)
        model.updates.fill_(5)
        return gradients(model, videos(4))
    with_order, without = run(2.0), run(0.0)
    changed = {name for name in with_order if not torch.equal(with_order[name], without[name])}
    assert {n.split(".")[0] for n in changed} == {"encoder", "heads", "order"}
    assert {n for n in changed if n.startswith("heads.")} == {n for n in with_order if n.startswith("heads.order.")}
    assert all(without[n].abs().max() == 0 for n in with_order if n.startswith(("order.", "heads.order.")))


def test_the_alignment_loss_trains_the_inter_head_and_the_encoder():
    runs = [gradients(tiny(align_weight=weight, order_weight=0.0), videos(4)) for weight in (0.0, 1.0)]
    changed = {name for name in runs[0] if not torch.allclose(runs[0][name], runs[1][name], rtol=1e-3, atol=1e-7)}
    assert {n.split(".")[1] for n in changed if n.startswith("heads.")} == {"inter"}
    assert any(n.startswith("encoder.patch_embed") for n in changed) and not any(n.startswith("order.") for n in changed)


def test_own_keys_are_not_among_the_negatives_of_the_step():
    small, batch = tiny(queue=9, align_weight=0.0), videos(3)
    small.queue.keys.zero_()
    _, stats = small(batch, seeded())
    again = tiny(queue=9, align_weight=0.0)
    again.load_state_dict(small.state_dict())
    assert (small.queue.keys.norm(dim=1) - 1).abs().max() < 1e-5
    assert again(batch, seeded())[1]["inter"] > stats["inter"] + 0.3, "now they are"


def test_keys_use_running_statistics_and_follow_after_each_step():
    model = tiny(narrow(), momentum=0.75)
    before = copy.deepcopy(model.keys.state_dict())
    batch = videos(3, frames=8)
    model.train()
    running = model.encoder.stem.bn1.running_mean.clone(), model.encoder.layer4[2].bn3.running_mean.clone()
    model(batch, seeded())
    assert all(torch.equal(value, before[name]) for name, value in model.keys.state_dict().items())
    assert not torch.equal(running[0], model.encoder.stem.bn1.running_mean)
    assert not torch.equal(running[1], model.encoder.layer4[2].bn3.running_mean)
    for p in [*model.encoder.parameters(), *model.heads.parameters()]:
        p.data.add_(1)
    model.update_keys()
    assert model.updates == 1
    for name, p in model.keys.named_parameters():
        torch.testing.assert_close(p.data, before[name] + 0.25)
    torch.testing.assert_close(model.keys["encoder"].stem.bn1.running_mean, model.encoder.stem.bn1.running_mean)
    model.update_keys(momentum=0)
    for name, value in model.keys.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]) or name.endswith("num_batches_tracked")


def test_autocast_reaches_neither_views_nor_flow_nor_the_losses():
    model, batch, records = tiny(), videos(3), []
    for enabled in (False, True):
        fresh = copy.deepcopy(model)
        records.append(spied(fresh))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, stats = fresh(batch, seeded(3))
        records[-1]["loss"] = loss.item()
        loss.backward()
        assert loss.dtype == torch.float32 and records[-1]["embed"][1][1][0].dtype == torch.float32
    for name in ("view", "query_motion"):
        for (_, a), (_, b) in zip(records[0][name], records[1][name]):
            assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert records[0]["loss"] == pytest.approx(records[1]["loss"], rel=0.05) and records[0]["loss"] != records[1]["loss"]


def test_a_finer_map_is_averaged_to_the_grid_of_the_targets():
    torch.manual_seed(0)
    encoder = make_backbone(image_size=28, frames=8, patch_size=2, tubelet_size=1, dim=12, depth=1, heads=2)
    model = tiny(encoder)
    X, q = model.embed(model.encoder, model.heads, noise(2, 3, 8, 28, 28))
    key = F.normalize(noise(2, 8, least=-1), dim=1)
    P = model.look((q["inter"] * key).sum(1), X)
    gradient, = torch.autograd.grad((q["inter"] * key).sum(), X, retain_graph=True)
    fine = slow_alignment_map(gradient.double().numpy())                        # (2, 8, 14, 14)
    expected = fine.reshape(2, 4, 2, 7, 2, 7, 2).mean((2, 4, 6))
    assert X.shape == (2, 48, 8, 14, 14) and np.allclose(P.detach().numpy(), expected, rtol=1e-3, atol=1e-3 * expected.max())
    assert P.requires_grad and not model.eval().look((q["inter"] * key).sum(1), X).requires_grad


# ---- the aligned layer -----------------------------------------------------------------------------------------------

def network(name):
    torch.manual_seed(0)
    if name == "vit":
        encoder = make_backbone(**VIT)
        for p in encoder.parameters():
            p.data += 0.1 * torch.randn_like(p)
        return encoder, noise(3, 3, 4, 16, 16, least=-1)
    if name in ("r2plus1d_50", "slow_r50"):
        return narrow(name), noise(3, 3, 8, 32, 32, least=-1)
    return with_statistics(make_backbone(name, 32, 8)), noise(2, 3, 8, 32, 32, least=-1)


@pytest.mark.parametrize("name", ["r2plus1d_50", "slow_r50", "r2plus1d_18", "r3d_18"])
@pytest.mark.parametrize("training", [False, True])
def test_split_convolutional_networks_give_their_own_features(name, training):
    net, clips = network(name)
    whole = copy.deepcopy(net).train(training)
    net.train(training)
    seen, last = [], whole.layer4[-1]
    linear = last.conv3 if isinstance(last, Bottleneck) else last.conv2[0]
    linear.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        expected = whole(clips)
        X, rest = split(net, clips)
        features = rest(X)
    torch.testing.assert_close(X, seen[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
    moved = 0
    for (key, a), b, start in zip(net.state_dict().items(), whole.state_dict().values(), network(name)[0].state_dict().values()):
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
            moved += not torch.equal(a, start)
    assert (moved > 20) == training and (moved == 0) == (not training)


def test_split_vit_is_the_norm_of_the_mean_of_its_tokens():
    net, clips = network("vit")
    seen = {}
    net.blocks[-1].register_forward_hook(lambda module, args, out: seen.update(tokens=out))
    net.blocks[-1].mlp.fc1.register_forward_hook(lambda module, args, out: seen.update(hidden=out))
    with torch.no_grad():
        net(clips)
        tokens, hidden = seen["tokens"].double().numpy(), seen["hidden"]
        X, rest = split(net, clips)
        features = rest(X)
    for t, i, j in product(range(2), range(2), range(2)):                       # tokens are in the order t, h, w
        torch.testing.assert_close(X[:, :, t, i, j], hidden[:, 4 * t + 2 * i + j], atol=1e-5, rtol=1e-4)
    mean = tokens.mean(1)
    normal = (mean - mean.mean(1, keepdims=True)) / np.sqrt(mean.var(1, keepdims=True) + 1e-6)
    expected = normal * net.norm.weight.detach().numpy() + net.norm.bias.detach().numpy()
    assert X.shape == (3, 96, 2, 2, 2) and np.allclose(features.numpy(), expected, atol=1e-4)


def tail(name, monkeypatch):
    """X and the rest in float64, of a network with few channels -> X, X -> similarity per clip."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self, *_: self)
    torch.manual_seed(0)
    if name == "vit":
        net = make_backbone(image_size=8, frames=2, patch_size=4, tubelet_size=1, dim=4, depth=1, heads=1).double()
        clips = torch.randn(2, 3, 2, 8, 8, dtype=torch.float64)
    else:
        net = ResNet3D("r2plus1d_50", 0.016, 64, 4).double()
        clips = torch.randn(3, 3, 4, 64, 64, dtype=torch.float64)
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    head, (X, rest) = mcl.projection(net.dim, 3).double(), split(net.train(), clips)
    key = F.normalize(torch.randn(len(clips), 3, dtype=torch.float64), dim=1)
    X = X.detach().requires_grad_()
    return X, lambda X: (F.normalize(head(rest(X)), dim=1) * key).sum(1)


@pytest.mark.parametrize("name", ["vit", "r2plus1d_50"])
def test_the_rest_can_be_differentiated_twice(name, monkeypatch):
    X, similarity = tail(name, monkeypatch)
    assert X.dtype == torch.float64 and X.numel() < 600
    assert torch.autograd.gradcheck(similarity, X, fast_mode=True, eps=1e-7, atol=1e-6)
    assert torch.autograd.gradgradcheck(similarity, X, fast_mode=True, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "r2plus1d_50"])
def test_the_gradient_of_the_alignment_loss_equals_finite_differences(name, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda self, *_: self)           # all of it in float64
    net, clips = network(name)
    model = tiny(net).double().train()
    clips, frozen = clips.double(), copy.deepcopy(model.state_dict())
    key = F.normalize(torch.randn(len(clips), 8, dtype=torch.float64), dim=1)
    trained = [p for n, p in model.named_parameters() if n.startswith(("encoder.", "heads.inter."))]
    M = noise(len(clips), *((2, 2, 2) if name == "vit" else (2, 1, 1)), dtype=torch.float64)

    def loss():
        X, q = model.embed(model.encoder, model.heads, clips)
        return alignment_loss(model.look((q["inter"] * key).sum(1), X), M)[0]
    gradient = torch.autograd.grad(loss(), trained, allow_unused=True)
    early = model.encoder.patch_embed.proj.weight if name == "vit" else model.encoder.stem.conv1.weight
    assert gradient[[p is early for p in trained].index(True)].abs().max() > 1e-9
    for seed in range(3):
        ways = [torch.randn(p.shape, generator=seeded(seed), dtype=p.dtype) * (p.abs().mean() + 1e-3) for p in trained]
        slope = sum((g * way).sum() for g, way in zip(gradient, ways) if g is not None)
        ends = []
        for sign in (1, -1):
            model.load_state_dict(frozen)
            for p, way in zip(trained, ways):
                p.data += sign * 1e-8 * way                                     # small: a gate of a ReLU makes the loss jump
            ends.append(loss().item())
        assert (ends[0] - ends[1]) / 2e-8 == pytest.approx(slope.item(), rel=1e-3, abs=1e-5)
    model.load_state_dict(frozen)


def test_training_the_alignment_alone_makes_the_network_look_at_motion_in_new_videos():
    torch.manual_seed(0)
    encoder = make_backbone(image_size=64, frames=8, patch_size=16, tubelet_size=2, dim=48, depth=2, heads=3)
    model = tiny(encoder)
    clips, targets = [], []
    for index in range(96):
        video, truth = toy_video(0, "train", index, frames=9)
        flow = np.stack([toy_flow(truth, t, t + 1)[0] for t in range(8)])
        clips.append(torch.from_numpy(video[:-1]).permute(3, 0, 1, 2))
        targets.append(motion_target(torch.from_numpy(flow).float()[None], (4, 4, 4))[0])
    clips, targets = mcl.normalize(torch.stack(clips)), torch.stack(targets)
    optimizer = torch.optim.AdamW([*model.encoder.parameters(), *model.heads["inter"].parameters()], 2e-3)
    before = copy.deepcopy(model.encoder.state_dict())

    def loss(rows):
        mirrored = clips[rows].flip(-1)
        with torch.no_grad():
            _, k = model.embed(model.keys["encoder"], model.keys["heads"], mirrored)
        X, q = model.embed(model.encoder, model.heads, clips[rows])
        return alignment_loss(model.look((q["inter"] * k["inter"]).sum(1), X), targets[rows])[0]
    start = loss(slice(64, 96)).item()
    for step in range(30):
        value = loss(torch.randint(64, (24,), generator=seeded(step)))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    end = loss(slice(64, 96)).item()
    assert start > 0.6 and end < start - 0.3
    assert not torch.equal(model.encoder.blocks[0].attn.qkv.weight, before["blocks.0.attn.qkv.weight"])


# ---- weights of image networks ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def image_network():
    torch.manual_seed(0)
    return with_statistics(torchvision.models.resnet50(num_classes=10)).eval()


def saved(image_network, path, style):
    """As torchvision saves it; as MoCo does: with its head, its momentum encoder and its queue."""
    state = {k: v.clone() for k, v in image_network.state_dict().items()}
    if style == "moco":
        trunk = {k: v for k, v in state.items() if not k.startswith("fc.")}
        head = {"fc.0.weight": noise(2048, 2048), "fc.0.bias": noise(2048)}
        head |= {"fc.2.weight": noise(128, 2048), "fc.2.bias": noise(128)}
        query, key = {**trunk, **head}, {k: -v for k, v in {**trunk, **head}.items()}
        content = {"module.queue": noise(128, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
        content |= {f"module.encoder_q.{k}": v for k, v in query.items()} | {f"module.encoder_k.{k}": v for k, v in key.items()}
        state = dict(epoch=200, arch="resnet50", state_dict=content)
    torch.save(state, path)
    return path, head if style == "moco" else None


def frame_features(image_network, clip, start, step):
    flat = copy.deepcopy(image_network)
    flat.fc = nn.Identity()
    with torch.no_grad():
        return flat(clip.transpose(0, 1)[start::step])                          # (steps, 2048)


def step_features(net, clip):
    with torch.no_grad():
        return net.eval().forward_map(clip[None]).mean((3, 4))[0].T             # (steps, 2048)


@pytest.mark.parametrize("name, style", [("r2plus1d_50", "moco"), ("r2plus1d_50", "torchvision"),
                                         ("slow_r50", "torchvision")])
def test_an_image_network_gives_each_step_the_features_of_one_frame(image_network, tmp_path, name, style):
    path, _ = saved(image_network, tmp_path / "a.pth", style)
    net = make_backbone(name, 64, 8)
    report = load_weights(net, str(path))
    assert not [k for k in report.missing if not k.endswith("num_batches_tracked")] and len(report.loaded) >= 300
    assert not [k for k in report.loaded if "fc" in k or "head" in k]
    clip, (start, step) = torch.randn(3, 8, 64, 64, generator=seeded()), dict(slow_r50=(0, 2), r2plus1d_50=(1, 4))[name]
    expected, got = frame_features(image_network, clip, start, step), step_features(net, clip)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max() and expected.std() > 0.01
    flat = image_network.state_dict()
    for key in ("running_mean", "running_var", "weight", "bias"):
        assert torch.equal(net.layer3[4].bn2.state_dict()[key], flat[f"layer3.4.bn2.{key}"])
        assert torch.equal(net.stem.bn1.state_dict()[key], flat[f"bn1.{key}"])
        assert torch.equal(net.layer2[0].downsample[1].state_dict()[key], flat[f"layer2.0.downsample.1.{key}"])


def test_moco_s_weights_start_mcl_with_its_own_head_and_equal_keys(image_network, tmp_path):
    path, head = saved(image_network, tmp_path / "a.pth", "moco")
    torch.manual_seed(1)
    model = MCL(make_backbone("r2plus1d_50", 64, 8), FakeFlow(), 10, queue=8)
    report = load_weights(model, str(path))
    assert not [k for k in report.missing if k.startswith("encoder.")]
    assert {k.split(".")[0] for k in report.missing} == {"heads", "order", "keys", "queue", "updates"}
    assert sorted(k for k in report.loaded if k.startswith("heads.")) == [f"heads.inter.{i}.{kind}" for i in (0, 2)
                                                                          for kind in ("bias", "weight")]
    clip = torch.randn(3, 8, 64, 64, generator=seeded())
    expected = frame_features(image_network, clip, 1, 4)
    assert (step_features(model.encoder, clip) - expected).abs().max() <= 1e-5 * expected.abs().max()
    for i, kind in product((0, 2), ("weight", "bias")):
        got = model.heads["inter"][i].state_dict()[kind]
        assert torch.equal(got, head[f"fc.{i}.{kind}"]), "that of the query encoder, not of the momentum encoder"


def test_keys_start_where_the_image_network_does(image_network, tmp_path):
    path, _ = saved(image_network, tmp_path / "a.pth", "torchvision")
    model = MCL(make_backbone("r2plus1d_50", 64, 8), FakeFlow(), 10, queue=8)
    assert resume_or_init(None, str(path), model, None, None) == 0
    for name, value in model.keys.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    first = model.keys["encoder"].layer1[0].conv1.weight
    assert torch.equal(first[:, :, 0], image_network.layer1[0].conv1.weight)


@pytest.mark.parametrize("kind", ["resnet18", "wide", "narrow", "empty", "part"])
def test_an_image_network_that_does_not_fit_is_an_error_of_the_user(image_network, tmp_path, kind):
    if kind == "resnet18":
        state = torchvision.models.resnet18().state_dict()
    elif kind == "wide":
        state = torchvision.models.wide_resnet50_2().state_dict()
    elif kind in ("empty", "narrow"):
        state = {} if kind == "empty" else image_network.state_dict()
    else:
        state = {k: v for k, v in image_network.state_dict().items() if "layer3.2.conv2" not in k}
    torch.save(state, tmp_path / "a.pth")
    net = make_backbone("r2plus1d_50", 64, 8, width=0.125 if kind == "narrow" else 1.0)
    message = error_of(load_weights, net, str(tmp_path / "a.pth"))
    assert "a.pth" in message and (kind != "part" or "layer3.2.conv2" in message)


# ---- preview ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("network, motion_clips", [("vit", True), ("r2plus1d_50", True), ("vit", False)])
def test_preview_writes_a_picture_and_changes_nothing(tmp_path, network, motion_clips):
    encoder, frames = (None, 4) if network == "vit" else (narrow(), 8)
    cfg = settings(frames=frames, stride=1, motion_clips=motion_clips, frame_height=48, frame_width=64)
    path = write_video(tmp_path / "a.mp4", 40, 48, 64)
    samples = []
    for seed in range(2):
        with Video(str(path)) as video:
            sample = sample_clips(video, Item(str(path), 0, 0, math.inf), np.random.default_rng(seed), cfg, curve=True)
            samples.append((sample, "", 0, []))
    batch = to_device(collate(samples)["clips"], torch.device("cpu"))
    model = tiny(encoder, motion_clips=motion_clips).train()
    before, stream = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    given = {k: v.clone() for k, v in batch.items()}
    preview(model, batch, tmp_path / "a.png")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(m.training for m in model.encoder.modules()) and model.training and torch.equal(stream, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters()) and all(torch.equal(batch[k], v) for k, v in given.items())
    picture = read_image(str(tmp_path / "a.png"))
    assert picture.float().std() > 20 and picture.shape[2] > 8 * 112
    first = picture.clone()
    preview(model, batch, tmp_path / "a.png")
    assert torch.equal(first, read_image(str(tmp_path / "a.png"))), "the same videos, the same picture"


# ---- settings --------------------------------------------------------------------------------------------------------

def test_the_defaults_are_the_published_ones():
    cfg = Config()
    assert (cfg.frames, cfg.stride, cfg.image_size, cfg.queue, cfg.momentum, cfg.temperature) == (16, 2, 224, 131072, 0.999, 0.1)
    assert (cfg.epochs, cfg.batch, cfg.weight_decay, cfg.warmup_epochs) == (400, 32, 1e-4, 5)
    assert (cfg.order_weight, cfg.align_weight) == (0, 1)
    ucf = {**vars(cfg), **mcl.RECIPES["ucf101"]}
    assert (ucf["epochs"], ucf["order_weight"], ucf["lr"] * 32 / 256) == (200, 1.0, 0.01) and cfg.lr * 32 / 256 == 0.02
    assert cfg.min_lr * 32 / 256 == pytest.approx(1e-6) and GRID == (4, 7, 7)


def test_warm_up_begins_at_a_hundredth_of_the_peak_and_ends_at_it():
    rates = [mcl.cosine_lr(step, 100, 10, 2.0, 0.0) for step in range(100)]
    assert rates[:11] == pytest.approx([2 / 100 * (99 * k / 10 + 1) for k in range(11)])
    assert rates[55] == pytest.approx(1 + math.cos(math.pi * 45 / 90))


def test_the_tournament_takes_the_upper_half_as_often_as_the_docstring_says():
    motion = torch.rand(50_000, 1, 2, generator=torch.Generator().manual_seed(0))                # of the clips of a video, ranked
    chosen = motion.gather(2, tournament(motion, torch.Generator().manual_seed(1))[..., None])
    assert (chosen > 0.5).float().mean().item() == pytest.approx(0.68, abs=0.01) and "So .68 of the clips" in mcl.__doc__
