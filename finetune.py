"""What a pre-trained network is worth: the downstream protocols of the five papers, on any labelled data set.

    python finetune.py --init runs/mofo-toy/last.pt --mode linear       # or knn, retrieval, extract: features fixed
    python finetune.py --init runs/mofo-toy/last.pt --mode finetune     # everything trained
    torchrun --nproc_per_node=8 finetune.py --data ssv2 --init runs/mofo-ssv2/last.pt --recipe mofo
    python finetune.py --init runs/finetune-finetune-toy-mofo-toy/last.pt --mode test      # or predict, export

--recipe names the paper whose protocol is followed; together with --data and --mode it sets everything below, and
flags override it.  README.md has a command for every mode and published figure, and says which files --init takes.
A video that is missing, empty or broken counts as wrong and is reported.  Results go to the terminal and to
results.json in the run's directory, named by their views, e.g. acc1_5x3: 5 clips in time x 3 crops in space.

Differs from the published protocols, and why
 1. RandAugment, random erasing, mixup and cutmix are torchvision's, and work on the crop, on the device (published:
    timm's, on whole frames, before the crop).  Its RandAugment has the identity instead of invert and of solarize-add,
    a fixed magnitude (posterize is weaker then), bilinear sampling (bicubic) and no cutout (MCL); erased boxes get
    one noise for all frames, not one for each; a clip is mixed with one of the next video in the forward pass, with
    itself if there is none.  Colour jitter is one affine map per clip.
 2. The last weights are tested (MOFO, FAME: those of the best epoch, by a look at the test set).
 3. MOFO's motion box is found by optical flow in the same pass, so it follows every augmentation.  Where two clips
    are mixed so are their insides: the union under mixup, the pasted region under cutmix.
 4. --mode linear by default is our own probe, logistic regression on standardised features by L-BFGS, where nothing
    but the penalty is to be tuned.  The papers' probes are recipes (MME's: without its drop path).
 5. MoDist's precise batch norm is left out; its head averages over space and time before the linear layer.
 6. Tests with FAME and with MCL's SVM crop 224 / 240 of the short side, scaled (published: 224 pixels of frames 240
    high, with R(2+1)D-18 112).  Test clips reach from the first to the last frame (MCL, MoDist: not to the end),
    uniform ones take the middles of halves of a segment, as MME's do (VideoMAE: their beginnings), short videos repeat
    the last frame (MCL: all).  --repeats cuts other clips of a video (VideoMAE, MME: augments the same).
 7. AVA with VideoMAE's recipe: crops are SlowFast's (VideoMAE: of frames scaled to 256), test frames are stretched to
    multiples of 16 (padded), boxes are as annotated or detected (shifted in training, enlarged in a test), the loss is
    a mean (times the number of boxes).
 8. MCL's biases and norms have no weight decay, and its clips are 32 frames at stride 2 (its scripts: 16 at 1).  MoDist
    has the same crops on Something-Something as elsewhere, and three in a test (frames of 256 to 320; one).
"""
import csv
import itertools
import json
import math
import os
import re
import signal
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torchvision.ops import box_iou, roi_align
from torchvision.transforms import v2 as transforms
from tqdm import tqdm

from common import (BACKBONES, Clips, DATA_SETS, FILE_NAMES, FlowEstimator, HUGGING_FACE, Log, Mlp, ResNet3D, SIZES,
                    SPLIT_DIRS, RunConfig, StopSignal, UserError, VIDEO_FILES, ViT, VideoError, all_reduce_mean,
                    clip_indices, colour_jitter, cosine_lr, data_root, eagerly, find_videos, flip, hold_out,
                    init_linear, item_frames, list_files, load_file, load_weights, loader, make_backbone, make_listing,
                    make_optimizer, normalize, open_run, plan_run, print0, random_resized_crop, read_lines, read_views,
                    replace_parts, resume_or_init, run, run_directory, save_checkpoint, setup, split_dir, step_batches,
                    to_device, to_float01, wrap_model)
from mofo import find_motion


# ---- 1. Config ------------------------------------------------------------------------------------------------------
# Defaults are VideoMAE's fine-tuning of a ViT-B on Something-Something v2.

MODES = Literal["finetune", "linear", "knn", "retrieval", "test", "predict", "extract", "export"]
PAPERS = Literal["videomae", "mofo", "mme", "fame", "mcl", "modist"]


@dataclass
class Config(RunConfig):
    test_data: str = ""                # list file or directory for testing; default: a fifth of data without a split
    train_split: str = "train"         # train; toy also has train_biased
    split: int = 1                     # of ucf101 and hmdb51, which have three; pre-training takes the first, in [1, 3]
    part: str = ""                     # what predict and extract read: train, test; of your own also all, the default
    label: str = ""                    # what to predict: epic verb, noun, verb-noun, action; toy motion, scene
    classes: str = ""                  # file with the name of a class per line, where --init does not say them
    mode: MODES = "finetune"           # what is done with the network
    recipe: PAPERS = "videomae"        # whose protocol
    random_init: bool = False          # take the network from --init but not its weights: the baseline of every probe
    model: Literal[BACKBONES] = "vit_base"  # where --init does not say: vit_tiny .. vit_huge, r2plus1d_18, r3d_18, ...
    image_size: int = 0                # side of what the network sees; 0 = as pre-trained
    frames: int = 0                    # frames of a clip; 0 = as pre-trained
    sampling: Literal["uniform", "dense"] = "uniform"  # one frame of each of `frames` segments, or `stride` apart
    stride: int = 4                    # of dense sampling
    fps: float = 0.0                   # frame rate that --stride is meant for; 0 = that of each video
    views: str = "2x3"                 # clips in time x crops in space, at test time
    train_views: str = "1x1"           # of training videos, where features are fixed
    test_size: int = 0                 # side of a test crop; 0 = --image-size
    test_crop: float = 1.0             # side of a test crop relative to the short side, in (0, 1]
    average: Literal["softmax", "logits"] = "softmax"  # what is averaged over views
    test_batch: int = 64               # clips per GPU and pass in a test; at least the views of a video; ava: one
    epochs: int = 50                   # passes over the training videos
    batch: int = 512                   # videos per step, over all GPUs and accumulation; --repeats of each
    device_batch: int = 8              # videos per GPU and forward pass
    repeats: int = 1                   # clips cut from each video that is opened (repeated augmentation)
    optimizer: Literal["adamw", "sgd", "nesterov"] = "adamw"  # betas 0.9 and 0.999; momentum 0.9
    lr: float = 5e-4                   # per 256 videos of the batch
    min_lr: float = 1e-6               # per 256 videos, at the end
    warmup_epochs: float = 5.0         # linear, from --warmup-start
    warmup_start: float = 0.0          # share of the rate at which warm-up begins, in [0, 1]
    whole_cosine: bool = False         # the cosine is that over all epochs, which warm-up joins
    drops: str = ""                    # epochs after which the rate falls tenfold, e.g. 60,120; empty: a cosine
    weight_decay: float = 0.05         # not of vectors, except with sgd, in [0, 1]
    layer_decay: float = 0.75          # learning rate of a block relative to the one above it, in (0, 1]
    drop_path: float = 0.1             # of the last block, linear over depth, in [0, 1)
    dropout: float = 0.0               # of the features, before the head, in [0, 1)
    label_smoothing: float = 0.1       # of the training target, in [0, 1]
    min_crop: float = 0.08             # smallest area of a training crop, in (0, 1]
    aspect: float = 4 / 3              # largest aspect of a training crop, in [1, 1e9]
    flip: bool = False                 # mirror half of the training clips; off where left and right are classes
    randaugment: Literal["none", "videomae", "mcl-ucf101", "mcl-hmdb51"] = "videomae"  # whose
    jitter: float = 0.0                # probability of colour jitter (0.4, hue: --hue), in [0, 1]
    hue: float = 0.0                   # of the jitter, in turns, in [0, 1]
    grey: float = 0.0                  # probability of grey clips, in [0, 1]
    erasing: float = 0.25              # probability of random erasing, in [0, 1]
    mixup: float = 0.8                 # alpha; 0 = off, in [0, 1]
    cutmix: float = 1.0                # alpha; 0 = off, in [0, 1]
    focused: bool = False              # MOFO's head: what moves attends to what does not
    classifier: Literal["logistic", "svm", "trained"] = "logistic"  # linear: ours, MCL's, by the optimiser
    l2: float = 1e-3                   # logistic: weight penalty
    unit_features: bool = False        # trained: features have length 1
    neighbours: int = 20               # knn
    center: bool = False               # retrieval: features less their mean
    boxes: str = ""                    # ava: file of detected people; gt = the true boxes; default: look for it
    min_score: float = 0.8             # ava: of a detection, in [0, 1]
    times_score: bool = True           # ava: multiply an action's score by that of the detection
    flow: Literal["raft_small", "raft_large", "tvl1"] = "raft_small"  # for --focused
    raft_weights: str = ""             # file with torchvision's RAFT weights; default: download
    flow_updates: int = 6              # refinement steps of RAFT
    flow_size: int = 128               # largest side of the frames that flow sees; RAFT takes at least 128


DENSE = dict(sampling="dense", views="5x3", repeats=2, flip=True)
PLAIN = dict(randaugment="none", erasing=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0, repeats=1, layer_decay=1.0,
             drop_path=0.0)                          # crops and flips only
