"""MME: masked motion encoding of videos, in one file.   https://arxiv.org/abs/2210.06096

A masked autoencoder (VideoMAE, https://arxiv.org/abs/2203.12602) that paints hidden pixels can live on appearance:
most of a hidden patch is there in the frame before.  MME asks for motion instead.  For every hidden token it predicts
how four points in it move over the next L video frames (position change), and how the picture around them looks along
the way (shape change, as histograms of oriented gradients).  The frames between those that the network sees supervise
it, too: what it must tell is finer in time than what it is shown.

    Paper                                              Code                  Section
    trajectories of points, chained flow               trajectories()        2
    z^p: position change, normalised in the token      position_target()     3
    z^s: HOG at the moving points                      hog(), shape_target() 3
    losses                                             position_loss(), shape_loss()   3
    masked autoencoder (VideoMAE's, from mofo.py)      MaskedAutoencoder     4
    two heads; all of it on one batch                  MME                   4

Differs from the paper and its released code, and why
 1. Flow is estimated in-line, on the very crop that the network sees, by RAFT: no offline pass, no archive of
    trajectories, and displacements are in pixels of the crop (released: Farneback's, after the frames are registered).
 2. Flow is float and read bilinearly.  The released code truncates it: what moves less than 1 pixel stands still.
 3. A pan of the camera needs no homography: the position target is the z-score of a token's four points, which
    removes what they have in common.  Our z-score has a noise floor, below which most of what zoom and roll leave
    in a token stays, too; without one it blows the flow's noise up to unit variance wherever nothing moves.
 4. The heads are linear at the end.  The released ones are tanh (targets reach 1.5) and sigmoid (HOG exceeds 1).
 5. The shape target follows the points.  The released script reads HOG of one fixed frame (`--target position`), and
    its code for the tracked version moves the points by 1/20 of their displacement.  The decoder is 384 wide for
    ViT-B, as the paper's FLOPs tell; the released script's is 192.
 6. HOG has no bias.  The released code draws a random one in every step, by accident; and it loses pixels whose
    gradient points exactly at the centre of a bin.
 7. A clip begins early enough for its trajectories.  Where a video is too short for that, its last frame is repeated:
    they stand still from there (released: clips as VideoMAE's, trajectories begin earlier).

Run    python mme.py                                         # toy data; 2.4 minutes of CPU time, loss 2.9 -> 2.2
       torchrun --nproc_per_node=8 mme.py --data ssv2 --root DIR                                 # not run by us
       python mme.py --data DIR_OF_VIDEOS                    # your own, labels not needed
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from common import (Clips, FlowEstimator, Log, RunConfig, StopSignal, UserError, VITS, all_reduce_mean, can_compile,
                    clip_indices, constant, cosine_lr, eagerly, example_clips, find_videos, loader, make_optimizer,
                    map_to_rgb, normalize, open_run, patchify, plan_run, rand, read_views, resize_flow, resume_or_init,
                    run, save_checkpoint, save_sheet, setup, step_batches, to_device, to_float01, unpatchify,
                    wrap_model)
from mofo import MaskedAutoencoder, multi_scale_crop, pixel_target


# ---- 1. Config -----------------------------------------------------------------------------------------------------
# Defaults are the paper's pre-training on Something-Something v2 (optimisation: its Kinetics-400 script).

@dataclass
class Config(RunConfig):
    model: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"] = "vit_base"  # the encoder
    image_size: int = 224              # side of the crop in pixels
    frames: int = 16                   # frames of a clip
    stride: int = 2                    # video frames from one frame of the clip to the next
    patch_size: int = 16               # side of a patch in pixels
    tubelet_size: int = 2              # frames of a token, in [2, 1e9]
    min_crop: float = 0.66             # smallest side of a crop relative to the frame's short side, in (0, 1]
    mask_ratio: float = 0.7            # share of the patches that is hidden, in (0, 1)
    target: Literal["trajectory", "position", "hog", "pixel"] = "trajectory"  # see MME
    length: int = 6                    # steps of a trajectory, in frames of the video
    flow: Literal["raft_small", "raft_large", "tvl1"] = "raft_small"  # optical flow
    raft_weights: str = ""             # file with torchvision's RAFT state dict; default: download
    flow_updates: int = 6              # refinement steps of RAFT
    epochs: int = 400                  # passes over the videos
    batch: int = 1024                  # videos per step, over all GPUs and accumulation; --repeats of each
    device_batch: int = 64             # videos per GPU and forward pass: as many as fit
    repeats: int = 1                   # clips cut from each video that is opened
    lr: float = 1.5e-4                 # per 256 videos of the batch
    min_lr: float = 1e-5               # per 256 videos, at the end
    warmup_epochs: float = 40.0        # linear from 0
    weight_decay: float = 0.05         # AdamW, betas 0.9 and 0.95, in [0, 1]
    preview_every: int = 1000          # steps between pictures


RECIPES = {
    "ssv2": {},                                      # the defaults above
    # the released script's; but its shape part stands still (--target position) and its decoder is half as wide
    "k400": dict(stride=4, length=4, epochs=1600),
    # our choice from here on: not published for MME
    "epic": {},
    "ucf101": dict(stride=4, length=4, lr=3e-4, epochs=3200, batch=256),  # VideoMAE's rate, stride, epochs
    "hmdb51": dict(stride=4, length=4, lr=3e-4, epochs=3200, batch=256),
    # our choice: some hundred videos on any machine (without a GPU say --flow tvl1, too).  For large data and GPUs:
    # --model vit_base --image-size 224 --batch 1024 --epochs 400 --lr 1.5e-4 --min-lr 1e-5 --warmup-epochs 40
    "custom": dict(model="vit_small", image_size=112, batch=16, epochs=100, lr=0.024, min_lr=0.0, warmup_epochs=1,
                   workers=2, log_every=1, save_every=50, preview_every=50),
    # about two minutes of CPU time
    "toy": dict(model="vit_tiny", image_size=64, frames=8, min_crop=1.0, flow="tvl1", toy_train=640, epochs=4, batch=8,
                warmup_epochs=0.4, lr=0.03, min_lr=0.003, workers=2, log_every=10, save_every=100, preview_every=256),
}


# ---- 2. Trajectories -----------------------------------------------------------------------------------------------

def grid_points(gh, gw, cell, device=None):
    """Centres (2, gh, gw) of cells of `cell` pixels, x before y; pixel i covers [i, i + 1)."""
    y, x = torch.meshgrid(torch.arange(gh, device=device), torch.arange(gw, device=device), indexing="ij")
    return (torch.stack([x, y]) + 0.5) * cell


def trajectories(flow, starts, length, cell=8):
    """Follow points by chaining flow: flow (B, F, 2, h, w) in pixels, flow f from frame f to f + 1; S first frames.

    -> displacement (B, S, L, 2, gh, gw), the L = length steps of each point; valid (B, S, gh, gw) bool.

    The points start at the centres of cells of `cell` pixels, in frame starts[s], and move by the flow where they
    are (bilinear, in floats).  valid is False where a step starts outside of the frame; such points go on from its
    border.  Source: MME 3.3; dense trajectories (Wang et al. 2013) without their filters.
    """
    B, _, _, h, w = flow.shape
    gh, gw, S = h // cell, w // cell, len(starts)
    start = grid_points(gh, gw, cell, flow.device)                              # (2, gh, gw)
    most = constant((w, h), flow.device).view(2, 1, 1)
    points = start.expand(B, S, -1, -1, -1)                                     # (B, S, 2, gh, gw)
    valid = torch.ones(B, S, gh, gw, dtype=torch.bool, device=flow.device)
    steps = []
    for k in range(length):
        valid = valid & ((points >= 0) & (points < most)).all(2)
        points = torch.minimum(points.clamp(min=0), most)
        field = torch.stack([flow[:, s + k] for s in starts], 1)                # (B, S, 2, h, w)
        where = (points * 2 / most - 1).movedim(2, -1)                          # (B, S, gh, gw, 2) in [-1, 1]
        step = F.grid_sample(field.flatten(0, 1), where.flatten(0, 1), padding_mode="border", align_corners=False)
        steps.append(step.unflatten(0, (B, S)))                                 # (B, S, 2, gh, gw)
        points = points + steps[-1]                                             # p_{k+1} = p_k + flow_k(p_k)
    return torch.stack(steps, 2), valid


# ---- 3. Targets, losses, mask --------------------------------------------------------------------------------------

def to_tokens(x):
    """Values of points (B, S, ..., gh, gw) -> of tokens (B, S * gh/2 * gw/2, ..., 2, 2): each has 2 x 2 points."""
    x = x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))                         # (B, S, ..., gh/2, 2, gw/2, 2)
    return x.movedim((-4, -2), (2, 3)).flatten(1, 3)


NOISE = 0.2    # pixels; see position_target


def position_target(displacement, valid, noise=NOISE):
    """Position change: displacement (B, S, L, 2, gh, gw) in pixels, valid (B, S, gh, gw)
    -> target (B, N, 8 L), inner order (x and y, step, row, column); token_valid (B, N) bool.

    Per token, component and step, the z-score over the token's 4 points: (d - mean) / sqrt(variance + noise^2), the
    variance unbiased.  What the 4 points share, above all a pan of the camera, is gone; what is left are differences
    of motion.  Well below `noise` pixels (our choice) they give about 0.  A token is valid if any of its points is.
    """
    z = to_tokens(displacement.transpose(2, 3))                                 # (B, N, 2, L, 2, 2)
    centred = z - z.mean((-2, -1), keepdim=True)
    var = centred.square().sum((-2, -1), keepdim=True) / 3                      # (torch.var: 17 times the time)
    z = centred / (var + noise**2).sqrt()
    return z.flatten(2), to_tokens(valid).flatten(2).any(-1)


def hog(frames, bins=9, cell=8, of_frame=None):
    """Histograms of oriented gradients: frames (B, 3, T, H, W), normalised as the network's input
    -> (B, 3 * bins, T, H / cell, W / cell).

    Per colour: Sobel gradient (times 8, border replicated); its length is shared between the two nearest of `bins`
    orientations in [0, pi), linearly; mean over cells of `cell` pixels.  No block normalisation.  Source: MME's code.
    Frame by frame, by `of_frame` (which may be frame_hog compiled): they stay in a CPU's cache.
    """
    return torch.stack([(of_frame or frame_hog)(x, bins, cell) for x in frames.unbind(2)], 2)


def frame_hog(x, bins, cell):
    """`hog` of one frame (B, 3, H, W) -> (B, 3 * bins, H / cell, W / cell)."""
    B, C, H, W = x.shape
    x = F.pad(x, (1, 1, 1, 1), mode="replicate").flatten(0, 1)                  # (B C, H + 2, W + 2)
    across, down = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:], x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    gx, gy = across[..., 2:] - across[..., :-2], down[:, 2:] - down[:, :-2]               # (B C, H, W)
    length = (gx.square() + gy.square()).sqrt()
    angle = torch.atan2(gy, gx) * bins / math.pi                                # in (-bins, bins], one bin = 1
    angle = torch.where(angle < 0, angle + bins, angle)
    votes = []
    for b in range(bins):
        away = (angle - b).abs()                                                # on a circle of `bins`
        votes.append(F.avg_pool2d(length * (1 - torch.minimum(away, bins - away)).clamp(min=0), cell))
    return torch.stack(votes, 1).unflatten(0, (B, C)).flatten(1, 2)             # (B, C bins, gh, gw)


def shape_target(maps, displacement, starts, cell=8):
    """Shape change: maps (B, K, F, gh, gw) = hog() of the frames, displacement (B, S, L, 2, gh, gw) of the points
    that start in frame starts[s] -> (B, N, 4 K L), inner order (colour and orientation, step, row, column).

    At step k the map of frame starts[s] + k is read in the cell in which the point is then; step 0 is the point's
    own cell.  Points outside read the nearest cell.  Source: MME 3.3.
    """
    B, S, L, _, gh, gw = displacement.shape
    points = grid_points(gh, gw, cell, maps.device).expand(B, S, -1, -1, -1)    # (B, S, 2, gh, gw)
    most, steps = constant((gw, gh), maps.device).view(2, 1, 1), []
    for step in displacement.unbind(2):
        points = torch.minimum(points.clamp(min=0), most * cell)                # as `trajectories` goes on
        steps.append(torch.minimum((points / cell).floor(), most - 1).long())
        points = points + step
    x, y = torch.stack(steps, 2).unbind(3)                                      # cells (B, S, L, gh, gw)
    index = (y * gw + x).flatten(1)                                             # (B, S L gh gw)
    frames = torch.stack([torch.arange(s, s + L, device=maps.device) for s in starts])                  # (S, L)
    index = index + (frames * gh * gw)[..., None].expand(-1, -1, gh * gw).flatten()
    along = maps.flatten(2).gather(2, index[:, None].expand(-1, maps.shape[1], -1))     # (B, K, S L gh gw)
    return to_tokens(along.unflatten(2, (S, L, gh, gw)).transpose(1, 2)).flatten(2)


def position_loss(prediction, target, valid):
    """Squared error of hidden tokens (B, n, 8 L): mean over the values x 32 (their sum at L = 4), 0 where not valid
    (B, n), mean over all tokens.  With z-scores, predicting no motion costs at most 24.  Source: MME's code."""
    error = (prediction - target).square().mean(-1) * 32                        # (B, n)
    return (error * valid).mean()


