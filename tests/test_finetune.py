"""finetune.py: the heads, views and crops, recipes, and whole runs of every protocol on miniature data sets."""
import csv
import dataclasses
import functools
import itertools
import json
import math
import re
import signal
import typing
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

import common
import fame
import finetune
import mcl
import modist
from common import DATA_SETS, Item, UserError, VideoInfo, load_file, make_backbone, parse_config
from finetune import Classifier, Config, Detector, KeyFrame, MotionFocus, RECIPES, check, person_clip, train_clips
from conftest import lines, put, run, start
from test_run import miniature

ENV = common.Env(torch.device("cpu"), 0, 1, None)
QUIET = dict(randaugment="none", erasing=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0)         # nothing is random


@pytest.fixture(autouse=True, scope="module")
def machine():
    """On the CPU, whose fp32 is compared with loops; the source of a Config, most of what parsing costs, is read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(common.inspect, "getsource", functools.cache(common.inspect.getsource))
        yield


def scrambled(module, seed=0, scale=0.3):
    """The module with all parameters and running statistics random: nothing is 0 or 1 by initialisation."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (scale if p.ndim < 2 else scale / math.sqrt(p[0].numel())) + (p.ndim < 2))
        for name, b in module.named_buffers():
            if "running" in name:
                b.copy_(torch.rand(b.shape, generator=g) + 0.5)
    return module.eval()


def small_vit(classes=5, size=32, frames=4, patch=8):
    torch.manual_seed(0)
    return make_backbone(image_size=size, frames=frames, patch_size=patch, dim=24, depth=2, heads=2, num_classes=classes)


def small_resnet(name="r2plus1d_50", classes=5, size=32):
    torch.manual_seed(0)
    return make_backbone(name, width=0.0625, image_size=size, frames=4, num_classes=classes)


# ---- 1. MOFO's head ----------------------------------------------------------------------------------------------------

def ragged(head, tokens, inside):
    """The motion-focused head, a sample and an attention head at a time, with sets of tokens that are really taken out."""
    def norm(x, layer):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * layer.weight + layer.bias

    out, D, a = [], tokens.shape[-1], head.attn
    for x, where in zip(tokens, inside):
        A, other = x[where], x[~where]
        if not len(A):
            out.append(x.mean(0))
            continue
        source = norm(other if len(other) else A, head.norm1)
        q = norm(A, head.norm1) @ a.q.weight.T + a.q_bias
        k, v = source @ a.kv.weight[:D].T, source @ a.kv.weight[D:].T + a.v_bias
        parts = []
        for columns in torch.arange(D).chunk(3):
            weight = (q[:, columns] @ k[:, columns].T / math.sqrt(len(columns))).exp()
            parts.append(weight / weight.sum(1, keepdim=True) @ v[:, columns])
        A = A + torch.cat(parts, 1) @ a.proj.weight.T + a.proj.bias
        hidden = F.gelu(norm(A, head.norm2) @ head.mlp.fc1.weight.T + head.mlp.fc1.bias)
        out.append((A + hidden @ head.mlp.fc2.weight.T + head.mlp.fc2.bias).mean(0))
    return torch.stack(out)


def test_motion_focus_is_the_loop_over_ragged_sets():
    head, (tokens, noise) = scrambled(MotionFocus(12)), torch.randn(2, 7, 10, 12, generator=torch.Generator().manual_seed(1))
    inside = noise[:, :, 0] > 0
    inside[0], inside[1], inside[2], inside[3] = False, True, torch.arange(10) == 4, torch.arange(10) != 4
    tokens.requires_grad_()
    features = head(tokens, inside)
    torch.testing.assert_close(features, ragged(head, tokens, inside), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features[0], tokens[0].mean(0))                          # nothing moves: as it is
    features.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in [tokens, *head.parameters()]) and all(p.grad.any() for p in head.parameters())


@pytest.mark.parametrize("nothing", [False, True])
def test_motion_focus_without_a_choice_has_finite_gradients(nothing):
    head, tokens = scrambled(MotionFocus(12)), torch.randn(3, 10, 12, requires_grad=True)
    head(tokens, torch.full((3, 10), not nothing)).square().sum().backward()
    assert tokens.grad.isfinite().all() and tokens.grad.any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())


def test_what_is_outside_is_only_looked_at():
    """Queries are inside, keys and values outside: with a value projection of 0 nothing outside matters."""
    head, tokens = scrambled(MotionFocus(12)), torch.randn(1, 10, 12)
    inside, other = torch.arange(10)[None] < 4, tokens.clone()
    other[:, 4:] += 1 + torch.randn(1, 6, 12)
    assert not torch.allclose(head(tokens, inside), head(other, inside), atol=1e-3)
    head.attn.kv.weight.data[12:] = 0
    torch.testing.assert_close(head(tokens, inside), head(other, inside))


MCA = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q.weight", "attn.kv.weight", "attn.q_bias",
       "attn.v_bias", "attn.proj.weight", "attn.proj.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]


def test_a_public_mofo_file_fits_by_name(tmp_path):
    network = small_vit()
    state = {k: torch.randn_like(v) for k, v in network.state_dict().items()}
    shapes = {k: v.shape for k, v in MotionFocus(24).state_dict().items()}
    assert sorted(shapes) == sorted(MCA)
    for branch in ("local_MCA", "global_MCA"):                                          # the latter is never used
        state |= {f"{branch}.0.{name}": torch.randn(shapes[name]) for name in MCA}
    state |= {"soft_att_local.weight": torch.ones(24, 24), "soft_att_local.b": torch.ones(24), "patch_yab.weight": torch.ones(3)}
    torch.save(dict(module=state, backbone=network.config), tmp_path / "mp_rank_00_model_states.pt")
    cfg = Config(init=str(tmp_path / "mp_rank_00_model_states.pt"), mode="test", focused=True)
    loaded = finetune.build_network(cfg, 5)[0].state_dict()
    assert len(loaded) == len(network.state_dict()) + 14 and all(torch.equal(x, state[name]) for name, x in loaded.items())


# ---- 2. The classifier -------------------------------------------------------------------------------------------------

class Spy(torch.nn.Module):
    """Stands where MOFO's head stands and keeps what it is given."""

    def forward(self, tokens, inside):
        self.inside = inside
        return tokens.mean(1)


def focused_model(monkeypatch, find, classes=5, **settings):
    """A classifier whose motion boxes are find(clips), and the spy in it."""
    network = small_vit(classes)
    network.local_MCA = torch.nn.ModuleList([Spy()])
    monkeypatch.setattr(finetune, "find_motion", lambda flow, clips, tubelet: (None, None, find(clips), None))
    cfg = Config(**{**QUIET, "focused": True, **settings})
    return Classifier(network, [classes], cfg, flow=object()), network.local_MCA[0]


def bright_box(clips):
    """Around what is brighter than 200, in any frame: (B, 3, T, H, W) -> (B, 4)."""
    boxes = torch.zeros(len(clips), 4)
    for i, clip in enumerate(clips):
        y, x = (clip > 200).any(0).any(0).nonzero(as_tuple=True)
        if len(x):
            boxes[i] = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return boxes


def patches_of(pixels, times=2, patch=8):
    """Pixels (H, W) bool -> tokens (times * H' * W',) bool: any pixel of the patch, the same at all times."""
    H, W = pixels.shape
    flat = [bool(pixels[y:y + patch, x:x + patch].any()) for y in range(0, H, patch) for x in range(0, W, patch)]
    return torch.tensor(flat * times)


def test_what_a_box_holds(monkeypatch):
    boxes = torch.tensor([[3.2, 4.9, 10.1, 20.0], [0, 0, 0, 0], [8, 8, 16, 16], [7, 7, 9, 9], [0, 0, 32, 32], [15.5, 0, 16.0, 1]])
    model, spy = focused_model(monkeypatch, lambda clips: boxes)
    scrambled(model.network)
    inside = model.inside(torch.zeros(6, 3, 4, 32, 32, dtype=torch.uint8))
    assert inside.shape == (6, 1, 1, 32, 32)
    for pixels, (x1, y1, x2, y2) in zip(inside[:, 0, 0], boxes.tolist()):               # a pixel that is touched is inside
        for y, x in itertools.product(range(32), repeat=2):
            assert pixels[y, x] == (x + 1 > x1 and x < x2 and y + 1 > y1 and y < y2), (x, y)
    clips = torch.randn(6, 3, 4, 32, 32)
    torch.testing.assert_close(model.logits(clips, inside), model.network(clips))                    # the spy is the plain mean
    assert spy.inside.sum(1).tolist() == [2 * n for n in (6, 0, 1, 4, 16, 1)]
    assert all(torch.equal(tokens, patches_of(pixels > 0)) for tokens, pixels in zip(spy.inside, inside[:, 0, 0]))


def test_the_box_is_that_of_the_augmented_clip(monkeypatch):
    clips = torch.zeros(8, 3, 4, 32, 32, dtype=torch.uint8)
    for i in range(8):
        clips[i, :, i % 4, 2 * i:2 * i + 3, i:i + 7] = 250
    model, spy = focused_model(monkeypatch, bright_box, flip=True)
    model(clips, torch.zeros(8, dtype=torch.long), torch.Generator().manual_seed(3))
    seen, flipped = common.flip(clips, torch.Generator().manual_seed(3))
    assert 0 < flipped.sum() < 8
    assert all(torch.equal(tokens, patches_of((clip > 200).any(0).any(0))) for tokens, clip in zip(spy.inside, seen))
    moved, erased = [], []
    monkeypatch.setattr(finetune, "random_erasing", lambda clips, g, p: (erased.append((float(clips.min()), p)), clips)[1])
    monkeypatch.setattr(finetune, "rand_augment", lambda clips, g, **kw: (moved.append(kw), clips.roll((11, 5), (3, 4)))[1])
    model.cfg.randaugment, model.cfg.flip, model.cfg.erasing = "mcl-hmdb51", False, 0.3
    model(clips, torch.zeros(8, dtype=torch.long), torch.Generator().manual_seed(3))
    seen = [(clip > 200).any(0).any(0).roll((11, 5), (0, 1)) for clip in clips]
    assert all(torch.equal(tokens, patches_of(pixels)) for tokens, pixels in zip(spy.inside, seen))
    assert moved == [dict(ops=3, magnitude=17, std=0.0, p=1.0, scale=30)] and erased[0][0] < -1 and erased[0][1] == 0.3
    model.eval().scores(clips)                                                          # and that of the clip, at test time
    assert all(torch.equal(tokens, patches_of((clip > 200).any(0).any(0))) for tokens, clip in zip(spy.inside, clips))


