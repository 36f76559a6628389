"""MOFO and the masked autoencoder against slow loops written from the papers, the public VideoMAE's numbers, and the
truth of the toy data."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import (Attention, Block, FlowEstimator, VITS, ViT, normalize, patchify, sincos_positions, unpatchify)
from mofo import (MOFO, MaskedAutoencoder, find_motion, motion_box, motion_map, motion_tube_mask, multi_scale_crop,
                  pixel_target)
from conftest import golden_arrays, seeded, slow_gradient, toy_clips

TINY = dict(image_size=16, frames=4, patch_size=8, tubelet_size=2, dim=24, depth=2, heads=3, decoder_dim=12,
            decoder_depth=1, decoder_heads=2)                                   # 2 x 2 x 2 tokens
MEAN, STD = (torch.tensor(v).view(3, 1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def tiny(**changes):
    torch.manual_seed(0)
    return MaskedAutoencoder(**{**TINY, **changes})


def tiny_input():
    """Normalised clips, and a mask that hides 5 of the 8 tokens of each clip, not the same ones."""
    return torch.randn(2, 3, 4, 16, 16, generator=seeded()), torch.rand(2, 8, generator=seeded(1)).argsort(1) < 5


# ---- the public implementation ---------------------------------------------------------------------------------------

def test_encoder_prediction_loss_and_gradients_equal_the_public_implementation():
    golden, model = golden_arrays("videomae_pretrain.npz"), MaskedAutoencoder(32, 16, 16, 2, 48, 2, 3, 24, 2, 3)
    model.load_state_dict({k[3:]: v for k, v in golden.items() if k.startswith("sd/")}, strict=True)
    video, hidden = golden["video"], golden["mask"]
    visible = torch.stack([torch.nonzero(~h)[:, 0] for h in hidden])
    encoded = model.encoder.tokens(patchify(video, 16, 2), visible)
    torch.testing.assert_close(encoded, golden["encoder_out"], atol=1e-5, rtol=0)
    prediction, loss = model(video, hidden)
    torch.testing.assert_close(prediction, golden["pred"], atol=1e-5, rtol=0)
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=1e-4)
    F.mse_loss(prediction, golden["target_norm"]).backward()
    norms = {f"gradnorm/{name}": parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert norms == pytest.approx({k: v.item() for k, v in golden.items() if k.startswith("gradnorm/")}, rel=1e-5)


def test_positions_and_pixel_target_equal_the_public_implementation():
    golden = golden_arrays("videomae_pretrain.npz")
    torch.testing.assert_close(sincos_positions(32, 48), golden["enc_pos"], atol=1e-6, rtol=0)
    torch.testing.assert_close(sincos_positions(32, 24), golden["dec_pos"], atol=1e-6, rtol=0)
    hidden, public = golden["mask"], golden["target_norm"]
    target = pixel_target(golden["video"] * STD + MEAN, 16, 2)
    error = torch.stack([(t[h] - p).abs().amax(-1) for t, h, p in zip(target, hidden, public)])      # (B, N_hidden)
    constant = torch.zeros(hidden.shape, dtype=torch.bool)
    constant[0, 0] = True                                  # a constant tubelet: its target is rounding noise / 1e-6
    constant = constant[hidden].view(error.shape)
    assert error[~constant].max() < 1e-3 and (error[constant] < 0.1).all()


@pytest.mark.parametrize("count, dim", [(7, 6), (1568, 8)])
def test_positions_are_the_paper_s_sine_and_cosine_of_the_flat_index(count, dim):
    p, j = np.ogrid[:count, :dim]
    angle = p / 10000 ** (2 * (j // 2) / dim)
    expected = np.where(j % 2, np.cos(angle), np.sin(angle))
    torch.testing.assert_close(sincos_positions(count, dim)[0], torch.from_numpy(expected).float(), atol=1e-6, rtol=0)


# ---- motion map ------------------------------------------------------------------------------------------------------

def slow_motion_map(flow, window):
    """flow (F, 2, h, w): signed mean of each window, the gradient's length, means over components and windows; a border
    of 8 of 224 pixels is 0."""
    windows = [flow[start:start + window].mean(0) for start in range(0, len(flow), window)]
    lengths = [np.hypot(*slow_gradient(component)) for mean in windows for component in mean]
    (h, w), motion = flow.shape[-2:], np.mean(lengths, 0)
    ring = int(min(h, w) * 8 / 224)
    rows, columns = np.ogrid[:h, :w]
    return np.where((ring <= rows) & (rows < h - ring) & (ring <= columns) & (columns < w - ring), motion, 0)


@pytest.mark.parametrize("flows, window, h, w", [(8, 2, 6, 7), (7, 2, 4, 9), (1, 2, 5, 5), (3, 8, 5, 4), (2, 2, 56, 84),
                                                 (1, 1, 27, 30)])
def test_motion_map_equals_slow_loops(flows, window, h, w):
    flow = torch.randn(2, flows, 2, h, w, generator=seeded())
    expected = np.stack([slow_motion_map(f, window) for f in flow.double().numpy()])
    torch.testing.assert_close(motion_map(flow, window), torch.from_numpy(expected).float(), atol=1e-5, rtol=0)


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


@pytest.mark.parametrize("h, w, image", [(64, 64, 64), (128, 128, 96), (28, 28, 224), (48, 80, 240),
                                         (48, 80, (96, 160)), (128, 96, (128, 96)), (88, 64, (128, 176))])
def test_the_box_is_where_a_bright_outline_is(h, w, image):
    rng = np.random.default_rng(0)
    truth = [random_outline(rng, h, w) for _ in range(40)]
    motion = torch.stack([outline(h, w, *t, value=10.0 ** (i % 4)) for i, t in enumerate(truth)])
    boxes, found = motion_box(motion, image)
    H, W = (image, image) if isinstance(image, int) else image
    unit = torch.tensor([W / w, H / h] * 2)                                     # pixels of the image in one of the map
    assert found.all()
    assert ((boxes / unit - torch.tensor(truth)).abs() <= 2 * 0.03 * min(h, w) + 1).all()      # twice the blur
    assert (boxes >= 0).all() and (boxes[:, 2:] <= torch.tensor([W, H])).all()


def test_find_motion_takes_flow_between_the_first_two_frames_of_each_tubelet_of_images_of_any_shape():
    seen, flow = [], torch.zeros(4, 1, 2, 128, 176)                             # of the two tubelets of two clips
    flow[:, :, 0, 20:60, 100:150] = 4.0
    clips = torch.arange(6, dtype=torch.uint8).view(1, 1, 6, 1, 1).expand(2, 3, 6, 128, 176)
    got, motion, boxes, found = find_motion(lambda pairs: seen.append(pairs) or flow, clips, 3)
    assert seen[0].shape == (4, 3, 2, 128, 176) and seen[0][:, 0, :, 0, 0].tolist() == [[0, 1], [3, 4]] * 2
    assert torch.equal(got, flow.view(2, 2, 2, 128, 176)) and motion.shape == (2, 128, 176) and found.all()
    assert (boxes - torch.tensor([100.0, 20, 150, 60])).abs().max() < 9


@pytest.mark.parametrize("side", [64, 128, 224])
def test_the_floor_is_the_height_of_a_lasting_edge_scaled_with_the_size_of_the_map(side):
    motion, edge = torch.zeros(2, side, side), 0.4 * side / 224                 # a step's gradient, summed across it
    motion[0, :, side // 2], motion[1, :, side // 2] = 0.9 * edge, 1.1 * edge
    assert motion_box(motion, side, floor=0.4)[1].tolist() == [False, True]


def test_the_box_depends_neither_on_the_strength_of_motion_nor_on_what_moves_everywhere_alike():
    motion = outline(40, 40, 8, 10, 30, 32)[None]
    box = motion_box(motion, 40)[0]
    torch.testing.assert_close(motion_box(7 * motion, 40)[0], box)
    torch.testing.assert_close(motion_box(motion + 0.7, 40)[0], box)            # as a zoom or a roll adds
    torch.testing.assert_close(motion_box(motion, 160)[0], 4 * box)
    for nothing in (torch.zeros(2, 20, 30), torch.full((1, 64, 64), 5.0)):
        boxes, found = motion_box(nothing, 60)
        assert not found.any() and (boxes == 0).all(), "and no NaN"


def test_a_second_motion_widens_the_box_unless_it_is_faint():
    motion = outline(64, 64, 20, 20, 44, 44)
    box = motion_box(motion[None], 64, relative=0.3)[0]
    motion[4:8, 4:8] = 0.1                                                      # below 0.3 of the maximum
    torch.testing.assert_close(motion_box(motion[None], 64, relative=0.3)[0], box)
    motion[4:8, 4:8] = 0.5                                                      # above it
    assert (motion_box(motion[None], 64, relative=0.3)[0][0, :2] < box[0, :2] - 5).all()


# ---- mask ------------------------------------------------------------------------------------------------------------

def slow_inside(box, found, grid, patch):
    """One bool per patch: does the box share any area with it?"""
    (x1, y1, x2, y2), (_, H, W) = box, grid
    return [bool(found) and min(x2, (c + 1) * patch) > max(x1, c * patch)
            and min(y2, (r + 1) * patch) > max(y1, r * patch) for r in range(H) for c in range(W)]


def random_boxes(count, height, width):
    """Boxes of all sizes, some reaching out of the frame, half of them on whole pixels."""
    a, b = np.random.default_rng(0).uniform(-0.2, 1.2, (2, count, 2)) * (width, height)
    boxes = np.hstack([np.minimum(a, b), np.maximum(a, b)])
    boxes[::2] = boxes[::2].round()
    boxes[:40, 2] = boxes[:40, 0]                                               # without area
    boxes[20:60, 3] = boxes[20:60, 1]
    return torch.from_numpy(boxes).float()


@pytest.mark.parametrize("grid, patch, ratio, inside_ratio", [
    ((8, 14, 14), 16, 0.9, 0.75), ((8, 8, 8), 8, 0.9, 0.75), ((2, 6, 10), 16, 0.75, 0.9), ((1, 5, 3), 8, 0.5, 0.0),
    ((3, 7, 7), 8, 0.6, 1.0), ((4, 10, 10), 8, 0.95, 0.29)])
def test_mask_has_exact_counts_in_all_and_the_specified_share_inside(grid, patch, ratio, inside_ratio):
    T, H, W = grid
    boxes, found = random_boxes(500, H * patch, W * patch), torch.arange(500) % 7 > 0
    hidden = motion_tube_mask(boxes, found, grid, ratio, inside_ratio, seeded(), patch)
    assert hidden.shape == (500, T * H * W) and hidden.dtype == torch.bool
    tubes = hidden.view(500, T, H * W)
    assert (tubes == tubes[:, :1]).all(), "the same at all times"
    area = (boxes[:, 2:] > boxes[:, :2]).all(1)                                 # without one it is no box
    assert torch.equal(hidden, motion_tube_mask(boxes, found & area, grid, ratio, inside_ratio, seeded(), patch))
    assert len({tuple(tube) for tube in tubes[:, 0].tolist()}) > (50 if H < 6 else 490), "another one for every clip"
    K, clamped = int(ratio * H * W), 0
    for box, has, tube in zip(boxes.tolist(), found.tolist(), tubes[:, 0].tolist()):
        inside = slow_inside(box, has, grid, patch)
        n_in, n_out = sum(inside), H * W - sum(inside)
        free = math.floor(inside_ratio * n_in)
        m_in = min(max(free, max(0, K - n_out)), min(n_in, K))
        clamped += m_in != free
        assert sum(tube) == K and (not n_in or sum(t for t, i in zip(tube, inside) if i) == m_in)
    assert 0 < clamped < 500, "the boxes are to try both cases"


@pytest.mark.parametrize("how", ["no box found", "inside_ratio none", "empty box"])
def test_without_a_box_every_tube_is_hidden_equally_often(how):
    grid, clips = (2, 6, 5), 6000
    boxes = torch.tensor([[0, 0, 40, 16.0]]).expand(clips, -1) * (how != "empty box")
    found = torch.full((clips,), how != "no box found")
    inside_ratio = None if how == "inside_ratio none" else 0.2
    hidden = motion_tube_mask(boxes, found, grid, 0.75, inside_ratio, seeded(), 8)[:, :30].float()
    share = 22 / 30                                                             # int(0.75 * 30) = 22
    assert (hidden.sum(1) == 22).all()
    assert (hidden.mean(0) - share).abs().max() < 4.5 * math.sqrt(share * (1 - share) / clips)
    pairs = torch.cov(hidden.T)[~torch.eye(30, dtype=torch.bool)]              # without replacement: a bit negative
    assert (pairs + share * (1 - share) / 29).abs().max() < 5.5 * share * (1 - share) / math.sqrt(clips)


def test_patches_inside_are_equally_likely_and_so_are_those_outside():
    grid, clips, box = (1, 8, 8), 6000, (16, 8, 40, 32)                         # 3 x 3 patches of 8 pixels
    boxes, found = torch.tensor([box]).float().expand(clips, -1), torch.ones(clips, dtype=torch.bool)
    hidden = motion_tube_mask(boxes, found, grid, 0.5, 0.75, seeded(), 8).float().mean(0)
    inside = torch.tensor(slow_inside(box, True, grid, 8))
    for side, share in ((inside, 6 / 9), (~inside, 26 / 55)):                   # floor(0.75 * 9) = 6 of K = 32
        assert (hidden[side] - share).abs().max() < 4.5 * math.sqrt(share * (1 - share) / clips)


def slow_target(clip, p, t):
    """clip (3, T, H, W) in [0, 1] -> (N, t*p*p*3), per patch and colour; order (time, row, column, colour)."""
    tokens = []
    for a in range(0, clip.shape[1], t):
        for b in range(0, clip.shape[2], p):
            for c in range(0, clip.shape[3], p):
                block = clip[:, a:a + t, b:b + p, c:c + p]
                colours = [(x - x.mean()) / (x.std(ddof=1) + 1e-6) for x in block]
                tokens.append(np.stack(colours, -1).reshape(-1))
    return np.stack(tokens)


@pytest.mark.parametrize("T, H, W, p, t", [(4, 8, 12, 4, 2), (2, 16, 8, 8, 1), (6, 6, 6, 2, 3)])
def test_pixel_target_equals_slow_loops_also_of_the_smallest_contrast(T, H, W, p, t):
    clips = torch.rand(2, 3, T, H, W, generator=seeded())
    clips[:, 0] = 2e-5 * clips[:, 0].round()                                    # 1e-6 is added to the deviation, not
    expected = np.stack([slow_target(c, p, t) for c in clips.double().numpy()])         # to the variance
    torch.testing.assert_close(pixel_target(clips, p, t), torch.from_numpy(expected).float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("T, H, W, p, t", [(4, 8, 12, 4, 2), (2, 16, 8, 8, 1)])
def test_patchify_has_the_specified_order_and_unpatchify_undoes_it(T, H, W, p, t):
    clips = torch.rand(2, 3, T, H, W, generator=seeded())
    tokens, grid = patchify(clips, p, t), (T // t, H // p, W // p)
    assert torch.equal(unpatchify(tokens, grid, p, t), clips)
    for n, (a, b, c) in enumerate(np.ndindex(grid)):                            # tokens in (t, h, w) order
        block = clips[:, :, a * t:a * t + t, b * p:b * p + p, c * p:c * p + p]
        assert torch.equal(tokens[:, n], block.flatten(1))


# ---- network ---------------------------------------------------------------------------------------------------------

def test_forward_encodes_the_visible_tokens_decodes_all_and_compares_the_hidden_with_their_pixels():
    model, (clips, hidden) = tiny(), tiny_input()
    prediction, masked = model.predict(clips, hidden)
    assert masked.tolist() == [[i for i in range(8) if h[i]] for h in hidden], "in increasing order"
    losses = []
    for clip, mask, rows in zip(clips, hidden, prediction):
        x = model.encoder.patch_embed.proj(clip[None]).flatten(2).transpose(1, 2)           # as a Conv3d
        z = (x + sincos_positions(8, 24))[:, ~mask]
        for block in model.encoder.blocks:
            z = block(z)
        z = model.encoder_to_decoder(model.encoder.norm(z))
        positions = sincos_positions(8, 12)
        z = torch.cat([z + positions[:, ~mask], model.mask_token + positions[:, mask]], 1)
        for block in model.decoder.blocks:
            z = block(z)
        torch.testing.assert_close(model.decoder.head(model.decoder.norm(z))[0, -5:], rows, atol=1e-5, rtol=0)
        target = slow_target((clip * STD + MEAN).double().numpy(), 8, 2)[mask]
        losses.append(np.mean((rows.detach().numpy() - target) ** 2))
    for count in (None, 5):
        again, loss = model(clips, hidden, count)
        assert torch.equal(again, prediction) and loss.item() == pytest.approx(np.mean(losses), rel=1e-4)
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


@pytest.mark.parametrize("name, millions", [
    ("vit_small", 24.03), ("vit_base", 94.21), ("vit_large", 343.0), ("vit_huge", 692.5)])
def test_parameter_counts_are_videomae_s(name, millions):
    with torch.device("meta"):
        model = MaskedAutoencoder(224, 16, 16, 2, **VITS[name])
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert model.encoder.grid == (8, 14, 14) and count == pytest.approx(millions, abs=0.0051 if count < 100 else 0.051)


def test_attention_is_a_softmax_with_biases_on_queries_and_values_only():
    torch.manual_seed(0)
    layer, x = Attention(12, 3), torch.randn(2, 5, 12)
    nn.init.normal_(layer.q_bias), nn.init.normal_(layer.v_bias)
    wq, wk, wv = layer.qkv.weight.chunk(3)
    out = torch.zeros(2, 5, 12)
    for b, head in np.ndindex(2, 3):
        d = slice(4 * head, 4 * head + 4)
        q, k, v = (x[b] @ wq.T + layer.q_bias)[:, d], (x[b] @ wk.T)[:, d], (x[b] @ wv.T + layer.v_bias)[:, d]
        out[b, :, d] = torch.softmax(q * 4 ** -0.5 @ k.T, -1) @ v
    torch.testing.assert_close(layer(x), layer.proj(out), atol=1e-5, rtol=0)


def test_block_is_pre_norm_with_exact_gelu():
    torch.manual_seed(0)
    block, x = Block(12, 3), torch.randn(2, 5, 12) * 1e-3                       # small, so that eps 1e-6 shows
    def norm(x, layer):
        deviation = (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return (x - x.mean(-1, keepdim=True)) / deviation * layer.weight + layer.bias
    y = x + block.attn(norm(x, block.norm1))
    h = block.mlp.fc1(norm(y, block.norm2))
    assert h.shape[-1] == 48
    expected = y + block.mlp.fc2(h * 0.5 * (1 + torch.erf(h / 2 ** 0.5)))
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=0)


def test_drop_path_drops_whole_branches_of_samples_and_grows_linearly_with_depth():
    torch.manual_seed(0)
    block, x = Block(12, 3, drop_path=0.5), torch.randn(64, 5, 12)
    kinds, out = [], block(x)
    for s, t in np.ndindex(2, 2):                                               # each branch is left out or doubled
        y = x + 2 * s * block.attn(block.norm1(x))
        kinds.append(torch.isclose(out, y + 2 * t * block.mlp(block.norm2(y)), atol=1e-5).all((1, 2)))
    assert (sum(kinds) == 1).all() and all(kind.any() for kind in kinds)
    y = x + block.attn(block.norm1(x))
    torch.testing.assert_close(block.eval()(x), y + block.mlp(block.norm2(y)))
    rates = [float(b.drop_path) for b in ViT(16, 4, 8, 2, 12, 5, 3, drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize("outputs", [{}, dict(position=32, shape=108)])        # VideoMAE's and MME's
def test_initial_weights_are_those_of_the_released_models(outputs):
    model = tiny(dim=96, decoder_dim=48, decoder_heads=3, outputs=outputs)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "encoder_to_decoder":       # Xavier; qkv is one matrix
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
    assert between.bias is None and sum("heads." in n for n, _ in model.named_parameters()) == 4 * len(outputs)
    token = tiny(decoder_dim=4096, decoder_depth=0, outputs=outputs).mask_token             # normal, cut at a deviation
    assert 0.0199 < token.abs().max() <= 0.02 and token.std().item() == pytest.approx(0.0108, rel=0.05)


def test_initial_weights_of_the_classifier_are_videomae_s():
    torch.manual_seed(0)
    model = ViT(16, 4, 8, 2, 192, 1, 3, num_classes=100)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            std = 0.02 * 0.001 if name == "head" else 0.02
            assert layer.weight.std().item() == pytest.approx(std, rel=0.05), name
            assert layer.bias is None or (layer.bias == 0).all(), name
    assert isinstance(model.norm, nn.Identity) and isinstance(ViT(16, 4, 8, 2, 12, 1, 3).head, nn.Identity)


# ---- crops -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width", [(240, 320), (320, 240), (224, 224), (222, 300), (300, 223), (1, 1)])
def test_multi_scale_crops_lie_inside_the_frame_and_snap(height, width):
    rng, boxes = np.random.default_rng(0), []
    for _ in range(300):
        x1, y1, x2, y2 = multi_scale_crop(height, width, rng, snap=224)
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        assert {x2 - x1, y2 - y1}.isdisjoint({222, 223, 225, 226}) or min(height, width) < 224
        boxes.append((x1, y1, x2, y2))
    x1, y1, x2, y2 = np.array(boxes).T
    assert min(x1) == min(y1) == 0 and max(x2) > width - 4 and max(y2) > height - 4         # up to all edges


@pytest.mark.parametrize("smallest, scales", [
    (0.66, [1, 0.875, 0.75, 0.66]), (1.0, [1]), (0.7, [1, 0.875, 0.75, 0.7]), (0.75, [1, 0.875, 0.75]),
    (0.4, [1, 0.875, 0.75, 0.66, 0.5, 0.4])])
def test_min_crop_is_the_smallest_side_of_a_crop(smallest, scales):
    rng, seen = np.random.default_rng(0), set()
    for _ in range(600):
        x1, y1, x2, y2 = multi_scale_crop(1000, 1000, rng, smallest)
        seen.add((x2 - x1, y2 - y1))
    sides = [int(1000 * s) for s in scales]
    assert seen == {(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1}


# ---- the whole method ------------------------------------------------------------------------------------------------

def toys(count, labels=(None,)):
    clips, truths = toy_clips(count, labels)
    return clips[:, :, :32:2], truths


def toy_mofo(flow="tvl1", inside_ratio=0.75):
    torch.manual_seed(0)
    flow = flow if callable(flow) else FlowEstimator(flow)
    return MOFO(flow, 0.9, inside_ratio, image_size=64, frames=16, patch_size=8, tubelet_size=2, dim=24, depth=1,
                heads=3, decoder_dim=12, decoder_depth=1, decoder_heads=1)


@pytest.mark.parametrize("size", [64, 48])
def test_the_box_covers_what_the_toy_sprite_sweeps(size):
    clips, truths = toys(64)
    _, _, _, boxes, found = toy_mofo(FlowEstimator("tvl1", size=size)).mask(clips)
    covered = []
    for truth, box, has in zip(truths, boxes.tolist(), found.tolist()):
        swept = np.zeros((64, 64), bool)
        for x1, y1, x2, y2 in truth["boxes"][:32:2].round().astype(int):
            swept[y1:y2, x1:x2] = True
        x1, y1, x2, y2 = (round(v) for v in box)
        covered.append(swept[y1:y2, x1:x2].sum() / swept.sum() if has else 0)
    assert np.mean(np.array(covered) >= 0.7) >= 0.9, np.sort(covered)[:12].round(2)
    area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).mean().item() / 64 ** 2
    assert area < 0.5, "covering everything is no feat"


def test_a_panning_camera_alone_gives_no_box():
    _, flow, _, _, found = toy_mofo().mask(toys(32, labels=(-1,))[0])
    assert flow.norm(dim=2).mean() > 0.05, "the pan is to be seen in the flow"
    assert found.float().mean() <= 0.05


def test_forward_gives_the_loss_of_its_own_mask_and_the_documented_stats():
    clips, model = toys(4)[0], toy_mofo()
    loss, stats = model(clips, seeded())
    hidden, flow, motion, boxes, found = model.mask(clips, seeded())
    assert hidden.shape == (4, 512) and (hidden.sum(1) == 8 * 57).all()         # int(0.9 * 64) = 57
    assert flow.shape == (4, 8, 2, 64, 64) and motion.shape == (4, 64, 64) and boxes.shape == (4, 4)
    expected = MaskedAutoencoder.forward(model, normalize(clips), hidden)[1]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) / 64 ** 2 for b, f in zip(boxes.tolist(), found) if f]
    assert stats["with_box"] == found.float().mean() and stats["box_area"].item() == pytest.approx(np.mean(areas))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_autocast_changes_neither_the_map_nor_the_mask():
    clips, model = toys(8)[0], toy_mofo()
    exact = model.mask(clips, seeded())
    with torch.autocast("cpu", torch.bfloat16):                                 # as in the training loop on a GPU
        rounded = model.mask(clips, seeded())
    for a, b in zip(exact, rounded):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_inside_ratio_none_ignores_the_motion_and_needs_no_flow():
    clips = toys(4)[0]
    still = toy_mofo(lambda x: torch.zeros(len(x), 1, 2, 64, 64))
    baseline = toy_mofo(inside_ratio=None)
    baseline.flow = None                                                        # as `main` makes it
    mask = baseline.mask(clips, seeded())
    assert torch.equal(mask[0], still.mask(clips, seeded())[0])
    assert toy_mofo().mask(clips)[4].any() and not torch.equal(toy_mofo().mask(clips, seeded())[0], mask[0])
    loss, stats = baseline(clips, seeded())
    assert loss == still(clips, seeded())[0] and stats["with_box"] == stats["box_area"] == 0
