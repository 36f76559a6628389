"""MoDist against slow loops from the specification, vectors whose losses are known, and videos that tell their frames."""
import copy
import inspect
import itertools
import json
import math
import signal
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import modist
from common import (FlowEstimator, Item, ResNet3D, RowGenerator, Video, collate, load_weights, make_backbone,
                    make_optimizer, parse_config, resume_or_init, spatial_gradient, to_device, to_float01, unnormalize)
from modist import RECIPES, Config, MoDist, flow_edges, info_nce, motion_maps, preview, projection, sample_clips, two_starts
from conftest import SHARED, error_of, numbers, seeded, tiny_video

torch.set_num_threads(1)
CPU = torch.device("cpu")
VIT = dict(image_size=16, frames=4, patch_size=8, tubelet_size=2, dim=24, depth=1, heads=3)
ROOT2 = math.sqrt(2)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def clips_uint8(clips=8, frames=5, size=16, seed=0):
    return (noise(clips, 3, frames, size, size, seed=seed) * 255).byte()


def config(*argv):
    return parse_config(Config, RECIPES, [str(a) for a in argv])


# ---- stubs -------------------------------------------------------------------------------------------------------------

class Net(nn.Module):
    """Vectors (B, inputs) -> (B, dim)."""

    def __init__(self, inputs=5, dim=6, norm=False):
        super().__init__()
        self.dim, self.layer, self.norm = dim, nn.Linear(inputs, dim), nn.BatchNorm1d(dim) if norm else nn.Identity()

    def forward(self, x):
        return self.norm(self.layer(x))


class Eye(nn.Identity):
    """What comes in is the embedding, but for its length."""
    dim = 4


class Blocks(nn.Module):
    """Clips (B, 3, T, H, W) -> (B, dim), place and time matter."""
    config = {}

    def __init__(self, inputs, dim=32, norm=False):
        super().__init__()
        self.dim, self.layer, self.norm = dim, nn.Linear(inputs, dim), nn.BatchNorm1d(dim) if norm else nn.Identity()

    def forward(self, x):
        return self.norm(self.layer(F.adaptive_avg_pool3d(x, (x.shape[2], 8, 8)).flatten(1))).relu()


class Flow:
    """Any old flow (B, T - 1, 2, h, w) that depends on the clip; it remembers what it was called with."""

    def __init__(self):
        self.seen = []

    def __call__(self, clips):
        self.seen.append(clips)
        x = to_float01(clips)
        return 7 * x[:, :2].diff(dim=2).transpose(1, 2) + 3


def vectors_model(norm=False, seed=0, eye=False, motion=True, **changes):
    """A model of vectors, the keys of which differ from the queries; `inputs` is to be replaced."""
    torch.manual_seed(seed)
    encoder, other = (Eye(), Eye()) if eye else (Net(norm=norm), Net(dim=7, norm=norm))
    settings = {**dict(queue=16, momentum=0.75, outputs=4, temperature=0.2), **changes}
    model = MoDist(encoder, other if motion else None, None, **settings)
    if eye:
        for name in ("head", "motion_head")[:1 + motion]:
            setattr(model, name, nn.Identity())
            model.keys[name] = nn.Identity()
    else:
        for name, p in model.named_parameters():
            if name.startswith("keys.") or "head" in name:                     # heads: off the tiny init
                p.data.add_(0.1 * torch.randn(p.shape))
    return model


def given(model, v1, v2, m1=None, m2=None):
    """Lets the model have these inputs, whatever the clips."""
    model.inputs = lambda clips, generator: ((v1, v2), (m1, m2))
    return model


def vectors(B=4, D=5, seed=0):
    """v1, v2, m1, m2 (B, D), related, so that the losses differ from chance."""
    base = normal(B, D, seed=seed)
    return [base + 0.7 * normal(B, D, seed=seed + 1 + i) for i in range(4)]