TRAINED = dict(classifier="trained", dropout=0.0, weight_decay=0.0, warmup_epochs=0.0, min_lr=0.0)

# A recipe applies if all words of its key are among --data, --recipe and --mode; later ones override earlier ones.
RECIPES = {
    "ssv2": {},
    "k400": dict(DENSE, epochs=75, batch=384),
    "ucf101": dict(DENSE, epochs=100, batch=128, layer_decay=0.7, drop_path=0.2, dropout=0.5, min_lr=1e-5),
    "hmdb51": dict(DENSE, epochs=100, batch=128, layer_decay=0.7, drop_path=0.2, dropout=0.5, min_lr=1e-5),  # ours
    "epic": dict(epochs=100, min_crop=0.5),                                                                  # ours
    "epic finetune": dict(label="verb-noun"),
    "ava": dict(PLAIN, sampling="dense", views="1x1", test_size=256, flip=True, epochs=30, batch=128, lr=2.5e-4,
                layer_decay=0.75, drop_path=0.2, jitter=1.0, hue=1 / 18),
    "retrieval": dict(sampling="dense", stride=2, views="10x1", train_views="10x1"),
    # MOFO: motion-focused fine-tuning; 8 clips per GPU; on how many is not certain (a note says 3)
    "mofo finetune": dict(focused=True, epochs=100, batch=64, repeats=1),
    "mofo finetune epic": dict(label="action", randaugment="none", erasing=0.0),
    "mofo finetune ava": dict(focused=False, epochs=30, batch=128),
    # MME: VideoMAE's with larger crops; only the batch of ssv2 is published
    "mme finetune": dict(min_crop=0.25, repeats=2, layer_decay=0.75, drop_path=0.1, dropout=0.0, min_lr=1e-6),
    "mme finetune ssv2": dict(epochs=30, batch=448),
    "mme finetune ava": dict(min_crop=0.08, repeats=1, drop_path=0.2),
    "mme finetune k400": dict(lr=1e-3, epochs=75, views="7x3"),
    "mme finetune ucf101": dict(lr=1e-3, views="10x3"),
    "mme finetune hmdb51": dict(lr=1e-3, views="10x3"),
    "mme linear": dict(classifier="trained", lr=1e-3, epochs=30, min_crop=0.25, repeats=2, layer_decay=1.0,
                       dropout=0.0, min_lr=1e-6),
    # FAME: R(2+1)D-18 or I3D
    "fame": dict(PLAIN, sampling="dense", stride=2, frames=16, views="10x1", test_crop=224 / 240, average="logits",
                 min_crop=0.2, flip=True),
    "fame finetune": dict(optimizer="sgd", lr=0.05, min_lr=0.0, warmup_epochs=0.0, drops="60,120", epochs=150,
                          batch=128, weight_decay=1e-4, dropout=0.7, jitter=0.8, hue=0.1, grey=0.2),
    "fame linear": dict(TRAINED, optimizer="sgd", lr=60.0, drops="60,80", epochs=100, batch=128, unit_features=True),
    "fame retrieval": dict(train_views="10x1", center=True),
    # MCL: R(2+1)D-50
    "mcl": dict(PLAIN, sampling="dense", stride=2, frames=32, views="20x3", test_size=256, average="logits"),
    "mcl finetune": dict(optimizer="nesterov", lr=0.01, min_lr=0.0, warmup_epochs=0.0, epochs=150, batch=256,
                         weight_decay=1e-4, dropout=0.9, clip_grad=40.0, min_crop=0.2, flip=True,
                         randaugment="mcl-ucf101"),
    "mcl finetune hmdb51": dict(randaugment="mcl-hmdb51"),
    "mcl linear": dict(classifier="svm", frames=16, views="20x1", train_views="20x1", test_crop=224 / 240, test_size=0),
    "mcl linear k400": dict(TRAINED, optimizer="sgd", lr=32.0, epochs=100, batch=128, frames=32, unit_features=True,
                            min_crop=0.2, flip=True, views="20x1", test_crop=224 / 256),
    "mcl retrieval": dict(frames=16, views="20x1", train_views="20x1", test_size=0),
    # MoDist: R3D-50; its strides are meant for 30 frames a second
    "modist": dict(PLAIN, sampling="dense", stride=8, fps=30.0, frames=32, views="10x3", test_size=256,
                   whole_cosine=True, min_crop=0.3, aspect=2.0, flip=True),
    "modist finetune": dict(optimizer="nesterov", lr=0.04, min_lr=0.0, warmup_epochs=34.0, warmup_start=0.1,
                            epochs=200, batch=64, weight_decay=1e-4, dropout=0.5, jitter=0.6, grey=0.5),
    "modist retrieval": dict(stride=2, fps=0.0, frames=16, views="10x1", test_size=0),
    "modist linear": dict(TRAINED, optimizer="nesterov", lr=32.0, epochs=200, batch=256),
    "modist finetune ssv2": dict(sampling="uniform", frames=0, views="1x3", lr=0.48, drops="14,18", epochs=22,
                                 warmup_epochs=0.19, warmup_start=1 / 1200, weight_decay=1e-6, jitter=0.0, grey=0.0),
    "modist linear k400": dict(lr=2.0, epochs=60, warmup_epochs=8.0, batch=64, stride=8, frames=8),
    "modist finetune ava": dict(frames=8, views="1x1", lr=1.2, drops="16,24,28", epochs=32, warmup_epochs=5.3,
                                warmup_start=1 / 600, weight_decay=1e-7, jitter=0.0, grey=0.0, min_score=0.9,
                                times_score=False),
    **{f"{paper} ssv2": dict(flip=False) for paper in ("fame", "mcl", "modist")},      # left and right are classes
    # our choice from here on: your own data, and the toy data
    "custom": dict(sampling="dense", batch=16, workers=2, log_every=1),
    "custom finetune": dict(epochs=50, views="2x3", flip=True, warmup_epochs=2.0, drops=""),
    **{f"custom {paper} finetune": dict(lr=8e-3) for paper in ("videomae", "mofo", "mme")},      # 5e-4 at a batch of 16
    "toy": dict(PLAIN, frames=0, sampling="dense", stride=2, fps=0.0, views="1x1", train_views="1x1", test_size=0,
                test_crop=1.0, epochs=16, batch=32, device_batch=32, min_lr=0.0, warmup_epochs=2.0, drops="",
                dropout=0.0, min_crop=1.0, flip=False, jitter=0.0, grey=0.0, flow="tvl1", workers=2, log_every=16),
    "toy finetune": dict(lr=8e-3),
    "toy linear": dict(optimizer="adamw", lr=8e-2, weight_decay=0.0),
    "toy fame finetune": dict(lr=0.16), "toy mcl finetune": dict(lr=0.16), "toy modist finetune": dict(lr=0.16),
}


# ---- 2. What only evaluation reads: AVA -----------------------------------------------------------------------------

AVA_BOXES = "ava_detection_val_boxes_and_labels.csv", "ava_val_predicted_boxes.csv"
AVA_LAYOUT = ("Expected there, in any depth: videos named by YouTube id, the files of ava_v2.2.zip and, for a test, "
              f"detected people: {' or '.join(AVA_BOXES)} (or --boxes FILE, or --boxes gt, the truth). See --root")


class KeyFrame(NamedTuple):
    """An example for `Clips`: the people in a video at one second."""
    path: str
    label: int              # its own place in the list: `labels` of a batch tell which key frames it holds
    frame: str              # "video,0902", the key in annotations
    second: int             # of the whole video, whatever the file holds
    boxes: np.ndarray       # (n, 4) float32: x1, y1, x2, y2 in [0, 1] of the frame
    scores: np.ndarray      # (n,) float32, the person detector's; 1 for ground truth
    actions: np.ndarray     # (n, 80) bool, column i = action id i + 1; none where boxes were detected


