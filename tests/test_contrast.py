"""What FAME, MCL and MoDist share: keys and their queue, views, colours and crops, networks, weights, settings."""
import copy
import inspect
import math
from itertools import product

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.io import read_image
from torchvision.transforms.v2 import functional as tv

import common
import fame
import mcl
import modist
from common import (Bottleneck, MomentumContrast, Queue, ResNet3D, blur, colour_jitter, load_weights,
                    make_backbone, make_optimizer, parse_config, random_resized_crop, resume_or_init)
from conftest import FakeFlow, error_of, noise, run, seeded

CPU = torch.device("cpu")
METHODS = dict(fame=fame.FAME, mcl=mcl.MCL, modist=modist.MoDist)
MODULES = dict(fame=fame, mcl=mcl, modist=modist)
each_method = pytest.mark.parametrize("method", METHODS)
VIT = dict(image_size=16, frames=4, patch_size=8, tubelet_size=2, dim=24, depth=1, heads=3)


def with_statistics(net):
    """Batch norms that are not those of the start."""
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.0)
            for tensor in (module.bias, module.running_mean):
                tensor.data.uniform_(-0.2, 0.2)
    return net


def tiny(method, backbone="vit", seed=0, **changes):
    """A small model of the method: around a ViT of 4 frames of 16 pixels, or a thin ResNet of 8 frames of 32."""
    torch.manual_seed(seed)
    size, frames = (16, 4) if backbone == "vit" else (32, 8)
    encoder = make_backbone(**VIT) if backbone == "vit" else with_statistics(ResNet3D(backbone, 0.125, 32, 8))
    encoder.config.update(mean=common.MEAN, std=common.STD)
    changes = dict(queue=48, momentum=0.75, outputs=8) | changes
    if method == "fame":
        return fame.FAME(encoder, **changes)
    if method == "mcl":
        return mcl.MCL(encoder, FakeFlow(), 10, **dict(order_weight=1.0) | changes)
    motion = with_statistics(ResNet3D("motion_r50", 1 / 16, size, 2 * frames))
    return modist.MoDist(encoder, motion, FakeFlow(), **changes)


def batch(method, videos=4, backbone="vit", seed=0):
    """Clips as the method takes them, of `videos` videos."""
    size, frames = (16, 4) if backbone == "vit" else (32, 8)
    count, frames = dict(fame=(2, frames), mcl=(6, frames + 1), modist=(2, 2 * frames + 1))[method]
    clips = (255 * noise(count * videos, 3, frames, size, size, seed=seed)).byte()
    return dict(clips=clips, order=torch.arange(videos) % 2) if method == "mcl" else clips


def views(model, clips, generator):
    """What networks and targets are made of, (videos, ...) each."""
    if isinstance(model, fame.FAME):
        return model.views(clips, generator)
    if isinstance(model, modist.MoDist):
        rgb, maps = model.inputs(clips, generator)
        return [*rgb, *maps]
    chosen, maps = model.choose(clips["clips"], generator)
    return [x for i in (0, 0, 1, 2) for x in model.view(chosen[:, i, :, :-1], maps[:, i], generator)]


def same(state, other):
    """Are the tensors of the first the same in the second, by name?"""
    return all(torch.equal(value, other[name]) for name, value in state.items())


# ---- keys ------------------------------------------------------------------------------------------------------------

@each_method
def test_keys_start_as_a_copy_of_all_networks_and_are_not_trained(method):
    model = tiny(method)
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    own = dict(fame=["head"], mcl=["heads", "order"], modist=["head", "motion", "motion_head"])[method]
    assert trained == {"encoder", *own} and set(model.keys) == trained - {"order"}
    assert same(model.keys.state_dict(), model.state_dict()) and model.updates == 0
    assert not {p.data_ptr() for p in model.keys.parameters()} & {p.data_ptr() for p in model.encoder.parameters()}
    assert not any(p.requires_grad for p in model.keys.parameters()) and model.queue.keys.shape == (48, 8)