def pixels_model(frames=5, motion_input="frame_diff", flow=None, seed=0, motion=True, norm=False, **changes):
    """A model of clips of `frames` frames of which every 2nd of the first frames - 1 are RGB's."""
    torch.manual_seed(seed)
    encoder = Blocks(3 * ((frames - 1) // changes.get("rgb_step", 2)) * 64, norm=norm)
    other = Blocks(3 * (frames - 1) * 64, norm=norm) if motion else None
    return MoDist(encoder, other, flow, motion_input=motion_input, **{**dict(queue=16, outputs=8), **changes})


# ---- gradients and flow edges ------------------------------------------------------------------------------------------

def slow_derivatives(a, middle):
    """Rows of numbers -> d/dx, d/dy by an explicit 3 x 3 correlation, the border replicated."""
    H, W = len(a), len(a[0])
    column = [[-1, 0, 1], [-middle, 0, middle], [-1, 0, 1]]
    def at(i, j):
        return a[min(max(i, 0), H - 1)][min(max(j, 0), W - 1)]
    dx, dy = [[0.0] * W for _ in range(H)], [[0.0] * W for _ in range(H)]
    for i, j, k, l in product(range(H), range(W), range(3), range(3)):
        dx[i][j] += column[k][l] * at(i + k - 1, j + l - 1) / (4 + 2 * middle)
        dy[i][j] += column[l][k] * at(i + k - 1, j + l - 1) / (4 + 2 * middle)
    return dx, dy


def slow_edges(u, v, clip):
    (ux, uy), (vx, vy) = slow_derivatives(u, 2), slow_derivatives(v, 2)
    return [[min(math.sqrt(ux[i][j] ** 2 + uy[i][j] ** 2 + vx[i][j] ** 2 + vy[i][j] ** 2), clip) / clip
             for j in range(len(u[0]))] for i in range(len(u))]


def field(u, v):
    return torch.stack([u, v])[None, None]                                      # (1, 1, 2, h, w)


def grid(h=7, w=9):
    y, x = torch.meshgrid(torch.arange(h) - 2.0, torch.arange(w) - 3.0, indexing="ij")
    return x, y


def inside(edges):
    return edges[..., 1:-1, 1:-1]


@pytest.mark.parametrize("middle", [1, 2])
@pytest.mark.parametrize("shape", [(4, 5), (3, 1, 6), (2, 2, 3, 7), (1, 1)])
def test_spatial_gradient_is_a_correlation(middle, shape):
    maps = normal(*shape)
    got = spatial_gradient(maps, middle=middle)
    assert got.shape == (*shape[:-2], 2, *shape[-2:])
    for one, expected in zip(got.reshape(-1, 2, *shape[-2:]), maps.reshape(-1, *shape[-2:])):
        torch.testing.assert_close(one, torch.tensor(slow_derivatives(expected.tolist(), middle)), atol=1e-5, rtol=1e-5)


def test_spatial_gradient_is_prewitt_unless_told():
    maps = normal(2, 5, 6)
    assert torch.equal(spatial_gradient(maps), spatial_gradient(maps, middle=1))
    assert not torch.allclose(spatial_gradient(maps), spatial_gradient(maps, middle=2))


@pytest.mark.parametrize("clip", [0.3, 1.0, 2.5])
def test_flow_edges_equal_a_loop_over_the_pixels(clip):
    flow = 2 * normal(2, 3, 2, 6, 7)
    got = flow_edges(flow, clip)
    assert got.shape == (2, 3, 6, 7)
    for b, t in product(range(2), range(3)):
        expected = torch.tensor(slow_edges(*flow[b, t].tolist(), clip))
        torch.testing.assert_close(got[b, t], expected, atol=1e-5, rtol=1e-5)


def test_flow_edges_of_known_motion():
    x, y = grid()
    zero = torch.zeros_like(x)
    assert (flow_edges(field(zero + 3.5, zero - 40)) == 0).all()
    for a in (0.05, 0.3, -0.3):
        torch.testing.assert_close(inside(flow_edges(field(a * x, zero))), torch.full((1, 1, 5, 7), abs(a)))
        torch.testing.assert_close(inside(flow_edges(field(zero, a * x))), torch.full((1, 1, 5, 7), abs(a)))
        torch.testing.assert_close(inside(flow_edges(field(-a * y, a * x))), torch.full((1, 1, 5, 7), abs(a) * ROOT2))
        torch.testing.assert_close(inside(flow_edges(field(a * x, a * y))), torch.full((1, 1, 5, 7), abs(a) * ROOT2))


def test_flow_edges_do_not_know_pan_sign_or_direction():
    flow = 0.4 * normal(2, 2, 2, 8, 9)
    edges = flow_edges(flow, 3.0)
    assert edges.min() > 0 and edges.std() > 0.01
    u, v = flow.unbind(2)
    for other in (-flow, torch.stack([-v, u], 2), torch.stack([v, u], 2), flow + torch.tensor([9.0, -4.0]).view(2, 1, 1)):
        torch.testing.assert_close(flow_edges(other, 3.0), edges, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flow_edges(flow.flip(-1), 3.0), edges.flip(-1))
    torch.testing.assert_close(flow_edges(flow.transpose(-1, -2), 3.0), edges.transpose(-1, -2))


def test_flow_edges_are_cut_and_scaled():
    flow = 5 * normal(2, 2, 2, 8, 9)
    edges = flow_edges(flow, 1.5)
    assert edges.min() >= 0 and edges.max() == 1 and ((edges > 0) & (edges < 1)).any()
    assert torch.equal(flow_edges(flow), flow_edges(flow, 1.0))
    assert flow_edges(1e4 * flow, 0.5).isfinite().all() and (flow_edges(flow, 1e6) < 1e-4).all()
    huge = flow_edges(flow, 1e6) * 1e6
    torch.testing.assert_close((huge / 1.5).clamp(max=1), edges, atol=1e-5, rtol=1e-4)


# ---- motion maps -------------------------------------------------------------------------------------------------------

def test_frame_differences_equal_numpy_and_need_no_flow():
    clips = clips_uint8(2, 4, 6)
    values = clips.numpy().astype(float) / 255
    expected = np.abs(values[:, :, 1:] - values[:, :, :-1]).mean(1)
    for x in (clips, to_float01(clips)):
        maps = motion_maps(x, None, "frame_diff")
        assert maps.shape == (2, 3, 3, 6, 6) and maps.dtype == torch.float32
        for channel in maps.unbind(1):
            assert np.allclose(channel.numpy(), expected, atol=1e-6)
    flow = Flow()
    motion_maps(clips, flow, "frame_diff")
    assert not flow.seen


def test_flow_edge_maps_are_the_edges_three_times():
    clips, flow = clips_uint8(2, 4, 6), Flow()
    maps = motion_maps(clips, flow, "flow_edge", 2.0)
    assert maps.shape == (2, 3, 3, 6, 6) and len(flow.seen) == 1 and torch.equal(flow.seen[0], clips)
    for b, t in product(range(2), range(3)):
        u, v = Flow()(clips)[b, t].tolist()
        for channel in range(3):
            torch.testing.assert_close(maps[b, channel, t], torch.tensor(slow_edges(u, v, 2.0)), atol=1e-4, rtol=1e-4)
    assert torch.equal(motion_maps(clips, flow), motion_maps(clips, flow, "flow_edge", 1.0))


@pytest.mark.parametrize("w", [11, 22])
def test_flow_maps_are_scaled_by_the_width_and_cut(w):
    field = 3 * normal(2, 3, 2, 4, w)
    maps = motion_maps(clips_uint8(2, 4, 8), lambda clips: field, "flow")
    assert maps.shape == (2, 3, 3, 4, w) and maps.min() == -1 and maps.max() == 1
    for b, t, i, j in product(range(2), range(3), range(4), range(w)):
        u, v = field[b, t, :, i, j].tolist()
        for channel, value in enumerate((u, v, math.sqrt(u * u + v * v))):
            assert maps[b, channel, t, i, j].item() == pytest.approx(min(max(value * 11 / w, -1), 1), abs=1e-5)


@pytest.mark.parametrize("shift", [1, 2])
def test_a_moving_square_shows_on_its_border_and_a_pan_does_not(shift):
    """With TV-L1: the whole picture pans, a square moves against it."""
    ground, clips = F.interpolate(noise(1, 3, 14, 14), (80, 80), mode="bilinear")[0], []
    square = noise(3, 4, 4, seed=1).repeat_interleave(4, 1).repeat_interleave(4, 2)
    for t, moving in product(range(3), (True, False)):
        frame = ground[:, 8:56, 8 + t:56 + t].clone()                           # moves by -1 px in x
        if moving:
            frame[:, 16:32, 14 + shift * t:30 + shift * t] = square
        clips.append(frame)
    clips = torch.stack(clips).view(3, 2, 3, 48, 48).permute(1, 2, 0, 3, 4)
    edges = motion_maps(clips, FlowEstimator("tvl1"), "flow_edge", 1.0)[:, 0]
    border = torch.zeros(48, 48)
    border[12:36, 10:36] = 1
    border[20:28, 20:26] = 0
    near, far = (edges[0] * border).sum() / (2 * border.sum()), edges[0, :, 40:].mean()
    assert near > 2.5 * far and near > 2.5 * edges[1, :, 4:-4, 4:-4].mean()


# ---- loss --------------------------------------------------------------------------------------------------------------

def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def slow_nce(queries, keys, negatives, T):
    """Mean over pairs of -log e^(qk/T) / (e^(qk/T) + sum_n e^(qn/T)); lists of vectors."""
    total = 0.0
    for q, k in zip(queries, keys):
        own = math.exp(dot(q, k) / T)
        total -= math.log(own / (own + sum(math.exp(dot(q, n) / T) for n in negatives)))
    return total / len(queries)


def ball(*shape, seed=0):
    return F.normalize(normal(*shape, seed=seed), dim=1)


@pytest.mark.parametrize("T", [0.07, 0.1, 0.5])
def test_info_nce_equals_a_loop(T):
    query, key, negatives = ball(5, 4), ball(5, 4, seed=1), ball(11, 4, seed=2)
    expected = slow_nce(query.tolist(), key.tolist(), negatives.tolist(), T)
    assert info_nce(query, key, negatives, T).item() == pytest.approx(expected, rel=1e-5)


def test_info_nce_of_known_similarities():
    K, one = 65536, torch.eye(4)[:2]
    zeros = torch.zeros(K, 4)
    assert info_nce(one, torch.zeros(2, 4), zeros, 0.1).item() == pytest.approx(11.0904, abs=1e-4)      # log(K + 1)
    assert info_nce(one, one, zeros, 0.1).item() == pytest.approx(1.3801, abs=1e-4)
    expected = (math.log(8) + math.log1p(7 * math.exp(-10))) / 2                # a query equal to all negatives, one unlike them
    assert info_nce(one, one, one[:1].expand(7, 4), 0.1).item() == pytest.approx(expected, rel=1e-5)


def test_info_nce_of_extreme_values_is_finite_and_exact():
    one = torch.eye(4)[:2].requires_grad_()
    for key, negatives, expected in ((-one, one[:1].expand(3, 4), (2e4 + math.log(3) + 1e4 + math.log(3)) / 2),
                                     (one, -one[:1].expand(3, 4), 0.0)):
        loss = info_nce(one, key.detach(), negatives.detach(), 1e-4)
        assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert torch.autograd.grad(loss, one)[0].isfinite().all()


# ---- the networks ------------------------------------------------------------------------------------------------------

def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_parameters_are_as_many_as_published():
    with torch.device("meta"):
        visual, labelled = make_backbone("slow_r50"), make_backbone("slow_r50", num_classes=101)
        motion = ResNet3D("motion_r50", 1 / 8)
        assert count(visual) == 31_672_128 and count(labelled) == 31_879_077
        assert count(visual, projection(visual.dim)) == 36_130_752
        assert motion.dim == 256 and count(motion, projection(motion.dim)) == 1_167_464


def test_shapes_of_both_pathways():
    with torch.device("meta"):
        visual, motion = make_backbone("slow_r50", 224, 8), ResNet3D("motion_r50", 1 / 8, 224, 16)
        assert visual.forward_map(torch.zeros(2, 3, 8, 224, 224)).shape == (2, 2048, 4, 7, 7)
        assert motion.forward_map(torch.zeros(2, 3, 16, 224, 224)).shape == (2, 256, 8, 7, 7)
        assert motion(torch.zeros(2, 3, 16, 224, 224)).shape == (2, 256)


def test_temporal_kernels_of_both_pathways():
    with torch.device("meta"):
        for net, expected in ((make_backbone("slow_r50"), {1: 1, 2: 1, 3: 3, 4: 3}),
                              (ResNet3D("motion_r50", 1 / 8), {1: 1, 2: 1, 3: 1, 4: 1})):
            for name, module in net.named_modules():
                if isinstance(module, nn.Conv3d) and not name.startswith("stem"):
                    assert module.kernel_size[0] == (expected[int(name[5])] if name.endswith("conv1") else 1), name
                    assert module.stride[0] == 1
            assert net.stem.conv1.kernel_size == (5, 7, 7) and net.stem.conv1.stride == (2, 2, 2)


def test_heads_start_as_released():
    torch.manual_seed(0)
    head = projection(256)
    first, second = [m for m in head if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in (first, second)] == [(256, 2048), (2048, 128)]
    for layer in (first, second):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02) and abs(layer.weight.mean()) < 1e-4
        assert (layer.bias == 0).all()
    x = normal(3, 256)
    expected = (x @ first.weight.T).clamp(min=0) @ second.weight.T
    torch.testing.assert_close(head(x), expected, atol=1e-6, rtol=1e-4)
    model = vectors_model(outputs=9)
    assert (model.head[-1].out_features, model.motion_head[-1].out_features) == (9, 9)
    assert (model.head[0].in_features, model.motion_head[0].in_features) == (6, 7)


# ---- forward -----------------------------------------------------------------------------------------------------------

def embed(model, x, name, keys=False):
    """Embeddings as lists, one by one; name encoder or motion."""
    net, head = ((model.keys[n] if keys else getattr(model, n)) for n in (name, dict(encoder="head", motion="motion_head")[name]))
    out = []
    with torch.no_grad():
        for row in x:
            z = head(net(row[None]))[0]
            out.append((z / z.square().sum().sqrt()).tolist())
    return out


@pytest.mark.parametrize("cross_weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("motion_motion", [False, True])
def test_loss_equals_a_plain_computation(cross_weight, motion_motion):
    model, (v1, v2, m1, m2) = vectors_model(cross_weight=cross_weight, motion_motion=motion_motion), vectors()
    given(model, *vectors(6, seed=20))(torch.zeros(1))                          # something in the queues
    Qv, Qm = model.queue.keys.tolist(), model.motion_queue.keys.tolist()
    loss, stats = given(model, v1, v2, m1, m2)(torch.zeros(1))

    zv, zm = embed(model, v1, "encoder"), embed(model, m1, "motion")
    kv, km = embed(model, v2, "encoder", True), embed(model, m2, "motion", True)
    rgb, cross = slow_nce(zv, kv, Qv, 0.2), slow_nce(zv, km, Qm, 0.2) + slow_nce(zm, kv, Qv, 0.2)
    motion = slow_nce(zm, km, Qm, 0.2)
    assert loss.item() == pytest.approx(rgb + cross_weight * cross + motion_motion * motion, rel=1e-5)
    assert stats["rgb"].item() == pytest.approx(rgb, rel=1e-5) and stats["cross"].item() == pytest.approx(cross, rel=1e-5)
    assert ("motion" in stats) == motion_motion and len({round(x, 3) for x in (rgb, cross / 2, motion)}) == 3
    if motion_motion:
        assert stats["motion"].item() == pytest.approx(motion, rel=1e-5)
    for name, query in (("top1", zv), ("cross_top1", zm)):
        right = [max(range(4), key=lambda j: dot(q, kv[j])) == i for i, q in enumerate(query)]
        assert stats[name].item() == pytest.approx(100 * np.mean(right))
    assert set(stats) == {"rgb", "cross", "top1", "cross_top1", *["motion"] * motion_motion}
    assert not any(x.requires_grad for x in stats.values()) and loss.ndim == 0

    for queue, keys, before in ((model.queue, kv, Qv), (model.motion_queue, km, Qm)):               # each into its own
        assert queue.pointer == 10 and torch.equal(queue.keys[10:], torch.tensor(before)[10:])
        torch.testing.assert_close(queue.keys[6:10], torch.tensor(keys), atol=1e-5, rtol=1e-5)
        assert torch.equal(queue.keys[:6], torch.tensor(before)[:6])


def test_without_a_motion_network_it_is_moco():
    model, (v1, v2, *_) = vectors_model(motion=False), vectors()
    Qv = model.queue.keys.tolist()
    loss, stats = given(model, v1, v2)(torch.zeros(1))
    expected = slow_nce(embed(model, v1, "encoder"), embed(model, v2, "encoder", True), Qv, 0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-5) and set(stats) == {"rgb", "top1"}
    assert model.queue.pointer == 4 and not [n for n in model.state_dict() if "motion" in n]
    frames = pixels_model(motion=False, motion_input="flow_edge")
    rgb, maps = frames.inputs(clips_uint8(), seeded())                          # and there is no flow to compute
    assert maps == (None, None) and [x.shape for x in rgb] == [(4, 3, 2, 16, 16)] * 2
    frames(clips_uint8(), seeded())[0].backward()


def test_with_exchanged_modalities_the_cross_loss_is_the_same():
    model, (v1, v2, m1, m2) = vectors_model(), vectors()
    other = copy.deepcopy(model)
    for a, b in (("encoder", "motion"), ("head", "motion_head")):
        for networks in (other._modules, other.keys._modules):
            networks[a], networks[b] = networks[b], networks[a]
    other.queue, other.motion_queue = other.motion_queue, other.queue
    first, stats = given(model, v1, v2, m1, m2)(torch.zeros(1))
    second, swapped = given(other, m1, m2, v1, v2)(torch.zeros(1))
    assert swapped["cross"].item() == pytest.approx(stats["cross"].item(), rel=1e-5)
    assert swapped["rgb"].item() != pytest.approx(stats["rgb"].item(), rel=1e-3)
    for a, b in ((model.queue, other.motion_queue), (model.motion_queue, other.queue)):
        torch.testing.assert_close(a.keys, b.keys)


def test_the_same_network_and_inputs_for_both_give_the_same_loss_in_every_direction():
    model, (v1, v2, *_) = vectors_model(motion_motion=True), vectors()
    for name in ("motion", "motion_head"):
        twin = dict(motion="encoder", motion_head="head")[name]
        setattr(model, name, copy.deepcopy(getattr(model, twin)))
        model.keys[name] = copy.deepcopy(model.keys[twin])
    model.motion_queue = copy.deepcopy(model.queue)
    _, stats = given(model, v1, v2, v1, v2)(torch.zeros(1))
    assert stats["cross"].item() == pytest.approx(2 * stats["rgb"].item(), rel=1e-5)
    assert stats["motion"].item() == pytest.approx(stats["rgb"].item(), rel=1e-5)
    assert stats["top1"] == stats["cross_top1"] and torch.equal(model.queue.keys, model.motion_queue.keys)


def test_every_term_gets_unit_vectors_its_own_queue_and_the_temperature(monkeypatch):
    model, calls = vectors_model(motion_motion=True), []
    before = [model.queue.keys.clone(), model.motion_queue.keys.clone()]
    monkeypatch.setattr(modist, "info_nce", lambda *args: calls.append(args) or info_nce(*args))
    given(model, *vectors(D=5))(torch.zeros(1))
    assert len(calls) == 4
    for query, key, negatives, T in calls:
        for x in (query, key):
            torch.testing.assert_close(x.norm(dim=1), torch.ones(4))
        assert query.requires_grad and not key.requires_grad and not negatives.requires_grad and T == 0.2
    assert all(torch.equal(c[2], before[i]) for c, i in zip(calls, (0, 1, 0, 1)))


@pytest.mark.parametrize("motion_motion", [False, True])
def test_gradients_equal_those_of_a_plain_computation(motion_motion):
    """Also: backward is after enqueue, and must not notice."""
    model = vectors_model(cross_weight=0.7, motion_motion=motion_motion)
    (v1, v2, m1, m2), other = vectors(), copy.deepcopy(model)
    given(model, v1, v2, m1, m2)(torch.zeros(1))[0].backward()

    def nce(z, k, Q):
        logits = torch.cat([(z * k).sum(1, keepdim=True), z @ Q.T], 1) / 0.2
        return F.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    zv, zm = (F.normalize(h(n(x))) for n, h, x in ((other.encoder, other.head, v1), (other.motion, other.motion_head, m1)))
    kv, km = (F.normalize(other.keys[h](other.keys[n](x))).detach() for n, h, x in
              (("encoder", "head", v2), ("motion", "motion_head", m2)))
    Qv, Qm = other.queue.keys, other.motion_queue.keys
    loss = nce(zv, kv, Qv) + 0.7 * (nce(zv, km, Qm) + nce(zm, kv, Qv)) + motion_motion * nce(zm, km, Qm)
    loss.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if name.startswith("keys."):
            assert p.grad is None and not p.requires_grad, name
        else:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-3)
            assert p.grad.abs().max() > 0, name
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"encoder", "head", "motion", "motion_head"}