def shape_loss(prediction, target, later=0.1):
    """Squared error of hidden tokens (B, n, 108 L): summed over the 108 values of a step, mean over the L steps of
    weights 1, later, later, ...; mean over tokens.  Source: MME's code."""
    error = (prediction - target).square().unflatten(-1, (27, -1, 4)).sum((2, 4))                 # (B, n, L)
    return (error[..., 0] + later * error[..., 1:].sum(-1)).mean() / error.shape[-1]


def tube_mask(count, grid, ratio, generator=None, device="cpu"):
    """Hide int(ratio * H' W') patches of each of `count` clips, at random, alike at all times -> (count, N) bool."""
    T, H, W = grid
    rank = rand(count, H * W, generator=generator, device=device).argsort(1).argsort(1)
    return (rank < int(ratio * H * W)).repeat(1, T)


# ---- 4. Model ------------------------------------------------------------------------------------------------------

def frames_to_read(target, frames, tubelet_size, stride, length):
    """Number of frames of a clip and the distance between them: what the network sees, or also all in between and
    the rest of the last trajectories (35 on Something-Something).  After the end of a shorter video nothing moves."""
    if target in ("hog", "pixel"):
        return frames, stride
    return (frames - tubelet_size) * stride + max(length, (tubelet_size - 1) * stride) + 1, 1