@pytest.mark.parametrize("settings", [dict(mixup=0.8), dict(cutmix=1.0), dict(mixup=0.8, cutmix=1.0)])
def test_where_clips_are_mixed_so_are_their_insides_and_targets(settings, monkeypatch):
    """Each clip has one colour, which tells of every mixed pixel how much of it is the partner's."""
    boxes = torch.tensor([[0, 0, 9, 9], [20, 3, 31, 6], [0, 0, 0, 0], [4, 12, 30, 30], [0, 30, 32, 32], [11, 11, 12, 12]]).float()
    model, spy = focused_model(monkeypatch, lambda clips: boxes, label_smoothing=0.1, **settings)
    model.sizes, labels, kinds = [2, 3], torch.tensor([[0, 2], [1, 0], [1, 1], [0, 0], [1, 2], [0, 1]]), set()
    clips = torch.arange(20, 20 + 6 * 30, 30, dtype=torch.uint8).view(6, 1, 1, 1, 1).expand(6, 3, 4, 32, 32)
    seen, logits, forward = [], torch.randn(6, 5), model.logits
    model.logits = lambda clips, inside: (seen.append(clips), forward(clips, inside), logits)[-1]
    own = [model.inside(clips)[i, 0, 0] > 0 for i in range(6)]
    for seed in range(6):
        loss, stats = model(clips, labels, torch.Generator().manual_seed(seed))
        colours, expected, right = common.normalize(clips)[:, 0, 0, 0, 0], 0, 0
        for i in range(6):
            share = (seen[-1][i, 0, 0] - colours[5 - i]) / (colours[i] - colours[5 - i])         # (H, W) of the own clip
            kinds.add("cut" if share.min() < 0.001 and share.max() > 0.999 else "mix")
            assert torch.equal(spy.inside[i], patches_of(own[i] & (share > 1e-4) | own[5 - i] & (share < 1 - 1e-4)))
            lam, first = share.mean(), 0
            for head, size in enumerate(model.sizes):
                target = torch.full((size,), 0.1 / size)
                target[labels[i, head]] += 0.9 * lam
                target[labels[5 - i, head]] += 0.9 * (1 - lam)
                expected = expected - (target * logits[i, first:first + size].log_softmax(0)).sum() / 6
                first += size
            right += int(logits[i, :2].argmax()) == labels[i, 0] and int(logits[i, 2:].argmax()) == labels[i, 1]
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        assert float(stats["train_acc"]) == pytest.approx(100 * right / 6)
    assert kinds == {name for name, key in (("mix", "mixup"), ("cut", "cutmix")) if key in settings}


