"""MOFO against slow loops written from the papers, the public VideoMAE's numbers, and the truth of the toy data."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import common
from common import (Attention, Block, FlowEstimator, RowGenerator, UserError, VITS, ViT, multi_scale_crop, normalize,
                    patchify, read_clips, sincos_positions, spatial_gradient, toy_video, tvl1, unpatchify,
                    warp)
from mofo import MOFO, MaskedAutoencoder, find_motion, motion_box, motion_map, motion_tube_mask, pixel_target
from conftest import SHARED, golden_arrays, seeded, toy_flow

torch.set_num_threads(1)
RAFT = SHARED / "weights" / "raft_small.pth"
TINY = dict(image_size=16, frames=4, patch_size=8, tubelet_size=2, dim=24, depth=2, heads=3, decoder_dim=12, decoder_depth=1,
            decoder_heads=2)
needs_raft = pytest.mark.skipif(not RAFT.exists(), reason=f"{RAFT} is not here")


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return MaskedAutoencoder(**{**TINY, **changes})


def tiny_input(batch=2, seed=0):
    """Normalised clips, and a mask that hides 5 of the 8 tokens of each clip, not the same ones."""
    clips = torch.randn(batch, 3, 4, 16, 16, generator=seeded(seed))
    hidden = torch.rand(batch, 8, generator=seeded(seed + 1)).argsort(1) < 5
    return clips, hidden


# ---- the public implementation ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def golden():
    return golden_arrays("videomae_pretrain.npz")


def golden_model(golden):
    model = MaskedAutoencoder(32, 16, 16, 2, 48, 2, 3, 24, 2, 3)
    model.load_state_dict({k[3:]: v for k, v in golden.items() if k.startswith("sd/")}, strict=True)
    return model


def test_state_dict_names_and_shapes_are_those_of_the_public_checkpoint(golden):
    public = {k[3:]: tuple(v.shape) for k, v in golden.items() if k.startswith("sd/")}
    assert {k: tuple(v.shape) for k, v in golden_model(golden).state_dict().items()} == public


def test_encoder_prediction_and_loss_equal_the_public_implementation(golden):
    model, video, hidden = golden_model(golden), golden["video"], golden["mask"]
    visible = torch.stack([torch.nonzero(~h)[:, 0] for h in hidden])
    torch.testing.assert_close(model.encoder.tokens(patchify(video, 16, 2), visible), golden["encoder_out"], atol=1e-5, rtol=0)
    prediction, loss = model(video, hidden)
    torch.testing.assert_close(prediction, golden["pred"], atol=1e-5, rtol=0)
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=1e-4)


@pytest.mark.parametrize("own_target, rel", [(False, 1e-5), (True, 5e-3)])     # own: the constant tubelet's target is noise
def test_gradient_norm_of_every_parameter_equals_the_public_implementation(golden, own_target, rel):
    model = golden_model(golden)
    prediction, loss = model(golden["video"], golden["mask"])
    (loss if own_target else F.mse_loss(prediction, golden["target_norm"])).backward()
    assert {"gradnorm/" + n for n, _ in model.named_parameters()} == {k for k in golden if k.startswith("gradnorm/")}
    for name, parameter in model.named_parameters():
        assert parameter.grad.norm().item() == pytest.approx(golden[f"gradnorm/{name}"].item(), rel=rel), name


def test_positions_and_pixel_target_equal_the_public_implementation(golden):
    torch.testing.assert_close(sincos_positions(32, 48), golden["enc_pos"], atol=1e-6, rtol=0)
    torch.testing.assert_close(sincos_positions(32, 24), golden["dec_pos"], atol=1e-6, rtol=0)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    hidden, public = golden["mask"], golden["target_norm"]
    target = pixel_target(golden["video"] * std + mean, 16, 2)
    error = torch.stack([(t[h] - p).abs().amax(-1) for t, h, p in zip(target, hidden, public)])      # (B, N_hidden)
    constant = torch.zeros(hidden.shape, dtype=torch.bool)
    constant[0, 0] = True                                  # a constant tubelet: its target is rounding noise / 1e-6
    constant = constant[hidden].view(error.shape)
    assert error[~constant].max() < 1e-3 and (error[constant] < 0.1).all()


@pytest.mark.parametrize("count, dim", [(7, 6), (1568, 8)])
def test_positions_are_the_paper_s_sine_and_cosine_of_the_flat_index(count, dim):
    table = sincos_positions(count, dim)[0]
    for p in range(0, count, max(1, count // 20)):
        for j in range(dim):
            angle = p / 10000 ** (2 * (j // 2) / dim)
            assert table[p, j].item() == pytest.approx(math.cos(angle) if j % 2 else math.sin(angle), abs=1e-6)


# ---- motion map ------------------------------------------------------------------------------------------------------

def slow_gradient(x):
    """d/dx and d/dy of x (H, W): central differences averaged over three lines, the border replicated."""
    H, W = len(x), len(x[0])
    def at(r, c):
        return x[min(max(r, 0), H - 1)][min(max(c, 0), W - 1)]
    out = np.zeros((2, H, W))
    for r in range(H):
        for c in range(W):
            out[0, r, c] = sum((at(r + k, c + 1) - at(r + k, c - 1)) / 2 for k in (-1, 0, 1)) / 3
            out[1, r, c] = sum((at(r + 1, c + k) - at(r - 1, c + k)) / 2 for k in (-1, 0, 1)) / 3
    return out


def slow_motion_map(flow, window):
    """flow (F, 2, h, w): signed mean over each window, then the gradient's length, then means over components and windows."""
    F, _, h, w = flow.shape
    total, windows = np.zeros((h, w)), 0
    for start in range(0, F, window):
        part = flow[start:start + window]
        for component in (0, 1):
            dx, dy = slow_gradient(sum(f[component] for f in part) / len(part))
            total += np.sqrt(dx ** 2 + dy ** 2) / 2
        windows += 1
    return total / windows