class MME(MaskedAutoencoder):
    """Clips (B, 3, F, H, W) uint8 as `frames_to_read` has them -> loss, stats.

    target   "trajectory": position change and HOG along the way (the paper's)
             "position": position change and HOG of each tubelet's second frame
             "hog": the latter alone
             "pixel": normalised pixels (VideoMAE); like "hog" it needs no flow
    length   L, the steps of a trajectory, in frames of the video
    """

    def __init__(self, flow, target, length, stride, mask_ratio, frames, patch_size, tubelet_size, **sizes):
        outputs = dict(trajectory=dict(position=8 * length, shape=108 * length),
                       position=dict(position=8 * length, shape=108), hog=dict(shape=108),
                       pixel=dict(pixel=3 * tubelet_size * patch_size**2))
        if patch_size % 2:
            raise UserError(f"--patch-size {patch_size}: must be even, a token has 2 x 2 points")
        super().__init__(frames=frames, patch_size=patch_size, tubelet_size=tubelet_size, outputs=outputs[target],
                         **sizes)
        T, H, W = self.encoder.grid
        self.count = T * int(mask_ratio * H * W)                                # hidden tokens of a clip
        if not 0 < self.count < T * H * W:
            raise UserError(f"--mask-ratio {mask_ratio}: must leave some of the {H * W} patches hidden, some visible")
        self.flow, self.target, self.length, self.mask_ratio = flow, target, length, mask_ratio
        self.cell = patch_size // 2                                             # 4 points per token
        self.hog = partial(hog, cell=self.cell)
        self.step = stride // frames_to_read(target, frames, tubelet_size, stride, length)[1]

    def predict(self, clips, hidden, count=None):
        """As VideoMAE's, but -> predictions by name (B, N_hidden, size), masked (B, N_hidden)."""
        z, masked = super().predict(clips, hidden, count)                       # (B, N_hidden, decoder_dim)
        return {name: head(z).float() for name, head in self.heads.items()}, masked

    def seen(self, clips):
        """The frames that the network sees: (B, 3, T, H, W)."""
        return clips[:, :, ::self.step][:, :, :self.encoder.config["frames"]]

    @torch.no_grad()
    def track(self, clips):
        """Follow the points of each tubelet from its first frame -> displacement (B, T', L, 2, gh, gw), valid
        (B, T', gh, gw), the frames (B, 3, F', H, W) that they pass, and in which of these each tubelet starts."""
        S, L, span = self.encoder.grid[0], self.length, self.encoder.tubelet_size * self.step
        if L < span:       # tubelets start `span` frames apart, trajectories are shorter: skip the flow between them
            windows = clips.unfold(2, L + 1, span)[:, :, :S].movedim(-1, 3)     # (B, 3, T', L + 1, H, W)
            pieces, frames = windows.transpose(1, 2).flatten(0, 1), windows[:, :, :, :-1].flatten(2, 3)
            span = L                                                            # in `frames`, which has F' = T' L
        else:
            pieces = clips[:, :, :(S - 1) * span + L + 1]
            frames = pieces[:, :, :-1]
        flow = self.flow(pieces).flatten(0, 1)                                  # (B F', 2, h, w)
        flow = resize_flow(flow, *clips.shape[-2:]).unflatten(0, (len(clips), -1))
        starts = [span * s for s in range(S)]
        return *trajectories(flow, starts, L, self.cell), frames, starts

    @torch.no_grad()
    def targets(self, clips):
        """Targets by name (B, N, size); token_valid (B, N) and displacement, or None where nothing is tracked."""
        p, t = self.encoder.patch_size, self.encoder.tubelet_size
        targets, token_valid, displacement = {}, None, None
        with torch.autocast(clips.device.type, enabled=False):                  # HOG and flow differences need fp32
            if self.target in ("trajectory", "position"):
                displacement, valid, frames, starts = self.track(clips)
                targets["position"], token_valid = position_target(displacement, valid)
            if self.target == "trajectory":
                maps = self.hog(normalize(frames, self.encoder.config))                         # (B, 27, F', gh, gw)
                targets["shape"] = shape_target(maps, displacement, starts, self.cell)
            elif self.target == "pixel":
                targets["pixel"] = pixel_target(to_float01(self.seen(clips)), p, t)
            else:
                frames = normalize(self.seen(clips)[:, :, 1::t], self.encoder.config)
                maps = self.hog(frames)                                                         # (B, 27, T', gh, gw)
                targets["shape"] = to_tokens(maps.transpose(1, 2)).flatten(2)                   # (B, N, 108)
        return targets, token_valid, displacement

    def forward(self, clips, generator=None):
        targets, valid, _ = self.targets(clips)
        hidden = tube_mask(len(clips), self.encoder.grid, self.mask_ratio, generator, clips.device)
        predictions, masked = self.predict(normalize(self.seen(clips), self.encoder.config), hidden, self.count)
        targets = {name: x.take_along_dim(masked[..., None], 1) for name, x in targets.items()}  # (B, N_hidden, size)
        terms, stats = {}, {}
        if "position" in targets:
            known, z = valid.gather(1, masked), targets["position"]                         # (B, N_hidden), ...
            terms["position"] = position_loss(predictions["position"], z, known)
            spread = z.unflatten(-1, (-1, 4)).square().sum(-1).amax(-1)         # 1.5: a deviation as large as `noise`
            stats = dict(valid=known.float().mean(), static=(spread < 1.5).float().mean(),
                         still=position_loss(torch.zeros_like(z), z, known))    # what it costs to predict no motion
        if "shape" in targets:
            terms["shape"] = shape_loss(predictions["shape"], targets["shape"])
        if "pixel" in targets:
            terms["pixel"] = F.mse_loss(predictions["pixel"], targets["pixel"])
        return sum(terms.values()) / len(terms), stats | {name: term.detach() for name, term in terms.items()}