def test_repeats_share_a_label_and_smoothing_is_that_of_the_head():
    cfg = Config(**{**QUIET, "label_smoothing": 0.2, "repeats": 2})
    model = Classifier(scrambled(small_vit(7), scale=3), [3, 4], cfg)
    clips, labels = torch.randint(0, 256, (6, 3, 4, 32, 32), dtype=torch.uint8), torch.tensor([[0, 3], [2, 1], [1, 0]])
    loss = model.eval()(clips, labels)[0]
    logits, expected = model.logits(common.normalize(clips)), 0
    for i in range(6):
        for part, size, label in zip(logits[i].split([3, 4]), (3, 4), labels[i // 2]):
            p = part.softmax(0)
            expected = expected - sum((0.2 / size + 0.8 * (c == label)) * p[c].log() for c in range(size)) / 6
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_scores_are_probabilities_per_head_or_logits():
    model = Classifier(scrambled(small_vit(7), scale=1), [3, 4], Config(**QUIET)).eval()
    clips = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    scores, logits = model.scores(clips), model.network(common.normalize(clips))
    for part, raw in zip(scores.split([3, 4], 1), logits.split([3, 4], 1)):
        torch.testing.assert_close(part, raw.exp() / raw.exp().sum(1, keepdim=True))
    model.cfg.average = "logits"
    torch.testing.assert_close(model.scores(clips), logits)
    model.cfg.unit_features = True
    x = model.network.fc_norm(model.network.forward_map(common.normalize(clips)).mean((2, 3, 4)))
    torch.testing.assert_close(model.scores(clips), model.network.head(x / x.norm(dim=1, keepdim=True)))


def test_jitter_sees_colours_and_only_where_asked(monkeypatch):
    calls, clips = [], torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    monkeypatch.setattr(finetune, "colour_jitter", lambda x, g, **kw: (calls.append((x.amax(), kw)), x)[1])
    model = Classifier(small_vit(), [5], Config(**QUIET))
    for settings in (dict(), dict(jitter=0.8, hue=0.1, grey=0.2), dict(jitter=0.0, grey=0.5)):
        model.cfg = Config(**QUIET, **settings)
        model(clips, torch.zeros(2, dtype=torch.long))
    assert [kw for _, kw in calls] == [dict(hue=0.1, p=0.8, grey=0.2), dict(hue=0.0, p=0.0, grey=0.5)]
    assert all(0.9 < top <= 1 for top, _ in calls)


@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_a_fixed_trunk_stays_as_it_is(mode):
    network = small_resnet()
    model = Classifier(network, [5], Config(**{**QUIET, "mode": mode})).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    model(torch.randint(0, 256, (4, 3, 4, 32, 32), dtype=torch.uint8), torch.arange(4))[0].backward()
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    graded = {k.split(".")[0] for k, p in network.named_parameters() if p.grad is not None}
    assert model.training and network.training == (mode == "finetune") and network.head.training == (mode == "finetune")
    assert graded == {"head"} and not changed if mode == "linear" else "stem" in graded and changed
    assert not model.eval().network.training


def test_dropout_is_for_training_only():
    clips = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    for mode in ("finetune", "linear"):
        model = Classifier(scrambled(small_vit()), [5], Config(**{**QUIET, "dropout": 0.5, "mode": mode})).train()
        assert not torch.equal(model.logits(common.normalize(clips)), model.logits(common.normalize(clips)))
        model.eval()
        torch.testing.assert_close(model.logits(common.normalize(clips)), model.network(common.normalize(clips)))
    detector = Detector(small_vit(), Config(dropout=0.9)).train()
    x = common.normalize(clips), torch.tensor([[0, 0, 20, 20.0]]), torch.tensor([1, 0])
    assert not torch.equal(detector.logits(*x), detector.logits(*x))
    assert torch.equal(detector.eval().logits(*x), detector.logits(*x))


# ---- 3. Learning rates -------------------------------------------------------------------------------------------------

def test_layer_decay_and_what_vectors_get():
    network = small_vit()
    network.local_MCA = torch.nn.ModuleList([MotionFocus(24)])
    network.blocks[0].norm1.weight.requires_grad = False
    for vectors in (0.0, 0.05, 0.01):
        groups, seen = finetune.layer_decay_groups(network, 1.0, 0.05, 0.5, vectors), {}
        for group in groups:
            seen |= {id(p): (group["scale"], group["weight_decay"]) for p in group["params"]}
        assert sum(len(g["params"]) for g in groups) == len(seen) == len([*network.parameters()]) - 1
        assert all(group["lr"] == 1 for group in groups)
        for name, p in network.named_parameters():
            scale = {"patch_embed": 0.5**3, "blocks.0": 0.5**2, "blocks.1": 0.5}.get(re.match(r"blocks\.\d|\w+", name)[0], 1.0)
            if p.requires_grad:
                assert seen[id(p)] == (scale, vectors if p.ndim < 2 else 0.05), name
    assert {g["scale"] for g in finetune.layer_decay_groups(small_resnet(), 1.0, 0.05, 0.5)} == {1.0}


# ---- 4. Which frames and which part of them ------------------------------------------------------------------------------

class Fake:
    """A video that shows which frames and boxes are asked for, as 8 numbers: n, size, box."""

    def __init__(self, frames, height, width, fps=10.0):
        self.info, self.path = VideoInfo(frames, fps, height, width, frames / fps), "film.mp4"

    def index_at(self, seconds):
        return min(int(seconds * self.info.fps + 1e-6), self.info.frames - 1)

    def read(self, indices, size=None, crop=None):
        assert 0 <= min(indices) and max(indices) < self.info.frames
        self.asked = [(int(n), tuple(map(int, box))) for n, box in zip(indices, crop)]
        for _, (x1, y1, x2, y2) in self.asked:
            assert 0 <= x1 < x2 <= self.info.width and 0 <= y1 < y2 <= self.info.height
        return np.zeros((len(indices), *size, 3), np.uint8)

    def views(self, frames):
        """[(frame numbers, box)], one for each view"""
        parts = [self.asked[i:i + frames] for i in range(0, len(self.asked), frames)]
        assert all(len({box for _, box in part}) == 1 for part in parts)
        return [([n for n, _ in part], part[0][1]) for part in parts]


def spread(room, count):
    return [round(room / 2)] if count == 1 else [round(k * room / (count - 1)) for k in range(count)]


@pytest.mark.parametrize("frames, first, last", [(100, 0, 99), (100, 20, 60), (9, 0, 8), (1, 0, 0)])
@pytest.mark.parametrize("height, width", [(48, 64), (64, 48), (300, 300), (240, 427)])
@pytest.mark.parametrize("views", [(1, 1), (2, 3), (3, 1)])
def test_views_at_test_time(frames, first, last, height, width, views):
    video, (T, S) = Fake(frames, height, width), views
    item = Item("film.mp4", 0, first / 10, math.inf if last + 1 == frames else last / 10)
    for sampling, raw, stride in (("dense", False, 3), ("dense", True, 1), ("uniform", True, 4), ("uniform", False, 4)):
        cfg = Config(sampling=sampling, raw_crop=raw, stride=stride)
        assert finetune.test_clips(video, item, None, cfg, 16, 8, views).shape == (T * S, 8, 16, 16, 3)
        side = min(height, width, 224) if raw else min(height, width)
        expected = []
        for t in range(T):
            if sampling == "dense":                              # starts from the first to the last one that fits
                begin = spread(max(0, last - first - 7 * stride), T)[t]
                numbers = [min(first + begin + stride * i, last) for i in range(8)]
            else:                                                # the middle of the t-th of T parts of each segment
                numbers = [first + math.floor((last - first + 1) / 8 * (i + (t + 0.5) / T)) for i in range(8)]
            for shift in spread(max(height, width) - side, S):
                other = (min(height, width) - side) // 2
                x, y = (shift, other) if width >= height else (other, shift)
                expected.append((numbers, (x, y, x + side, y + side)))
        assert video.views(8) == expected


def test_uniform_views_share_no_frame_and_cover_all():
    video = Fake(64, 32, 32)
    finetune.test_clips(video, Item("film.mp4"), None, Config(sampling="uniform"), 16, 8, (8, 1))
    assert sorted(n for numbers, _ in video.views(8) for n in numbers) == list(range(64))


@pytest.mark.parametrize("sampling", ["dense", "uniform"])
def test_views_of_training(sampling):
    rng, item, video = np.random.default_rng(0), Item("film.mp4", 0, 2.0, 8.0), Fake(100, 60, 80)           # frames 20 to 80
    cfg, seen, boxes = Config(sampling=sampling, stride=3, repeats=3, min_crop=0.3, aspect=1.5), [], []
    for _ in range(60):
        assert train_clips(video, item, rng, cfg, 16, 8).shape == (3, 8, 16, 16, 3)
        views = video.views(8)
        assert len(views) == 3
        seen += [numbers for numbers, _ in views]
        boxes += [box for _, box in views]
    seen = np.array(seen)
    assert seen.min() == 20 and seen.max() == 80 and len(set(boxes)) > 170 and len(set(map(tuple, seen[::3]))) > 20
    assert not np.array_equal(seen[0::3], seen[1::3])                                       # repeats differ
    shares = [(x2 - x1) * (y2 - y1) / 4800 for x1, y1, x2, y2 in boxes]
    aspects = [(x2 - x1) / (y2 - y1) for x1, y1, x2, y2 in boxes]
    assert 0.28 < min(shares) < 0.4 and 0.8 < max(shares) <= 1 and 0.64 < min(aspects) < 0.75 and 1.35 < max(aspects) < 1.56
    if sampling == "dense":
        assert (np.diff(seen) == 3).all() and set(seen[:, 0]) == set(range(20, 60))
    else:                                                                                   # one of each eighth of 61 frames
        edges = 20 + 61 / 8 * np.arange(9)
        assert (seen >= np.floor(edges[:-1])).all() and (seen <= np.ceil(edges[1:])).all() and len(np.unique(np.diff(seen))) > 8


# ---- 5. People in films --------------------------------------------------------------------------------------------------

def film(path, picture, frames=30, fps=10):
    """A film of one picture (H, W, 3), without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", fps, width=picture.shape[1], height=picture.shape[0], pix_fmt="yuv444p",
                                 options=dict(qp="0", preset="ultrafast"))
        for _ in range(frames):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        file.mux(stream.encode())
    return path


PEOPLE = np.array([[0.3, 0.25, 0.5, 0.75], [0.6, 0.1, 0.9, 0.5], [0.0, 0.4, 0.05, 0.6]], np.float32)     # the last at the edge


@pytest.fixture(scope="session")
def street(tmp_path_factory):
    """A film of three people that stand still, rectangles in red, green and blue, who do the actions 11, 12 and 13."""
    picture, actions = np.zeros((120, 160, 3), np.uint8), np.zeros((3, 80), bool)
    for who, (x1, y1, x2, y2) in enumerate((PEOPLE * [160, 120, 160, 120]).round().astype(int)):
        picture[y1:y2, x1:x2, who], actions[who, 10 + who] = 255, True
    path = film(tmp_path_factory.mktemp("street") / "film.mp4", picture)
    return KeyFrame(str(path), 0, "film,0901", 901, PEOPLE, np.ones(3, np.float32), actions)


def seen_box(picture, who):
    """Where a picture (H, W, 3) has the person's colour -> x1, y1, x2, y2 or None."""
    y, x = np.nonzero(picture[:, :, who] > 125)
    return (x.min(), y.min(), x.max() + 1, y.max() + 1) if len(x) else None


def test_boxes_follow_the_crop_of_training(street):
    rng, dropped, sides = np.random.default_rng(0), 0, []
    with common.Video(street.path) as video:
        for _ in range(25):
            out = person_clip(video, street, rng, Config(stride=2), 64, 2, train=True)
            assert out["clips"].shape == (1, 2, 64, 64, 3) and out["boxes"].dtype == np.float32
            assert out["count"].tolist() == [len(out["boxes"])] and len(out["actions"]) == len(out["boxes"])
            present, picture = [int(np.flatnonzero(actions)[0]) - 10 for actions in out["actions"]], out["clips"][0, 0]
            for box, who in zip(out["boxes"], present):
                assert np.allclose(box, seen_box(picture, who), atol=1.3)
                if who == 0 and 0 < box[0] and box[2] < 64 and 0 < box[1] and box[3] < 64:
                    sides.append(32 * 64 / (box[2] - box[0]))                             # how many pixels of the film are seen
            dropped += len(out["boxes"]) < 3
            for who in range(3):                                                         # whoever is seen is not dropped
                seen = seen_box(picture, who)
                assert who in present or seen is None or min(seen[2] - seen[0], seen[3] - seen[1]) <= 2
    assert dropped > 3 and 120 * 224 / 320 - 2 < min(sides) < 90 and 98 < max(sides) < 120 * 224 / 256 + 2


@pytest.mark.parametrize("test_size, shape", [(0, (64, 80)), (48, (48, 64)), (92, (96, 128)), (256, (256, 336))])
def test_boxes_follow_the_scale_of_testing(street, test_size, shape):
    with common.Video(street.path) as video:
        out = person_clip(video, street._replace(actions=None), None, Config(stride=2, test_size=test_size), 64, 2)
    assert out["clips"].shape == (1, 2, *shape, 3) and out["count"].tolist() == [3] and out["actions"].shape == (3, 80)
    for who, box in enumerate(out["boxes"]):
        assert np.allclose(box, seen_box(out["clips"][0, 0], who), atol=1.3)
    assert np.allclose(out["boxes"][1] / (shape[::-1] * 2), PEOPLE[1], atol=1e-3)


def test_flipped_clips_have_mirrored_boxes(street, monkeypatch):
    with common.Video(street.path) as video:
        parts = [person_clip(video, street, np.random.default_rng(i), Config(stride=2), 64, 2, train=True) for i in range(8)]
    batch = {key: torch.from_numpy(np.concatenate([part[key] for part in parts])) for key in parts[0]}
    batch["clips"] = batch["clips"].permute(0, 4, 1, 2, 3)
    cfg, seen, jittered = Config(**QUIET, flip=True, jitter=1.0, hue=0.05), [], []
    detector = Detector(small_vit(80, size=64, frames=2), cfg)
    detector.logits = lambda clips, boxes, count: (seen.append((clips, boxes, count)), torch.zeros(len(boxes), 80))[1]
    monkeypatch.setattr(finetune, "colour_jitter", lambda x, g, *a, **kw: (jittered.append((a, kw)), x)[1])
    loss, stats = detector(batch, None, torch.Generator().manual_seed(0))
    (clips, boxes, count), flipped = seen[0], common.flip(batch["clips"], torch.Generator().manual_seed(0))[1]
    assert 0 < flipped.sum() < 8 and jittered == [((0.1, 0, 0.1, 0.05, 1.0), dict(grey=0))]
    clips, first = (common.unnormalize(clips) * 255).round().byte().permute(0, 2, 3, 4, 1).numpy(), 0
    for clip, n in zip(clips, count.tolist()):
        for box, actions in zip(boxes[first:first + n], batch["actions"][first:first + n]):
            assert np.allclose(box, seen_box(clip[0], int(actions.nonzero()[0]) - 10), atol=1.3)
        first += n
    assert float(loss) == pytest.approx(math.log(2)) and stats["people"] == first / 8


@pytest.mark.parametrize("kind", ["vit", "slow_r50"])
def test_detector_is_a_loop_over_boxes(kind):
    network = scrambled(small_vit(80, size=64, patch=16) if kind == "vit" else small_resnet("slow_r50", 80, 64))
    if kind != "vit":
        finetune.dilate(network)
    detector, (H, W) = Detector(network, Config()).eval(), (64, 96)
    clips, g = torch.randn(3, 3, 4, H, W), torch.Generator().manual_seed(0)
    corner = torch.rand(5, 2, generator=g) * torch.tensor([60.0, 40])
    boxes = torch.cat([corner, corner + 5 + 20 * torch.rand(5, 2, generator=g)], 1)
    count, owner = torch.tensor([2, 0, 3]), [0, 0, 2, 2, 2]
    with torch.no_grad():
        logits, rows = detector.logits(clips, boxes, count), []
        for box, i in zip(boxes, owner):
            maps = network.forward_map(clips[i:i + 1]).mean(2)
            assert maps.shape[2:] == (H // 16, W // 16)
            rows.append(network.head(roi_align(maps, [box[None]], 7, 1 / 16, aligned=True).flatten(2).max(2).values)[0])
        torch.testing.assert_close(logits, torch.stack(rows), rtol=1e-3, atol=1e-4)
        order = [1, 0, 4, 2, 3]
        torch.testing.assert_close(detector.logits(clips, boxes[order], count), logits[order], rtol=1e-3, atol=1e-4)
        assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_detector_s_loss_and_a_batch_without_people():
    detector = Detector(small_vit(80), Config(**QUIET)).train()
    batch = dict(clips=torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8),
                 boxes=torch.tensor([[0, 0, 20, 20.0], [5, 5, 30, 30]]), actions=torch.rand(2, 80) < 0.1,
                 count=torch.tensor([0, 2]))
    loss, stats = detector(batch, torch.zeros(2))
    p = detector.logits(common.normalize(batch["clips"]), batch["boxes"], batch["count"]).sigmoid()
    torch.testing.assert_close(loss, -torch.where(batch["actions"], p, 1 - p).log().mean())
    assert stats["people"] == 1
    nobody = dict(batch, boxes=torch.zeros(0, 4), actions=torch.zeros(0, 80, dtype=torch.bool), count=torch.tensor([0, 0]))
    loss, stats = detector(nobody, torch.zeros(2))
    loss.backward()
    assert loss == 0 and stats["people"] == 0
    assert all(p.grad is None or not p.grad.any() for p in detector.parameters())


# ---- 6. Networks at other sizes --------------------------------------------------------------------------------------------

def test_a_vit_on_other_picture_sizes():
    network = scrambled(small_vit())
    same = torch.randn(2, 3, 4, 32, 32)
    tokens = network.tokens(common.patchify(same, 8, 2))
    assert torch.equal(network.forward_map(same), tokens.transpose(1, 2).unflatten(2, (2, 4, 4)))
    x = torch.randn(2, 3, 4, 48, 24)                                                     # a grid of 6 x 3
    positions = [F.interpolate(network.positions[0, 16 * t:16 * (t + 1)].T.reshape(1, 24, 4, 4), (6, 3), mode="bicubic")
                 for t in range(2)]
    tokens = network.patch_embed(common.patchify(x, 8, 2)) + torch.cat([p[0].flatten(1).T for p in positions])
    for block in network.blocks:
        tokens = block(tokens)
    maps = network.forward_map(x)
    assert maps.shape == (2, 24, 2, 6, 3)
    for t, i, j in itertools.product(range(2), range(6), range(3)):
        torch.testing.assert_close(maps[:, :, t, i, j], tokens[:, 18 * t + 3 * i + j], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["slow_r50", "r2plus1d_50"])
def test_dilation_keeps_the_resolution_and_the_function(name):
    """Where the first block of the stage looks at its middle tap alone, every second place is what there was before."""
    network, x = scrambled(small_resnet(name, 0)), torch.randn(1, 3, 4, 96, 64)
    first = network.layer4[0].conv2
    first = first if isinstance(first, torch.nn.Conv3d) else first[0]
    first.weight.data *= torch.zeros(3, 3).index_put_((torch.tensor(1), torch.tensor(1)), torch.tensor(1.0))
    names, before = list(network.state_dict()), network.forward_map(x)
    finetune.dilate(network)
    after = network.forward_map(x)
    assert list(network.state_dict()) == names and before.shape[-2:] == (3, 2) and after.shape[-2:] == (6, 4)
    assert after.shape[:3] == before.shape[:3] and before.std() > 1e-3
    torch.testing.assert_close(after[..., ::2, ::2], before, rtol=1e-3, atol=1e-4)


# ---- 7. Recipes ----------------------------------------------------------------------------------------------------------

PAPERS, MODES = finetune.CHOICES["recipe"], ("finetune", "linear", "knn", "retrieval", "test")


def config(**flags):
    return parse_config(Config, RECIPES, [w for k, v in flags.items() for w in (f"--{k.replace('_', '-')}", str(v))])


@pytest.mark.parametrize("recipe", PAPERS)
def test_every_combination_is_a_valid_configuration(recipe):
    """Later keys override earlier ones, and a key applies if all of its words are there."""
    types = typing.get_type_hints(Config)
    for data, mode in itertools.product((*DATA_SETS, "my_videos"), MODES):
        cfg, words, expected = config(data=data, recipe=recipe, mode=mode), {data, recipe, mode}, vars(Config()).copy()
        words |= {"custom"} if data == "my_videos" else set()
        for key, values in RECIPES.items():
            if all(word in words for word in key.split()):
                expected.update(values)
        assert dataclasses.asdict(cfg) == {**expected, "data": data, "recipe": recipe, "mode": mode}
        for field in fields(cfg):
            value = getattr(cfg, field.name)
            assert isinstance(value, (int, float) if types[field.name] is float else types[field.name]), (field.name, value)
            assert isinstance(value, bool) == (types[field.name] is bool), (field.name, value)
        if data != "ava" or mode in ("finetune", "test"):
            assert all(n >= 1 for views in check(cfg) for n in views)
            assert not (cfg.batch % cfg.device_batch or cfg.device_batch % cfg.repeats), (data, recipe, mode)


def test_every_recipe_can_apply():
    words = {*DATA_SETS, "custom", *PAPERS, *MODES}
    keys = [set(key.split()) for key in RECIPES]
    assert set().union(*keys) <= words and len({frozenset(key) for key in keys}) == len(keys)
    assert all(len(key & {*DATA_SETS, "custom"}) < 2 and len(key & {*PAPERS}) < 2 and len(key & {*MODES}) < 2 for key in keys)


@pytest.mark.parametrize("data, recipe, mode, lr, expected", [                             # lr: of a whole batch, as published
    ("ssv2", "videomae", "finetune", 1e-3, dict(epochs=50, batch=512, views="2x3", sampling="uniform",
                                                flip=False, layer_decay=0.75)),
    ("k400", "videomae", "finetune", 7.5e-4, dict(epochs=75, batch=384, views="5x3", sampling="dense", repeats=2,
                                                  flip=True, stride=4)),
    ("ucf101", "videomae", "finetune", 2.5e-4, dict(epochs=100, layer_decay=0.7, drop_path=0.2, dropout=0.5, min_lr=1e-5)),
    ("epic", "videomae", "finetune", 1e-3, dict(label="verb-noun")),
    ("ava", "videomae", "finetune", 1.25e-4, dict(epochs=30, batch=128, drop_path=0.2, mixup=0.0, randaugment="none",
                                                  min_score=0.8, times_score=True, test_size=256, repeats=1, flip=True)),
    ("epic", "mofo", "finetune", 1.25e-4, dict(label="action", focused=True, epochs=100, randaugment="none",
                                               erasing=0.0, min_crop=0.5)),
    ("ssv2", "mofo", "finetune", 1.25e-4, dict(focused=True, randaugment="videomae", mixup=0.8, flip=False)),
    ("ssv2", "mofo", "knn", None, dict(focused=False)),
    ("k400", "mme", "finetune", 1.5e-3, dict(epochs=75, min_crop=0.25, views="7x3", mixup=0.8)),
    ("hmdb51", "mme", "finetune", 5e-4, dict(epochs=100, views="10x3", drop_path=0.1, dropout=0.0, layer_decay=0.75)),
    ("ssv2", "mme", "linear", 2e-3, dict(classifier="trained", epochs=30, optimizer="adamw", weight_decay=0.05, mixup=0.8)),
    ("ucf101", "fame", "finetune", 0.025, dict(optimizer="sgd", drops="60,120", epochs=150, weight_decay=1e-4,
                                               dropout=0.7, stride=2, frames=16, views="10x1", raw_crop=True,
                                               average="logits", mixup=0.0, randaugment="none")),
    ("ucf101", "fame", "linear", 30.0, dict(classifier="trained", weight_decay=0.0, dropout=0.0, jitter=0.0, warmup_epochs=0.0)),
    ("ucf101", "fame", "retrieval", None, dict(center=True, views="10x1", train_views="10x1", stride=2)),
    ("hmdb51", "videomae", "retrieval", None, dict(center=False, views="10x1", train_views="10x1", stride=2, sampling="dense")),
    ("ucf101", "mcl", "finetune", 0.01, dict(optimizer="nesterov", batch=256, clip_grad=40.0, dropout=0.9,
                                             randaugment="mcl-ucf101")),
    ("hmdb51", "mcl", "finetune", 0.01, dict(randaugment="mcl-hmdb51", views="20x3", test_size=256)),
    ("ucf101", "mcl", "linear", None, dict(classifier="svm", raw_crop=True, views="20x1", train_views="20x1", frames=16)),
    ("k400", "mcl", "linear", 16.0, dict(classifier="trained", unit_features=True, optimizer="sgd", epochs=100,
                                         weight_decay=0.0)),
    ("hmdb51", "modist", "finetune", 0.01, dict(optimizer="nesterov", epochs=200, warmup_epochs=34.0, jitter=0.6, grey=0.5,
                                                stride=8)),
    ("ucf101", "modist", "linear", 32.0, dict(classifier="trained", epochs=200, warmup_epochs=0.0, jitter=0.0, dropout=0.0)),
    ("ava", "modist", "finetune", None, dict(optimizer="nesterov", min_score=0.9, times_score=False, drops="16,24,28",
                                             epochs=32)),
    ("my_videos", "videomae", "finetune", None, dict(sampling="dense", batch=16, flip=True)),
    ("toy", "mcl", "finetune", 0.02, dict(optimizer="nesterov", frames=0, test_size=0, views="1x1", mixup=0.0))])
def test_published_settings(data, recipe, mode, lr, expected):
    cfg = config(data=data, recipe=recipe, mode=mode)
    assert {name: getattr(cfg, name) for name in expected} == expected
    assert lr is None or cfg.lr * cfg.batch / 256 == pytest.approx(lr)


def test_a_directory_named_like_a_recipe_is_data_of_one_s_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in ("mofo", "fame", "finetune", "linear", "retrieval", "custom"):
        cfg = config(data=word, recipe="videomae", mode="knn")
        assert vars(cfg) == {**vars(config(data="x", recipe="videomae", mode="knn")), "data": word}
        assert cfg.batch == 16 and not cfg.focused and cfg.views == "2x3"
    assert config(data="ssv2/videos").batch == 16


@pytest.mark.parametrize("module", [fame, mcl, modist])
def test_a_vit_takes_the_settings_of_vits_whatever_the_data(module):
    for data in ("k400", "ucf101", "hmdb51", "ssv2", "epic"):
        plain, vit = (parse_config(module.Config, module.RECIPES, ["--data", data, *more])
                      for more in ([], ["--backbone", "vit_base"]))
        assert plain.optimizer == "sgd" and vit.optimizer == "adamw" and vit.lr == 1.5e-4 and vit.weight_decay == 0.1
        assert {k: v for k, v in dataclasses.asdict(vit).items() if k not in module.RECIPES["vit"]} == {
            **{k: v for k, v in dataclasses.asdict(plain).items() if k not in module.RECIPES["vit"]}, "backbone": "vit_base"}
        given = parse_config(module.Config, module.RECIPES, ["--data", data, "--backbone", "vit_base", "--lr", "3"])
        assert given.lr == 3 and given.optimizer == "adamw"
    toy = [parse_config(module.Config, module.RECIPES, argv) for argv in ([], ["--backbone", "vit_base"])]
    assert toy[0].optimizer == toy[1].optimizer == "adamw" and toy[0].lr == toy[1].lr == 8e-3        # made for a ViT
    own = parse_config(module.Config, module.RECIPES, ["--data", "my_videos", "--backbone", "vit_small"])
    assert own.optimizer == "adamw" and own.lr * own.batch / 256 >= 2e-4 and own.warmup_epochs == 1  # or it learns nothing




@pytest.mark.parametrize("recipe", PAPERS)
def test_detection_has_neither_focus_nor_repeats(recipe):
    cfg = config(data="ava", recipe=recipe, mode="finetune")
    assert not cfg.focused and cfg.repeats == 1


SEEN_AT_TEST = ("sampling", "stride", "frames", "views", "test_size", "raw_crop", "average", "min_score", "times_score")


@pytest.mark.parametrize("data, recipe", itertools.product((*DATA_SETS, "my_videos"), PAPERS))
def test_testing_again_follows_the_protocol_of_fine_tuning(data, recipe, tmp_path):
    cfg = config(data=data, recipe=recipe, mode="finetune")
    torch.save(dict(config=dataclasses.asdict(cfg)), tmp_path / "last.pt")
    again = config(data=data, recipe=recipe, mode="test", init=tmp_path / "last.pt")
    finetune.inherit_settings(again)
    assert {k: getattr(again, k) for k in SEEN_AT_TEST} == {k: getattr(cfg, k) for k in SEEN_AT_TEST}
    flag = config(data=data, recipe=recipe, mode="test", init=tmp_path / "last.pt", views="9x1")
    finetune.inherit_settings(flag)
    assert flag.views == "9x1" and flag.sampling == cfg.sampling


# ---- 8. Whole runs -------------------------------------------------------------------------------------------------------

SHORT = "--batch 4 --device-batch 4 --steps 2 --log-every 1 --workers 0 --test-batch 2 --no-compile".split()
PRETRAIN = dict(mofo="--model vit_tiny --flow tvl1 --frames 4", mme="--model vit_tiny --flow tvl1 --frames 4",
                fame="--backbone r2plus1d_50 --width 0.125 --queue 32", modist="--backbone slow_r50 --width 0.125 --queue 32")
# whose network a recipe is tried on
INIT = dict(videomae="mofo", mofo="mofo", mme="mme", fame="fame", mcl="fame", modist="modist")


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Where the toy data is: 8 videos to train on and 6 to test on, 32 pixels."""
    place = tmp_path_factory.mktemp("place")
    for split, count in (("train", 8), ("test", 6)):
        common.make_toy(place / "toy/32px", split, count, size=32)
    return place


@pytest.fixture(autouse=True)
def signals():
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)                                        # training has put its own there
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def pretrained(place):
    """Per script: its checkpoint after a step on toy data."""
    def checkpoint(script):
        path = place / f"runs/{script}/last.pt"
        if not path.exists():
            run(script, *TOY(place), *SHORT[:-3], "--no-compile", *"--image-size 32 --steps 1".split(), *PRETRAIN[script].split(),
                "--out", path.parent)
        return path
    return checkpoint


def TOY(place):
    return ["--data", "toy", "--root", place / "toy", "--toy-size", 32, "--toy-train", 8, "--toy-test", 6]


@pytest.fixture(scope="session")
def tune(place, pretrained):
    """finetune.py with short settings and flags -> results, directory; the same flags run once."""
    done = {}

    def results(*argv, recipe="videomae", init=None, name=""):
        key = (recipe, init, *map(str, argv))
        if key not in done:
            out = place / f"runs/{name or 'tuned'}-{len(done)}"
            data = [] if "--data" in argv else TOY(place)
            run("finetune", *data, *SHORT, "--recipe", recipe, "--init", init or pretrained(INIT[recipe]), *argv, "--out", out)
            done[key] = json.loads((out / "results.json").read_text()), out
        return done[key]
    return results


@pytest.fixture(scope="session")
def layouts(tmp_path_factory):
    """Per data set: its published layout in miniature, EPIC with its lists of rare classes and unseen people."""
    made = {}

    def root(data):
        if data not in made:
            made[data] = tmp_path_factory.mktemp(data)
            miniature(data, made[data])
            if data == "epic":
                put(made[data], {"EPIC_100_tail_verbs.csv": "verb\n1\n", "EPIC_100_tail_nouns.csv": "noun\n7\n",
                                 "EPIC_100_unseen_participant_ids_validation.csv": "participant_id\nP05\n"})
        return made[data]
    return root


@pytest.mark.parametrize("recipe, data, argv, views", [
    ("videomae", "ssv2", "", "2x3"), ("mofo", "hmdb51", "--flow tvl1", "5x3"), ("mme", "k400", "--views 3x1", "3x1"),
    ("fame", "ucf101", "--views 2x1", "2x1"), ("mcl", "hmdb51", "--views 2x2 --test-size 32 --frames 8", "2x2"),
    ("modist", "ssv2", "--test-size 32 --frames 4", "1x3")])
def test_every_recipe_fine_tunes(recipe, data, argv, views, layouts, tune, capsys):
    results, out = tune("--data", data, "--root", layouts(data), *argv.split(), recipe=recipe)
    text = capsys.readouterr().out
    assert {f"acc1_{views}", f"acc5_{views}", f"mean_class_{views}", "per_class"} <= set(results)
    assert results["videos"] == 2 and not results["unreadable"] and results["recipe"] == recipe and results["data"] == data
    assert f"acc1_{views} {results[f'acc1_{views}']:.2f}" in text and "on 2 videos" in text
    assert results[f"acc5_{views}"] == 100                                              # there are two classes
    settings, log = json.loads((out / "config.json").read_text()), lines(out)
    assert settings["videos"] == 4 and settings["method"] == "finetune-finetune" and settings["frames"] >= 4
    assert [line["step"] for line in log] == [0, 1] and all(math.isfinite(line["loss"]) for line in log) and "train_acc" in log[0]
    content = load_file(out / "last.pt")
    assert ("local_MCA.0.attn.q.weight" in content["model"]) == (recipe == "mofo")
    assert len(content["classes"]) == len(content["model"]["head.bias"]) == 2
    before, after = load_file(settings["init"])["model"], content["model"]
    changed = [k for k in after for b in before if b.endswith("." + k) and before[b].shape == after[k].shape
               and not torch.equal(before[b], after[k])]
    assert len(changed) > 20                                                            # the network is trained, too


VERB_NOUN = {f"{name}_top{k}" for name in ("verb", "noun", "action") for k in (1, 5)}
PARTS = {f"{part}_{name}_top1" for part in ("tail", "unseen") for name in ("verb", "noun", "action")} - {"tail_noun_top1"}


@pytest.mark.parametrize("recipe, label, names", [
    ("videomae", "verb-noun", VERB_NOUN | PARTS),
    ("mofo", "action", {"acc1", "acc5", "mean_class"} | {n for n in VERB_NOUN | PARTS if "action" not in n})])
def test_epic_with_two_heads_and_with_one_of_actions(recipe, label, names, layouts, tune):
    results, out = tune("--data", "epic", "--root", layouts("epic"), "--views", "2x1", "--flow", "tvl1", recipe=recipe)
    assert {name.removesuffix("_2x1") for name in results if name.endswith("_2x1")} == names and results["label"] == label
    assert results["noun_top1_2x1"] in (0, 100) and all(0 <= results[f"{name}_2x1"] <= 100 for name in names)
    content = load_file(out / "last.pt")
    assert len(content["model"]["head.weight"]) == len(content["classes"]) == (2 if label == "action" else 6)


def test_figures_of_epic_do_not_depend_on_what_is_averaged():
    """Probabilities or logits of both heads, or of all actions: by hand."""
    items = [Item(f"P0{i}_01.MP4") for i in range(3)]
    classes = ["verb:a", "verb:b", "noun:x", "noun:y", "noun:z"]
    logits = torch.tensor([[2.0, 0, 0, 3, 1], [0, 1.0, 0, 0, 5], [9.0, 0, 9, 0, 0]])
    read, labels = torch.tensor([True, True, False]), torch.tensor([[0, 1], [1, 0], [0, 0]])
    cfg, epic_subsets = Config(data="epic", label="verb-noun", average="logits"), finetune.epic_subsets
    test = SimpleNamespace(items=items)
    try:
        finetune.epic_subsets = lambda root: ({1}, {1}, {"P01"})
        for average in ("logits", "softmax"):
            cfg.average = average
            scores = logits if average == "logits" else torch.cat([part.softmax(1) for part in logits.split([2, 3], 1)], 1)
            result = finetune.compute_metrics(scores * read[:, None], read, labels, classes, test, cfg)
            assert result["verb_top1"] == result["noun_top5"] == pytest.approx(200 / 3)
            assert result["noun_top1"] == result["action_top1"] == pytest.approx(100 / 3)
            assert result["unseen_verb_top1"] == 100 and result["unseen_noun_top1"] == 0 == result["unseen_action_top1"]
            assert result["tail_verb_top1"] == 100 and result["tail_noun_top1"] == 100 and result["tail_action_top1"] == 50
        cfg.label, classes, labels = "action", ["0:0", "0:1", "0:2", "0:3", "1:4"], torch.tensor([1, 4, 4])
        p = torch.tensor([[0.15] * 4 + [0.4], [0.1] * 4 + [0.6], [0.0] * 4 + [1.0]])          # of verb 0: 0.6 and 0.4
        for average, scores in (("softmax", p), ("logits", p.log() + 3)):
            cfg.average = average
            result = finetune.compute_metrics(scores, read, labels, classes, test, cfg)
            assert result["acc1"] == pytest.approx(100 / 3) and result["verb_top1"] == pytest.approx(200 / 3)
            assert result["noun_top1"] == pytest.approx(100 / 3) and not any("action" in name for name in result)
    finally:
        finetune.epic_subsets = epic_subsets


@pytest.mark.parametrize("classifier", ["logistic", "svm", "trained"])
def test_linear_classifiers(classifier, tune, pretrained):
    results, out = tune("--mode", "linear", "--classifier", classifier, "--views", "2x1")
    assert results["videos"] == 6 and 0 <= results["acc1_2x1"] <= results["acc5_2x1"] <= 100 and results["mode"] == "linear"
    assert (out / "last.pt").exists() == (classifier == "trained")
    if classifier == "trained":
        groups = load_file(out / "last.pt")["optimizer"]["param_groups"]
        assert sum(len(group["params"]) for group in groups) == 2                        # only the head
        before, after = load_file(pretrained("mofo"))["model"], load_file(out / "last.pt")["model"]
        same = {k: torch.equal(before["encoder." + k], after[k]) for k in after if "encoder." + k in before}
        assert len(same) > 30 and all(same.values())
        assert torch.equal(after["fc_norm.weight"], torch.ones(192)) and after["head.weight"].any()


@pytest.mark.parametrize("recipe, data, argv", [
    ("fame", "ucf101", "--views 2x1"), ("mcl", "ucf101", "--views 2x1 --train-views 2x1"), ("mme", "ssv2", "--views 1x1"),
    ("mcl", "k400", "--views 1x1 --test-size 32 --frames 8"), ("modist", "hmdb51", "--views 1x1 --test-size 32 --frames 8")])
def test_every_recipe_probes(recipe, data, argv, layouts, tune, pretrained):
    results, out = tune("--mode", "linear", "--data", data, "--root", layouts(data), *argv.split(), recipe=recipe)
    assert results["videos"] == 2 and f"acc1_{argv.split()[1]}" in results
    if (recipe, data) != ("mcl", "ucf101"):                                              # that is the SVM
        before, after = load_file(pretrained(INIT[recipe]))["model"], load_file(out / "last.pt")["model"]
        same = [torch.equal(before["encoder." + k], after[k]) for k in after if "encoder." + k in before]
        assert len(same) > 30 and all(same)                                              # running statistics, too


@pytest.mark.parametrize("center", [False, True])
def test_retrieval_compares_means_over_views(center, place, pretrained, monkeypatch):
    """What is compared are the videos' own features; with --center each clip counts the same and the mean is taken off."""
    calls, recall, features = [], finetune.retrieval_recall, {}
    monkeypatch.setattr(finetune, "retrieval_recall", lambda *x, **kw: (calls.append((x, kw)), recall(*x, **kw))[1])
    run("finetune", *TOY(place), *SHORT, "--mode", "retrieval", "--init", pretrained("mofo"), "--views", "3x1",
        "--train-views", "2x1", *["--center"] * center, "--out", place / f"runs/retrieval-{center}")
    network = finetune.build_network(Config(init=str(pretrained("mofo"))), 0)[0].eval()
    for split, views in (("train", (2, 1)), ("test", (3, 1))):
        listing = common.find_videos("toy", place / "toy", split, toy=dict(train=8, test=6, size=32))
        rows = []
        for item in listing.items:
            with common.Video(item.path) as video, torch.no_grad():
                clips = finetune.test_clips(video, item, None, Config(sampling="dense", stride=2), 32, 4, views)
                x = network(common.normalize(torch.from_numpy(clips).permute(0, 4, 1, 2, 3)))
            rows.append((x / x.norm(dim=1, keepdim=True) if center else x).mean(0))
        features[split] = torch.stack(rows), torch.tensor([item.label for item in listing.items])
    (gallery, labels, query, test_labels), more = calls[0]
    for seen, expected in zip((gallery, labels, query, test_labels), (*features["train"], *features["test"])):
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    assert more["center"] == center and more["read"].all()
    results = json.loads((place / f"runs/retrieval-{center}/results.json").read_text())
    expected = recall(*features["train"], *features["test"], center=center)
    assert {name: value for name, value in results.items() if "@" in name} == {f"R@{k}_3x1": v for k, v in expected.items()}


@pytest.mark.parametrize("argv, expected", [
    ("--recipe fame --drops 1,2", [1, 1, 0.1, 0.1, 0.01, 0.01]),
    ("--recipe fame --drops 1.5 --warmup-epochs 1", [0, 1, 1, 0.1, 0.1, 0.1]),
    ("--recipe mcl", [0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]),
    ("--recipe videomae --layer-decay 0.5 --min-lr 0.032 --warmup-epochs 1",
     [0, 1, *(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4))])])
def test_learning_rates_and_optimizers(argv, expected, tune):
    recipe = argv.split()[1]
    flags = "--lr 0.32 --steps 6 --weight-decay 0.01 --frames 4"
    if "--warmup" not in argv:
        flags += " --warmup-epochs 0"
    results, out = tune(*argv.split()[2:], *flags.split(), recipe=recipe)
    assert [line["lr"] for line in lines(out)] == pytest.approx([0.32 * 4 / 256 * rate for rate in expected], abs=1e-9)
    groups = load_file(out / "last.pt")["optimizer"]["param_groups"]
    assert {g["weight_decay"] for g in groups} == ({0.01} if recipe == "fame" else {0.01, 0.0})
    if recipe == "videomae":
        assert all(g["betas"] == (0.9, 0.999) for g in groups) and {g["scale"] for g in groups} == {1, 0.5, 0.25, 0.125, 0.0625}
        assert all(g["lr"] == pytest.approx(0.005 * expected[-1] * g["scale"]) for g in groups)
    else:
        assert all(g["momentum"] == 0.9 and g["nesterov"] == (recipe == "mcl") for g in groups)


def test_gradients_are_clipped_and_accumulated(tune):
    flags = "--optimizer sgd --lr 64 --warmup-epochs 0 --steps 1 --weight-decay 0".split()
    whole, parts, clipped = (tune(*flags, *more.split())[1] for more in ("", "--device-batch 2", "--clip-grad 0.001"))
    assert lines(parts)[0]["loss"] == pytest.approx(lines(whole)[0]["loss"], rel=1e-4)
    assert lines(parts)[0]["grad_norm"] == pytest.approx(lines(whole)[0]["grad_norm"], rel=1e-3)
    norms = []
    for out in (whole, clipped):
        state = load_file(out / "last.pt")["optimizer"]["state"].values()
        norms.append(math.sqrt(sum(float(s["momentum_buffer"].square().sum()) for s in state)))
    assert norms[0] == pytest.approx(lines(whole)[0]["grad_norm"], rel=1e-3) and norms[1] == pytest.approx(0.001, rel=1e-2)


def test_the_same_command_goes_on(place, pretrained, monkeypatch):
    flags = [*TOY(place), *SHORT, "--init", pretrained("mofo"), "--out", place / "runs/stopped"]
    out = place / "runs/stopped"
    monkeypatch.setattr(finetune, "StopSignal", lambda: SimpleNamespace(received=True))
    run("finetune", *flags)
    assert load_file(out / "last.pt")["step"] == 1 and not (out / "results.json").exists()        # stopped: no test
    monkeypatch.undo()
    run("finetune", *flags)
    assert [line["step"] for line in lines(out)] == [0, 1] and load_file(out / "last.pt")["step"] == 2
    assert "acc1_1x1" in json.loads((out / "results.json").read_text())
    with pytest.raises(UserError, match="lr: .*--fresh"):
        run("finetune", *flags, "--lr", 1)


def test_the_same_command_tests_again_when_training_is_over(tune, pretrained, place):
    """What was trained is tested with other views, or because the test was interrupted."""
    results, out = tune("--seed", 1)
    run("finetune", *TOY(place), *SHORT, "--init", pretrained("mofo"), "--seed", 1, "--out", out)
    assert json.loads((out / "results.json").read_text()) == results


@pytest.mark.parametrize("mode", ["knn", "retrieval", "linear"])
def test_epic_can_be_probed_without_further_flags(mode, layouts, tune):
    results, _ = tune("--data", "epic", "--root", layouts("epic"), "--views", "1x1", "--train-views", "1x1", "--mode", mode)
    assert results["videos"] == 2


# ---- 9. AVA ----------------------------------------------------------------------------------------------------------------

LEFT, RIGHT, NOBODY = "0.1,0.2,0.4,0.9", "0.6,0.2,0.9,0.9", "0.0,0.0,0.1,0.1"


@pytest.fixture(scope="session")
def ava(tmp_path_factory):
    """Two films of 4 s and a broken one: who is on the left does action 1, who is on the right 12."""
    root = tmp_path_factory.mktemp("ava")
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[10:43, 6:26], picture[10:43, 38:58] = 255, 90
    for name in ("film_train1", "film_value2"):
        film(root / f"videos_15min/{name}.mp4", picture, frames=40)
    rows = f"film_train1,0902,{LEFT},1,0\nfilm_train1,0902,{RIGHT},12,1\nfilm_train1,0903,{LEFT},1,0\n"
    value = rows.replace("film_train1", "film_value2") + f"film_broken,0902,{LEFT},1,0\nfilm_value2,0902,{RIGHT},80,1\n"
    found = "".join(f"film_value2,{second},{box},,{score}\n" for second in ("0902", "0903")
                    for box, score in ((LEFT, 0.95), (NOBODY, 0.85), (RIGHT, 0.9)) if (second, box) != ("0903", RIGHT))
    return put(root, {
        "ava_train_v2.2.csv": rows, "ava_val_v2.2.csv": value, "ava_train_excluded_timestamps_v2.2.csv": "",
        "ava_val_excluded_timestamps_v2.2.csv": "", "ava_val_predicted_boxes.csv": found + f"film_broken,0902,{LEFT},,0.95\n",
        "ava_action_list_v2.2_for_activitynet_2019.pbtxt": "".join(
            f'item {{ name: "{name}" id: {i} }}' for i, name in ((1, "bend"), (12, "sit"), (79, "run")))},
        ["film_broken.mkv"])


@pytest.mark.parametrize("times_score, test_batch, ap", [(True, 8, 2 / 3), (False, 8, 5 / 9), (True, 1, 2 / 3)])
def test_actions_of_people_are_matched_to_theirs(times_score, test_batch, ap, ava, capsys):
    """A model that knows the answer: what it says of a box must arrive at that box, film and second."""
    def logits(clips, boxes, count):
        assert clips.shape[-2:] == (48, 64) and count.sum() == len(boxes)
        out = torch.full((len(boxes), 80), -5.0)
        left = (boxes[:, 0] + boxes[:, 2]) / 2 < 32
        out[left, 0], out[~left, 11] = 5.0, 5.0
        return out
    model = SimpleNamespace(network=SimpleNamespace(config=dict(image_size=48, frames=2)), logits=logits)
    test = finetune.ava_listing(ava, "test")
    cfg = Config(data="ava", workers=0, stride=2, test_batch=test_batch, times_score=times_score)
    result, errors = finetune.detect(model, test, cfg, ENV)
    assert result["per_class"] == pytest.approx({"bend": 100 * ap, "sit": 100.0})        # of the broken film all is missed
    assert result["mAP"] == pytest.approx(100 * (ap + 1) / 2) and len(errors) == 1 and "film_broken" in errors[0]


def test_ava_end_to_end(ava, place, tune):
    flags = ["--data", "ava", "--root", ava, "--test-size", 48, "--stride", 2]
    results, out = tune(*flags)
    assert 0 <= results["mAP_1x1"] <= 100 and set(results["per_class"]) == {"bend", "sit"} and results["videos"] == 3
    assert len(results["unreadable"]) == 1 and "film_broken" in results["unreadable"][0] and "people" in lines(out)[0]
    content = load_file(out / "last.pt")
    assert content["model"]["head.weight"].shape == (80, 192) and len(content["classes"]) == 80
    again, _ = tune(*flags, "--mode", "test", init=out / "last.pt")
    process = start("finetune", *flags, *SHORT, "--test-batch", 1, "--mode", "test", "--init", out / "last.pt", "--out",
                    place / "runs/ava2", processes=2)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    two = json.loads((place / "runs/ava2/results.json").read_text())
    for other in (again, two):
        assert other["mAP_1x1"] == pytest.approx(results["mAP_1x1"]) and other["per_class"] == pytest.approx(results["per_class"])
        assert other["unreadable"] == results["unreadable"] and other["videos"] == 3
    oracle, _ = tune(*flags, "--mode", "test", "--boxes", "gt", init=out / "last.pt")
    assert oracle["videos"] == 3


def test_a_convolutional_network_detects(ava, tune):
    results, out = tune("--data", "ava", "--root", ava, "--test-size", 48, "--stride", 2, recipe="modist")
    assert 0 <= results["mAP_1x1"] <= 100 and load_file(out / "last.pt")["backbone"]["name"] == "slow_r50"
    assert load_file(out / "last.pt")["config"]["frames"] == 8
    network = finetune.build_network(Config(data="ava", init=str(out / "last.pt"), mode="test"))[0]
    assert network.forward_map(torch.randn(1, 3, 8, 48, 64)).shape[-2:] == (3, 4)        # stride 16 instead of 32


# ---- 10. Predict, extract, export, test ------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def own(place):
    """A directory of the user's own: of class a_broken there is nothing that can be read, of the other one three videos."""
    root, toy = place / "own", place / "toy/32px"
    for i in range(6):
        for split in ("train", "val"):
            if split == "train" or i < 4:
                target = root / split / ("a_broken" if i == 0 else "b_whole") / f"{i}.mp4"
                target.parent.mkdir(parents=True, exist_ok=True)
                data = (toy / f"train/{i:06d}.mp4").read_bytes()
                target.write_bytes(data[:500] if (split, i) == ("val", 0) else data)
    return root


def test_what_cannot_be_read_is_wrong_whatever_the_mode(own, tune, capsys):
    results, _ = tune("--data", own, "--views", "1x1")
    text = capsys.readouterr().out
    assert results["per_class"]["a_broken"] == 0 and results["videos"] == 4
    assert len(results["unreadable"]) == 1 and "0.mp4" in results["unreadable"][0] and "not read (counts as wrong)" in text
    results, _ = tune("--data", own, "--views", "1x1", "--mode", "retrieval")
    assert results["R@50_1x1"] == 75 and len(results["unreadable"]) == 1
    for mode in (("linear",), ("linear", "--classifier", "svm"), ("knn",)):
        results, _ = tune("--data", own, "--views", "1x1", "--mode", *mode)
        assert results["per_class"]["a_broken"] == 0 and len(results["unreadable"]) == 1


@pytest.fixture(scope="session")
def focused(tune):
    """Fine-tuned on the toy data's scenes with MOFO's head."""
    results, out = tune("--label", "scene", recipe="mofo")
    return results, out / "last.pt"


def test_testing_restores_label_and_focus(focused, tune, monkeypatch):
    (results, path), calls, forward = focused, [], MotionFocus.forward
    monkeypatch.setattr(MotionFocus, "forward", lambda self, *x: (calls.append(1), forward(self, *x))[1])
    assert results["label"] == "scene" and load_file(path)["config"]["focused"]
    again, _ = tune("--mode", "test", init=path)
    assert again["label"] == "scene" and again["per_class"] == results["per_class"]
    assert again["acc1_1x1"] == results["acc1_1x1"] and calls


def test_testing_epic_actions_restores_their_label(layouts, tune):
    flags = ["--data", "epic", "--root", layouts("epic"), "--views", "2x1", "--flow", "tvl1"]
    results, out = tune(*flags, recipe="mofo")
    again, _ = tune(*flags, "--mode", "test", recipe="mofo", init=out / "last.pt")
    assert again["label"] == "action" and all(again[name] == value for name, value in results.items() if "top" in name)


def predictions(out):
    return list(csv.DictReader(open(out / "predictions.csv", newline="")))


@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_predictions_are_those_of_the_test(average, focused, place, tune):
    """On the toy data's test videos, as data of one's own, as many are right as in testing."""
    out, table = place / f"runs/predict-{average}", csv.DictReader(open(place / "toy/32px/test.csv"))
    truth = {row["path"]: int(row["scene"]) for row in table}
    run("finetune", *SHORT, "--mode", "predict", "--init", focused[1], "--data", place / "toy/32px/test", "--stride", 2,
        "--views", "1x1", "--flow", "tvl1", "--average", average, "--out", out)
    rows = predictions(out)
    assert len(rows) == 6
    for row in rows:
        names, values = row["top5"].split(";"), list(map(float, row["scores"].split(";")))
        assert set(names) <= set(common.TOY_SCENES) and len(set(names)) == 5 and row["label"] == names[0]
        assert values == sorted(values, reverse=True) and 5 / 8 - 1e-3 < sum(values) <= 1 + 1e-3
    right = sum(row["label"] == common.TOY_SCENES[truth[f"test/{Path(row['path']).name}"]] for row in rows)
    assert 100 * right / 6 == pytest.approx(focused[0]["acc1_1x1"])


def test_predict_on_one_file_on_broken_ones_and_with_two_heads(focused, place, own, layouts, tune, capsys):
    one, predict = own / "val/b_whole/1.mp4", [*SHORT, "--mode", "predict", "--flow", "tvl1", "--init"]
    run("finetune", *predict, focused[1], "--data", one, "--out", place / "runs/one")
    assert [row["path"] for row in predictions(place / "runs/one")] == [str(one)] and "1 of 1 videos" in capsys.readouterr().out
    run("finetune", *predict, focused[1], "--data", own, "--out", place / "runs/some")
    text = capsys.readouterr().out
    rows = predictions(place / "runs/some")
    assert len(rows) == 10 and "9 of 10 videos" in text
    assert [(row["label"], row["top5"]) for row in rows if "a_broken/0" in row["path"] and "val" in row["path"]] == [("", "")]
    assert re.search(r"not read: .*a_broken/0\.mp4", text)
    init = tune("--data", "epic", "--root", layouts("epic"), "--views", "2x1", "--flow", "tvl1")[1] / "last.pt"
    run("finetune", *predict, init, "--data", one, "--out", place / "runs/two")
    verb, noun = predictions(place / "runs/two")
    assert verb["label"].startswith("verb:") and noun["label"].startswith("noun:") and verb["path"] == noun["path"] == str(one)
    assert sum(map(float, verb["scores"].split(";"))) == pytest.approx(1, abs=1e-3)


def test_extracted_features_are_those_of_the_videos(own, place, pretrained):
    run("finetune", *SHORT, "--mode", "extract", "--init", pretrained("mofo"), "--data", own, "--stride", 3, "--views", "2x1",
        "--out", place / "runs/extract")
    table = np.load(place / "runs/extract/features.npz")
    assert table["features"].shape == (10, 192) and table["read"].sum() == 9 and len(set(table["names"])) == 10
    network = finetune.build_network(Config(init=str(pretrained("mofo"))), 0)[0].eval()
    for name, read, row in zip(table["names"], table["read"], table["features"]):
        assert read == ("val/a_broken" not in str(name))
        if not read:
            assert not row.any()
            continue
        with common.Video(str(name)) as video, torch.no_grad():
            clips = finetune.test_clips(video, Item(str(name)), None, Config(sampling="dense", stride=3), 32, 4, (2, 1))
            views = network(common.normalize(torch.from_numpy(clips).permute(0, 4, 1, 2, 3)))
        assert np.allclose(views.mean(0), row, atol=1e-4)


def test_export_writes_three_files(tune, pretrained, place, focused):
    pytest.importorskip("safetensors")
    tuned = tune()[1] / "last.pt"
    for init, kind, classes in ((tuned, "VideoMAEForVideoClassification", common.TOY_CLASSES),
                                (pretrained("mofo"), "VideoMAEModel", ())):
        out = place / f"runs/export-{kind}"
        run("finetune", "--mode", "export", "--init", init, "--out", out)
        assert {f.name for f in out.iterdir()} == {"config.json", "preprocessor_config.json", "model.safetensors"}
        about = json.loads((out / "config.json").read_text())
        assert about["architectures"] == [kind] and list(about.get("id2label", {}).values()) == list(classes)
        assert about["image_size"] == 32 and about["num_frames"] == 4
    results = [tune("--mode", "test", "--views", "1x1", init=path)[0]["per_class"]
               for path in (tuned, place / "runs/export-VideoMAEForVideoClassification")]
    assert results[0] == results[1]                                                     # what was exported can be tested
    for init, message in ((focused[1], "has no counterpart"), (pretrained("fame"), "only ViT networks can be exported")):
        with pytest.raises(UserError, match=message):
            run("finetune", "--mode", "export", "--init", init, "--out", place / "runs/no-export")


def test_random_init_keeps_the_network_and_not_its_weights(pretrained):
    init = str(pretrained("fame"))
    file = load_file(init)["model"]["encoder.stem.conv1.weight"]
    loaded, fresh = (finetune.build_network(Config(init=init, random_init=r), 3)[0] for r in (False, True))
    assert torch.equal(loaded.stem.conv1.weight, file) and not torch.equal(fresh.stem.conv1.weight, file)
    assert loaded.config == fresh.config
    other = finetune.build_network(Config(init=init, frames=16, image_size=48), 3)[0].config
    assert other == dict(loaded.config, frames=16, image_size=48)
    vit = str(pretrained("mofo"))
    rates = [[block.drop_path.p for block in finetune.build_network(Config(init=vit, mode=mode, drop_path=0.2), 3)[0].blocks]
             for mode in ("finetune", "linear")]
    assert rates == [[0, pytest.approx(0.1), pytest.approx(0.2)], [0, 0, 0]]


# ---- 11. Mistakes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, message", [
    ("--drops 60;120", "--drops 60;120: expected epochs, e.g. 60,120"), ("--drops 60,", "--drops 60,: expected epochs"),
    ("--randaugment timm", "--randaugment timm: choose none, videomae, mcl-ucf101 or mcl-hmdb51"),
    ("--recipe moco", "--recipe moco: choose videomae, mofo, mme, fame, mcl or modist"),
    ("--optimizer lamb", "--optimizer lamb: choose adamw, sgd or nesterov"),
    ("--average mean", "--average mean: choose softmax or logits"),
    ("--sampling random", "--sampling random: choose uniform or dense"),
    ("--classifier mlp", "--classifier mlp: choose logistic, svm or"),
    ("--views 0x3", "--views 0x3: expected"), ("--train-views 2", "--train-views 2: expected e.g. 2x3"),
    ("--mixup 2", r"--mixup 2.0 must be in \[0, 1\]"), ("--label-smoothing -1", "--label-smoothing -1.0 must be in"),
    ("--aspect 0.5", "--aspect 0.5, .* must be at least 1"), ("--test-batch 0", "--test-batch 0 .* must be at least 1"),
    ("--data ava --mode knn", "--data ava has --mode finetune and test"),
    ("--data ava --mode predict", "--data ava has --mode finetune and test"),
    ("--data ava --root AVA --boxes nowhere.csv", "--boxes nowhere.csv: no such file of detected people"),
    ("--data ava --root nowhere", "--data ava: no ava_train_v2.2.csv below nowhere"),
    ("--data epic --root EPIC --label verb-noun --mode knn", "--label verb-noun: --mode knn takes one label, verb, noun or"),
    ("--data OWN/val/b_whole", "has no labels, which --mode finetune needs"),
    ("--mode predict", "does not say its classes|does not fit"), ("--mode test", "the data has|missing .*head"),
    ("--focused --init FAME", "--focused is MOFO's head for a ViT; --no-focused"),
    ("--init nowhere.pt", "nowhere.pt: no such checkpoint"),
    ("--model vit_giant", "--model vit_giant: choose vit_tiny"),
    ("--batch 6 --device-batch 4", "--batch 6 does not spread evenly"),
    ("--frames 3", "frames 3 / tubelet_size 2")])
