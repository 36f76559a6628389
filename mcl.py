"""MCL: motion-focused contrastive learning of video representations, in one file.    https://arxiv.org/abs/2201.04029

Contrastive learning pulls clips of one video together and apart from those of others, wherever they come from.  MCL
lets motion decide.  It compares clips that move and, in them, crops that hold what moves.  And it asks the network to
look there: the gradient of the similarity of two views, which tells what the network compared, must have the shape of
the motion map in space and time.

    Paper                                             Code                                    Section
    motion map (boundaries of flow)                   motion_boundary(), motion_target()      2
    temporal sampling                                 random_starts(), tournament()           7, 3
    spatial sampling                                  hot_box(), motion_crop()                3
    inter- and intra-video losses, order loss         MCL                                     5
    motion alignment loss                             alignment_map(), alignment_loss()       4

Differs from the paper and its released code, and why
 1. Flow is computed in the training step, so clips of a video are not ranked: of two random ones the one with more
    motion is taken with probability 0.7, else either: .68 of those taken are in the upper half (published: .85).  Each
    clip has a draw of its own (released: a video), the two others are from the halves of sorted starts (from all).
 2. A clip's motion map is the mean over four pairs of its frames, --stride apart (released: windows of 8 flows, 4 on
    Kinetics, of neighbouring video frames; clips are ranked by all their flow summed).  It is not rounded to 8 bits,
    which in the released code makes strong motion wrap around to none.
 3. The target is flipped with its clip (released: 37.5 % of all targets are mirrored in one component or both).
 4. The spatio-temporal term weights time steps by their share of the motion.  The published softmax over raw sums
    (--attention softmax) picks one step and depends on units; our flow is over --stride frames, so its sums are larger.
 5. Keys are encoded with running statistics, as in fame.py; batch norm of the queries is over all processes.  On a
    GPU networks compute in bf16 (released: fp32).
 6. Of a frame, the largest part of 4:3 is used (--frame-height, --frame-width), at a random place per sample.
    Colour jitter is one affine map per clip.  If none of 20 crop sizes fits, the first is cut to the frame.
 7. The weight of the order loss grows per step, not per epoch.  All videos are used (released: UCF101's from 64 frames
    on, Kinetics' of more than 32), and --init takes a MoCo head over for --data ucf101, too.
 8. ViT (our choice): features are LayerNorm(mean of tokens), and the aligned layer is the first one of the last
    block's MLP.  Of a ViT's or a longer clip's finer map, means over cells are aligned.

Run    python mcl.py                                         # toy data; 2.1 minutes of CPU time
       torchrun --nproc_per_node=4 mcl.py --data ucf101 --root DIR --init moco_v2_200ep_pretrain.pth.tar  # not run yet
       python mcl.py --data DIR_OF_VIDEOS                    # your own, labels not needed
"""
import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_

from common import (BACKBONES, Bottleneck, Clips, FlowEstimator, Log, MomentumContrast, Queue, RunConfig, StopSignal,
                    UserError, ViT, all_reduce_mean, blur, colour_jitter, constant, cosine_lr, draw_box, eagerly,
                    example_clips, find_videos, item_frames, loader, make_backbone, make_optimizer, map_to_rgb,
                    normalize, open_run, patchify, plan_run, rand, read_views, resume_or_init, run, save_checkpoint,
                    save_sheet, setup, spatial_gradient, step_batches, to_device, to_float01, unnormalize, wrap_model)


# ---- 1. Config -----------------------------------------------------------------------------------------------------
# Defaults are the published pre-training on Kinetics-400, but for its start: --init, ImageNet weights of MoCo v2.

