"""FAME: foreground-background merging for contrastive video learning, in one file.   https://arxiv.org/abs/2109.15130

Contrastive learning (MoCo, https://arxiv.org/abs/1911.05722) pulls two clips of a video together and apart from those
of other videos.  What two clips of a video share most is their background, so that is what it learns.  FAME takes the
short cut away: it finds the moving foreground of one clip from frame differences and colours, without labels or
optical flow, and pastes it on another video's background.  Now only the foreground tells what belongs together.

    Paper                                             Code                  Section
    frame difference, seeds, colour posterior, mask   foreground_mask()     2
    merging with another clip's background            merge()               2
    InfoNCE                                           info_nce()            3
    MoCo on merged and plain clips, both ways         FAME                  3

Differs from the paper and its released code, and why
 1. The keys of both passes enter the queue after both.  The released code enqueues in between, so that each query of
    the second pass finds a key of its own clip among the negatives.
 2. Nobody gets its own background: partners are a random cycle through the batch.  A random permutation, as released,
    leaves one clip in B with its own, on average.
 3. The angle of a colour is its hue.  The released code multiplies the hue, in radians, by 2 pi once more:
    foreground_mask(..., hue_scale=2 * math.pi) does that, too.
 4. Keys are encoded with running instead of batch statistics, averaged over steps as the key encoder's weights are
    (Cai et al. 2021, https://arxiv.org/abs/2101.08482).  Batch statistics would tell which key was computed together
    with the query; MoCo shuffles clips across GPUs against that, which one GPU cannot.  This costs nothing, the
    released shuffling gathers all clips.  Batch norm of the queries is over all processes.
 5. The blur's width is drawn per clip (released: once per process).  Colour jitter is one affine map per clip,
    colours are normalised with ImageNet's mean and deviation (released: Kinetics'), or those of --init.  Both views
    go through the query encoder together.  On a GPU networks compute in bf16 (released: fp32).
 6. The schedule is a cosine (the released code's; the paper divides by 10 at epochs 120 and 180), per step instead
    of per epoch.  Videos shorter than a clip repeat their last frame; the two clips of a video may coincide.
 7. Unlike in a masked autoencoder, how a batch is spread matters: backgrounds come from clips of the same forward
    pass, batch norm sees one pass (of all GPUs), and with accumulation a pass finds the keys of the one before.
 8. I3D, the paper's other network, is not here; s3d is the nearest.

Run    python fame.py                                        # toy data; 2.2 minutes of CPU time
       torchrun --nproc_per_node=8 fame.py --data k400 --root DIR                                # not run by us
       python fame.py --data DIR_OF_VIDEOS                   # your own, labels not needed
"""
import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_

from common import (BACKBONES, Clips, Log, MomentumContrast, Queue, RunConfig, StopSignal, UserError, all_reduce_mean,
                    blur, clip_indices, colour_jitter, cosine_lr, eagerly, example_clips, find_videos, flip, loader,
                    make_backbone, make_optimizer, map_to_rgb, normalize, open_run, plan_run, rand,
                    random_resized_crop, read_views, resume_or_init, run, save_checkpoint, save_sheet, setup,
                    step_batches, to_device, to_float01, wrap_model)


# ---- 1. Config -----------------------------------------------------------------------------------------------------
# Defaults are the published pre-training on Kinetics-400 with R(2+1)D-18.