def test_a_mistake_is_one_line(argv, message, place, pretrained, ava, layouts, own):
    for word, at in dict(AVA=ava, EPIC=layouts("epic"), OWN=own, FAME=pretrained("fame")).items():
        argv = argv.replace(word, str(at))
    argv = argv.split()
    init = [] if "--init" in argv else ["--init", pretrained("mofo")]
    with pytest.raises(UserError, match=f"^error: .*({message})") as error:
        run("finetune", *([] if "--data" in argv else TOY(place)), *SHORT, *init, *argv, "--out", place / "runs/mistake")
    assert "\n" not in str(error.value)


def test_predict_with_a_file_of_something_else_is_a_message(tmp_path, own):
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    with pytest.raises(UserError, match="list.pt"):
        run("finetune", "--mode", "predict", "--init", tmp_path / "list.pt", "--data", own, "--out", tmp_path)


def test_predict_wants_names_of_classes(tmp_path, own):
    torch.save(dict(model=small_vit(8).state_dict(), backbone=small_vit(8).config), tmp_path / "last.pt")
    with pytest.raises(UserError, match="--mode predict: .*last.pt does not say its classes"):
        run("finetune", "--mode", "predict", "--init", tmp_path / "last.pt", "--data", own, "--out", tmp_path)


def test_what_does_not_fit_is_named(tmp_path, place, pretrained, tune):
    content = load_file(tune()[1] / "last.pt")
    headless, others = {k: v for k, v in content["model"].items() if "head" not in k}, ["jump", *content["classes"][1:]]
    for change, message in ((dict(model=headless), r"missing \['head.weight .*, 'head.bias .*'\]"),
                            (dict(classes=others), r"knows the classes \['jump', .*the data has \['left'"),
                            (dict(backbone=dict(content["backbone"], dim=96)), r"missing .*\(96,.* unexpected .*\(192,")):
        torch.save({**content, **change}, tmp_path / "changed.pt")
        with pytest.raises(UserError, match=message):
            run("finetune", *TOY(place), *SHORT, "--mode", "test", "--init", tmp_path / "changed.pt", "--out", tmp_path / "out")
    with pytest.raises(UserError, match="the test split has classes that the training split has not"):
        for split, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "c")):
            put(tmp_path, {}, [f"data/{split}/{name}/1.mp4"])
        run("finetune", "--data", tmp_path / "data", *SHORT, "--init", pretrained("mofo"), "--out", tmp_path / "out")