@each_method
def test_keys_and_their_running_statistics_are_moving_averages_of_update_keys(method):
    model, history = tiny(method, "r2plus1d_50", momentum=0.6), []
    query, key = model.encoder.stem.bn1, model.keys["encoder"].stem.bn1
    for update in range(1, 5):
        model.train()
        before, own = copy.deepcopy(model.keys.state_dict()), query.running_var.clone()
        model(batch(method, backbone="r2plus1d_50", seed=update), seeded(update))
        assert model.encoder.training and not any(m.training for m in model.keys.modules())
        assert same(model.keys.state_dict(), before) and not torch.equal(own, query.running_var)
        for p in model.parameters():
            p.data.add_(p.requires_grad)
        model.update_keys()
        trained = model.state_dict()
        for name, p in model.keys.named_parameters():
            torch.testing.assert_close(p.data, 0.6 * before[name] + 0.4 * trained[name])
        history.append(query.running_var.clone())                               # at first the mean of all so far
        later = 0.6 * before["encoder.stem.bn1.running_var"] + 0.4 * history[-1]
        torch.testing.assert_close(key.running_var, later if update > 2 else sum(history) / update)
    model.update_keys(momentum=0)
    assert same(dict(model.keys.named_parameters()), model.state_dict()) and model.updates == 5


@pytest.mark.parametrize("backbone", ["vit", "r2plus1d_50"])
@each_method
def test_gradient_reaches_all_that_is_trained_and_no_key(method, backbone):
    model = tiny(method, backbone)
    model.updates.fill_(5)                                                      # MCL's order loss has weight by then
    loss, stats = model(batch(method, backbone=backbone), seeded())
    loss.backward()
    for name, p in model.named_parameters():
        if name.startswith("keys."):
            assert p.grad is None, name
        else:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    assert loss.ndim == 0 and not [name for name, value in stats.items() if value.requires_grad or value.ndim]
    assert not model.queue.keys.requires_grad and model.queue.keys.grad_fn is None


@pytest.mark.parametrize("size, batches", [(7, [3, 3, 3, 3]), (5, [8]), (5, [2, 12, 2, 1]), (6, [1] * 13), (1, [3])])
def test_queue_holds_the_last_keys_oldest_at_the_pointer(size, batches):
    torch.manual_seed(0)
    queue = Queue(size, 2)
    assert queue.pointer == 0 and torch.allclose(queue.keys.norm(dim=1), torch.ones(size))
    expected, number, place = queue.keys.tolist(), 0, queue.keys.data_ptr()
    for count in batches:
        keys = torch.arange(number, number + 2 * count).float().view(count, 2)
        number, expected = number + 2 * count, (expected + keys.tolist())[-size:]
        queue.enqueue(keys)
        assert queue.keys.roll(-int(queue.pointer), 0).tolist() == expected and 0 <= queue.pointer < size
    assert queue.keys.data_ptr() == place and set(queue.state_dict()) == {"keys", "pointer"}


def test_keys_that_are_not_finite_become_zero():
    queue = Queue(4, 2)
    queue.enqueue(torch.tensor([[math.nan, math.nan], [math.inf, 0.5], [-math.inf, -0.5]]))
    assert queue.keys[:3].tolist() == [[0, 0], [0, 0.5], [0, -0.5]]


def test_running_statistics_of_the_keys_follow():
    model = MomentumContrast(0.5)
    model.net, model.keys = nn.BatchNorm3d(2), nn.ModuleDict(dict(net=nn.BatchNorm3d(2)))
    model.net.running_mean.fill_(3)
    for updates, expected in ((0, 3), (8, 2)):                                  # the first as they are
        model.updates.fill_(updates)
        model.keys["net"].running_mean.fill_(1)
        model.update_keys()
        assert model.keys["net"].running_mean.tolist() == [expected] * 2