@pytest.mark.parametrize("order, mixed, top1, cross_top1", [
    ([0, 1, 2, 3], [0, 1, 2, 3], 100, 100), ([1, 0, 2, 3], [0, 1, 2, 3], 50, 100), ([0, 1, 2, 3], [1, 2, 3, 0], 100, 0),
    ([3, 1, 2, 0], [0, 2, 1, 3], 50, 50), ([1, 2, 0, 3], [0, 0, 0, 0], 25, 25)])
def test_top1_of_constructed_embeddings(order, mixed, top1, cross_top1):
    """The second moment of video i is the unit vector i; the queries point at those of `order` and `mixed`."""
    model, eye = vectors_model(eye=True), torch.eye(4)
    query, motion = 3 * eye[order] + 0.1, 0.5 * eye[mixed] + 0.01
    _, stats = given(model, query, 9 * eye, motion, eye.flip(0))(torch.zeros(1))
    assert (stats["top1"].item(), stats["cross_top1"].item()) == (top1, cross_top1)


def test_top1_asks_which_second_moment_is_next_to_a_first_one_and_not_the_reverse():
    model, eye = vectors_model(eye=True), torch.eye(4)
    queries = torch.stack([0.8 * eye[0] + 0.6 * eye[1], eye[0], eye[2], eye[3]])                    # their nearest: 0, 0, 2, 3
    _, stats = given(model, queries, eye, queries.flip(0), eye.flip(0))(torch.zeros(1))
    assert (stats["top1"].item(), stats["cross_top1"].item()) == (75, 0)        # nearest to the keys: 1, 0, 2, 3