# ---- 11. Splits, classes, units ------------------------------------------------------------------------------------------

# Published fine-tuning: videos, GPUs x videos per GPU x accumulation, clips of each, epochs, rate per 256 videos.
PUBLISHED = {
    ("k400", "videomae"): (240_436, 64 * 6, 2, 75, 5e-4), ("ssv2", "videomae"): (168_913, 64 * 8, 1, 50, 5e-4),
    ("ucf101", "videomae"): (9_537, 8 * 16, 2, 100, 5e-4), ("ssv2", "mme"): (168_913, 16 * 28, 2, 30, 5e-4),
    ("ucf101", "fame"): (9_537, 4 * 32, 1, 150, 0.05), ("ucf101", "mcl"): (9_537, 4 * 16 * 4, 1, 150, 0.01),
    ("ucf101", "modist"): (9_537, 64, 1, 200, 0.04)}


@pytest.mark.parametrize("data, recipe", PUBLISHED)
@pytest.mark.parametrize("world", [1, 8])
def test_steps_clips_and_rate_are_those_of_the_paper(data, recipe, world):
    videos, batch, clips, epochs, rate = PUBLISHED[data, recipe]
    cfg = config(data=data, recipe=recipe, mode="finetune", device_batch=4, frames=16)
    plan = common.plan_run(cfg, videos, common.Env(torch.device("cpu"), 0, world, None))
    assert abs(plan.steps - epochs * videos // batch) <= 1                               # optimiser steps of the whole run
    per_pass = next(iter(common.StepSampler(videos, plan, common.Env(torch.device("cpu"), 0, world, None), 0)))
    assert len(per_pass) * cfg.repeats * plan.accum * world == batch * clips             # clips in each
    assert cfg.lr * cfg.batch / 256 == pytest.approx(rate * batch / 256)
    generator = plan.generator(common.Env(torch.device("cpu"), world - 1, world, None), 0, 0, plan.accum - 1)
    assert (generator.first + len(per_pass) * cfg.repeats, generator.total) == (batch * clips,) * 2      # rows of the step


def test_recipes_found_wrong_in_the_field():
    fame_probe, mcl_probe = config(data="ucf101", recipe="fame", mode="linear"), config(data="k400", recipe="mcl", mode="linear")
    assert (fame_probe.unit_features, fame_probe.epochs, fame_probe.drops) == (True, 100, "60,80")
    assert all(config(data=data, recipe="mme", mode="finetune").min_lr == 1e-6 for data in ("ucf101", "hmdb51", "ssv2", "k400"))
    seen, video = [], SimpleNamespace(info=common.VideoInfo(300, 25.0, 240, 320, 12.0), read=lambda i, size, boxes: (
        seen.extend([size, boxes[0].tolist()]), np.zeros((len(i), *size, 3), np.uint8))[1])
    finetune.test_clips(video, common.Item("x"), None, mcl_probe, 224, 32)               # 224 of a short side of 256
    assert seen == [(224, 224), [55, 15, 265, 225]] and round(240 * 224 / 256) == 210


@pytest.mark.parametrize("fps, seconds", [(30.0, 31 * 8 / 30), (12.0, 31 * 8 / 30), (25.0, 31 * 8 / 30), (59.94, 31 * 8 / 30)])
def test_modist_s_stride_is_in_seconds(fps, seconds):
    cfg, seen = config(data="ucf101", recipe="modist", mode="finetune"), []
    frames = int(20 * fps)
    video = SimpleNamespace(info=common.VideoInfo(frames, fps, 48, 64, 20.0), read=lambda i, size, boxes: (
        seen.append(i), np.zeros((len(i), *size, 3), np.uint8))[1])
    finetune.train_clips(video, common.Item("x"), np.random.default_rng(0), cfg, 8, 32)
    finetune.test_clips(video, common.Item("x"), None, cfg, 8, 32, (3, 1))
    for indices in (seen[0], *np.split(seen[1], 3)):
        assert (indices[-1] - indices[0]) / fps == pytest.approx(seconds, abs=1 / fps) and (np.diff(indices) > 0).all()
    assert seen[1][0] == 0 and seen[1][-1] == frames - 1                                 # from the start to the end
    own_rate = config(data="ucf101", recipe="mcl", mode="finetune")                      # others count the video's own frames
    finetune.train_clips(video, common.Item("x"), np.random.default_rng(0), own_rate, 8, 32)
    assert (np.diff(seen[2]) == 2).all()


def test_rates_of_modist_lie_on_the_cosine_over_all_epochs(tune):
    flags = "--lr 0.32 --epochs 5 --batch 2 --device-batch 2 --steps 0 --frames 4 --warmup-epochs 1 --warmup-start 0.1".split()
    _, out = tune(*flags, recipe="modist", name="cosine")                                # 8 videos: 4 steps an epoch
    peak, rates = 0.32 * 2 / 256, [line["lr"] for line in lines(out)]
    cosine = [peak * 0.5 * (1 + math.cos(math.pi * i / 20)) for i in range(20)]
    start = [0.1 * peak + (cosine[4] - 0.1 * peak) * i / 4 for i in range(4)]
    assert rates == pytest.approx([*start, *cosine[4:]], abs=1e-9)
    cfg = config(data="hmdb51", recipe="modist", mode="finetune")
    assert cfg.whole_cosine and cfg.warmup_start * cfg.lr * cfg.batch / 256 == pytest.approx(1e-3)


@pytest.fixture(scope="session")
def lists(place):
    """A list file of 24 videos of two classes, directories of them, and a list of three others of one of the classes."""
    root = place / "lists"
    common.make_toy(place / "many/32px", "train", 32, size=32)
    for i in range(30):
        name = "jump" if i % 2 and i < 24 else "run" if i < 24 else "other"
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"{i}.mp4").write_bytes((place / f"many/32px/train/{i:06d}.mp4").read_bytes())
    rows = sorted(f"{p.parent.name}/{p.name} {p.parent.name}" for p in root.glob("*/*.mp4"))
    put(root, {"all.txt": "\n".join(r for r in rows if "other" not in r), "few.txt": "\n".join(
        r.replace(" other", " run") for r in rows if "other" in r)})
    put(root, {"numbers.txt": (root / "few.txt").read_text().replace(" run", " 1"),
               "unknown.txt": (root / "few.txt").read_text().replace(" run", " swim"),
               "overlap.txt": (root / "few.txt").read_text() + "\n" + rows[0]})
    return root