@dataclass
class Config(RunConfig):
    backbone: Literal[BACKBONES] = "r2plus1d_18"  # the network
    width: float = 1.0                 # channels relative to the published network: slow_r50, r2plus1d_50, in (0, 8]
    image_size: int = 112              # side of the crop in pixels
    frames: int = 16                   # frames of a clip, in [2, 1e9]
    stride: int = 2                    # video frames from one frame of the clip to the next
    min_crop: float = 0.2              # smallest area of a crop, in (0, 1]
    flip: float = 0.5                  # probability of mirroring a clip, in [0, 1]; 0 where left and right are classes
    colour: float = 1.0                # strength of colour jitter and frequency of grey clips; 1 = published
    merge: bool = True                 # paste foregrounds on other backgrounds; --no-merge = MoCo
    beta: float = 0.5                  # share of the frame that is foreground, in [0, 1]
    queue: int = 65536                 # keys of earlier clips to tell apart from
    momentum: float = 0.999            # of the key encoder, in [0, 1]
    temperature: float = 0.1           # of the similarities, in (0, 1e9]
    epochs: int = 200                  # passes over the videos
    batch: int = 64                    # videos per step, over all GPUs and accumulation; --repeats of each
    device_batch: int = 64             # videos per GPU and forward pass: as many as fit
    repeats: int = 1                   # pairs cut from each video that is opened; they may swap backgrounds
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd (momentum 0.9), adamw (betas 0.9 and 0.95)
    lr: float = 0.04                   # per 256 videos of the batch
    min_lr: float = 0.0                # per 256 videos, at the end
    warmup_epochs: float = 0           # linear from 0
    weight_decay: float = 1e-4         # sgd: of everything, adamw: not of vectors, in [0, 1]
    preview_every: int = 1000          # steps between pictures


RECIPES = {
    "k400": {},                                      # the defaults above
    "ucf101": dict(queue=2048),                      # the released code's queue; published with I3D only
    # our choice from here on
    "ssv2": dict(flip=0.0), "epic": {},
    "hmdb51": dict(queue=2048),
    # what a ViT gets instead of SGD, unless the recipe says otherwise; rates as in https://arxiv.org/abs/2104.02057
    "vit": dict(optimizer="adamw", lr=1.5e-4, weight_decay=0.1, warmup_epochs=40),
    # some hundred videos; for large data the published --queue 65536 --momentum 0.999 --batch 64 --epochs 200
    "custom": dict(queue=512, momentum=0.99, epochs=100, batch=16, workers=2, log_every=1, save_every=50,
                   preview_every=50),
    "custom vit": dict(lr=8e-3, weight_decay=0.05, warmup_epochs=1),                     # for batches of 16 to 32
    # about two minutes of CPU time
    "toy": dict(backbone="vit_tiny", image_size=64, frames=8, min_crop=1.0, flip=0.0, colour=0.3, beta=0.3,
                queue=256, momentum=0.99, epochs=7, batch=32, lr=8e-3, warmup_epochs=1, weight_decay=0.05, workers=2,
                log_every=10, save_every=100, preview_every=100, toy_train=768),
}


# ---- 2. Foreground -------------------------------------------------------------------------------------------------

def frame_difference(clips01):
    """Clips (B, 3, T, H, W) -> (B, H, W): |change from frame to frame|, summed over colours, mean over time."""
    return clips01.diff(dim=2).abs().sum(1).mean(1)