@pytest.mark.parametrize("shape", [(5, 7), (1, 4), (6, 1), (2, 3, 4, 5)])
def test_spatial_gradient_equals_loops_with_a_replicated_border(shape):
    x = torch.randn(shape, generator=seeded())
    expected = np.stack([slow_gradient(m) for m in x.reshape(-1, *shape[-2:]).tolist()]).reshape(*shape[:-2], 2, *shape[-2:])
    torch.testing.assert_close(spatial_gradient(x), torch.from_numpy(expected).float(), atol=1e-5, rtol=0)


def test_spatial_gradient_of_a_ramp_is_its_slope():
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(9.0), indexing="ij")
    gradient = spatial_gradient(3 * x - 2 * y)[:, 1:-1, 1:-1]
    torch.testing.assert_close(gradient, torch.tensor([3.0, -2.0])[:, None, None].expand_as(gradient))


@pytest.mark.parametrize("flows, window, h, w", [(8, 2, 6, 7), (7, 2, 4, 9), (1, 2, 5, 5), (3, 8, 5, 4), (7, 3, 4, 4)])
def test_motion_map_equals_slow_loops(flows, window, h, w):
    flow = torch.randn(2, flows, 2, h, w, generator=seeded())
    expected = np.stack([slow_motion_map(f, window) for f in flow.double().numpy()])
    torch.testing.assert_close(motion_map(flow, window), torch.from_numpy(expected).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("h, w, ring", [(56, 84, 2), (224, 224, 8), (27, 60, 0)])
def test_the_border_of_the_map_is_left_out(h, w, ring):
    flow = torch.randn(2, 3, 2, h, w, generator=seeded())
    motion, inside = motion_map(flow), torch.zeros(h, w, dtype=torch.bool)
    inside[ring:h - ring, ring:w - ring] = True
    assert (motion[:, ~inside] == 0).all() and (motion[:, inside] > 0).all()


def test_what_a_pan_brings_in_at_the_border_makes_no_box():
    flow = torch.full((1, 4, 2, 112, 112), 3.0)                                 # a still picture under a moving camera,
    flow[..., :3] += 5 * torch.randn(1, 4, 2, 112, 3, generator=seeded())       # and noise where it comes into view
    flow[..., -3:, :] -= 4
    assert not motion_box(motion_map(flow), 112)[1].any()


def test_a_pan_gives_no_motion_and_changes_none():
    pan = torch.randn(3, 7, 2, 1, 1, generator=seeded()) * 5                    # another one in every frame
    assert motion_map(pan.expand(-1, -1, -1, 8, 9)).abs().max() < 1e-5
    flow = torch.randn(3, 7, 2, 8, 9, generator=seeded(1))
    torch.testing.assert_close(motion_map(flow + pan), motion_map(flow), atol=1e-5, rtol=0)


@pytest.mark.parametrize("slope", [0.5, -2.0])
def test_motion_map_of_a_ramp_is_half_its_slope_per_component(slope):
    x = torch.arange(9.0).expand(1, 4, 7, 9)
    one, both = torch.stack([slope * x, 0 * x], 2), torch.stack([slope * x, slope * x], 2)
    assert motion_map(one)[0, 3, 4].item() == pytest.approx(abs(slope) / 2)
    assert motion_map(both)[0, 3, 4].item() == pytest.approx(abs(slope))


def test_jitter_cancels_inside_a_window_but_lasting_motion_that_turns_back_does_not():
    edge = torch.zeros(2, 8, 8)
    edge[:, :, 4:] = 1
    jitter, turns = torch.tensor([1, -1, 1, -1]), torch.tensor([1, 1, -1, -1])
    assert motion_map(jitter[None, :, None, None, None] * edge).max() == 0
    assert motion_map(turns[None, :, None, None, None] * edge).max() == 0.5


# ---- motion box ------------------------------------------------------------------------------------------------------

def outline(h, w, x1, y1, x2, y2, value=1.0):
    motion = torch.zeros(h, w)
    motion[y1:y2, [x1, x2 - 1]] = value
    motion[[y1, y2 - 1], x1:x2] = value
    return motion


def random_outline(rng, h, w):
    bw, bh = rng.integers(w // 4, w - 4), rng.integers(h // 4, h - 4)
    x1, y1 = rng.integers(2, w - bw - 1), rng.integers(2, h - bh - 1)
    return int(x1), int(y1), int(x1 + bw), int(y1 + bh)


@pytest.mark.parametrize("h, w, image", [(64, 64, 64), (128, 128, 96), (28, 28, 224), (48, 80, 240)])
def test_the_box_is_where_a_bright_outline_is(h, w, image):
    rng = np.random.default_rng(0)
    truth = [random_outline(rng, h, w) for _ in range(40)]
    boxes, found = motion_box(torch.stack([outline(h, w, *t) for t in truth]), image)
    assert found.all()
    slack = 2 * 0.03 * w + 1                                                    # twice the blur, in pixels of the map
    unit = torch.tensor([image / w, image / h] * 2)                             # a map that is not square is a squeezed image
    assert ((boxes / unit - torch.tensor(truth)).abs() <= slack).all()
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= image).all()


@pytest.mark.parametrize("h, w, H, W", [(128, 176, 128, 176), (176, 128, 176, 128), (64, 88, 128, 176), (48, 80, 240, 240)])
def test_the_box_of_a_picture_that_is_not_square_is_in_its_pixels(h, w, H, W):
    box = torch.tensor([100, 20, 150, 60]) if H < W else torch.tensor([20, 100, 60, 150])
    x1, y1, x2, y2 = (box / torch.tensor([W / w, H / h] * 2)).round().int().tolist()
    boxes, found = motion_box(outline(h, w, x1, y1, x2, y2)[None], (H, W))
    assert found.all() and (boxes[0] - box).abs().max() <= (2 * 0.03 * min(h, w) + 1) * max(H / h, W / w)


def test_find_motion_on_pictures_that_are_not_square():
    clips = torch.zeros(2, 3, 4, 128, 176, dtype=torch.uint8)
    def sprite(pairs):                                                          # a flow estimator that sees one move
        flow = torch.zeros(len(pairs), 1, 2, 128, 176)
        flow[:, :, 0, 20:60, 100:150] = 4.0
        return flow
    _, motion, boxes, found = find_motion(sprite, clips)
    assert motion.shape == (2, 128, 176) and found.all()
    assert (boxes - torch.tensor([100.0, 20, 150, 60])).abs().max() < 9


def test_a_map_without_motion_gives_no_box_and_no_nan():
    boxes, found = motion_box(torch.zeros(2, 20, 30), 60)
    assert not found.any() and (boxes == 0).all()


@pytest.mark.parametrize("side", [64, 128, 224])
def test_the_floor_is_the_height_of_a_lasting_edge_scaled_with_the_size_of_the_map(side):
    edge = 0.4 * side / 224                                                     # the sum of a step's gradient across it
    motion = torch.zeros(2, side, side)
    motion[0, :, side // 2], motion[1, :, side // 2] = 0.9 * edge, 1.1 * edge
    assert motion_box(motion, side, floor=0.4)[1].tolist() == [False, True]


def test_the_box_scales_with_the_image_and_not_with_the_strength_of_motion():
    motion = outline(40, 40, 8, 10, 30, 32)[None]
    box = motion_box(motion, 40)[0]
    torch.testing.assert_close(motion_box(7 * motion, 40)[0], box)
    torch.testing.assert_close(motion_box(motion, 160)[0], 4 * box)


def test_what_moves_everywhere_alike_does_not_change_the_box():
    motion = outline(64, 64, 20, 16, 44, 40)[None]                              # a zoom or a roll adds a constant to the map
    assert torch.equal(motion_box(motion + 0.7, 64)[0], motion_box(motion, 64)[0])
    assert not motion_box(torch.full((1, 64, 64), 5.0), 64)[1].any()


def test_a_second_motion_widens_the_box_unless_it_is_faint():
    motion = outline(64, 64, 20, 20, 44, 44)
    box = motion_box(motion[None], 64, relative=0.3)[0]
    motion[4:8, 4:8] = 0.1                                                      # below 0.3 of the maximum
    torch.testing.assert_close(motion_box(motion[None], 64, relative=0.3)[0], box)
    motion[4:8, 4:8] = 0.5                                                      # above it
    assert (motion_box(motion[None], 64, relative=0.3)[0][0, :2] < box[0, :2] - 5).all()


def test_each_clip_gets_the_box_it_would_get_alone():
    rng = np.random.default_rng(1)
    motion = torch.stack([outline(32, 32, *random_outline(rng, 32, 32), 10.0 ** k) for k in range(-6, 3)])
    boxes, found = motion_box(motion, 64)
    assert not found[0] and found[-1]
    for i in range(len(motion)):
        alone, one = motion_box(motion[i:i + 1], 64)
        assert torch.equal(alone[0], boxes[i]) and one[0] == found[i]


# ---- mask ------------------------------------------------------------------------------------------------------------

def slow_inside(box, found, grid, patch):
    """One bool per patch: does the box share any area with it?"""
    (x1, y1, x2, y2), (_, H, W) = box, grid
    return [bool(found) and min(x2, (c + 1) * patch) > max(x1, c * patch) and min(y2, (r + 1) * patch) > max(y1, r * patch)
            for r in range(H) for c in range(W)]


def random_boxes(count, height, width, seed=0):
    """Boxes of all sizes, some reaching out of the frame, half of them on whole pixels."""
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(-0.2, 1.2, (2, count, 2)) * (width, height)
    boxes = np.hstack([np.minimum(a, b), np.maximum(a, b)])
    boxes[::2] = boxes[::2].round()
    return torch.from_numpy(boxes).float()


GRIDS = [((8, 14, 14), 16, 0.9, 0.75), ((8, 8, 8), 8, 0.9, 0.75), ((2, 6, 10), 16, 0.75, 0.9), ((1, 5, 3), 8, 0.5, 0.0),
         ((3, 7, 7), 8, 0.6, 1.0), ((4, 10, 10), 8, 0.95, 0.29)]


@pytest.mark.parametrize("grid, patch, ratio, inside_ratio", GRIDS)
def test_mask_has_exact_counts_in_all_and_the_specified_share_inside(grid, patch, ratio, inside_ratio):
    T, H, W = grid
    boxes = random_boxes(1000, H * patch, W * patch)
    found = torch.arange(1000) % 7 > 0
    hidden = motion_tube_mask(boxes, found, grid, ratio, inside_ratio, seeded(), patch)
    assert hidden.shape == (1000, T * H * W) and hidden.dtype == torch.bool
    tubes = hidden.view(1000, T, H * W)
    assert (tubes == tubes[:, :1]).all(), "the same at all times"
    K = int(ratio * H * W)
    clamped = 0
    for box, has, tube in zip(boxes.tolist(), found.tolist(), tubes[:, 0].tolist()):
        assert sum(tube) == K
        inside = slow_inside(box, has, grid, patch)
        n_in = sum(inside)
        n_out = H * W - n_in
        free = math.floor(inside_ratio * n_in)
        m_in = min(max(free, max(0, K - n_out)), min(n_in, K))
        clamped += m_in != free
        if n_in:
            assert sum(t for t, i in zip(tube, inside) if i) == m_in
    assert 0 < clamped < 1000, "the boxes are to try both cases"


@pytest.mark.parametrize("box, count", [
    ((0, 0, 224, 224), 196), ((-50, -50, 300, 300), 196), ((16, 32, 48, 80), 6), ((15, 31, 49, 81), 20), ((17, 33, 18, 34), 1),
    ((0, 0, 1, 1), 1), ((223, 223, 224, 224), 1), ((100, 0, 101, 224), 14), ((15.9, 0, 16.1, 1), 2),
    ((50, 50, 50, 90), 0), ((50, 50, 90, 50), 0),
    ((50, 50, 50, 50), 0), ((64, 64, 64, 64), 0), ((-40, 0, 0, 224), 0), ((224, 0, 300, 224), 0), ((90, 90, 40, 40), 0)])
def test_only_patches_that_the_box_covers_in_part_are_inside(box, count):
    # inside_ratio 1 hides every patch inside (up to K = 176) in every draw, and no other patch always
    boxes, found = torch.tensor([box] * 300).float(), torch.ones(300, dtype=torch.bool)
    hidden = motion_tube_mask(boxes, found, (1, 14, 14), 0.9, 1.0, seeded())
    always = hidden.all(0).tolist()
    assert (hidden.sum(1) == 176).all()
    inside = slow_inside(box, True, (1, 14, 14), 16)
    assert sum(inside) == count
    assert always == inside if count <= 176 else not any(always)


@pytest.mark.parametrize("how", ["no box found", "inside_ratio none", "empty box"])
def test_without_a_box_every_tube_is_hidden_equally_often(how):
    grid, clips = (2, 6, 5), 6000
    boxes = torch.tensor([[0, 0, 40, 16.0]]).expand(clips, -1) * (how != "empty box")
    found = torch.full((clips,), how != "no box found")
    inside_ratio = None if how == "inside_ratio none" else 0.2
    hidden = motion_tube_mask(boxes, found, grid, 0.75, inside_ratio, seeded(), 8)[:, :30].float()
    share, spread = 22 / 30, math.sqrt(22 / 30 * 8 / 30 / clips)                # int(0.75 * 30) = 22
    assert (hidden.sum(1) == 22).all()
    assert (hidden.mean(0) - share).abs().max() < 4.5 * spread
    pairs = torch.cov(hidden.T)[~torch.eye(30, dtype=torch.bool)]              # drawn without replacement: slightly negative
    assert (pairs + share * (1 - share) / 29).abs().max() < 5.5 * share * (1 - share) / math.sqrt(clips)


def test_patches_inside_are_equally_likely_and_so_are_those_outside():
    grid, clips, box = (1, 8, 8), 6000, (16, 8, 40, 32)                         # 3 x 3 patches of 8 pixels
    boxes, found = torch.tensor([box]).float().expand(clips, -1), torch.ones(clips, dtype=torch.bool)
    hidden = motion_tube_mask(boxes, found, grid, 0.5, 0.75, seeded(), 8).float().mean(0)
    inside = torch.tensor(slow_inside(box, True, grid, 8))
    for side, share in ((inside, 6 / 9), (~inside, 26 / 55)):                   # floor(0.75 * 9) = 6 of K = 32
        assert (hidden[side] - share).abs().max() < 4.5 * math.sqrt(share * (1 - share) / clips)


def test_the_mask_is_decided_by_its_generator_alone():
    boxes, found = random_boxes(16, 112, 112), torch.ones(16, dtype=torch.bool)
    def draw(seed):
        return motion_tube_mask(boxes, found, (2, 14, 14), 0.9, 0.75, seeded(seed), 8)
    first = draw(0)
    torch.rand(5)                                                               # the global generator must not matter
    assert torch.equal(draw(0), first) and not torch.equal(draw(1), first)
    assert len({tuple(h.tolist()) for h in first}) == 16, "another mask for every clip"


# ---- target and loss -------------------------------------------------------------------------------------------------

def slow_target(clip, p, t):
    """clip (3, T, H, W) in [0, 1] -> (N, t*p*p*3): normalised per patch and colour, order (time, row, column, colour)."""
    _, T, H, W = clip.shape
    tokens = []
    for a in range(0, T, t):
        for b in range(0, H, p):
            for c in range(0, W, p):
                token = np.zeros((t, p, p, 3))
                for colour in range(3):
                    pixels = clip[colour, a:a + t, b:b + p, c:c + p]
                    mean = pixels.sum() / pixels.size
                    std = math.sqrt(((pixels - mean) ** 2).sum() / (pixels.size - 1))
                    token[..., colour] = (pixels - mean) / (std + 1e-6)
                tokens.append(token.reshape(-1))
    return np.stack(tokens)


@pytest.mark.parametrize("T, H, W, p, t", [(4, 8, 12, 4, 2), (2, 16, 8, 8, 1), (6, 6, 6, 2, 3)])
def test_pixel_target_equals_slow_loops(T, H, W, p, t):
    clips = torch.rand(2, 3, T, H, W, generator=seeded())
    expected = np.stack([slow_target(c, p, t) for c in clips.double().numpy()])
    torch.testing.assert_close(pixel_target(clips, p, t), torch.from_numpy(expected).float(), atol=1e-4, rtol=0)


def test_the_small_number_is_added_to_the_deviation_not_to_the_variance():
    clips = torch.zeros(1, 3, 2, 4, 4)
    clips[:, 0, 0] = 2e-5                                                       # deviation 1e-5: divided by 1.1e-5
    got = pixel_target(clips, 4, 2).view(2, 4, 4, 3)
    std = 1e-5 * math.sqrt(32 / 31)
    assert got[0, 0, 0, 0].item() == pytest.approx(1e-5 / (std + 1e-6), rel=1e-3)
    assert (got[..., 1:] == 0).all()


@pytest.mark.parametrize("T, H, W, p, t", [(4, 8, 12, 4, 2), (2, 16, 8, 8, 1)])
def test_patchify_has_the_specified_order_and_unpatchify_undoes_it(T, H, W, p, t):
    clips = torch.rand(2, 3, T, H, W, generator=seeded())
    tokens, grid = patchify(clips, p, t), (T // t, H // p, W // p)
    assert torch.equal(unpatchify(tokens, grid, p, t), clips)
    n = 0
    for a in range(grid[0]):                                                    # tokens in (t, h, w) order
        for b in range(grid[1]):
            for c in range(grid[2]):
                block = clips[:, :, a * t:a * t + t, b * p:b * p + p, c * p:c * p + p]
                assert torch.equal(tokens[:, n], block.flatten(1))
                n += 1


def test_loss_is_the_plain_mean_over_hidden_tokens_and_their_values():
    model, (clips, hidden) = tiny(), tiny_input()
    prediction, loss = model(clips, hidden)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    errors = []
    for clip, mask, rows in zip(clips, hidden, prediction.tolist()):
        target = slow_target((clip * std + mean).double().numpy(), 8, 2)
        tokens = [i for i in range(8) if mask[i]]                               # in increasing order
        for token, row in zip(tokens, rows):
            errors += [(r - y) ** 2 for r, y in zip(row, target[token])]
    assert len(errors) == 2 * 5 * 384 and loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-4)


# ---- network ---------------------------------------------------------------------------------------------------------

def test_predictions_come_in_increasing_token_order():
    model, (clips, hidden) = tiny(decoder_depth=0), tiny_input()            # no blocks: each depends on its position only
    prediction, _ = model(clips, hidden)
    for mask, rows in zip(hidden, prediction):
        tokens = [i for i in range(8) if mask[i]]
        expected = model.decoder.head(model.decoder.norm(model.mask_token[0] + sincos_positions(8, 12)[0, tokens]))
        torch.testing.assert_close(rows, expected)


def test_forward_encodes_the_visible_tokens_and_decodes_all_at_their_positions():
    model, (clips, hidden) = tiny(), tiny_input()
    prediction, _ = model(clips, hidden)
    for clip, mask, rows in zip(clips, hidden, prediction):
        x = model.encoder.patch_embed.proj(clip[None]).flatten(2).transpose(1, 2) + sincos_positions(8, 24)     # as a Conv3d
        z = x[:, ~mask]
        for block in model.encoder.blocks:
            z = block(z)
        z = model.encoder_to_decoder(model.encoder.norm(z))
        positions = sincos_positions(8, 12)
        z = torch.cat([z + positions[:, ~mask], model.mask_token + positions[:, mask]], 1)
        for block in model.decoder.blocks:
            z = block(z)
        torch.testing.assert_close(model.decoder.head(model.decoder.norm(z))[0, -5:], rows, atol=1e-5, rtol=0)


def test_hidden_pixels_never_reach_the_prediction_and_every_visible_token_does():
    model, (clips, hidden) = tiny(), tiny_input()
    before = model(clips, hidden)[0]
    for token in range(8):
        patches = patchify(clips, 8, 2)
        patches[0, token] += torch.randn(384, generator=seeded(token))
        after = model(unpatchify(patches, (2, 2, 2), 8, 2), hidden)[0]
        assert torch.equal(after[0], before[0]) == hidden[0, token].item()
        assert torch.equal(after[1], before[1]), "the other clip is not touched"


def test_gradients_reach_every_parameter():
    model, (clips, hidden) = tiny(), tiny_input()
    model(clips, hidden)[1].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


@pytest.mark.parametrize("name, pretrain, trunk", [
    ("vit_small", 24.03, 21.88), ("vit_base", 94.21, 86.23), ("vit_large", 343.0, 303.9), ("vit_huge", 692.5, 631.6)])
def test_parameter_counts_are_videomae_s(name, pretrain, trunk):
    dim, depth, heads, decoder_dim, decoder_depth, decoder_heads = VITS[name]
    with torch.device("meta"):
        model = MaskedAutoencoder(224, 16, 16, 2, dim, depth, heads, decoder_dim, decoder_depth, decoder_heads)
        classifier = ViT(224, 16, 16, 2, dim, depth, heads, num_classes=174)
    assert model.encoder.grid == (8, 14, 14)
    def millions(module):
        return sum(p.numel() for p in module.parameters()) / 1e6
    assert millions(model) == pytest.approx(pretrain, abs=0.0051 if pretrain < 100 else 0.051)
    head = 174 * (dim + 1) / 1e6                                                # the trunk: embedding, blocks and fc_norm
    assert millions(classifier) - head == pytest.approx(trunk, abs=0.0051 if trunk < 100 else 0.051)


def test_attention_is_a_softmax_with_biases_on_queries_and_values_only():
    torch.manual_seed(0)
    layer, x = Attention(12, 3), torch.randn(2, 5, 12)
    nn.init.normal_(layer.q_bias), nn.init.normal_(layer.v_bias)
    wq, wk, wv = layer.qkv.weight.chunk(3)
    out = torch.zeros(2, 5, 12)
    for b in range(2):
        for head in range(3):
            d = slice(4 * head, 4 * head + 4)
            q, k, v = (x[b] @ wq.T + layer.q_bias)[:, d], (x[b] @ wk.T)[:, d], (x[b] @ wv.T + layer.v_bias)[:, d]
            out[b, :, d] = torch.softmax(q * 4 ** -0.5 @ k.T, -1) @ v
    torch.testing.assert_close(layer(x), layer.proj(out), atol=1e-5, rtol=0)


def test_block_is_pre_norm_with_exact_gelu():
    torch.manual_seed(0)
    block, x = Block(12, 3), torch.randn(2, 5, 12) * 1e-3                       # small, so that eps 1e-6 of the norms shows
    def norm(x, layer):
        deviation = (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return (x - x.mean(-1, keepdim=True)) / deviation * layer.weight + layer.bias
    y = x + block.attn(norm(x, block.norm1))
    h = block.mlp.fc1(norm(y, block.norm2))
    assert h.shape[-1] == 48
    torch.testing.assert_close(block(x), y + block.mlp.fc2(h * 0.5 * (1 + torch.erf(h / 2 ** 0.5))), atol=1e-5, rtol=0)


def test_drop_path_drops_whole_branches_of_samples_and_grows_linearly_with_depth():
    torch.manual_seed(0)
    block, x = Block(12, 3, drop_path=0.5), torch.randn(64, 5, 12)
    a = block.attn(block.norm1(x))
    kinds = []
    for i, out in enumerate(block(x)):
        options = [x[i] + s * a[i] for s in (0, 2)]
        options = [y + s * block.mlp(block.norm2(y)) for y in options for s in (0, 2)]
        kinds.append([j for j, y in enumerate(options) if torch.allclose(out, y, atol=1e-5)])
    assert {len(k) for k in kinds} == {1} and {k[0] for k in kinds} == {0, 1, 2, 3}
    block.eval()
    y = x + a
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)))
    rates = [b.drop_path.p for b in ViT(16, 4, 8, 2, 12, 5, 3, drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_forward_map_puts_each_token_at_its_place():
    torch.manual_seed(0)
    model, clips = ViT(24, 4, 8, 2, 12, 1, 3), torch.randn(2, 3, 4, 24, 24)
    features, tokens = model.forward_map(clips), model.tokens(patchify(clips, 8, 2))
    assert features.shape == (2, 12, 2, 3, 3)
    for n in range(18):
        assert torch.equal(features[:, :, n // 9, n // 3 % 3, n % 3], tokens[:, n])
    torch.testing.assert_close(model(clips), tokens.mean(1))


def test_initial_weights_are_videomae_s():
    model = tiny(dim=96, decoder_dim=48, decoder_heads=3)
    for part in (model.encoder, model.decoder):
        for name, layer in part.named_modules():
            if isinstance(layer, nn.Linear):                                    # Xavier; the fused qkv sets its own bound
                bound = math.sqrt(6 / sum(layer.weight.shape))
                assert 0.98 * bound < layer.weight.abs().max() <= bound, name
                assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
                assert layer.bias is None or (layer.bias == 0).all(), f"{name}.bias is not 0"
            if isinstance(layer, nn.LayerNorm):
                assert (layer.weight == 1).all() and (layer.bias == 0).all() and layer.eps == 1e-6
            if isinstance(layer, Attention):
                assert (layer.q_bias == 0).all() and (layer.v_bias == 0).all()
    conv, between = model.encoder.patch_embed.proj, model.encoder_to_decoder    # PyTorch's default: 1 / sqrt(fan in)
    for weight, bound in ((conv.weight, 384 ** -0.5), (conv.bias, 384 ** -0.5), (between.weight, 96 ** -0.5)):
        assert 0.9 * bound < weight.abs().max() <= bound
    assert between.bias is None
    token = tiny(decoder_dim=4096, decoder_depth=0).mask_token                  # normal, cut at one deviation
    assert 0.0199 < token.abs().max() <= 0.02 and token.std().item() == pytest.approx(0.0108, rel=0.05)


def test_initial_weights_of_the_classifier_are_videomae_s():
    torch.manual_seed(0)
    model = ViT(16, 4, 8, 2, 192, 1, 3, num_classes=100)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            std = 0.02 * 0.001 if name == "head" else 0.02
            assert layer.weight.std().item() == pytest.approx(std, rel=0.05), name
            assert layer.bias is None or (layer.bias == 0).all(), name
    assert isinstance(model.norm, nn.Identity) and not hasattr(ViT(16, 4, 8, 2, 12, 1, 3), "head")


# ---- the whole method ------------------------------------------------------------------------------------------------

def toy_clips(count, label=None, split="test"):
    videos, truths = zip(*[toy_video(0, split, i, label=label) for i in range(count)])
    return torch.from_numpy(np.stack(videos)[:, :32:2]).permute(0, 4, 1, 2, 3).contiguous(), truths


def toy_mofo(flow="tvl1", inside_ratio=0.75):
    torch.manual_seed(0)
    flow = flow if callable(flow) else FlowEstimator(flow)
    return MOFO(flow, 0.9, inside_ratio, image_size=64, frames=16, patch_size=8, tubelet_size=2, dim=24, depth=1, heads=3,
                decoder_dim=12, decoder_depth=1, decoder_heads=1)


def test_the_box_covers_what_the_toy_sprite_sweeps():
    clips, truths = toy_clips(64)
    _, _, _, boxes, found = toy_mofo().mask(clips)
    covered = []
    for truth, box, has in zip(truths, boxes.tolist(), found.tolist()):
        swept = np.zeros((64, 64), bool)
        for x1, y1, x2, y2 in truth["boxes"][:32:2].round().astype(int):
            swept[y1:y2, x1:x2] = True
        x1, y1, x2, y2 = (round(v) for v in box)
        covered.append(swept[y1:y2, x1:x2].sum() / swept.sum() if has else 0)
    covered = np.array(covered)
    assert (covered >= 0.7).mean() >= 0.9, f"found {found.float().mean():.2f}, lowest shares {np.sort(covered)[:12].round(2)}"
    area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).mean().item() / 64 ** 2
    assert area < 0.5, f"mean area {area:.2f}: covering everything is no feat"


def test_a_panning_camera_alone_gives_no_box():
    _, flow, _, _, found = toy_mofo().mask(toy_clips(32, label=-1)[0])
    assert flow.norm(dim=2).mean() > 0.05, "the pan is to be seen in the flow"
    assert found.float().mean() <= 0.05, f"{int(found.sum())} of 32 clips"


def test_forward_gives_the_loss_of_its_own_mask_and_the_documented_stats():
    clips, model = toy_clips(4)[0], toy_mofo()
    loss, stats = model(clips, seeded())
    hidden, flow, motion, boxes, found = model.mask(clips, seeded())
    assert hidden.shape == (4, 512) and (hidden.sum(1) == 8 * 57).all()                # int(0.9 * 64) = 57
    assert flow.shape == (4, 8, 2, 64, 64) and motion.shape == (4, 64, 64) and boxes.shape == (4, 4)
    assert loss.item() == pytest.approx(MaskedAutoencoder.forward(model, normalize(clips), hidden)[1].item(), rel=1e-5)
    assert set(stats) == {"with_box", "box_area"} and stats["with_box"] == found.float().mean()
    areas = [(b[2] - b[0]) * (b[3] - b[1]) / 64 ** 2 for b, f in zip(boxes.tolist(), found) if f]
    assert stats["box_area"].item() == pytest.approx(sum(areas) / len(areas))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_autocast_changes_neither_the_map_nor_the_mask():
    clips, model = toy_clips(8)[0], toy_mofo()
    exact = model.mask(clips, seeded())
    with torch.autocast("cpu", torch.bfloat16):                                 # as in the training loop on a GPU
        rounded = model.mask(clips, seeded())
    for name, a, b in zip(("hidden", "flow", "motion", "boxes", "found"), exact, rounded):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{name}, {b.dtype}"


def test_flow_is_taken_between_the_two_frames_of_each_tubelet():
    seen = []
    def spy(clips):
        seen.append(clips)
        return torch.zeros(len(clips), clips.shape[2] - 1, 2, 64, 64)
    clips = torch.arange(16, dtype=torch.uint8).view(1, 1, 16, 1, 1).expand(2, 3, 16, 64, 64)
    _, _, motion, _, found = toy_mofo(spy).mask(clips)
    assert seen[0].shape == (16, 3, 2, 64, 64) and not found.any() and (motion == 0).all()
    assert seen[0][:, 0, :, 0, 0].tolist() == [[2 * i, 2 * i + 1] for i in range(8)] * 2


def test_inside_ratio_none_ignores_the_motion():
    clips = toy_clips(4)[0]
    still = toy_mofo(lambda x: torch.zeros(len(x), 1, 2, 64, 64))
    baseline = toy_mofo(inside_ratio=None)
    assert torch.equal(baseline.mask(clips, seeded())[0], still.mask(clips, seeded())[0])
    assert not torch.equal(toy_mofo().mask(clips, seeded())[0], still.mask(clips, seeded())[0])


def test_the_mask_does_not_depend_on_how_a_batch_is_split():
    clips, model = toy_clips(6)[0], toy_mofo()
    def rows(first, count):
        generator = RowGenerator()
        generator.manual_seed(3)
        generator.first, generator.total = first, 6
        return model.mask(clips[first:first + count], generator)[0]
    whole = rows(0, 6)
    for parts in ([3, 3], [1, 2, 3]):
        assert torch.equal(torch.cat([rows(sum(parts[:i]), n) for i, n in enumerate(parts)]), whole)
    assert torch.equal(whole, model.mask(clips, seeded(3))[0]), "and the whole batch draws what a plain generator would"


# ---- toy truth and flow ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("label", range(-1, 8))
def test_true_toy_flow_carries_the_last_frame_back_to_the_first(label):
    video, truth = toy_video(1, "train", label + 1, size=192, frames=16, label=label)   # large, so that warping loses little
    flow, sprite = toy_flow(truth, 0, 15)
    _, later = toy_flow(truth, 15, 0)
    first, last = (torch.from_numpy(video[t]).permute(2, 0, 1)[None].float() / 255 for t in (0, 15))
    back = warp(last, torch.from_numpy(flow)[None].float())
    change, error = ((x - first).abs().mean((0, 1)) for x in (last, back))
    x, y = np.mgrid[:192, :192][::-1] + flow                                            # where each pixel goes
    stays = (x > 0) & (x < 191) & (y > 0) & (y < 191)
    def grow(mask):
        return F.max_pool2d(torch.as_tensor(mask)[None, None].float(), 5, 1, 2)[0, 0].numpy() > 0
    edge = grow(sprite) & grow(~sprite)                                                 # two pixels on either side
    hit = grow(warp(torch.from_numpy(later)[None, None].float(), torch.from_numpy(flow)[None].float())[0, 0] > 0)
    for part in (sprite & ~edge & stays, ~sprite & ~edge & stays & ~hit):
        assert part.sum() > 300 and change[part].mean() > 0.004, "or the test would prove nothing"
        assert error[part].mean() < 0.3 * change[part].mean(), f"{error[part].mean():.4f} of {change[part].mean():.4f}"


def waves(dx, dy, h=48, w=64):
    """A smooth picture (3, h, w) in [0, 1] whose content is shifted by (dx, dy)."""
    y, x = torch.meshgrid(torch.arange(h) - dy, torch.arange(w) - dx, indexing="ij")
    z = [torch.sin(x / 3.1 + y / 7 + k) + torch.sin(y / 2.7 - x / 9 + 2 * k) + torch.sin((x + y) / 4.3) for k in range(3)]
    return 0.5 + torch.stack(z) / 6


@pytest.mark.parametrize("dx, dy", [(0.4, -0.7), (1.5, 0.8), (-2.3, 1.1), (0.0, 3.0)])
def test_tvl1_finds_a_known_sub_pixel_shift(dx, dy):
    first, second = waves(0, 0)[None], waves(dx, dy)[None]
    flow = tvl1(first, second)
    error = (flow - torch.tensor([dx, dy]).view(2, 1, 1)).norm(dim=1)[0, 6:-6, 6:-6].mean()
    assert error < 0.2, f"end-point error {error:.3f}"
    inside = (..., slice(6, -6), slice(6, -6))
    assert (warp(second, flow) - first)[inside].abs().mean() < 0.25 * (second - first)[inside].abs().mean(), "the sign"


def test_tvl1_of_identical_frames_is_zero():
    assert tvl1(waves(0, 0)[None], waves(0, 0)[None]).abs().max() < 1e-5


def test_flow_of_each_clip_is_what_it_would_be_alone_and_has_one_flow_per_pair():
    clips, estimate = toy_clips(3)[0][:, :, :4], FlowEstimator("tvl1")
    flow = estimate(clips)
    assert flow.shape == (3, 3, 2, 64, 64)
    for i in range(3):
        torch.testing.assert_close(estimate(clips[i:i + 1])[0], flow[i], atol=1e-4, rtol=0)
        for t in range(3):
            torch.testing.assert_close(estimate(clips[i:i + 1, :, t:t + 2])[0, 0], flow[i, t], atol=1e-4, rtol=0)
    torch.testing.assert_close(estimate(clips.float() / 255), flow, atol=1e-4, rtol=0)


def test_flow_size_changes_the_grid_and_the_unit():
    pair = torch.stack([waves(0, 0, 64, 64), waves(2, 1, 64, 64)], 1)[None]
    flow = FlowEstimator("tvl1", size=96)(pair)
    assert flow.shape == (1, 1, 2, 96, 96)
    torch.testing.assert_close(flow[0, 0, :, 12:-12, 12:-12].mean((1, 2)), torch.tensor([3.0, 1.5]), atol=0.15, rtol=0)


# ---- RAFT ------------------------------------------------------------------------------------------------------------

def shifted_pair(height, width, dx=5, dy=3):
    """A real frame and itself moved by (dx, dy) pixels -> uint8 (1, 3, 2, height, width)."""
    video = SHARED / "videos" / "juggling.mp4"
    if not video.exists():
        pytest.skip(f"{video} is not here")
    frame = torch.tensor(read_clips(video, [10], size=(360, 640))[0]).permute(2, 0, 1)
    return torch.stack([frame[:, y:y + height, x:x + width] for x, y in ((60, 40), (60 - dx, 40 - dy))], 1)[None]


@needs_raft
def test_raft_finds_the_shift_of_a_real_frame():
    flow = FlowEstimator("raft_small", RAFT)(shifted_pair(224, 224))
    error = (flow[0, 0] - torch.tensor([5.0, 3]).view(2, 1, 1)).norm(dim=0)[16:-16, 16:-16].mean()
    assert flow.shape == (1, 1, 2, 224, 224) and error < 0.3, f"end-point error {error:.2f}"


@needs_raft
@pytest.mark.parametrize("height, width, grid", [(132, 156, (128, 160)), (100, 182, (128, 184)), (64, 64, (128, 128))])
def test_raft_grid_is_a_multiple_of_8_of_at_least_128_and_the_flow_is_in_its_pixels(height, width, grid):
    flow = FlowEstimator("raft_small", RAFT)(shifted_pair(height, width, 4, 2))
    expected = torch.tensor([4 * grid[1] / width, 2 * grid[0] / height])
    assert flow.shape == (1, 1, 2, *grid)
    median = flow[0, 0].flatten(1).median(1).values
    torch.testing.assert_close(median, expected, atol=0.75, rtol=0.1)


@pytest.mark.parametrize("side", [(224, 224), (128, 128), (240, 320), (448, 448), (2048, 2048)])
def test_a_chunk_has_no_more_correlation_maps_than_cudnn_samples(side, monkeypatch):
    monkeypatch.setattr(common.Raft_Small_Weights.DEFAULT.__class__, "get_state_dict",
                        lambda self, **_: torchvision.models.optical_flow.raft_small().state_dict())
    estimate = FlowEstimator("raft_small", updates=1)
    estimate.device = torch.device("cuda")                                      # as it would choose there
    pairs = estimate.chunk(*side)
    maps = pairs * (side[0] // 8) * (side[1] // 8)
    assert pairs >= 1 and (maps <= 65535 or pairs == 1) and maps + maps // pairs > 65535         # no fewer than needed
    assert FlowEstimator("tvl1").chunk(64, 64) == 128
    if side == (128, 128):                                                      # it is one map per point of an eighth
        seen, sample = [], F.grid_sample
        monkeypatch.setattr(F, "grid_sample", lambda x, *args, **kwargs: (seen.append(len(x)), sample(x, *args, **kwargs))[1])
        estimate.device = torch.device("cpu")
        monkeypatch.setattr(estimate, "chunk", lambda h, w: 3)
        estimate(torch.zeros(2, 3, 3, *side, dtype=torch.uint8))
        assert set(seen) == {3 * 16 * 16, 16 * 16}


@needs_raft
def test_raft_takes_bytes_and_floats_and_each_clip_alone():
    estimate = FlowEstimator("raft_small", RAFT, updates=2)
    clips = torch.cat([shifted_pair(128, 128), shifted_pair(128, 128, -2, 6)])
    flow = estimate(clips)
    torch.testing.assert_close(estimate(clips.float() / 255), flow, atol=1e-3, rtol=0)
    torch.testing.assert_close(estimate(clips[1:])[0], flow[1], atol=1e-3, rtol=0)
    assert not flow.requires_grad and estimate.seconds() > 0 and estimate.seconds() == 0


@needs_raft
def test_raft_in_bf16_stays_close_to_fp32():
    clips = torch.cat([shifted_pair(128, 128, *d) for d in ((5, 3), (-3, 1), (0, 8))])
    exact, rounded = (FlowEstimator("raft_small", RAFT, amp=amp)(clips) for amp in (None, torch.bfloat16))
    error = (exact - rounded).norm(dim=2).mean()
    assert rounded.dtype == torch.float32 and 0 < error < 0.1, f"end-point error {error:.3f}"


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", {"wrong": torch.zeros(1)}])
def test_a_missing_or_broken_weights_file_names_both_ways_out(tmp_path, content):
    path = tmp_path / "raft.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    with pytest.raises(UserError) as caught:
        FlowEstimator("raft_small", str(path))
    assert "--raft-weights" in str(caught.value) and "--flow tvl1" in str(caught.value) and "raft.pth" in str(caught.value)


@pytest.mark.parametrize("error", [OSError("network is unreachable"), TimeoutError(), RuntimeError("invalid hash value")])
def test_a_download_that_fails_names_both_ways_out(monkeypatch, error):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    with pytest.raises(UserError) as caught:
        FlowEstimator("raft_large")
    assert "--raft-weights" in str(caught.value) and "--flow tvl1" in str(caught.value)


def test_an_unknown_flow_is_named_with_the_choices():
    with pytest.raises(UserError, match="raft_smal.*raft_small.*tvl1"):
        FlowEstimator("raft_smal")


# ---- the crop of pre-training ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width", [(240, 320), (320, 240), (224, 224), (222, 300), (300, 223)])
def test_multi_scale_crops_lie_inside_the_frame(height, width):
    rng = np.random.default_rng(0)
    for _ in range(300):
        x1, y1, x2, y2 = multi_scale_crop(height, width, rng, snap=224)
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height


@pytest.mark.parametrize("smallest, scales", [(0.66, [1, 0.875, 0.75, 0.66]), (1.0, [1]), (0.7, [1, 0.875, 0.75, 0.7]),
                                              (0.75, [1, 0.875, 0.75]), (0.4, [1, 0.875, 0.75, 0.66, 0.5, 0.4])])
def test_min_crop_is_the_smallest_side_of_a_crop(smallest, scales):
    rng, seen = np.random.default_rng(0), set()
    for _ in range(600):
        x1, y1, x2, y2 = multi_scale_crop(1000, 1000, rng, smallest)
        seen |= {(x2 - x1, y2 - y1)}
    sides = [int(1000 * s) for s in scales]
    assert seen == {(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1}
