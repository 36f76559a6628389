"""finetune.py: the heads, views and crops, recipes, and whole runs of every protocol on miniature data sets."""
import csv
import dataclasses
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align
from torchvision.transforms.v2 import Compose

import common
import finetune
from common import DATA_SETS, Item, UserError, load_file, make_backbone, make_optimizer, parse_config
from finetune import Classifier, Config, Detector, KeyFrame, MotionFocus, RECIPES, person_clip, train_clips
from conftest import FakeVideo, error_of, lines, miniature, put, run, scrambled, seeded

ENV = common.Env(torch.device("cpu"), 0, 1, None)
QUIET = dict(randaugment="none", erasing=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0)         # nothing is random


def small_vit(classes=5, size=32, frames=4, patch=8):
    torch.manual_seed(0)
    return make_backbone("", size, frames, classes, patch_size=patch, dim=24, depth=2, heads=2)


def small_resnet(name="r2plus1d_50", classes=5, size=32):
    torch.manual_seed(0)
    return make_backbone(name, width=0.0625, image_size=size, frames=4, num_classes=classes)


def noise_clips(B, seed=0):
    return torch.randint(0, 256, (B, 3, 4, 32, 32), generator=seeded(seed), dtype=torch.uint8)


def built(init, outputs=0, **settings):
    """The network that finetune.py makes of a checkpoint."""
    return finetune.build_network(Config(init=str(init), **settings), load_file(init), outputs)


# ---- 1. MOFO's head --------------------------------------------------------------------------------------------------

def ragged(head, tokens, inside):
    """MOFO's head, a sample and an attention head at a time, with sets of tokens that are really taken out."""
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
    head, (tokens, noise) = scrambled(MotionFocus(12)), torch.randn(2, 7, 10, 12, generator=seeded(1))
    inside = noise[:, :, 0] > 0
    inside[0], inside[1], inside[2], inside[3] = False, True, torch.arange(10) == 4, torch.arange(10) != 4
    tokens.requires_grad_()
    features = head(tokens, inside)
    torch.testing.assert_close(features, ragged(head, tokens, inside), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features[0], tokens[0].mean(0))                          # nothing moves: as it is
    features.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in [tokens, *head.parameters()])
    assert "3 heads do not divide" in error_of(MotionFocus, 1024)


def test_a_public_mofo_file_fits_by_name(tmp_path):
    network, head = small_vit(), [f"{part}.{kind}" for part in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
                                  for kind in ("weight", "bias")]
    shapes = {name: p.shape for name, p in MotionFocus(24).state_dict().items()}
    assert shapes.keys() == {*head, "attn.q.weight", "attn.kv.weight", "attn.q_bias", "attn.v_bias"}
    state = {k: torch.randn_like(v) for k, v in network.state_dict().items()}
    for branch in ("local_MCA", "global_MCA"):                                          # the latter is never used
        state |= {f"{branch}.0.{name}": torch.randn(shape) for name, shape in shapes.items()}
    more = {"soft_att_local.weight": torch.ones(24)}
    torch.save(dict(module=state | more, backbone=network.config), tmp_path / "mp_rank_00_model_states.pt")
    loaded = built(tmp_path / "mp_rank_00_model_states.pt", 5, mode="test", focused=True).state_dict()
    assert len(loaded) == len(network.state_dict()) + 14
    assert all(torch.equal(x, state[name]) for name, x in loaded.items())


# ---- 2. The classifier -----------------------------------------------------------------------------------------------

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


def patches_of(pixels, times=2, patch=8):
    """Pixels (H, W) bool -> tokens (times * H' * W',) bool: any pixel of the patch, the same at all times."""
    H, W = pixels.shape
    flat = [bool(pixels[y:y + patch, x:x + patch].any()) for y in range(0, H, patch) for x in range(0, W, patch)]
    return torch.tensor(flat * times)


def test_what_a_box_holds(monkeypatch):
    boxes = torch.tensor([[3.2, 4.9, 10.1, 20.0], [0, 0, 0, 0], [8, 8, 16, 16], [7, 7, 9, 9], [0, 0, 32, 32],
                          [15.5, 0, 16.0, 1]])
    model, spy = focused_model(monkeypatch, lambda clips: boxes)
    scrambled(model.network)
    inside = model.inside(torch.zeros(6, 3, 4, 32, 32, dtype=torch.uint8))
    assert inside.shape == (6, 1, 1, 32, 32)
    for pixels, (x1, y1, x2, y2) in zip(inside[:, 0, 0], boxes.tolist()):  # a pixel that is touched is inside
        for y, x in itertools.product(range(32), repeat=2):
            assert pixels[y, x] == (x + 1 > x1 and x < x2 and y + 1 > y1 and y < y2), (x, y)
    clips = torch.randn(6, 3, 4, 32, 32)
    torch.testing.assert_close(model.logits(clips, inside), model.network(clips))       # the spy is the plain mean
    assert spy.inside.sum(1).tolist() == [2 * n for n in (6, 0, 1, 4, 16, 1)]
    assert all(torch.equal(tokens, patches_of(pixels > 0)) for tokens, pixels in zip(spy.inside, inside[:, 0, 0]))


def bright_box(clips):
    """Around what is brighter than 200, in any frame: (B, 3, T, H, W) -> (B, 4)."""
    boxes = torch.zeros(len(clips), 4)
    for i, clip in enumerate(clips):
        y, x = (clip > 200).any(0).any(0).nonzero(as_tuple=True)
        if len(x):
            boxes[i] = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return boxes


@pytest.mark.parametrize("randaugment", ["none", "mcl-hmdb51"])
def test_the_box_is_that_of_the_augmented_clip(randaugment, monkeypatch):
    clips, labels = torch.zeros(8, 3, 4, 32, 32, dtype=torch.uint8), torch.zeros(8, dtype=torch.long)
    for i in range(8):
        clips[i, :, i % 4, 2 * i:2 * i + 3, i:i + 7] = 250
    model, spy = focused_model(monkeypatch, bright_box, flip=True, randaugment=randaugment, erasing=1.0)
    torch.manual_seed(3)
    model(clips, labels, seeded(3))
    seen, flipped = common.flip(clips, seeded(3))
    torch.manual_seed(3)
    seen = finetune.per_clip(Compose(model.randaugment), seen) if model.randaugment else seen
    assert 0 < flipped.sum() < 8

    def inside(clips):
        pixels = model.inside(clips)[:, 0, 0] > 0
        return torch.stack([patches_of(own) for own in pixels])
    assert torch.equal(spy.inside, inside(seen)) and not torch.equal(spy.inside, inside(clips))
    model.eval().scores(clips)                                                          # at test time that of the clip
    assert torch.equal(spy.inside, inside(clips))


@pytest.mark.parametrize("name, distinct", [("videomae", 5), ("mcl-ucf101", 4), ("mcl-hmdb51", 6), ("erasing", 6)])
def test_random_transforms_differ_between_clips_and_not_between_frames(name, distinct):
    model = Classifier(small_vit(), [5], Config(randaugment="none" if name == "erasing" else name, erasing=1.0))
    clips = noise_clips(1)[:, :, :1].expand(6, 3, 4, 32, 32)                            # all alike
    clips = common.normalize(clips) if name == "erasing" else clips
    transform = model.erasing if name == "erasing" else Compose(model.randaugment)
    torch.manual_seed(0)
    out = finetune.per_clip(transform, clips)
    assert out.dtype == clips.dtype and (out == out[:, :, :1]).all()
    assert len({str(clip.tolist()) for clip in out}) >= distinct


def test_passes_and_processes_draw_their_own_transforms_and_the_same_ones_again():
    plan, seen = common.Plan(8, 2, 2, 1, 4, 1.0, 0, 0.1, 0.0), []
    model, clips = Classifier(small_vit(), [5], config(erasing=1.0)), noise_clips(1).expand(2, -1, -1, -1, -1)
    model.logits = lambda clips, inside: (seen.append(clips), torch.zeros(2, 5))[-1]
    for _, step, rank, micro in itertools.product(range(2), repeat=4):
        model.train()(clips, torch.tensor([0, 1]), plan.generator(ENV._replace(rank=rank, world=2), 0, step, micro))
    assert all(torch.equal(a, b) for a, b in zip(seen[:8], seen[8:]))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen[:8], 2))