def scored(out):
    return dict(np.load(out / "scores.npz"))


@pytest.mark.parametrize("mode, how", [("finetune", "list"), ("finetune", "directory"), ("knn", "list"), ("knn", "split all"),
                                       ("knn", "same list twice")])
def test_nothing_is_tested_on_its_own_training_videos(mode, how, lists, tune, monkeypatch, capsys):
    """The same split in every mode, whatever the way in which the data come without one."""
    seen, clips = [], finetune.Clips
    monkeypatch.setattr(finetune, "Clips", lambda items, *args, **kwargs: (seen.append({i.path for i in items}),
                                                                          clips(items, *args, **kwargs))[1])
    data = dict([("directory", lists), ("split all", lists)]).get(how, lists / "all.txt")
    flags = ["--train-split", "all"] if how == "split all" else ["--test-data", data] if "twice" in how else []
    if "twice" in how:
        with pytest.raises(UserError, match="24 of the 24 test videos are training videos, too; the first: .*--test-data"):
            tune("--data", data, "--mode", mode, *flags, name=f"split-{mode}")
        return
    results, out = tune("--data", data, "--mode", mode, *flags, "--views", "1x1", name=f"split-{mode}-{how[:4]}")
    train, test = (seen if mode == "finetune" else seen[::-1])
    assert results["videos"] == len(test) == (6 if how == "list" else 7) and not train & test
    assert len(train | test) == (24 if how == "list" else 30) and set(scored(out)["names"]) == test
    assert f"{results['videos']} of its videos are held out to test" in capsys.readouterr().out or how != "list"
    if mode == "finetune" and how != "split all":                                        # and the same when tested again
        again, there = tune("--data", data, "--mode", "test", init=out / "last.pt")
        assert again["acc1_1x1"] == results["acc1_1x1"] and set(scored(there)["names"]) == test