@dataclass
class Config(RunConfig):
    backbone: Literal[BACKBONES] = "r2plus1d_50"  # the network; not s3d
    width: float = 1.0                 # channels relative to the published network: r2plus1d_50, slow_r50, in (0, 8]
    image_size: int = 224              # side of the crop in pixels
    frame_height: int = 240            # of the frames that crops are cut from, in [32, 1e9]
    frame_width: int = 320             # likewise, in [32, 1e9]
    frames: int = 16                   # frames of a clip
    stride: int = 2                    # video frames from one frame of the clip to the next
    flow: Literal["raft_small", "raft_large", "tvl1"] = "raft_small"  # optical flow
    raft_weights: str = ""             # file with torchvision's RAFT weights; default: download
    flow_updates: int = 6              # refinement steps of RAFT
    motion_clips: bool = True          # prefer clips with motion; --no-motion-clips = random clips
    motion_crops: bool = True          # crops must hold the motion; --no-motion-crops = random crops
    min_crop: float = 0.2              # smallest area of a crop, in (0, 1]
    flip: float = 0.5                  # probability of mirroring a clip, in [0, 1]; 0 where left and right are classes
    colour: float = 1.0                # strength of colour jitter and frequency of grey clips; 1 = published
    queue: int = 131072                # keys of earlier clips to tell apart from
    momentum: float = 0.999            # of the key encoder, in [0, 1]
    temperature: float = 0.1           # of the similarities, in (0, 1e9]
    order_weight: float = 0.0          # of the order loss at the end; grows linearly from 0
    align_weight: float = 1.0          # of the alignment loss; twice that during warm-up
    attention: Literal["l1", "softmax"] = "l1"  # over time in the alignment loss; softmax: published
    epochs: int = 400                  # passes over the videos
    batch: int = 32                    # videos per step, over all GPUs and accumulation; --repeats of each
    device_batch: int = 32             # videos per GPU and forward pass: as many as fit
    repeats: int = 1                   # samples (of a clip and two others) from each video that is opened
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd (momentum 0.9), adamw (betas 0.9 and 0.95)
    lr: float = 0.16                   # per 256 videos of the batch
    min_lr: float = 8e-6               # per 256 videos, at the end
    warmup_epochs: float = 5           # linear from a hundredth of the rate
    weight_decay: float = 1e-4         # sgd: of everything, adamw: not of vectors, in [0, 1]
    preview_every: int = 1000          # steps between pictures


RECIPES = {
    "k400": {},                                      # the defaults above
    "ucf101": dict(epochs=200, lr=0.08, order_weight=1.0),
    # our choice from here on
    "ssv2": dict(flip=0.0), "epic": {},
    "hmdb51": dict(epochs=200, lr=0.08, order_weight=1.0, queue=16384),
    # what a ViT gets instead of SGD, unless the recipe says otherwise; rates as in https://arxiv.org/abs/2104.02057
    "vit": dict(optimizer="adamw", lr=1.5e-4, min_lr=0.0, weight_decay=0.1, warmup_epochs=40),
    # some hundred videos; for large data the published --queue 131072 --momentum 0.999 --batch 32 --epochs 400
    # --warmup-epochs 5 --image-size 224 --frame-height 240 --frame-width 320
    "custom": dict(image_size=112, frame_height=120, frame_width=160, queue=512, momentum=0.99, epochs=100, batch=8,
                   warmup_epochs=1, workers=2, log_every=1, save_every=50, preview_every=50),
    "custom vit": dict(lr=8e-3, weight_decay=0.05),                                      # for batches of 8 to 32
    # about two minutes of CPU time
    "toy": dict(backbone="vit_tiny", image_size=64, frame_height=64, frame_width=64, frames=8, flow="tvl1",
                min_crop=0.5, flip=0.0, colour=0.3, queue=256, momentum=0.99, order_weight=1.0, epochs=2, batch=8,
                lr=0.06, min_lr=0.0, warmup_epochs=1, weight_decay=0.05, workers=2, log_every=8,
                save_every=100, preview_every=100, toy_train=768),
}
GRID = (4, 7, 7)                                     # of motion maps in time and space, at most


# ---- 2. Motion maps ------------------------------------------------------------------------------------------------