@pytest.mark.parametrize("settings", [dict(mixup=0.8), dict(cutmix=1.0), dict(mixup=0.8, cutmix=1.0)])
def test_where_clips_are_mixed_so_are_their_insides_and_targets(settings, monkeypatch):
    """One clip is red, one green, one blue: the colour of a mixed pixel says how much it has of each."""
    boxes = torch.tensor([[0, 0, 9, 9], [20, 3, 31, 6], [4, 12, 30, 30]]).float()
    model, spy = focused_model(monkeypatch, lambda clips: boxes, label_smoothing=0.1, **settings)
    model.sizes, labels, kinds = [2, 3], torch.tensor([[0, 2], [1, 0], [1, 1]]), set()
    clips = (255 * torch.eye(3, dtype=torch.uint8)).view(3, 3, 1, 1, 1).expand(3, 3, 4, 32, 32)
    seen, logits, forward = [], torch.randn(3, 5), model.logits
    model.logits = lambda clips, inside: (seen.append(clips), forward(clips, inside), logits)[-1]
    own = model.inside(clips)[:, 0, 0] > 0
    for seed in range(6):
        torch.manual_seed(seed)
        loss, stats = model(clips, labels, seeded(seed))
        shares, expected, right = common.unnormalize(seen[-1])[:, :, 0], 0, 0           # (3 clips, share of 3, H, W)
        kinds.add("cut" if (shares - shares.round()).abs().max() < 1e-3 else "mix")
        for share, tokens, row, true in zip(shares, spy.inside, logits, labels):
            assert torch.equal(tokens, patches_of((own & (share > 1e-4)).any(0)))
            for k, part, first in ((0, row[:2], 0), (1, row[2:], 2)):
                for other, weight in enumerate(share.mean((1, 2))):
                    target = torch.full_like(part, 0.1 / len(part))
                    target[labels[other, k]] += 0.9
                    expected = expected - weight * (target * part.log_softmax(0)).sum() / 3
            right += int(row[:2].argmax()) == true[0] and int(row[2:].argmax()) == true[1]
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
        assert float(stats["train_acc"]) == pytest.approx(100 * right / 3)
    assert kinds == {name for name, key in (("mix", "mixup"), ("cut", "cutmix")) if key in settings}


def test_a_clip_is_mixed_with_one_of_another_video():
    """Though two clips of each come one after the other; pixels tell with which, and the loss knows it."""
    model = Classifier(small_vit(3), [3], config(**QUIET | dict(mixup=0.8)))
    clips = (255 * torch.eye(3, dtype=torch.uint8)).repeat_interleave(2, 0).view(6, 3, 1, 1, 1).expand(6, 3, 4, 32, 32)
    seen, logits = [], torch.randn(6, 3, generator=seeded())
    model.logits = lambda clips, inside: (seen.append(common.unnormalize(clips).mean((2, 3, 4))), logits)[-1]
    for seed in range(3):
        torch.manual_seed(seed)
        loss, _ = model.train()(clips, torch.arange(3))
        assert torch.equal((seen[-1] > 1e-3).sum(1), torch.full((6,), 2))
        torch.testing.assert_close(loss, -(seen[-1] * logits.log_softmax(1)).sum(1).mean(), rtol=1e-3, atol=1e-3)


