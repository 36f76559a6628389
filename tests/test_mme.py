"""MME against slow loops written from the paper and its code, the released HOG's numbers, and the truth of the toy data."""
import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mme
import mofo
from common import (FlowEstimator, RowGenerator, UserError, gather_tokens, normalize, patchify, sincos_positions,
                    toy_video, unpatchify)
from mme import (MME, NOISE, MaskedAutoencoder, frames_to_read, grid_points, hog, pixel_target, position_loss, position_target,
                 shape_loss, shape_target, to_tokens, trajectories, tube_mask)
from conftest import golden_arrays, seeded, toy_flow

torch.set_num_threads(1)
TINY = dict(image_size=32, frames=4, patch_size=8, tubelet_size=2, dim=24, depth=2, heads=3, decoder_dim=12, decoder_depth=1,
            decoder_heads=2)                                                    # 2 x 4 x 4 tokens, of which 22 are hidden


def tiny(target="trajectory", length=3, stride=2, flow=None, ratio=0.7, **changes):
    torch.manual_seed(0)
    return MME(flow, target, length, stride, ratio, **{**TINY, **changes})


def smooth_flow(*shape, size=1.0, seed=0):
    """Random flow (*shape, 2, h, w) of about `size` pixels that changes over about 8 pixels."""
    *many, h, w = shape
    coarse = torch.randn(math.prod(many), 2, h // 8, w // 8, generator=seeded(seed)) * size
    return F.interpolate(coarse, (h, w), mode="bilinear").view(*many, 2, h, w)


def points_of(displacement, cell):
    """Where the points are before each step and after the last: (B, S, L + 1, 2, gh, gw)."""
    start = grid_points(*displacement.shape[-2:], cell).expand_as(displacement[:, :, :1])
    return torch.cat([start, start + displacement.cumsum(2)], 2)


# ---- HOG -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def golden():
    return golden_arrays("mme_hog.npz")


def test_hog_of_all_frames_and_of_second_frames_equals_the_released_code(golden):
    clip = golden["clip"]
    torch.testing.assert_close(hog(clip), golden["hog_all_frames"], atol=2e-5, rtol=0)
    torch.testing.assert_close(hog(clip[:, :, 1::2]), golden["hog_second_frames"], atol=2e-5, rtol=0)


def test_the_order_inside_a_token_is_that_of_the_released_code(golden):
    tokens = to_tokens(hog(golden["clip"][:, :, 1::2]).transpose(1, 2)).flatten(2)
    torch.testing.assert_close(tokens, golden["tokens"], atol=2e-5, rtol=0)


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
    expected = np.stack([[slow_hog(x, bins, cell) for x in clip.transpose(1, 0, 2, 3)] for clip in frames.double().numpy()])
    got = hog(frames, bins, cell)
    assert got.shape == (2, 3 * bins, 2, H // cell, W // cell)
    torch.testing.assert_close(got, torch.from_numpy(expected).float().transpose(1, 2), atol=2e-5, rtol=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_pixels_whose_orientation_is_the_centre_of_a_bin_are_not_lost(sign):
    frame = torch.zeros(1, 3, 1, 24, 24)
    frame[:, 1, :, :, 12:] = sign                                               # in green: two columns of gradient 4
    expected = torch.zeros(3, 9, 3, 3)
    expected[1, 0, :, 1] = 4 * 16 / 64
    torch.testing.assert_close(hog(frame)[0, :, 0], expected.flatten(0, 1), atol=1e-6, rtol=0)
    across = torch.zeros(3, 9, 3, 3)
    across[1, 4:6, 1] = 4 * 16 / 64 / 2                                         # 90 degrees: half way from bin 4 to bin 5
    torch.testing.assert_close(hog(frame.transpose(-1, -2))[0, :, 0], across.flatten(0, 1), atol=1e-6, rtol=0)


def test_every_orientation_votes_with_its_whole_length():
    for degrees in range(0, 360, 5):                                            # a ramp: the Sobel sum is 8 times the slope
        y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
        a = math.radians(degrees)
        votes = hog((x * math.cos(a) + y * math.sin(a)).expand(1, 3, 1, 24, 24))[0, :9, 0, 1, 1]
        expected = torch.zeros(9)
        lower, share = divmod(degrees % 180 / 20, 1)
        expected[int(lower) % 9], expected[(int(lower) + 1) % 9] = 8 * (1 - share), 8 * share
        torch.testing.assert_close(votes, expected, atol=1e-4, rtol=0)


def test_hog_of_a_constant_is_zero():
    frames = torch.randn(2, 3, 2, 1, 1, generator=seeded()).expand(-1, -1, -1, 16, 16)
    assert (hog(frames) == 0).all()


def test_brightness_does_not_change_hog_and_contrast_scales_it():
    frames = torch.randint(-16, 16, (1, 3, 2, 16, 24), generator=seeded()) / 8  # sums without rounding
    brighter = frames + torch.tensor([3, -1, 0.5]).view(3, 1, 1, 1)
    assert torch.equal(hog(brighter), hog(frames)) and hog(frames).abs().max() > 0.1
    torch.testing.assert_close(hog(2.5 * frames), 2.5 * hog(frames))
    torch.testing.assert_close(hog(-frames), hog(frames), atol=1e-5, rtol=0)    # orientation, not direction


# ---- trajectories ----------------------------------------------------------------------------------------------------

def slow_read(field, x, y):
    """The field (2, h, w) at a point, bilinear between the centres of pixels, the border replicated."""
    _, h, w = field.shape
    x, y = min(max(x - 0.5, 0), w - 1), min(max(y - 0.5, 0), h - 1)
    j, i = int(x), int(y)
    j2, i2, x, y = min(j + 1, w - 1), min(i + 1, h - 1), x - j, y - i
    return (1 - y) * ((1 - x) * field[:, i, j] + x * field[:, i, j2]) + y * ((1 - x) * field[:, i2, j] + x * field[:, i2, j2])


def slow_trajectories(flow, starts, length, cell):
    """flow (F, 2, h, w) -> displacement (S, L, 2, gh, gw), valid (S, gh, gw): point by point."""
    h, w = flow.shape[-2:]
    displacement = np.zeros((len(starts), length, 2, h // cell, w // cell))
    valid = np.ones((len(starts), h // cell, w // cell), bool)
    for s, i, j in product(range(len(starts)), range(h // cell), range(w // cell)):
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
    (32, 48, 8, [0, 2, 5], 3, 1.5), (48, 24, 8, [3], 6, 4.0), (24, 40, 4, [1, 0], 4, 0.3), (32, 32, 4, [0, 1, 2, 3], 1, 9.0)])
def test_trajectories_equal_slow_loops_over_the_points(h, w, cell, starts, length, size):
    flow = smooth_flow(2, 9, h, w, size=size)
    displacement, valid = trajectories(flow, starts, length, cell)
    expected, inside = zip(*[slow_trajectories(f, starts, length, cell) for f in flow.double().numpy()])
    torch.testing.assert_close(displacement, torch.from_numpy(np.stack(expected)).float(), atol=1e-4, rtol=0)
    assert torch.equal(valid, torch.from_numpy(np.stack(inside)))
    assert valid.any() and (size < 2 or length == 1 or not valid.all())


def test_points_start_at_the_centres_of_cells_of_8_pixels_x_before_y():
    assert grid_points(2, 3, 8)[:, 1, 2].tolist() == [20, 12] and grid_points(7, 5, 4)[:, 0, 0].tolist() == [2, 2]
    y, x = torch.meshgrid(torch.arange(16) + 0.5, torch.arange(24) + 0.5, indexing="ij")
    displacement, _ = trajectories(torch.stack([x, y])[None, None], [0], 1)     # a flow that tells where it is
    torch.testing.assert_close(displacement[0, 0, 0], grid_points(2, 3, 8))


@pytest.mark.parametrize("a, b", [
    (0, 0), (0.25, -0.375), (8, 0), (-8, 4), (4, 12), (-4, -4), (0, -20), (100, 0), (-0.0625, 28), (2, -2), (10, 0), (-1, 10)])
@pytest.mark.parametrize("length", [1, 2, 6])
def test_constant_flow_gives_constant_steps_that_are_valid_while_they_start_inside(a, b, length):
    h, w = 32, 64                                                               # powers of two: no rounding
    flow = torch.tensor([a, b]).float().view(2, 1, 1).expand(1, 8, 2, h, w)
    displacement, valid = trajectories(flow, [0, 1], length)
    assert displacement.shape == (1, 2, length, 2, 4, 8)
    assert (displacement[:, :, :, 0] == a).all() and (displacement[:, :, :, 1] == b).all()
    for i, j in product(range(4), range(8)):
        x, y = [8 * j + 4 + k * a for k in range(length)], [8 * i + 4 + k * b for k in range(length)]   # not k = length
        inside = min(x) >= 0 and max(x) < w and min(y) >= 0 and max(y) < h
        assert valid[:, :, i, j].tolist() == [[inside, inside]]


def test_a_lost_point_goes_on_from_the_border_and_stays_invalid():
    flow = torch.zeros(1, 3, 2, 16, 16)
    flow[:, 0, 0], flow[:, 1:, 0] = -10, torch.arange(16.0) + 5                 # out to the left, then 5 at the border
    displacement, valid = trajectories(flow, [0], 3)
    assert displacement[0, 0, :, 0, 0, 0].tolist() == [-10, 5, 9.5]             # in x = 4, 0 (not -6), 5
    assert not valid[0, 0, 0, 0] and valid[0, 0, 0, 1]


def test_flow_of_less_than_a_pixel_is_not_truncated():
    flow = smooth_flow(1, 12, 32, 48, size=0.1)
    displacement, valid = trajectories(flow, [0], 12)
    assert flow.abs().max() < 0.5 and valid.all()
    assert displacement.sum(2).abs().mean() > 0.1


def test_each_clip_and_start_gets_the_trajectories_it_would_get_alone():
    flow, starts = smooth_flow(3, 9, 32, 48, size=3.0), [4, 0, 4, 2]
    displacement, valid = trajectories(flow, starts, 5)
    for b, (s, start) in product(range(3), enumerate(starts)):
        alone, fine = trajectories(flow[b:b + 1, start:start + 5], [0], 5)
        torch.testing.assert_close(alone[0, 0], displacement[b, s], atol=1e-5, rtol=0)
        assert torch.equal(fine[0, 0], valid[b, s])


# ---- position target -------------------------------------------------------------------------------------------------

def slow_position_target(displacement, noise):
    """(S, L, 2, gh, gw) -> (S * gh/2 * gw/2, 8 L), order (x and y, step, row, column)."""
    S, L, _, gh, gw = displacement.shape
    tokens = []
    for s, i, j in product(range(S), range(0, gh, 2), range(0, gw, 2)):
        token = []
        for xy, k in product(range(2), range(L)):
            d = [displacement[s, k, xy, i + dy, j + dx] for dy, dx in product((0, 1), (0, 1))]
            mean = sum(d) / 4
            variance = sum((v - mean) ** 2 for v in d) / 3
            token += [(v - mean) / math.sqrt(variance + noise ** 2) for v in d]
        tokens.append(token)
    return np.array(tokens)


@pytest.mark.parametrize("gh, gw, L, size, noise", [
    (4, 6, 3, 1.0, 0.2), (2, 2, 1, 0.05, 0.2), (6, 4, 6, 20.0, 0.2), (4, 4, 2, 1.0, 1.5)])
def test_position_target_equals_slow_loops(gh, gw, L, size, noise):
    displacement = torch.randn(2, 3, L, 2, gh, gw, generator=seeded()) * size
    valid = torch.ones(2, 3, gh, gw, dtype=torch.bool)
    expected = np.stack([slow_position_target(d, noise) for d in displacement.double().numpy()])
    got, _ = position_target(displacement, valid, noise)
    torch.testing.assert_close(got, torch.from_numpy(expected).float(), atol=1e-4, rtol=0)
    assert torch.equal(position_target(displacement, valid)[0], position_target(displacement, valid, NOISE)[0])


def test_a_token_is_valid_if_any_of_its_points_is():
    valid = torch.rand(2, 3, 4, 6, generator=seeded()) < 0.3
    _, token_valid = position_target(torch.zeros(2, 3, 2, 2, 4, 6), valid)
    expected = [[any(clip[s][i + dy][j + dx] for dy, dx in product((0, 1), (0, 1)))
                 for s, i, j in product(range(3), range(0, 4, 2), range(0, 6, 2))] for clip in valid.tolist()]
    assert token_valid.tolist() == expected and token_valid.dtype == torch.bool and not token_valid.all()


def test_what_all_points_of_a_token_share_gives_and_changes_nothing():
    displacement = torch.randn(2, 3, 4, 2, 4, 6, generator=seeded())
    shared = torch.randn(2, 3, 4, 2, 2, 3, generator=seeded(1)) * 5             # another one in each token and step
    shared, valid = F.interpolate(shared.flatten(0, 3)[None], scale_factor=2)[0].view_as(displacement), torch.ones(2, 3, 4, 6) > 0
    assert (position_target(shared, valid)[0] == 0).all(), "not NaN either"
    torch.testing.assert_close(position_target(displacement + shared, valid)[0], position_target(displacement, valid)[0],
                               atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [0.01, 0.2, 1.0, 50.0])
def test_position_target_is_bounded_and_small_below_the_noise(size):
    displacement = torch.randn(4, 8, 6, 2, 8, 8, generator=seeded()) * size
    displacement[0, 0, 0, 0, :2, :2] = torch.tensor([[size, 0], [0, 0]])        # one point differs: the largest value
    z = position_target(displacement, torch.ones(4, 8, 8, 8) > 0, 0.2)[0].unflatten(-1, (2, 6, 4))
    energy = z.square().sum(-1)
    assert z.abs().max() <= 1.5 and energy.max() <= 3.0001
    unit = size / math.sqrt(size ** 2 / 4 + 0.2 ** 2)
    assert z[0, 0, 0, 0].tolist() == pytest.approx([0.75 * unit, *[-0.25 * unit] * 3], rel=1e-4)
    if size == 0.01:
        assert z.abs().max() < 0.2
    if size == 50:
        assert energy.median() > 2.99 and z.abs().max() > 1.49


def inner_tokens(*displacements, h, w, cell=8, margin=1):
    """Tokens (B, N) whose points stay `margin` pixels inside of the frame in all of these trajectories."""
    most, far = torch.tensor([w, h]).view(2, 1, 1), True
    for displacement in displacements:
        points = points_of(displacement, cell)
        far = far & ((points > margin) & (points < most - margin)).all(3).all(2)
    return to_tokens(far).flatten(2).all(-1)


def same_inside(first, second, h, w):
    """Do two trajectories have the same position target inside, and is there something to compare?"""
    inner = inner_tokens(first, second, h=h, w=w)
    a, b = (position_target(d, torch.ones(*d.shape[:2], *d.shape[-2:]) > 0)[0][inner] for d in (first, second))
    assert inner.sum() >= 8 and a.square().mean() > 0.1 and (first - second).abs().mean() > 1, "or the test would prove nothing"
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_a_pan_on_top_of_zoom_roll_and_shear_changes_no_position_target(seed):
    h, w, generator = 64, 96, seeded(seed)
    y, x = torch.meshgrid(torch.arange(h) + 0.5 - h / 2, torch.arange(w) + 0.5 - w / 2, indexing="ij")
    affine = torch.randn(2, 6, 2, 2, generator=generator) * 0.04               # another one in every frame
    flow = torch.einsum("bfij,jhw->bfihw", affine, torch.stack([x, y]))
    pan = torch.randn(2, 6, 2, 1, 1, generator=generator) * 2
    same_inside(*[trajectories(f, [0, 2], 4)[0] for f in (flow, flow + pan)], h, w)


def test_a_pan_changes_no_position_target_of_one_step_whatever_the_flow():
    flow, pan = smooth_flow(2, 4, 64, 96, size=3.0), torch.randn(2, 4, 2, 1, 1, generator=seeded(1)) * 5
    both = [position_target(*trajectories(f, [0, 3], 1)) for f in (flow, flow + pan)]
    torch.testing.assert_close(both[0][0], both[1][0], atol=1e-4, rtol=0)
    assert both[0][1].all() and both[1][1].all() and both[0][0].square().mean() > 0.1


@pytest.mark.parametrize("dx, dy", [(2, 1), (-3, 0), (0, -2), (-1, 3)])
def test_a_camera_that_pans_changes_no_position_target_of_any_scene(dx, dy):
    h, w, margin = 64, 96, 16                                                   # of the scene, which is larger than the frame
    scene = smooth_flow(2, 5, h + 2 * margin, w + 2 * margin, size=1.0)
    frames = [(slice(margin - k * dy, margin - k * dy + h), slice(margin - k * dx, margin - k * dx + w)) for k in range(5)]
    still = scene[..., margin:-margin, margin:-margin]
    pan = torch.tensor([dx, dy]).view(2, 1, 1)
    moved = torch.stack([scene[:, k, :, rows, columns] + pan for k, (rows, columns) in enumerate(frames)], 1)
    same_inside(*[trajectories(f, [0], 5)[0] for f in (still, moved)], h, w)


# ---- shape target ----------------------------------------------------------------------------------------------------

def slow_shape_target(maps, displacement, starts, cell):
    """maps (K, F, gh, gw), displacement (S, L, 2, gh, gw) -> (N, K * L * 4), order (map, step, row, column)."""
    K, _, gh, gw = maps.shape
    S, L = displacement.shape[:2]
    tokens = []
    for s, i, j in product(range(S), range(0, gh, 2), range(0, gw, 2)):
        token = np.zeros((K, L, 2, 2))
        for dy, dx in product((0, 1), (0, 1)):
            x, y = (j + dx + 0.5) * cell, (i + dy + 0.5) * cell
            for k in range(L):
                x, y = min(max(x, 0), gw * cell), min(max(y, 0), gh * cell)
                column, row = min(math.floor(x / cell), gw - 1), min(math.floor(y / cell), gh - 1)
                token[:, k, dy, dx] = maps[:, starts[s] + k, row, column]
                x, y = x + displacement[s, k, 0, i + dy, j + dx], y + displacement[s, k, 1, i + dy, j + dx]
        tokens.append(token.reshape(-1))
    return np.stack(tokens)


@pytest.mark.parametrize("gh, gw, cell, starts, L, size", [
    (4, 6, 8, [0, 2, 3], 3, 5.0), (6, 4, 4, [1], 6, 3.0), (2, 8, 8, [2, 0], 1, 9.0), (4, 4, 8, [0, 4], 4, 0.5)])
def test_shape_target_equals_slow_loops(gh, gw, cell, starts, L, size):
    maps = torch.rand(2, 27, 8, gh, gw, generator=seeded())
    displacement = torch.randn(2, len(starts), L, 2, gh, gw, generator=seeded(1)) * size
    expected = [slow_shape_target(m, d, starts, cell) for m, d in zip(maps.double().numpy(), displacement.double().numpy())]
    got = shape_target(maps, displacement, starts, cell)
    assert got.shape == (2, len(starts) * gh * gw // 4, 108 * L)
    torch.testing.assert_close(got, torch.from_numpy(np.stack(expected)).float())


def test_step_0_of_the_shape_target_is_the_own_cell_of_the_first_frame():
    maps = torch.rand(2, 27, 6, 4, 6, generator=seeded())
    displacement = torch.randn(2, 2, 3, 2, 4, 6, generator=seeded(1)) * 100
    got = shape_target(maps, displacement, [1, 3]).unflatten(-1, (27, 3, 4))[:, :, :, 0]        # (B, N, 27, 4)
    torch.testing.assert_close(got, to_tokens(maps[:, :, [1, 3]].transpose(1, 2)).flatten(3))


@pytest.mark.parametrize("dx, dy", [(1, 0), (0, -1), (-1, 1), (0, 0)])
def test_motion_by_a_cell_per_step_reads_the_neighbours(dx, dy):
    maps = torch.rand(1, 27, 5, 6, 8, generator=seeded())
    displacement = torch.tensor([8 * dx, 8 * dy]).view(2, 1, 1).expand(1, 1, 3, 2, 6, 8)
    got = shape_target(maps, displacement, [2]).view(3, 4, 27, 3, 2, 2)         # 3 x 4 tokens
    for i, j, k in product(range(6), range(8), range(3)):
        row, column = min(max(i + k * dy, 0), 5), min(max(j + k * dx, 0), 7)
        assert torch.equal(got[i // 2, j // 2, :, k, i % 2, j % 2], maps[0, :, 2 + k, row, column])


def test_the_shape_of_a_point_that_comes_back_is_read_where_its_trajectory_goes_on():
    flow = torch.zeros(1, 3, 2, 16, 32)
    flow[:, 0, 0], flow[:, 1, 0] = -10, 9                                       # x = 4, then -6: the border, then 9
    maps = torch.arange(4.0).expand(1, 1, 3, 2, 4)                              # the number of the column
    displacement, _ = trajectories(flow, [0], 3)
    got = shape_target(maps, displacement, [0]).view(2, 3, 2, 2)                # 2 tokens, each 3 steps of 2 x 2 points
    assert got[0, :, 0, 0].tolist() == [0, 0, 1]


def test_shape_follows_what_moves_along_with_its_points():
    scene = torch.randn(1, 3, 48, 80, generator=seeded())
    clip = torch.stack([scene[..., 8:40, 24 - 8 * k:72 - 8 * k] for k in range(4)], 2)          # moves right by a cell a frame
    flow = torch.tensor([8.0, 0]).view(2, 1, 1).expand(1, 3, 2, 32, 48)
    displacement, _ = trajectories(flow, [0], 3)
    shape, fixed = (shape_target(hog(clip), d, [0]).view(2, 3, 27, 3, 2, 2)[0, 0, :, :, 1, 1]  # (27, 3) of a point that
                    for d in (displacement, 0 * displacement))                  # stays a cell away from the border
    for k in (1, 2):
        torch.testing.assert_close(shape[:, k], shape[:, 0], atol=1e-4, rtol=0)
        assert (fixed[:, k] - fixed[:, 0]).abs().mean() > 0.05


# ---- losses, pixel target, mask --------------------------------------------------------------------------------------

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
            step = i // 4 % L
            total += (1 if step == 0 else 0.1) * (a - b) ** 2 / L
    return total / len(prediction)


@pytest.mark.parametrize("L", [1, 4, 6])
def test_position_loss_equals_loops_and_counts_invalid_tokens(L):
    prediction, target = torch.randn(2, 3, 5, 8 * L, generator=seeded())
    valid = torch.rand(3, 5, generator=seeded(1)) < 0.6
    expected = slow_position_loss(*(x.flatten(0, 1).tolist() for x in (prediction, target, valid)))
    assert position_loss(prediction, target, valid).item() == pytest.approx(expected, rel=1e-5)
    assert 0 < valid.sum() < 15 and position_loss(prediction, target, valid & False) == 0
    if L == 4:                                                                  # then it is a plain sum over the 32 values
        plain = (prediction - target).square().sum(-1).mean()
        torch.testing.assert_close(position_loss(prediction, target, valid | True), plain)


@pytest.mark.parametrize("L", [1, 3, 6])
def test_shape_loss_equals_loops_with_lighter_later_steps(L):
    prediction, target = torch.randn(2, 3, 5, 108 * L, generator=seeded())
    expected = slow_shape_loss(*(x.flatten(0, 1).tolist() for x in (prediction, target)))
    assert shape_loss(prediction, target).item() == pytest.approx(expected, rel=1e-5)
    assert L > 1 or expected == pytest.approx((prediction - target).square().sum(-1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("shape, p, t", [((2, 3, 4, 8, 12), 4, 2), ((1, 3, 6, 6, 6), 2, 3)])
def test_pixel_target_is_mofo_s(shape, p, t):
    clips = torch.rand(shape, generator=seeded())
    assert torch.equal(pixel_target(clips, p, t), mofo.pixel_target(clips, p, t))


def test_pixel_target_equals_slow_loops():
    clips = torch.rand(2, 3, 4, 8, 12, generator=seeded())
    got = pixel_target(clips, 4, 2)
    for b, (n, (a, i, j)) in product(range(2), enumerate(product(range(2), range(2), range(3)))):
        block = clips[b, :, 2 * a:2 * a + 2, 4 * i:4 * i + 4, 4 * j:4 * j + 4].double().numpy()
        values = [(block[c] - block[c].mean()) / (block[c].std(ddof=1) + 1e-6) for c in range(3)]
        expected = np.stack(values, -1).reshape(-1)                             # colour fastest
        torch.testing.assert_close(got[b, n], torch.from_numpy(expected).float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("grid, ratio, count", [
    ((8, 14, 14), 0.7, 137), ((8, 8, 8), 0.9, 57), ((2, 3, 5), 0.5, 7), ((1, 4, 4), 0.75, 12)])
def test_a_tube_mask_hides_the_specified_number_of_patches_at_all_times(grid, ratio, count):
    T, H, W = grid
    hidden = tube_mask(50, grid, ratio, seeded())
    assert hidden.shape == (50, T * H * W) and hidden.dtype == torch.bool
    tubes = hidden.view(50, T, H * W)
    assert (tubes == tubes[:, :1]).all() and (tubes.sum(2) == count).all()
    assert len({tuple(h.tolist()) for h in hidden}) > 40, "another mask for every clip"


def test_every_tube_is_hidden_equally_often():
    hidden = tube_mask(6000, (2, 8, 5), 0.75, seeded())[:, :40].float()
    assert (hidden.mean(0) - 0.75).abs().max() < 4.5 * math.sqrt(0.75 * 0.25 / 6000)


def test_the_mask_is_decided_by_its_generator_alone_and_not_by_how_a_batch_is_split():
    def rows(seed, first=0, count=6):
        generator = RowGenerator()
        generator.manual_seed(seed)
        generator.first, generator.total = first, 6
        return tube_mask(count, (2, 7, 7), 0.7, generator)
    whole = rows(3)
    torch.rand(5)                                                               # the global generator must not matter
    assert torch.equal(whole, tube_mask(6, (2, 7, 7), 0.7, seeded(3))) and not torch.equal(whole, rows(4))
    for parts in ([3, 3], [1, 2, 3]):
        assert torch.equal(torch.cat([rows(3, sum(parts[:i]), n) for i, n in enumerate(parts)]), whole)


# ---- toy truth -------------------------------------------------------------------------------------------------------

STARTS, STEPS = [0, 8, 16, 24], 6


@pytest.fixture(scope="module")
def toys():
    """16 videos of all classes -> uint8 (16, 3, 32, 64, 64), their truths."""
    videos, truths = zip(*[toy_video(0, "test", i, frames=32, label=i % 8) for i in range(16)])
    return torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3).contiguous(), truths


def true_flow(truth, frames=32):
    return torch.from_numpy(np.stack([toy_flow(truth, f, f + 1)[0] for f in range(frames - 1)])).float()


def truly_followed(truth, start, steps, points, margin=2):
    """Where points (P, 2) of frame `start` are `steps` frames later (P, 2), which of them lie on the sprite, and which come
    within `margin` pixels neither of its edge nor of the frame's on the way."""
    def depth(frame, p):                                                        # distance to the sprite's edge, > 0 inside
        edge = truth["radius"] * truth["scale"][frame]
        return (edge - np.linalg.norm(p - truth["centre"][frame], truth["order"], 1)) / (2 ** 0.5 if truth["order"] == 1 else 1)
    sprite, clear = depth(start, points) > 0, True
    for frame in range(start, start + steps + 1):
        on = truth["centre"][frame] + (points - truth["centre"][start]) * truth["scale"][frame] / truth["scale"][start]
        off = points + truth["camera"][frame] - truth["camera"][start]
        place = np.where(sprite[:, None], on, off)
        clear = clear & np.where(sprite, depth(frame, place) > margin, depth(frame, place) < -margin)
        clear = clear & ((place > margin) & (place < 64 - margin)).all(1)
    return place, sprite, clear


def end_point_errors(flows, truths):
    """Errors in pixels after STEPS frames of the points that can be followed: on sprites, on backgrounds, and how far they go."""
    points = grid_points(16, 16, 4).flatten(1).T.numpy()                        # (P, 2)
    errors, moved = {True: [], False: []}, {True: [], False: []}
    for flow, truth in zip(flows, truths):
        displacement, _ = trajectories(flow[None], STARTS, STEPS, 4)
        ends = points + displacement[0].sum(1).flatten(2).transpose(1, 2).numpy()               # (S, P, 2)
        for s, start in enumerate(STARTS):
            place, sprite, clear = truly_followed(truth, start, STEPS, points)
            for kind in (True, False):
                chosen = clear & (sprite == kind)
                errors[kind] += np.linalg.norm(ends[s] - place, axis=1)[chosen].tolist()
                moved[kind] += np.linalg.norm(points - place, axis=1)[chosen].tolist()
    return [np.array(x) for x in (errors[True], errors[False], moved[True], moved[False])]


def test_true_flow_is_followed_to_where_the_points_truly_go(toys):
    sprite, ground, far, pan = end_point_errors([true_flow(t) for t in toys[1]], toys[1])
    assert len(sprite) > 300 and len(ground) > 3000 and far.mean() > 4 and pan.mean() > 0.3, "or the test would prove nothing"
    assert sprite.max() < 0.05 and ground.max() < 0.05, f"{sprite.max():.3f}, {ground.max():.3f}"


def test_points_are_followed_to_a_pixel_with_tvl1(toys):
    sprite, ground, far, pan = end_point_errors(FlowEstimator("tvl1")(toys[0]), toys[1])
    what = f"sprite {sprite.mean():.2f} of {far.mean():.2f}, ground {ground.mean():.2f} of {pan.mean():.2f} px"
    assert np.concatenate([sprite, ground]).mean() <= 1, what
    assert sprite.mean() < 0.5 * far.mean(), what                               # following nothing would give 1.06, and 1 here


def test_a_panning_camera_alone_gives_no_position_target():
    flow = torch.stack([true_flow(toy_video(0, "test", i, frames=32, label=-1)[1]) for i in range(8)])
    assert flow.abs().mean() > 0.03, "the pan is there"
    assert position_target(*trajectories(flow, STARTS, STEPS, 4))[0].abs().max() < 1e-3


# ---- network ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("decoder_dim, total", [(192, 87_089_356), (384, 88_763_404)])
def test_parameter_counts_are_those_of_the_released_model(decoder_dim, total):
    with torch.device("meta"):
        model = MME(None, "position", 4, 4, 0.7, 16, 16, 2, image_size=224, dim=768, depth=12, heads=12, decoder_dim=decoder_dim,
                    decoder_depth=1, decoder_heads=6)
    assert sum(p.numel() for p in model.encoder.parameters()) == 86_227_200
    assert sum(p.numel() for p in model.parameters()) == total
    assert model.encoder.grid == (8, 14, 14) and model.count == 1096


def tiny_autoencoder(**changes):
    torch.manual_seed(0)
    return MaskedAutoencoder(**{**TINY, **changes}, outputs=dict(one=5, two=7))


def tiny_input(batch=2):
    """Normalised clips, and a mask that hides 22 of the 32 tokens of each clip, not the same ones."""
    clips = torch.randn(batch, 3, 4, 32, 32, generator=seeded())
    return clips, torch.rand(batch, 32, generator=seeded(1)).argsort(1).argsort(1) < 22


def test_predict_encodes_the_visible_tokens_and_decodes_all_at_their_positions():
    model, (clips, hidden) = tiny_autoencoder(), tiny_input()
    predictions, masked = model.predict(clips, hidden)
    assert {k: v.shape for k, v in predictions.items()} == dict(one=(2, 22, 5), two=(2, 22, 7))
    assert masked.tolist() == [[i for i in range(32) if h[i]] for h in hidden], "in increasing order"
    for b, (clip, mask) in enumerate(zip(clips, hidden)):
        x = model.encoder.patch_embed.proj(clip[None]).flatten(2).transpose(1, 2) + sincos_positions(32, 24)    # as a Conv3d
        z = x[:, ~mask]
        for block in model.encoder.blocks:
            z = block(z)
        z = model.encoder_to_decoder(model.encoder.norm(z))
        positions = sincos_positions(32, 12)
        z = torch.cat([z + positions[:, ~mask], model.mask_token + positions[:, mask]], 1)
        for block in model.decoder.blocks:
            z = block(z)
        z = model.decoder.norm(z[0, -22:])
        for name, rows in predictions.items():
            first, _, second = model.heads[name]
            expected = F.linear(F.gelu(F.linear(z, first.weight, first.bias)), second.weight, second.bias)
            torch.testing.assert_close(rows[b], expected, atol=1e-5, rtol=0)
    with_count = model.predict(clips, hidden, 22)
    assert all(torch.equal(predictions[name], with_count[0][name]) for name in predictions) and torch.equal(masked, with_count[1])


def test_heads_reach_any_value():
    model, (clips, hidden) = tiny_autoencoder(), tiny_input()
    for head in model.heads.values():
        nn.init.constant_(head[-1].bias, 40.0)
    assert all(p.min() > 20 for p in model.predict(clips, hidden)[0].values())


def test_initial_weights_are_the_released_model_s():
    model = tiny_autoencoder(dim=96, decoder_dim=48, decoder_heads=3)
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "encoder_to_decoder"]
    assert sum(n.startswith("heads.") for n, _ in linear) == 4
    for name, layer in linear:                                                  # Xavier; the fused qkv sets its own bound
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.98 * bound < layer.weight.abs().max() <= bound, name
        assert layer.bias is None or (layer.bias == 0).all(), name
    between = model.encoder_to_decoder.weight                                   # PyTorch's default: 1 / sqrt(fan in)
    assert 0.98 * 96 ** -0.5 < between.abs().max() <= 96 ** -0.5 and model.encoder_to_decoder.bias is None
    wide = tiny_autoencoder(decoder_dim=4096, decoder_depth=0)
    assert 0.0199 < wide.mask_token.abs().max() <= 0.02 and wide.mask_token.std().item() == pytest.approx(0.0108, rel=0.05)


def test_encoder_has_the_state_dict_of_videomae_s():
    public = mofo.MaskedAutoencoder(**TINY).encoder.state_dict()
    assert {k: v.shape for k, v in tiny().encoder.state_dict().items()} == {k: v.shape for k, v in public.items()}


# ---- the whole method ------------------------------------------------------------------------------------------------

def numbered(count, frames, side=32):
    """Noisy uint8 clips (count, 3, frames, side, side): a red corner holds the number of the frame, a green one the clip's."""
    clips = torch.randint(256, (count, 3, frames, side, side), generator=seeded(), dtype=torch.uint8)
    clips[:, 0, :, 0, 0] = torch.arange(frames)
    clips[:, 1, :, 0, 0] = torch.arange(count)[:, None]
    return clips


class Spy:
    """Flow that is looked up by the numbers of `numbered` clips, from a table (count, frames, 2, h, w); it notes its input."""

    def __init__(self, table):
        self.table, self.seen = table, []

    def __call__(self, clips):
        frame, clip = clips[:, :2, :, 0, 0].long().unbind(1)
        self.seen.append(frame)
        return self.table[clip[:, :-1], frame[:, :-1]]


def spied(target="trajectory", length=3, stride=2, clips=3, size=1.5, **changes):
    sizes = {**TINY, **changes}
    count, apart = frames_to_read(target, sizes["frames"], sizes["tubelet_size"], stride, length)
    spy = Spy(smooth_flow(clips, count, 32, 32, size=size))
    return tiny(target, length, stride, spy, **changes), numbered(clips, count), spy


def toy_mme(target="trajectory", length=3, flow=None):
    torch.manual_seed(0)
    return MME(flow or FlowEstimator("tvl1"), target, length, 2, 0.7, 16, 16, 2, image_size=64, dim=24, depth=1, heads=3,
               decoder_dim=12, decoder_depth=1, decoder_heads=1)


@pytest.mark.parametrize("arguments, expected", [
    (("trajectory", 16, 2, 2, 6), (35, 1)), (("trajectory", 16, 2, 4, 4), (61, 1)), (("position", 16, 2, 2, 6), (35, 1)),
    (("position", 16, 2, 4, 4), (61, 1)), (("trajectory", 16, 2, 2, 3), (32, 1)), (("trajectory", 16, 2, 4, 1), (61, 1)),
    (("hog", 16, 2, 2, 6), (16, 2)), (("hog", 16, 2, 4, 4), (16, 4)), (("pixel", 8, 4, 3, 6), (8, 3))])
def test_frames_to_read_of_the_recipes(arguments, expected):
    assert frames_to_read(*arguments) == expected


@pytest.mark.parametrize("frames, t, stride, L", list(product((4, 16), (2, 4), (1, 2, 4), (1, 4, 6, 9))))
def test_frames_to_read_holds_all_input_and_all_trajectories_and_nothing_else(frames, t, stride, L):
    wanted = {f * stride for f in range(frames)} | {s * t * stride + k for s in range(frames // t) for k in range(L + 1)}
    assert frames_to_read("trajectory", frames, t, stride, L) == (max(wanted) + 1, 1)


# Spans of a tubelet: 4, 8, 2, 8, 4 video frames.  Shorter trajectories than that are tracked in windows.
LAYOUTS = [(2, 6, 2), (4, 4, 2), (1, 1, 2), (2, 9, 4), (2, 4, 2), (2, 3, 2), (3, 1, 2), (2, 2, 4)]


@pytest.mark.parametrize("stride, length, t", LAYOUTS)
def test_targets_are_those_of_tracking_the_whole_clip_from_the_first_frame_of_each_tubelet(stride, length, t):
    model, clips, spy = spied(length=length, stride=stride, frames=8, tubelet_size=t, clips=2)
    targets, valid, displacement = model.targets(clips)
    starts = [s * t * stride for s in range(8 // t)]
    d, v = trajectories(spy.table, starts, length, 4)
    torch.testing.assert_close(displacement, d, atol=1e-5, rtol=0)
    position, token_valid = position_target(d, v)
    torch.testing.assert_close(targets["position"], position, atol=1e-4, rtol=0)
    assert torch.equal(valid, token_valid)
    torch.testing.assert_close(targets["shape"], shape_target(hog(normalize(clips), cell=4), d, starts, 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("stride, length, t", LAYOUTS)
def test_the_network_sees_every_stride_th_frame_and_flow_each_pair_that_is_needed_once(stride, length, t):
    model, clips, spy = spied(length=length, stride=stride, frames=8, tubelet_size=t)
    assert model.seen(clips)[:, 0, :, 0, 0].tolist() == [[stride * f for f in range(8)]] * 3
    model.targets(clips)
    pairs = [(a, b) for row in spy.seen[0].tolist() for a, b in zip(row, row[1:])]
    assert len(spy.seen) == 1 and all(b == a + 1 for a, b in pairs), "consecutive frames of the video"
    wanted = {s * t * stride + k for s in range(8 // t) for k in range(length)}
    assert sorted(a for a, _ in pairs) == sorted([*wanted] * 3)


@pytest.mark.parametrize("target", ["position", "hog"])
def test_the_shape_that_stands_still_is_hog_of_the_second_frame_of_each_tubelet(target):
    for stride in (1, 3):
        model, clips, _ = spied(target, stride=stride)
        second = [stride, 3 * stride] if target == "position" else [1, 3]
        maps = np.stack([[slow_hog(frame, 9, 4) for frame in clip.transpose(1, 0, 2, 3)]
                         for clip in normalize(clips[:1, :, second]).double().numpy()])         # (1, 2, 27, 8, 8)
        shape = model.targets(clips)[0]["shape"][:1].view(1, 2, 4, 4, 27, 2, 2)
        for s, i, j in product(range(2), range(8), range(8)):
            expected = torch.from_numpy(maps[0, s, :, i, j]).float()
            torch.testing.assert_close(shape[0, s, i // 2, j // 2, :, i % 2, j % 2], expected, atol=1e-4, rtol=0)


def test_flow_on_a_finer_grid_is_brought_to_pixels_of_the_crop():
    def flow(clips):
        return torch.tensor([3.0, -1]).view(2, 1, 1).expand(len(clips), clips.shape[2] - 1, 2, 64, 128)
    _, _, displacement = tiny(flow=flow).targets(numbered(2, 8))
    torch.testing.assert_close(displacement, torch.tensor([0.75, -0.5]).view(2, 1, 1).expand_as(displacement), atol=1e-5, rtol=0)


def test_nothing_hidden_and_no_frame_in_between_reaches_the_prediction():
    model, clips, _ = spied()
    hidden = tube_mask(3, model.encoder.grid, 0.7, seeded())
    noise = torch.randint(1, 256, clips.shape, generator=seeded(1), dtype=torch.uint8)
    other = clips + noise                                                       # modulo 256: every value differs
    def predict(clips, which=hidden):
        return model.predict(normalize(model.seen(clips)), which)[0]
    def changed(tokens):
        """The clips with other pixels in the tokens (3, 32) that the network sees."""
        a, b = (patchify(model.seen(x), 8, 2) for x in (clips, other))
        mixed = clips.clone()
        mixed[:, :, :8:2] = unpatchify(torch.where(tokens[..., None], b, a), (2, 4, 4), 8, 2)
        return mixed
    before = predict(clips)
    between = other.clone()
    between[:, :, :8:2] = clips[:, :, :8:2]
    assert not torch.equal(between, clips) and not torch.equal(changed(hidden), clips)
    for name, rows in before.items():
        assert torch.equal(predict(between)[name], rows), "frames that the network does not see"
        assert torch.equal(predict(changed(hidden))[name], rows), "hidden tokens"
    for token in torch.nonzero(~hidden[0])[:, 0].tolist():
        one = torch.zeros_like(hidden)
        one[0, token] = True
        after = predict(changed(one))
        for name, rows in before.items():
            assert not torch.equal(after[name][0], rows[0]), "every visible token matters"
            assert torch.equal(after[name][1:], rows[1:]), "the other clips are not touched"


@pytest.mark.parametrize("term", ["position", "shape", "both"])
def test_gradients_of_each_term_alone_reach_the_encoder_and_of_both_every_parameter(term):
    model, clips, _ = spied()
    loss, _ = model(clips, seeded())
    if term != "both":
        targets, valid, _ = model.targets(clips)
        predictions, masked = model.predict(normalize(model.seen(clips)), tube_mask(3, (2, 4, 4), 0.7, seeded()))
        target, known = gather_tokens(targets[term], masked), valid.gather(1, masked)
        loss = position_loss(predictions[term], target, known) if term == "position" else shape_loss(predictions[term], target)
    loss.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    other = dict(position="shape", shape="position", both="none")[term]
    assert without == {n for n, _ in model.named_parameters() if n.startswith(f"heads.{other}")}


@pytest.mark.parametrize("target", ["trajectory", "position", "hog", "pixel"])
def test_forward_is_the_mean_of_its_terms_over_the_hidden_tokens(target):
    model, clips, spy = spied(target, size=6.0)
    spy.table[:, :, :, :, :20] = 1.0                                            # a part in which nothing moves on its own
    loss, stats = model(clips, seeded())
    targets, valid, _ = model.targets(clips)
    hidden = tube_mask(3, (2, 4, 4), 0.7, seeded())
    predictions, _ = model.predict(normalize(model.seen(clips)), hidden)
    tokens = [(b, n) for b in range(3) for n in range(32) if hidden[b, n]]
    assert len(tokens) == 66 and set(targets) == set(predictions)
    rows = {name: [targets[name][b, n].tolist() for b, n in tokens] for name in targets}
    guesses = {name: p.flatten(0, 1).tolist() for name, p in predictions.items()}
    terms, expected = {}, {}
    if "position" in rows:
        known = [bool(valid[b, n]) for b, n in tokens]
        terms["position"] = slow_position_loss(guesses["position"], rows["position"], known)
        spread = [max(sum(v ** 2 for v in row[i:i + 4]) for i in range(0, len(row), 4)) for row in rows["position"]]
        still = slow_position_loss([[0] * 24] * 66, rows["position"], known)
        expected = dict(valid=sum(known) / 66, static=sum(s < 1.5 for s in spread) / 66, still=still)
        assert 0 < expected["valid"] < 1 and 0 < expected["static"] < 1, "or the test would prove nothing"
    if "shape" in rows:
        terms["shape"] = slow_shape_loss(guesses["shape"], rows["shape"])
    if "pixel" in rows:
        errors = [(a - b) ** 2 for p, r in zip(guesses["pixel"], rows["pixel"]) for a, b in zip(p, r)]
        terms["pixel"] = sum(errors) / len(errors)
    assert {*terms} == {"pixel": {"pixel"}, "hog": {"shape"}}.get(target, {"position", "shape"})
    assert loss.item() == pytest.approx(sum(terms.values()) / len(terms), rel=1e-4)
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(terms | expected, rel=1e-4)
    assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize("target, sizes", [
    ("trajectory", dict(position=40, shape=540)), ("position", dict(position=40, shape=108)), ("hog", dict(shape=108)),
    ("pixel", dict(pixel=384))])
def test_each_target_has_its_own_heads_and_only_those_that_track_ask_for_flow(target, sizes):
    model, clips, spy = spied(target, length=5)
    assert {name: value.shape for name, value in model.targets(clips)[0].items()} == {n: (3, 32, s) for n, s in sizes.items()}
    assert {name: head[-1].out_features for name, head in model.heads.items()} == sizes
    assert len(spy.seen) == ("position" in sizes)
    if "position" not in sizes:
        model.flow = None
        assert model(clips, seeded())[0].isfinite() and model.targets(clips)[1:] == (None, None)


def test_pixel_target_is_of_the_frames_that_the_network_sees():
    model, clips, _ = spied("pixel")
    assert clips.shape[2] == 4 and torch.equal(model.seen(clips), clips)
    assert torch.equal(model.targets(clips)[0]["pixel"], mofo.pixel_target(clips.float() / 255, 8, 2))


@pytest.mark.parametrize("target", ["trajectory", "position", "hog", "pixel"])
def test_autocast_does_not_reach_the_targets(monkeypatch, target):
    model, clips, spy = spied(target)
    exact, precisions = model.targets(clips), []
    def watched(function):
        def call(*args, **kwargs):
            precisions.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)      # bfloat16 under autocast
            return function(*args, **kwargs)
        return call
    model.flow = watched(spy)
    for name in ("trajectories", "position_target", "hog", "shape_target", "pixel_target"):
        monkeypatch.setattr(mme, name, watched(getattr(mme, name)))
    with torch.autocast("cpu", torch.bfloat16):                                 # as in the training loop on a GPU
        rounded = model.targets(clips)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        predictions, _ = model.predict(normalize(model.seen(clips)), tube_mask(3, (2, 4, 4), 0.7, seeded()))
        loss, _ = model(clips, seeded())
    assert {*precisions} == {torch.float32}
    for name, value in exact[0].items():
        assert value.dtype == rounded[0][name].dtype == predictions[name].dtype == torch.float32
        assert torch.equal(value, rounded[0][name]), name
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(exact[1:], rounded[1:]))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(model(clips, seeded())[0].item(), rel=0.05)


def test_targets_of_a_clip_do_not_depend_on_the_others(toys):
    model, clips = toy_mme(), toys[0][:3]
    together, valid, _ = model.targets(clips)
    for i in range(3):
        alone, fine, _ = model.targets(clips[i:i + 1])
        assert torch.equal(fine[0], valid[i])
        for name in together:
            error = (alone[name][0] - together[name][i]).abs()
            assert (error > 1e-3).float().mean() < 1e-3, f"{name}: rounding may move a point over the edge of a cell"


def test_toy_clips_give_targets_with_motion_but_not_everywhere(toys):
    model = toy_mme()
    loss, stats = model(toys[0], seeded())
    assert set(stats) == {"valid", "static", "still", "position", "shape"} and loss.isfinite()
    assert stats["valid"] > 0.9 and 0.05 < stats["static"] < 0.95
    targets, _, displacement = model.targets(toys[0])
    assert targets["position"].shape == (16, 128, 24) and targets["shape"].shape == (16, 128, 324)
    assert displacement.shape == (16, 8, 3, 2, 8, 8) and not targets["position"].requires_grad


@pytest.mark.parametrize("changes, named", [
    (dict(target="trajectories"), "trajectory, position, hog, pixel"), (dict(length=0), "--length 0"),
    (dict(stride=0), "--stride 0"), (dict(tubelet_size=1), "tubelet-size"), (dict(patch_size=1), "patch-size"),
    (dict(ratio=0.0), "--mask-ratio 0"), (dict(ratio=0.05), "--mask-ratio 0.05"), (dict(ratio=1.0), "--mask-ratio 1"),
    (dict(image_size=36), "36"), (dict(frames=5), "5")])
def test_what_cannot_work_is_named(changes, named):
    with pytest.raises(UserError) as caught:
        tiny(**changes)
    assert named in str(caught.value)