# ---- 5. Preview ----------------------------------------------------------------------------------------------------

def hog_to_rgb(shape, grid, side=14):
    """Shape targets (B, N, 108 L) -> pictures (B, T', 3, h, w) of step 0: in each cell a line along each edge."""
    maps = shape.unflatten(-1, (3, 9, -1, 4))[..., 0, :].sum(2).flatten(2)                  # (B, N, 9 * 4), no colour
    maps = unpatchify(maps, grid, 2, 1).transpose(1, 2).flatten(0, 1).clamp(min=0).sqrt()   # (B T', 9, gh, gw)
    turn, at = (torch.arange(n, device=shape.device) for n in (9, side))
    turn, at = turn[:, None, None] * math.pi / 9, at - (side - 1) / 2
    away = (at * turn.cos() + at[:, None] * turn.sin()).abs()                               # (9, side, side)
    lines = (1 - away).clamp(min=0) * (at**2 + at[:, None] ** 2 <= (side / 2) ** 2)
    return map_to_rgb(F.conv_transpose2d(maps, lines[:, None], stride=side)[:, 0]).unflatten(0, (len(shape), -1))


def draw_lines(images, lines, colour):
    """Draw m lines through K points each, (n, m, K, 2) in pixels, x before y, on images (n, 3, h, w) in [0, 1]."""
    images, lines = images.clone().cpu(), lines.cpu()
    weight = torch.linspace(0, 1, 64)[:, None]
    points = lines[..., :-1, None, :] * (1 - weight) + lines[..., 1:, None, :] * weight        # (n, m, K - 1, 64, 2)
    x, y = points.flatten(1, -2).floor().long().unbind(-1)                                     # each (n, points)
    n, k = ((x >= 0) & (y >= 0) & (x < images.shape[-1]) & (y < images.shape[-2])).nonzero(as_tuple=True)
    images[n, :, y[n, k], x[n, k]] = torch.tensor(colour, dtype=images.dtype)
    return images