def ava_listing(root, split, boxes="", min_score=0.8):
    """List a split, train or test (= val), of AVA v2.2 below root -> Listing of KeyFrames by video and second, and the
    truth: a dict of ground_truth, class_ids and excluded as `ava_mean_ap` takes them.

    train: ground-truth boxes.  test: boxes of a person detector with score >= min_score (VideoMAE .8, MaCLR .9) from
    the file `boxes`, a path or a name below root, "" for one of AVA_BOXES, "gt" for the ground truth.  Detections at
    seconds without annotation have items, too: they are false positives.  The truth has all rows: those of videos that
    are not there count as missed.  Raises UserError for what is not there or, with file and line, not as published.
    """
    root = data_root("ava", root)
    files = {path.name.lower(): path for path in reversed(list(list_files(root)))}         # of several, the first
    videos = {path.stem: path for path in files.values() if path.suffix.lower() in VIDEO_FILES}

    def find(*names):
        if found := [files[name.lower()] for name in names if name.lower() in files]:
            return found[0]
        raise UserError(f"--data ava: no {' or '.join(names)} below {root}. {AVA_LAYOUT}")
    part = "train" if split == "train" else "val"
    rows = read_ava(find(f"ava_{part}_v2.2.csv"), "video,second,x1,y1,x2,y2,action,person")
    excluded = {frame for frame, *_ in read_ava(find(f"ava_{part}_excluded_timestamps_v2.2.csv"), "video,second")}
    actions = find("ava_action_list_v2.2_for_activitynet_2019.pbtxt")      # 60 times item { name: "sit" id: 11 }
    text = actions.read_text(encoding="utf-8-sig", errors="replace")
    names = {int(number): name for name, number in re.findall(r'name:\s*"([^"]+)"\s*(?:label_)?id:\s*(\d+)\b', text)}
    if not names or len(names) != text.count("{") or not names.keys() <= set(range(1, 81)):
        raise UserError(f"{actions}: expected blocks item {{ name: \"...\" id: 1 to 80 }}, each id once")
    truth = dict(class_ids=sorted(names), excluded=excluded,
                 ground_truth=dict(frame=[frame for frame, *_ in rows], box=np.array([box for _, box, *_ in rows]),
                                   label=np.array([action for _, _, action, _ in rows])))

    listed = dict.fromkeys(frame[:-5] for frame, *_ in rows)               # videos of "video,0902", each once
    listing = make_listing("ava", split, [(name, videos.get(name), name) for name in listed],
                           [names.get(i, f"action {i}") for i in range(1, 81)])
    source = "the ground truth"
    if split == "test" and boxes != "gt":
        source = Path(boxes) if Path(boxes).is_file() else find(*[boxes] if boxes else AVA_BOXES)
        rows = [row for row in read_ava(source, "video,second,x1,y1,x2,y2,label,score") if row[3] >= min_score]
    there = {item.label: item.path for item in listing.items if item.path not in listing.missing}
    items = key_frames([row for row in rows if row[0][:-5] in there and row[0] not in excluded], there)
    if not items:
        raise UserError(f"ava {split}: no boxes with score >= {min_score} in {source}. Is that file of this split?")
    print0(f"ava {split}: {len(items)} key frames, boxes of {source}")
    return listing._replace(items=items), truth


def key_frames(rows, paths):
    """Rows of `read_ava` -> KeyFrames by video and second; rows with the same box are one person."""
    frames, items = {}, []
    for frame, box, action, score in rows:
        _, does = frames.setdefault(frame, {}).setdefault(box, (score, np.zeros(80, bool)))
        if action:
            does[action - 1] = True
    for frame, people in sorted(frames.items()):
        scores, actions = zip(*people.values())
        items.append(KeyFrame(paths[frame[:-5]], len(items), frame, int(frame[-4:]), np.float32(list(people)),
                              np.float32(scores), np.array(actions)))
    return items


def read_ava(path, columns):
    """Lines of a csv file without header -> [(frame "video,0902", box or (), action id or None, score or 1)]."""
    rows = []
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        lines = csv.DictReader(file, columns.split(","))
        try:
            for line in lines:
                box = tuple(float(line[side]) for side in ("x1", "y1", "x2", "y2") if side in line)
                action = int(line["action"]) if "action" in line else None
                score, known = float(line.get("score", 1)), action in (None, *range(1, 81))
                if None in line or not known or not all(-0.1 < x < 1.1 for x in (*box, score)):    # NaN is not
                    raise ValueError
                rows.append((f"{line['video']},{int(line['second']):04d}", box, action, score))
        except (ValueError, TypeError, csv.Error):                         # TypeError: a line that is too short
            raise UserError(f"{path}:{lines.line_num}: expected {columns}, boxes in [0, 1], actions 1 to 80") from None
    return rows


def key_frame_indices(video, second, frames, stride):
    """Frame numbers (frames,) of a clip, `stride` apart, centred on an annotated second of an AVA video.

    c - half, c - half + stride, ... with half = frames * stride // 2, clipped to the video (SlowFast, VideoMAE).  The
    stride counts frames at 30 per second, as theirs; at another (mean) rate distances from c are scaled.  A file of
    up to 905 s is the part from 900 s on, a longer one the whole video.  VideoError if it ends before that second.
    """
    info = video.info
    time = second - 900 if info.seconds <= 905 else second
    if not 0 <= time <= info.seconds:
        raise VideoError(f"{video.path}: lasts {info.seconds:.1f} s, without the annotated second {second}")
    offsets = (stride * np.arange(frames) - frames * stride // 2) * info.fps / 30
    return np.clip(video.index_at(time) + np.floor(offsets + 0.5).astype(int), 0, info.frames - 1)


# ---- 3. Frames and crops --------------------------------------------------------------------------------------------

def segment_indices(first, last, frames, offset):
    """One frame of each of `frames` equal parts of first..last, at `offset` (scalar or (frames,)) in [0, 1) of it."""
    part = (last - first + 1) / frames
    return first + np.minimum((part * (np.arange(frames) + offset)).astype(int), last - first)


def stride_in(video, cfg):
    """--stride in frames of this video, not rounded: as many seconds as at --fps."""
    return cfg.stride * video.info.fps / cfg.fps if cfg.fps else cfg.stride


def train_clips(video, item, rng, cfg, size, frames):
    """cfg.repeats random clips, each with a random crop of its own -> uint8 (repeats, frames, size, size, 3)."""
    if cfg.sampling == "dense":
        indices = [clip_indices(video, item, frames, stride_in(video, cfg), rng) for _ in range(cfg.repeats)]
    else:
        first, last = item_frames(video, item)
        indices = [segment_indices(first, last, frames, rng.random(frames)) for _ in range(cfg.repeats)]
    height, width, aspect = video.info.height, video.info.width, (1 / cfg.aspect, cfg.aspect)
    crops = [random_resized_crop(height, width, rng, (cfg.min_crop, 1), aspect) for _ in indices]
    return read_views(video, indices, crops, size)


def test_clips(video, item, rng, cfg, size, frames, views=(1, 1)):
    """All views (T, S) of a video -> uint8 (T * S, frames, size, size, 3), time slowest.

    Dense: T clips evenly over the video.  Uniform: T frames of each segment, each clip takes one.  S square crops
    evenly along the long side hold --test-crop of the short side.
    """
    first, last = item_frames(video, item)
    if cfg.sampling == "dense":
        steps = np.round(stride_in(video, cfg) * np.arange(frames)).astype(int)
        room = max(0, last - first - steps[-1])
        indices = [np.minimum(first + shift + steps, last) for shift in evenly_spaced(room, views[0])]
    else:
        indices = [segment_indices(first, last, frames, (t + 0.5) / views[0]) for t in range(views[0])]
    height, width = video.info.height, video.info.width
    short, long = sorted((height, width))
    side = round(short * cfg.test_crop)
    across, crops = (short - side) // 2, []
    for shift in evenly_spaced(long - side, views[1]):
        x, y = (shift, across) if width >= height else (across, shift)
        crops.append((x, y, x + side, y + side))
    indices, crops = zip(*itertools.product(indices, crops))
    return read_views(video, indices, crops, size)


def evenly_spaced(room, count):
    """`count` whole numbers from 0 to `room`, both included; a single one is the middle."""
    return [round(room * k / (count - 1)) for k in range(count)] if count > 1 else [round(room / 2)]


def person_clip(video, item, rng, cfg, size, frames, train=False):
    """A clip around an AVA key frame -> dict(clips uint8 (1, frames, H, W, 3), boxes (n, 4) in pixels of it, actions
    (n, 80), count (1,)).  Training: a random square of side `size` of the frame whose short side is 256 to 320 x
    size / 224.  Testing: the whole frame, short side --test-size, long side a multiple of 16."""
    height, width = video.info.height, video.info.width
    if train:
        side = int(min(height, width) * 224 / rng.uniform(256, 320))
        x, y = rng.integers(width - side + 1), rng.integers(height - side + 1)
        crop, shape = (x, y, x + side, y + side), (size, size)
    else:
        scale = (cfg.test_size or size) / min(height, width)
        crop, shape = (0, 0, width, height), tuple(max(1, round(s * scale / 16)) * 16 for s in (height, width))
    x1, y1, x2, y2 = crop
    boxes = (item.boxes * ([width, height] * 2) - [x1, y1] * 2) / ([x2 - x1, y2 - y1] * 2)         # in [0, 1] of it
    boxes, actions = (boxes.clip(0, 1) * (shape[::-1] * 2)).astype(np.float32), item.actions
    if train:                                                                  # people outside the crop
        inside = (boxes[:, 2:] - boxes[:, :2]).min(1) > 1
        boxes, actions = boxes[inside], actions[inside]
    indices = key_frame_indices(video, item.second, frames, cfg.stride)
    return dict(clips=read_views(video, [indices], [crop], shape), boxes=boxes, actions=actions,
                count=np.array([len(boxes)]))


# ---- 4. Networks, augmentation, losses ------------------------------------------------------------------------------

# Operations per clip, their magnitude (of 30), the probability of each.
RANDAUGMENTS = {"none": (0, 0, 0.0), "videomae": (4, 21, 0.5), "mcl-ucf101": (1, 23, 1.0), "mcl-hmdb51": (3, 17, 1.0)}


def per_clip(transform, clips):
    """One of torchvision's random transforms of clips (B, 3, T, H, W): drawn anew for each, alike in its frames, from
    torch's global generator.  `Plan.generator` seeds that by step, pass and process, so their number has a say."""
    with torch.autocast(clips.device.type, enabled=False):                     # places and colours want fp32
        out = [transform(clip.transpose(0, 1)) for clip in clips]              # each (T, 3, H, W)
    return torch.stack(out).transpose(1, 2)


class MotionFocus(nn.Module):
    """MOFO's head: tokens (B, N, D), inside (B, N) bool -> features (B, D), the mean of the tokens inside the motion
    box after one block in which they attend to those outside.

    Nothing inside: the mean of all tokens as they are.  Everything inside: attention among themselves.  Source: MOFO,
    motion-focused fine-tuning; names are those of its checkpoints.
    """

    def __init__(self, dim, heads=3):
        super().__init__()
        if dim % heads:
            raise UserError(f"--focused: its {heads} heads do not divide the network's {dim} features")
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6), Mlp(dim, 4 * dim)
        self.attn, self.heads = nn.Module(), heads
        self.attn.q, self.attn.kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.attn.q_bias, self.attn.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.attn.proj = nn.Linear(dim, dim)
        init_linear(self, nn.init.trunc_normal_, std=0.02)

    def forward(self, tokens, inside):
        a, x = self.attn, self.norm1(tokens)
        q, k, v = F.linear(x, a.q.weight, a.q_bias), *F.linear(x, a.kv.weight).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v + a.v_bias))    # (B, h, N, d)
        seen = ~inside | inside.all(1, keepdim=True)                           # (B, N) keys that are attended to
        y = F.scaled_dot_product_attention(q, k, v, seen[:, None, None])
        y = tokens + a.proj(y.transpose(1, 2).flatten(2))                      # of use inside only; costs less than
        y = y + self.mlp(self.norm2(y))                                        # taking these tokens out
        found = inside.any(1, keepdim=True)                                    # (B, 1)
        y, weight = torch.where(found[..., None], y, tokens), (inside | ~found)[..., None].to(tokens)
        return (y * weight).sum(1) / weight.sum(1)