def test_own_keys_are_not_among_the_negatives_of_the_step():
    model, eye = vectors_model(eye=True, temperature=0.1), torch.eye(4)
    model.queue.keys.zero_()
    model.motion_queue.keys.zero_()
    loss, stats = given(model, eye, eye, eye, eye)(torch.zeros(1))
    assert loss.item() == pytest.approx(3 * math.log(1 + 16 * math.exp(-10)), rel=1e-3)
    again, _ = given(model, eye, eye, eye, eye)(torch.zeros(1))
    expected = math.log(1 + (12 + 3 + math.exp(10)) * math.exp(-10))            # now they are, once
    assert again.item() == pytest.approx(3 * expected, rel=1e-4)


def test_keys_are_encoded_with_running_statistics_and_queries_with_those_of_the_batch():
    model, inputs = vectors_model(norm=True), vectors(6)
    for net in (model.keys["encoder"], model.keys["motion"]):
        net.norm.running_mean.fill_(0.3)
        net.norm.running_var.fill_(2.0)
    state = copy.deepcopy(model.keys.state_dict())
    given(model.train(), *inputs)(torch.zeros(1))
    together = [q.keys[:6].clone() for q in (model.queue, model.motion_queue)]
    for queue in (model.queue, model.motion_queue):
        queue.pointer.zero_()
    moved = model.encoder.norm.running_mean.clone(), model.motion.norm.running_mean.clone()
    assert all(m.abs().max() > 0 for m in moved) and model.encoder.training and model.motion.training
    given(model.train(), *[x[2:4] for x in inputs])(torch.zeros(1))
    for queue, all_keys in zip((model.queue, model.motion_queue), together):
        torch.testing.assert_close(queue.keys[:2], all_keys[2:4])
    assert all(torch.equal(v, state[k]) for k, v in model.keys.state_dict().items())


def test_autocast_reaches_neither_the_inputs_nor_the_losses(monkeypatch):
    rounded, rgb, maps, losses = [], [], [], []

    def nce(query, key, *rest):
        rounded.append((torch.is_autocast_enabled("cpu"), query.dtype, key.dtype))
        return info_nce(query, key, *rest)
    monkeypatch.setattr(modist, "info_nce", nce)
    monkeypatch.setattr(modist, "normalize", lambda x, config: rgb.append(common.normalize(x, config)) or rgb[-1])
    monkeypatch.setattr(modist, "motion_maps", lambda *args: maps.append(motion_maps(*args)) or maps[-1])
    for enabled in (False, True):
        model = pixels_model(seed=3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, stats = model(clips_uint8(), seeded())
        losses.append(loss.item())
        assert loss.dtype == stats["cross"].dtype == model.queue.keys.dtype == model.motion_queue.keys.dtype == torch.float32
    assert rounded == [(False, torch.float32, torch.float32)] * 6 and torch.equal(*maps) and maps[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(rgb[:2], rgb[2:], strict=True)) and rgb[3].dtype == torch.float32
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[1] != losses[0]


def test_autocast_does_not_reach_top1():
    near = F.normalize(1 + 0.02 * normal(64, 4), dim=1)                         # as embeddings are in the beginning
    with torch.autocast("cpu", torch.bfloat16):
        _, stats = given(vectors_model(eye=True), near, near, near, near)(torch.zeros(1))
    assert (stats["top1"].item(), stats["cross_top1"].item()) == (100, 100)


# ---- key encoders ------------------------------------------------------------------------------------------------------

def test_keys_start_as_copies_that_are_not_trained():
    torch.manual_seed(0)
    model = MoDist(Net(norm=True), Net(dim=7), None, queue=8)
    assert set(model.keys) == {"encoder", "head", "motion", "motion_head"} and model.updates == 0
    for name, value in model.keys.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
        assert value.data_ptr() != model.state_dict()[name].data_ptr()
    assert not any(p.requires_grad for p in model.keys.parameters())
    assert (model.queue.keys.shape, model.motion_queue.keys.shape) == ((8, 128), (8, 128))
    assert not torch.equal(model.queue.keys, model.motion_queue.keys)


def test_keys_follow_all_four_networks_after_a_step_of_the_optimiser():
    model, inputs = vectors_model(norm=True, momentum=0.9), vectors(6)
    optimizer = make_optimizer("sgd", model, 0.5, 1e-4, CPU, nesterov=True)
    optimizer.register_step_post_hook(lambda *_: model.update_keys())
    slow, statistics = {n: p.detach().double() for n, p in model.keys.named_parameters()}, []
    for step in range(3):
        given(model, *inputs)(torch.zeros(1))[0].backward()
        for name, value in model.keys.named_parameters():                       # neither forward nor backward moves a key
            torch.testing.assert_close(value.detach().double(), slow[name], atol=1e-6, rtol=1e-6)
        optimizer.step()
        optimizer.zero_grad()
        now = model.state_dict()
        for name in slow:
            slow[name] = 0.9 * slow[name] + 0.1 * now[name].double()
            torch.testing.assert_close(model.keys.state_dict()[name].double(), slow[name], atol=1e-6, rtol=1e-6)
        statistics.append(now["motion.norm.running_var"].clone())
    assert model.updates == 3
    torch.testing.assert_close(model.keys["motion"].norm.running_var, sum(statistics) / 3)
    names = {n.split(".")[0] for n in slow if not torch.equal(now[n], model.keys.state_dict()[n])}
    assert names == {"encoder", "head", "motion", "motion_head"}


def test_momentum_zero_copies_and_the_default_is_the_model_s():
    model = vectors_model(norm=True)
    before = copy.deepcopy(model.keys.state_dict())
    given(model, *vectors(6))(torch.zeros(1))                                   # moves the queries' running statistics
    model.update_keys()
    for name, p in model.keys.named_parameters():
        torch.testing.assert_close(p.data, 0.75 * before[name] + 0.25 * model.state_dict()[name])
    model.updates.fill_(50)
    model.update_keys(momentum=0)
    for name, value in model.keys.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, model.state_dict()[name]), name


def test_a_saved_model_goes_on_exactly():
    model, other = (pixels_model(seed=seed, motion_motion=True) for seed in (0, 1))
    model(clips_uint8(), seeded())
    model.update_keys()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    results = [[m(clips_uint8(seed=s), seeded(s))[0].item() for s in (1, 2)] for m in (model, other)]
    assert results[0] == results[1] and torch.equal(model.motion_queue.keys, other.motion_queue.keys)


# ---- what the networks get ---------------------------------------------------------------------------------------------

def marked(videos=2, frames=9, size=12):
    """Frame t of moment m of every video is grey t^2 + 100 m: neighbours differ by 2 t + 1."""
    clips = torch.zeros(2 * videos, 3, frames, size, size, dtype=torch.uint8)
    for i, t in product(range(2 * videos), range(frames)):
        clips[i, :, t] = t * t + 100 * (i % 2)
    return clips


@pytest.mark.parametrize("frames, step, expected", [(9, 2, [0, 2, 4, 6]), (9, 4, [0, 4]), (9, 1, range(8)), (5, 2, [0, 2]),
                                                    (9, 8, [0])])
def test_rgb_gets_every_nth_frame_but_the_last_and_motion_every_pair(frames, step, expected):
    model = pixels_model(frames, rgb_step=step, colour=0.0)
    rgb, maps = model.inputs(marked(3, frames), seeded())
    for moment, (x, m) in enumerate(zip(rgb, maps, strict=True)):
        assert x.shape == (3, 3, len(expected), 12, 12) and m.shape == (3, 3, frames - 1, 12, 12)
        values = torch.tensor([t * t + 100.0 * moment for t in expected]).view(-1, 1, 1).expand(x.shape)
        torch.testing.assert_close(unnormalize(x) * 255, values, atol=0.05, rtol=0)
        values = torch.tensor([2.0 * t + 1 for t in range(frames - 1)]).view(-1, 1, 1).expand(m.shape)
        torch.testing.assert_close(m * 255, values, atol=1e-3, rtol=0)