def normed(rank, world, path):
    """Two layers of batch norm and a gradient that is differentiated again -> outputs, gradients, statistics."""
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{path}/meet", rank=rank, world_size=world)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(3, 6, 1), nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 5, 1), nn.BatchNorm3d(5))
    for norm in common.batch_norms(net) if world > 1 else ():
        norm.__class__ = common.SyncBatchNorm
    x = torch.randn(4, 3, 2, 4, 4).chunk(world)[rank].requires_grad_()
    y = net(x)
    gradient, = torch.autograd.grad((y**3).mean() / world, x, create_graph=True)
    ((y**3).mean() + world * gradient.square().sum()).backward()
    found = [common.all_gather(y.detach()), common.all_gather(gradient.detach()), *net.buffers(),
             *(common.all_reduce_mean(p.grad) for p in net.parameters())]
    torch.save(found, f"{path}/{world}-{rank}")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_batch_norm_of_two_processes_is_that_of_one(tmp_path):
    normed(0, 1, tmp_path)
    torch.multiprocessing.spawn(normed, (2, tmp_path), 2)
    for one, first, second in zip(*(torch.load(tmp_path / name) for name in ("1-0", "2-0", "2-1")), strict=True):
        torch.testing.assert_close(first, one, atol=1e-5, rtol=1e-4)
        assert torch.equal(first, second)


# ---- views -----------------------------------------------------------------------------------------------------------

@each_method
def test_colours_are_jittered_as_much_as_published_and_then_blurred(method, monkeypatch):
    calls, strengths = [], (0.3, 0.3, 0.3, 0.075, 0.1) if method == "modist" else (0.2, 0.2, 0.2, 0.05, 0.1)

    def jitter(clips, generator, *args, **kwargs):
        calls.append(inspect.signature(colour_jitter).bind(clips, generator, *args, **kwargs).arguments)
        return clips
    monkeypatch.setattr(MODULES[method], "colour_jitter", jitter)
    monkeypatch.setattr(MODULES[method], "blur", lambda clips, generator: calls.append("blur") or clips)
    views(tiny(method, colour=0.5), batch(method), seeded())
    assert len(calls) == (8 if method == "mcl" else 4) and calls[1::2] == ["blur"] * (len(calls) // 2)
    assert all([*call.values()][2:] == pytest.approx(strengths) for call in calls[::2])


@each_method
def test_autocast_reaches_neither_views_nor_losses(method, monkeypatch):
    equation, rounded, losses, seen = "alignment_loss" if method == "mcl" else "info_nce", [], [], ([], [])
    own = getattr(MODULES[method], equation)
    monkeypatch.setattr(MODULES[method], equation,
                        lambda *args: rounded.append(torch.is_autocast_enabled("cpu")) or own(*args))
    for enabled in (False, True):
        model = tiny(method)
        for name, module in model.named_modules():
            if name.endswith(("patch_embed", "motion")):                        # where views enter the networks
                module.register_forward_pre_hook(lambda module, args: seen[enabled].append(args[0].clone()))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, stats = model(batch(method), seeded(3))
        losses.append(loss.item())
        assert {x.dtype for x in (loss, model.queue.keys, *stats.values())} == {torch.float32}
    assert rounded and not any(rounded) and losses[1] == pytest.approx(losses[0], rel=0.1) and losses[1] != losses[0]
    assert len(seen[0]) == (4 if method == "modist" else 2)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("method, backbone, changes", [
    ("fame", "vit", {}), ("mcl", "vit", {}), ("mcl", "r2plus1d_50", {}), ("mcl", "vit", dict(motion_clips=False)),
    *[("modist", "vit", dict(motion_input=kind)) for kind in ("flow_edge", "flow", "frame_diff")]])
def test_preview_writes_an_image_and_changes_nothing(method, backbone, changes, tmp_path):
    model, clips = tiny(method, backbone, **changes).train(), batch(method, backbone=backbone)
    if changes.get("motion_clips") is False:
        clips["clips"] = clips["clips"][::2]
    state, stream, given = copy.deepcopy(model.state_dict()), torch.get_rng_state(), copy.deepcopy(clips)
    for name in ("a.png", "b.png"):
        MODULES[method].preview(model, clips, tmp_path / name)
    image = read_image(str(tmp_path / "a.png"))
    assert torch.equal(image, read_image(str(tmp_path / "b.png"))), "the same videos, the same image"
    assert image.float().std() > 20 and image.shape[1] == 4 * 114 + 2 and image.shape[2] >= 7 * 114 + 2
    assert same(model.state_dict(), state) and torch.equal(torch.get_rng_state(), stream)
    assert model.training and model.encoder.training
    assert all(p.grad is None for p in model.parameters())
    now, then = (x["clips"] if method == "mcl" else x for x in (clips, given))
    assert torch.equal(now, then)


# ---- colours and crops -----------------------------------------------------------------------------------------------

YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])      # the NTSC's


