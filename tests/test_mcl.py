"""MCL against slow loops written from the specification and the released code's numbers."""
import copy
import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mcl
from common import Bottleneck, Item, Video, make_backbone, to_float01, unnormalize
from conftest import (FakeFlow, FakeVideo, error_of, golden_arrays, noise, numbers, scrambled, seeded, slow_gradient,
                      tiny_video)
from mcl import (GRID, MCL, Config, alignment_loss, alignment_map, clip_map, crop_resize, hot_box, motion_boundary,
                 motion_crop, motion_target, preview, random_starts, sample_clips, split, tournament)
from test_contrast import with_statistics
from test_fame import slow_info_nce

VIT = dict(image_size=16, frames=4, patch_size=8, tubelet_size=2, dim=24, depth=2, heads=3)


# ---- motion maps -----------------------------------------------------------------------------------------------------

def slow_boundary(flow):
    """flow (T, 2, h, w) -> (h, w): lengths of Prewitt gradients of the sum over time."""
    return sum(np.hypot(*slow_gradient(component)) for component in flow.sum(0))


def slow_cells(image, gh, gw):
    """Mean of each cell; where the grid does not divide the image, cells overlap."""
    h, w = image.shape
    rows = [slice(i * h // gh, -(-(i + 1) * h // gh)) for i in range(gh)]
    columns = [slice(j * w // gw, -(-(j + 1) * w // gw)) for j in range(gw)]
    return np.array([[image[r, c].mean() for c in columns] for r in rows])


def slow_target(flow, grid):
    per = flow.shape[1] // grid[0]
    return np.array([[slow_cells(slow_boundary(f[per * k:per * (k + 1)]), *grid[1:]) for k in range(grid[0])]
                     for f in flow.double().numpy()])


@pytest.mark.parametrize("h, w", [(6, 9), (1, 5), (2, 2)])
def test_motion_boundary_equals_slow_loops(h, w):
    flow = noise(2, 3, 2, h, w, least=-4, most=4)
    expected = np.stack([slow_boundary(f) for f in flow.double().numpy()])
    assert np.allclose(motion_boundary(flow).numpy(), expected, atol=1e-5)
    assert np.allclose(motion_boundary(flow[0]).numpy(), expected[0], atol=1e-5)


@pytest.mark.parametrize("T, grid, h, w", [(8, (4, 3, 2), 6, 8), (3, (3, 7, 7), 9, 10), (6, (2, 1, 4), 3, 4)])
def test_motion_target_equals_slow_loops(T, grid, h, w):
    flow = noise(2, T, 2, h, w, least=-4, most=4)
    assert np.allclose(motion_target(flow, grid).numpy(), slow_target(flow, grid), atol=1e-5)
    message = error_of(motion_target, torch.zeros(1, T + 1, 2, 8, 8), (grid[0] * 2, 2, 2))
    assert str(T + 1) in message and "--frames" in message


def test_motion_target_equals_the_released_code():
    golden = golden_arrays("mcl_motion_target.npz")
    flow = torch.stack([golden["u"], golden["v"]], 1).float()[None]             # the kernel there is not divided by 6
    torch.testing.assert_close(6 * motion_target(flow)[0], golden["target"], atol=1e-3, rtol=1e-5)
    assert motion_target(flow).shape == (1, *GRID) and golden["target"].max() > 1


@pytest.mark.parametrize("h, w, top, left", [(224, 224, 8, 8), (28, 84, 1, 3), (21, 20, 1, 1)])
def test_clip_map_is_the_mean_over_pairs_without_a_ring(h, w, top, left):
    flow = noise(2, 3, 2, h, w, least=-4, most=4)
    expected = []
    for clip in flow:
        total = sum(motion_boundary(pair[None]).double().numpy() for pair in clip) / 3      # magnitudes do not cancel
        total[:top], total[-top:], total[:, :left], total[:, -left:] = 0, 0, 0, 0
        expected.append(slow_cells(total, 7, 7))
    assert clip_map(flow).shape == (2, 7, 7) and np.allclose(clip_map(flow).numpy(), expected, atol=1e-5)


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
        weight = [math.exp(x - max(motion)) for x in motion] if attention == "softmax" else motion
        weight = [x / sum(weight) if sum(weight) else 0.0 for x in weight]
        rows.append([sum(a * slow_cosine(p[k], m[k]) for k, a in enumerate(weight)),
                     slow_cosine(sum(p) / len(p), sum(m) / len(m)), slow_cosine([step.sum() for step in p], motion)])
    return dict(zip(("st", "s", "t"), np.mean(rows, 0)))


def sparse_maps(*shape, seed=0, sparse=0.3):
    return noise(*shape, seed=seed, dtype=torch.float64) * (noise(*shape, seed=seed + 1) > sparse)


def test_alignment_equals_the_released_code():
    golden = golden_arrays("mcl_alignment.npz")
    P = alignment_map(golden["grad"])
    loss, cosines = alignment_loss(P, golden["tgt"], "softmax")
    assert (P - golden["pred"]).abs().max() <= 1e-9 and (loss - golden["loss"]).abs() <= 1e-9
    for name in ("st", "s", "t"):
        assert (cosines[name] - golden[f"sim_{name}"].mean()).abs() <= 1e-9


@pytest.mark.parametrize("shape", [(2, 5, 3, 4, 6), (1, 1, 1, 2, 3), (3, 4, 2, 1, 1)])
def test_alignment_map_equals_slow_loops(shape):
    gradient = torch.randn(shape, generator=seeded(), dtype=torch.float64)
    assert np.allclose(alignment_map(gradient).numpy(), slow_alignment_map(gradient.numpy()), atol=1e-12)


@pytest.mark.parametrize("attention", ["l1", "softmax"])
@pytest.mark.parametrize("shape, sparse", [((3, 4, 3, 5), 0.0), ((3, 4, 3, 5), 0.8), ((40, 2, 2, 1), 0.5)])
def test_alignment_loss_equals_slow_loops(attention, shape, sparse):
    P, M = sparse_maps(*shape, seed=1, sparse=sparse), 2 * sparse_maps(*shape, seed=3, sparse=sparse)
    loss, cosines = alignment_loss(P, M, attention)
    expected = slow_alignment(P.numpy(), M.numpy(), attention)
    assert {k: v.item() for k, v in cosines.items()} == pytest.approx(expected, abs=1e-10)
    assert loss.item() == pytest.approx(3 - sum(expected.values()), abs=1e-10)
    assert alignment_loss(M, M, attention)[0] <= loss and alignment_loss(0 * M, M, attention)[0] == 3
    if not sparse:
        assert alignment_loss(50 * M, M, attention)[0].abs() < 1e-9


def test_neither_the_scale_of_the_gradient_nor_that_of_motion_matters():
    gradient, M = torch.randn(3, 6, 4, 7, 7, generator=seeded()), sparse_maps(3, 4, 7, 7).float()
    losses, slopes = [], []
    for scale in (1e-10, 1e-4, 1.0, 1e4, 1e10):
        g = (gradient * scale).requires_grad_()
        loss, _ = alignment_loss(alignment_map(g), M)
        loss.backward()
        losses += [loss.item(), alignment_loss(alignment_map(gradient), M * scale)[0].item()]
        slopes.append(g.grad * scale)
    assert losses == pytest.approx([losses[0]] * 10, abs=1e-5) and slopes[0].abs().max() > 1e-3
    for slope in slopes:
        torch.testing.assert_close(slope, slopes[0], atol=1e-6, rtol=1e-3)


STEP = (slice(None), 1)                                                         # of all clips


@pytest.mark.parametrize("attention", ["l1", "softmax"])
@pytest.mark.parametrize("P_zero, M_zero", [(0, []), (STEP, []), ([], 0), ([], STEP), (0, 0)])
def test_the_gradient_is_finite_whatever_is_zero(attention, P_zero, M_zero):
    for scale in (1, 1e-25):                                                    # its square is not in fp32
        gradient, M = scale * torch.randn(2, 3, 4, 3, 3, generator=seeded()), sparse_maps(2, 4, 3, 3).float()
        gradient.transpose(1, 2)[P_zero], M[M_zero] = 0, 0
        gradient.requires_grad_()
        loss, cosines = alignment_loss(alignment_map(gradient), M, attention)
        loss.backward()
        assert gradient.grad.isfinite().all() and -1e-5 <= loss <= 3 + 1e-5
        assert all(-1e-5 <= value <= 1 + 1e-5 for value in cosines.values())


# ---- sampling in time ------------------------------------------------------------------------------------------------

def test_the_clip_with_more_motion_wins_with_probability_085():
    scores = noise(40000, 3, 2)
    chosen, larger = tournament(scores, seeded(1)), (scores[..., 1] > scores[..., 0]).long()
    won = (chosen == larger).float()
    assert chosen.shape == (40000, 3) and won.mean(0).tolist() == pytest.approx([0.7 + 0.3 / 2] * 3, abs=0.009)
    assert abs(torch.corrcoef(won.T)[0, 1]) < 0.02, "the three clips are drawn independently"
    assert (tournament(scores, seeded(2), p=1.0) == larger).all()
    assert (tournament(scores, seeded(2), p=0.0) == larger).float().mean().item() == pytest.approx(0.5, abs=0.008)
    upper = scores.gather(2, chosen[..., None]) > 0.5                           # scores are ranks within the video
    assert upper.float().mean().item() == pytest.approx(0.68, abs=0.01) and ".68 of" in mcl.__doc__


@pytest.mark.parametrize("first, last, span, K", [(0, 99, 32, 2), (7, 80, 32, 1), (3, 68, 32, 2), (5, 45, 4, 1)])
def test_the_anchor_is_in_one_half_and_the_others_in_order_in_the_other(first, last, span, K):
    frames, rng, seen, labels = last - first + 1, np.random.default_rng(0), {}, []
    halves = [range(first, first + frames // 2), range(first + frames // 2, last + 1)]
    for _ in range(3000):
        starts, before = random_starts(first, last, span, K, rng)
        assert starts.shape == (3, K)
        for clip, half in ((0, halves[not before]), (1, halves[before]), (2, halves[before])):
            for start in starts[clip]:
                assert start in half and start + span in half                   # the frame for flow, too
                seen.setdefault((clip > 0, bool(before)), []).append(int(start))
        assert max(starts[1]) <= min(starts[2]), "k1 before k2, whichever candidates win"
        labels.append(before)
    assert np.mean(labels) == pytest.approx(0.5, abs=0.05)
    for (others, before), found in seen.items():                                # uniform
        half = halves[not before] if not others else halves[before]
        share, fair = np.bincount(np.array(found) - half[0]) / len(found), 1 / (len(half) - span)
        assert len(share) == len(half) - span and (abs(share - fair) < 5 * (fair / len(found)) ** 0.5).all()


@pytest.mark.parametrize("first, last, span, K", [(0, 64, 32, 2), (2, 34, 32, 1), (9, 30, 32, 2), (4, 4, 8, 1)])
def test_in_a_short_video_the_anchor_is_at_one_end(first, last, span, K):
    rng, seen = np.random.default_rng(0), set()
    for _ in range(1500):
        starts, before = random_starts(first, last, span, K, rng)
        others = starts[1:]
        assert starts.shape == (3, K) and (np.diff(others.ravel()) >= 0).all()
        assert starts[0].max() <= others.min() if before else starts[0].min() >= others.max()
        seen |= {int(s) for s in starts.ravel()}
    assert seen == set(range(first, max(first, last - span) + 1)), "inside wherever possible, and all of it"


def settings(**changes):
    return Config(**{**dict(frames=4, stride=2, frame_height=32, frame_width=32), **changes})


@pytest.mark.parametrize("motion_clips, repeats, frames", [(True, 2, 40), (False, 1, 40), (True, 1, 5)])
def test_clips_of_a_real_video_are_in_order_and_within_the_item(tmp_path, motion_clips, repeats, frames):
    cfg, K = settings(motion_clips=motion_clips, repeats=repeats), 2 if motion_clips else 1
    with Video(tiny_video(tmp_path / "a.mp4", frames + 10)) as video:
        for seed in range(4):                                                   # 10 frames a second
            out = sample_clips(video, Item("", 0, 0.5, 0.5 + frames / 10), np.random.default_rng(seed), cfg)
            assert out["clips"].shape == (3 * K * repeats, 5, 32, 32, 3) and out["clips"].dtype == np.uint8
            assert out["order"].shape == (repeats,) and out["order"].dtype == np.int64
            found = numbers(out["clips"]).reshape(repeats, 3, K, 5)
            start, last = found[..., :1], found.max()
            assert (found == np.minimum(start + 2 * np.arange(5), last)).all() and found.min() >= 5
            assert last <= 5 + frames
            if frames > 20:
                before = start[:, 0].max((1, 2)) < start[:, 1:].min((1, 2, 3))
                assert (before == (out["order"] == 1)).all()


@pytest.mark.parametrize("height, width, size", [(48, 96, (24, 32)), (240, 320, (240, 320)), (100, 50, (24, 32)),
                                                 (57, 57, (64, 64)), (1080, 1920, (240, 320)), (20, 30, (64, 64))])
def test_the_largest_window_of_the_aspect_is_used_at_a_random_place(height, width, size):
    video, places = FakeVideo(50, height, width), []
    cfg = settings(frame_height=size[0], frame_width=size[1], repeats=2)
    for seed in range(150):
        clips = sample_clips(video, Item(""), np.random.default_rng(seed), cfg)["clips"]
        boxes = np.array([box for _, box in video.views(5)])
        assert clips.shape[2:4] == size and (boxes[:6] == boxes[0]).all() and (boxes[6:] == boxes[6]).all()
        for x1, y1, x2, y2 in boxes[[0, 6]]:
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            assert x2 - x1 == width or y2 - y1 == height, "the largest"
            assert abs((x2 - x1) - (y2 - y1) * size[1] / size[0]) < 1 + size[1] / size[0]
            places.append((x1 / max(1, width - (x2 - x1)), y1 / max(1, height - (y2 - y1))))
    free = np.array([width, height]) - (boxes[0, 2:] - boxes[0, :2])
    for place in np.array(places).T[free > 0]:
        assert place.min() < 0.03 and place.max() > 0.97 and place.mean() == pytest.approx(0.5, abs=0.1)
        assert (place[::2] != place[1::2]).any(), "a place per sample"


# ---- sampling in space -----------------------------------------------------------------------------------------------

def slow_hot_box(m):
    """-> (x1, y1, x2, y2) in cells, share"""
    gh, gw = m.shape
    y, x = zip(*sorted(product(range(gh), range(gw)), key=lambda p: -m[p])[:math.floor(0.1 * gh * gw)])
    box = min(x), min(y), max(x) + 1, max(y) + 1
    area = (box[2] - box[0]) * (box[3] - box[1])
    share = 0.9 if area <= 4 else 0.8 if area <= 8 else 0.7 if area <= 12 else 0.0
    return box, share if m.max() > 0 else 0.0


def peaks(count, seed=0, grid=(7, 7)):
    """Maps with a hot spot of some size somewhere: all shares occur."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:grid[0], :grid[1]]
    cy, cx, s, level = (rng.uniform(a, b, (count, 1, 1)) for a, b in ((0, 6), (0, 6), (0.3, 4), (0, 0.3)))
    spots = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / s ** 2) + level * rng.random((count, *grid))
    return torch.from_numpy(spots + 1e-6 * rng.random((count, *grid))).float()


@pytest.mark.parametrize("grid", [(7, 7), (5, 9)])
def test_hot_box_is_the_tight_box_of_the_hottest_tenth(grid):
    found = peaks(400, grid=grid)
    for m, box, share in zip(found.numpy(), *hot_box(found)):
        expected = slow_hot_box(m)
        assert tuple(box.tolist()) == expected[0] and share.item() == pytest.approx(expected[1])
    assert {round(s, 1) for s in hot_box(found)[1].tolist()} == {0.0, 0.7, 0.8, 0.9}
    assert hot_box(torch.zeros(2, *grid))[1].tolist() == [0, 0], "nothing moves"


def slow_cover(box, hot):
    (x1, y1, x2, y2), (a1, b1, a2, b2) = box, hot
    return (max(0, min(x2, a2) - max(x1, a1)) / (a2 - a1)) * (max(0, min(y2, b2) - max(y1, b1)) / (b2 - b1))


@pytest.mark.parametrize("H, W, least, places", [(240, 320, 0.2, 40), (64, 64, 0.5, 40), (90, 51, 0.2, 5),
                                                 (32, 320, 1.0, 40)])           # no size fits into the last
def test_a_crop_is_the_first_of_its_places_that_holds_enough_or_the_best(H, W, least, places):
    N, found, generator = 1000, peaks(1000, seed=1), seeded(3)
    boxes, held, exact = motion_crop(found, H, W, seeded(3), least, places), 0, 0
    sizes, spots = (torch.rand(N, 2, n, generator=generator).numpy() for n in (20, places))
    assert boxes.shape == (N, 4) and torch.equal(boxes, boxes.round())
    for m, box, size, spot in zip(found.numpy(), boxes.tolist(), sizes, spots):
        x1, y1, x2, y2 = box
        w, h = x2 - x1, y2 - y1
        assert 0 <= x1 < x2 <= W and 0 <= y1 < y2 <= H
        wanted = []
        for a, r in size.T.astype(float):
            area, aspect = H * W * (least + (1 - least) * a), math.exp((2 * r - 1) * math.log(4 / 3))
            wanted.append((round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))))
        fitting = [(x, y) for x, y in wanted if x <= W and y <= H]              # the first, or what fits of the first
        want = fitting[0] if fitting else (min(wanted[0][0], W), min(wanted[0][1], H))
        exact += want == (w, h)
        assert abs(want[0] - w) <= 1 and abs(want[1] - h) <= 1
        cells, share = slow_hot_box(m)
        hot = [n * side / 7 for n, side in zip(cells, (W, H, W, H))]
        corners = [(math.floor(x * np.float32(W - w + 1)), math.floor(y * np.float32(H - h + 1))) for x, y in spot.T]
        cover, got = [slow_cover((x, y, x + w, y + h), hot) for x, y in corners], slow_cover(box, hot)
        assert got >= share - 1e-5 if max(cover) >= share - 1e-5 else got >= max(cover) - 1e-5
        assert not [c for c in cover[:corners.index((x1, y1))] if c >= share + 1e-5], "the first"
        held += share > 0 and got >= share
    assert exact > 0.99 * N and held > 0.3 * N


# ---- choice of clips and views ---------------------------------------------------------------------------------------

def network(name="vit"):
    torch.manual_seed(0)
    if name == "vit":
        encoder = make_backbone(**VIT)
        for p in encoder.parameters():
            p.data += 0.1 * torch.randn_like(p)
        return encoder, noise(3, 3, 4, 16, 16, least=-1)
    width = 0.125 if name in ("r2plus1d_50", "slow_r50") else 1.0
    return with_statistics(make_backbone(name, 32, 8, width=width)), noise(2, 3, 8, 32, 32, least=-1)


def tiny(encoder=None, flow=None, **changes):
    encoder = encoder or network()[0]
    return MCL(encoder, flow or FakeFlow(), **{**dict(steps=10, queue=32, outputs=8, order_weight=1.0), **changes})


def videos(B=3, K=2, frames=4, H=24, W=32):
    ground = F.interpolate(noise(3 * K * B, 3, frames + 1, 5, 6), (frames + 1, H, W))
    return dict(clips=(255 * ground).byte(), order=torch.arange(B) % 2)


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


@pytest.mark.parametrize("frames, first", [(4, (0, 1, 2, 3)), (8, (1, 3, 5, 7)), (16, (2, 6, 10, 14))])
def test_choose_takes_the_winners_by_the_maps_of_four_pairs_of_neighbours(frames, first):
    model, batch = tiny(), videos(5, frames=frames)
    clips, found = model.choose(batch["clips"], seeded(2))
    candidates, every = batch["clips"].unflatten(0, (5, 3, 2)), torch.zeros(5, 3, 2, 7, 7)
    for b, c, k in product(range(5), range(3), range(2)):
        pairs = torch.stack([FakeFlow()(candidates[b, c, k][None, :, t:t + 2])[0, 0] for t in first])
        every[b, c, k] = clip_map(pairs[None])[0]
    chosen = tournament(every.mean((3, 4)), seeded(2))
    for b, c in product(range(5), range(3)):
        assert torch.equal(clips[b, c], candidates[b, c, chosen[b, c]])
        torch.testing.assert_close(found[b, c], every[b, c, chosen[b, c]])
    assert 0 < chosen.sum() < 15 and len(model.flow.asked) == 1


@pytest.mark.parametrize("motion_clips, motion_crops", [(True, True), (True, False), (False, True), (False, False)])
def test_switches_of_motion_set_candidates_boxes_and_what_flow_is_for(motion_clips, motion_crops):
    model = tiny(motion_clips=motion_clips, motion_crops=motion_crops, align_weight=0.0)
    record = spied(model)
    loss, stats = model(videos(4, 2 if motion_clips else 1), seeded(1))
    assert len(model.flow.asked) == (motion_clips or motion_crops) and "query_motion" not in record
    assert not [name for name in stats if name.startswith("align")] and loss.isfinite()
    for (clips, motion, _), _ in list(record["view"]):
        assert (motion.max() > 0) == (motion_clips or motion_crops)
        box = model.view(clips, motion, seeded(9))[1]
        assert torch.equal(box, motion_crop(motion if motion_crops else 0 * motion, 24, 32, seeded(9), 0.2))


def test_a_view_is_the_crop_mirrored_or_not_and_normalised(monkeypatch):
    monkeypatch.setattr(mcl, "blur", lambda clips, generator: clips)
    clips, m = videos(40, 1)["clips"][:40, :, :4], peaks(40)
    view, box, flipped = tiny(colour=0.0).view(clips, m, seeded(3))
    assert view.shape == (40, 3, 4, 16, 16) and 0.25 < flipped.float().mean() < 0.75
    assert not tiny(flip=0.0).view(clips, m, seeded(3))[2].any()
    for t in range(4):
        expected = crop_resize(clips[:, :, t].float() / 255, box, 16)
        expected = torch.stack([e.flip(-1) if f else e for e, f in zip(expected, flipped)])
        torch.testing.assert_close(unnormalize(view)[:, :, t], expected, atol=1e-4, rtol=0)


def test_the_flow_of_the_query_is_cut_and_mirrored_like_the_query(monkeypatch):
    monkeypatch.setattr(mcl, "blur", lambda clips, generator: clips)

    def bright(clips):                                                          # flow where the first frame is bright,
        flow = to_float01(clips)[:, :2, :-1].transpose(1, 2)                    # of half the size
        return F.avg_pool2d(flow.flatten(0, 1), 2).unflatten(0, flow.shape[:2])
    model, clips = tiny(flow=bright, colour=0.0), torch.zeros(30, 3, 5, 24, 32, dtype=torch.uint8)
    for b, t in product(range(30), range(5)):                                   # a spot of four pixels that moves
        clips[b, :, t, 2 * (b % 10):2 * (b % 10) + 4, 2 * (t + b % 11):2 * (t + b % 11) + 4] = 255
    view, box, flipped = model.view(clips[:, :, :-1], torch.zeros(30, 7, 7), seeded())
    flow, seen = model.query_motion(clips, box, flipped), unnormalize(view)[:, :2].transpose(1, 2)
    assert flow.shape == (30, 4, 2, 16, 16) and 5 < flipped.sum() < 25
    coarse, expected = (F.avg_pool2d(x[:, :, 0], 4) for x in (flow, seen))
    assert (coarse - expected).abs().max() < 0.3 and expected.max() > 0.7


# ---- the losses ------------------------------------------------------------------------------------------------------

def slow_losses(record, queue, labels, model, T):
    """-> inter, intra, order, P and the share of queries whose own first key is the nearest, from the embeddings."""
    (_, (_, keys)), (_, (X, q)) = [next((args, out) for args, out in record["embed"] if args[0] is encoder)
                                   for encoder in (model.keys["encoder"], model.encoder)]
    k = {name: value.double().numpy() for name, value in keys.items()}          # (3 B, outputs) each
    own = {name: value.detach().double().numpy() for name, value in q.items()}
    B, queue = len(own["inter"]), queue.double().numpy()
    inter = np.mean([slow_info_nce(own["inter"], k["inter"][j * B:], queue, T) for j in range(3)])
    intra = np.mean([slow_info_nce(own["intra"][b:b + 1], k["intra"][b:], [k["intra"][j * B + b]], T)
                     for b in range(B) for j in (1, 2)])
    order, weight, bias = 0, *(p.detach().double().numpy() for p in (model.order.weight, model.order.bias))
    for b in range(B):
        joined = np.concatenate([own["order"][b], k["order"][B + b], k["order"][2 * B + b]])
        logits = weight @ (joined / np.linalg.norm(joined)) + bias
        order += (math.log(sum(np.exp(logits))) - logits[labels[b]]) / B
    similarity = (q["inter"] * keys["inter"][:B]).sum()
    P = slow_alignment_map(torch.autograd.grad(similarity, X, retain_graph=True)[0].double().numpy())
    top1 = np.mean([np.argmax([own["inter"][b] @ key for key in k["inter"][:B]]) == b for b in range(B)])
    return inter, intra, order, P, 100 * top1, keys["inter"]


@pytest.mark.parametrize("updates, warmup, name, attention", [
    (0, 0, "vit", "l1"), (3, 5, "vit", "softmax"), (5, 5, "r2plus1d_50", "l1"), (4, 0, "r2plus1d_50", "softmax")])
def test_loss_statistics_and_queue_equal_a_computation_by_hand(updates, warmup, name, attention):
    frames = 4 if name == "vit" else 8
    model = tiny(network(name)[0], warmup=warmup, order_weight=0.7, align_weight=0.4, attention=attention,
                 temperature=0.3)
    model.updates.fill_(updates)
    record, batch, before = spied(model), videos(3, frames=frames), model.queue.keys.clone()
    loss, stats = model(batch, seeded(4))
    inter, intra, order, P, top1, keys = slow_losses(record, before, batch["order"], model, 0.3)
    (_, flow), = record["query_motion"]
    M = slow_target(flow, P.shape[1:]) * (38.25 if attention == "softmax" else 1)
    cosines = slow_alignment(P, M, attention)
    expected = dict(inter=inter, intra=intra, order=order, top1=top1, zero_maps=(P.reshape(3, -1).max(1) == 0).mean(),
                    map_norm=np.mean([np.linalg.norm(p) for p in P]), **{f"align_{k}": v for k, v in cosines.items()})
    assert {k: v.item() for k, v in stats.items()} == pytest.approx(expected, rel=2e-3, abs=2e-4)
    align = (2 if updates < warmup else 1) * 0.4 * (3 - sum(cosines.values()))
    assert loss.item() == pytest.approx(inter + intra + 0.7 * updates / 10 * order + align, rel=1e-3)
    assert model.queue.pointer == 9 and torch.equal(model.queue.keys, torch.cat([keys, before[9:]]))


def test_query_and_keys_are_views_of_the_right_clips():
    model, batch = tiny(), videos(3)
    record = spied(model)
    model(batch, seeded(4))
    clips, found = model.choose(batch["clips"], seeded(4))
    views = list(record["view"])
    for i, ((given, motion, _), _) in zip((0, 0, 1, 2), views, strict=True):
        assert torch.equal(given, clips[:, i, :, :-1]) and torch.equal(motion, found[:, i])
    (given, box, flipped), _ = record["query_motion"][0]
    assert torch.equal(given, clips[:, 0]) and torch.equal(box, views[0][1][1]) and torch.equal(flipped, views[0][1][2])
    embedded = {args[0] is model.encoder: args for args, _ in record["embed"]}
    assert torch.equal(embedded[True][2], views[0][1][0]) and embedded[True][1] is model.heads
    assert torch.equal(embedded[False][2], torch.cat([views[i][1][0] for i in (1, 2, 3)]))
    assert embedded[False][0] is model.keys["encoder"] and embedded[False][1] is model.keys["heads"]


def test_embeddings_are_of_length_one_and_a_finer_map_is_averaged_to_the_grid_of_the_targets():
    model = tiny(make_backbone(image_size=28, frames=8, patch_size=2, tubelet_size=1, dim=12, depth=1, heads=2))
    clips = noise(2, 3, 8, 28, 28)
    X, q = model.embed(model.encoder, model.heads, clips)
    feature = split(model.encoder, clips)[1](X)
    for name in ("inter", "intra", "order"):
        torch.testing.assert_close(q[name], F.normalize(model.heads[name](feature), dim=1))
    similarity = (q["inter"] * F.normalize(noise(2, 8, least=-1), dim=1)).sum(1)
    P = model.look(similarity, X)
    gradient, = torch.autograd.grad(similarity.sum(), X, retain_graph=True)
    expected = slow_alignment_map(gradient.double().numpy()).reshape(2, 4, 2, 7, 2, 7, 2).mean((2, 4, 6))
    assert X.shape == (2, 48, 8, 14, 14) and np.allclose(P.detach(), expected, rtol=1e-3, atol=1e-3 * expected.max())
    assert P.requires_grad and not model.eval().look(similarity, X).requires_grad


# ---- the aligned layer -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["r2plus1d_50", "slow_r50", "r2plus1d_18", "r3d_18"])
@pytest.mark.parametrize("training", [False, True])
def test_split_convolutional_networks_give_their_own_features_and_statistics(name, training):
    net, clips = network(name)
    whole, start = copy.deepcopy(net).train(training), copy.deepcopy(net.state_dict())
    net.train(training)
    seen, last = [], whole.layer4[-1]
    linear = last.conv3 if isinstance(last, Bottleneck) else last.conv2[0]
    linear.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        expected = whole(clips)
        X, rest = split(net, clips)
        torch.testing.assert_close(rest(X), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(X, seen[0], atol=1e-4, rtol=1e-4)
    moved = 0
    for (key, a), b in zip(net.state_dict().items(), whole.state_dict().values()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        moved += not torch.equal(a, start[key])
    assert (moved > 20) if training else (moved == 0)


@pytest.mark.parametrize("norm", ["norm", "fc_norm"])
def test_split_vit_gives_its_own_features(norm):
    _, clips = network("vit")
    net, seen = scrambled(make_backbone(**VIT, norms=(norm,))), {}
    net.blocks[-1].mlp.fc1.register_forward_hook(lambda module, args, out: seen.update(hidden=out))
    with torch.no_grad():
        expected = net(clips)
        X, rest = split(net, clips)
        torch.testing.assert_close(rest(X), expected, atol=1e-4, rtol=1e-4)
    for t, i, j in product(range(2), range(2), range(2)):                       # tokens are in the order t, h, w
        torch.testing.assert_close(X[:, :, t, i, j], seen["hidden"][:, 4 * t + 2 * i + j], atol=1e-5, rtol=1e-4)


def test_preview_shows_the_crop_and_then_query_motion_and_look_at_its_start_and_end(monkeypatch):
    kept, model, batch = [], tiny().eval(), videos(4)
    monkeypatch.setattr(mcl, "save_sheet", lambda path, rows, tile: kept.append(rows))
    record = spied(model)
    preview(model, batch, "x.png")
    sheet, (_, (query, box, flipped)) = kept[0], record["view"][0]
    clips, maps = model.choose(batch["clips"], seeded(0))
    M = slow_target(model.query_motion(clips[:, 0], box, flipped), (2, 2, 2))
    assert sheet.shape == (4, 8, 3, 112, 112)
    for b, t in product(range(4), (0, -1)):                                     # a cell's value is at its corner
        seen, motion, look = sheet[b, 2 - 3 * t:5 - 3 * t]
        torch.testing.assert_close(seen[:, ::7, ::7], unnormalize(query)[b, :, t], atol=1e-5, rtol=0)
        assert np.allclose(motion[0, ::56, ::56], M[b, t] / M[b, t].max(), atol=1e-4) and look.max() > 0.99
        assert np.allclose(sheet[b, 1, 0, ::16, ::16], maps[b, 0] / maps[b, 0].max(), atol=1e-5)
        x, y = (box[b, :2] * torch.tensor([112 / 32, 112 / 24])).int().tolist()
        assert (sheet[b, 0, :2, y:y + 3, x:x + 3].amax((1, 2)) > 0.9).all(), "the corner of the yellow crop"
