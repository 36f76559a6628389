"""MoDist: motion distillation for self-supervised video learning, in one file.       https://arxiv.org/abs/2106.09703

Two networks look at a clip: one at its RGB frames, a thin one only at how it moves, as edges of optical flow.
Contrastive learning pulls the RGB features of two moments of a video together, and the RGB features of one moment to
the motion features of another, in both directions.  What RGB and motion have in common is what moves, so that is what
the RGB network learns to see.  Only it is kept.  (Republished as MaCLR, ECCV 2022.)

    Paper                                             Code                  Section
    flow edges                                        flow_edges()          2
    moments that form a positive pair                 two_starts()          5
    InfoNCE                                           info_nce()            3
    RGB-RGB and cross-modal losses, two queues        MoDist                3

The authors released evaluation code, network definitions and default settings, but no pre-training.  Where those
settle a question we follow them.  Our own choices, and where we differ, and why
 1. Flow edges are the norm of all four derivatives of flow, Sobel as true gradients: camera translation, which all
    pixels share, cancels.  They are cut at --edge-clip 1 pixel per pixel: in 13 real clips, by RAFT-small at 224 px,
    0.9 % of the pixels are above it.  Flow is between every fourth frame, as --motion-stride says.
 2. Flow is computed in the training step, on the crop that the RGB network sees: both modalities of a moment share
    crop and flip.  Only RGB gets colour jitter and blur.
 3. Each query is compared with the queue of its key's modality; the two cross-modal directions are summed.
 4. Keys are encoded with running statistics, as in fame.py; batch norm of the queries is over all processes.
 5. Optimiser, schedule, crops, colours and blur are those of MoCo on this network in Feichtenhofer et al. (2021,
    https://arxiv.org/abs/2104.14558; released: jitter .4, no hue); key momentum is constant, jitter affine per clip.
 6. RGB is normalised with ImageNet's mean and deviation or those of --init (released: .45 and .225).

Run    python modist.py                                      # toy data; 1.9 minutes of CPU time
       torchrun --nproc_per_node=8 modist.py --data k400 --root DIR                              # not run by us
       python modist.py --data DIR_OF_VIDEOS                 # your own, labels not needed
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

from common import (BACKBONES, Clips, FlowEstimator, Log, MomentumContrast, Queue, ResNet3D, RunConfig, StopSignal,
                    UserError, all_reduce_mean, blur, colour_jitter, cosine_lr, draw_box, eagerly, example_clips,
                    find_videos, flip, flow_picture, init_linear, item_frames, loader, make_backbone, make_optimizer,
                    normalize, open_run, plan_run, random_resized_crop, read_views, resume_or_init, run,
                    save_checkpoint, save_sheet, setup, spatial_gradient, step_batches, to_device, to_float01,
                    wrap_model)


# ---- 1. Config -----------------------------------------------------------------------------------------------------
# Defaults are for Kinetics-400; the released defaults where there are any.

@dataclass
class Config(RunConfig):
    backbone: Literal[BACKBONES] = "slow_r50"  # the network of RGB
    width: float = 1.0                 # channels relative to the published network: slow_r50, r2plus1d_50, in (0, 8]
    image_size: int = 224              # side of the crop in pixels
    frames: int = 8                    # RGB frames of a clip
    stride: int = 8                    # video frames from one RGB frame to the next; a multiple of --motion-stride
    motion_frames: int = 16            # motion maps of a clip, over the same span
    motion_stride: int = 4             # video frames from one motion map to the next
    fps: float = 30.0                  # frame rate that strides are meant for; 0 = that of each video
    flow: Literal["raft_small", "raft_large", "tvl1"] = "raft_small"  # optical flow
    raft_weights: str = ""             # file with torchvision's RAFT weights; default: download
    flow_updates: int = 6              # refinement steps of RAFT
    motion_input: Literal["flow_edge", "flow", "frame_diff"] = "flow_edge"  # of the motion network
    edge_clip: float = 1.0             # flow edges are cut there, in pixels per pixel, in (0, 1e9]
    cross_weight: float = 1.0          # of the cross-modal losses; 0 = MoCo, without a motion network
    motion_motion: bool = False        # also pull the motion features of two moments together
    min_shift: float = 0.5             # seconds between the two moments, at least
    max_shift: float = 10.0            # at most
    min_crop: float = 0.2              # smallest area of a crop, in (0, 1]
    max_crop: float = 0.766            # largest area of a crop, in (0, 1]
    flip: float = 0.5                  # probability of mirroring a clip, in [0, 1]; 0 where left and right are classes
    colour: float = 1.0                # strength of colour jitter and frequency of grey clips; 1 = published for MoCo
    queue: int = 65536                 # keys of earlier clips to tell apart from, per modality
    momentum: float = 0.999            # of the key encoders, in [0, 1]
    temperature: float = 0.1           # of the similarities, in (0, 1e9]
    epochs: int = 200                  # passes over the videos
    batch: int = 64                    # videos per step, over all GPUs and accumulation; --repeats of each
    device_batch: int = 64             # videos per GPU and forward pass: as many as fit
    repeats: int = 1                   # pairs cut from each video that is opened
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd (Nesterov momentum 0.9), adamw (betas 0.9 and 0.95)
    lr: float = 0.4                    # per 256 videos of the batch
    min_lr: float = 0.0                # per 256 videos, at the end
    warmup_epochs: float = 35          # linear from a hundredth of the rate
    weight_decay: float = 1e-4         # not of vectors, in [0, 1]
    preview_every: int = 1000          # steps between pictures


RECIPES = {   # all but k400 are our choice
    "k400": {},                                      # the defaults above, see 5
    "ucf101": dict(queue=4096),
    "hmdb51": dict(queue=2048),
    "ssv2": dict(flip=0.0), "epic": {},
    # what a ViT gets instead of SGD, unless the recipe says otherwise; rates as in https://arxiv.org/abs/2104.02057
    "vit": dict(optimizer="adamw", lr=1.5e-4, weight_decay=0.1, warmup_epochs=40),
    # some hundred videos; for large data the defaults: --queue 65536 --momentum 0.999 --batch 64 --epochs 200
    # --warmup-epochs 35 --image-size 224
    "custom": dict(image_size=112, queue=512, momentum=0.99, epochs=100, batch=8, warmup_epochs=1, workers=2,
                   log_every=1, save_every=50, preview_every=50),
    "custom vit": dict(lr=8e-3, weight_decay=0.05),                                      # for batches of 8 to 32
    # about two minutes of CPU time
    "toy": dict(width=0.25, image_size=64, frames=8, stride=2, motion_frames=8, motion_stride=2, fps=0.0,
                flow="tvl1", edge_clip=0.5, min_shift=0.0, max_shift=0.2, min_crop=1.0, max_crop=1.0, flip=0.0,
                queue=32, momentum=0.99, epochs=2, batch=16, optimizer="adamw", lr=0.03,
                warmup_epochs=1, weight_decay=0.05, workers=2, log_every=8, save_every=100, preview_every=100),
}


# ---- 2. Motion input -----------------------------------------------------------------------------------------------

def flow_edges(flow, clip=1.0):
    """Where flow changes: flow (B, T-1, 2, h, w) in pixels -> (B, T-1, h, w) in [0, 1], 1 from `clip` on.

    The norm of the four derivatives of its components, by Sobel, in pixels per pixel: 0 under translation, omega
    sqrt(2) under rotation by omega.  Source: MoDist; the formula is our choice, see 1. above.
    """
    edges = spatial_gradient(flow, middle=2).square().sum((-4, -3)).sqrt()      # over x, y of u, v
    return (edges / clip).clamp(max=1)


def motion_maps(clips, flow, kind="flow_edge", clip=1.0):
    """Clips (B, 3, T, H, W) uint8 or in [0, 1], flow: a FlowEstimator -> the motion network's input (B, 3, T-1, h, w).

    kind   flow_edge: flow_edges, three times over, cut at `clip`
           flow: the flow's two components and length, over an eleventh of the width (20 px of 224), cut at -1 and 1
           frame_diff: |difference| of neighbouring frames, mean over colours, three times over; needs no flow
    """
    if kind == "frame_diff":
        maps = to_float01(clips).diff(dim=2).abs().mean(1)                      # (B, T-1, H, W)
    else:
        field = flow(clips)                                                     # (B, T-1, 2, h, w)
        if kind == "flow":
            u, v = field.unbind(2)
            return (torch.stack([u, v, torch.hypot(u, v)], 1) / (field.shape[-1] / 11)).clamp(-1, 1)
        maps = flow_edges(field, clip)
    return maps[:, None].expand(-1, 3, -1, -1, -1)


# ---- 3. Loss and model ---------------------------------------------------------------------------------------------

def info_nce(query, key, negatives, temperature):
    """-log of the share of the own key in the softmax over it and all negatives: query, key (B, D) and negatives
    (K, D), all of length 1 -> scalar."""
    own, other = (query * key).sum(1) / temperature, query @ negatives.T / temperature     # (B,), (B, K)
    return F.softplus(other.logsumexp(1) - own).mean()              # = -log(e^own / (e^own + sum e^other))


def top1(query, key):
    """How often (%) the own key is the most similar one: query, key (B, D)."""
    own = torch.arange(len(query), device=query.device)
    return 100 * ((query.detach() @ key.T).argmax(1) == own).float().mean()


def projection(dim, hidden=2048, outputs=128):
    """Two linear layers; init N(0, .01) as released."""
    head = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    init_linear(head, nn.init.normal_, std=0.01)
    return head


class MoDist(MomentumContrast):
    """Clips (2 B, 3, F, H, W) uint8, two moments of each video in turn, RGB v1, v2, motion m1, m2 -> loss = NCE(v1, v2)
    + cross_weight (NCE(v1, m2) + NCE(m1, v2)); stats: its terms, how often (%) v2 is v1's (m1's) nearest in the batch.

    encoder       of RGB: every `rgb_step`-th of the first F - 1 frames
    motion        of the F - 1 motion maps, or None = MoCo
    motion_input  see motion_maps
    """

    def __init__(self, encoder, motion, flow, rgb_step=2, motion_input="flow_edge", edge_clip=1.0, cross_weight=1.0,
                 motion_motion=False, flip=0.5, colour=1.0, queue=65536, momentum=0.999, temperature=0.1,
                 outputs=128):
        super().__init__(momentum)
        networks = dict(encoder=encoder, head=projection(encoder.dim, outputs=outputs))
        if motion is not None:
            networks |= dict(motion=motion, motion_head=projection(motion.dim, outputs=outputs))
            self.motion_queue = Queue(queue, outputs)
        for name, network in networks.items():
            self.add_module(name, network)
        self.keys = copy.deepcopy(nn.ModuleDict(networks)).requires_grad_(False)
        self.queue, self.flow = Queue(queue, outputs), flow
        self.rgb_step, self.motion_input, self.edge_clip, self.flip = rgb_step, motion_input, edge_clip, flip
        self.cross_weight, self.motion_motion, self.colour = cross_weight, motion_motion, colour
        self.temperature = temperature

    def inputs(self, clips, generator=None):
        """The two moments for the networks: RGB (B, 3, T, H, W) each, motion maps (B, 3, F - 1, h, w) each or None."""
        first, second = clips.contiguous().unflatten(0, (-1, 2)).unbind(1)
        first, second = (flip(x, generator, self.flip)[0] for x in (first, second))
        c = self.colour
        strengths = dict(brightness=0.6 * c, contrast=0.6 * c, saturation=0.6 * c, hue=0.15 * c, grey=0.2 * c)
        rgb = [to_float01(x[:, :, :-1:self.rgb_step]) for x in (first, second)]
        rgb = [normalize(blur(colour_jitter(x, generator, **strengths), generator), self.encoder.config) for x in rgb]
        if not hasattr(self, "motion"):
            return rgb, (None, None)
        maps = motion_maps(torch.cat([first, second]), self.flow, self.motion_input, self.edge_clip)
        return rgb, maps.chunk(2)

    def forward(self, clips, generator=None):
        with torch.no_grad(), torch.autocast(clips.device.type, enabled=False):
            (v1, v2), (m1, m2) = self.inputs(clips, generator)

        def embed(network, head, x):
            return F.normalize(head(network(x)).float(), dim=1)                 # (B, outputs)
        zv = embed(self.encoder, self.head, v1)
        zm = None if m1 is None else embed(self.motion, self.motion_head, m1)
        with torch.no_grad():
            self.keys.eval()                                                    # running statistics, see 4. above
            kv = embed(self.keys["encoder"], self.keys["head"], v2)
            km = None if m2 is None else embed(self.keys["motion"], self.keys["motion_head"], m2)
        with torch.autocast(clips.device.type, enabled=False):                  # bf16 would not tell similarities apart
            Qv, T = self.queue.keys.clone(), self.temperature                   # as they are now, for backward
            loss = rgb = info_nce(zv, kv, Qv, T)
            stats = dict(rgb=rgb, top1=top1(zv, kv))
            if zm is not None:
                Qm = self.motion_queue.keys.clone()
                cross = info_nce(zv, km, Qm, T) + info_nce(zm, kv, Qv, T)       # RGB -> motion, motion -> RGB
                loss = loss + self.cross_weight * cross
                stats |= dict(cross=cross, cross_top1=top1(zm, kv))
                if self.motion_motion:
                    stats["motion"] = info_nce(zm, km, Qm, T)
                    loss = loss + stats["motion"]
                self.motion_queue.enqueue(km)
            self.queue.enqueue(kv)                                              # after all losses
        return loss, {name: value.detach() for name, value in stats.items()}


# ---- 4. Preview ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def preview(model, clips, path):
    """Write what the method sees in clips (2 B, 3, F, H, W) uint8, a row for each video: its first moment's RGB at
    start and end, flow and what the motion network sees of it at the middle, and the sum of all of that; then the
    three second moments whose RGB is most similar to it, best first, the own one framed."""
    model.eval()
    first, second = clips.unflatten(0, (-1, 2)).unbind(1)
    rgb = [to_float01(x[:, :, :-1:model.rgb_step]) for x in (first, second)]
    visual, keys = [normalize(x, model.encoder.config) for x in rgb], model.keys
    columns, middle = [rgb[0][:, :, 0], rgb[0][:, :, -1]], first.shape[2] // 2              # each (B, 3, H, W)
    if hasattr(model, "motion"):
        maps = motion_maps(first, model.flow, model.motion_input, model.edge_clip)          # (B, 3, F - 1, h, w)
        if model.motion_input != "frame_diff":
            flow = model.flow(first)[:, middle]                                             # (B, 2, h, w)
            columns.append(torch.cat([flow_picture(x) for x in flow.split(1)]))             # each to its own scale
        total = maps.abs().sum(2)
        columns += [maps[:, :, middle].abs(), total / total.amax((1, 2, 3), keepdim=True).clamp(min=1e-6)]
        query = model.motion_head(model.motion(maps))
    else:
        query = model.head(model.encoder(visual[0]))
    found = F.normalize(keys["head"](keys["encoder"](visual[1])), dim=1)
    best = (F.normalize(query, dim=1) @ found.T).argsort(1, descending=True).cpu()          # (B, B)
    frames = rgb[1][:, :, rgb[1].shape[2] // 2].cpu()                                       # (B, 3, H, W)
    H, W = frames.shape[-2:]
    framed = draw_box(frames, torch.tensor([0, 0, W - 1, H - 1]))
    for match in best[:, :3].T:                                                             # (B,) of each place
        own = match == torch.arange(len(match))
        columns.append(torch.where(own[:, None, None, None], framed[match], frames[match]))
    save_sheet(path, torch.stack([F.interpolate(x.cpu(), (H, W)) for x in columns], 1))
    model.train()


# ---- 5. Train ------------------------------------------------------------------------------------------------------

# Feichtenhofer et al.: the rate lies on the cosine over all epochs, up to which warm-up leads from .001, of .1.
cosine_lr = partial(cosine_lr, start=0.01, whole=True)


def two_starts(room, fps, rng, least=0.5, most=10.0):
    """First frames, from 0 to `room`, of two clips of a video, in random order: `least` to `most` seconds apart, or as
    far as `room` (in frames) allows.  Source: the released default settings."""
    least, most = math.ceil(least * fps), math.floor(most * fps)
    shift = int(rng.integers(min(least, room), min(max(least, most), room), endpoint=True))
    start = int(rng.integers(room - shift, endpoint=True))
    return rng.permutation([start, start + shift])


def sample_clips(video, item, rng, cfg):
    """cfg.repeats pairs of clips -> uint8 (2 repeats, motion_frames + 1, side, side, 3): every frame that the motion
    maps need, among them those of RGB; each clip has a crop of its own."""
    (first, last), fps = item_frames(video, item), video.info.fps
    steps = cfg.motion_stride * np.arange(cfg.motion_frames + 1)
    steps = (steps * fps / cfg.fps).round().astype(int) if cfg.fps else steps
    room = max(0, last - first - int(steps[-1]))
    starts = [start for _ in range(cfg.repeats)
              for start in two_starts(room, fps, rng, cfg.min_shift, cfg.max_shift)]
    indices = [np.minimum(first + start + steps, last) for start in starts]
    area = (cfg.min_crop, cfg.max_crop)
    crops = [random_resized_crop(video.info.height, video.info.width, rng, area) for _ in indices]
    return read_views(video, indices, crops, cfg.image_size)


def main(cfg):
    env = setup(cfg.seed)
    listing = find_videos(cfg.data, cfg.root, "train", toy=(cfg.toy_train, cfg.toy_test, cfg.toy_size))
    plan = plan_run(cfg, len(listing.items), env)
    if cfg.stride % cfg.motion_stride or cfg.frames * cfg.stride != cfg.motion_frames * cfg.motion_stride:
        raise UserError(f"--stride {cfg.stride} must be a multiple of --motion-stride {cfg.motion_stride}, --frames "
                        f"{cfg.frames} times the one be equal to --motion-frames {cfg.motion_frames} times the other")
    if cfg.min_shift > cfg.max_shift or cfg.min_crop > cfg.max_crop:
        raise UserError(f"--min-shift {cfg.min_shift} and --min-crop {cfg.min_crop} must not be above --max-shift "
                        f"{cfg.max_shift} and --max-crop {cfg.max_crop}")
    out, checkpoint = open_run("modist", cfg, env, listing, plan)

    encoder, motion, flow = make_backbone(cfg.backbone, cfg.image_size, cfg.frames, width=cfg.width), None, None
    if cfg.cross_weight or cfg.motion_motion:
        motion = ResNet3D("motion_r50", 1 / 8, cfg.image_size, cfg.motion_frames)
        if cfg.motion_input != "frame_diff":
            flow = FlowEstimator(cfg.flow, cfg.raft_weights, cfg.flow_updates, env.device, env.amp, cfg.compile)
    model = MoDist(encoder, motion, flow, cfg.stride // cfg.motion_stride, cfg.motion_input, cfg.edge_clip,
                   cfg.cross_weight, cfg.motion_motion, cfg.flip, cfg.colour, cfg.queue, cfg.momentum,
                   cfg.temperature).to(env.device)
    name = "nesterov" if cfg.optimizer == "sgd" else "adamw"
    optimizer = make_optimizer(name, model, plan.lr, cfg.weight_decay)
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