def one_sided(videos=60, frames=3, size=10):
    """Pixels of the left half are bright, and only they change; odd clips are moments of the same videos."""
    clips = torch.full((2 * videos, 3, frames, size, size), 40, dtype=torch.uint8)
    for t in range(frames):
        clips[:, :, t, :, :size // 2] = 120 + 40 * (t % 2)
    return clips


@pytest.mark.parametrize("motion_input", ["frame_diff", "flow_edge", "flow"])
def test_flips_are_shared_by_the_modalities_and_drawn_per_moment(motion_input):
    model = pixels_model(3, motion_input, Flow(), rgb_step=1)
    rgb, maps = model.inputs(one_sided(), seeded())
    if motion_input != "frame_diff":
        assert len(model.flow.seen) == 1 and model.flow.seen[0].dtype == torch.uint8
        maps = model.flow.seen[0].float().diff(dim=2).abs().chunk(2)            # edges say nothing about the side
    flipped = []
    for x, m in zip(rgb, maps):
        right = [a[..., 5:].mean((1, 2, 3, 4)) > a[..., :5].mean((1, 2, 3, 4)) for a in (unnormalize(x), m.abs())]
        assert torch.equal(*right)
        flipped.append(right[0])
    counts = [((flipped[0] == a) & (flipped[1] == b)).sum().item() for a, b in product((True, False), repeat=2)]
    assert sum(counts) == 60 and min(counts) >= 4                               # all four, 15 expected of each


def test_moments_alternate_in_the_batch():
    clips = torch.zeros(6, 3, 3, 10, 10, dtype=torch.uint8)
    for i in range(6):
        clips[i] = 40 * i
        clips[i, :, 1] += 1 + i
    rgb, maps = pixels_model(3, rgb_step=1, colour=0.0).inputs(clips, seeded())
    for moment in range(2):
        mine = torch.arange(moment, 6.0, 2)
        torch.testing.assert_close(unnormalize(rgb[moment])[:, 0, 0, 0, 0] * 255, 40 * mine, atol=0.05, rtol=0)
        torch.testing.assert_close(maps[moment][:, 0, 0, 0, 0] * 255, 1 + mine, atol=1e-3, rtol=0)


def test_colours_change_rgb_but_not_motion(monkeypatch):
    clips, flow = clips_uint8(12), Flow()
    plain = pixels_model(motion_input="flow_edge", flow=flow, colour=0.0, edge_clip=6.0)
    strong = pixels_model(motion_input="flow_edge", flow=flow, colour=1.5, edge_clip=6.0)
    (a, maps), (b, same) = (model.inputs(clips, seeded(5)) for model in (plain, strong))
    for x, y, m, n in zip(a, b, maps, same):
        assert not torch.allclose(x, y, atol=0.1) and torch.equal(m, n)
    for seen in flow.seen:                                                      # uint8, flipped, otherwise as they came
        order = torch.cat([clips[::2], clips[1::2]])
        assert all(torch.equal(s, c) or torch.equal(s, c.flip(-1)) for s, c in zip(seen, order, strict=True))
    torch.testing.assert_close(torch.cat(maps), motion_maps(flow.seen[0], Flow(), "flow_edge", 6.0))


def test_each_moment_has_colours_of_its_own():
    clips = clips_uint8(12)
    clips[1::2] = clips[::2]
    clips[..., :8] = clips[..., 8:].flip(-1)                                    # flips show nothing
    (a, b), _ = pixels_model().inputs(clips, seeded())
    assert ((a - b).abs().amax((1, 2, 3, 4)) > 0.1).sum() >= 5


def test_colour_strengths_and_the_order_of_steps(monkeypatch):
    steps = []
    for name in ("flip", "colour_jitter", "blur", "normalize", "motion_maps"):
        def step(*args, name=name, function=getattr(modist, name), **kwargs):
            steps.append((name, kwargs))
            return function(*args, **kwargs)
        monkeypatch.setattr(modist, name, step)
    pixels_model(colour=0.5).inputs(clips_uint8(), seeded())
    assert [name for name, _ in steps] == ["flip", "flip", *["colour_jitter", "blur", "normalize"] * 2, "motion_maps"]
    jitter = dict(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.075, grey=0.1)
    assert [kwargs for name, kwargs in steps if name == "colour_jitter"] == [pytest.approx(jitter)] * 2
    assert not any(kwargs for name, kwargs in steps if name in ("flip", "blur"))                    # p = .5, as always


def test_what_a_clip_gets_does_not_depend_on_how_the_batch_is_split():
    model, clips = pixels_model(), clips_uint8(12)
    whole = list(itertools.chain(*model.inputs(clips, seeded(3, 0, 6))))
    for first, rows in ((0, 2), (2, 3), (5, 1)):
        part = itertools.chain(*model.inputs(clips[2 * first:2 * (first + rows)], seeded(3, first, 6)))
        for x, expected in zip(part, whole, strict=True):
            torch.testing.assert_close(x, expected[first:first + rows], atol=1e-6, rtol=0)
    assert not torch.equal(whole[0], model.inputs(clips, seeded(4, 0, 6))[0][0])


def test_forward_gives_each_network_what_it_should_see():
    model = pixels_model(motion_input="flow_edge", flow=Flow(), edge_clip=4.0)
    for name, p in model.keys.named_parameters():
        p.data.add_(0.05 * torch.randn(p.shape, generator=seeded(1)))
    clips = clips_uint8()
    (v1, v2), (m1, m2) = model.inputs(clips, seeded(2))
    seen = {}
    for name, net in dict(v1=model.encoder, v2=model.keys["encoder"], m1=model.motion, m2=model.keys["motion"]).items():
        net.register_forward_pre_hook(lambda net, x, name=name: seen.update({name: x[0]}))
    model(clips, seeded(2))
    for name, expected in dict(v1=v1, v2=v2, m1=m1, m2=m2).items():
        assert torch.equal(seen[name], expected), name


# ---- moments of a video ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fps", [7.5, 15, 23.976, 25, 29.97, 30, 60])
@pytest.mark.parametrize("room", [0, 1, 3, 9, 40, 220, 4000])
def test_two_starts_are_half_a_second_to_ten_apart_or_as_far_as_possible(fps, room):
    rng = np.random.default_rng(0)
    allowed = {s for s in range(room + 1) if 0.5 <= s / fps <= 10} or {room}
    seen = set()
    for _ in range(150):
        a, b = (int(x) for x in two_starts(room, fps, rng))
        assert 0 <= a <= room and 0 <= b <= room and abs(a - b) in allowed
        seen.add(abs(a - b))
    assert len(seen) >= 0.3 * min(len(allowed), 150)


def test_two_starts_are_uniform_and_come_in_both_orders():
    rng, draws = np.random.default_rng(0), 12000
    pairs = np.array([two_starts(20, 10, rng) for _ in range(draws)])
    shift, first = np.abs(pairs[:, 0] - pairs[:, 1]), pairs.min(1)
    counts = np.bincount(shift, minlength=21)
    assert counts[:5].sum() == 0 and (np.abs(counts[5:] - draws / 16) < 5 * math.sqrt(draws / 16)).all()
    for s in (5, 12, 18):
        starts = np.bincount(first[shift == s], minlength=21 - s)
        share = counts[s] / (21 - s)
        assert len(starts) == 21 - s and (np.abs(starts - share) < 5 * math.sqrt(share)).all()
    assert abs((pairs[:, 0] < pairs[:, 1]).mean() - 0.5) < 0.03


def test_the_bounds_of_the_shift_are_reached_but_not_passed():
    rng = np.random.default_rng(0)
    shifts = [int(abs(np.subtract(*two_starts(2000, 30, rng)))) for _ in range(8000)]
    assert min(shifts) == 15 and max(shifts) == 300
    shifts = [int(abs(np.subtract(*two_starts(900, 10, rng, 2.0, 3.0)))) for _ in range(300)]
    assert set(shifts) == set(range(20, 31))
    shifts = [int(abs(np.subtract(*two_starts(90, 7.5, rng, 0.5, 0.9)))) for _ in range(60)]          # 3.75 to 6.75 frames
    assert set(shifts) == {4, 5, 6}
    assert {int(abs(np.subtract(*two_starts(50, 3, rng, 0.4, 0.5)))) for _ in range(30)} == {2}       # none fits: the closest


# ---- clips -------------------------------------------------------------------------------------------------------------

CLIP = dict(motion_frames=4, motion_stride=4, frames=2, stride=8, image_size=16, min_crop=0.9, max_crop=1.0, fps=30.0, repeats=1)


def settings(**changes):
    return Config(**{**CLIP, **changes})


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """60 frames at 15, 25, 30, 60 frames per second, and 10 at 30; pictures tell their number."""
    folder = tmp_path_factory.mktemp("films")
    films = {fps: tiny_video(folder / f"{fps}.mp4", 60, fps) for fps in (15, 25, 30, 60)}
    return dict(films, short=tiny_video(folder / "short.mp4", 10, 30))


@pytest.mark.parametrize("rate", [30.0, 0.0, 15.0])
@pytest.mark.parametrize("fps", [15, 25, 30, 60])
def test_strides_are_those_at_the_frame_rate_of_the_settings(films, fps, rate):
    rng, starts, cfg = np.random.default_rng(0), [], settings(fps=rate)
    steps = [4 * k * (fps / rate if rate else 1) for k in range(5)]
    with Video(films[fps]) as video:
        for _ in range(8):
            clips = sample_clips(video, Item(str(films[fps])), rng, cfg)
            assert clips.shape == (2, 5, 16, 16, 3) and clips.dtype == np.uint8
            shown = numbers(clips)
            for clip in shown:
                for n, step in zip(clip, steps):
                    assert abs(n - min(clip[0] + step, 59)) <= 0.5, (clip, steps)
            starts.append(shown[:, 0])
    room = max(0, 59 - round(steps[-1]))
    allowed = {s for s in range(room + 1) if 0.5 <= s / fps <= 10} or {room}
    assert all(abs(a - b) in allowed and max(a, b) <= room for a, b in starts)
    assert len({tuple(s) for s in starts}) > 1 or room < 5
    assert {a < b for a, b in starts} == {True, False} or room == 0


def test_a_short_video_repeats_its_last_frame(films):
    with Video(films["short"]) as video:
        clips = sample_clips(video, Item(str(films["short"])), np.random.default_rng(0), settings())
    assert numbers(clips).tolist() == [[0, 4, 8, 9, 9]] * 2


def test_clips_lie_within_the_item(films):
    rng, starts = np.random.default_rng(0), []
    with Video(films[30]) as video:
        for _ in range(12):                                                     # frames 12 to 42
            shown = numbers(sample_clips(video, Item("", start=0.4, stop=1.4), rng, settings(motion_stride=1)))
            assert shown.min() >= 12 and shown.max() <= 42 and (np.diff(shown) == 1).all()
            starts += shown[:, 0].tolist()
    assert min(starts) < 17 and max(starts) > 33


def test_rgb_and_motion_cover_the_same_span(films):
    """From the file to the networks: grey tells the frame."""
    cfg = settings(frames=3, stride=8, motion_frames=6, motion_stride=4, min_crop=1.0, fps=0.0)
    with Video(films[60]) as video:
        clips = sample_clips(video, Item(""), np.random.default_rng(0), cfg)
    clips = to_device(collate([(clips, "", 0, [])])["clips"], CPU)                                      # (2, 3, 7, 16, 16)
    model = pixels_model(7, rgb_step=2, colour=0.0)
    (v1, v2), (m1, m2) = model.inputs(clips, seeded())
    for clip, rgb, maps in zip(clips, (v1, v2), (m1, m2)):
        shown = numbers(clip.permute(1, 2, 3, 0).numpy())
        assert (np.diff(shown) == 4).all()
        frames = numbers(unnormalize(rgb)[0].permute(1, 2, 3, 0).numpy() * 255)
        assert frames.tolist() == shown[[0, 2, 4]].tolist()
        assert frames[-1] - frames[0] + cfg.stride == shown[-1] - shown[0] == len(maps[0, 0]) * cfg.motion_stride
        assert maps[0].shape[1] == 6 and (maps * 255).mean((0, 1, 3, 4)).tolist() == pytest.approx([16] * 6, abs=1.5)


@pytest.mark.parametrize("repeats", [1, 3])
def test_each_clip_has_a_crop_of_its_own(monkeypatch, repeats):
    crops, read = [], []

    def crop(height, width, rng, area):
        crops.append((height, width, area))
        return 0, 0, 10 + len(crops), 20
    monkeypatch.setattr(modist, "random_resized_crop", crop)
    monkeypatch.setattr(modist, "read_views", lambda *args: read.append(args))
    info = SimpleNamespace(frames=2000, fps=30.0, height=48, width=64)
    video = SimpleNamespace(info=info, index_at=lambda t: round(30 * t))
    cfg = settings(repeats=repeats, min_crop=0.2, max_crop=0.766, image_size=24)
    sample_clips(video, Item(""), np.random.default_rng(0), cfg)
    (given, indices, boxes, size), = read
    assert given is video and size == 24 and crops == [(48, 64, (0.2, 0.766))] * (2 * repeats)
    assert [list(box) for box in boxes] == [[0, 0, 11 + i, 20] for i in range(2 * repeats)] and len(indices) == 2 * repeats
    for a, b in zip(indices[::2], indices[1::2]):
        assert (np.diff(a) == 4).all() and (np.diff(b) == 4).all() and 15 <= abs(a[0] - b[0]) <= 300
    assert len({int(i[0]) for i in indices}) == 2 * repeats


# ---- settings ----------------------------------------------------------------------------------------------------------

def test_the_defaults_are_the_specification_s():
    cfg = config("--data", "k400")
    assert (cfg.backbone, cfg.frames, cfg.stride, cfg.motion_frames, cfg.motion_stride, cfg.fps) == ("slow_r50", 8, 8, 16, 4, 30)
    assert (cfg.queue, cfg.momentum, cfg.temperature, cfg.cross_weight, cfg.motion_motion) == (65536, 0.999, 0.1, 1, False)
    assert (cfg.min_crop, cfg.max_crop, cfg.epochs, cfg.warmup_epochs, cfg.weight_decay) == (0.2, 0.766, 200, 35, 1e-4)
    assert (cfg.optimizer, cfg.motion_input, cfg.image_size) == ("sgd", "flow_edge", 224)
    assert cfg.lr * 64 / 256 == pytest.approx(0.1)
    least, most = (inspect.signature(two_starts).parameters[n].default for n in ("least", "most"))
    assert (least, most) == (0.5, 10.0)


@pytest.mark.parametrize("data", ["toy", "k400", "ucf101", "hmdb51", "ssv2", "epic", "some/place"])
@pytest.mark.parametrize("backbone", [None, "vit_small", "slow_r50"])
def test_every_recipe_fits_together(data, backbone):
    cfg = config("--data", data, *(["--backbone", backbone] if backbone else []))
    assert cfg.frames * cfg.stride == cfg.motion_frames * cfg.motion_stride and cfg.stride % cfg.motion_stride == 0
    assert 0 < cfg.min_crop <= cfg.max_crop <= 1 and cfg.batch % min(cfg.batch, cfg.device_batch) == 0
    assert cfg.optimizer == ("adamw" if data == "toy" or cfg.backbone.startswith("vit") else "sgd")
    assert cfg.warmup_epochs < cfg.epochs


class Reached(Exception):
    """All settings have been accepted."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with 8 videos in data/, to work in."""
    for i in range(8):
        tiny_video(tmp_path / "data" / f"{i}.mp4", 40, 30, 32)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)