def spread(maps):
    """Gaussian blur of maps (B, H, W), kernel a tenth of the width wide, sigma a third of that, border reflected;
    then each map is shifted and scaled to [0, 1]."""
    reach = int(0.1 * min(maps.shape[1:])) // 2
    sigma = (2 * reach + 1) / 3
    kernel = torch.exp(-torch.arange(-reach, reach + 1, device=maps.device) ** 2 / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    maps = F.pad(maps[:, None], (reach,) * 4, mode="reflect")
    maps = F.conv2d(F.conv2d(maps, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[:, 0]
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (maps.amax((1, 2), keepdim=True) + 1e-8)


def colour_bins(images, hue_scale=1.0):
    """Images (B, 3, H, W) in [0, 1] -> bins (B, H W) in [1, 1000): the disc of hue (angle) and saturation (radius)
    in 10 x 10 squares, times 10 values."""
    r, g, b = images.flatten(2).unbind(1)                                       # each (B, H W)
    value, first = images.flatten(2).max(1)
    delta = value - images.flatten(2).amin(1)
    sector = torch.stack([g - b, b - r, r - g], 1).gather(1, first[:, None])[:, 0] / delta.where(delta > 0, 1)
    hue = (sector + 2 * first) % 6 * math.pi / 3                                # in [0, 2 pi)
    saturation, angle = delta / (value + 1e-8), hue * hue_scale
    x, y = (saturation * angle.cos() + 1) / 2, (saturation * angle.sin() + 1) / 2
    x, y, z = ((9 * v + 1).round().long() for v in (x, y, value))               # 1 .. 10 each
    return x + 10 * (y - 1) + 100 * (z - 1)


def foreground_mask(clips01, beta=0.5, hue_scale=1.0):
    """What moves, and what has its colours: clips (B, 3, T, H, W) in [0, 1] -> mask (B, H, W), 1 in the int(beta H W)
    pixels where the soft map is largest and 0 elsewhere; the soft map (B, H, W) in [0, 1].

    The half of the frame with the largest differences is taken for foreground, the tenth with the smallest for
    background.  A pixel's colour (of the mean frame) then has a likelihood in each, from their colour histograms; the
    blurred posterior of foreground is the soft map.  Source: FAME 3.2.
    """
    B, _, _, H, W = clips01.shape
    seed = spread(frame_difference(clips01)).flatten(1)                         # (B, H W)
    bins = colour_bins(clips01.mean(2), hue_scale)                              # (B, H W)

    def histogram(pixels):
        return seed.new_zeros(B, 1000).scatter_add_(1, bins.gather(1, pixels), seed.new_ones(pixels.shape))
    foreground = seed.topk(int(0.5 * H * W)).indices
    background = seed.topk(int(0.1 * H * W), largest=False).indices
    p_foreground = histogram(foreground) / foreground.shape[1]                  # (B, 1000)
    p_background = (histogram(background) + 1) / (background.shape[1] + 1000)   # + 1: no colour is impossible
    posterior = (p_foreground / (p_foreground + p_background)).gather(1, bins)  # (B, H W)
    soft = spread(posterior.view(B, H, W))
    chosen = soft.flatten(1).topk(int(beta * H * W)).indices
    return torch.zeros_like(seed).scatter_(1, chosen, 1.0).view(B, H, W), soft


def merge(clips01, mask, permutation):
    """Keep clips (B, 3, T, H, W) where mask (B, H, W) is not 0, elsewhere show the clip that permutation (B,) names."""
    return torch.where(mask[:, None, None] > 0, clips01, clips01[permutation])


def derangement(count, generator=None, device="cpu"):
    """A random partner for each of `count` clips, never itself: the one before in a random cycle -> (count,)."""
    cycle = rand(count, generator=generator, device=device).argsort()
    return torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1))


# ---- 3. Loss and model ---------------------------------------------------------------------------------------------

def info_nce(query, key, negatives, temperature):
    """-log of the share of the own key in the softmax over it and all negatives: query, key (B, D) and negatives
    (K, D), all of length 1 -> scalar."""
    positive = (query * key).sum(1, keepdim=True)                               # (B, 1)
    logits = torch.cat([positive, query @ negatives.T], 1) / temperature        # (B, 1 + K)
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


class FAME(MomentumContrast):
    """MoCo whose view 1 is merged: clips (2 B, 3, T, H, W) uint8, the two views of each video in turn -> loss =
    (NCE(q1, k2) + NCE(q2, k1)) / 2, stats: similarity of q1 and k2, how often (%) k2 is q1's nearest in the batch."""

    def __init__(self, encoder, merge=True, beta=0.5, flip=0.5, colour=1.0, queue=65536, momentum=0.999,
                 temperature=0.1, outputs=128):
        super().__init__(momentum)
        self.encoder = encoder
        self.head = nn.Sequential(nn.Linear(encoder.dim, encoder.dim), nn.ReLU(), nn.Linear(encoder.dim, outputs))
        self.keys = copy.deepcopy(nn.ModuleDict(dict(encoder=encoder, head=self.head))).requires_grad_(False)
        self.queue = Queue(queue, outputs)
        self.merge, self.beta, self.flip, self.colour, self.temperature = merge, beta, flip, colour, temperature

    def views(self, clips, generator=None):
        """The two views of each video as the network gets them, (B, 3, T, H, W) each."""
        first, second = to_float01(clips).contiguous().unflatten(0, (-1, 2)).unbind(1)
        first, second = (flip(x, generator, self.flip)[0] for x in (first, second))
        if self.merge:
            mask, _ = foreground_mask(first, self.beta)
            first = merge(first, mask, derangement(len(first), generator, clips.device))
        c = self.colour
        strengths = dict(brightness=0.4 * c, contrast=0.4 * c, saturation=0.4 * c, hue=0.1 * c, grey=0.2 * c)
        return [normalize(blur(colour_jitter(x, generator, **strengths), generator), self.encoder.config)
                for x in (first, second)]

    def forward(self, clips, generator=None):
        with torch.no_grad(), torch.autocast(clips.device.type, enabled=False):  # colours want fp32
            views = torch.cat(self.views(clips, generator))                     # (2 B, 3, T, H, W), first views first
        query = F.normalize(self.head(self.encoder(views)).float(), dim=1)      # (2 B, D)
        with torch.no_grad():
            self.keys.eval()                                                    # running statistics, see 4. above
            key = F.normalize(self.keys["head"](self.keys["encoder"](views)).float(), dim=1)
        (q1, q2), (k1, k2) = query.chunk(2), key.chunk(2)
        negatives = self.queue.keys.clone()                                     # as it is now, for backward
        with torch.autocast(clips.device.type, enabled=False):
            loss = (info_nce(q1, k2, negatives, self.temperature) + info_nce(q2, k1, negatives, self.temperature)) / 2
            near = q1.detach() @ k2.T                                           # (B, B): merged clips against plain
        self.queue.enqueue(k2)
        self.queue.enqueue(k1)
        own = torch.arange(len(near), device=near.device)
        return loss, dict(similarity=near.diagonal().mean(), top1=100 * (near.argmax(1) == own).float().mean())


# ---- 4. Preview ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def preview(model, clips, path):
    """Write what the method sees in clips (2 B, 3, T, H, W) uint8, a row for the first view of each video: its first
    frame, frame difference, soft map, mask, the clip whose background it gets, the merged clip at three moments."""
    clips = to_float01(clips)[::2]
    mask, soft = foreground_mask(clips, model.beta)
    maps = [map_to_rgb(x) for x in (frame_difference(clips), soft, mask)]       # each (B, 3, H, W)
    partner = torch.arange(len(clips), device=clips.device).roll(1)
    merged = merge(clips, mask, partner).cpu()
    moments = [merged[:, :, t] for t in (0, merged.shape[2] // 2, -1)]
    first = clips[:, :, 0].cpu()
    save_sheet(path, torch.stack([first, *maps, first[partner.cpu()], *moments], 1))        # (B, 8, 3, H, W)


# ---- 5. Train ------------------------------------------------------------------------------------------------------

def sample_clips(video, item, rng, cfg):
    """cfg.repeats pairs of random clips, each with a crop of its own -> uint8 (2 repeats, frames, side, side, 3)."""
    indices = [clip_indices(video, item, cfg.frames, cfg.stride, rng) for _ in range(2 * cfg.repeats)]
    crops = [random_resized_crop(video.info.height, video.info.width, rng, (cfg.min_crop, 1)) for _ in indices]
    return read_views(video, indices, crops, cfg.image_size)


def main(cfg):
    env = setup(cfg.seed)
    listing = find_videos(cfg.data, cfg.root, "train", toy=(cfg.toy_train, cfg.toy_test, cfg.toy_size))
    plan = plan_run(cfg, len(listing.items), env)
    if cfg.merge and plan.micro < 2:
        raise UserError("one pair per forward pass, so there is no other background: raise --device-batch or --batch")
    out, checkpoint = open_run("fame", cfg, env, listing, plan)

    encoder = make_backbone(cfg.backbone, cfg.image_size, cfg.frames, width=cfg.width)
    model = FAME(encoder, cfg.merge, cfg.beta, cfg.flip, cfg.colour, cfg.queue, cfg.momentum,
                 cfg.temperature).to(env.device)
    optimizer = make_optimizer(cfg.optimizer, model, plan.lr, cfg.weight_decay)
    optimizer.register_step_post_hook(lambda *_: model.update_keys())
    dataset = Clips(listing.items, partial(sample_clips, cfg=cfg), cfg.seed)
    examples, flow = example_clips(dataset), None                              # no optical flow here

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
