"""What a pre-trained network is worth: fine-tuning, a linear probe, nearest neighbours, on any labelled data set.

    python finetune.py --init runs/mofo-toy/last.pt --mode linear       # features fixed, a linear classifier on top
    python finetune.py --init runs/mofo-toy/last.pt --mode knn          # features fixed, vote of the 20 nearest
    python finetune.py --init runs/mofo-toy/last.pt --mode finetune     # everything trained, VideoMAE's way
    torchrun --nproc_per_node=8 finetune.py --data ssv2 --init runs/mofo-ssv2/last.pt
    python finetune.py --mode test --init runs/finetune-finetune-toy/last.pt   # test a fine-tuned checkpoint again

--init takes checkpoints of this project and public VideoMAE, MOFO and MME files (for those name the network with
--model).  Testing averages the softmax over `--views TxS`: T clips in time, S crops in space; knn averages the
features.  A video that cannot be read counts as wrong and is reported.  Results go to the terminal and to
results.json in the run's directory, named by their views.

Sources: the fine-tuning recipe is VideoMAE's (layer decay, drop path, cosine per step); the probe is ours: logistic
regression on standardised mean tokens, solved by L-BFGS, because with fixed features there is nothing to tune but the
penalty.
"""
import json
import math
import re
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from common import (BACKBONES, Clips, Log, StepSampler, StopSignal, UserError, all_reduce_mean, clip_indices,
                    cosine_lr, find_videos, flip, item_frames, load_file, load_weights, loader, make_backbone,
                    normalize, open_run, parse_config, plan_run, print0, random_resized_crop, read_views, restore,
                    run_directory, save_checkpoint, setup, shutdown, to_device, wrap)


# ---- 1. Config -----------------------------------------------------------------------------------------------------
# Defaults are VideoMAE's fine-tuning on Something-Something v2.

@dataclass
class Config:
    data: str = "toy"                  # toy, ssv2, epic, k400, ucf101, hmdb51, or your own: a directory, a list file
    root: str = ""                     # where the data set lies; default $VIDEO_ROOT/<data>, else data/<data>
    test_data: str = ""                # list file or directory for testing, where --data is a list file
    train_split: str = "train"         # train; toy also has train_biased
    label: str = ""                    # what to predict: epic verb, noun, action; toy motion, scene
    out: str = ""                      # directory of the run; default runs/finetune-<mode>-<data>
    fresh: bool = False                # start over instead of continuing the run in --out
    mode: str = "finetune"             # finetune, linear, knn, test
    init: str = ""                     # checkpoint to start from
    random_init: bool = False          # take the network from --init but not its weights: the baseline of every probe
    model: str = "vit_base"            # where --init does not say: vit_tiny .. vit_huge, r2plus1d_18, r3d_18, ...
    sampling: str = "uniform"          # frames: uniform (one of each of `frames` segments) or dense (`stride` apart)
    stride: int = 4                    # of dense sampling
    views: str = "2x3"                 # clips in time x crops in space, at test time
    test_batch: int = 8                # videos per GPU and forward pass, at test time
    epochs: int = 50                   # passes over the training videos
    steps: int = 0                     # optimiser steps instead of epochs
    batch: int = 512                   # videos per step, over all GPUs and accumulation
    device_batch: int = 8              # videos per GPU and forward pass
    repeats: int = 1                   # clips cut from each video that is opened (repeated augmentation)
    lr: float = 5e-4                   # per 256 clips of the batch
    min_lr: float = 1e-6               # per 256 clips, at the end
    warmup_epochs: float = 5           # linear from 0
    weight_decay: float = 0.05         # AdamW, betas 0.9 and 0.999
    layer_decay: float = 0.75          # learning rate of a block relative to the one above it
    drop_path: float = 0.1             # of the last block, linear over depth
    clip_grad: float = 0.0             # largest gradient norm; 0 = no clipping
    label_smoothing: float = 0.1       # of the training target
    min_crop: float = 0.08             # smallest area of a training crop
    flip: bool = False                 # mirror half of the training clips; off where left and right are classes
    l2: float = 1e-3                   # linear: weight penalty
    neighbours: int = 20               # knn
    seed: int = 0                      # of everything that is random
    workers: int = 8                   # processes per GPU that read videos
    compile: bool = torch.cuda.is_available()  # torch.compile the transformer blocks
    log_every: int = 20                # steps
    save_every: int = 500              # steps
    toy_train: int = 1024              # toy: videos to train on
    toy_test: int = 256                # toy: videos to test on
    toy_size: int = 64                 # toy: side in pixels


