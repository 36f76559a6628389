"""Benchmarks: how fast videos are read, training steps run and flow is computed, each against something in the same run.

    python tests/bench.py                       # minutes on two cores; a GPU is used if there is one
    python tests/bench.py --quick               # fewer repetitions: a first look
    python tests/bench.py --videos DIR          # read these files too
    python tests/bench.py --compile             # on a CPU too, where compiling takes a while (on a GPU it is the default)

Prints Markdown tables: the machine; reading a clip against decord and torchcodec, where they are installed, and through the
DataLoader; what video length, clips per opened file and clip length cost; the pre-training step of mofo.py, its first step
and its memory; optical flow.  Values are medians; what a row compares ran alternately, in random order, on the same clips.
Reading is CPU time of the process with all its threads, which busy neighbours disturb less; all else is wall time.  Test
videos are made on the spot.  RAFT has random weights, which cost what trained ones cost.
"""
import argparse
import importlib
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mofo
from common import (VIDEO_FILES, Clips, Env, FlowEstimator, Item, VideoError, adamw, loader, probe, setup, to_device,
                    vit_sizes, wrap)

CONFIG = mofo.Config()                                             # 16 frames, 224 pixels, crops as in training


# ---- measuring and printing ------------------------------------------------------------------------------------------

def medians(methods, reps, clock=time.process_time):
    """Run every method `reps` times in turns, in random order -> median seconds by name. Round 0 is a warm-up."""
    seconds = {name: [] for name in methods}
    for k in range(reps + 1):
        for name in random.sample(list(methods), len(methods)):
            began = clock()
            methods[name](k)
            seconds[name].append(clock() - began)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def table(title, header, rows):
    print(f"\n**{title}**\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    for row in rows:                                               # may be a generator: rows appear when measured
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def number(x, digits=1):
    return "-" if x is None else f"{x:.{digits}f}"


def ratio(a, b):
    return "-" if a is None or b is None else f"{a / b:.2f}x"


def optional(name):
    """The module, or None if it is not installed or does not load."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None


def machine(args):
    model = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] \
        if os.path.exists("/proc/cpuinfo") else [platform.processor()]
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "none used"
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, torchvision, av, np, *OTHERS.values()) if m)
    missing = "".join(f"; {name} not installed or does not load" for name, m in OTHERS.items() if not m)
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    print(f"CPU: {(model or [platform.machine()])[0]}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads{load}; "
          f"GPU: {gpu}  \nPython {platform.python_version()}, {versions}{missing}  \nSettings: {vars(args)}")


# ---- test videos -----------------------------------------------------------------------------------------------------

def scene(frames, height, width, seed=0):
    """Textured sprites that move over a textured background while the camera pans, with noise -> frames (H, W, 3), to quarter pixels."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    noise = rng.normal(0, 3, (16, height, width, 1))
    layers = []
    for sprite in range(5):                                        # 0 is the background
        sides = (4 * 80, 4 * 80) if sprite else (4 * (height + 160), 4 * (width + 160))      # four times the resolution
        waves = [F.interpolate(torch.rand(1, 3, max(2, sides[0] // 2**k), max(2, sides[1] // 2**k)) - 0.5, sides, mode="bilinear")
                 * 0.75**(8 - k) for k in range(2, 9)]
        layers.append((sum(waves)[0].permute(1, 2, 0).mul(220).add(128).numpy(), rng.uniform(0.5, 2, 2), rng.uniform(0, 6.28, 2)))
    for i in range(frames):
        for sprite, (texture, speed, phase) in enumerate(layers):
            place = 0.5 + 0.5 * np.sin(speed * i / 30 + phase)     # in [0, 1]: down, right
            if sprite == 0:
                y, x = (place * 4 * 160).astype(int)
                image = texture[y:y + 4 * height:4, x:x + 4 * width:4] + noise[rng.integers(16)]
            else:
                y, x = place * (height - 80, width - 80)
                image[int(y):int(y) + 79, int(x):int(x) + 79] = texture[4 - int(y % 1 * 4)::4, 4 - int(x % 1 * 4)::4][:79, :79]
        yield image.clip(0, 255).astype(np.uint8)


def write(path, frames, codec, fps, **options):
    with av.open(str(path), "w") as file:
        for i, frame in enumerate(frames):
            if i == 0:
                stream = file.add_stream(codec, fps, width=frame.shape[1], height=frame.shape[0], pix_fmt="yuv420p",
                                         options={k: str(v) for k, v in options.items()})
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())


def make_videos(root):
    """Write the test videos -> {description: (path, stride of the clips)}; strides as in the recipes of mofo.py."""
    videos = {"H.264 mp4, 340x256, 30 fps, 10 s": ("a.mp4", 4, "libx264", dict(g=250)),
              "H.264 mp4, 340x256, 30 fps, 100 s": ("b.mp4", 4, "libx264", dict(g=250)),
              "VP9 webm, 426x240, 12 fps, 4 s": ("c.webm", 2, "libvpx-vp9", {"deadline": "good", "cpu-used": 4, "crf": 36, "b": 0}),
              "MPEG-4 avi, 320x240, 25 fps, 7 s": ("d.avi", 4, "mpeg4", dict(g=250, b=600_000))}
    for text, (name, _, codec, options) in videos.items():
        width, height, fps, seconds = map(int, re.search(r"(\d+)x(\d+), (\d+) fps, (\d+) s", text).groups())
        write(root / name, scene(fps * seconds, height, width), codec, fps, **options)
    return {f"{text}, {(root / name).stat().st_size // 1000} kB": (str(root / name), stride)
            for text, (name, stride, *_) in videos.items()}


# ---- 1. reading ------------------------------------------------------------------------------------------------------

def dataset(path, items=1, **settings):
    """Items as in training: open, info, random clip, crop, scale -> uint8 clips."""
    return Clips([Item(path)] * items, partial(mofo.sample_clips, cfg=replace(CONFIG, **settings)), replace=False)


def draw(path, stride, k):
    """Frame numbers and crop of the clip that dataset(path, stride=stride)[k, 0] reads."""
    seen = []
    spy = SimpleNamespace(info=probe(path), read=lambda *a: seen.extend(a) or np.empty((CONFIG.frames, CONFIG.image_size, CONFIG.image_size, 3)))
    mofo.sample_clips(spy, Item(path), np.random.default_rng((0, k, 0)), replace(CONFIG, stride=stride))
    return seen[0].tolist(), seen[2][0].tolist()


def crop_and_scale(frames, box):
    """uint8 (T, H, W, 3) -> the same at (T, 224, 224, 3): torch's antialiased resize."""
    x1, y1, x2, y2 = box
    frames = frames[:, y1:y2, x1:x2].permute(0, 3, 1, 2)
    return F.interpolate(frames, (CONFIG.image_size,) * 2, mode="bilinear", antialias=True).permute(0, 2, 3, 1).contiguous()


def read_decord(path, indices, box):
    frames = OTHERS["decord"].VideoReader(path, num_threads=1).get_batch(indices).asnumpy()
    return crop_and_scale(torch.from_numpy(frames), box)


def read_torchcodec(path, indices, box):
    from torchcodec.decoders import VideoDecoder
    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate")
    return crop_and_scale(decoder.get_frames_at(indices).data, box)


OTHERS = {"decord": optional("decord"), "torchcodec": optional("torchcodec")}
READERS = {"decord": read_decord, "torchcodec": read_torchcodec}


def readers(path, stride, clips):
    """{name: read(k)} of everything that is installed and can read the file, and how far their pixels are from ours."""
    items = dataset(path, stride=stride)
    draws = [draw(path, stride, k) for k in range(clips)]
    methods, difference = {"ours": lambda k: items[k, 0][0]}, {}
    for name, read in READERS.items():
        if OTHERS[name]:
            try:
                there = [np.abs(read(path, *draws[k]).numpy() - items[k, 0][0][0].astype(float)).mean() for k in range(min(3, clips))]
                methods[name], difference[name] = (lambda k, read=read: read(path, *draws[k])), number(max(there))
            except Exception as error:                             # whatever a reader raises on a file is its result
                difference[name] = f"fails: {str(error).strip().splitlines()[0][:60]}"
    return methods, difference


def bench_items(videos, reps):
    for text, (path, stride) in videos.items():
        try:
            methods, difference = readers(path, stride, reps + 1)
        except VideoError as error:
            yield text, stride, "ours", f"fails: {error}", "-", "-", "-"
            continue
        times = medians(methods, reps)
        for name in difference:
            other = times.get(name)
            yield (text, stride, name, number(times["ours"] * 1e3), number(other and other * 1e3), ratio(other, times["ours"]),
                   difference[name])
        if not difference:
            yield text, stride, "-", number(times["ours"] * 1e3), "-", "-", "-"


def bench_delivery(videos, reps, workers, device, batches=8, size=8):
    """Clips per second, wall time: the DataLoader from when all workers deliver, and one process that only reads."""
    for text, (path, stride) in videos.items():
        items = dataset(path, 1000, stride=stride)
        keys = [[(0, size * b + i) for i in range(size)] for b in range(workers * (1 + batches // workers))]
        loaded, speeds = loader(items, keys, workers, device), {"bare": [], "loader": []}

        def bare():
            began = time.perf_counter()
            for key in sum(keys[:3], []):
                items[key]
            return 3 * size / (time.perf_counter() - began)

        def delivered():
            for b, _ in enumerate(loaded):                         # the first batches come together
                began = time.perf_counter() if b == workers - 1 else began if b else None
            return (len(keys) - workers) * size / (time.perf_counter() - began)
        for _ in range(reps):
            for name, run in random.sample([("bare", bare), ("loader", delivered)], 2):
                speeds[name].append(run())
        one, many = (statistics.median(v) for v in speeds.values())
        yield text, workers, number(one), number(many), ratio(many, one), ratio(many, workers * one)


def bench_costs(videos, reps, clips=4):
    """What a clip costs under another condition; the mean of `clips` random clips in every repetition."""
    short, long, vp9 = list(videos)[:3]

    def repeat(read):
        return lambda k: [read(k * clips + i) for i in range(clips)]
    for name, read in readers(videos[short][0], videos[short][1], (reps + 1) * clips)[0].items():
        other = readers(videos[long][0], videos[long][1], (reps + 1) * clips)[0][name]
        yield f"{name}: video of 100 s against 10 s", {"before": repeat(read), "after": repeat(other)}, clips
    for text in (short, vp9):
        path, stride = videos[text]
        for what, settings in (("4 clips from one open against 1", dict(repeats=4)), ("clip of 32 frames against 16", dict(frames=32))):
            both = [dataset(path, stride=stride), dataset(path, stride=stride, **settings)]
            yield f"ours: {what}, {text.split(',')[0]}", dict(zip(("before", "after"), (
                repeat(lambda k, items=items: items[k, 0]) for items in both))), clips


def timed_costs(rows, reps):
    for text, methods, clips in rows:
        times = medians(methods, reps)
        yield text, *(number(times[n] / clips * 1e3) for n in ("before", "after")), ratio(times["after"], times["before"])


# ---- 2. training and flow --------------------------------------------------------------------------------------------

class Step:
    """A training step of mofo.py, as in its loop, on clips that are on the device already."""

    def __init__(self, env, model, image_size, patch_size, clips, flow, weights, compile):
        dim, depth, heads, decoder_depth = vit_sizes(model)
        self.env, self.clips = env, clips
        self.flow = FlowEstimator(flow, weights.get(flow), CONFIG.flow_updates, device=env.device, amp=env.amp, compile=compile)
        self.model = mofo.MOFO(self.flow, CONFIG.mask_ratio, CONFIG.inside_ratio, image_size=image_size, frames=CONFIG.frames,
                               patch_size=patch_size, tubelet_size=CONFIG.tubelet_size, dim=dim, depth=depth, heads=heads,
                               decoder_dim=dim // 2, decoder_depth=decoder_depth, decoder_heads=max(1, heads // 2)).to(env.device)
        self.optimizer = adamw(self.model, 1e-4, CONFIG.weight_decay, (0.9, 0.95), env.device)
        self.net = wrap(self.model, env, compile)
        self.batch = to_device(torch.randint(256, (clips, CONFIG.frames, image_size, image_size, 3), dtype=torch.uint8), env.device)

    def __call__(self, _=None):
        with self.env.autocast():
            loss, _ = self.net(self.batch)
        loss.backward()
        clip_grad_norm_(self.model.parameters(), float("inf"))
        loss.item()                                                # the one wait of the loop
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def synchronized(env):
    """Wall clock that waits for the GPU."""
    if env.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def resident(key):
    """Memory of this process in bytes: key VmRSS (now) or VmHWM (the most so far). Linux only."""
    path = Path("/proc/self/status")
    return int(re.search(rf"{key}:\s+(\d+)", path.read_text())[1]) * 1024 if path.exists() else None


def first_step(env, case):
    """In a fresh process: seconds from building the model to the end of the first step; the memory of three steps."""
    cuda, before = env.device.type == "cuda", resident("VmRSS")
    synchronized(env)
    began = time.perf_counter()
    step = Step(env, **case)
    step()
    seconds = synchronized(env) - began
    step(), step()
    synchronized(env)
    memory = torch.cuda.max_memory_allocated() if cuda else before and resident("VmHWM") - before
    print(json.dumps(dict(seconds=seconds, memory=memory)))


def fresh(args, case):
    """first_step of a case in a process of its own, with an empty compile cache."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run([sys.executable, __file__, "--device", args.device, "--case", json.dumps(case)], text=True,
                              stdout=subprocess.PIPE, check=True, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache})
    return json.loads(done.stdout.splitlines()[-1])


def bench_steps(args, env, cases, reps):
    """-> rows of speed, rows of the first step and memory."""
    speed, start = [], []
    for case in cases:
        text = f"{case['model']}, {case['clips']} x 16 x {case['image_size']}^2, {case['flow']}"
        steps = {mode: Step(env, **case, compile=mode == "compiled") for mode in ("eager", "compiled")[:1 + args.compile]}
        shares, inner = {mode: [] for mode in steps}, 10 if env.device.type == "cuda" else 1

        def run(mode, k):
            steps[mode].flow.seconds()
            began = synchronized(env)
            for _ in range(inner):
                steps[mode]()
            shares[mode].append(steps[mode].flow.seconds() / (synchronized(env) - began))
        times = medians({mode: partial(run, mode) for mode in steps}, reps, partial(synchronized, env))
        rates = [case["clips"] * inner / times[m] if m in times else None for m in ("eager", "compiled")]
        share = [100 * statistics.median(shares[m][1:]) if m in times else None for m in ("eager", "compiled")]
        speed.append((text, *map(number, rates), ratio(*rates[::-1]), *(number(s, 0) for s in share)))
        del steps
        found = [fresh(args, {**case, "compile": c}) if c <= args.compile else {} for c in (False, True)]
        seconds, memory = ([f.get(key) for f in found] for key in ("seconds", "memory"))
        start.append((text, *map(number, seconds), ratio(*seconds[::-1]), *(number(m and m / 1e9, 2) for m in memory), ratio(*memory[::-1])))
    return speed, start


def bench_flow(args, env, weights, pairs, reps):
    """Milliseconds per pair of frames at 224 pixels, as MOFO calls it: clips of two frames."""
    clips = to_device(torch.randint(256, (pairs, 2, 224, 224, 3), dtype=torch.uint8), env.device)
    names = {"tvl1": ("tvl1", 0), "raft_small, 6 updates": ("raft_small", 6), "raft_small, 12 updates": ("raft_small", 12),
             "raft_large, 6 updates": ("raft_large", 6)}
    estimators = {(text, c): FlowEstimator(name, weights.get(name), updates, device=env.device, amp=env.amp, compile=c)
                  for text, (name, updates) in names.items() for c in (False, True)[:1 + args.compile]}
    times = medians({key: lambda k, e=e: e(clips) for key, e in estimators.items()}, reps, partial(synchronized, env))
    for text in names:
        ms = [times[text, c] / pairs * 1e3 if (text, c) in times else None for c in (False, True)]
        base = times["raft_small, 6 updates", args.compile] / pairs * 1e3
        yield text, number(ms[0], 2), number(ms[1], 2), ratio(*ms), ratio(ms[args.compile], base)


# ---- the run ---------------------------------------------------------------------------------------------------------

def main():
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--videos", help="directory of videos to read as well")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="measure compiled steps; default on a GPU")
    parser.add_argument("--workers", type=int, default=2, help="of the DataLoader")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    env = setup() if args.device == "cuda" else Env(torch.device("cpu"), 0, 1, None)
    if args.case:
        return first_step(env, args.case)
    cuda = args.device == "cuda"
    args.compile = cuda if args.compile is None else args.compile
    random.seed(0)
    torch._dynamo.config.recompile_limit = 100                     # all cases share the code of a block
    del args.case
    machine(args)

    with tempfile.TemporaryDirectory() as root:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)                                   # as in a worker of the DataLoader
        videos = make_videos(Path(root))
        own = [p for p in sorted(Path(args.videos).rglob("*")) if p.suffix.lower() in VIDEO_FILES] if args.videos else []
        every = videos | {p.name: (str(p), CONFIG.stride * 2) for p in own}
        fewer = {text: videos[text] for text in list(videos)[::2]}                     # H.264 of 10 s, VP9
        table("A random clip of 16 frames: open, decode, crop, scale to 224x224, ms of CPU time (ratio > 1: ours is faster)",
              ("video", "stride", "against", "ours", "other", "other / ours", "mean difference of the pixels, of 255"),
              bench_items(every, 5 if args.quick else 25))
        table("What the DataLoader delivers, clips/s of wall time", ("video", "workers", "one process, bare", "DataLoader", "ratio",
              "ratio to workers x bare"), bench_delivery(fewer, 3 if args.quick else 9, args.workers, env.device))
        table("What length and repetition cost, ms of CPU time per opened file", ("", "before", "after", "after / before"),
              timed_costs(bench_costs(videos, 4 if args.quick else 20), 4 if args.quick else 20))

        torch.set_num_threads(threads)
        weights = {}
        for name in ("raft_small", "raft_large"):
            weights[name] = f"{root}/{name}.pt"
            torch.save(getattr(torchvision.models.optical_flow, name)().state_dict(), weights[name])
        sizes = [("vit_base", 224, 16, 64)] if cuda else [("vit_tiny", 64, 8, 8), ("vit_small", 224, 16, 2)]
        cases = [dict(zip(("model", "image_size", "patch_size", "clips", "flow", "weights"), (*size, flow, weights)))
                 for size in sizes for flow in ("tvl1", "raft_small")]
        speed, start = bench_steps(args, env, cases, 3 if args.quick else 15)
        where = f"{'bf16 autocast' if env.amp == torch.bfloat16 else env.amp or 'fp32'}, {args.device}"
        table(f"Pre-training step of mofo.py ({where}; clips x frames x side, flow), clips/s", ("case", "eager", "compiled",
              "compiled / eager", "% of it flow, eager", "% of it flow, compiled"), speed)
        table("First step, s, from building the model in a fresh process; peak memory, GB: " + ("torch.cuda.max_memory_allocated"
              if cuda else "growth of resident memory (VmHWM) since the imports"), ("case", "eager, s", "compiled, s", "ratio",
              "eager, GB", "compiled, GB", "ratio"), start)
        pairs = 256 if cuda else 4
        table(f"Optical flow, ms per pair of 224x224 frames, {pairs} pairs at once ({where})", ("estimator", "eager", "compiled",
              "eager / compiled", "to raft_small, 6 updates"), bench_flow(args, env, weights, pairs, 3 if args.quick else 9))


if __name__ == "__main__":
    main()