def test_test_data_are_read_whole_and_must_be_others(lists, tune, tmp_path):
    flags = ["--data", lists / "all.txt", "--views", "1x1"]
    results, out = tune(*flags, "--test-data", lists / "few.txt")
    assert results["videos"] == 6 and len(scored(out)["names"]) == 6
    assert load_file(out / "last.pt")["config"]["videos"] == 24                          # and all of the list is trained on
    with pytest.raises(UserError, match="1 of the 7 test videos are training videos, too; the first: .*jump/1.mp4"):
        tune(*flags, "--test-data", lists / "overlap.txt")
    put(tmp_path, {"two.txt": f"{lists}/run/0.mp4 run\n{lists}/jump/1.mp4 jump\n"})
    with pytest.raises(UserError, match="two.txt: has no split, and no class has two videos"):
        tune("--data", tmp_path / "two.txt")


def test_testing_needs_no_training_videos_and_not_every_class(lists, tune, tmp_path, capsys):
    _, out = tune("--data", lists, "--views", "1x1", name="three")                       # classes jump, other, run
    for data, label in (("few.txt", "run"), ("numbers.txt", "1")):                       # number 1 = other
        results, there = tune("--data", lists / data, "--mode", "test", init=out / "last.pt")
        assert results["videos"] == 6 and scored(there)["classes"].tolist() == ["jump", "other", "run"]
        assert set(scored(there)["labels"]) == {dict(run=2).get(label, 1)} and scored(there)["scores"].shape == (6, 3)
        assert ("taken as places: 0 = jump" in capsys.readouterr().out) == (label == "1")
    with pytest.raises(UserError, match=r"knows the classes \['jump', 'other', 'run'\] ..., the data has \['swim'\]"):
        tune("--data", lists / "unknown.txt", "--mode", "test", init=out / "last.pt")
    (tmp_path / "val/run").mkdir(parents=True)                                           # nothing to train on, one class
    (tmp_path / "val/run/a.mp4").write_bytes((lists / "run/0.mp4").read_bytes())
    results, there = tune("--data", tmp_path, "--mode", "test", init=out / "last.pt")
    assert results["videos"] == 1 and scored(there)["labels"].tolist() == [2]