SMALL = ("--data data --backbone vit_tiny --image-size 32 --frames 4 --stride 4 --motion-frames 8 --motion-stride 2 --fps 0 "
         "--queue 16 --batch 4 --workers 0 --min-crop 0.5 --max-crop 1 --flow tvl1 --no-compile").split()


@pytest.mark.parametrize("argv, words", [
    ("--stride 5", ["--stride 5", "--motion-stride 2"]),
    ("--stride 4 --motion-stride 3 --motion-frames 5", ["--stride 4", "--motion-stride 3"]),
    ("--stride 3 --motion-stride 2 --motion-frames 6", ["--stride 3", "multiple"]),        # spans agree, strides do not divide
    ("--stride 2 --motion-stride 4 --motion-frames 2", ["--stride 2", "multiple"]),
    ("--motion-frames 9", ["--frames 4", "--motion-frames 9"]),
    ("--frames 2", ["--frames 2", "--motion-frames 8"]),
    ("--motion-stride 0", ["--motion-stride 0"]),
    ("--motion-stride -2 --motion-frames -8", ["--motion-stride -2"]),
    ("--stride 0", ["--stride 0"]),
    ("--motion-input edges", ["--motion-input edges", "flow_edge", "flow", "frame_diff"]),
    ("--momentum 1.5", ["--momentum 1.5"]),
    ("--momentum -0.1", ["--momentum -0.1"]),
    ("--min-crop 0.5 --max-crop 0.4", ["--max-crop 0.4", "--min-crop"]),
    ("--max-crop 1.2", ["--max-crop 1.2"]),
    ("--min-crop 0", ["--min-crop 0"]),
    ("--edge-clip 0", ["--edge-clip 0"]),
    ("--edge-clip -1", ["--edge-clip -1"]),
    ("--fps -1", ["--fps -1"]),
    ("--temperature 0", ["--temperature 0"]),
    ("--queue 0", ["--queue 0"]),
    ("--batch 6 --device-batch 4", ["--batch 6"]),
    ("--motion-inptu flow", ["--motion-input"]),
])
def test_a_mistake_in_the_settings_is_one_line_before_anything_is_written(place, argv, words):
    text = error_of(lambda: modist.main(config(*SMALL, *argv.split())))
    assert all(word in text for word in words), text
    assert not (place / "runs").exists()


@pytest.mark.parametrize("argv", [
    "", "--momentum 0", "--momentum 1", "--min-crop 0.6 --max-crop 0.6", "--motion-input frame_diff", "--motion-input flow",
    "--stride 2 --motion-frames 4", "--fps 25", "--frames 2 --stride 8"])
def test_settings_at_the_bounds_are_accepted(place, monkeypatch, argv):
    def reached(*args):
        raise Reached
    monkeypatch.setattr(modist, "open_run", reached)
    with pytest.raises(Reached):
        modist.main(config(*SMALL, *argv.split()))