def test_loss_and_scores_of_two_heads():
    """Smoothing is that of the head, the clips of a video share its label; scores are probabilities or logits."""
    model = Classifier(scrambled(small_vit(7), scale=3), [3, 4], Config(**QUIET | dict(label_smoothing=0.2))).eval()
    clips, labels = noise_clips(6), torch.tensor([[0, 3], [2, 1], [1, 0]])
    x, loss = common.normalize(clips), 0
    logits, scores = model.network(x), model.scores(clips)
    for i, (head, places) in itertools.product(range(6), enumerate((slice(0, 3), slice(3, 7)))):
        p = logits[i, places].exp() / logits[i, places].exp().sum()
        torch.testing.assert_close(scores[i, places], p)
        loss = loss - sum((0.2 / len(p) + 0.8 * (c == labels[i // 2, head])) * p[c].log() for c in range(len(p))) / 6
    torch.testing.assert_close(model(clips, labels)[0], loss, rtol=1e-4, atol=1e-5)
    model.cfg.average = "logits"
    torch.testing.assert_close(model.scores(clips), logits)
    model.cfg.unit_features = True
    features = model.network.fc_norm(model.network.forward_map(x).mean((2, 3, 4)))
    torch.testing.assert_close(model.scores(clips), model.network.head(features / features.norm(dim=1, keepdim=True)))


@pytest.mark.parametrize("settings, hue, grey", [
    (dict(jitter=1.0, hue=0.5), True, False), (dict(grey=1.0), False, True), (dict(), False, False)])
def test_colours_change_only_where_asked(settings, hue, grey):
    model, seen = Classifier(small_vit(), [5], Config(**QUIET, **settings)), []
    model.logits = lambda clips, inside: (seen.append(clips), torch.zeros(2, 5))[-1]
    clips = torch.tensor([200, 90, 40], dtype=torch.uint8).view(1, 3, 1, 1, 1).expand(2, 3, 4, 32, 32)
    model(clips, torch.zeros(2, dtype=torch.long), seeded())
    red, green, blue = common.unnormalize(seen[0])[:, :, 0, 0, 0].T
    assert torch.allclose(red, blue, atol=1e-3) == grey
    assert torch.equal(seen[0], common.normalize(clips)) == (not settings)
    assert bool(((red < green) | (red < blue) | (green < blue - 1e-3)).any()) == hue    # the order of colours changes


@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_a_fixed_trunk_stays_as_it_is_and_dropout_is_for_training_only(mode):
    network = small_resnet()
    model = Classifier(network, [5], Config(**{**QUIET, "mode": mode, "dropout": 0.5})).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    model(noise_clips(4), torch.arange(4))[0].backward()
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    graded = {k.split(".")[0] for k, p in network.named_parameters() if p.grad is not None}
    assert model.training and network.training == network.head.training == (mode == "finetune")
    assert graded == {"head"} and not changed if mode == "linear" else "stem" in graded and changed
    x = common.normalize(noise_clips(2))
    assert not torch.equal(model.logits(x), model.logits(x))
    assert not model.eval().network.training
    torch.testing.assert_close(model.logits(x), network(x))


# ---- 3. Learning rates -----------------------------------------------------------------------------------------------

def test_layer_decay_and_what_vectors_get():
    network = small_vit()
    network.local_MCA = torch.nn.ModuleList([MotionFocus(24)])
    network.blocks[0].norm1.weight.requires_grad = False
    for name, vectors in (("adamw", 0.0), ("sgd", 0.05), ("nesterov", 0.0)):
        groups, seen = make_optimizer(name, network, 1.0, 0.05, layer_decay=0.5).param_groups, {}
        for group in groups:
            seen |= {id(p): (group["scale"], group["weight_decay"]) for p in group["params"]}
        assert sum(len(g["params"]) for g in groups) == len(seen) == len([*network.parameters()]) - 1
        assert all(group["lr"] == 1 for group in groups)
        scales = {"patch_embed": 0.5**3, "blocks.0": 0.5**2, "blocks.1": 0.5}
        for name, p in network.named_parameters():
            if p.requires_grad:
                scale = scales.get(re.match(r"blocks\.\d|\w+", name)[0], 1.0)
                assert seen[id(p)] == (scale, vectors if p.ndim < 2 else 0.05), name
    resnet = make_optimizer("sgd", small_resnet(), 1.0, 0.05, layer_decay=0.5)
    assert {g["scale"] for g in resnet.param_groups} == {1.0}


# ---- 4. Which frames and which part of them --------------------------------------------------------------------------

def spread(room, count):
    return [round(room / 2)] if count == 1 else [round(k * room / (count - 1)) for k in range(count)]


@pytest.mark.parametrize("frames, first, last", [(100, 0, 99), (100, 20, 60), (9, 0, 8), (1, 0, 0)])
@pytest.mark.parametrize("height, width", [(48, 64), (64, 48), (300, 300), (240, 427)])
@pytest.mark.parametrize("views", [(1, 1), (2, 3), (3, 1)])
def test_views_at_test_time(frames, first, last, height, width, views):
    video, (T, S), short = FakeVideo(frames, height, width), views, min(height, width)
    item = Item("video.mp4", 0, first / 10, math.inf if last + 1 == frames else last / 10)
    for sampling, stride, more, side in (
            ("dense", 3, dict(), short), ("dense", 1, dict(test_crop=0.6), round(0.6 * short)),
            ("dense", 1.5, dict(stride=3, fps=20.0), short),  # as many seconds as at 20; this one has 10
            ("uniform", 4, dict(test_crop=224 / 240), round(short * 224 / 240))):
        cfg, steps = Config(**dict(sampling=sampling, stride=stride) | more), [round(stride * i) for i in range(8)]
        assert finetune.test_clips(video, item, None, cfg, 16, 8, views).shape == (T * S, 8, 16, 16, 3)
        expected = []
        for t in range(T):
            if sampling == "dense":                              # starts from the first to the last one that fits
                begin = spread(max(0, last - first - steps[7]), T)[t]
                numbers = [min(first + begin + step, last) for step in steps]
            else:                                                # the middle of the t-th of T parts of each segment
                numbers = [first + math.floor((last - first + 1) / 8 * (i + (t + 0.5) / T)) for i in range(8)]
            for shift in spread(max(height, width) - side, S):
                other = (short - side) // 2
                x, y = (shift, other) if width >= height else (other, shift)
                expected.append((numbers, (x, y, x + side, y + side)))
        assert video.views(8) == expected


@pytest.mark.parametrize("sampling", ["dense", "uniform"])
def test_views_of_training(sampling):
    rng, item, video = np.random.default_rng(0), Item("video.mp4", 0, 2.0, 8.0), FakeVideo(100, 60, 80)
    cfg, seen, boxes = Config(sampling=sampling, stride=3, repeats=3, min_crop=0.3, aspect=1.5), [], []
    for _ in range(60):
        assert train_clips(video, item, rng, cfg, 16, 8).shape == (3, 8, 16, 16, 3)
        views = video.views(8)
        seen += [numbers for numbers, _ in views]
        boxes += [box for _, box in views]
    seen = np.array(seen)
    assert seen.min() == 20 and seen.max() == 80 and len(set(boxes)) > 170 and len(set(map(tuple, seen[::3]))) > 20
    assert not np.array_equal(seen[0::3], seen[1::3])                                    # repeats differ
    shares = [(x2 - x1) * (y2 - y1) / 4800 for x1, y1, x2, y2 in boxes]
    aspects = [(x2 - x1) / (y2 - y1) for x1, y1, x2, y2 in boxes]
    assert 0.28 < min(shares) < 0.4 and 0.8 < max(shares) <= 1
    assert 0.64 < min(aspects) < 0.75 and 1.35 < max(aspects) < 1.56
    if sampling == "dense":
        assert (np.diff(seen) == 3).all() and set(seen[:, 0]) == set(range(20, 60))
        train_clips(video, item, rng, dataclasses.replace(cfg, fps=5.0), 16, 8)          # half as fast as the video
        assert (np.diff(video.views(8)[0][0]) == 6).all()
    else:  # one of each eighth of 61 frames
        edges = 20 + 61 / 8 * np.arange(9)
        assert (seen >= np.floor(edges[:-1])).all() and (seen <= np.ceil(edges[1:])).all()
        assert len(np.unique(np.diff(seen))) > 8


# ---- 5. People in videos ---------------------------------------------------------------------------------------------

PEOPLE = np.array([[0.3, 0.25, 0.5, 0.75], [0.6, 0.1, 0.9, 0.5], [0.0, 0.4, 0.05, 0.6]], np.float32)  # one at the edge
STREET = KeyFrame("street.mp4", 0, "street,0901", 901, PEOPLE, np.ones(3, np.float32), np.eye(3, 80) > 0)


def test_boxes_follow_the_crop_of_training():
    rng, video, sides, seen, places = np.random.default_rng(0), FakeVideo(30, 120, 160), set(), set(), set()
    for _ in range(60):
        out = person_clip(video, STREET, rng, Config(stride=2), 64, 2, train=True)
        (_, (x1, y1, x2, y2)), = video.views(2)
        pixels = PEOPLE * [160, 120, 160, 120] - [x1, y1, x1, y1]
        boxes = (pixels * 64 / (x2 - x1)).clip(0, 64)
        inside = (boxes[:, 2:] - boxes[:, :2] > 1).all(1)                                # nobody outside is kept
        assert out["clips"].shape == (1, 2, 64, 64, 3) and out["boxes"].dtype == np.float32 and x2 - x1 == y2 - y1
        assert np.allclose(out["boxes"], boxes[inside], atol=1e-4) and out["count"].tolist() == [inside.sum()]
        assert out["actions"].nonzero()[1].tolist() == np.flatnonzero(inside).tolist()
        sides.add(x2 - x1), seen.add(inside.sum()), places.add((x1, y1))
    assert min(sides) == 84 and max(sides) >= 104 and {1, 2, 3} <= seen and len(places) > 50
    assert min(places)[0] < 5 and max(places)[0] > 50                                    # the short side is 256 to 320


@pytest.mark.parametrize("test_size, shape", [(0, (64, 80)), (48, (48, 64)), (92, (96, 128)), (256, (256, 336))])
def test_boxes_follow_the_scale_of_testing(test_size, shape):
    video = FakeVideo(30, 120, 160)
    out = person_clip(video, STREET, None, Config(stride=2, test_size=test_size), 64, 2)
    assert video.views(2) == [([9, 10], (0, 0, 160, 120))]  # second 901 of a video cut at 900
    assert out["clips"].shape == (1, 2, *shape, 3) and out["count"].tolist() == [3] and out["actions"].shape == (3, 80)
    assert np.allclose(out["boxes"] / (shape[::-1] * 2), PEOPLE, atol=1e-4)


def test_flipped_clips_have_mirrored_boxes():
    clips, corner = torch.zeros(8, 3, 2, 64, 64, dtype=torch.uint8), torch.randint(0, 40, (12, 2), generator=seeded())
    boxes = torch.cat([corner, corner + torch.tensor([20, 9])], 1)
    count, owner = torch.tensor([1, 2, 1, 2, 1, 2, 1, 2]), [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7]
    for n, (i, (x1, y1, x2, y2)) in enumerate(zip(owner, boxes.tolist())):
        clips[i, n % 3, :, y1:y2, x1:x2] = 255                                           # a colour per person
    seen, detector = [], Detector(small_vit(80, size=64, frames=2), Config(**QUIET, flip=True))
    detector.logits = lambda *args: (seen.extend(args), torch.zeros(len(args[1]), 80))[1]
    batch = dict(clips=clips, boxes=boxes.float(), actions=torch.zeros(12, 80), count=count)
    loss, stats = detector(batch, None, seeded())
    for n, (i, (x1, y1, x2, y2)) in enumerate(zip(owner, seen[1].int().tolist())):
        colour = common.unnormalize(seen[0])[i, n % 3, 0]
        assert colour[y1:y2, x1:x2].min() > 0.99 and colour.sum() == pytest.approx(180, abs=0.1)
    assert 0 < (seen[1][:, 0] != boxes[:, 0]).sum() < 12 and float(loss) == pytest.approx(math.log(2))
    assert stats["people"] == 12 / 8


@pytest.mark.parametrize("kind", ["vit", "slow_r50"])
def test_detector_is_a_loop_over_boxes(kind):
    network = scrambled(small_vit(80, size=64, patch=16) if kind == "vit" else small_resnet("slow_r50", 80, 64))
    if kind != "vit":
        finetune.dilate(network)
    detector, clips, g = Detector(network, Config(dropout=0.9)).eval(), torch.randn(3, 3, 4, 64, 96), seeded()
    corner = torch.rand(5, 2, generator=g) * torch.tensor([60.0, 40])
    boxes = torch.cat([corner, corner + 5 + 20 * torch.rand(5, 2, generator=g)], 1)
    count, rows = torch.tensor([2, 0, 3]), []
    with torch.no_grad():
        logits = detector.logits(clips, boxes, count)
        for box, i in zip(boxes, [0, 0, 2, 2, 2]):
            maps = network.forward_map(clips[i:i + 1]).mean(2)
            assert maps.shape[2:] == (4, 6)
            rows.append(network.head(roi_align(maps, [box[None]], 7, 1 / 16, aligned=True).flatten(2).max(2).values)[0])
        torch.testing.assert_close(logits, torch.stack(rows), rtol=1e-3, atol=1e-4)
        assert not torch.equal(detector.train().logits(clips, boxes, count), logits)     # dropout


def test_detector_s_loss_and_a_batch_without_people():
    detector = Detector(small_vit(80), Config(**QUIET)).train()
    batch = dict(clips=noise_clips(2), boxes=torch.tensor([[0, 0, 20, 20.0], [5, 5, 30, 30]]),
                 actions=torch.rand(2, 80) < 0.1, count=torch.tensor([0, 2]))
    p = detector.logits(common.normalize(batch["clips"]), batch["boxes"], batch["count"]).sigmoid()
    torch.testing.assert_close(detector(batch, None)[0], -torch.where(batch["actions"], p, 1 - p).log().mean())
    batch |= dict(boxes=torch.zeros(0, 4), actions=torch.zeros(0, 80), count=torch.tensor([0, 0]))
    loss, stats = detector(batch, None)
    loss.backward()
    assert loss == stats["people"] == 0 and all(p.grad is None or not p.grad.any() for p in detector.parameters())


def test_a_vit_at_another_size():
    network, x = scrambled(small_vit()), torch.randn(2, 3, 4, 48, 24)  # a grid of 6 x 3 instead of 4 x 4
    table = network.positions.view(2, 4, 4, 24).permute(0, 3, 1, 2)
    table = F.interpolate(table, (6, 3), mode="bicubic").permute(0, 2, 3, 1).reshape(36, 24)
    tokens = torch.nn.Sequential(*network.blocks)(network.patch_embed(common.patchify(x, 8, 2)) + table)
    torch.testing.assert_close(network.forward_map(x).flatten(2).transpose(1, 2), tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["slow_r50", "r2plus1d_50"])
def test_dilation_keeps_the_resolution_and_the_function(name):
    """Where the first block of the stage looks at its middle tap alone, every second place is what there was before."""
    network, x = scrambled(small_resnet(name, 0)), torch.randn(1, 3, 4, 96, 64)
    first = network.layer4[0].conv2
    first = first if isinstance(first, torch.nn.Conv3d) else first[0]
    first.weight.data *= F.pad(torch.ones(1, 1), (1, 1, 1, 1))
    names, before = list(network.state_dict()), network.forward_map(x)
    finetune.dilate(network)
    after = network.forward_map(x)
    assert list(network.state_dict()) == names and before.shape[-2:] == (3, 2) and after.shape[-2:] == (6, 4)
    assert after.shape[:3] == before.shape[:3] and before.std() > 1e-3
    torch.testing.assert_close(after[..., ::2, ::2], before, rtol=1e-3, atol=1e-4)


# ---- 6. Recipes ------------------------------------------------------------------------------------------------------

PAPERS, MODES = ("videomae", "mofo", "mme", "fame", "mcl", "modist"), ("finetune", "linear", "knn", "retrieval", "test")


def config(**flags):
    return parse_config(Config, RECIPES, [w for k, v in flags.items() for w in (f"--{k.replace('_', '-')}", str(v))])


def test_every_combination_is_a_valid_configuration():
    """Later keys override earlier ones, and a key applies if all of its words are there; every key can apply."""
    assert {word for key in RECIPES for word in key.split()} <= {*DATA_SETS, "custom", *PAPERS, *MODES}
    for data, recipe, mode in itertools.product((*DATA_SETS, "my_videos"), PAPERS, MODES):
        words, expected = {data if data in DATA_SETS else "custom", recipe, mode}, dataclasses.asdict(Config())
        for key, values in RECIPES.items():
            expected |= values if words >= set(key.split()) else {}
        cfg = config(data=data, recipe=recipe, mode=mode)
        assert dataclasses.asdict(cfg) == {**expected, "data": data, "recipe": recipe, "mode": mode}
        assert all(type(value) is type(getattr(Config, name)) for name, value in dataclasses.asdict(cfg).items())
        assert not (cfg.batch % cfg.device_batch or cfg.device_batch % cfg.repeats), (data, recipe, mode)
        if data != "ava" or mode in ("finetune", "test"):
            finetune.check(cfg)


@pytest.mark.parametrize("data, recipe, mode, expected", [
    ("ssv2", "videomae", "finetune", dict(views="2x3", sampling="uniform", flip=False, layer_decay=0.75)),
    ("k400", "videomae", "finetune", dict(views="5x3", sampling="dense", repeats=2, flip=True)),
    ("ava", "videomae", "finetune", dict(lr=2.5e-4, epochs=30, mixup=0.0, min_score=0.8, times_score=True, repeats=1)),
    ("epic", "mofo", "finetune", dict(label="action", focused=True, epochs=100, erasing=0.0, min_crop=0.5)),
    ("ssv2", "mofo", "knn", dict(focused=False)), ("ava", "mofo", "finetune", dict(focused=False, repeats=1)),
    ("k400", "mme", "finetune", dict(lr=1e-3, epochs=75, min_crop=0.25, views="7x3", mixup=0.8, min_lr=1e-6)),
    ("ucf101", "fame", "linear", dict(classifier="trained", unit_features=True, epochs=100, drops="60,80")),
    ("ucf101", "fame", "retrieval", dict(center=True, views="10x1", train_views="10x1", test_crop=224 / 240)),
    ("k400", "mcl", "linear", dict(classifier="trained", test_crop=224 / 256, lr=32.0, frames=32)),
    ("toy", "fame", "finetune", dict(stride=2, test_crop=1.0)), ("toy", "mcl", "linear", dict(test_crop=1.0)),
    ("ucf101", "mcl", "linear", dict(classifier="svm", test_crop=224 / 240, train_views="20x1", frames=16)),
    ("hmdb51", "modist", "finetune", dict(lr=0.04, warmup_epochs=34.0, stride=8, whole_cosine=True)),
    ("ucf101", "modist", "retrieval", dict(views="10x1", train_views="10x1", frames=16, stride=2, test_size=0)),
    ("ssv2", "fame", "finetune", dict(flip=False, jitter=0.8)), ("ssv2", "mcl", "finetune", dict(flip=False)),
    ("ssv2", "modist", "linear", dict(flip=False)), ("k400", "modist", "linear", dict(flip=True)),
    ("ucf101", "mme", "linear", dict(dropout=0.0, min_lr=1e-6, classifier="trained")),
    ("ava", "modist", "finetune", dict(optimizer="nesterov", min_score=0.9, times_score=False, drops="16,24,28")),
    ("mofo", "videomae", "finetune", dict(focused=False, batch=16, sampling="dense"))])                # a directory
def test_published_settings(data, recipe, mode, expected):
    cfg = config(data=data, recipe=recipe, mode=mode)
    assert {name: getattr(cfg, name) for name in expected} == expected


# Published fine-tuning: videos, GPUs x videos per GPU x accumulation, clips of each, epochs, rate per 256 videos.
PUBLISHED = {
    ("k400", "videomae"): (240_436, 64 * 6, 2, 75, 5e-4), ("ssv2", "videomae"): (168_913, 64 * 8, 1, 50, 5e-4),
    ("ucf101", "videomae"): (9_537, 8 * 16, 2, 100, 5e-4), ("ssv2", "mme"): (168_913, 16 * 28, 2, 30, 5e-4),
    ("ucf101", "fame"): (9_537, 4 * 32, 1, 150, 0.05), ("ucf101", "mcl"): (9_537, 4 * 16 * 4, 1, 150, 0.01),
    ("ucf101", "modist"): (9_537, 64, 1, 200, 0.04)}


@pytest.mark.parametrize("data, recipe", PUBLISHED)
def test_steps_clips_and_rate_are_those_of_the_paper(data, recipe):
    videos, batch, clips, epochs, rate = PUBLISHED[data, recipe]
    cfg = config(data=data, recipe=recipe, mode="finetune", device_batch=4, frames=16)
    assert cfg.lr == pytest.approx(rate)
    for env in (ENV, ENV._replace(rank=7, world=8)):
        plan = common.plan_run(cfg, videos, env)
        assert abs(plan.steps - epochs * videos // batch) <= 1  # optimiser steps of the whole run
        assert plan.micro * plan.accum * env.world * cfg.repeats == batch * clips         # clips in each
        last = plan.generator(env, 0, 0, plan.accum - 1)
        assert (last.first + plan.micro * cfg.repeats, last.total) == (batch * clips,) * 2


@pytest.mark.parametrize("data, recipe", [(data, recipe) for data in (*DATA_SETS, "my_videos") for recipe in PAPERS])
def test_testing_again_follows_the_protocol_of_fine_tuning(data, recipe):
    cfg = config(data=data, recipe=recipe, mode="finetune", flow_size=48, flow_updates=3)
    again, flag = config(data=data, mode="test"), config(data=data, mode="test", views="9x1")
    for other in (again, flag):
        finetune.inherit_settings(other, dict(config=dataclasses.asdict(cfg)))
    assert all(getattr(again, name) == getattr(cfg, name) for name in (
        "sampling", "stride", "frames", "views", "test_size", "test_crop", "average", "min_score", "times_score",
        "flow_size", "flow_updates"))
    assert flag.views == "9x1" and flag.sampling == cfg.sampling


# ---- 7. Whole runs ---------------------------------------------------------------------------------------------------

SHORT = "--batch 4 --device-batch 4 --steps 2 --log-every 1 --workers 0 --no-compile".split()
PRETRAIN = dict(
    mofo="--model vit_tiny --flow tvl1 --frames 4 --patch-size 16", mme="--model vit_tiny --flow tvl1 --frames 4",
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


@pytest.fixture(scope="session")
def pretrained(place):
    """Per script: its checkpoint after a step on toy data."""
    def checkpoint(script):
        path = place / f"runs/{script}/last.pt"
        if not path.exists():
            argv = f"--image-size 32 --steps 1 {PRETRAIN[script]}".split()
            run(script, *toy(place), *SHORT, *argv, "--out", path.parent)
        return path
    return checkpoint


def toy(place):
    return ["--data", "toy", "--root", place / "toy", "--toy-size", 32, "--toy-train", 8, "--toy-test", 6]


@pytest.fixture(scope="session")
def tune(place, pretrained):
    """finetune.py with short settings and flags -> results, directory; the same flags run once."""
    done = {}

    def results(*argv, recipe="videomae", init=None):
        key = (recipe, init, *map(str, argv))
        if key not in done:
            out, data = place / f"runs/tuned-{len(done)}", [] if "--data" in argv else toy(place)
            init = init or pretrained(INIT[recipe])
            run("finetune", *data, *SHORT, "--recipe", recipe, "--init", init, "--flow", "tvl1", *argv, "--out", out)
            done[key] = json.loads((out / "results.json").read_text()), out
        return done[key]
    return results


@pytest.fixture(scope="session")
def layouts(tmp_path_factory):
    """Per data set: its published layout in miniature."""
    made = {}

    def root(data):
        if data not in made:
            made[data] = tmp_path_factory.mktemp(data)
            miniature(data, made[data])
        return made[data]
    return root


def scored(out):
    return dict(np.load(out / "scores.npz"))


def unchanged(init, out):
    """Per tensor that a checkpoint shares with the one it began from: is it the same?"""
    before, after = load_file(init)["model"], load_file(out / "last.pt")["model"]
    return [torch.equal(before["encoder." + k], after[k]) for k in after if "encoder." + k in before]


@pytest.mark.parametrize("recipe, data, views, argv", [
    ("videomae", "ssv2", "2x3", ""), ("mofo", "hmdb51", "5x3", ""), ("mme", "k400", "3x1", "--views 3x1"),
    ("fame", "ucf101", "2x1", "--views 2x1"), ("mcl", "hmdb51", "2x2", "--views 2x2 --test-size 32 --frames 8"),
    ("modist", "ssv2", "1x3", "--test-size 32 --frames 4")])
def test_every_recipe_fine_tunes(recipe, data, views, argv, layouts, tune, pretrained, capsys):
    results, out = tune("--data", data, "--root", layouts(data), *argv.split(), recipe=recipe)
    text = capsys.readouterr().out
    assert {f"acc1_{views}", f"acc5_{views}", f"mean_class_{views}", "per_class"} <= set(results)
    assert results["videos"] == 2 and not results["unreadable"] and results["recipe"] == recipe
    assert f"acc1_{views} {results[f'acc1_{views}']:.2f}" in text and "on 2 videos" in text
    assert results[f"acc5_{views}"] == 100                                               # there are two classes
    settings, log, content = json.loads((out / "config.json").read_text()), lines(out), load_file(out / "last.pt")
    assert settings["videos"] == 4 and settings["method"] == "finetune-finetune"
    assert [line["step"] for line in log] == [0, 1] and all(math.isfinite(line["loss"]) for line in log)
    assert ("local_MCA.0.attn.q.weight" in content["model"]) == (recipe == "mofo")
    assert len(content["classes"]) == len(content["model"]["head.bias"]) == 2
    assert unchanged(pretrained(INIT[recipe]), out).count(False) > 20                    # the network is trained, too
    again, there = tune("--data", data, "--root", layouts(data), "--mode", "test", recipe=recipe, init=out / "last.pt")
    assert again[f"acc1_{views}"] == results[f"acc1_{views}"] and again["videos"] == 2
    assert np.allclose(scored(there)["scores"], scored(out)["scores"], atol=1e-5)


@pytest.mark.parametrize("recipe, data, argv", [
    ("fame", "ucf101", "--views 2x1"), ("mcl", "ucf101", "--views 2x1 --train-views 2x1"),
    ("mme", "ssv2", "--views 1x1")])
def test_every_recipe_probes(recipe, data, argv, layouts, tune, pretrained):
    results, out = tune("--mode", "linear", "--data", data, "--root", layouts(data), *argv.split(), recipe=recipe)
    assert results["videos"] == 2 and f"acc1_{argv.split()[1]}" in results
    if recipe != "mcl":                                                                  # that is the SVM
        assert len(unchanged(pretrained(INIT[recipe]), out)) > 30 and all(unchanged(pretrained(INIT[recipe]), out))
        groups = load_file(out / "last.pt")["optimizer"]["param_groups"]
        assert sum(len(group["params"]) for group in groups) == 2                        # of the head


VERB_NOUN = {f"{name}_top{k}" for name in ("verb", "noun", "action") for k in (1, 5)}


@pytest.mark.parametrize("recipe, label, names", [
    ("videomae", "verb-noun", VERB_NOUN),
    ("mofo", "action", {"acc1", "acc5", "mean_class"} | {n for n in VERB_NOUN if "action" not in n})])
def test_epic_with_two_heads_and_with_one_of_actions(recipe, label, names, layouts, tune):
    flags = ["--data", "epic", "--root", layouts("epic"), "--views", "2x1"]
    results, out = tune(*flags, recipe=recipe)
    assert {name.removesuffix("_2x1") for name in results if name.endswith("_2x1")} == names
    assert results["noun_top1_2x1"] in (0, 100) and all(0 <= results[f"{name}_2x1"] <= 100 for name in names)
    content = load_file(out / "last.pt")
    assert len(content["model"]["head.weight"]) == len(content["classes"]) == (2 if label == "action" else 6)
    again, _ = tune(*flags, "--mode", "test", recipe=recipe, init=out / "last.pt")       # the label comes with the file
    assert again["label"] == label and all(again[name] == value for name, value in results.items() if "top" in name)
    for mode in ("knn", "retrieval", "linear"):  # probes take one label, the verb
        assert tune(*flags, "--train-views", "1x1", "--mode", mode)[0]["videos"] == 2


def test_figures_of_epic_do_not_depend_on_what_is_averaged():
    """Probabilities or logits of both heads, or of all actions: by hand."""
    classes = ["verb:a", "verb:b", "noun:x", "noun:y", "noun:z"]
    logits = torch.tensor([[2.0, 0, 0, 3, 1], [0, 1.0, 0, 0, 5], [9.0, 0, 9, 0, 0]])
    read, labels = torch.tensor([True, True, False]), torch.tensor([[0, 1], [1, 0], [0, 0]])
    third = 100 / 3
    expected = dict(verb_top1=2 * third, noun_top1=third, action_top1=third)
    expected |= {f"{name}_top5": 2 * third for name in ("verb", "noun", "action")}
    softmax = torch.cat([part.softmax(1) for part in logits.split([2, 3], 1)], 1)
    for average, scores in (("logits", logits), ("softmax", softmax)):
        cfg = Config(data="epic", label="verb-noun", average=average)
        result = finetune.compute_metrics(scores * read[:, None], read, labels, classes, cfg)
        assert result == pytest.approx(expected)
    p, labels = torch.tensor([[0.15] * 4 + [0.4], [0.6, 0, 0, 0, 0.4], [0.0] * 4 + [1.0]]), torch.tensor([1, 0, 4])
    for average, scores in (("softmax", p), ("logits", p.log() + 3)):                    # of verb 0: 0.6; of verb 1: 0
        cfg = Config(data="epic", label="action", average=average)
        result = finetune.compute_metrics(scores, read, labels, ["0:0", "0:1", "0:2", "0:3", "2:4"], cfg)
        assert {name: result[name] for name in ("acc1", "verb_top1", "noun_top1")} == pytest.approx(
            dict(acc1=third, verb_top1=2 * third, noun_top1=third)) and "action_top1" not in result


def test_scores_of_a_video_are_the_mean_over_its_views(place):
    items = common.find_videos("toy", place / "toy", "test", toy=(8, 6, 32)).items
    cfg = config(data="toy", workers=0, image_size=32, frames=4)
    each, mean = (finetune.run_views(lambda clips: clips.float().std((2, 3, 4)), items, cfg, ENV, "3x1", "", one)[0]
                  for one in (False, True))
    assert torch.equal(each.mean(1), mean) and each.std(1).min() > 0 and each.shape == (6, 3, 3)


@pytest.mark.parametrize("center", [False, True])
def test_retrieval_compares_means_over_views(center, place, tune, pretrained):
    """The videos' own features are compared; with --center each clip counts the same and the mean is taken off."""
    views = ["--views", "3x1", "--train-views", "2x1", *["--center"] * center]
    results, _ = tune("--mode", "retrieval", *views)
    network, sets = built(pretrained("mofo")).eval(), []
    for split, views in (("train", (2, 1)), ("test", (3, 1))):
        items, rows = common.find_videos("toy", place / "toy", split, toy=(8, 6, 32)).items, []
        for item in items:
            x = features_of(network, item.path, 2, views)
            rows.append((x / x.norm(dim=1, keepdim=True) if center else x).mean(0))
        sets += [torch.stack(rows), torch.tensor([item.label for item in items])]
    expected = {f"R@{k}_3x1": value for k, value in finetune.retrieval_recall(*sets, center=center).items()}
    assert {name: value for name, value in results.items() if "@" in name} == expected and results["R@1_3x1"] < 100


def features_of(network, path, stride, views):
    with common.Video(str(path)) as video, torch.no_grad():
        cfg = Config(sampling="dense", stride=stride)
        clips = finetune.test_clips(video, Item(str(path)), None, cfg, 32, 4, views)
        return network(common.normalize(torch.from_numpy(clips).permute(0, 4, 1, 2, 3)))


def cosine(steps, first=0):
    return [0.5 * (1 + math.cos(math.pi * i / steps)) for i in range(first, steps)]


@pytest.mark.parametrize("argv, expected", [
    ("fame --drops 1,2 --warmup-epochs 0", [1, 1, 0.1, 0.1, 0.01, 0.01]),
    ("fame --drops 1.5 --warmup-epochs 1", [0, 1, 1, 0.1, 0.1, 0.1]), ("mcl --warmup-epochs 0", cosine(6)),
    ("modist --warmup-epochs 1 --warmup-start 0.1", [0.1, 0.1 + (cosine(6)[2] - 0.1) / 2, *cosine(6, 2)]),
    ("videomae --layer-decay 0.5 --min-lr 0.032 --warmup-epochs 1", [0, 1, *(0.1 + 0.9 * x for x in cosine(4))])])
def test_learning_rates_and_optimizers(argv, expected, tune):
    recipe, *flags = argv.split()
    _, out = tune(*flags, *"--lr 0.32 --steps 6 --weight-decay 0.01 --frames 4".split(), recipe=recipe)
    assert [line["lr"] for line in lines(out)] == pytest.approx([0.32 * 4 / 256 * rate for rate in expected], abs=1e-9)
    groups = load_file(out / "last.pt")["optimizer"]["param_groups"]
    assert {g["weight_decay"] for g in groups} == ({0.01} if recipe == "fame" else {0.01, 0.0})
    if recipe == "videomae":
        assert {g["scale"] for g in groups} == {1, 0.5, 0.25, 0.125, 0.0625} and groups[0]["betas"] == (0.9, 0.999)
        assert all(g["lr"] == pytest.approx(0.005 * expected[-1] * g["scale"]) for g in groups)
    else:
        assert all(g["momentum"] == 0.9 and g["nesterov"] == (recipe != "fame") for g in groups)


def test_gradients_are_clipped_and_accumulated(tune):
    flags = "--optimizer sgd --lr 64 --warmup-epochs 0 --steps 1 --weight-decay 0".split()
    whole, parts, clipped = (tune(*flags, *more.split())[1] for more in ("", "--device-batch 2", "--clip-grad 0.001"))
    for name in ("loss", "grad_norm", "train_acc"):
        assert lines(parts)[0][name] == pytest.approx(lines(whole)[0][name], rel=1e-3)
    norms = []
    for out in (whole, clipped):
        state = load_file(out / "last.pt")["optimizer"]["state"].values()
        norms.append(math.sqrt(sum(float(s["momentum_buffer"].square().sum()) for s in state)))
    assert norms == pytest.approx([lines(whole)[0]["grad_norm"], 0.001], rel=1e-2)


def test_the_same_command_goes_on_and_tests_again(place, pretrained, monkeypatch):
    out = place / "runs/stopped"
    flags = [*toy(place), *SHORT, "--init", pretrained("mofo"), "--out", out]
    monkeypatch.setattr(finetune, "StopSignal", lambda: SimpleNamespace(received=True))
    run("finetune", *flags)
    assert load_file(out / "last.pt")["step"] == 1 and not (out / "results.json").exists()        # stopped: no test
    monkeypatch.undo()
    run("finetune", *flags)
    assert [line["step"] for line in lines(out)] == [0, 1] and load_file(out / "last.pt")["step"] == 2
    results = json.loads((out / "results.json").read_text())
    run("finetune", *flags)                                                              # training is over
    assert json.loads((out / "results.json").read_text()) == results and len(lines(out)) == 2
    with pytest.raises(UserError, match="lr: .*--fresh"):
        run("finetune", *flags, "--lr", 1)


# ---- 8. AVA ----------------------------------------------------------------------------------------------------------

def still(path, frame, frames=40, fps=10):
    """A video of one frame (H, W, 3), without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", fps, width=frame.shape[1], height=frame.shape[0], pix_fmt="yuv444p",
                                 options=dict(qp="0", preset="ultrafast"))
        for _ in range(frames):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())


LEFT, RIGHT, NOBODY = "0.1,0.2,0.4,0.9", "0.6,0.2,0.9,0.9", "0.0,0.0,0.1,0.1"


@pytest.fixture(scope="session")
def ava(tmp_path_factory):
    """Two videos of 4 s and a broken one: who is on the left does action 1, who is on the right 12."""
    root, frame = tmp_path_factory.mktemp("ava"), np.zeros((48, 64, 3), np.uint8)
    frame[10:43, 6:26], frame[10:43, 38:58] = 255, 90
    for name in ("video_train", "video_value"):
        still(root / f"videos_15min/{name}.mp4", frame)
    rows = f"video_train,0902,{LEFT},1,0\nvideo_train,0902,{RIGHT},12,1\nvideo_train,0903,{LEFT},1,0\n"
    value = rows.replace("train", "value") + f"video_broke,0902,{LEFT},1,0\nvideo_value,0902,{RIGHT},80,1\n"
    found = [("value", "0902", LEFT, 0.95), ("value", "0902", NOBODY, 0.85), ("value", "0902", RIGHT, 0.9),
             ("value", "0903", LEFT, 0.95), ("value", "0903", NOBODY, 0.85), ("broke", "0902", LEFT, 0.95)]
    return put(root, {
        "ava_train_v2.2.csv": rows, "ava_val_v2.2.csv": value, "ava_train_excluded_timestamps_v2.2.csv": "",
        "ava_val_excluded_timestamps_v2.2.csv": "",
        "ava_val_predicted_boxes.csv": "".join(f"video_{name},{second},{box},,{s}\n" for name, second, box, s in found),
        "ava_action_list_v2.2_for_activitynet_2019.pbtxt": "".join(
            f'item {{ name: "{name}" id: {i} }}' for i, name in ((1, "bend"), (12, "sit"), (79, "run")))},
        ["video_broke.mkv"])


@pytest.mark.parametrize("times_score, ap", [(True, 2 / 3), (False, 5 / 9)])
def test_actions_of_people_are_matched_to_theirs(times_score, ap, ava):
    """A model that knows the answer: what it says of a box must arrive at that box, video and second."""
    def logits(clips, boxes, count):
        assert clips.shape[-2:] == (48, 64) and count.sum() == len(boxes)
        out, left = torch.full((len(boxes), 80), -5.0), (boxes[:, 0] + boxes[:, 2]) / 2 < 32
        out[left, 0], out[~left, 11] = 5.0, 5.0
        return out
    model = SimpleNamespace(network=SimpleNamespace(config=dict(image_size=48, frames=2)), logits=logits)
    cfg = Config(data="ava", workers=0, stride=2, image_size=48, frames=2, times_score=times_score)
    result, errors = finetune.detect(model, *finetune.ava_listing(ava, "test"), cfg, ENV)
    assert result["per_class"] == pytest.approx({"bend": 100 * ap, "sit": 100.0})  # of the broken video all is missed
    assert result["mAP"] == pytest.approx(100 * (ap + 1) / 2) and len(errors) == 1 and "video_broke" in errors[0]


@pytest.mark.parametrize("recipe", ["videomae", "modist"])
def test_ava_end_to_end(recipe, ava, tune):
    flags = ["--data", "ava", "--root", ava, "--test-size", 48, "--stride", 2, "--frames", 4]
    results, out = tune(*flags, recipe=recipe)
    assert 0 <= results["mAP_1x1"] <= 100 and set(results["per_class"]) == {"bend", "sit"} and results["videos"] == 3
    assert len(results["unreadable"]) == 1 and "video_broke" in results["unreadable"][0] and "people" in lines(out)[0]
    network = built(out / "last.pt", data="ava", mode="test")
    assert network.head.weight.shape[0] == 80 and len(load_file(out / "last.pt")["classes"]) == 80
    assert network.forward_map(torch.randn(1, 3, 4, 48, 64)).shape[-2:] == (3, 4)        # stride 16, also of a ResNet
    again, _ = tune(*flags, "--mode", "test", recipe=recipe, init=out / "last.pt")
    assert again["per_class"] == pytest.approx(results["per_class"]) and again["videos"] == 3
    assert tune(*flags, "--mode", "test", "--boxes", "gt", recipe=recipe, init=out / "last.pt")[0]["videos"] == 3


# ---- 9. Predict, extract, export, test -------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def own(place):
    """A directory of the user's own: of class a_broken there is nothing to test that can be read."""
    root = place / "own"
    for split, i in [("train", i) for i in range(6)] + [("val", i) for i in range(4)]:
        name = f"{split}/{'b_whole' if i else 'a_broken'}/{i}.mp4"
        data = (place / f"toy/32px/train/{i:06d}.mp4").read_bytes()
        (put(root, {}, [name]) / name).write_bytes(data[:500] if name == "val/a_broken/0.mp4" else data)
    return root


def predictions(out):
    return list(csv.DictReader(open(out / "predictions.csv", newline="")))


@pytest.mark.parametrize("mode", [["finetune"], ["retrieval"], ["linear"], ["linear", "--classifier", "svm"], ["knn"]])
def test_what_cannot_be_read_is_wrong_whatever_the_mode(mode, own, tune, capsys):
    results, _ = tune("--data", own, "--views", "1x1", "--mode", *mode)
    assert results["videos"] == 4 and len(results["unreadable"]) == 1 and "0.mp4" in results["unreadable"][0]
    assert results["R@50_1x1"] == 75 if mode == ["retrieval"] else results["per_class"]["a_broken"] == 0
    assert "not read: " in capsys.readouterr().out


@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_testing_and_predicting_go_on_with_label_and_focus(average, place, tune, monkeypatch, capsys):
    """On the toy data's test videos, as data of one's own, predictions are as often right as in testing."""
    (results, out), calls, forward = tune("--label", "scene", recipe="mofo"), [], MotionFocus.forward
    monkeypatch.setattr(MotionFocus, "forward", lambda self, *x: (calls.append(1), forward(self, *x))[1])
    again, _ = tune("--mode", "test", "--average", average, init=out / "last.pt")
    assert again["label"] == "scene" and again["per_class"] == results["per_class"] and calls
    table = csv.DictReader(open(place / "toy/32px/test.csv"))
    truth = {Path(row["path"]).name: common.TOY_SCENES[int(row["scene"])] for row in table if "test/" in row["path"]}
    run("finetune", *SHORT, "--mode", "predict", "--init", out / "last.pt", "--data", place / "toy/32px/test",
        *"--stride 2 --views 1x1 --flow tvl1".split(), "--average", average, "--out", place / "runs/predict")
    rows = predictions(place / "runs/predict")
    for row in rows:
        names, values = row["top5"].split(";"), list(map(float, row["scores"].split(";")))
        assert set(names) <= set(common.TOY_SCENES) and len(set(names)) == 5 and row["label"] == names[0]
        assert values == sorted(values, reverse=True) and 5 / 8 - 1e-3 < sum(values) <= 1 + 1e-3
    right = sum(row["label"] == truth[Path(row["path"]).name] for row in rows)
    assert len(rows) == 6 and 100 * right / 6 == pytest.approx(results["acc1_1x1"])
    assert "6 of 6 videos" in capsys.readouterr().out
    with pytest.raises(UserError, match="neither MOFO's head"):                               # of MOFO's head
        run("finetune", "--mode", "export", "--init", out / "last.pt", "--out", place / "runs/no-export")


def test_predict_on_broken_videos_and_with_two_heads(place, own, layouts, tune, capsys):
    init = tune("--data", "epic", "--root", layouts("epic"), "--views", "2x1")[1] / "last.pt"
    run("finetune", *SHORT, "--mode", "predict", "--init", init, "--data", own / "val", "--out", place / "runs/two")
    rows, text = predictions(place / "runs/two"), capsys.readouterr().out
    assert len(rows) == 8 and "3 of 4 videos" in text and re.search(r"not read: .*a_broken/0\.mp4", text)
    for row, head in zip(rows, ["verb:"] * 4 + ["noun:"] * 4):
        if "broken" in row["path"]:
            assert row["label"] == row["top5"] == row["scores"] == ""
        else:
            assert row["label"].startswith(head)
            assert sum(map(float, row["scores"].split(";"))) == pytest.approx(1, abs=1e-3)


def test_extracted_features_are_those_of_the_videos(own, place, pretrained, tmp_path):
    flags = [*SHORT, "--mode", "extract", "--init", pretrained("mofo"), "--out", tmp_path]
    run("finetune", *flags, "--data", own, "--stride", 3, "--views", "2x1")
    found, network = dict(np.load(tmp_path / "features.npz")), built(pretrained("mofo")).eval()
    assert found["views"].shape == (10, 2, 96) and found["read"].sum() == 9 and len(set(found["names"])) == 10
    for name, read, row, views, label in zip(*(found[k] for k in ("names", "read", "features", "views", "labels"))):
        assert read == ("val/a_broken" not in str(name)) and label == -1
        expected = features_of(network, name, 3, (2, 1)) if read else torch.zeros(2, 96)
        assert np.allclose(expected, views, atol=1e-4) and np.allclose(expected.mean(0), row, atol=1e-4)
    for part, count in (("train", 8), ("test", 6), ("", 6)):
        run("finetune", *flags, *toy(place), *(["--part", part] if part else []))
        found = dict(np.load(tmp_path / "features.npz"))
        assert len(found["names"]) == count and found["classes"].tolist() == [*common.TOY_CLASSES]


def test_random_init_keeps_the_network_and_not_its_weights(pretrained):
    init = pretrained("fame")
    file = load_file(init)["model"]["encoder.stem.conv1.weight"]
    loaded, fresh = (built(init, 3, random_init=random) for random in (False, True))
    assert torch.equal(loaded.stem.conv1.weight, file) and not torch.equal(fresh.stem.conv1.weight, file)
    assert loaded.config == fresh.config
    assert built(init, 3, frames=16, image_size=48).config == dict(loaded.config, frames=16, image_size=48)
    assert np.allclose([float(block.drop_path) for block in built(pretrained("mofo"), 3, drop_path=0.2).blocks],
                       [0, 0.1, 0.2])


def test_checkpoints_have_directories_of_their_own(place, pretrained, tmp_path, monkeypatch):
    """Without --out two checkpoints do not meet; with the same one the second is refused."""
    monkeypatch.chdir(tmp_path)
    other, content, flags = tmp_path / "videomae.pth", load_file(pretrained("mofo")), [*toy(place), *SHORT]
    content["model"]["encoder.norm.weight"] += 1
    torch.save(content, other)
    run("finetune", *flags, "--mode", "knn", "--init", other)
    run("finetune", *flags, "--mode", "knn", "--init", other, "--random-init")
    run("finetune", *flags, "--init", pretrained("mofo"))
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {
        "finetune-knn-toy-videomae", "finetune-knn-toy-random-videomae", "finetune-finetune-toy-mofo"}
    with pytest.raises(UserError, match="init: weights of .*mofo/last.pt there, of .*videomae.pth now"):
        run("finetune", *flags, "--init", other, "--out", "runs/finetune-finetune-toy-mofo")


# ---- 10. Splits and classes ------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def lists(place):
    """A list file of 24 videos of two classes, directories of them, and a list of others of one of the classes."""
    root = place / "lists"
    common.make_toy(place / "many/32px", "train", 30, size=32)
    for i in range(30):
        name = "other" if i >= 24 else "jump" if i % 2 else "run"
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"{i}.mp4").write_bytes((place / f"many/32px/train/{i:06d}.mp4").read_bytes())
    rows = sorted(f"{p.parent.name}/{p.name} {p.parent.name}" for p in root.glob("*/*.mp4"))
    most, few = ("\n".join(row for row in rows if ("other" in row) == rest) for rest in (False, True))
    files = {name: few.replace(" other", f" {label}") for name, label in (
        ("few.txt", "run"), ("numbers.txt", "1"), ("unknown.txt", "swim"))}
    files |= {"all.txt": most, "overlap.txt": f"{few}\n{rows[0]}", "two.txt": f"{rows[0]}\n{rows[-1]}",
              "twisted.txt": f"{few}\n../lists/{rows[0]}"}
    return put(root, files)


@pytest.mark.parametrize("mode, data, argv, train, test", [
    ("finetune", "all.txt", [], 18, 6), ("finetune", "", [], 23, 7), ("knn", "all.txt", [], 18, 6),
    ("knn", "", ["--train-split", "all"], 23, 7), ("finetune", "all.txt", ["--test-data", "few.txt"], 24, 6)])
def test_nothing_is_tested_on_its_own_training_videos(mode, data, argv, train, test, lists, tune, monkeypatch, capsys):
    """The same split in every mode, whatever the way in which the data come without one."""
    seen, clips = [], finetune.Clips
    monkeypatch.setattr(finetune, "Clips", lambda items, *args, **more: (
        seen.append({item.path for item in items}), clips(items, *args, **more))[1])
    argv = [lists / word if ".txt" in word else word for word in argv]
    results, out = tune("--data", lists / data, "--mode", mode, *argv, "--views", "1x1")
    assert not seen[0] & seen[1] and sorted(map(len, seen)) == [test, train] and results["videos"] == test
    assert set(scored(out)["names"]) in seen and scored(out)["labels"].shape == (test,)
    assert f"{test} of its videos are held out to test" in capsys.readouterr().out or argv or not data
    if mode == "finetune" and not argv:  # and the same when tested again
        again, there = tune("--data", lists / data, "--mode", "test", init=out / "last.pt")
        assert again["acc1_1x1"] == results["acc1_1x1"] and set(scored(there)["names"]) == set(scored(out)["names"])
        if not data:                                                           # by whatever name it is called
            (lists.parent / "link").symlink_to(lists)
            assert tune("--data", lists.parent / "link", "--mode", "test", init=out / "last.pt")[0]["videos"] == test
    elif mode == "finetune":
        with pytest.raises(UserError, match="trained on all of it"):
            tune("--data", lists / data, "--mode", "test", init=out / "last.pt")


def test_a_division_is_that_of_the_training(layouts, tune):
    data = ["--data", "ucf101", "--root", layouts("ucf101"), "--views", "1x1", "--split"]
    for first in list(layouts("ucf101").rglob("*list01.txt")):
        first.with_name(first.name.replace("01", "02")).write_bytes(first.read_bytes())
    results, out = tune(*data, 2)
    assert tune(*data[:-1], "--mode", "test", init=out / "last.pt")[0]["split"] == results["split"] == 2


def test_classes_that_would_become_one_are_refused():
    test = common.Listing([Item("a.mp4", 0), Item("b.mp4", 1)], ["0", "1", "2"], [], "")
    assert "would be one" in error_of(finetune.class_ids, test, ["1", "2", "3"], config())
    assert finetune.class_ids(test._replace(items=test.items[:1]), ["1", "2", "3"], config()).tolist() == [0]


@pytest.mark.parametrize("script, flags", [("mofo", ""), ("finetune", "--recipe mofo --init")])
def test_flow_has_the_size_that_is_asked_for(script, flags, place, pretrained, tmp_path, monkeypatch):
    sizes, init = [], pretrained("mofo")
    monkeypatch.setattr(common.Log, "step", lambda log, step, loss, flow, **more: sizes.append(flow.size))
    flags = [*flags.split(), init] if flags else f"--image-size 32 {PRETRAIN[script]}".split()
    run(script, *toy(place), *SHORT, *flags, "--flow", "tvl1", "--flow-size", 24, "--out", tmp_path)
    assert sizes == [24, 24]


def test_a_file_of_mofo_brings_its_head():
    for mode, focused in (("test", True), ("predict", True), ("knn", False)):
        cfg = config(mode=mode)
        finetune.inherit_settings(cfg, dict(config={}, model={"local_MCA.0.norm1.weight": 0}))
        assert cfg.focused == focused


def test_testing_needs_no_training_videos_and_not_every_class(lists, tune, tmp_path, capsys):
    _, out = tune("--data", lists, "--views", "1x1", "--mode", "finetune")               # classes jump, other, run
    for data, label in (("few.txt", 2), ("numbers.txt", 1)):                             # number 1 = other
        results, there = tune("--data", lists / data, "--mode", "test", init=out / "last.pt")
        assert results["videos"] == 6 and scored(there)["classes"].tolist() == ["jump", "other", "run"]
        assert set(scored(there)["labels"]) == {label} and scored(there)["scores"].shape == (6, 3)
        assert ("taken as places: 0 = jump" in capsys.readouterr().out) == (label == 1)
    put(tmp_path / "val/run", {}, ["a.mp4"])  # nothing to train on, one class
    (tmp_path / "val/run/a.mp4").write_bytes((lists / "run/0.mp4").read_bytes())
    results, there = tune("--data", tmp_path, "--mode", "test", init=out / "last.pt")
    assert results["videos"] == 1 and scored(there)["labels"].tolist() == [2]


@pytest.mark.parametrize("mode", ["finetune", "knn"])
def test_the_scores_of_every_video_are_kept(mode, lists, tune):
    results, out = tune("--data", lists, "--views", "1x1", "--mode", mode)
    found = scored(out)
    assert found["scores"].shape == (7, 3) and found["read"].all()
    assert 100 * (found["scores"].argmax(1) == found["labels"]).mean() == pytest.approx(results["acc1_1x1"])


def test_a_file_of_class_names(lists, tune, tmp_path, capsys):
    content = load_file(tune("--data", lists, "--views", "1x1", "--mode", "finetune")[1] / "last.pt")
    torch.save(dict(model=content["model"], backbone=content["backbone"]), tmp_path / "public.pt")
    put(tmp_path, {"names.txt": "walk\nsit\nclimb\n", "two.txt": "walk\nsit\n", "same.txt": "jump\nother\nrun\n"})
    flags = [*SHORT, "--init", tmp_path / "public.pt", "--views", "1x1", "--out", tmp_path / "out"]
    predict, test = ([*flags, "--mode", mode, "--data", lists / at] for mode, at in (("predict", "run"), ("test", "")))
    run("finetune", *predict, "--classes", tmp_path / "names.txt")
    rows = predictions(tmp_path / "out")
    assert len(rows) == 12 and all(sorted(row["top5"].split(";")) == ["climb", "sit", "walk"] for row in rows)
    for more, said in (([], True), (["--classes", tmp_path / "same.txt"], False)):       # without names: the data's
        run("finetune", *test, *more)
        assert ("does not name its classes" in capsys.readouterr().out) == said
    for more, message in ((["--classes", tmp_path / "two.txt"], "missing .*weight .2, 96.*unexpected .*weight .3,"),
                          (["--classes", "gone.txt"], "--classes gone.txt"), ([], "does not say its classes")):
        with pytest.raises(UserError, match=message):
            run("finetune", *predict, *more)


@pytest.mark.parametrize("argv, message", [
    *((f"--{setting}", setting.split()[0]) for setting in (
        "drops 60;120", "drops 60,", "randaugment timm", "recipe moco", "optimizer lamb", "average mean", "views 0x3",
        "sampling random", "classifier mlp", "train-views 2", "mixup 2", "label-smoothing -1", "aspect 0.5",
        "test-batch 0", "model vit_giant", "batch 6", "part all --mode extract", "boxes no.csv --data ava --root AVA")),
    ("--data ava --mode knn", "--data ava has --mode"), ("--data ava --root nowhere", "no ava_train_v2.2.csv"),
    ("--data epic --root EPIC --label verb-noun --mode knn", "takes one label"), ("--frames 3", "tubelet_size 2"),
    ("--data OWN/val/b_whole", "has no labels"), ("--mode predict", "does not say its classes|does not fit"),
    ("--mode test", "the data has|missing .*head"), ("--focused --init FAME", "--no-focused"),
    ("--mode export --init FAME", "only a ViT can be exported"), ("--init LISTS/numbers.txt", "numbers.txt"),
    ("--init nowhere.pt", "nowhere.pt"),
    ("--data LISTS/all.txt --test-data LISTS/overlap.txt", "1 of the 7 test videos are training videos.*jump/1.mp4"),
    ("--data LISTS/all.txt --test-data LISTS/all.txt", "24 of the 24 test videos are training videos.*--test-data"),
    ("--data LISTS/all.txt --test-data LISTS/twisted.txt", "1 of the 7 test videos are training videos"),
    ("--data LISTS/all.txt --mode extract --part train", "is read whole"), ("--test-size 33", "patch size"),
    ("--focused --mode knn", "without MOFO's head"), ("--mode export --unit-features", "unit length"),
    ("--data LISTS/two.txt", "no class has two videos"),
    ("--data LISTS/unknown.txt --mode test --init TUNED", r"has not: \['swim'\]; it has \['jump', 'other'"),
    ("--data LISTS/few.txt --test-data LISTS/unknown.txt --mode knn", "training videos")])
def test_a_mistake_is_one_line(argv, message, place, pretrained, ava, layouts, own, lists, tune):
    places = dict(AVA=ava, EPIC=layouts("epic"), OWN=own, FAME=pretrained("fame"), LISTS=lists, TUNED=None)
    if "TUNED" in argv:
        places["TUNED"] = tune("--data", lists, "--views", "1x1", "--mode", "finetune")[1] / "last.pt"
    for word, at in places.items():
        argv = argv.replace(word, str(at))
    init, data = [] if "--init" in argv else ["--init", pretrained("mofo")], [] if "--data" in argv else toy(place)
    with pytest.raises(UserError, match=f"^error: .*({message})") as error:
        run("finetune", *data, *SHORT, *init, *argv.split(), "--out", place / "runs/mistake")
    assert "\n" not in str(error.value)