class Classifier(nn.Module):
    """A network with a classification loss: clips (B, 3, T, H, W) uint8, labels (B / repeats,) or, with several
    heads, (B / repeats, heads) -> loss, stats.  sizes: classes of each head; all are outputs of one linear layer."""

    def __init__(self, network, sizes, cfg, flow=None):
        super().__init__()
        self.network, self.sizes, self.cfg, self.flow = network, sizes, cfg, flow
        ops, magnitude, p = RANDAUGMENTS[cfg.randaugment]
        self.randaugment = [transforms.RandomApply([transforms.RandAugment(
            1, magnitude, interpolation=transforms.InterpolationMode.BILINEAR, fill=128)], p) for _ in range(ops)]
        self.erasing = transforms.RandomErasing(cfg.erasing, (0.02, 1 / 3), (0.3, 3.3), value="random")
        self.mixing = [kind(alpha=alpha) for kind, alpha in ((transforms.MixUp, cfg.mixup),
                                                             (transforms.CutMix, cfg.cutmix)) if alpha]
        if cfg.mode == "linear":                                               # only the head is trained
            network.requires_grad_(False).head.requires_grad_(True)

    def inside(self, clips):
        """Where MOFO's motion box is: clips (B, 3, T, H, W) uint8 -> (B, 1, 1, H, W), 1 inside and 0 outside."""
        *_, boxes, _ = find_motion(self.flow, clips, self.network.tubelet_size)
        x1, y1, x2, y2 = boxes.T[..., None]                                    # each (B, 1); all 0: no motion
        y, x = (torch.arange(side, device=clips.device) for side in clips.shape[-2:])
        rows, columns = (y + 1 > y1) & (y < y2), (x + 1 > x1) & (x < x2)       # (B, H), (B, W): a part of the pixel
        return (rows[:, :, None] & columns[:, None]).float()[:, None, None]

    def logits(self, clips, inside=None):
        """Normalised clips (B, 3, T, H, W) -> (B, all classes); inside (B, 1, 1, H, W) is above 0 in the box."""
        network, c = self.network, self.cfg
        if inside is not None:
            T, p = network.grid[0], network.patch_size
            tokens = network.forward_map(clips).flatten(2).transpose(1, 2)     # (B, N, D)
            patches = F.max_pool2d(inside[:, 0], p).flatten(1) > 0             # (B, H' W'): any pixel of it
            x = network.fc_norm(network.local_MCA[0](tokens, patches.repeat(1, T)))
        else:
            x = network.pooled(clips)
        x = F.normalize(x, dim=1) if c.unit_features else x
        return network.head(F.dropout(x, c.dropout, self.training)).float()

    def scores(self, clips):
        """Clips (B, 3, T, H, W) uint8 -> probabilities per head, or with --average logits those (B, all classes)."""
        inside = self.inside(clips) if self.cfg.focused else None
        logits = self.logits(normalize(clips, self.network.config), inside)
        if self.cfg.average == "logits":
            return logits
        return torch.cat([part.softmax(1) for part in logits.split(self.sizes, 1)], 1)

    def forward(self, clips, labels, generator=None):
        c, heads, repeats = self.cfg, len(self.sizes), len(clips) // len(labels)
        if c.mode == "linear":
            self.network.eval()                                                # running statistics stay as they are
        labels = labels.view(-1, heads).repeat_interleave(repeats, 0)          # (B, heads)
        targets = torch.cat([F.one_hot(own, n).float() for own, n in zip(labels.T, self.sizes)], 1)
        with torch.no_grad():
            clips = flip(clips, generator)[0] if c.flip else clips
            if self.randaugment:
                clips = per_clip(transforms.Compose(self.randaugment), clips)
            inside = self.inside(clips) if c.focused else None
            if c.jitter or c.grey:
                clips = colour_jitter(to_float01(clips), generator, hue=c.hue, p=c.jitter, grey=c.grey)
            clips = normalize(clips, self.network.config)
            clips = per_clip(self.erasing, clips) if c.erasing else clips
            if self.mixing:
                both = clips if inside is None else torch.cat([clips, inside.expand_as(clips[:, :1])], 1)
                order = torch.arange(len(clips), device=clips.device).view(-1, repeats).T.flatten()
                both, targets, labels = both[order], targets[order], labels[order]     # the next is of another video
                mixed, targets = transforms.RandomChoice(self.mixing)(both.flatten(1, 2), targets)
                both = mixed.view_as(both)                                     # all clips of a pass share the draw
                clips, inside = both[:, :3], None if inside is None else both[:, 3:, :1]
        logits = self.logits(clips, inside)                                    # (B, all classes)
        parts = list(zip(logits.split(self.sizes, 1), targets.split(self.sizes, 1), labels.T))
        loss = sum(F.cross_entropy(part, target, label_smoothing=c.label_smoothing) for part, target, _ in parts)
        right = torch.stack([part.argmax(1) == own for part, _, own in parts]).all(0)
        return loss, dict(train_acc=100 * right.float().mean())


class Detector(nn.Module):
    """A network with a head for the actions of people: dict(clips (B, 3, T, H, W) uint8, boxes (n, 4) in pixels,
    actions (n, 80), count (B,) boxes per clip) -> loss, stats.  Feature map, mean over time, RoIAlign 7 x 7, maximum,
    dropout, linear, binary cross-entropy: SlowFast's head."""

    def __init__(self, network, cfg):
        super().__init__()
        self.network, self.cfg, self.flow = network, cfg, None

    def logits(self, clips, boxes, count):
        maps = self.network.forward_map(clips).mean(2).float()                 # (B, dim, H', W')
        owner = torch.repeat_interleave(torch.arange(len(count), device=boxes.device), count, output_size=len(boxes))
        rois = torch.cat([owner[:, None].to(boxes), boxes], 1)                 # (n, 5)
        x = roi_align(maps, rois, 7, maps.shape[-1] / clips.shape[-1], aligned=True).amax((2, 3))      # (n, dim)
        return self.network.head(F.dropout(x, self.cfg.dropout, self.training)).float()

    def forward(self, batch, labels, generator=None):
        clips, boxes, count = batch["clips"], batch["boxes"], batch["count"]
        with torch.no_grad():
            if self.cfg.flip:
                clips, flipped = flip(clips, generator)
                x1, y1, x2, y2 = boxes.unbind(1)
                mirrored = torch.stack([clips.shape[-1] - x2, y1, clips.shape[-1] - x1, y2], 1)
                flipped = flipped.repeat_interleave(count, output_size=len(boxes))[:, None]
                boxes = torch.where(flipped, mirrored, boxes)
            if self.cfg.jitter:
                clips = colour_jitter(to_float01(clips), generator, 0.1, 0, 0.1, self.cfg.hue, self.cfg.jitter, grey=0)
        logits = self.logits(normalize(clips, self.network.config), boxes, count)              # (n, 80)
        total = F.binary_cross_entropy_with_logits(logits, batch["actions"].float(), reduction="sum")
        return total / max(1, logits.numel()), dict(people=len(logits) / len(clips))           # perhaps there is nobody


def dilate(network):
    """Let the last stage of a ResNet3D keep its resolution, as detection wants: stride 1, dilation 2."""
    for conv in [module for module in network.layer4.modules() if isinstance(module, nn.Conv3d)]:
        conv.stride = (1, 1, 1)
        if conv.kernel_size[1:] == (3, 3):
            conv.dilation, conv.padding = (1, 2, 2), (0, 2, 2)