@torch.no_grad()
def preview(model, clips, path):
    """Write what the method sees in an even number of clips (B, 3, F, H, W) uint8, two side by side, up to five rows.

    The rows: frames with the trajectories that start there; what the encoder sees; HOG (of the first step) and its
    prediction, painted into the hidden tokens; how the points of hidden tokens move in L steps, relative to the mean
    of their token: true (green) and predicted (red), both 3 x as long.
    """
    p, t, grid = model.encoder.patch_size, model.encoder.tubelet_size, model.encoder.grid
    targets, _, displacement = model.targets(clips)
    hidden = tube_mask(len(clips), grid, model.mask_ratio, torch.Generator(clips.device).manual_seed(0), clips.device)
    predictions, _ = model.predict(normalize(model.seen(clips), model.encoder.config), hidden, model.count)
    tile = clips.shape[-1] * max(1, 192 // clips.shape[-1])
    patches = patchify(to_float01(model.seen(clips)), p, t)                                 # (B, N, D)
    views = [unpatchify(x, grid, p, t)[:, :, ::t].transpose(1, 2).flatten(0, 1)             # (B T', 3, H, W)
             for x in (patches, patches.masked_fill(hidden[..., None], 0.5))]
    frames, seen = (F.interpolate(x, (tile, tile)).cpu() for x in views)
    rows = dict(frames=frames, seen=seen)
    if "shape" in targets:
        painted = targets["shape"].clone()
        painted[hidden] = predictions["shape"].flatten(0, 1)
        rows |= {name: F.interpolate(hog_to_rgb(x, grid).flatten(0, 1), (tile, tile))
                 for name, x in (("hog", targets["shape"]), ("painted", painted))}
    if displacement is not None:
        d = to_tokens(displacement.transpose(2, 3))                                         # (B, N, 2, L, 2, 2)
        var, mean = torch.var_mean(d, (-2, -1), keepdim=True)
        z = torch.zeros_like(d)
        z[hidden] = predictions["position"].flatten(0, 1).unflatten(-1, d.shape[2:])
        moves = ((d - mean) * hidden[..., None, None, None, None], z * (var + NOISE**2).sqrt())
        true, guess = (unpatchify(x.sum(3).flatten(2), grid, 2, 1).transpose(1, 2) for x in moves)
        rows["moves"] = frames * 0.4
        start = grid_points(*displacement.shape[-2:], model.cell, clips.device)             # (2, gh, gw)
        thin = max(1, start.shape[-1] // 12)                                                # draw some of many points
        for name, steps, colour in (("frames", displacement, (1, 1, 0)), ("moves", 3 * true[:, :, None], (0, 1, 0)),
                                    ("moves", 3 * guess[:, :, None], (1, 0.3, 0.2))):
            tracks = start + F.pad(steps.cumsum(2), (0, 0, 0, 0, 0, 0, 1, 0))              # (B, T', 1 + L, 2, gh, gw)
            lines = tracks[..., ::thin, ::thin].flatten(0, 1).flatten(-2).permute(0, 3, 1, 2)  # (B T', n, 1 + L, 2)
            rows[name] = draw_lines(rows[name], lines * (tile / clips.shape[-1]), colour)
    sheet = [row.unflatten(0, (len(clips), -1))[i:i + 2, ::2].flatten(0, 1) for i in range(0, len(clips), 2)
             for row in rows.values()]
    save_sheet(path, sheet, tile)


# ---- 6. Train ------------------------------------------------------------------------------------------------------

def sample_clips(video, item, rng, cfg):
    """cfg.repeats random clips of a video, each with a crop of its own -> uint8 (repeats, F, side, side, 3)."""
    count, stride = frames_to_read(cfg.target, cfg.frames, cfg.tubelet_size, cfg.stride, cfg.length)
    indices = [clip_indices(video, item, count, stride, rng) for _ in range(cfg.repeats)]
    height, width = video.info.height, video.info.width
    crops = [multi_scale_crop(height, width, rng, cfg.min_crop, cfg.image_size) for _ in indices]
    return read_views(video, indices, crops, cfg.image_size)


def main(cfg):
    env = setup(cfg.seed)
    listing = find_videos(cfg.data, cfg.root, "train", toy=(cfg.toy_train, cfg.toy_test, cfg.toy_size))
    plan = plan_run(cfg, len(listing.items), env)
    out, checkpoint = open_run("mme", cfg, env, listing, plan)

    flow = None
    if cfg.target in ("trajectory", "position"):
        flow = FlowEstimator(cfg.flow, cfg.raft_weights, cfg.flow_updates, env.device, env.amp, cfg.compile)
    model = MME(flow, cfg.target, cfg.length, cfg.stride, cfg.mask_ratio, image_size=cfg.image_size,
                frames=cfg.frames, patch_size=cfg.patch_size, tubelet_size=cfg.tubelet_size,
                **VITS[cfg.model] | dict(decoder_depth=1)).to(env.device)
    if cfg.compile and can_compile():
        model.hog = partial(model.hog, of_frame=torch.compile(frame_hog, dynamic=False))
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