def motion_boundary(flow):
    """How much flow (..., T, 2, h, w) changes from pixel to pixel: (..., h, w), in pixels per pixel and frame pair.

    Flow is summed over time first, so that what moves to and fro cancels, and so does what all pixels share, such as
    a camera's pan.  The magnitudes of the two components' gradients are added.  Source: MCL 3.1.
    """
    gradient = spatial_gradient(flow.sum(-4))                                   # (..., 2 components, x or y, h, w)
    return torch.hypot(*gradient.unbind(-3)).sum(-3)


def motion_target(flow, grid=GRID):
    """What the alignment map should look like: flow (B, T, 2, h, w) in pixels -> motion (B, t, gh, gw) for a grid of
    (t, gh, gw) cells.  Time step k sums T / t flows, as the network does.  Raises UserError unless t divides T."""
    if flow.shape[1] % grid[0]:
        raise UserError(f"{flow.shape[1]} frames do not fall into {grid[0]} groups: change --frames")
    groups = flow.unflatten(1, (grid[0], -1))                                   # (B, t, T / t, 2, h, w)
    return F.adaptive_avg_pool2d(motion_boundary(groups), grid[1:])


def clip_map(flow, grid=GRID[1:]):
    """Flow (B, pairs, 2, h, w) of some pairs of frames of a clip -> its motion map (B, gh, gw): mean over pairs.  At
    the border, 1/28 of each side, flow is unreliable: no motion there."""
    motion = motion_boundary(flow[:, :, None]).mean(1)                          # (B, h, w)
    top, left = (max(1, side // 28) for side in motion.shape[1:])
    inside = F.pad(motion[:, top:-top, left:-left], (left, left, top, top))
    return F.adaptive_avg_pool2d(inside, grid)


# ---- 3. Sampling ---------------------------------------------------------------------------------------------------

def tournament(scores, generator=None, p=0.7):
    """Scores (B, K, 2) of pairs of clips -> winners (B, K): with probability p that of the larger score, else any."""
    draw = rand(*scores.shape, generator=generator, device=scores.device)       # (B, K, 2)
    return torch.where(draw[..., 0] < p, scores.argmax(-1), (draw[..., 1] < 0.5).long())


def hot_box(motion_map):
    """Motion map (B, gh, gw) -> the box of its hottest tenth of cells (B, 4), in cells, and the share of it that a crop
    must hold (B,): the smaller the box the more of it, nothing where the box is large or nothing moves."""
    B, gh, gw = motion_map.shape
    hottest = motion_map.flatten(1).topk(int(0.1 * gh * gw), dim=1).indices     # (B, 4)
    y, x = hottest // gw, hottest % gw
    box = torch.stack([x.amin(1), y.amin(1), x.amax(1) + 1, y.amax(1) + 1], 1).float()
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    share = torch.where(area <= 4, 0.9, torch.where(area <= 8, 0.8, torch.where(area <= 12, 0.7, 0.0)))
    return box, share * (motion_map.amax((1, 2)) > 0)


def motion_crop(motion_map, height, width, generator=None, min_area=0.2, places=40):
    """A random resized crop per motion map (B, 7, 7) that holds most of the hottest cells' box -> boxes (B, 4), whole
    pixels of a (height, width) frame.

    Of `places` random places the first is taken that holds enough of the box, else the one that holds most.  Source:
    MCL 3.2 and its released code.
    """
    B, gh, gw = motion_map.shape
    cells, share = hot_box(motion_map)
    x1, y1, x2, y2 = (cells * constant((width / gw, height / gh) * 2, cells.device)).T[..., None]   # each (B, 1), px
    draw = rand(B, 2, 20, generator=generator, device=cells.device)
    area = height * width * (min_area + (1 - min_area) * draw[:, 0])            # (B, 20 tries)
    aspect = ((2 * draw[:, 1] - 1) * math.log(4 / 3)).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = ((w <= width) & (h <= height)).float().argmax(1, keepdim=True)       # the first that does
    w, h = w.gather(1, fits).clamp(1, width), h.gather(1, fits).clamp(1, height)            # (B, 1)
    draw = rand(B, 2, places, generator=generator, device=cells.device)
    x, y = (draw[:, 0] * (width - w + 1)).floor(), (draw[:, 1] * (height - h + 1)).floor()      # (B, places)

    def held(start, length, first, last):
        return ((start + length).minimum(last) - start.maximum(first)).clamp(min=0) / (last - first)
    cover = held(x, w, x1, x2) * held(y, h, y1, y2)                             # (B, places)
    best = torch.where(cover >= share[:, None], 2.0, cover).argmax(1, keepdim=True)         # the first of the largest
    x, y = x.gather(1, best), y.gather(1, best)
    return torch.cat([x, y, x + w, y + h], 1)


def crop_resize(maps, boxes, size, flipped=None):
    """Cut boxes (B, 4), in pixels, out of maps (B, C, H, W) and scale them to (B, C, size, size), bilinearly; where
    flipped (B,) is True, also mirror them left-right."""
    H, W = maps.shape[-2:]
    (x1, y1, x2, y2), zero = boxes.float().unbind(1), torch.zeros(len(boxes), device=maps.device)
    reach = (x2 - x1) / W if flipped is None else torch.where(flipped, x1 - x2, x2 - x1) / W
    rows = [reach, zero, (x1 + x2) / W - 1, zero, (y2 - y1) / H, (y1 + y2) / H - 1]            # grid_sample's -1 .. 1
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), (len(maps), 1, size, size), align_corners=False)
    return F.grid_sample(maps, grid, padding_mode="border", align_corners=False)