@pytest.mark.parametrize("argv, word", [
    ("--flow horn", "--flow horn"), ("--backbone r50", "--backbone r50"), ("--optimizer lars", "lars"),
    ("--init gone.pt", "gone.pt"), ("--flow raft_small --raft-weights gone.pth", "gone.pth")])
def test_a_name_that_does_not_exist_is_one_line(place, argv, word):
    assert word in error_of(lambda: modist.main(config(*SMALL, *argv.split())))
    assert not list(place.glob("runs/*/last.pt"))


@pytest.mark.parametrize("argv, expected", [
    ("", dict(rgb_step=2, motion_input="flow_edge", cross_weight=1, motion_motion=False, flow=True)),
    ("--stride 2 --motion-frames 4 --edge-clip 0.3 --cross-weight 0.4 --motion-motion --colour 0.7 --queue 12 --momentum 0.8 "
     "--temperature 0.3",
     dict(rgb_step=1, edge_clip=0.3, cross_weight=0.4, motion_motion=True, colour=0.7, queue=12, momentum=0.8, temperature=0.3,
          flow=True, motion_frames=4)),
    ("--motion-input frame_diff", dict(motion_input="frame_diff", flow=False)),
    ("--cross-weight 0", dict(cross_weight=0, motion=False, flow=False)),
    ("--cross-weight 0 --motion-motion", dict(cross_weight=0, motion_motion=True, flow=True))])
def test_the_model_gets_the_settings(place, monkeypatch, argv, expected):
    def build(*args, **kwargs):
        bound = inspect.signature(MoDist).bind(*args, **kwargs)
        bound.apply_defaults()
        raise Reached(bound.arguments)
    monkeypatch.setattr(modist, "MoDist", build)
    with pytest.raises(Reached) as caught:
        modist.main(config(*SMALL, *argv.split()))
    got, = caught.value.args
    expected = {**dict(motion=True, motion_frames=8), **expected}
    assert (got["motion"] is not None, got["flow"] is not None) == (expected.pop("motion"), expected.pop("flow"))
    assert got["encoder"].config["frames"] == 4 and got["encoder"].config["image_size"] == 32
    frames = expected.pop("motion_frames")
    if got["motion"] is not None:
        assert got["motion"].config == dict(name="motion_r50", width=1 / 8, image_size=32, frames=frames)
    assert {k: got[k] for k in expected} == expected