def build_network(cfg, content, outputs=0, classes=None):
    """The network that `content`, the checkpoint of --init, describes, with its weights (unless --random-init).
    Without outputs it has the norms of the file.  One that is trained takes the head over only for the same classes."""
    public = dict(name=cfg.model, image_size=112 if cfg.model.endswith("18") else 224, frames=16)
    backbone = ({} if "image_size" in content["backbone"] else public) | content["backbone"]
    backbone |= {key: value for key in ("image_size", "frames") if (value := getattr(cfg, key))}
    backbone |= dict(norms=("norm",)) if cfg.data == "ava" else {}             # of the tokens: there is no mean
    training = cfg.mode == "finetune" or cfg.mode == "linear" and outputs
    network = make_backbone(**backbone, num_classes=outputs, drop_path=cfg.drop_path)
    if cfg.data == "ava":
        network.head = nn.Linear(network.dim, 80)
        init_linear(network.head, nn.init.normal_, std=0.01)
        if isinstance(network, ResNet3D):
            dilate(network)
    if cfg.focused:
        if not isinstance(network, ViT):
            raise UserError("--focused is MOFO's head for a ViT; --no-focused trains the plain one")
        network.local_MCA = nn.ModuleList([MotionFocus(network.dim)])
    if not cfg.random_init:
        new = ("head.",) if training and content.get("classes") != classes else ()
        report = load_weights(network, cfg.init, True if training else "all", new)
        print0(f"{cfg.init}: {len(report.loaded)} tensors loaded, new here {report.missing[:4]}, not used "
               f"{len(report.unexpected)} {report.unexpected[:3]}")
    if isinstance(network, ViT) and cfg.test_size % network.patch_size:
        raise UserError(f"--test-size {cfg.test_size}: must be a multiple of {network.patch_size}, the patch size")
    cfg.image_size, cfg.frames = network.config["image_size"], network.config["frames"]     # of the clips to read
    return network


def build_classifier(cfg, env, content, classes):
    """A Classifier on the device, with a linear head for each of heads(classes)."""
    network, flow = build_network(cfg, content, len(classes), classes).to(env.device), None
    if cfg.focused:
        flow = FlowEstimator(cfg.flow, cfg.raft_weights, cfg.flow_updates, env.device, env.amp, cfg.compile,
                             cfg.flow_size)
    return Classifier(network, [len(names) for names in heads(classes)], cfg, flow).eval()


# ---- 5. Metrics -----------------------------------------------------------------------------------------------------

def accuracy(scores, read, labels, classes):
    """Scores (N, C), read (N,) bool, labels (N,) -> top-1, top-5, mean-class and per-class accuracy in percent.
    What was not read is wrong.  Classes without a test video are left out."""
    def percent(right):
        return 100 * right.float().mean().item()
    hits = (scores.topk(min(5, scores.shape[1]), 1).indices == labels[:, None]) & read[:, None]    # is guess k right?
    first = hits[:, 0]
    per_class = {name: percent(first[labels == i]) for i, name in enumerate(classes) if (labels == i).any()}
    return dict(acc1=percent(first), acc5=percent(hits.any(1)), mean_class=sum(per_class.values()) / len(per_class),
                per_class=per_class)