@pytest.mark.parametrize("data", ["k400", "ssv2", "ucf101", "epic"])
def test_published_layouts_are_tested_without_their_training_videos(data, layouts, tune, tmp_path):
    flags = ["--data", data, "--views", "1x1", *["--label", "verb"] * (data == "epic")]
    results, out = tune(*flags, "--root", layouts(data))
    for source in layouts(data).rglob("*"):
        kept = source.is_file() and not re.search(r"train", source.name) and not any(
            word in source.name for word in ("aB_cd", "IjKl", "RsTu", "g00", "g01", "g02", "P00", "P01", "P02"))
        if kept and not (data == "ssv2" and source.name in ("0.webm", "1.webm", "2.webm")):
            put(tmp_path, {}, [source.relative_to(layouts(data))])
            (tmp_path / source.relative_to(layouts(data))).write_bytes(source.read_bytes())
    again, there = tune(*flags, "--root", tmp_path, "--mode", "test", init=out / "last.pt")
    assert again["acc1_1x1"] == results["acc1_1x1"] and again["videos"] == 2
    assert np.allclose(scored(there)["scores"], scored(out)["scores"], atol=1e-5)


@pytest.mark.parametrize("mode", ["finetune", "knn"])
def test_scores_and_the_confusion_of_every_video_are_kept(mode, lists, tune):
    results, out = tune("--data", lists, "--views", "1x1", "--mode", mode)
    found = scored(out)
    assert found["scores"].shape == (7, 3) and found["read"].all() and found["labels"].shape == (7,)
    right = found["scores"].argmax(1) == found["labels"]
    assert 100 * right.mean() == pytest.approx(results["acc1_1x1"])
    with av.open(str(out / "confusion.png")) as file:
        picture = next(file.decode(video=0)).to_ndarray(format="rgb24")[..., 0]
    counts = np.zeros((3, 3))
    for own, guess in zip(found["labels"], found["scores"].argmax(1)):
        counts[own, guess] += 1
    share = counts / counts.sum(1, keepdims=True).clip(1)
    cell = 512 // 3
    assert picture.shape == (3 * cell, 3 * cell)
    assert np.abs(picture[cell // 2::cell, cell // 2::cell].astype(float) - 255 * (1 - share)).max() <= 1


def test_a_file_of_class_names(lists, tune, tmp_path, pretrained, capsys):
    _, out = tune("--data", lists, "--views", "1x1")
    content = load_file(out / "last.pt")
    torch.save(dict(model=content["model"], backbone=content["backbone"]), tmp_path / "public.pt")
    put(tmp_path, {"names.txt": "walk\nsit\nclimb\n", "two.txt": "walk\nsit\n"})
    flags = ["--mode", "predict", "--data", lists / "run", "--init", tmp_path / "public.pt", *SHORT]
    run("finetune", *flags, "--classes", tmp_path / "names.txt", "--out", tmp_path / "out")
    rows = list(csv.DictReader(open(tmp_path / "out/predictions.csv")))
    assert len(rows) == 12 and all(sorted(row["top5"].split(";")) == ["climb", "sit", "walk"] for row in rows)
    test = ["--mode", "test", "--data", lists, "--init", tmp_path / "public.pt", "--views", "1x1", *SHORT, "--out", tmp_path / "out"]
    run("finetune", *test)                                                               # without names: the data's
    assert "does not name its classes: they are taken to be the data's" in capsys.readouterr().out
    put(tmp_path, {"same.txt": "jump\nother\nrun\n"})
    run("finetune", *test, "--classes", tmp_path / "same.txt")
    assert "does not name" not in capsys.readouterr().out
    for file, message in (("two.txt", r"missing .*\(2,.* unexpected .*\(3,"), ("gone.txt", "--classes .*gone.txt: cannot be read")):
        with pytest.raises(UserError, match=message):
            run("finetune", *flags, "--classes", tmp_path / file, "--out", tmp_path / "out")


def test_extract_keeps_views_and_labels_and_part_says_what_is_read(lists, place, pretrained, tmp_path):
    flags = ["--mode", "extract", "--init", pretrained("mofo"), *SHORT]
    run("finetune", *flags, "--data", lists, "--views", "2x3", "--out", tmp_path)
    found = dict(np.load(tmp_path / "features.npz"))
    assert found["views"].shape == (30, 6, 192) and np.allclose(found["views"].mean(1), found["features"], atol=1e-5)
    assert [found["classes"][k] for k in found["labels"]] == [Path(name).parent.name for name in found["names"]]
    for part, count in (("train", 8), ("test", 6), ("", 6)):
        run("finetune", *flags, *TOY(place), *(["--part", part] if part else []), "--train-split", "train", "--out", tmp_path)
        assert len(np.load(tmp_path / "features.npz")["names"]) == count
    with pytest.raises(UserError, match="--part all: toy has train, test, train_biased"):
        run("finetune", *flags, *TOY(place), "--part", "all", "--out", tmp_path)


def test_checkpoints_have_directories_of_their_own(tune, place, pretrained, tmp_path, monkeypatch):
    """Without --out two checkpoints do not meet; with the same one the second is refused."""
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "videomae.pth"
    content = load_file(pretrained("mofo"))
    content["model"]["encoder.norm.weight"] += 1
    torch.save(content, other)
    for init in (pretrained("mofo"), other):
        run("finetune", *TOY(place), *SHORT, "--mode", "knn", "--init", init)
        run("finetune", *TOY(place), *SHORT, "--init", init)
    run("finetune", *TOY(place), *SHORT, "--mode", "knn", "--init", other, "--random-init")
    names = {p.name for p in (tmp_path / "runs").iterdir()}
    assert names == {f"finetune-{mode}-toy-{init}" for mode in ("knn", "finetune") for init in ("mofo", "videomae")} | {
        "finetune-knn-toy-random-videomae"}
    with pytest.raises(UserError, match="init: weights of .*mofo/last.pt there, of .*videomae.pth now"):
        run("finetune", *TOY(place), *SHORT, "--init", other, "--out", "runs/finetune-finetune-toy-mofo")
    assert json.loads(Path("runs/finetune-finetune-toy-mofo/config.json").read_text())["init"].endswith("mofo/last.pt")
    with pytest.raises(UserError, match="recipe: videomae there, mme now"):
        run("finetune", *TOY(place), *SHORT, "--init", other, "--recipe", "mme", "--out", "runs/finetune-finetune-toy-videomae")
