"""MOFO: motion-focused masked autoencoding of videos, in one file.   https://arxiv.org/abs/2308.12447

A masked autoencoder (VideoMAE, https://arxiv.org/abs/2203.12602) hides 90 % of a clip and learns by painting it in
again.  Where it hides is left to chance, and in most videos most of the frame does not move.  MOFO finds the region
that moves from optical flow, without labels, and masks by it: a fixed share of the patches inside the motion box is
hidden, the rest of the 90 % comes from outside.

    Paper                                             Code                  Section
    motion map: flow edges, free of camera pans       motion_map()          2
    motion box: where the map's mass lies             motion_box()          2
    motion tube mask: 75 % inside, 90 % in all        motion_tube_mask()    3
    target: pixels, normalised per patch and colour   pixel_target()        4
    masked autoencoder and its loss                   MaskedAutoencoder     4
    all of it on one batch                            MOFO                  4

Differs from the paper, and why
 1. Flow is estimated in-line, on the very crop that the network sees, by RAFT instead of TV-L1: no offline pass over
    the data set, and the box needs no transforming.  `--flow tvl1` is the kind of estimator that MOFO has.
 2. Flow of one pair of frames per tubelet, --stride apart (released: of all neighbours), scaled to 128 pixels:
    flow costs most.  On 43 real clips such boxes overlap (IoU) by 0.80 with those of RAFT at 224 pixels and with 24
    updates; at 224 pixels and with 6 updates 0.89, but at three times the cost; with TV-L1 0.77.
 3. The motion map averages the flow over windows of 2 pairs (8 video frames at stride 2, as many as released, but
    not sliding), and the lengths of the gradients over the windows.  One sum over the clip would cancel what goes and
    returns.
 4. The box comes from the mass of the map along x and y instead of from contours (which do not batch), and over the
    sampled clip instead of the whole video.  The map's median is subtracted, so that a zoom of the camera, which has
    the same gradient everywhere, does not count; and below a floor there is no motion: the mask is uniform.
 5. A patch is inside if the box covers any of it (our choice).  The released code compares x with rows and y with
    columns, and never hides the last patches unless they are inside.
 6. A 75 % inside ratio *shows* more of the motion than VideoMAE's 90 %, and boxes over 41 % of the frame need more
    than 75 % to hide 90 % in all.  It is the published value, so it is the default; treat it as a setting to study.
    `--inside-ratio none` is VideoMAE, the baseline.  The batch is VideoMAE's, too (MOFO's README: 128).
 7. We train from scratch, on detected boxes, for the 800 epochs of MOFO's script.  Its released checkpoint of SSv2 has
    250, names of its runs tell of a start from VideoMAE, and its loader opens annotated boxes.

Run    python mofo.py                                        # toy data; 2.0 minutes of CPU time, loss 1.01 -> 0.81
       torchrun --nproc_per_node=8 mofo.py --data ssv2 --root DIR                                # not run by us
       python mofo.py --data DIR_OF_VIDEOS                   # your own, labels not needed
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_

from common import (Block, Clips, FlowEstimator, Log, RunConfig, StopSignal, UserError, VITS, ViT, all_reduce_mean,
                    clip_indices, cosine_lr, draw_box, eagerly, example_clips, find_videos, flow_picture, init_linear,
                    loader, make_optimizer, map_to_rgb, normalize, open_run, patchify, plan_run, rand, read_views,
                    resume_or_init, run, save_checkpoint, save_sheet, setup, sincos_positions, spatial_gradient,
                    step_batches, to_device, to_float01, unnormalize, unpatchify, wrap_model)


# ---- 1. Config -----------------------------------------------------------------------------------------------------
# Defaults are the published pre-training on Something-Something v2 (VideoMAE's, with MOFO's mask).

@dataclass
class Config(RunConfig):
    model: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"] = "vit_base"  # the encoder
    image_size: int = 224              # side of the crop in pixels
    frames: int = 16                   # frames of a clip
    stride: int = 2                    # video frames from one frame of the clip to the next
    patch_size: int = 16               # side of a patch in pixels
    tubelet_size: int = 2              # frames of a token, in [2, 1e9]
    min_crop: float = 0.66             # smallest side of a crop relative to the frame's short side, in (0, 1]
    mask_ratio: float = 0.9            # share of the patches that is hidden, in (0, 1)
    inside_ratio: float | None = 0.75  # share of the patches in the box that is hidden, in [0, 1]; none: VideoMAE
    flow: Literal["raft_small", "raft_large", "tvl1"] = "raft_small"  # optical flow
    raft_weights: str = ""             # file with torchvision's RAFT state dict; default: download
    flow_updates: int = 6              # refinement steps of RAFT
    flow_size: int = 128               # largest side of the frames that flow sees; RAFT takes at least 128
    epochs: int = 800                  # passes over the videos
    batch: int = 2048                  # videos per step, over all GPUs and accumulation; --repeats of each
    device_batch: int = 64             # videos per GPU and forward pass: as many as fit
    repeats: int = 1                   # clips cut from each video that is opened
    lr: float = 1.5e-4                 # per 256 videos of the batch
    min_lr: float = 1e-5               # per 256 videos, at the end
    warmup_epochs: float = 40.0        # linear from 0
    weight_decay: float = 0.05         # AdamW, betas 0.9 and 0.95, in [0, 1]
    preview_every: int = 1000          # steps between pictures


RECIPES = {
    "ssv2": {},                                      # the defaults above; the epochs: see 7
    "epic": {},                                      # MOFO trains Epic as SSv2
    "k400": dict(stride=4),                          # VideoMAE's Kinetics run
    # VideoMAE's UCF101 run; its batch is not in our sources, 256 is our choice
    "ucf101": dict(stride=4, mask_ratio=0.75, lr=3e-4, epochs=3200, batch=256),
    "hmdb51": dict(stride=4, mask_ratio=0.75, lr=3e-4, epochs=3200, batch=256),          # as UCF101 (our choice)
    # our choice: some hundred videos on any machine (without a GPU say --flow tvl1, too).  For large data and GPUs:
    # --model vit_base --image-size 224 --batch 2048 --epochs 800 --lr 1.5e-4 --min-lr 1e-5 --warmup-epochs 40
    "custom": dict(model="vit_small", image_size=112, batch=16, epochs=100, lr=0.024, min_lr=0.0, warmup_epochs=1,
                   workers=2, log_every=1, save_every=50, preview_every=50),
    # our choice: about two minutes of CPU time
    "toy": dict(model="vit_tiny", image_size=64, frames=8, stride=2, patch_size=8, min_crop=1.0, mask_ratio=0.75,
                inside_ratio=0.6, flow="tvl1", toy_train=640, epochs=4, batch=2, warmup_epochs=0.4, lr=0.32,
                min_lr=0.06, workers=2, log_every=32, save_every=256, preview_every=320),
}


# ---- 2. Motion -----------------------------------------------------------------------------------------------------

def motion_map(flow, window=2):
    """Motion, less the camera's pan: flow (B, F, 2, h, w) in pixels per frame -> map (B, h, w), its change per pixel.

    The flow is averaged over windows of `window` flows with its sign, so that jitter cancels; of each window the
    length of the spatial gradient is taken and averaged over the two components; then the mean over windows.  A pan
    has gradient 0; zoom and roll of the camera leave a constant.  A border of 8 of 224 pixels is 0: what a pan brings
    in has no flow.  Source: MOFO's motion map (itself MCL's), which sums where we average.
    """
    smooth = torch.stack([part.mean(1) for part in flow.split(window, 1)], 1)   # (B, windows, 2, h, w)
    length = spatial_gradient(smooth).square().sum(3).sqrt()                    # (B, windows, 2 components, h, w)
    (h, w), ring = flow.shape[-2:], min(flow.shape[-2:]) // 28
    return F.pad(length.mean((1, 2))[:, ring:h - ring, ring:w - ring], (ring,) * 4)


def motion_box(motion, image_size, blur=0.03, relative=0.15, floor=0.3, tail=0.01):
    """The region that moves: map (B, h, w) -> boxes (B, 4) in pixels of an image whose (H, W) or side is image_size,
    found (B,) bool.

    Our choice: the map is blurred (sigma = blur x its shorter side), its median is subtracted (what zoom, roll or
    noise leaves everywhere), and what is below `relative` x the maximum is cut; the box spans the columns and rows
    between the lowest and the highest `tail` of the mass that remains.  found is False, and the box 0, where the
    maximum is below what the edge of an object leaves that moves by `floor` pixels per frame along both axes, at 224.
    """
    h, w = motion.shape[-2:]
    H, W = (image_size, image_size) if isinstance(image_size, int) else image_size
    sigma = blur * min(h, w)
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1, device=motion.device) ** 2 / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)                          # blurs along x, transposed along y
    smooth = F.conv2d(F.conv2d(motion[:, None], kernel, padding="same"), kernel.mT, padding="same")[:, 0]
    smooth = (smooth - smooth.flatten(1).median(1).values[:, None, None]).clamp(min=0)
    peak = smooth.amax((1, 2))                                                  # (B,)
    jump = peak * math.sqrt(2 * math.pi) * sigma                                # of flow at an edge that blurs to peak
    found = jump > floor * min(h, w) / 224                                      # (B,)
    mass = torch.where(smooth >= relative * peak[:, None, None], smooth, 0.0)
    sides = []
    for total, scale in ((mass.sum(1), W / w), (mass.sum(2), H / h)):   # along x, along y
        below = total.cumsum(1) / total.sum(1, keepdim=True).clamp_min(1e-12)
        first, last = (below <= tail).sum(1), (below < 1 - tail).sum(1) + 1
        sides.append((first * scale, last * scale))
    (x1, x2), (y1, y2) = sides
    return torch.stack([x1, y1, x2, y2], 1) * found[:, None], found


def find_motion(estimator, clips, tubelet_size=2):
    """Clips (B, 3, T, H, W) -> flow (B, T', 2, h, w) between the first two frames of each tubelet, motion
    (B, h, w), boxes (B, 4), found (B,)."""
    tubelets = clips.unflatten(2, (-1, tubelet_size)).transpose(1, 2)                       # (B, T', 3, t, H, W)
    pairs = tubelets[:, :, :, :2].flatten(0, 1)                                             # (B T', 3, 2, H, W)
    flow = estimator(pairs).unflatten(0, (len(clips), -1))[:, :, 0]                         # (B, T', 2, h, w)
    with torch.autocast(clips.device.type, enabled=False):                                  # in bf16 a pan has edges
        motion = motion_map(flow)
        boxes, found = motion_box(motion, clips.shape[-2:])
    return flow, motion, boxes, found


# ---- 3. Mask -------------------------------------------------------------------------------------------------------

def motion_tube_mask(boxes, found, grid, ratio, inside_ratio, generator=None, patch_size=16):
    """Hide `inside_ratio` of the patches in the box and `ratio` of all, the same at all times -> hidden (B, N) bool.

    boxes (B, 4) in pixels, found (B,) bool, grid (T', H', W') tokens.  Each clip gets exactly K = int(ratio * H' W')
    hidden patches per time, which bounds the share inside: with n_in patches inside and n_out outside,
        m_in = clamp(floor(inside_ratio * n_in), max(0, K - n_out), min(n_in, K))
    are hidden inside, at random, and K - m_in outside.  A patch is inside if the box covers any of it.  Without a
    box, or with inside_ratio None, the mask is uniform over the patches (VideoMAE's tube mask).
    """
    T, H, W = grid
    x1, y1, x2, y2 = (side[:, None] for side in boxes.unbind(1))                # each (B, 1)
    top, left = (torch.arange(n, device=boxes.device) * patch_size for n in (H, W))
    rows = (top < y2) & (top + patch_size > y1) & (y1 < y2)                     # (B, H')
    columns = (left < x2) & (left + patch_size > x1) & (x1 < x2)                # (B, W')
    inside = (rows[:, :, None] & columns[:, None]).flatten(1)                   # (B, H'W')
    inside = inside & found[:, None] & (inside_ratio is not None)
    K, n_in = int(ratio * H * W), inside.sum(1)
    m_in = ((inside_ratio or 0.0) * n_in.double()).floor().long()
    m_in = torch.minimum(torch.maximum(m_in, K - (H * W - n_in)), n_in.clamp(max=K)).clamp(min=0)
    noise = rand(len(boxes), H * W, generator=generator, device=boxes.device)
    rank_in = (noise + ~inside).argsort(1).argsort(1)                           # inside first, shuffled
    rank_out = (noise + inside).argsort(1).argsort(1)                           # outside first, shuffled
    hidden = torch.where(inside, rank_in < m_in[:, None], rank_out < K - m_in[:, None])    # (B, H'W')
    return hidden.repeat(1, T)


# ---- 4. Target and model -------------------------------------------------------------------------------------------

def pixel_target(clips01, patch_size, tubelet_size):
    """What is predicted: clips (B, 3, T, H, W) in [0, 1] -> (B, N, D), minus the mean and over the standard deviation
    (unbiased, + 1e-6) of each patch and colour, colour fastest."""
    patches = patchify(clips01, patch_size, tubelet_size).unflatten(-1, (3, -1))            # (B, N, 3, D / 3)
    centred = patches - patches.mean(-1, keepdim=True)
    std = (centred.square().sum(-1, keepdim=True) / (patches.shape[-1] - 1)).sqrt()          # torch.std: 6 times slower
    return (centred / (std + 1e-6)).transpose(-1, -2).flatten(2)


class Decoder(nn.Module):
    """VideoMAE's decoder: blocks, norm, linear head; (B, N, dim) -> (B, last, outputs) for the last tokens.  With
    outputs = 0 there is no head: (B, last, dim)."""

    def __init__(self, dim, depth, heads, outputs=0):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, outputs) if outputs else nn.Identity()

    def forward(self, x, last):
        return self.head(self.norm(self.blocks(x)[:, -last:]))


class MaskedAutoencoder(nn.Module):
    """VideoMAE: encode the visible tokens, decode all of them, compare the hidden ones with the pixels.

    State-dict names are those of the public VideoMAE pre-training checkpoints.  With `outputs`, name -> size of a
    token's target, the pixels' linear head is replaced by one head of two layers for each (MME).
    """

    def __init__(self, image_size, frames, patch_size, tubelet_size, dim, depth, heads,
                 decoder_dim, decoder_depth, decoder_heads, outputs={}, **more):
        super().__init__()
        self.encoder = ViT(image_size, frames, patch_size, tubelet_size, dim, depth, heads, **more)
        self.encoder_to_decoder = nn.Linear(dim, decoder_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        pixels = 0 if outputs else 3 * tubelet_size * patch_size**2
        self.decoder = Decoder(decoder_dim, decoder_depth, decoder_heads, pixels)
        self.heads = nn.ModuleDict({name: nn.Sequential(nn.Linear(decoder_dim, 512), nn.GELU(), nn.Linear(512, size))
                                    for name, size in outputs.items()})
        self.register_buffer("positions", sincos_positions(math.prod(self.encoder.grid), decoder_dim), persistent=False)
        for part in (self.encoder, self.decoder, self.heads):                   # not encoder_to_decoder (VideoMAE)
            init_linear(part, nn.init.xavier_uniform_)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def predict(self, clips, hidden, count=None):
        """Clips (B, 3, T, H, W), normalised, hidden (B, N), as many per clip -> prediction of the hidden tokens
        (B, N_hidden, D), and their indices among the N, masked (B, N_hidden).

        count is N_hidden where the caller knows it; asking the GPU would make the host wait.
        """
        p, t = self.encoder.patch_size, self.encoder.tubelet_size
        count = count or int(hidden[0].sum())
        order = hidden.byte().argsort(dim=1, stable=True)                       # visible tokens, then hidden ones
        visible, masked = order[:, :-count], order[:, -count:]                  # (B, N_visible), (B, N_hidden)
        z = self.encoder.tokens(patchify(clips, p, t), visible)                 # (B, N_visible, dim)
        p_visible, p_masked = (self.positions.take_along_dim(index[..., None], 1) for index in (visible, masked))
        z = torch.cat([self.encoder_to_decoder(z) + p_visible, self.mask_token + p_masked], 1)  # (B, N, decoder_dim)
        return self.decoder(z, count), masked

    def forward(self, clips, hidden, count=None):
        """As `predict` -> prediction (B, N_hidden, D), loss: its mean squared distance from the pixel target."""
        prediction, masked = self.predict(clips, hidden, count)
        clips01 = unnormalize(clips, self.encoder.config)
        target = pixel_target(clips01, self.encoder.patch_size, self.encoder.tubelet_size)     # (B, N, D)
        return prediction, F.mse_loss(prediction.float(), target.take_along_dim(masked[..., None], 1))


class MOFO(MaskedAutoencoder):
    """Flow, motion box, motion tube mask, masked autoencoder: clips (B, 3, T, H, W) uint8 -> loss, stats."""

    def __init__(self, flow, mask_ratio, inside_ratio, **sizes):
        super().__init__(**sizes)
        T, H, W = self.encoder.grid
        self.count = T * int(mask_ratio * H * W)                                # hidden tokens of a clip
        if not 0 < self.count < T * H * W:
            raise UserError(f"--mask-ratio {mask_ratio}: must leave some of the {H * W} patches hidden, some visible")
        self.flow, self.mask_ratio, self.inside_ratio = flow, mask_ratio, inside_ratio

    @torch.no_grad()
    def mask(self, clips, generator=None):
        """Hidden (B, N) and what it comes from: flow (B, T', 2, h, w), motion (B, h, w), boxes (B, 4), found (B,).
        VideoMAE's mask needs no motion: the first two are None, and no box is found."""
        flow = motion = None
        boxes = torch.zeros(len(clips), 4, device=clips.device)
        found = boxes[:, 0] > 0
        if self.inside_ratio is not None:
            flow, motion, boxes, found = find_motion(self.flow, clips, self.encoder.tubelet_size)
        hidden = motion_tube_mask(boxes, found, self.encoder.grid, self.mask_ratio, self.inside_ratio, generator,
                                  self.encoder.patch_size)
        return hidden, flow, motion, boxes, found

    def forward(self, clips, generator=None):
        hidden, _, _, boxes, found = self.mask(clips, generator)
        _, loss = super().forward(normalize(clips, self.encoder.config), hidden, self.count)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1) / math.prod(clips.shape[-2:])          # (B,), 0 without a box
        return loss, dict(with_box=found.float().mean(), box_area=area.sum() / found.sum().clamp(min=1))


# ---- 5. Preview ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def preview(model, clips, path):
    """Write what the method sees in an even number of clips (B, 3, T, H, W) uint8, two side by side, five rows each.

    The rows: frames with the motion box, flow, motion map with the box (neither for VideoMAE), what the encoder sees,
    reconstruction (of hidden patches, each with its true mean and contrast, which the normalised target leaves open).
    """
    p, t, grid = model.encoder.patch_size, model.encoder.tubelet_size, model.encoder.grid
    generator = torch.Generator(clips.device).manual_seed(0)
    hidden, flow, motion, boxes, found = model.mask(clips, generator)
    prediction, _ = model.predict(normalize(clips, model.encoder.config), hidden)
    patches = patchify(to_float01(clips), p, t)                                             # (B, N, D)
    var, mean = torch.var_mean(patches.unflatten(-1, (3, -1)), -1, keepdim=True)            # (B, N, 3, 1)
    seen, painted = patches.masked_fill(hidden[..., None], 0.5), patches.clone()
    colours = prediction.float().unflatten(-1, (-1, 3)).transpose(-1, -2).flatten(0, 1)     # (B N_hidden, 3, D / 3)
    painted[hidden] = (colours * var[hidden].sqrt() + mean[hidden]).flatten(1).clamp(0, 1)
    views = (unpatchify(x, grid, p, t)[:, :, ::2 * t].transpose(1, 2).cpu() for x in (patches, seen, painted))
    frames, seen, painted = views                                       # of every second tubelet, (B, n, 3, H, W)
    rows = [frames, seen, painted]                                                          # each B x (n, 3, h, w)
    if flow is not None:
        maps = F.interpolate(map_to_rgb(motion), frames.shape[-2:])[:, None].expand_as(frames)
        frames, maps = ([draw_box(x, box) if has else x for x, box, has in zip(images, boxes, found)]
                        for images in (frames, maps))
        rows = [frames, [flow_picture(x) for x in flow[:, ::2]], maps, seen, painted]
    save_sheet(path, [torch.cat([row[i], row[i + 1]]) for i in range(0, len(clips), 2) for row in rows])


# ---- 6. Train ------------------------------------------------------------------------------------------------------

def multi_scale_crop(height, width, rng, smallest=0.66, snap=0):
    """A random box (x1, y1, x2, y2) inside a (height, width) frame: VideoMAE's multi-scale crop.

    Both sides are drawn from 1, .875, .75, ... and `smallest` x the short side, at most one scale apart; the place is
    one of 13 fixed anchors.  A side within 2 px of `snap` becomes `snap` (no resampling).  Source: VideoMAE,
    pre-training transform, for its 1, .875, .75, .66; on from there in eighths (our choice).
    """
    short, ladder = min(height, width), (1.0, 0.875, 0.75, 0.66, 0.5, 0.375, 0.25, 0.125)
    sides = [int(short * scale) for scale in (*(s for s in ladder if s > smallest), smallest)]
    sides = [max(1, snap if abs(side - snap) < 3 and snap <= short else side) for side in sides]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    h, w = pairs[rng.integers(len(pairs))]
    anchors = (0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (1, 3), (3, 1), (3, 3)
    ax, ay = anchors[rng.integers(len(anchors))]
    x, y = ax * ((width - w) // 4), ay * ((height - h) // 4)
    return x, y, x + w, y + h


def sample_clips(video, item, rng, cfg):
    """cfg.repeats random clips of a video, each with a crop of its own -> uint8 (repeats, frames, side, side, 3)."""
    indices = [clip_indices(video, item, cfg.frames, cfg.stride, rng) for _ in range(cfg.repeats)]
    sides = video.info.height, video.info.width
    crops = [multi_scale_crop(*sides, rng, cfg.min_crop, cfg.image_size) for _ in indices]
    return read_views(video, indices, crops, cfg.image_size)


def main(cfg):
    env = setup(cfg.seed)
    listing = find_videos(cfg.data, cfg.root, "train", toy=(cfg.toy_train, cfg.toy_test, cfg.toy_size))
    plan = plan_run(cfg, len(listing.items), env)
    out, checkpoint = open_run("mofo", cfg, env, listing, plan)

    flow = None
    if cfg.inside_ratio is not None:
        flow = FlowEstimator(cfg.flow, cfg.raft_weights, cfg.flow_updates, env.device, env.amp, cfg.compile,
                             cfg.flow_size)
    model = MOFO(flow, cfg.mask_ratio, cfg.inside_ratio, image_size=cfg.image_size, frames=cfg.frames,
                 patch_size=cfg.patch_size, tubelet_size=cfg.tubelet_size, **VITS[cfg.model]).to(env.device)
    optimizer = make_optimizer("adamw", model, plan.lr, cfg.weight_decay)
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