RECIPES = {   # VideoMAE ViT-B: specs per data set; `views` as published
    "ssv2": {},
    "epic": dict(epochs=100, min_crop=0.5),
    "k400": dict(sampling="dense", views="5x3", epochs=75, batch=384, repeats=2, flip=True),
    "ucf101": dict(sampling="dense", views="5x3", epochs=100, batch=128, repeats=2, layer_decay=0.7, drop_path=0.2,
                   flip=True),
    "hmdb51": dict(sampling="dense", views="5x3", epochs=100, batch=128, repeats=2, layer_decay=0.7, drop_path=0.2,
                   flip=True),
    # our choice, both
    "custom": dict(sampling="dense", views="2x3", epochs=50, batch=16, workers=2, flip=True, log_every=1),
    "toy": dict(sampling="dense", stride=2, views="1x1", test_batch=32, epochs=16, batch=32, device_batch=32, lr=8e-3,
                warmup_epochs=2, layer_decay=1.0, drop_path=0.0, label_smoothing=0.0, min_crop=1.0, workers=2,
                log_every=16),
}


# ---- 2. Frames and crops -------------------------------------------------------------------------------------------

def segment_indices(first, last, frames, offset):
    """One frame of each of `frames` equal parts of first..last, at `offset` (scalar or (frames,)) in [0, 1) of it."""
    part = (last - first + 1) / frames
    return first + np.minimum((part * (np.arange(frames) + offset)).astype(int), last - first)


def train_clips(video, item, rng, cfg, size, frames):
    """cfg.repeats random clips, each with a random crop of its own -> uint8 (repeats, frames, size, size, 3)."""
    if cfg.sampling == "dense":
        indices = [clip_indices(video, item, frames, cfg.stride, rng) for _ in range(cfg.repeats)]
    else:
        first, last = item_frames(video, item)
        indices = [segment_indices(first, last, frames, rng.random(frames)) for _ in range(cfg.repeats)]
    crops = [random_resized_crop(video.info.height, video.info.width, rng, (cfg.min_crop, 1)) for _ in indices]
    return read_views(video, indices, crops, size)


def test_clips(video, item, rng, cfg, size, frames, views=(1, 1)):
    """All views (T, S) of a video -> uint8 (T * S, frames, size, size, 3), time slowest.

    Dense: T clips evenly over the video.  Uniform: T frames of each segment, each clip takes one.  S square crops
    evenly along the long side, the short side whole.
    """
    first, last = item_frames(video, item)
    if cfg.sampling == "dense":
        room = max(0, last - first - cfg.stride * (frames - 1))
        starts = [first + shift for shift in evenly(room, views[0])]
        indices = [np.minimum(start + cfg.stride * np.arange(frames), last) for start in starts]
    else:
        indices = [segment_indices(first, last, frames, (t + 0.5) / views[0]) for t in range(views[0])]
    height, width = video.info.height, video.info.width
    side, crops = min(height, width), []
    for shift in evenly(abs(height - width), views[1]):
        x, y = (shift, 0) if width >= height else (0, shift)
        crops.append((x, y, x + side, y + side))
    pairs = [(i, crop) for i in indices for crop in crops]
    return read_views(video, [i for i, _ in pairs], [crop for _, crop in pairs], size)


def evenly(room, count):
    """`count` whole numbers from 0 to `room`, both included; a single one is the middle."""
    if count == 1:
        return [round(room / 2)]
    return [round(room * k / (count - 1)) for k in range(count)]


# ---- 3. Network and optimiser --------------------------------------------------------------------------------------