def test_sgd_with_nesterov_leaves_vectors_without_decay_and_without_it_decays_all():
    torch.manual_seed(0)
    model = MoDist(ResNet3D("slow_r50", 0.0625, 32, 4), Net(), None, queue=8)
    trained = [p for n, p in model.named_parameters() if not n.startswith("keys.")]
    for nesterov in (True, False):
        optimizer = make_optimizer("sgd", model, 0.3, 0.01, CPU, nesterov=nesterov)
        assert isinstance(optimizer, torch.optim.SGD)
        for g in optimizer.param_groups:
            assert (g["lr"], g["momentum"], g["nesterov"], g["dampening"]) == (0.3, 0.9, nesterov, 0)
        decay = [(id(p), g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
        assert len(decay) == len(trained) and dict(decay) == {id(p): 0.0 if nesterov and p.ndim == 1 else 0.01 for p in trained}
    assert not make_optimizer("sgd", model, 0.3, 0.01, CPU).param_groups[0]["nesterov"]


def test_adamw_is_as_before():
    model = vectors_model()
    optimizer = make_optimizer("adamw", model, 0.3, 0.05, CPU, nesterov=True)
    assert isinstance(optimizer, torch.optim.AdamW)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay == {id(p): 0.05 if p.ndim > 1 else 0.0 for n, p in model.named_parameters() if p.requires_grad}
    assert all(g["betas"] == (0.9, 0.95) and g["lr"] == 0.3 for g in optimizer.param_groups)


# ---- a run and its checkpoint ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The directory of a finished run of 3 steps, with keys that copy the queries."""
    folder = tmp_path_factory.mktemp("run")
    for i in range(8):
        tiny_video(folder / "data" / f"{i}.mp4", 40, 30, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        modist.main(config(*SMALL, *"--out out --steps 3 --momentum 0 --optimizer sgd --lr 6.4 --warmup-epochs 0".split(),
                           *"--weight-decay 0.1 --motion-motion".split()))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    return folder / "out"


def test_a_run_logs_its_losses_and_updates_the_keys_after_each_step(done):
    rows = [json.loads(line) for line in (done / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and (done / "preview.png").exists()
    for row in rows:
        assert row["loss"] == pytest.approx(row["rgb"] + row["cross"] + row["motion"], rel=1e-3)
        assert {"top1", "cross_top1", "lr", "grad_norm"} <= set(row)
    assert [row["lr"] for row in rows] == pytest.approx([0.1 * (1 + math.cos(math.pi * k / 3)) / 2 for k in range(3)], rel=1e-3)
    content = torch.load(done / "last.pt", weights_only=True)
    model = content["model"]
    assert content["step"] == 3 and model["updates"] == 3
    for name, value in model.items():
        if name.startswith("keys.") and value.is_floating_point():
            assert torch.equal(value, model[name.removeprefix("keys.")]), name
    first, second = content["optimizer"]["param_groups"]
    assert (first["weight_decay"], second["weight_decay"], first["nesterov"], first["momentum"]) == (0.1, 0, True, 0.9)
    assert (model["queue.pointer"], model["motion_queue.pointer"]) == (12, 12)


def test_a_checkpoint_loads_into_the_visual_pathway_alone(done):
    content = torch.load(done / "last.pt", weights_only=True)
    visual = make_backbone(**content["backbone"])
    report = load_weights(visual, done / "last.pt")
    assert report.missing == [] and len(report.loaded) == len(visual.state_dict())
    for name, value in visual.state_dict().items():
        assert torch.equal(value, content["model"]["encoder." + name])
    others = {"head", "motion", "motion_head", "keys", "queue", "motion_queue", "updates"}
    assert {name.split(".")[0] for name in report.unexpected} == others
    labelled = make_backbone(**content["backbone"], num_classes=5)
    assert all(name.startswith(("head.", "fc_norm.")) for name in load_weights(labelled, done / "last.pt").missing)


def residual(seed, width=0.0625, motion=True):
    torch.manual_seed(seed)
    return MoDist(make_backbone("slow_r50", 32, 4, width=width), ResNet3D("motion_r50", 0.0625, 32, 8) if motion else None, None,
                  queue=8, outputs=16)


def test_a_thin_visual_network_is_not_confused_with_the_motion_network(tmp_path):
    model = residual(0)                                                         # both 1/16 wide: most shapes agree
    torch.save(dict(model=model.state_dict()), tmp_path / "last.pt")
    visual = make_backbone(**model.encoder.config)
    report, state = load_weights(visual, tmp_path / "last.pt"), model.encoder.state_dict()
    assert report.missing == [] and all(torch.equal(v, state[n]) for n, v in visual.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "encoder.", "module.encoder_q."])
def test_init_from_rgb_alone_is_copied_into_the_keys(prefix, tmp_path):
    source, model = residual(1), residual(2)
    for buffer in source.encoder.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1)
    torch.save(dict(model={prefix + k: v for k, v in source.encoder.state_dict().items()}), tmp_path / "rgb.pt")
    kept = copy.deepcopy({n: v for n, v in model.state_dict().items() if not n.startswith(("encoder.", "keys.", "updates"))})
    for p in model.keys.parameters():
        p.data.add_(1)
    assert resume_or_init(None, str(tmp_path / "rgb.pt"), model, None, None) == 0
    state = model.state_dict()
    for name, value in source.encoder.state_dict().items():
        assert torch.equal(state["encoder." + name], value), name
        if value.is_floating_point():
            assert torch.equal(state["keys.encoder." + name], value), name
    for name, value in kept.items():
        assert torch.equal(state[name], value), name
        if name.startswith(("motion.", "head.", "motion_head.")) and value.is_floating_point():
            assert torch.equal(state["keys." + name], value), name


def test_init_from_a_whole_checkpoint_takes_everything(tmp_path):
    source, model = residual(1), residual(2)
    for p in source.keys.parameters():
        p.data.add_(0.1)
    torch.save(dict(model=source.state_dict()), tmp_path / "last.pt")
    resume_or_init(None, str(tmp_path / "last.pt"), model, None, None)
    state = model.state_dict()
    assert all(torch.equal(v, state[n]) for n, v in source.state_dict().items())


def test_init_from_motion_alone_or_another_width_is_refused(tmp_path):
    source = residual(1)
    for state in ({"motion." + k: v for k, v in source.motion.state_dict().items()}, residual(3, width=0.125).state_dict()):
        torch.save(dict(model=state), tmp_path / "x.pt")
        assert "x.pt" in error_of(resume_or_init, None, str(tmp_path / "x.pt"), residual(2), None, None)


# ---- preview -----------------------------------------------------------------------------------------------------------

def sheets(monkeypatch):
    kept = []
    monkeypatch.setattr(modist, "save_sheet", lambda path, rows: kept.append((path, rows)))
    return kept


KINDS = [("flow_edge", True), ("flow", True), ("frame_diff", True), ("flow_edge", False)]


@pytest.mark.parametrize("kind, motion", KINDS)
@pytest.mark.parametrize("frames", [5, 9])
def test_preview_writes_a_picture_and_changes_nothing(tmp_path, kind, motion, frames):
    torch.manual_seed(0)
    encoder = make_backbone(**{**VIT, "image_size": 32, "frames": (frames - 1) // 2})
    model = MoDist(encoder, ResNet3D("motion_r50", 1 / 16, 32, frames - 1) if motion else None, FlowEstimator("tvl1"), 2, kind,
                   queue=16, outputs=8).train()
    clips = clips_uint8(8, frames, 32)
    state, rng, given = copy.deepcopy(model.state_dict()), torch.get_rng_state(), clips.clone()
    preview(model, clips, tmp_path / "preview.png")
    assert (tmp_path / "preview.png").stat().st_size > 5000
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(clips, given) and model.training and model.encoder.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind, motion", KINDS)
def test_preview_shows_frames_flow_and_motion_in_time(monkeypatch, kind, motion):
    kept, clips, flow = sheets(monkeypatch), clips_uint8(8, 8, 20), Flow()
    model = pixels_model(8, kind, flow, motion=motion)
    model.encoder.forward = lambda x: x.mean((2, 3, 4)).repeat(1, 11)[:, :32]
    model.keys["encoder"].forward = model.encoder.forward
    preview(model, clips, "x.png")
    (path, rows), = kept
    per_pair = 2 + motion + (motion and kind != "frame_diff")
    assert path == "x.png" and len(rows) == 2 * per_pair and {row.shape for row in rows} == {(8, 3, 20, 20)}
    shown, firsts = [0, 2, 4, 6], clips[::2]
    for pair in range(2):
        own = rows[per_pair * pair:per_pair * (pair + 1)]
        for side, b in enumerate((2 * pair, 2 * pair + 1)):
            left = slice(4 * side, 4 * side + 4)
            torch.testing.assert_close(own[0][left], to_float01(firsts[b])[:, shown].transpose(0, 1))
            if not motion:
                continue
            maps = motion_maps(firsts, Flow(), kind, 1.0)[b]
            torch.testing.assert_close(own[-2][left], maps[:, shown].abs().transpose(0, 1))
            if kind != "frame_diff":
                torch.testing.assert_close(own[1][left], common.flow_picture(Flow()(firsts)[b, shown]))
            about = maps.abs().mean(1)
            torch.testing.assert_close(own[-1][4 * side], about / about.max())
        assert all(row.min() >= 0 and row.max() <= 1 for row in own)


@pytest.mark.parametrize("motion", [True, False])
def test_preview_frames_the_own_second_moment_among_the_matches(monkeypatch, motion):
    """Video b's second moment is grey 40 (b + 1); the networks' embeddings are given, so the ranking is known."""
    kept = sheets(monkeypatch)
    clips = clips_uint8(8, 5, 16)
    for b in range(4):
        clips[2 * b + 1] = 40 * (b + 1)
    model = pixels_model(motion=motion)
    near = F.normalize(normal(4, 8, seed=1), dim=1)
    query = torch.cat([near[[1, 1, 2]] + 0.2 * near[[0, 2, 1]], -near[3:]])     # video 3 is the last that it finds
    model.head = model.motion_head = model.keys["head"] = nn.Identity()
    if not motion:
        del model._modules["motion_head"]
    seen, asked = [], []
    (model.motion if motion else model.encoder).forward = lambda x: asked.append(x) or 5 * query
    model.keys["encoder"].forward = lambda x: seen.append(x) or near * torch.tensor([[1.0], [3], [0.2], [7]])
    preview(model, clips, "x.png")
    rows, firsts = kept[0][1], clips[::2]
    torch.testing.assert_close(asked[0] if motion else unnormalize(asked[0]),
                               motion_maps(firsts, None, "frame_diff") if motion else to_float01(firsts)[:, :, [0, 2]])
    torch.testing.assert_close(unnormalize(seen[0])[:, 0, 0, 0, 0] * 255, torch.tensor([40.0, 80, 120, 160]), atol=0.05, rtol=0)
    expected = [sorted(range(4), key=lambda j: -dot(q, near[j].tolist()))[:3] for q in query.tolist()]
    framed = 0
    for i in range(4):
        row = rows[(i // 2 + 1) * len(rows) // 2 - 1]
        for place, j in enumerate(expected[i]):
            picture = row[4 * (i % 2) + 1 + place]
            assert (picture[:, 8, 8] * 255).tolist() == pytest.approx([40 * (j + 1)] * 3, abs=1), (i, place)
            corners = picture[:, [0, 0, -1, -1], [0, -1, 0, -1]]
            red = bool((corners[0] > 0.9).all() and (corners[1:] < 0.1).all())
            assert red == (i == j), (i, j)
            framed += red
    assert 1 <= framed < 4
    for name in ("encoder", "motion"):
        assert name not in model._modules or model._modules[name].training


# ---- learning ----------------------------------------------------------------------------------------------------------

def bars(videos=32, frames=5, size=16, seed=0):
    """Video b: a bar of any colour flickers in row b % 8; everything else is noise that stays.  -> (2 videos, 3, F, H, W)"""
    clips = noise(2 * videos, 3, 1, size, size, seed=seed).repeat(1, 1, frames, 1, 1) * 0.3
    colour = 0.4 + 0.6 * noise(2 * videos, 3, frames, 1, 1, seed=seed + 1)
    for i in range(2 * videos):
        row = 2 * (i // 2 % 8)
        clips[i, :, :, row:row + 2] = colour[i]
    return (clips * 255).byte()


@pytest.mark.parametrize("cross_weight, learns", [(1.0, True), (0.0, False)])
def test_the_cross_loss_teaches_what_is_common_to_rgb_and_motion(cross_weight, learns):
    model = pixels_model(queue=32, momentum=0.9, cross_weight=cross_weight, motion_motion=not learns, norm=True)
    optimizer = make_optimizer("adamw", model, 2e-3, 0.0, CPU)
    optimizer.register_step_post_hook(lambda *_: model.update_keys())
    found = []
    for step in range(90):
        loss, stats = model(bars(8, seed=2 * step), seeded(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(stats["cross_top1"].item())
    start, end = np.mean(found[:5]), np.mean(found[-10:])
    assert start < 40 and (end > 70 if learns else end < 40), (start, end)      # chance 12.5


# ---- with the weights of RAFT ------------------------------------------------------------------------------------------

def test_one_forward_with_raft():
    weights = SHARED / "weights" / "raft_small.pth"
    if not weights.exists():
        pytest.skip(f"{weights} is not here")
    flow = FlowEstimator("raft_small", str(weights), 4)
    ground = F.interpolate(noise(4, 3, 20, 20), (144, 144), mode="bicubic").clamp(0, 1)
    square = F.interpolate(noise(4, 3, 6, 6, seed=3), (40, 40), mode="bicubic").clamp(0, 1)
    clips = torch.stack([ground[..., 8:136, 8 + 2 * t:136 + 2 * t] for t in range(3)], 2)
    for t in range(3):
        clips[:, :, t, 44:84, 30 + 4 * t:70 + 4 * t] = square
    model = pixels_model(3, "flow_edge", flow)
    _, maps = model.inputs((clips * 255).byte(), seeded())
    maps = torch.cat(maps)
    assert maps.shape == (4, 3, 2, 128, 128) and 0 <= maps.min() and maps.max() <= 1
    still, moving = maps[..., 96:, :].mean(), maps[..., 36:92, :].mean()
    assert moving > 3 * still and still < 0.1
    loss, stats = model((clips * 255).byte(), seeded())
    loss.backward()
    assert loss.isfinite() and model.motion_queue.pointer == 2 and stats["cross"] > 0


def test_the_rate_lies_on_the_cosine_over_all_epochs():
    """Published: .1 for 64 clips, 200 epochs, 35 of warm-up from .001; here an epoch is a step, then a hundred."""
    cfg = Config()
    assert cfg.lr * cfg.batch / 256 == pytest.approx(0.1) and (cfg.epochs, cfg.warmup_epochs) == (200, 35)
    for k in (1, 100):
        def rate(epoch):
            return modist.cosine_lr(int(epoch * k), 200 * k, 35 * k, 0.1, 0.0)
        assert rate(0) == pytest.approx(0.001) and rate(100) == pytest.approx(0.05) and rate(200) == pytest.approx(0)
        end = 0.05 * (1 + math.cos(math.pi * 35 / 200))
        assert rate(35) == pytest.approx(end) and rate(7) == pytest.approx(0.001 + (end - 0.001) * 7 / 35)
        for epoch in (35, 60, 150):
            assert rate(epoch) == pytest.approx(0.05 * (1 + math.cos(math.pi * epoch / 200)))
