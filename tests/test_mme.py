"""MME against slow loops written from the paper and its code, the released HOG's numbers, and the toy data's truth."""
import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
from common import FlowEstimator, normalize
from mme import (MME, NOISE, frame_hog, MaskedAutoencoder, frames_to_read, hog, pixel_target, position_target,
                 shape_target, to_tokens, trajectories, tube_mask)
from mofo import motion_tube_mask
from conftest import error_of, golden_arrays, seeded, toy_clips
from evidence import toy_flow

TINY = dict(image_size=32, frames=4, patch_size=8, tubelet_size=2, dim=24, depth=2, heads=3, decoder_dim=12,
            decoder_depth=1, decoder_heads=2)                                   # 2 x 4 x 4 tokens, 22 are hidden


def tiny(target="trajectory", length=3, stride=2, flow=None, ratio=0.7, **changes):
    torch.manual_seed(0)
    return MME(flow, target, length, stride, ratio, **{**TINY, **changes})


def smooth_flow(*shape, size=1.0, seed=0):
    """Random flow (*shape, 2, h, w) of about `size` pixels that changes over about 8 pixels."""
    *many, h, w = shape
    coarse = torch.randn(math.prod(many), 2, h // 8, w // 8, generator=seeded(seed)) * size
    return F.interpolate(coarse, (h, w), mode="bilinear").view(*many, 2, h, w)


# ---- HOG -------------------------------------------------------------------------------------------------------------

def test_hog_and_the_order_inside_a_token_are_those_of_the_released_code():
    golden = golden_arrays("mme_hog.npz")
    clip, second = golden["clip"], hog(golden["clip"][:, :, 1::2])
    torch.testing.assert_close(hog(clip), golden["hog_all_frames"], atol=2e-5, rtol=0)
    torch.testing.assert_close(second, golden["hog_second_frames"], atol=2e-5, rtol=0)
    torch.testing.assert_close(to_tokens(second.transpose(1, 2)).flatten(2), golden["tokens"], atol=2e-5, rtol=0)


def slow_hog(frame, bins, cell):
    """frame (C, H, W) -> (C * bins, H / cell, W / cell): each pixel's gradient, shared between two bins."""
    C, H, W = frame.shape
    out = np.zeros((C * bins, H // cell, W // cell))
    for c, y, x in product(range(C), range(H), range(W)):
        def at(dy, dx):
            return frame[c, min(max(y + dy, 0), H - 1), min(max(x + dx, 0), W - 1)]
        gx = sum(weight * (at(k, 1) - at(k, -1)) for k, weight in ((-1, 1), (0, 2), (1, 1)))
        gy = sum(weight * (at(1, k) - at(-1, k)) for k, weight in ((-1, 1), (0, 2), (1, 1)))
        degrees = math.degrees(math.atan2(gy, gx)) % 180
        lower, share = divmod(degrees / (180 / bins), 1)
        for b, part in ((int(lower), 1 - share), (int(lower) + 1, share)):
            out[c * bins + b % bins, y // cell, x // cell] += part * math.hypot(gx, gy) / cell ** 2
    return out


@pytest.mark.parametrize("bins, cell, H, W", [(9, 8, 16, 24), (9, 4, 16, 24), (6, 8, 24, 8)])
def test_hog_equals_slow_loops_over_the_pixels(bins, cell, H, W):
    frames = torch.randn(2, 3, 2, H, W, generator=seeded())
    frames[1] = frames[1].round()                                               # orientations in the centre of a bin
    expected = [[slow_hog(x, bins, cell) for x in clip.transpose(1, 0, 2, 3)] for clip in frames.double().numpy()]
    expected = torch.from_numpy(np.array(expected)).float().transpose(1, 2)     # (2, 3 * bins, 2, H / cell, W / cell)
    torch.testing.assert_close(hog(frames, bins, cell), expected, atol=2e-5, rtol=0)


# ---- trajectories ----------------------------------------------------------------------------------------------------

def slow_read(field, x, y):
    """The field (2, h, w) at a point, bilinear between the centres of pixels, the border replicated."""
    _, h, w = field.shape
    x, y = min(max(x - 0.5, 0), w - 1), min(max(y - 0.5, 0), h - 1)
    j, i = int(x), int(y)
    j2, i2, x, y = min(j + 1, w - 1), min(i + 1, h - 1), x - j, y - i
    upper = (1 - x) * field[:, i, j] + x * field[:, i, j2]
    return (1 - y) * upper + y * ((1 - x) * field[:, i2, j] + x * field[:, i2, j2])


def slow_trajectories(flow, starts, length, cell):
    """flow (F, 2, h, w) -> displacement (S, L, 2, gh, gw), valid (S, gh, gw): point by point."""
    h, w = flow.shape[-2:]
    displacement = np.zeros((len(starts), length, 2, h // cell, w // cell))
    valid = np.ones((len(starts), h // cell, w // cell), bool)
    for s, i, j in np.ndindex(valid.shape):
        x, y = j * cell + cell / 2, i * cell + cell / 2
        for k in range(length):
            if not (0 <= x < w and 0 <= y < h):
                valid[s, i, j] = False
            x, y = min(max(x, 0), w), min(max(y, 0), h)
            dx, dy = slow_read(flow[starts[s] + k], x, y)
            displacement[s, k, :, i, j] = dx, dy
            x, y = x + dx, y + dy
    return displacement, valid


@pytest.mark.parametrize("h, w, cell, starts, length, size", [
    (32, 48, 8, [0, 2, 5], 3, 1.5), (48, 24, 8, [3], 6, 4.0), (24, 40, 4, [1, 0], 4, 0.3),
    (32, 32, 4, [0, 1, 2, 3], 1, 9.0), (32, 64, 8, [0, 1, 2], 6, None)])
def test_trajectories_equal_slow_loops_over_the_points(h, w, cell, starts, length, size):
    flow = smooth_flow(2, 9, h, w, size=size or 1.0)
    if size is None:                                                            # points that come to lie on the border
        flow = 4.0 * torch.randint(-2, 3, (2, 9, 2, 1, 1), generator=seeded()).expand_as(flow)
    displacement, valid = trajectories(flow, starts, length, cell)
    expected, inside = zip(*[slow_trajectories(f, starts, length, cell) for f in flow.double().numpy()])
    torch.testing.assert_close(displacement, torch.from_numpy(np.stack(expected)).float(), atol=1e-4, rtol=0)
    assert torch.equal(valid, torch.from_numpy(np.stack(inside)))
    assert valid.any() and (size in (0.3, 1.5) or length == 1 or not valid.all())


# ---- position target -------------------------------------------------------------------------------------------------

def slow_position_target(displacement, noise):
    """(S, L, 2, gh, gw) -> (S * gh/2 * gw/2, 8 L), order (x and y, step, row, column)."""
    S, L, _, gh, gw = displacement.shape
    tokens = []
    for s, i, j in product(range(S), range(0, gh, 2), range(0, gw, 2)):
        token = []
        for xy, k in np.ndindex(2, L):
            d = displacement[s, k, xy, i:i + 2, j:j + 2].flatten().tolist()
            mean = sum(d) / 4
            variance = sum((v - mean) ** 2 for v in d) / 3
            token += [(v - mean) / math.sqrt(variance + noise ** 2) for v in d]
        tokens.append(token)
    return np.array(tokens)


@pytest.mark.parametrize("gh, gw, L, size, noise", [
    (4, 6, 3, 1.0, 0.2), (2, 2, 1, 0.05, 0.2), (6, 4, 6, 20.0, 0.2), (4, 4, 2, 1.0, 1.5)])
def test_position_target_equals_slow_loops(gh, gw, L, size, noise):
    displacement = torch.randn(2, 3, L, 2, gh, gw, generator=seeded()) * size
    valid = torch.rand(2, 3, gh, gw, generator=seeded()) < 0.3
    expected = np.stack([slow_position_target(d, noise) for d in displacement.double().numpy()])
    got, token_valid = position_target(displacement, valid, noise)
    torch.testing.assert_close(got, torch.from_numpy(expected).float(), atol=1e-4, rtol=0)
    assert torch.equal(position_target(displacement, valid)[0], position_target(displacement, valid, NOISE)[0])
    places = list(product(range(3), range(0, gh, 2), range(0, gw, 2)))          # valid if any of its points is
    assert token_valid.tolist() == [[clip[s, i:i + 2, j:j + 2].any().item() for s, i, j in places] for clip in valid]


def slow_shape_target(maps, displacement, starts, cell):
    """maps (K, F, gh, gw), displacement (S, L, 2, gh, gw) -> (N, K * L * 4), order (map, step, row, column)."""
    K, _, gh, gw = maps.shape
    S, L = displacement.shape[:2]
    tokens = []
    for s, i, j in product(range(S), range(0, gh, 2), range(0, gw, 2)):
        token = np.zeros((K, L, 2, 2))
        for dy, dx in np.ndindex(2, 2):
            x, y = (j + dx + 0.5) * cell, (i + dy + 0.5) * cell
            for k in range(L):
                x, y = min(max(x, 0), gw * cell), min(max(y, 0), gh * cell)
                column, row = min(math.floor(x / cell), gw - 1), min(math.floor(y / cell), gh - 1)
                token[:, k, dy, dx] = maps[:, starts[s] + k, row, column]
                x, y = x + displacement[s, k, 0, i + dy, j + dx], y + displacement[s, k, 1, i + dy, j + dx]
        tokens.append(token.reshape(-1))
    return np.stack(tokens)


@pytest.mark.parametrize("gh, gw, cell, starts, L, size", [
    (4, 6, 8, [0, 2, 3], 3, 5.0), (6, 4, 4, [1], 6, 3.0), (2, 8, 8, [2, 0], 1, 9.0), (4, 4, 8, [0, 4], 4, 0.5),
    (4, 6, 8, [0, 2], 5, 30.0)])
def test_shape_target_equals_slow_loops(gh, gw, cell, starts, L, size):
    maps = torch.rand(2, 27, 8, gh, gw, generator=seeded())
    displacement = torch.randn(2, len(starts), L, 2, gh, gw, generator=seeded(1)) * size
    pairs = zip(maps.double().numpy(), displacement.double().numpy())
    expected = np.stack([slow_shape_target(m, d, starts, cell) for m, d in pairs])         # (2, N, 108 L)
    torch.testing.assert_close(shape_target(maps, displacement, starts, cell), torch.from_numpy(expected).float())


def slow_position_loss(prediction, target, valid):
    """Tokens (n, 8 L) -> the specified sum over all tokens over their number."""
    total = 0
    for p, z, v in zip(prediction, target, valid):
        total += v * 32 / len(z) * sum((a - b) ** 2 for a, b in zip(p, z))
    return total / len(prediction)


def slow_shape_loss(prediction, target):
    """Tokens (n, 108 L), order (colour and orientation, step, row, column)."""
    total = 0
    for p, h in zip(prediction, target):
        L = len(h) // 108
        for i, (a, b) in enumerate(zip(p, h)):
            total += (1 if i // 4 % L == 0 else 0.1) * (a - b) ** 2 / L
    return total / len(prediction)


@pytest.mark.parametrize("grid, ratio, count", [
    ((8, 14, 14), 0.7, 137), ((8, 8, 8), 0.9, 57), ((2, 3, 5), 0.5, 7), ((1, 4, 4), 0.75, 12)])
def test_a_tube_mask_is_the_one_that_mofo_draws_without_a_box(grid, ratio, count):
    hidden, none = tube_mask(50, grid, ratio, seeded()), torch.zeros(50, 4)
    assert torch.equal(hidden, motion_tube_mask(none, none[:, 0] > 0, grid, ratio, None, seeded()))
    assert hidden.dtype == torch.bool and (hidden.view(50, grid[0], -1).sum(2) == count).all()
    parts = [tube_mask(n, grid, ratio, seeded(0, first, 50)) for first, n in ((0, 20), (20, 30))]
    assert torch.equal(torch.cat(parts), hidden) and not torch.equal(tube_mask(50, grid, ratio, seeded(1)), hidden)


STARTS, STEPS = [0, 8, 16, 24], 6


@pytest.fixture(scope="module")
def toys():
    """16 videos of all classes -> uint8 (16, 3, 32, 64, 64), their truths."""
    return toy_clips(16, labels=range(8), frames=32)


def true_flow(truth, frames=32):
    return torch.from_numpy(np.stack([toy_flow(truth, f, f + 1)[0] for f in range(frames - 1)])).float()


def end_point_errors(flows, truths):
    """Errors in pixels after STEPS frames, and how far the points truly go: of sprites, of backgrounds (2, points)."""
    found = {True: [], False: []}
    for flow, truth in zip(flows, truths):
        displacement, _ = trajectories(flow[None], STARTS, STEPS, 4)
        for start, moved in zip(STARTS, displacement[0].sum(1).numpy()):        # (2, 16, 16)
            truly, sprite = (x[..., 2::4, 2::4] for x in toy_flow(truth, start, start + STEPS))
            both = np.stack([np.hypot(*(moved - truly)), np.hypot(*truly)])
            for kind in found:
                found[kind].append(both[:, sprite == kind])
    return [np.concatenate(x, 1) for x in found.values()]


def test_points_are_followed_to_where_they_truly_go(toys):
    (sprite, far), (ground, pan) = end_point_errors([true_flow(t) for t in toys[1]], toys[1])
    assert len(sprite) > 300 and len(ground) > 3000 and far.mean() > 4 and pan.mean() > 0.3, "or it proves nothing"
    assert np.quantile(sprite, 0.8) < 0.2 and np.quantile(ground, 0.9) < 0.05  # others come to the edge of a sprite
    (sprite, far), (ground, _) = end_point_errors(FlowEstimator("tvl1")(toys[0]), toys[1])
    assert sprite.mean() < 0.3 * far.mean() and np.median(ground) < 0.7


# ---- the whole method ------------------------------------------------------------------------------------------------

def numbered(count, frames, side=32):
    """Noisy uint8 clips (count, 3, frames, side, side): a corner is red by the frame's number, green by the clip's."""
    clips = torch.randint(256, (count, 3, frames, side, side), generator=seeded(), dtype=torch.uint8)
    clips[:, 0, :, 0, 0] = torch.arange(frames)
    clips[:, 1, :, 0, 0] = torch.arange(count)[:, None]
    return clips


def spied(target="trajectory", length=3, stride=2, clips=3, size=1.5, **changes):
    """A model, numbered clips, and their flow: a table (clips, frames, 2, h, w) and what was looked up in it."""
    sizes, seen = {**TINY, **changes}, []
    count, _ = frames_to_read(target, sizes["frames"], sizes["tubelet_size"], stride, length)
    table = smooth_flow(clips, count, 32, 32, size=size)
    def flow(clips):
        frame, clip = clips[:, :2, :, 0, 0].long().unbind(1)
        seen.append(frame)
        return table[clip[:, :-1], frame[:, :-1]]
    return tiny(target, length, stride, flow, **changes), numbered(clips, count), table, seen


def drawn():
    return tube_mask(3, (2, 4, 4), 0.7, seeded())


@pytest.mark.parametrize("decoder_dim, total", [(192, 87_089_356), (384, 88_763_404)])
def test_parameter_counts_are_those_of_the_released_model(decoder_dim, total):
    with torch.device("meta"):
        model = MME(None, "position", 4, 4, 0.7, 16, 16, 2, image_size=224, dim=768, depth=12, heads=12,
                    decoder_dim=decoder_dim, decoder_depth=1, decoder_heads=6)
    assert sum(p.numel() for p in model.encoder.parameters()) == 86_227_200
    assert sum(p.numel() for p in model.parameters()) == total
    assert model.encoder.grid == (8, 14, 14) and model.count == 1096


def test_each_head_is_linear_at_the_end_and_gets_what_the_decoder_says_of_hidden_tokens():
    model, clips, hidden = tiny(), torch.randn(3, 3, 4, 32, 32, generator=seeded()), drawn()
    predictions, masked = model.predict(clips, hidden)
    z, order = MaskedAutoencoder.predict(model, clips, hidden)                  # compared with a plain ViT in test_mofo
    assert torch.equal(order, masked) and {n: p.shape for n, p in predictions.items()} == dict(
        position=(3, 22, 24), shape=(3, 22, 324))
    for name, (first, _, second) in model.heads.items():
        expected = F.linear(F.gelu(F.linear(z, first.weight, first.bias)), second.weight, second.bias)
        torch.testing.assert_close(predictions[name], expected, atol=1e-5, rtol=0)


def test_frames_to_read_holds_all_input_and_all_trajectories_and_nothing_else():
    for frames, t, stride, L in product((4, 16), (2, 4), (1, 2, 4), (1, 4, 6, 9)):
        tracked = {s * t * stride + k for s in range(frames // t) for k in range(L + 1)}
        last = max({f * stride for f in range(frames)} | tracked)
        assert frames_to_read("trajectory", frames, t, stride, L) == (last + 1, 1)
        assert frames_to_read("hog", frames, t, stride, L) == (frames, stride)
    assert frames_to_read("position", 16, 2, 2, 6) == (35, 1) and frames_to_read("position", 16, 2, 4, 4) == (61, 1)


# Spans of a tubelet: 4, 8, 2, 8, 4 video frames.  Shorter trajectories than that are tracked in windows.
@pytest.mark.parametrize("stride, length, t", [(2, 6, 2), (4, 4, 2), (1, 1, 2), (2, 9, 4), (2, 4, 2), (2, 3, 2),
                                               (3, 1, 2), (2, 2, 4)])
def test_targets_are_those_of_tracking_the_whole_clip_with_flow_of_each_needed_pair_once(stride, length, t):
    model, clips, table, seen = spied(length=length, stride=stride, frames=8, tubelet_size=t, clips=2)
    assert model.seen(clips)[:, 0, :, 0, 0].tolist() == [[stride * f for f in range(8)]] * 2, "what the network sees"
    targets, valid, displacement = model.targets(clips)
    starts = [s * t * stride for s in range(8 // t)]
    pairs = [(a, b) for row in seen[0].tolist() for a, b in zip(row, row[1:])]
    assert len(seen) == 1 and all(b == a + 1 for a, b in pairs), "consecutive frames of the video"
    assert sorted(a for a, _ in pairs) == sorted([*{s + k for s in starts for k in range(length)}] * 2)
    d, v = trajectories(table, starts, length, 4)
    torch.testing.assert_close(displacement, d, atol=1e-5, rtol=0)
    position, token_valid = position_target(d, v)
    torch.testing.assert_close(targets["position"], position, atol=1e-4, rtol=0)
    assert torch.equal(valid, token_valid)
    shape = shape_target(hog(normalize(clips), cell=4), d, starts, 4)
    torch.testing.assert_close(targets["shape"], shape, atol=1e-4, rtol=0)


@pytest.mark.parametrize("target, stride", [("position", 1), ("position", 3), ("hog", 1), ("hog", 3)])
def test_the_shape_that_stands_still_is_hog_of_the_second_frame_of_each_tubelet(target, stride):
    model, clips, *_ = spied(target, stride=stride)
    maps = hog(normalize(clips[:, :, [stride, 3 * stride] if target == "position" else [1, 3]]), cell=4)
    shape = model.targets(clips)[0]["shape"].view(3, 2, 4, 4, 27, 2, 2)
    for s, i, j in np.ndindex(2, 8, 8):
        assert torch.equal(shape[:, s, i // 2, j // 2, :, i % 2, j % 2], maps[:, :, s, i, j])


def test_flow_on_a_finer_grid_is_brought_to_pixels_of_the_crop():
    def flow(clips):
        return torch.tensor([3.0, -1]).view(2, 1, 1).expand(len(clips), clips.shape[2] - 1, 2, 64, 128)
    _, _, displacement = tiny(flow=flow).targets(numbered(2, 8))
    expected = torch.tensor([0.75, -0.5]).view(2, 1, 1).expand_as(displacement)
    torch.testing.assert_close(displacement, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("target", ["trajectory", "position", "hog", "pixel"])
def test_forward_is_the_mean_of_its_terms_over_the_hidden_tokens(target):
    model, clips, table, seen = spied(target, size=6.0)
    table[:, :, :, :, :20] = 1.0                                            # here nothing moves on its own
    loss, stats = model(clips, seeded())
    targets, valid, _ = model.targets(clips)
    hidden = drawn()
    predictions, _ = model.predict(normalize(model.seen(clips)), hidden)
    assert hidden.sum() == 66 and set(targets) == set(predictions) and bool(seen) == ("position" in targets)
    rows = {name: target[hidden].tolist() for name, target in targets.items()}
    guesses = {name: p.flatten(0, 1).tolist() for name, p in predictions.items()}
    terms, expected = {}, {}
    if "position" in rows:
        known = valid[hidden].tolist()
        terms["position"] = slow_position_loss(guesses["position"], rows["position"], known)
        spread = [max(sum(v ** 2 for v in row[i:i + 4]) for i in range(0, len(row), 4)) for row in rows["position"]]
        still = slow_position_loss([[0] * 24] * 66, rows["position"], known)
        expected = dict(valid=sum(known) / 66, static=sum(s < 1.5 for s in spread) / 66, still=still)
        assert 0 < expected["valid"] < 1 and 0 < expected["static"] < 1, "or it proves nothing"
    if "shape" in rows:
        terms["shape"] = slow_shape_loss(guesses["shape"], rows["shape"])
    if "pixel" in rows:
        assert torch.equal(targets["pixel"], pixel_target(clips.float() / 255, 8, 2))
        terms["pixel"] = np.mean((np.array(guesses["pixel"]) - np.array(rows["pixel"])) ** 2)
    assert {*terms} == {"pixel": {"pixel"}, "hog": {"shape"}}.get(target, {"position", "shape"})
    assert loss.item() == pytest.approx(sum(terms.values()) / len(terms), rel=1e-4)
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(terms | expected, rel=1e-4)
    assert not any(value.requires_grad for value in stats.values())
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


@pytest.mark.parametrize("target", ["trajectory", "position", "hog", "pixel"])
def test_autocast_does_not_reach_the_targets(target):
    model, clips, table, seen = spied(target)
    exact, flow, precise = model.targets(clips), model.flow, []
    model.flow = lambda clips: precise.append(not torch.is_autocast_enabled("cpu")) or flow(clips)
    with torch.autocast("cpu", torch.bfloat16):                                 # as in the training loop on a GPU
        rounded, predictions = model.targets(clips), model.predict(normalize(model.seen(clips)), drawn())[0]
        loss, _ = model(clips, seeded())
    assert all(precise) and {p.dtype for p in predictions.values()} == {torch.float32}
    assert all(torch.equal(value, rounded[0][name]) for name, value in exact[0].items())
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(model(clips, seeded())[0].item(), rel=0.05)


@pytest.mark.parametrize("changes, named", [
    (dict(patch_size=1), "patch-size 1"), (dict(ratio=0.05), "--mask-ratio 0.05"), (dict(ratio=1.0), "--mask-ratio 1"),
    (dict(image_size=36), "36"), (dict(frames=5), "5")])
def test_what_cannot_work_is_named(changes, named):
    assert named in error_of(tiny, **changes)


@pytest.mark.skipif(not common.can_compile(), reason="no C compiler")
def test_compiled_hog_is_hog():
    frames = torch.randn(1, 3, 2, 32, 48, generator=seeded())
    torch.testing.assert_close(hog(frames, of_frame=torch.compile(frame_hog, dynamic=False)), hog(frames))