class Classifier(nn.Module):
    """A network with a classification loss: clips (B, 3, T, H, W) uint8, labels (B / repeats,) -> loss, stats."""

    def __init__(self, network, smoothing, mirrored):
        super().__init__()
        self.network, self.smoothing, self.mirrored = network, smoothing, mirrored

    def forward(self, clips, labels, generator=None):
        labels = labels.repeat_interleave(len(clips) // len(labels))
        clips = flip(clips, generator)[0] if self.mirrored else clips
        logits = self.network(normalize(clips)).float()                        # (B, classes)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.smoothing)
        return loss, dict(train_acc=100 * (logits.argmax(1) == labels).float().mean())


def layer_decay_groups(network, lr, weight_decay, decay):
    """Parameter groups whose learning rate falls by `decay` per transformer layer below the head (convolutional
    networks: the same everywhere); no weight decay on vectors."""
    top, groups = len(getattr(network, "blocks", ())) + 1, {}                  # layers: 0 = patch_embed .. top = head
    for name, p in network.named_parameters():
        layer = top
        if name.startswith("patch_embed"):
            layer = 0
        elif block := re.match(r"blocks\.(\d+)\.", name):
            layer = int(block[1]) + 1
        wd = weight_decay if p.ndim > 1 else 0.0
        if (layer, wd) not in groups:
            groups[layer, wd] = dict(params=[], weight_decay=wd, lr=lr, scale=decay ** (top - layer))
        groups[layer, wd]["params"].append(p)
    return list(groups.values())


def build_network(cfg, classes, drop_path=0.0):
    """The network that --init describes, with its weights (unless --random-init) -> network, content of the file."""
    if not cfg.init:
        raise UserError("--init FILE: name a checkpoint, e.g. runs/mofo-toy/last.pt")
    if cfg.model not in BACKBONES:
        raise UserError(f"--model {cfg.model}: choose {', '.join(BACKBONES)}")
    public = dict(name=cfg.model, image_size=112 if cfg.model.endswith("18") else 224, frames=16)
    content = load_file(cfg.init)
    backbone = content.get("backbone") if isinstance(content, dict) else None
    network = make_backbone(**(backbone or public), num_classes=classes, drop_path=drop_path)
    if not cfg.random_init:
        report = load_weights(network, cfg.init, strict_backbone="all" if cfg.mode == "test" else True)
        print0(f"{cfg.init}: {len(report.loaded)} tensors loaded, new here {report.missing[:4]}, not used "
               f"{len(report.unexpected)} {report.unexpected[:3]}")
    return network, content


# ---- 4. Evaluation -------------------------------------------------------------------------------------------------

@torch.no_grad()
def sweep(compute, items, sample, cfg, env, what):
    """Apply compute(normalised clips (n, 3, T, H, W)) -> (n, D) to all N items, sampled by `sample`.

    Returns results (N, views, D) on the CPU, read (N,) bool, errors.  Every process takes its share; rows of videos
    that could not be read are 0 and not marked as read.
    """
    dataset = Clips(items, sample, cfg.seed, replace=False)
    mine = list(range(env.rank, len(items), env.world))
    batches = [mine[i:i + cfg.test_batch] for i in range(0, len(mine), cfg.test_batch)]
    progress = tqdm(loader(dataset, batches, cfg.workers, env.device), what, disable=True if env.rank else None)
    out, read, errors = None, torch.zeros(len(items), dtype=torch.bool), []
    for keys, batch in zip(batches, progress):
        errors += batch["errors"]
        if batch["clips"] is None:
            continue
        with env.autocast():
            result = compute(normalize(to_device(batch["clips"], env.device))).float().cpu()
        good = torch.tensor(keys)[batch["read"]]
        result = result.unflatten(0, (len(good), -1))                          # (videos, views, D)
        out = torch.zeros(len(items), *result.shape[1:]) if out is None else out
        out[good], read[good] = result, True
    return gather_rows(out, read, errors, env)


def gather_rows(out, read, errors, env):
    """Put the processes' rows together: each has filled its own (N, views, D) rows and left the others 0."""
    if env.world > 1:
        parts = [None] * env.world
        torch.distributed.all_gather_object(parts, (out, read, errors))
        outs, reads, lists = zip(*parts)
        out = sum(part for part in outs if part is not None)
        read, errors = torch.stack(reads).any(0), sum(lists, [])
    if not read.any():
        raise UserError(f"none of the {len(read)} videos could be read; the first: {errors[0]}")
    return out, read, errors


def accuracy(scores, read, labels, classes):
    """Scores (N, C), read (N,) bool, labels (N,) -> top-1, top-5, mean-class and per-class accuracy in percent.

    What was not read is wrong.  Classes without a test video are left out.
    """
    def percent(right):
        return 100 * right.float().mean().item()

    hits = scores.topk(min(5, scores.shape[1]), 1).indices == labels[:, None]  # (N, 5): is the k-th guess right?
    first, any_of_5 = hits[:, 0] & read, hits.any(1) & read                    # (N,)
    per_class = {}
    for i, name in enumerate(classes):
        of_class = labels == i
        if of_class.any():
            per_class[name] = percent(first[of_class])
    return dict(acc1=percent(first), acc5=percent(any_of_5), mean_class=sum(per_class.values()) / len(per_class),
                per_class=per_class)


def fit_linear(features, labels, classes, l2):
    """Multinomial logistic regression on features (N, D), standardised -> function from features to logits.

    Minimises mean cross-entropy + l2/2 |W|^2 by L-BFGS.
    """
    mean, std = features.mean(0), features.std(0) + 1e-6
    x = (features - mean) / std
    W = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
    b = torch.zeros(classes, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([W, b], max_iter=300, history_size=20, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        value = F.cross_entropy(x @ W + b, labels) + l2 / 2 * W.square().sum()
        value.backward()
        return value
    solver.step(loss)
    return lambda f: ((f - mean) / std) @ W.detach() + b.detach()


def knn_scores(gallery, labels, query, classes, k, temperature=0.07):
    """Votes of the k nearest: gallery (N, D), labels (N,), query (Q, D) -> (Q, classes).

    The votes are weighted by exp(cosine / temperature).
    """
    cosine = F.normalize(query, dim=1) @ F.normalize(gallery, dim=1).T         # (Q, N)
    similarity, nearest = cosine.topk(min(k, len(gallery)), 1)                 # (Q, k)
    votes = F.one_hot(labels[nearest], classes).float()                        # (Q, k, C)
    return ((similarity / temperature).exp()[..., None] * votes).sum(1)


# ---- 5. Main -------------------------------------------------------------------------------------------------------

def main(cfg):
    if cfg.mode not in ("finetune", "linear", "knn", "test"):
        raise UserError(f"--mode {cfg.mode}: choose finetune, linear, knn or test")
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", cfg.views):
        raise UserError(f"--views {cfg.views}: expected e.g. 2x3, clips in time x crops in space")
    views = tuple(int(v) for v in cfg.views.split("x"))
    env = setup(cfg.seed)
    toy = dict(train=cfg.toy_train, test=cfg.toy_test, size=cfg.toy_size)
    train = find_videos(cfg.data, cfg.root, cfg.train_split, cfg.label, toy)
    test = find_videos(cfg.test_data or cfg.data, cfg.root, "test", cfg.label, toy)
    new = sorted(set(test.classes) - set(train.classes))
    if new:
        raise UserError(f"--data {cfg.data}: the test split has classes that the training split has not: {new[:3]}")
    if not train.classes or not test.classes:
        raise UserError(f"--data {cfg.data}: has no labels, which every mode of finetune.py needs")
    classes = len(train.classes)
    labels = torch.tensor([item.label for item in train.items])
    ids = {name: i for i, name in enumerate(train.classes)}
    test_labels = torch.tensor([ids[test.classes[item.label]] for item in test.items])
    out = run_directory(f"finetune-{cfg.mode}", cfg)
    out.mkdir(parents=True, exist_ok=True)
    with_head = cfg.mode in ("finetune", "test")
    drop_path = cfg.drop_path if cfg.mode == "finetune" else 0.0
    network, content = build_network(cfg, classes if with_head else 0, drop_path)
    network.to(env.device)
    if cfg.mode == "test" and content.get("classes") and content["classes"] != train.classes:
        raise UserError(f"--mode test: {cfg.init} knows the classes {content['classes'][:3]} ..., the data has "
                        f"{train.classes[:3]} ...")
    size, frames = network.config["image_size"], network.config["frames"]

    if cfg.mode == "finetune" and not run_training(cfg, env, train, network):
        return shutdown()                                                      # stopped by a signal
    network.eval()
    view = partial(test_clips, cfg=cfg, size=size, frames=frames, views=views)
    result, read, errors = sweep(network, test.items, view, cfg, env, "testing")   # (N, views, logits or features)
    if with_head:
        scores = result.softmax(-1).mean(1)
    else:
        one = partial(test_clips, cfg=cfg, size=size, frames=frames)           # the middle clip, the middle crop
        features, known, train_errors = sweep(network, train.items, one, cfg, env, "training features")
        features, known_labels, errors = features[known][:, 0], labels[known], train_errors + errors
        if cfg.mode == "linear":
            probe = fit_linear(features.to(env.device), known_labels.to(env.device), classes, cfg.l2)
            scores = probe(result.to(env.device)).softmax(-1).mean(1).cpu()
        else:
            scores = knn_scores(features, known_labels, F.normalize(result, dim=-1).mean(1), classes, cfg.neighbours)
    report(cfg, env, out, accuracy(scores, read, test_labels, train.classes), errors, len(test.items))
    shutdown()


def report(cfg, env, out, result, errors, videos):
    """Print the result and write it to results.json, its numbers named by the views that they were made with."""
    if env.rank:
        return
    named = {f"{name}_{cfg.views}": value for name, value in result.items() if name != "per_class"}
    results = dict(named, per_class=result["per_class"], mode=cfg.mode, init=cfg.init, random_init=cfg.random_init,
                   data=cfg.data, label=cfg.label, train_split=cfg.train_split, videos=videos, unreadable=errors)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    for name, value in sorted(result["per_class"].items(), key=lambda pair: pair[1]):
        print0(f"  {value:6.2f}  {name}")
    for error in errors:
        print0(f"not read (counts as wrong): {error}")
    numbers = "  ".join(f"{name} {value:.2f}" for name, value in named.items())
    print0(f"{numbers}  on {videos} videos -> {out / 'results.json'}")


def run_training(cfg, env, listing, network):
    """Fine-tune the whole network; the loop is that of the pre-training scripts -> False if a signal stopped it."""
    plan = plan_run(cfg, len(listing.items), env)
    lr, min_lr = (value * cfg.batch / 256 for value in (cfg.lr, cfg.min_lr))
    out, checkpoint = open_run("finetune-finetune", cfg, env, listing, plan, lr)
    model = Classifier(network, cfg.label_smoothing, cfg.flip)
    groups = layer_decay_groups(network, lr, cfg.weight_decay, cfg.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=env.device.type == "cuda")
    sample = partial(train_clips, cfg=cfg, size=network.config["image_size"], frames=network.config["frames"])
    dataset = Clips(listing.items, sample, cfg.seed)
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.amp == torch.float16)
    start = restore(checkpoint, "", network, optimizer, scaler)
    net = wrap(model, env, cfg.compile)
    log, stop = Log(out, env, plan, start, cfg.log_every), StopSignal()
    batches = iter(loader(dataset, StepSampler(len(dataset), plan, env, cfg.seed, start), cfg.workers, env.device))
    for step in range(start, plan.steps):
        rate = cosine_lr(step, plan.steps, int(cfg.warmup_epochs * plan.per_epoch), lr, min_lr)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        total = 0.0
        for micro in range(plan.accum):
            batch = log.next_batch(batches)
            generator = plan.generator(env, cfg.seed, step, micro)
            with env.autocast(), nullcontext() if env.world == 1 or micro == plan.accum - 1 else net.no_sync():
                loss, stats = net(batch["clips"], batch["labels"], generator)
            scaler.scale(loss / plan.accum).backward()
            total = total + loss.detach() / plan.accum
        scaler.unscale_(optimizer)
        norm = clip_grad_norm_(model.parameters(), cfg.clip_grad or math.inf)
        status = torch.stack([total, total.new_tensor(float(stop.received))])
        total, stopping = all_reduce_mean(status).tolist()                     # the one wait for the device in a step
        if log.finite(total, batch["names"]):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        log.step(step, total, lr=rate, grad_norm=norm, **stats)
        last = step + 1 == plan.steps or stopping
        if env.rank == 0 and (last or (step + 1) % cfg.save_every == 0):
            save_checkpoint(out / "last.pt", cfg, listing, step + 1, network, network, optimizer, scaler)
        if stopping:
            break
    log.close(stopping)
    return not stopping


if __name__ == "__main__":
    main(parse_config(Config, RECIPES))