def slow_jitter(clip, draw, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8, grey=0.2):
    """clip (3, H, W), its frames one below the other, as one image: torchvision's changes, and hue turned in YIQ."""
    b, c, s, turn = [2 * x - 1 if draw[4] < p else 0 for x in draw[:4]]
    clip = tv.adjust_brightness(clip, 1 + brightness * b)
    clip = tv.adjust_contrast(clip, 1 + contrast * c)
    clip = tv.adjust_saturation(clip, 0 if draw[5] < grey else 1 + saturation * s)
    cos, sin = math.cos(2 * math.pi * hue * turn), math.sin(2 * math.pi * hue * turn)
    turn = torch.tensor([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    return (YIQ.inverse() @ turn @ YIQ @ clip.flatten(1)).view_as(clip)


@pytest.mark.parametrize("strengths", [
    {}, dict(brightness=0.3, contrast=0.5, saturation=0.2, hue=0.2, p=0.5, grey=0.4)])
def test_jitter_equals_torchvision_s_changes_of_a_whole_clip(strengths):
    clips = noise(40, 3, 2, 5, 7, least=0.42, most=0.52)                        # so moderate that nothing clamps
    out = colour_jitter(clips, seeded(), **strengths)
    for clip, got, draw in zip(clips, out, torch.rand(40, 6, generator=seeded()).tolist()):
        expected = slow_jitter(clip.flatten(1, 2), draw, **strengths)
        torch.testing.assert_close(got.flatten(1, 2), expected, atol=5e-4, rtol=0)
    torch.testing.assert_close(colour_jitter(clips[7:9], seeded(0, 7, 40), **strengths), out[7:9], atol=1e-6, rtol=0)
    wild = colour_jitter(noise(30, 3, 2, 4, 5), seeded(), 0.9, 0.9, 0.9, 0.5, p=1.0)
    assert wild.min() == 0 and wild.max() == 1


def test_blur_equals_torchvision():
    for size, sigma in product((24, 64, 112), (0.3, 1.0, 2.0)):
        clips, k = noise(2, 3, 2, size, size), int(0.1 * size) // 2 * 2 + 1
        expected = tv.gaussian_blur(clips.transpose(1, 2), [k, k], [sigma, sigma]).transpose(1, 2)
        torch.testing.assert_close(blur(clips, seeded(), p=1.0, sigma=(sigma, sigma)), expected, atol=1e-5, rtol=0)
    assert torch.equal(blur(clips, seeded(), p=0.0), clips)


def test_blur_is_drawn_per_clip_and_alike_for_all_frames_and_colours():
    clips = torch.zeros(400, 3, 2, 20, 20)
    clips[:, :, :, 10, 10] = 1
    peak = blur(clips, seeded())[:, :, :, 10, 10]                               # (400, 3, 2)
    assert (peak == peak[:, :1, :1]).all()
    assert (peak[:, 0, 0] == 1).float().mean().item() == pytest.approx(0.58, abs=0.08)
    assert peak.unique().numel() > 150                                          # widths below 0.25 px show nothing
    torch.testing.assert_close(blur(clips[7:9], seeded(0, 7, 400)), blur(clips, seeded(0, 0, 400))[7:9])


@pytest.mark.parametrize("height, width, area, ratio", [
    (240, 320, (0.2, 1), (3 / 4, 4 / 3)), (64, 64, (0.5, 1), (3 / 4, 4 / 3)), (360, 200, (0.3, 0.766), (0.5, 2))])
def test_random_crops_are_inside_and_as_large_and_wide_as_wanted(height, width, area, ratio):
    rng, shares, aspects, corners = np.random.default_rng(0), [], [], []
    for _ in range(800):
        x1, y1, x2, y2 = random_resized_crop(height, width, rng, area, ratio)
        w, h = x2 - x1, y2 - y1
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height and all(int(v) == v for v in (x1, y1, x2, y2))
        if (w, h) != (width, height):                                           # else nothing fitted
            shares.append(w * h / (width * height))
            aspects.append(w / h)
            corners.append((x1 / max(1, width - w), y1 / max(1, height - h)))
    rounding = 1 + 1.5 / (0.4 * min(height, width))
    assert len(shares) > 700 and area[0] / rounding <= min(shares) and max(shares) <= area[1] * rounding
    assert ratio[0] / rounding <= min(aspects) and max(aspects) <= ratio[1] * rounding
    assert min(shares) < area[0] + 0.1 and min(aspects) < 0.85 and max(aspects) > 1.15
    assert np.allclose(np.mean(corners, 0), 0.5, atol=0.06) and np.min(corners) < 0.02 and np.max(corners) > 0.98
    assert random_resized_crop(40, 80, rng, (1, 1), (0.5, 0.5)) == (0, 0, 80, 40), "it never fits"


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
    maps = noise(5, 2, 11, 14)
    boxes = torch.tensor([[0, 0, 14, 11], [3, 2, 9, 8], [2.5, 1.25, 13.5, 4], [10, 0, 14, 11], [1, 9, 3, 11]])
    got = mcl.crop_resize(maps, boxes, 6)
    for image, box, cut in zip(maps.double().numpy(), boxes.tolist(), got.numpy()):
        assert np.allclose(cut, slow_crop(image, box, 6), atol=1e-4)
    torch.testing.assert_close(got[1], maps[1, :, 2:8, 3:9], atol=1e-5, rtol=0)
    flipped = torch.tensor([True, False, True, True, False])
    for a, b, f in zip(got, mcl.crop_resize(maps, boxes, 6, flipped), flipped):
        torch.testing.assert_close(a.flip(-1) if f else a, b, atol=1e-4, rtol=0)


# ---- networks --------------------------------------------------------------------------------------------------------

def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def on_meta(name="", *args, **options):
    with torch.device("meta"):
        return make_backbone(name, *args, **options)


def test_parameter_counts_are_those_of_the_papers():
    assert {name: count(on_meta(name)) for name in ("slow_r50", "r2plus1d_50", "r2plus1d_18")} == dict(
        slow_r50=31_672_128, r2plus1d_50=27_308_672, r2plus1d_18=31_300_125)
    assert count(on_meta("slow_r50", num_classes=101)) == 31_879_077
    assert count(on_meta("slow_r50", width=1 / 8)) == 505_832
    with torch.device("meta"):
        motion = ResNet3D("motion_r50", 1 / 8, 224, 16)
        assert motion.forward_map(torch.zeros(2, 3, 16, 224, 224)).shape == (2, 256, 8, 7, 7)
    assert count(motion) == 378_856


@pytest.mark.parametrize("name, frames, size, expected", [
    ("slow_r50", 8, 64, (2048, 4, 2, 2)), ("r2plus1d_50", 16, 224, (2048, 4, 7, 7)), ("s3d", 16, 224, (1024, 2, 7, 7)),
    ("r3d_18", 16, 112, (512, 2, 7, 7)), ("r2plus1d_18", 16, 112, (512, 2, 7, 7)), ("vit_tiny", 8, 64, (96, 4, 4, 4))])
def test_networks_give_maps_can_be_rebuilt_from_their_config_and_take_a_head(name, frames, size, expected):
    net, clips = on_meta(name, size, frames), torch.zeros(2, 3, frames, size, size, device="meta")
    assert net.forward_map(clips).shape == (2, *expected) and net(clips).shape == (2, net.dim) == (2, expected[0])
    again, classifier = on_meta(**net.config), on_meta(**net.config, num_classes=5)
    shapes = {k: v.shape for k, v in net.state_dict().items()}
    assert {k: v.shape for k, v in again.state_dict().items()} == shapes and again.config == net.config
    assert type(again) is type(net) and all(isinstance(v, (str, int, float, tuple)) for v in net.config.values())
    extra = {k for k in classifier.state_dict() if k not in shapes and not k.startswith("fc_norm.")}
    assert extra == {"head.weight", "head.bias"} and classifier(clips).shape == (2, 5)


def test_blocks_of_slow_r50_start_as_the_identity():
    for name, identity in (("slow_r50", True), ("r2plus1d_50", False)):
        blocks = [m for m in ResNet3D(name, 0.0625).modules() if isinstance(m, Bottleneck) and m.downsample is None]
        inputs = [noise(2, block.conv1.in_channels, 2, 4, 4) for block in blocks]
        assert len(blocks) == 12 and all(torch.equal(b(x), x) == identity for b, x in zip(blocks, inputs))


@pytest.mark.parametrize("name, size", [("r2plus1d_18", 32), ("r3d_18", 32), ("s3d", 64)])
def test_torchvision_s_weights_load_and_give_its_features(name, size, tmp_path):
    torch.manual_seed(0)
    public = getattr(torchvision.models.video, name)(num_classes=3).eval()
    torch.save(public.state_dict(), tmp_path / "public.pt")
    frames = 16 if name == "s3d" else 8
    net = make_backbone(name, size, frames)
    report = load_weights(net, tmp_path / "public.pt")
    assert not report.missing and len(report.unexpected) == 2                   # of the classifier
    if name == "s3d":
        public.avgpool = nn.AdaptiveAvgPool3d(1)
    setattr(public, "classifier" if name == "s3d" else "fc", nn.Identity())
    clips = torch.randn(2, 3, frames, size, size, generator=seeded())
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(clips), public(clips).flatten(1), atol=1e-5, rtol=1e-4)


def test_torchvision_s_other_networks_are_none_of_ours():
    assert "--backbone swin3d_t: choose vit_tiny" in error_of(make_backbone, "swin3d_t", 64, 8)


# ---- weights of image networks ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def image_network():
    torch.manual_seed(0)
    return with_statistics(torchvision.models.resnet50(num_classes=10)).eval()


def moco_file(image_network):
    """As MoCo saves it: with a head, the momentum encoder and the queue.  -> content, weights of the head"""
    head = {"fc.0.weight": noise(2048, 2048), "fc.0.bias": noise(2048)}
    head |= {"fc.2.weight": noise(128, 2048), "fc.2.bias": noise(128)}
    query = {k: v for k, v in image_network.state_dict().items() if not k.startswith("fc.")} | head
    content = {"module.queue": noise(128, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    for name, value in query.items():
        content |= {f"module.encoder_q.{name}": value, f"module.encoder_k.{name}": -value}
    return dict(epoch=200, arch="resnet50", state_dict=content), head


@pytest.mark.parametrize("name, moco", [("r2plus1d_50", True), ("r2plus1d_50", False), ("slow_r50", False)])
def test_an_image_network_gives_each_step_the_features_of_one_frame(image_network, tmp_path, name, moco):
    torch.save(moco_file(image_network)[0] if moco else image_network.state_dict(), tmp_path / "a.pth")
    net = make_backbone(name, 64, 8)
    report = load_weights(net, tmp_path / "a.pth")
    assert not [k for k in report.missing if not k.endswith("num_batches_tracked")] and len(report.loaded) >= 300
    assert not [k for k in report.loaded if "fc" in k or "head" in k]
    clip, (first, step) = torch.randn(3, 8, 64, 64, generator=seeded()), dict(slow_r50=(0, 2), r2plus1d_50=(1, 4))[name]
    flat = copy.deepcopy(image_network)
    flat.fc = nn.Identity()
    with torch.no_grad():
        expected = flat(clip.transpose(0, 1)[first::step])                      # (steps, 2048)
        got = net.eval().forward_map(clip[None]).mean((3, 4))[0].T
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max() and expected.std() > 0.01


def test_moco_s_weights_start_mcl_with_its_own_head_and_equal_keys(image_network, tmp_path):
    content, head = moco_file(image_network)
    torch.save(content, tmp_path / "a.pth")
    model = mcl.MCL(make_backbone("r2plus1d_50", 64, 8), FakeFlow(), 10, queue=8)
    assert resume_or_init(None, str(tmp_path / "a.pth"), model, None, None) == 0
    assert torch.equal(model.encoder.layer1[0].conv1.weight[:, :, 0], image_network.layer1[0].conv1.weight)
    for i, kind in product((0, 2), ("weight", "bias")):
        got = model.heads["inter"][i].state_dict()[kind]
        assert torch.equal(got, head[f"fc.{i}.{kind}"]), "that of the query encoder, not of the momentum encoder"
    assert same(dict(model.keys.named_parameters()), model.state_dict())


@pytest.mark.parametrize("kind", ["resnet18", "narrow", "empty", "part"])
def test_an_image_network_that_does_not_fit_is_an_error_of_the_user(image_network, tmp_path, kind):
    state = torchvision.models.resnet18().state_dict() if kind == "resnet18" else image_network.state_dict()
    if kind in ("empty", "part"):
        state = {k: v for k, v in state.items() if kind == "part" and "layer3.2.conv2" not in k}
    torch.save(state, tmp_path / "a.pth")
    net = make_backbone("r2plus1d_50", 64, 8, width=0.125 if kind == "narrow" else 1.0)
    message = error_of(load_weights, net, str(tmp_path / "a.pth"))
    assert "a.pth" in message and (kind != "part" or "layer3.2.conv2" in message)


# ---- weights of one's own --------------------------------------------------------------------------------------------

@each_method
def test_init_from_a_checkpoint_of_the_method_takes_all_but_queues_and_counts(method, tmp_path):
    source, model = (tiny(method, "r2plus1d_50", seed) for seed in (1, 2))
    own = {k: v.clone() for k, v in model.state_dict().items() if "queue." in k or k == "updates"}
    for tensor in (*source.keys.parameters(), *source.buffers()):               # as after some steps
        tensor.data.add_(1)
    torch.save(dict(model=source.state_dict()), tmp_path / "last.pt")
    assert resume_or_init(None, str(tmp_path / "last.pt"), model, None, None) == 0
    assert len(own) > 2 and same(source.state_dict() | own, model.state_dict())
    again = make_backbone(**source.encoder.config)                              # and the encoder alone is all there
    assert load_weights(again, tmp_path / "last.pt").missing == []
    assert same(again.state_dict(), source.encoder.state_dict())


@pytest.mark.parametrize("prefix", ["", "encoder.", "module.encoder_q."])
@each_method
def test_init_from_an_encoder_alone_is_copied_into_the_keys(method, prefix, tmp_path):
    source, model = (tiny(method, "r2plus1d_50", seed) for seed in (1, 2))
    torch.save(dict(model={prefix + k: v for k, v in source.encoder.state_dict().items()}), tmp_path / "encoder.pt")
    kept = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith(("encoder.", "keys.", "updates"))}
    for p in model.keys.parameters():
        p.data.add_(1)
    assert resume_or_init(None, str(tmp_path / "encoder.pt"), model, None, None) == 0
    state = model.state_dict()
    kept |= {"encoder." + name: value for name, value in source.encoder.state_dict().items()}
    assert same(kept, state)
    assert same({"keys." + k: v for k, v in kept.items() if "keys." + k in state and v.is_floating_point()}, state)


def test_without_weights_running_statistics_begin_with_those_of_the_first_batch():
    model = tiny("fame", "r2plus1d_50")
    norm, seen = model.encoder.stem.bn1, []
    norm.reset_running_stats()
    norm.register_forward_hook(lambda module, args, out: seen.append(args[0].mean((0, 2, 3, 4))))
    assert resume_or_init(None, "", model, None, None) == 0
    for step in range(2):
        model(batch("fame", backbone="r2plus1d_50", seed=step), seeded())
        model.update_keys()
    torch.testing.assert_close(norm.running_mean, 0.9 * seen[0] + 0.1 * seen[1])


# ---- settings --------------------------------------------------------------------------------------------------------

def config(method, *argv):
    return parse_config(MODULES[method].Config, MODULES[method].RECIPES, [str(a) for a in argv])


ALL = dict(optimizer="sgd", weight_decay=1e-4, momentum=0.999, temperature=0.1)
PUBLISHED = dict(
    fame=dict(queue=65536, epochs=200, warmup_epochs=0, frames=16, stride=2, image_size=112, batch=64, beta=0.5,
              merge=True, lr=0.01),
    mcl=dict(queue=131072, epochs=400, warmup_epochs=5, frames=16, stride=2, image_size=224, batch=32, order_weight=0,
             align_weight=1, lr=0.02),
    modist=dict(queue=65536, epochs=200, warmup_epochs=35, frames=8, stride=8, motion_frames=16, motion_stride=4,
                fps=30, image_size=224, min_crop=0.2, max_crop=0.766, min_shift=0.5, max_shift=10, cross_weight=1,
                motion_input="flow_edge", batch=64, lr=0.1))


@each_method
def test_the_defaults_are_the_published_ones(method):
    cfg, expected = config(method, "--data", "k400"), ALL | PUBLISHED[method]
    cfg.lr *= cfg.batch / 256                                                   # the field is per 256 videos
    assert {k: getattr(cfg, k) for k in expected} == pytest.approx(expected)


@each_method
def test_a_vit_gets_an_optimizer_of_its_own_but_keeps_the_recipe_and_the_flags(method):
    recipes = MODULES[method].RECIPES
    vit, toy, ucf, custom = (recipes[name] for name in ("vit", "toy", "ucf101", "custom"))
    for argv, expected in (
            ("", toy if method == "modist" else vit | toy), ("--backbone vit_small", vit | toy),
            ("--data ucf101", ucf), ("--data ucf101 --backbone vit_small", ucf | vit),
            ("--data a/place", custom), ("--data a/place --backbone vit_small", vit | custom | recipes["custom vit"]),
            ("--data ucf101 --backbone vit_base --optimizer sgd --lr 9", ucf | vit | dict(optimizer="sgd", lr=9))):
        cfg, defaults = config(method, *argv.split()), vars(MODULES[method].Config())
        assert {k: v for k, v in vars(cfg).items() if k not in ("data", "backbone", "given")} == {
            k: expected.get(k, v) for k, v in defaults.items() if k not in ("data", "backbone")}, argv
        assert vit["optimizer"] == "adamw" and cfg.warmup_epochs < cfg.epochs
        if method == "modist":
            assert cfg.frames * cfg.stride == cfg.motion_frames * cfg.motion_stride and cfg.min_crop <= cfg.max_crop


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw"])
def test_optimizers_train_all_but_the_keys_and_decay_what_they_should(name):
    model = tiny("fame", "slow_r50")
    model.head.mask_token = nn.Parameter(torch.zeros(1, 1, 8))                  # is no matrix
    optimizer = make_optimizer(name, model, 0.3, 0.05)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    on_vectors = 0.05 if name == "sgd" else 0.0
    trained = [*model.encoder.parameters(), *model.head.parameters()]
    assert decay == {id(p): 0.05 if p.ndim > 1 and len(p) > 1 else on_vectors for p in trained}
    own = dict(momentum=0.9, nesterov=name == "nesterov", dampening=0)
    own = dict(scale=1.0) | (dict(betas=(0.9, 0.95)) if name == "adamw" else own)
    assert all({k: group[k] for k in own} == own and group["lr"] == 0.3 for group in optimizer.param_groups)


SMALL = "--toy-train 24 --toy-test 16 --batch 4 --steps 2 --workers 0 --log-every 1 --queue 30 --no-compile".split()


class Reached(Exception):
    """With the arguments that a model would have got."""


OWN = dict(fame="--no-merge --beta 0.7", mcl="--no-motion-clips --no-motion-crops --min-crop 0.8 --order-weight 0.9 "
           "--align-weight 0.35 --attention softmax",
           modist="--stride 4 --frames 4 --motion-input flow --edge-clip 0.15 --cross-weight 0.45 --motion-motion")


@each_method
def test_the_model_gets_the_settings(method, here, monkeypatch):
    def build(*args, **kwargs):
        raise Reached(inspect.signature(METHODS[method]).bind(*args, **kwargs).arguments)
    monkeypatch.setattr(MODULES[method], METHODS[method].__name__, build)
    common_flags = "--momentum 0.55 --temperature 0.65 --colour 0.25 --flip 0.2 --out runs/reached".split()
    argv = [*SMALL, *common_flags, *OWN[method].split()]
    with pytest.raises(Reached) as reached:
        run(method, *argv)
    got, cfg = reached.value.args[0], config(method, *argv)
    named = {k: v for k, v in got.items() if hasattr(cfg, k) and k not in ("flow", "steps")}
    assert named == {k: getattr(cfg, k) for k in named} and len(named) == dict(fame=7, mcl=11, modist=9)[method]
    assert got["encoder"].config["frames"] == cfg.frames
    if method == "mcl":
        assert (got["steps"], got["warmup"]) == (2, 6)
    if method == "modist":
        assert got["rgb_step"] == 2 and got["motion"].config["frames"] == cfg.motion_frames