def retrieval_recall(gallery, gallery_labels, query, query_labels, ks=(1, 5, 10, 20, 50), center=False, read=None):
    """Recall@k of nearest-neighbour retrieval -> {k: percent of queries with their class among the k nearest}.

    gallery (N, D), query (Q, D): a feature per video, the mean over its clips, of any length; labels (N,), (Q,).
    Near is cosine, in float64 because TF32 would reorder neighbours.  center=True (FAME) first subtracts from either
    set its own mean.  A query with read (Q,) False is a miss and not part of the mean.  Our choice for ties: a video
    of another class as near (to 1e-12) as the nearest of the right one precedes it, so the order of rows never
    matters, and features that are all alike, or nan, find nothing.
    """
    gallery, query = gallery.double(), query.double()
    read = torch.ones_like(query_labels, dtype=torch.bool) if read is None else read
    if center:
        gallery, query = gallery - gallery.mean(0), query - query[read].mean(0)
    gallery, query = F.normalize(gallery, dim=1), F.normalize(query, dim=1)
    rows, before = max(1, 2**24 // len(gallery)), []                           # at most 128 MiB of cosines at a time
    for some, label in zip(query.split(rows), query_labels.split(rows)):
        cosine, same = some @ gallery.T, label[:, None] == gallery_labels      # (rows, N)
        nearest = cosine.masked_fill(~same, -math.inf).amax(1, keepdim=True)   # of the right class
        before.append((~(cosine < nearest - 1e-12) & ~same).sum(1))            # how many of other classes precede it
    before = torch.cat(before)                                                 # (Q,)
    return {k: 100 * ((before < min(k, len(gallery))) & read).double().mean().item() for k in ks}


def epic_accuracy(verb_logits, noun_logits, verb, noun, read=None):
    """EPIC-KITCHENS-100 from a verb and a noun head -> {verb, noun, action}_{top1, top5} in percent.

    Logits (N, V), (N, M), or logarithms of probabilities averaged over views, -inf included; verb, noun (N,) are the
    true ids.  All V * M pairs compete as actions, occurring or not, by log p(verb) + log p(noun).  Rows with read
    (N,) False are wrong, and so are ties.
    """
    read = torch.ones_like(verb, dtype=torch.bool) if read is None else read
    verbs, nouns = verb_logits.double().log_softmax(1), noun_logits.double().log_softmax(1)        # float32 would tie
    of_verb, of_noun = verbs.gather(1, verb[:, None]), nouns.gather(1, noun[:, None])              # (N, 1)
    v, n = (scores.topk(min(6, scores.shape[1])).values for scores in (verbs, nouns))
    pairs = (v[:, :, None] + n[:, None]).flatten(1)                            # (N, 36), the 6 best of all among them
    result = {}
    for name, scores, own in (("verb", verbs, of_verb), ("noun", nouns, of_noun), ("action", pairs, of_verb + of_noun)):
        rank = (scores >= own).sum(1)                                          # (N,) 1 is best, last of those that tie
        for k in (1, 5):
            right = (rank <= k) & (own[:, 0] > -math.inf) & read               # nan is above nothing
            result[f"{name}_top{k}"] = 100 * right.double().mean().item()
    return result


def ava_mean_ap(detections, ground_truth, class_ids, excluded=(), iou=0.5, cap=None):
    """Frame-mAP of AVA at one IoU -> (mAP, {class id: AP}), both in [0, 1]; nan for a class without ground truth.

    Both tables are dicts of columns: frame, n strings "video,0902"; box (n, 4), x1, y1, x2, y2 in any one unit; label
    (n,) action ids; detections also score (n,).  What is not of class_ids (60 of AVA's 80) or lies on a frame of
    `excluded` counts on neither side.  By falling score each detection takes the box of its frame and class that it
    overlaps most; below `iou`, or where that one is taken, it is false, and so is all on frames without ground truth.
    AP is the area below the envelope of precision over recall; mAP the mean over classes with ground truth.  Boxes
    without area are no detections.  cap=50 first keeps the 50 best (box, class) rows of every frame, as the official
    script does.  Equal scores keep the order of rows, nan ranks last.  Raises UserError if no ground truth is left.
    """
    wanted, excluded = set(class_ids), set(excluded)

    def ready(table, order):
        """Boxes and labels of a table's rows in this order, {frame: numbers of its rows that count}"""
        box = torch.from_numpy(np.asarray(table["box"], np.float64).reshape(-1, 4)[order])
        label, rows = torch.as_tensor(table["label"])[order], {}
        for row, (i, c) in enumerate(zip(order.tolist(), label.tolist())):
            if c in wanted and table["frame"][i] not in excluded:
                rows.setdefault(table["frame"][i], []).append(row)
        return box, label, rows
    best_first = np.argsort(-np.asarray(detections["score"], np.float64), kind="stable")           # nan last
    box, label, found = ready(detections, best_first)
    true_box, true_label, truth = ready(ground_truth, np.arange(len(ground_truth["label"])))
    if not truth:
        raise UserError("AVA: no ground truth of these classes on frames that count: is the class list of this data?")
    kept, right = torch.zeros(2, len(label), dtype=torch.bool)
    for frame, rows in found.items():
        rows = torch.tensor(rows[:cap])
        rows = rows[(box[rows, :2] < box[rows, 2:]).all(1)]                    # after the cap, like the leaderboard
        kept[rows] = True
        if frame not in truth:
            continue
        overlap = box_iou(box[rows], true_box[truth[frame]])                   # (detections, true boxes)
        overlap[label[rows][:, None] != true_label[truth[frame]]] = 0
        most, theirs = overlap.max(1)                                          # of equal ones the first
        rows, theirs = rows[most >= iou], theirs[most >= iou]
        right[rows[np.unique(theirs.numpy(), return_index=True)[1]]] = True    # the best detection of each true box
    counted, ap = torch.tensor([i for rows in truth.values() for i in rows]), {}
    for c in class_ids:
        hits, total = right[kept & (label == c)], int((true_label[counted] == c).sum())
        precision = hits.cumsum(0) / torch.arange(1.0, len(hits) + 1, dtype=torch.float64)
        envelope = precision.flip(0).cummax(0).values.flip(0)                  # recall grows where a detection is right
        ap[c] = envelope[hits].sum().item() / total if total else math.nan
    return float(np.nanmean(list(ap.values()))), ap


# ---- 6. Classifiers on fixed features -------------------------------------------------------------------------------

def fit_linear(features, labels, classes, l2):
    """Multinomial logistic regression on features (N, D), standardised -> function from features to logits.
    Minimises mean cross-entropy + l2/2 |W|^2 by L-BFGS."""
    mean, std = features.mean(0), features.std(0, correction=0) + 1e-6
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


def squared_hinge_svm(features, labels, classes, C=1.0):
    """One-vs-rest linear SVMs without bias, as in MCL (LIBLINEAR -s 2): (N, D), labels (N,) -> (D, classes).

    Minimises 1/2 |w|^2 + C sum max(0, 1 - y w.x)^2 per class, features as they are; the class of x is the argmax of
    x @ W.  Newton's method in float64: pooled features are positive, so the curvature varies 1e7-fold with direction
    and first-order solvers crawl.  The loss is quadratic as long as the same rows violate the margin, so this ends.
    """
    x, signs = features.double(), F.one_hot(labels, classes).double() * 2 - 1  # signs (N, classes) of -1, 1
    eye = torch.eye(x.shape[1]).to(x)
    W = 2 * torch.linalg.solve(eye + 2 * C * x.T @ x, 2 * C * x.T @ signs)     # twice least squares: few violations
    for c in range(classes):
        w, y = W[:, c], signs[:, c]

        def loss(w):
            return w.square().sum() / 2 + C * (1 - y * (x @ w)).clamp(min=0).square().sum()
        for _ in range(1000):
            rows = y * (x @ w) < 1                                             # only these have a say
            target = torch.linalg.solve(eye + 2 * C * x[rows].T @ x[rows], 2 * C * x[rows].T @ y[rows])
            step = target - w
            if step.norm() <= 1e-8 * w.norm():
                break
            while loss(w + step) > loss(w) * (1 + 1e-12):                      # more than rounding: too far
                step = step / 2
            w = w + step
        else:
            raise UserError(f"the SVM of class {c} did not converge: are all features finite?")
        W[:, c] = w
    return W.to(features)


def knn_scores(gallery, labels, query, classes, k, temperature=0.07):
    """Votes of the k nearest, exp(cosine / temperature) each: gallery (N, D), labels (N,), query (Q, D) -> (Q, C)."""
    gallery, rows = F.normalize(gallery.double(), dim=1), max(1, 2**24 // len(gallery))        # as in retrieval_recall
    found = [(F.normalize(some.double(), dim=1) @ gallery.T).topk(min(k, len(gallery))) for some in query.split(rows)]
    similarity, nearest = map(torch.cat, zip(*found))                          # (Q, k)
    votes = (similarity / temperature).exp()
    return votes.new_zeros(len(query), classes).scatter_add(1, labels[nearest], votes).float()


# ---- 7. Evaluation --------------------------------------------------------------------------------------------------

@torch.no_grad()
def run_inference(compute, items, sample, cfg, env, what, views=1):
    """Apply compute(clips on the device, n) -> n results, CPU tensors, to all items, sampled by `sample`, so many views
    of each -> dict from index to result, without those that could not be read, and the errors of these, also printed.
    Every process takes its share of the batches.  Key frames come one by one, as they have sizes of their own."""
    dataset, size = Clips(items, sample, cfg.seed, replace=False), max(1, cfg.test_batch // views)
    batches = torch.arange(len(items)).split(1 if cfg.data == "ava" else size)
    mine, results, errors = [keys.tolist() for keys in batches[env.rank::env.world]], {}, []
    for number in (signal.SIGTERM, signal.SIGINT):                             # nothing is left to save
        signal.signal(number, signal.default_int_handler)
    found = loader(dataset, mine, cfg.workers, env.device)
    progress = tqdm(found, what, len(mine), disable=True if env.rank else None)
    for keys, batch in zip(mine, progress):
        errors += batch["errors"]
        if batch["clips"] is None:
            continue
        with env.autocast(), eagerly():
            out = compute(to_device(batch["clips"], env.device), int(batch["read"].sum()))
        found = [key for key, read in zip(keys, batch["read"]) if read]
        results |= zip(found, (x.clone() for x in out))                        # views would be sent with their batch
    if env.world > 1:
        parts = [None] * env.world
        torch.distributed.all_gather_object(parts, (results, errors))
        results, errors = {k: v for part, _ in parts for k, v in part.items()}, sum((e for _, e in parts), [])
    if not results:
        raise UserError(f"none of the {len(items)} videos could be read; the first: {errors[0]}")
    for error in errors:
        print0(f"not read: {error}")
    return results, errors


def run_views(compute, items, cfg, env, views, what, mean=False):
    """Apply compute(clips (n V, 3, T, H, W) uint8) -> (n V, D) to the V views, such as "2x3", of videos -> results
    (N, V, D) or, with `mean`, (N, D), 0 where there is none, read (N,) bool: where there is one, errors."""
    def by_video(clips, n):
        out = compute(clips).float().cpu().unflatten(0, (n, -1))               # (n, V, D)
        return out.mean(1) if mean else out
    views = tuple(map(int, views.split("x")))
    sample = partial(test_clips, cfg=cfg, size=cfg.test_size or cfg.image_size, frames=cfg.frames, views=views)
    results, errors = run_inference(by_video, items, sample, cfg, env, what, math.prod(views))
    nothing = torch.zeros_like(next(iter(results.values())))
    out = torch.stack([results.get(i, nothing) for i in range(len(items))])
    return out, torch.tensor([i in results for i in range(len(items))]), errors


def extract(network, items, cfg, env, views, what):
    """Features (N, views, dim) of listed videos, read (N,) bool, errors."""
    return run_views(lambda clips: network(normalize(clips, network.config)), items, cfg, env, views, what)


def detect(model, test, truth, cfg, env):
    """Actions of the people in AVA's key frames -> figures, errors.  A box has a score for each of the 80 actions."""
    config, sample = model.network.config, partial(person_clip, cfg=cfg, size=cfg.image_size, frames=cfg.frames)

    def compute(batch, n):
        scores = model.logits(normalize(batch["clips"], config), batch["boxes"], batch["count"]).sigmoid()
        return scores.cpu().split(batch["count"].tolist())
    results, errors = run_inference(compute, test.items, sample, cfg, env, "testing")
    frames, boxes, scores = [], [], []
    for i, value in sorted(results.items()):                                   # value (n, 80)
        item = test.items[i]
        frames += [item.frame] * value.numel()
        boxes.append(np.repeat(item.boxes, 80, 0))
        scores.append((value.numpy() * (item.scores[:, None] if cfg.times_score else 1)).ravel())
    labels = np.tile(np.arange(1, 81), len(frames) // 80)
    found = dict(frame=frames, box=np.concatenate(boxes), label=labels, score=np.concatenate(scores))
    if cfg.out and env.rank == 0:
        np.savez(Path(cfg.out, "scores.npz"), **found)
    mean, ap = ava_mean_ap(found, **truth)
    per_class = {test.classes[c - 1]: 100 * value for c, value in ap.items() if not math.isnan(value)}
    return dict(mAP=100 * mean, per_class=per_class), errors


def heads(classes):
    """Names of the classes of each linear head: one, or EPIC's two, whose names begin with verb: and noun:."""
    verbs = [name for name in classes if name.startswith("verb:")]
    return [verbs, classes[len(verbs):]] if verbs else [classes]


def compute_metrics(scores, read, labels, classes, cfg):
    """What the tables print, in percent, from scores (N, all classes) and labels (N,) or (N, 2)."""
    sizes, result = [len(names) for names in heads(classes)], {}
    if len(sizes) == 1:
        result = accuracy(scores, read, labels, classes)
    if cfg.data != "epic" or cfg.label not in ("verb-noun", "action"):
        return result
    logs = scores if cfg.average == "logits" else scores.log()                 # -inf where a probability is 0
    if len(sizes) == 2:
        (verb_logs, noun_logs), (verb, noun) = logs.split(sizes, 1), labels.T
    else:                                                                      # p of a verb: the sum over its actions,
        pairs = torch.tensor([[int(part) for part in name.split(":")] for name in classes])    # 0 if there are none
        verb, noun = pairs[labels].T                                           # (MOFO's code: the p of action 0)
        verb_logs, noun_logs = ((logs.softmax(1) @ F.one_hot(ids).to(logs)).log() for ids in pairs.T)
    epic = epic_accuracy(verb_logs, noun_logs, verb, noun, read)
    if len(sizes) == 1:                                                        # actions are those of the head itself
        epic = {name: value for name, value in epic.items() if "action" not in name}
    return epic | result


# ---- 8. Training ----------------------------------------------------------------------------------------------------

def train(cfg, env, listing, model, sample):
    """Train what has gradients; the loop is that of the pre-training scripts -> False if a signal stopped it."""
    plan, network = plan_run(cfg, len(listing.items), env), model.network
    out, checkpoint = open_run(f"finetune-{cfg.mode}", cfg, env, listing, plan)
    optimizer = make_optimizer(cfg.optimizer, network, plan.lr, cfg.weight_decay, betas=(0.9, 0.999),
                               layer_decay=cfg.layer_decay)
    drops = [float(epoch) for epoch in cfg.drops.split(",") if epoch]
    dataset = Clips(listing.items, sample, cfg.seed)
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.amp == torch.float16)
    start = resume_or_init(checkpoint, "", network, optimizer, scaler)
    net = wrap_model(model.train(), env, cfg.compile)
    log, stop, stopping = Log(out, env, plan, start, cfg.log_every), StopSignal(), False
    batches = iter(loader(dataset, step_batches(len(dataset), plan, env, cfg.seed, start), cfg.workers, env.device))
    for step in range(start, plan.steps):
        rate = cosine_lr(step, plan.steps, plan.warmup, plan.lr, plan.min_lr, cfg.warmup_start,
                         cfg.whole_cosine and not drops)
        if drops and step >= plan.warmup:
            rate = plan.lr * 0.1 ** sum(step >= epoch * plan.per_epoch for epoch in drops)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        means = {}
        for micro in range(plan.accum):
            batch = log.next_batch(batches)
            generator = plan.generator(env, cfg.seed, step, micro)
            with env.autocast(), nullcontext() if env.world == 1 or micro == plan.accum - 1 else net.no_sync():
                loss, stats = net(batch["clips"], batch["labels"], generator)
            scaler.scale(loss / plan.accum).backward()
            for name, value in dict(stats, loss=loss.detach()).items():
                means[name] = means.get(name, 0.0) + value / plan.accum
        scaler.unscale_(optimizer)
        norm = clip_grad_norm_(model.parameters(), cfg.clip_grad or math.inf)
        status = torch.stack([means.pop("loss"), norm, norm.new_tensor(float(stop.received))])
        total, norm, stopping = all_reduce_mean(status).tolist()               # the one wait for the device in a step
        if log.finite(total, 0.0 if scaler.is_enabled() else norm, batch["names"], model):  # fp16: the scaler's matter
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        log.step(step, total, model.flow, lr=rate, grad_norm=norm, **means)
        last = step + 1 == plan.steps or stopping
        if env.rank == 0 and (last or (step + 1) % cfg.save_every == 0):
            save_checkpoint(out / "last.pt", cfg, listing, step + 1, network, network, optimizer, scaler)
        if stopping:
            break
    log.close(stopping)
    return not stopping


# ---- 9. Main --------------------------------------------------------------------------------------------------------

# What testing takes over from the run that made a checkpoint, unless a flag says otherwise.
TRAINED_WITH = ("label focused sampling stride fps frames image_size views test_size test_crop average unit_features "
                "min_score times_score flow flow_updates flow_size").split()


def check(cfg):
    """Raise UserError for settings that make no sense."""
    views, epochs = (r"[1-9]\d*x[1-9]\d*", "2x3"), (r"(\d+(\.\d+)?(,\d+(\.\d+)?)*)?", "60,120")
    for name, (form, example) in dict(views=views, train_views=views, drops=epochs).items():
        if not re.fullmatch(form, getattr(cfg, name)):
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: expected e.g. {example}")
    if cfg.data == "ava" and (cfg.mode not in ("finetune", "test") or cfg.focused or cfg.repeats > 1 or cfg.split > 1):
        raise UserError(f"--data ava has --mode finetune and test, no --focused, --repeats or --split; got {cfg.mode}")
    if cfg.focused and cfg.mode in ("linear", "knn", "retrieval", "extract"):
        raise UserError(f"--focused: --mode {cfg.mode} reads the features of the network without MOFO's head")
    if cfg.part not in ("", "all") and Path(cfg.data).is_file():
        raise UserError(f"--part {cfg.part}: {cfg.data} is read whole")


def inherit_settings(cfg, content):
    """Let test, predict and export go on with what a checkpoint was trained with, unless a flag says otherwise."""
    made, given = content["config"], getattr(cfg, "given", set())
    if cfg.mode not in ("test", "predict", "export"):
        return
    if made.get("mode") in ("finetune", "linear"):
        for name in {*TRAINED_WITH, *["split"] * (made.get("data") == cfg.data)} - given:
            setattr(cfg, name, made.get(name, getattr(cfg, name)))
    elif "focused" not in given:                                               # MOFO's own files
        cfg.focused = any("local_MCA." in name for name in content["model"])


def named_classes(cfg, content):
    """Names of the classes from --classes, else from a checkpoint; None or [] if there are none."""
    if cfg.classes and not Path(cfg.classes).is_file():
        raise UserError(f"--classes {cfg.classes}: no such file; expected a name per line")
    return read_lines(cfg.classes) if cfg.classes else content.get("classes")


def find_listing(cfg, data, split, label):
    return find_videos(data, cfg.root, split, label, (cfg.toy_train, cfg.toy_test, cfg.toy_size), cfg.split)


def find_splits(cfg, content):
    """The listing to train on, None for --mode test, and the one to test on; they have no video in common.  Of data of
    the user's own without a split a fifth is held out, unless there is --test-data, or --init saw none of it."""
    def whole(data):
        return data not in DATA_SETS and not any(split_dir(data, split) for split in SPLIT_DIRS)

    def read(data, split):
        listing = find_listing(cfg, data, "all" if whole(data) else split, cfg.label)
        if not listing.classes:
            raise UserError(f"--data {data}: has no labels, which --mode {cfg.mode} needs: a directory for each class, "
                            "no videos beside these, or a list file with labels")
        return listing
    listing = None if cfg.mode == "test" else read(cfg.data, cfg.train_split)
    test = read(cfg.test_data or cfg.data, "test")
    made = content["config"]
    seen = made and os.path.realpath(made.get("place") or made["data"]) == os.path.realpath(cfg.data)
    if whole(cfg.data) and not cfg.test_data and (listing or seen):
        if not listing and made.get("test_data"):
            raise UserError(f"--data {cfg.data}: {cfg.init} was trained on all of it; name others with --test-data")
        test = test._replace(items=hold_out(test.items, "test"))
        listing = listing and listing._replace(items=hold_out(listing.items, "train"))
        print0(f"{cfg.data}: has no split, {len(test.items)} of its videos are held out to test")
    if not test.items:
        raise UserError(f"--data {cfg.data}: has no split, and no class has two videos, of which to test on one")
    listing = listing and listing._replace(items=[item for item in listing.items if item.path not in listing.missing])
    known = {(os.path.realpath(item.path), item.start) for item in listing.items} if listing else set()
    if shared := [item.path for item in test.items if (os.path.realpath(item.path), item.start) in known]:
        raise UserError(f"{len(shared)} of the {len(test.items)} test videos are training videos, too; the first: "
                        f"{shared[0]}. Name others with --test-data or --data")
    return listing, test


def class_ids(test, classes, cfg):
    """Labels of a listing as places in `classes`, joined by the names of the classes -> (N,), or (N, 2) for two heads.
    Names that are numbers and no class of their own are places already, which a note says."""
    labels, columns = torch.tensor([item.label for item in test.items]).view(len(test.items), -1), []
    if len(heads(classes)) != len(heads(test.classes)):
        raise UserError(f"--label {cfg.label}: {cfg.init} was trained for another one")
    for column, own, names in zip(labels.T, heads(classes), heads(test.classes)):
        place = {str(i): i for i in range(len(own))} | {name: i for i, name in enumerate(own)}
        if unknown := sorted(set(names) - place.keys()):
            raise UserError(f"--data {cfg.data}: the test videos have classes that the training has not: "
                            f"{unknown[:3]}; it has {own[:3]} ...")
        if set(names) - set(own):
            print0(f"note: classes that are numbers are taken as places: 0 = {own[0]}")
        columns.append(torch.tensor([place[names[i]] for i in column.tolist()]))
        if len(columns[-1].unique()) < len(column.unique()):
            raise UserError(f"--data {cfg.data}: two of its classes would be one of {own[:3]} ...; name them alike")
    return torch.stack(columns, 1).squeeze(1)


def main(cfg):
    if not cfg.init:
        raise UserError("--init FILE: name a checkpoint, e.g. runs/mofo-toy/last.pt")
    content = load_file(cfg.init)
    content.pop("optimizer", None)                                             # large, and of no use here
    made = content.get("config")
    content["config"] = made if isinstance(made, dict) else {}                 # another program's may be anything
    inherit_settings(cfg, content)
    check(cfg)
    env, file = setup(cfg.seed), Path(cfg.init).resolve()
    start = file.parent.name if file.stem in ("last", "model", "pytorch_model") else file.stem
    cfg.out = cfg.out or f"{run_directory(f'finetune-{cfg.mode}', cfg)}-{'random-' * cfg.random_init}{start}"
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    cfg.part = cfg.part or ("test" if cfg.data in DATA_SETS else "all")
    if cfg.mode == "export":
        export(cfg, content)
    elif cfg.mode == "predict":
        predict(cfg, env, content)
    elif cfg.mode == "extract":
        extract_features(cfg, env, content)
    elif cfg.data == "ava":
        detection(cfg, env, content)
    elif cfg.mode in ("finetune", "test") or cfg.mode == "linear" and cfg.classifier == "trained":
        classification(cfg, env, content)
    else:
        fixed_features(cfg, env, content)


def classification(cfg, env, content):
    """--mode finetune, test and, with --classifier trained, linear."""
    listing, test = find_splits(cfg, content)
    classes = listing.classes if listing else named_classes(cfg, content) or test.classes
    labels = class_ids(test, classes, cfg)
    if cfg.mode == "test" and classes is test.classes:
        print0(f"{cfg.init} does not name its classes: they are taken to be the data's, in the same order")
    model = build_classifier(cfg, env, content, classes)
    sample = partial(train_clips, cfg=cfg, size=cfg.image_size, frames=cfg.frames)
    if cfg.mode == "test" or train(cfg, env, listing, model, sample):          # else a signal stopped it
        scores, read, errors = run_views(model.eval().scores, test.items, cfg, env, cfg.views, "testing", mean=True)
        result = compute_metrics(scores, read, labels, classes, cfg)
        report(cfg, env, result, errors, test)
        save_scores(cfg, env, test.items, scores, read, labels, classes)


def detection(cfg, env, content):
    """--data ava: finetune, test.  A key frame has one view."""
    cfg.views = "1x1"
    listing = ava_listing(cfg.root, "train")[0] if cfg.mode == "finetune" else None
    test, truth = ava_listing(cfg.root, "test", cfg.boxes, cfg.min_score)
    model = Detector(build_network(cfg, content, classes=test.classes).to(env.device), cfg)
    sample = partial(person_clip, cfg=cfg, size=cfg.image_size, frames=cfg.frames, train=True)
    if cfg.mode == "test" or train(cfg, env, listing, model, sample):
        report(cfg, env, *detect(model.eval(), test, truth, cfg, env), test)


def fixed_features(cfg, env, content):
    """--mode linear, knn and retrieval, on features as they are."""
    listing, test = find_splits(cfg, content)
    classes = listing.classes
    if len(heads(classes)) > 1:
        raise UserError(f"--label {cfg.label}: --mode {cfg.mode} takes one label, verb, noun or action")
    test_labels = class_ids(test, classes, cfg)
    network = build_network(cfg, content).to(env.device).eval()
    query, read, errors = extract(network, test.items, cfg, env, cfg.views, "testing")  # (N, views, dim)
    gallery, known, train_errors = extract(network, listing.items, cfg, env, cfg.train_views, "training features")
    labels = torch.tensor([item.label for item in listing.items])[known].to(env.device)
    gallery, query = gallery[known].to(env.device), query.to(env.device)
    if cfg.mode == "knn" or cfg.mode == "retrieval" and cfg.center:            # each clip counts the same
        gallery, query = F.normalize(gallery, dim=-1), F.normalize(query, dim=-1)
    means = gallery.mean(1), labels, query.mean(1)
    if cfg.mode == "retrieval":
        recall = retrieval_recall(*means, test_labels.to(env.device), center=cfg.center, read=read.to(env.device))
        result = {f"R@{k}": value for k, value in recall.items()}
    else:
        if cfg.mode == "knn":
            scores = knn_scores(*means, len(classes), cfg.neighbours)
        elif cfg.classifier == "svm":
            scores = query.mean(1) @ squared_hinge_svm(gallery.mean(1), labels, len(classes))
        else:
            scores = fit_linear(gallery.mean(1), labels, len(classes), cfg.l2)(query).softmax(-1).mean(1)
        result = accuracy(scores.cpu(), read, test_labels, classes)
        save_scores(cfg, env, test.items, scores.cpu(), read, test_labels, classes)
    report(cfg, env, result, train_errors + errors, test)


def report(cfg, env, result, errors, test):
    """Print the result and write it to results.json, its numbers named by the views that they were made with."""
    if env.rank:
        return
    per_class, path = result.pop("per_class", {}), Path(cfg.out, "results.json")
    named = {f"{name}_{cfg.views}": value for name, value in result.items()}
    settings = ("mode", "recipe", "init", "random_init", "data", "label", "train_split", "split")
    about = {name: getattr(cfg, name) for name in settings} | dict(videos=len(test.items), missing=test.missing)
    path.write_text(json.dumps(named | about | dict(unreadable=errors, per_class=per_class), indent=1))
    numbers = "  ".join(f"{name} {value:.2f}" for name, value in named.items())
    print0(f"{numbers}  on {len(test.items)} videos -> {path}")


def name_of(item):
    """The path of an example and, of a part of a video, from which to which second."""
    return item.path if item.stop == math.inf else f"{item.path} {item.start:g}-{item.stop:g}"


def save_scores(cfg, env, items, scores, read, labels, classes):
    """Write scores.npz, what every test video got."""
    if env.rank == 0:
        np.savez(Path(cfg.out, "scores.npz"), names=[name_of(item) for item in items], scores=scores.numpy(),
                 read=read.numpy(), labels=labels.numpy(), classes=classes)


def predict(cfg, env, content):
    """Print the classes of --part of a data set, or of any videos, and write predictions.csv."""
    items, classes = find_listing(cfg, cfg.data, cfg.part, "").items, named_classes(cfg, content)
    path = Path(cfg.out, "predictions.csv")
    if not classes:
        raise UserError(f"--mode predict: {cfg.init} does not say its classes; name them with --classes FILE")
    model = build_classifier(cfg, env, content, classes)
    scores, read, _ = run_views(model.scores, items, cfg, env, cfg.views, "predicting", mean=True)
    rows = []
    for part, names in zip(scores.split(model.sizes, 1), heads(classes)):
        part = part.softmax(1) if cfg.average == "logits" else part
        best = part.topk(min(5, len(names)))
        for item, ok, values, places in zip(items, read.tolist(), best.values.tolist(), best.indices.tolist()):
            top, shares = ";".join(names[i] for i in places), ";".join(f"{value:.4f}" for value in values)
            rows.append((name_of(item), names[places[0]], top, shares) if ok else (name_of(item), "", "", ""))
    if env.rank == 0:
        with open(path, "w", newline="", **FILE_NAMES) as file:
            csv.writer(file).writerows([("path", "label", "top5", "scores"), *rows])
    for row in rows[:20]:
        print0(*row)
    print0(f"{int(read.sum())} of {len(items)} videos -> {path}")


def extract_features(cfg, env, content):
    """Write features.npz: per video and view, and their mean."""
    listing, path = find_listing(cfg, cfg.data, cfg.part, cfg.label), Path(cfg.out, "features.npz")
    network = build_network(cfg, content).to(env.device).eval()
    features, read, _ = extract(network, listing.items, cfg, env, cfg.views, "features")
    if env.rank == 0:
        np.savez(path, names=[name_of(item) for item in listing.items], features=features.mean(1).numpy(),
                 views=features.numpy(), read=read.numpy(), labels=[item.label for item in listing.items],
                 classes=listing.classes)
    print0(f"{int(read.sum())} of {len(listing.items)} videos -> {path}")


def export_huggingface(network, classes, folder):
    """Write a ViT for Hugging Face transformers: config.json, preprocessor_config.json, model.safetensors in folder.

    With a head it is a VideoMAEForVideoClassification that knows the class names, without one a VideoMAEModel.  Its
    input is (B, T, 3, H, W), normalised.  The biases of q and v are written under both of their names: releases look
    for one of them and leave the other 0 or random.  Logits differ by 1e-5, as the epsilons of fc_norm do.
    """
    head, c = isinstance(network.head, nn.Linear), network.config
    if not isinstance(network, ViT) or head != ("fc_norm" in c["norms"]):
        raise UserError("only a ViT can be exported, with fc_norm just if it has a head, as Hugging Face's VideoMAE")
    if head and len(classes) != network.head.out_features:
        raise UserError(f"the head has {network.head.out_features} outputs and there are {len(classes)} class names")
    tensors, pairs = {}, [(ours, theirs) for theirs, ours in HUGGING_FACE]
    for name, x in network.state_dict().items():
        inside = head and not name.startswith(("head.", "fc_norm."))
        there = "videomae." * inside + replace_parts(name, pairs)
        if name.endswith(".qkv.weight"):
            tensors |= zip([there.replace("qkv", part) for part in ("query", "key", "value")], x.chunk(3))
        else:
            tensors[there] = x
            tensors[there.replace("query.bias", "q_bias").replace("value.bias", "v_bias")] = x
    tensors = {k: x.clone() for k, x in tensors.items()}                           # none may share memory
    size, kind = c["image_size"], "VideoMAEForVideoClassification" if head else "VideoMAEModel"
    config = dict(model_type="videomae", architectures=[kind], **{theirs: c[ours] for ours, theirs in SIZES.items()},
                  intermediate_size=4 * network.dim, layer_norm_eps=1e-6, use_mean_pooling="norm" not in c["norms"])
    if head:
        config |= dict(id2label=dict(enumerate(classes)), label2id={name: i for i, name in enumerate(classes)})
    processor = dict(image_processor_type="VideoMAEImageProcessor", size=dict(shortest_edge=size),
                     crop_size=dict(height=size, width=size), image_mean=c["mean"], image_std=c["std"])
    try:
        import safetensors.torch
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors, dict(format="pt")))
        for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except ImportError as error:
        raise UserError(f"{folder}: the export could not be written ({error}; pip install safetensors)") from None


def export(cfg, content):
    """Write a folder that Hugging Face transformers loads."""
    if cfg.focused or cfg.unit_features:
        raise UserError("--mode export: Hugging Face's VideoMAE has neither MOFO's head nor features of unit length")
    head = re.compile(r"((module|backbone)\.)*(head|classifier)\.weight")
    outputs = next((len(x) for name, x in content["model"].items() if head.fullmatch(name)), 0)
    classes = named_classes(cfg, content) or [str(i) for i in range(outputs)]
    export_huggingface(build_network(cfg, content, outputs), classes, Path(cfg.out))
    print0(f"{cfg.out}: config.json, preprocessor_config.json, model.safetensors")


if __name__ == "__main__":
    run(main, Config, RECIPES)