# ---- 4. Alignment --------------------------------------------------------------------------------------------------

def split(encoder, clips):
    """Run a network on normalised clips up to its last linear map before a non-linearity and the mean over positions
    -> that map's output X (B, C, t, h, w), and the rest of the network as a function from X to features (B, dim).

    The rest can be differentiated twice: it has no compiled code and no fused attention.  Call the rest, unlike
    `split`, in fp32: gradients with respect to X underflow in fp16.
    """
    if isinstance(encoder, ViT):
        *blocks, last = encoder.blocks
        x = encoder.patch_embed(patchify(clips, encoder.patch_size, encoder.tubelet_size)) + encoder.positions
        x = nn.Sequential(*blocks)(x)
        x = x + last.attn(last.norm1(x))
        X = last.mlp.fc1(last.norm2(x)).transpose(1, 2).unflatten(2, encoder.grid)          # (B, 4 dim, T', H', W')

        def rest(X):
            tokens = x.float() + last.mlp.fc2(F.gelu(X.flatten(2).transpose(1, 2)))
            return encoder.fc_norm(encoder.norm(tokens).mean(1))           # either is there
        return X, rest
    *stages, final = encoder.stages
    *blocks, last = getattr(encoder, final)
    x = nn.Sequential(*(getattr(encoder, name) for name in stages), *blocks)(clips)
    if isinstance(last, Bottleneck):
        y = F.relu(last.bn2(last.conv2(F.relu(last.bn1(last.conv1(x))))))
        conv, norm = last.conv3, last.bn3
    else:                                                                       # torchvision's two-layer block
        y, (conv, norm) = last.conv1(x), last.conv2

    def rest(X):
        return F.relu(norm(X) + x.float()).mean((2, 3, 4))
    return conv(y), rest


def alignment_map(gradient):
    """Where the network looked: gradient (B, C, t, h, w) of the similarity with respect to X -> (B, t, h, w) >= 0.
    Each channel is weighted by its mean over the positions of a time step.  Source: MCL 3.3; unlike Grad-CAM, which
    it resembles, it does not use the activations."""
    return F.relu((gradient.mean((3, 4), keepdim=True) * gradient).sum(1))


def alignment_loss(P, M, attention="l1"):
    """1 - cosine of alignment maps P (B, t, h, w) and motion maps M (B, t, h, w), three ways -> their sum in [0, 3],
    the three cosines by name.

    st: over space, in each time step, mean weighted by the step's share of the motion ("l1") or the softmax over the
    steps' motion ("softmax", published); s: over space, of means over time; t: over time, of sums over space.
    Neither the scale of P nor, with "l1", that of M matters.  Source: MCL 3.3.
    """
    cosine = partial(F.cosine_similarity, dim=-1, eps=1e-12)
    P = P / P.detach().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)           # (its values are around 1e-7)
    P, M = P.flatten(2), M.flatten(2)                                           # (B, t, h w)
    motion = M.sum(2)                                                           # (B, t)
    weight = motion.softmax(1) if attention == "softmax" else motion / motion.sum(1, keepdim=True).clamp(min=1e-12)
    cosines = dict(st=(weight * cosine(P, M)).sum(1), s=cosine(P.mean(1), M.mean(1)), t=cosine(P.sum(2), motion))
    cosines = {name: value.mean() for name, value in cosines.items()}
    return 3 - sum(cosines.values()), cosines


# ---- 5. Model ------------------------------------------------------------------------------------------------------

class MCL(MomentumContrast):
    """dict of clips (6 B, 3, T + 1, H, W) uint8, two candidates (without motion_clips one) for each of three clips of
    every video, and order (B,) (1: the first clip comes before the others) -> loss = inter + intra + order_weight *
    updates / steps * order + align_weight * align, for `warmup` updates 2 align_weight; stats.  The first clip gives
    the query and the first key, the others a key each.  The last frame is only for flow."""

    def __init__(self, encoder, flow, steps, warmup=0, motion_clips=True, motion_crops=True, min_crop=0.2, flip=0.5,
                 colour=1.0, queue=131072, momentum=0.999, temperature=0.1, order_weight=0.0, align_weight=1.0,
                 attention="l1", outputs=128):
        super().__init__(momentum)
        self.encoder, self.flow, dim = encoder, flow, encoder.dim
        self.heads = nn.ModuleDict({name: nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, outputs))
                                    for name in ("inter", "intra", "order")})
        self.order = nn.Linear(3 * outputs, 2)
        self.keys = copy.deepcopy(nn.ModuleDict(dict(encoder=encoder, heads=self.heads))).requires_grad_(False)
        self.queue = Queue(queue, outputs)
        self.steps, self.warmup, self.motion_clips, self.motion_crops = steps, warmup, motion_clips, motion_crops
        self.min_crop, self.flip, self.colour, self.temperature = min_crop, flip, colour, temperature
        self.order_weight, self.align_weight, self.attention = order_weight, align_weight, attention

    def choose(self, clips, generator=None):
        """Candidates (3 K B, 3, T + 1, H, W) -> the chosen clips (B, 3, 3, T + 1, H, W), their maps (B, 3, 7, 7)."""
        clips = clips.unflatten(0, (-1, 3, 2 if self.motion_clips else 1))     # (B, 3, K, 3, T + 1, H, W)
        B, _, K, _, frames = clips.shape[:5]
        maps, chosen = torch.zeros(B, 3, K, *GRID[1:], device=clips.device), clips.new_zeros(B, 3, dtype=torch.long)
        if self.motion_clips or self.motion_crops:
            first = [(2 * i + 1) * (frames - 1) // 8 for i in range(4)]         # of four pairs, evenly over the clip
            pairs = torch.stack([clips[..., i:i + 2, :, :] for i in first], 3)  # (B, 3, K, 4, 3, 2, H, W)
            flow = self.flow(pairs.flatten(0, 3)).unflatten(0, (-1, 4))[:, :, 0]           # (3 K B, 4, 2, h, w)
            maps = clip_map(flow).view_as(maps)
        if self.motion_clips:
            chosen = tournament(maps.mean((3, 4)), generator)
        at = torch.arange(B, device=clips.device)[:, None], torch.arange(3, device=clips.device), chosen
        return clips[at], maps[at]

    def view(self, clips, motion, generator=None):
        """A random view of clips (B, 3, T, H, W): normalised (B, 3, T, side, side), its box and whether mirrored."""
        B, _, T, H, W = clips.shape
        box = motion_crop(motion * self.motion_crops, H, W, generator, self.min_crop)       # no motion: anywhere
        flipped = rand(B, generator=generator, device=clips.device) < self.flip
        side = self.encoder.config["image_size"]
        view = crop_resize(to_float01(clips).flatten(1, 2), box, side, flipped).unflatten(1, (3, T))
        c = self.colour
        view = colour_jitter(view, generator, 0.4 * c, 0.4 * c, 0.4 * c, 0.1 * c, grey=0.2 * c)
        return normalize(blur(view, generator), self.encoder.config), box, flipped

    def query_motion(self, clips, box, flipped):
        """Flow of whole clips (B, 3, T + 1, H, W), cut and mirrored as the query was -> (B, T, 2, side, side)."""
        flow = self.flow(clips)                                                 # (B, T, 2, h, w)
        B, T, _, h, w = flow.shape
        box = box * constant((w / clips.shape[-1], h / clips.shape[-2]) * 2, box.device)
        return crop_resize(flow.flatten(1, 2), box, self.encoder.config["image_size"], flipped).unflatten(1, (T, 2))

    def embed(self, encoder, heads, clips):
        """Clips (n, 3, T, side, side) -> X, and per head embeddings (n, outputs) of length 1."""
        X, rest = split(encoder, clips)
        with torch.autocast(clips.device.type, enabled=False):
            X = X.float()
            feature = rest(X)
            return X, {name: F.normalize(head(feature), dim=1) for name, head in heads.items()}

    def look(self, similarity, X):
        """alignment_map of a similarity (B,), its cells averaged where there are more than in GRID."""
        gradient, = torch.autograd.grad(similarity.sum(), X, create_graph=self.training)
        P = alignment_map(gradient)
        return F.adaptive_avg_pool3d(P, [min(n, most) for n, most in zip(P.shape[1:], GRID)])

    def forward(self, batch, generator=None):
        with torch.no_grad(), torch.autocast(batch["clips"].device.type, enabled=False):
            clips, maps = self.choose(batch["clips"], generator)
            views, boxes, flips = zip(*(self.view(clips[:, i, :, :-1], maps[:, i], generator) for i in (0, 0, 1, 2)))
            flow = self.query_motion(clips[:, 0], boxes[0], flips[0]) if self.align_weight else None
            self.keys.eval()                                                    # running statistics, see 5. above
        with torch.no_grad():
            _, keys = self.embed(self.keys["encoder"], self.keys["heads"], torch.cat(views[1:]))
        X, q = self.embed(self.encoder, self.heads, views[0])                   # (B, C, t, h, w); by head (B, outputs)
        t, progress = self.temperature, self.updates / self.steps
        with torch.autocast(X.device.type, enabled=False):
            # Inter: InfoNCE of three keys against the queue; softplus(log sum e^n - p) = -log(e^p / (e^p + sum e^n)).
            k = keys["inter"].unflatten(0, (3, -1)).transpose(0, 1)             # (B, 3, outputs)
            own = torch.einsum("bd,bjd->bj", q["inter"], k)                     # (B, 3)
            other = q["inter"] @ self.queue.keys.clone().T                      # (B, K)
            inter = F.softplus(torch.logsumexp(other / t, 1, keepdim=True) - own / t).mean()
            # Intra: the key of the same clip against those of the two other clips.
            clip = torch.einsum("bd,jbd->bj", q["intra"], keys["intra"].unflatten(0, (3, -1)))  # (B, 3)
            intra = F.softplus((clip[:, 1:] - clip[:, :1]) / t).mean()
            # Order: does the query come before the two other clips or after them?
            _, k1, k2 = keys["order"].chunk(3)
            guess = self.order(F.normalize(torch.cat([q["order"], k1, k2], 1), dim=1))
            order = F.cross_entropy(guess, batch["order"])
            loss = inter + intra + self.order_weight * progress * order
            stats = dict(inter=inter, intra=intra, order=order)
            if self.align_weight:
                P = self.look(own[:, 0], X)                                     # (B, t, h, w)
                M = motion_target(flow, P.shape[1:])
                M = 38.25 * M if self.attention == "softmax" else M             # the published units
                align, cosines = alignment_loss(P, M, self.attention)
                loss = loss + (1 + (self.updates < self.warmup)) * self.align_weight * align
                P = P.detach().flatten(1)
                stats |= {f"align_{name}": value for name, value in cosines.items()}
                stats |= dict(zero_maps=(P.amax(1) == 0).float().mean(), map_norm=P.norm(dim=1).mean())
            near = (q["inter"] @ k[:, 0].T).argmax(1)                           # (B,) most similar first key
            stats["top1"] = 100 * (near == torch.arange(len(near), device=near.device)).float().mean()
        self.queue.enqueue(keys["inter"])
        return loss, {name: value.detach() for name, value in stats.items()}


# ---- 6. Preview ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def preview(model, batch, path):
    """Write what the method sees, a row for each video: its first clip with the box of the hottest cells (red) and the
    query's crop (yellow), and its motion map; then, of the start and of the end of the query, what the network sees,
    the motion there and where the network looks."""
    model.eval()
    generator = torch.Generator(batch["clips"].device).manual_seed(0)
    clips, maps = (x[:, 0] for x in model.choose(batch["clips"], generator))    # (B, 3, T + 1, H, W), (B, 7, 7)
    query, box, flipped = model.view(clips[:, :, :-1], maps, generator)
    key, *_ = model.view(clips[:, :, :-1], maps, generator)
    with torch.enable_grad():
        X, q = model.embed(model.encoder, model.heads, query)
        _, k = model.embed(model.keys["encoder"], model.keys["heads"], key)
        P = model.look((q["inter"] * k["inter"]).sum(1), X)
    M = motion_target(model.query_motion(clips, box, flipped), P.shape[1:])
    seen, tile = unnormalize(query, model.encoder.config), 112
    frames = F.interpolate(to_float01(clips[:, :, 0]).cpu(), (tile, tile)).split(1)
    hot = hot_box(maps)[0] * (tile / maps.shape[-1])                            # cells -> pixels of the tile
    crop = box * constant((tile / clips.shape[-1], tile / clips.shape[-2]) * 2, box.device)
    frames = [draw_box(draw_box(frame, red), yellow, "yellow") for frame, red, yellow in zip(frames, hot, crop)]
    columns = [torch.cat(frames), map_to_rgb(maps)]                             # each (B, 3, h, w)
    for t in (0, -1):
        columns += [seen[:, :, t], map_to_rgb(M[:, t]), map_to_rgb(P[:, t])]
    save_sheet(path, torch.stack([F.interpolate(x.cpu(), (tile, tile)) for x in columns], 1), tile)
    model.train()


# ---- 7. Train ------------------------------------------------------------------------------------------------------

cosine_lr = partial(cosine_lr, start=0.01)           # warm-up begins at a hundredth of the peak, as published


def random_starts(first, last, span, candidates, rng):
    """First frames of a video's three clips, which end at start + span -> (3, candidates), does the anchor come first?
    Row 0 is the anchor's, in one half of frames first .. last; rows 1 and 2, ascending, are the others', in the other
    half.  Where half a video is shorter than a clip: three starts anywhere, the anchor's first or last of them."""
    before, half = rng.random() < 0.5, (first + last + 1) // 2
    if half - 1 - span >= first:
        halves = [(first, half - 1 - span), (half, last - span)]
        anchor, others = halves if before else halves[::-1]
        starts = [*rng.integers(*anchor, candidates, endpoint=True),
                  *np.sort(rng.integers(*others, 2 * candidates, endpoint=True))]   # k1 is before k2, whichever wins
    else:
        starts = np.sort(rng.integers(first, max(first, last - span), 3 * candidates, endpoint=True))
        starts = starts if before else np.roll(starts, candidates)                  # the last ones are the anchor's
    return np.reshape(starts, (3, candidates)), before


def sample_clips(video, item, rng, cfg):
    """cfg.repeats samples of a video -> dict(clips: uint8 (3 K repeats, frames + 1, height, width, 3), K candidates
    for each of three clips, order: (repeats,) is the first clip before the others?)."""
    (first, last), span, K = item_frames(video, item), cfg.stride * cfg.frames, 2 if cfg.motion_clips else 1
    size, (height, width) = (cfg.frame_height, cfg.frame_width), (video.info.height, video.info.width)
    scale, orders, indices, crops = min(height / size[0], width / size[1]), [], [], []
    h, w = (max(1, round(side * scale)) for side in size)
    for _ in range(cfg.repeats):
        starts, before = random_starts(first, last, span, K, rng)
        x, y = rng.integers(width - w + 1), rng.integers(height - h + 1)
        orders.append(before)
        indices += [np.minimum(start + cfg.stride * np.arange(cfg.frames + 1), last) for start in starts.ravel()]
        crops += [(x, y, x + w, y + h)] * starts.size
    return dict(clips=read_views(video, indices, crops, size), order=np.array(orders, np.int64))


def main(cfg):
    env = setup(cfg.seed)
    listing = find_videos(cfg.data, cfg.root, "train", toy=(cfg.toy_train, cfg.toy_test, cfg.toy_size))
    plan = plan_run(cfg, len(listing.items), env)
    if cfg.backbone == "s3d":
        raise UserError("--backbone s3d: has no last convolution to align; choose any other")
    out, checkpoint = open_run("mcl", cfg, env, listing, plan)

    encoder = make_backbone(cfg.backbone, cfg.image_size, cfg.frames, width=cfg.width, norms=("fc_norm",))
    flow = FlowEstimator(cfg.flow, cfg.raft_weights, cfg.flow_updates, env.device, env.amp, cfg.compile)
    model = MCL(encoder, flow, plan.steps, plan.warmup, cfg.motion_clips, cfg.motion_crops,
                cfg.min_crop, cfg.flip, cfg.colour, cfg.queue, cfg.momentum, cfg.temperature, cfg.order_weight,
                cfg.align_weight, cfg.attention).to(env.device)
    optimizer = make_optimizer(cfg.optimizer, model, plan.lr, cfg.weight_decay)
    optimizer.register_step_post_hook(lambda *_: model.update_keys())
    dataset = Clips(listing.items, partial(sample_clips, cfg=cfg), cfg.seed)
    examples = example_clips(dataset)

    # >>> same: loop
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.amp == torch.float16)
    start = resume_or_init(checkpoint, cfg.init, model, optimizer, scaler)
    net = wrap_model(model, env, cfg.compile)
    log, stop, stopping = Log(out, env, plan, start, cfg.log_every), StopSignal(), False
    batches = iter(loader(dataset, step_batches(len(dataset), plan, env, cfg.seed, start), cfg.workers, env.device))
    for step in range(start, plan.steps):
        rate = cosine_lr(step, plan.steps, plan.warmup, plan.lr, plan.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        means = {}
        for micro in range(plan.accum):
            batch = log.next_batch(batches)
            generator = plan.generator(env, cfg.seed, step, micro)
            with env.autocast(), nullcontext() if env.world == 1 or micro == plan.accum - 1 else net.no_sync():
                loss, stats = net(batch["clips"], generator)                   # <- the method
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
        log.step(step, total, flow, lr=rate, grad_norm=norm, **means)
        last = step + 1 == plan.steps or stopping
        if env.rank == 0 and (last or (step + 1) % cfg.save_every == 0):
            save_checkpoint(out / "last.pt", cfg, listing, step + 1, model, model.encoder, optimizer, scaler)
        if env.rank == 0 and (last or step == 0 or (step + 1) % cfg.preview_every == 0):
            with eagerly():
                preview(model, to_device(examples, env.device), out / "preview.png")
        if stopping:
            break
    log.close(stopping)
    # <<< same


if __name__ == "__main__":
    run(main, Config, RECIPES)
