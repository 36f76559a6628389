"""Benchmarks: how fast videos are read, training steps run and flow is computed, each against something in the same run.

    python tests/bench.py                  # a GPU is used if there is one; --device cpu: not
    python tests/bench.py --quick          # fewer repetitions: a first look
    python tests/bench.py --videos DIR     # read these files too
    python tests/bench.py --compile        # compiled steps on a CPU too; on a GPU this is the default
    python tests/bench.py --part steps     # or reading, flow

Prints the machine, then Markdown tables: reading a clip, against decord and torchcodec where they are installed; what the
DataLoader delivers; what video length, clips per opened file and clip length cost; the pre-training step of each script, with
its share of what a large matrix product reaches on the same device (operations of flow not counted), the first step and
memory; optical flow.  The DataLoader is also compared with as many plain processes, which tell what the machine
gives at that moment: where they reach much less than workers x one process, others use the cores.  Values are medians; what a row compares ran in turns, in random order (memory and first
steps: once).  Reading is CPU time of all threads, which busy neighbours disturb less than wall time; all else is wall time.
Test videos are made on the spot.  RAFT gets random weights, which cost what trained ones cost.
"""
import argparse
import importlib
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import av
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fame
import mcl
import mme
import modist
import mofo
from common import (Clips, Env, FlowEstimator, Item, ResNet3D, VIDEO_FILES, VITS, VideoError, loader, make_backbone,
                    make_optimizer, probe, setup, to_device, wrap_model)

CONFIG = mofo.Config()                                             # 16 frames, 224 pixels, crops as in training


def medians(methods, reps, clock=time.process_time):
    """Run every method(k) for k = 0 (a warm-up) .. reps in turns, in random order -> median seconds by name."""
    seconds = {name: [] for name in methods}
    for k in range(reps + 1):
        for name in random.sample(list(methods), len(methods)):
            began = clock()
            methods[name](k)
            seconds[name].append(clock() - began)
    return {name: median(values[1:]) for name, values in seconds.items()}


def table(title, header, rows):
    """Print a Markdown table; rows may be a generator and then appear one by one."""
    print(f"\n**{title}**\n\n| {header} |\n|{'---|' * (header.count('|') + 1)}", flush=True)
    for row in rows:
        cells = ["-" if c is None else f"{c:.{max(0, 2 - len(str(int(c))) + 1)}f}" if isinstance(c, float) else str(c) for c in row]
        print(f"| {' | '.join(cells)} |", flush=True)


def over(a, b):
    return None if a is None or b is None else a / b


# ---- test videos -----------------------------------------------------------------------------------------------------

def scene(count, height, width):
    """Yield frames (H, W, 3): textured sprites move by quarter pixels over a textured background that pans, with noise."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    noise = rng.normal(0, 3, (16, height, width, 1))
    layers = []
    for sides in [(4 * height + 640, 4 * width + 640)] + 4 * [(320, 320)]:                # at four times the resolution
        waves = [F.interpolate(torch.rand(1, 3, sides[0] // 2**k, sides[1] // 2**k) - 0.5, sides, mode="bilinear") * 0.75**(8 - k)
                 for k in range(2, 8)]
        layers.append((sum(waves)[0].permute(1, 2, 0).mul(220).add(128).numpy(), rng.uniform(0.5, 2, 2), rng.uniform(0, 6.28, 2)))
    for i in range(count):
        (y, x), *places = (0.5 + 0.5 * np.sin(speed * i / 30 + phase) for _, speed, phase in layers)
        image = layers[0][0][int(640 * y):, int(640 * x):][:4 * height:4, :4 * width:4] + noise[rng.integers(16)]
        for (texture, *_), (y, x) in zip(layers[1:], places):
            y, x = divmod(int(y * 4 * (height - 80)), 4), divmod(int(x * 4 * (width - 80)), 4)
            image[y[0]:y[0] + 79, x[0]:x[0] + 79] = texture[4 - y[1]::4, 4 - x[1]::4][:79, :79]
        yield image.clip(0, 255).astype(np.uint8)


def make_videos(root):
    """Write the test videos -> {description: (path, stride of a clip)}; the strides are those of mofo.py's recipes."""
    x264, vp9 = dict(g=250), {"deadline": "good", "cpu-used": 4, "crf": 36, "b": 0}
    videos = {"H.264 mp4, 340x256, 30 fps, 10 s": (4, "libx264", x264), "H.264 mp4, 340x256, 30 fps, 100 s": (4, "libx264", x264),
              "VP9 webm, 426x240, 12 fps, 4 s": (2, "libvpx-vp9", vp9),
              "MPEG-4 with B-frames, 50 from key to key, avi, 320x240, 25 fps, 7 s": (4, "mpeg4", dict(g=50, bf=2, b=600_000))}
    found = {}
    for i, (text, (stride, codec, options)) in enumerate(videos.items()):
        ending, *numbers = re.search(r"(\w+), (\d+)x(\d+), (\d+) fps, (\d+) s", text).groups()
        width, height, fps, seconds = map(int, numbers)
        path = root / f"{i}.{ending}"
        with av.open(str(path), "w") as file:
            stream = file.add_stream(codec, fps, width=width, height=height, pix_fmt="yuv420p",
                                     options={k: str(v) for k, v in options.items()})
            for frame in scene(fps * seconds, height, width):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            file.mux(stream.encode())
        found[f"{text}, {path.stat().st_size // 1000} kB"] = str(path), stride
    return found


# ---- reading ---------------------------------------------------------------------------------------------------------

def read_ours(path, **settings):
    """Clips as training reads them: open, info, random frames and crop, decode, scale.  [k, 0] is the k-th clip."""
    return Clips([Item(path)], partial(mofo.sample_clips, cfg=replace(CONFIG, **settings)), replace=False)


def draw(path, stride, k):
    """Frame numbers and crop of clip k of read_ours."""
    seen = []
    spy = SimpleNamespace(info=probe(path), read=lambda *given: seen.extend(given) or np.empty((CONFIG.frames, 224, 224, 3)))
    mofo.sample_clips(spy, Item(path), np.random.default_rng((0, k, 0)), replace(CONFIG, stride=stride))
    return seen[0].tolist(), seen[2][0].tolist()


def crop_and_scale(frames, box):
    x1, y1, x2, y2 = box
    frames = frames[:, y1:y2, x1:x2].permute(0, 3, 1, 2)
    return F.interpolate(frames, (224, 224), mode="bilinear", antialias=True).permute(0, 2, 3, 1).contiguous()


def read_decord(path, indices, box):
    return crop_and_scale(torch.from_numpy(OTHERS["decord"].VideoReader(path, num_threads=1).get_batch(indices).asnumpy()), box)


def read_torchcodec(path, indices, box):
    decoder = OTHERS["torchcodec"].decoders.VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate")
    return crop_and_scale(decoder.get_frames_at(indices).data, box)


def optional(name, part=""):
    try:
        importlib.import_module(name + part)
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):                   # torchcodec without FFmpeg's libraries raises the last
        return None


OTHERS = {"decord": optional("decord"), "torchcodec": optional("torchcodec", ".decoders")}


def bench_clips(videos, reps):
    for text, (path, stride) in videos.items():
        ours = read_ours(path, stride=stride)
        methods, apart = {"ours": lambda k: ours[k, 0]}, {}
        try:
            draws = [draw(path, stride, k) for k in range(reps + 1)]
        except VideoError as error:
            yield text, stride, "-", f"fails: {error}", None, None, None
            continue
        for name, read in (("decord", read_decord), ("torchcodec", read_torchcodec)):
            try:
                apart[name] = "not installed" if not OTHERS[name] else float(np.abs(read(path, *draws[0]).numpy() - ours[0, 0][0][0].astype(float)).mean())
            except Exception as error:                             # whatever a reader raises on a file is its result
                apart[name] = f"fails: {str(error).strip().splitlines()[0][:50]}"
            if isinstance(apart[name], float):
                methods[name] = lambda k, read=read: read(path, *draws[k])
        times = {name: t * 1e3 for name, t in medians(methods, reps).items()}
        for name, difference in apart.items():
            yield text, stride, name, times["ours"], times.get(name), over(times.get(name), times["ours"]), difference


def plain_processes(ours, processes, clips):
    """Read `clips` clips in each of some forked processes that hand nothing over."""
    children = []
    for _ in range(processes):
        child = os.fork()
        if child == 0:
            [ours[k, 0] for k in range(clips)]
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def bench_delivery(videos, reps, workers, device, size=8, batches=8):
    for text, (path, stride) in videos.items():
        ours, total = read_ours(path, stride=stride), workers * -(-batches // workers)
        through = loader(ours, [[(size * b + i, 0) for i in range(size)] for b in range(workers + total)], workers, device)
        speeds = {"bare": [], "plain": [], "loader": []}
        for _ in range(reps):
            for name in random.sample(list(speeds), 3):
                began, count = time.perf_counter(), 3 * size
                if name == "bare":
                    [ours[k, 0] for k in range(count)]
                elif name == "plain":
                    count *= workers
                    plain_processes(ours, workers, 3 * size)
                else:
                    for b, _ in enumerate(through):
                        if b == workers - 1:                       # every worker has started and delivered once
                            began, count = time.perf_counter(), total * size
                speeds[name].append(count / (time.perf_counter() - began))
        bare, plain, rate = map(median, speeds.values())
        yield text, workers, bare, plain, rate, rate / (workers * bare), rate / plain


def bench_costs(videos, reps, clips=4):
    (h264, stride), (long, _), (vp9, vp9_stride) = list(videos.values())[:3]
    for text, a, b in (("H.264: 100 s of video against 10 s", (h264, {}), (long, {})),
                       ("H.264: 4 clips from one open against 1", (h264, {}), (h264, dict(repeats=4))),
                       ("VP9: 4 clips from one open against 1", (vp9, {}), (vp9, dict(repeats=4))),
                       ("H.264: a clip of 32 frames against 16", (h264, {}), (h264, dict(frames=32)))):
        sets = [read_ours(path, **{"stride": vp9_stride if path == vp9 else stride, **more}) for path, more in (a, b)]
        first, second = medians({i: lambda k, s=s: [s[k * clips + j, 0] for j in range(clips)] for i, s in enumerate(sets)}, reps).values()
        yield text, first / clips * 1e3, second / clips * 1e3, second / first


# ---- training and flow -----------------------------------------------------------------------------------------------

class Step:
    """One step of a script's loop, on clips that are on the device already."""

    def __init__(self, env, script, model, image_size, patch_size, clips, flow, weights, compile):
        self.env, frames, views = env, CONFIG.frames, dict(fame=2, mcl=6, modist=2).get(script, 1)
        self.flow = flow and FlowEstimator(flow, weights.get(flow), CONFIG.flow_updates, env.device, env.amp, compile,
                                           CONFIG.flow_size if script == "mofo" else math.inf)
        if script == "fame":
            self.model = fame.FAME(make_backbone(model, image_size, frames)).to(env.device)
        elif script == "mcl":
            self.model, frames = mcl.MCL(make_backbone(model, image_size, frames), self.flow, 100).to(env.device), frames + 1
        elif script == "modist":
            motion = ResNet3D("motion_r50", 1 / 8, image_size, frames)
            self.model = modist.MoDist(make_backbone(model, image_size, frames // 2), motion, self.flow).to(env.device)
            frames += 1
        else:
            sizes = dict(VITS[model], image_size=image_size, frames=frames, patch_size=patch_size,
                         tubelet_size=CONFIG.tubelet_size)
            if script == "mofo":
                self.model = mofo.MOFO(self.flow, CONFIG.mask_ratio, CONFIG.inside_ratio, **sizes)
            else:
                cfg, sizes["decoder_depth"] = mme.Config(), 1
                self.model = mme.MME(self.flow, cfg.target, cfg.length, cfg.stride, cfg.mask_ratio, **sizes)
                frames = mme.frames_to_read(cfg.target, frames, cfg.tubelet_size, cfg.stride, cfg.length)[0]
                if compile:
                    self.model.hog = partial(self.model.hog, of_frame=torch.compile(mme.frame_hog, dynamic=False))
            self.model.to(env.device)
        self.optimizer = make_optimizer("adamw", self.model, 1e-4, CONFIG.weight_decay)
        self.net = wrap_model(self.model, env, compile)
        self.batch = to_device(torch.randint(256, (views * clips, frames, image_size, image_size, 3), dtype=torch.uint8), env.device)
        if script == "mcl":
            self.batch = dict(clips=self.batch, order=torch.zeros(clips, dtype=torch.long, device=env.device))

    def flop(self):
        """Operations of a step, without those of flow; for a step that is not compiled."""
        if self.flow:
            self.model.flow = lambda clips: clips.new_zeros(len(clips), clips.shape[2] - 1, 2, *clips.shape[-2:], dtype=torch.float32)
        with FlopCounterMode(display=False) as counter:
            self()
        self.model.flow = self.flow
        return counter.get_total_flops()

    def __call__(self):
        with self.env.autocast():
            loss, _ = self.net(self.batch)
        loss.backward()
        clip_grad_norm_(self.model.parameters(), float("inf"))
        loss.item()                                                # the one wait of the loop
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def clock(env):
    """Wall time, once the device has finished."""
    if env.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def resident(key):
    """Memory of this process in bytes, VmRSS now or VmHWM at most; None where the system is not Linux."""
    path = Path("/proc/self/status")
    return int(re.search(rf"{key}:\s+(\d+)", path.read_text())[1]) * 1024 if path.exists() else None


def first_step(env, case):
    """For a process of its own: print seconds from building the model to the end of the first step, and GB that 3 steps take."""
    before, began = resident("VmRSS"), clock(env)
    step = Step(env, **case)
    step()
    seconds = clock(env) - began
    step(), step()
    memory = torch.cuda.max_memory_allocated() if env.device.type == "cuda" else before and resident("VmHWM") - before
    print(json.dumps([seconds, memory and memory / 1e9]))


def product_rate(env, reps=9):
    """Operations per second of a large matrix product in the type in which networks compute."""
    n = 8192 if env.device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=env.device, dtype=env.amp or torch.float32)
    return 2 * n**3 / medians({"product": lambda k: a @ b}, reps, partial(clock, env))["product"]


def bench_steps(env, modes, cases, reps):
    """Rows of speed, rows of the first step and memory (not on a GPU: compiling twice would take half an hour)."""
    speed, start, most = [], [], product_rate(env)
    for case in cases:
        text = f"{case['script']}, {case['model']}, {case['clips']} x {case['image_size']}^2, {case['flow'] or 'no flow'}"
        inner = 10 if env.device.type == "cuda" else 1
        steps, shares = {mode: Step(env, **case, compile=mode) for mode in modes}, {mode: [] for mode in modes}
        flop = steps[False].flop()

        def run(mode, k):
            began = clock(env)
            for _ in range(inner):
                steps[mode]()
            flow = steps[mode].flow
            shares[mode].append(100 * (flow.seconds() if flow else 0) / (clock(env) - began))
        times = medians({mode: partial(run, mode) for mode in modes}, reps, partial(clock, env))
        rates, flow = [[f(m) if m in modes else None for m in (False, True)] for f in (
            lambda m: case["clips"] * inner / times[m], lambda m: median(shares[m][1:]))]
        speed.append((text, *rates, over(*rates[::-1]), *flow, flop / case["clips"] / 1e9, 100 * flop / (times[modes[-1]] / inner) / most))
        steps.clear()                                              # free the models before the fresh processes
        if env.device.type == "cuda":
            speed[-1] += (torch.cuda.max_memory_allocated() / 1e9,)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            continue
        found = [(None, None)] * 2
        for mode in modes:
            with tempfile.TemporaryDirectory() as cache:           # of compiled code: empty, as on a fresh machine
                done = subprocess.run([sys.executable, __file__, "--device", env.device.type, "--case", json.dumps({**case, "compile": mode})],
                                      text=True, stdout=subprocess.PIPE, check=True, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache})
            found[mode] = json.loads(done.stdout.splitlines()[-1])
        start.append((text, *(x for a, b in zip(*found) for x in (a, b, over(b, a)))))
    return speed, start


def bench_flow(env, modes, weights, pairs, reps):
    clips = to_device(torch.randint(256, (pairs, 2, 224, 224, 3), dtype=torch.uint8), env.device)
    cases = [("raft_small", 6, 224), ("raft_small", 6, 128), ("raft_small", 12, 224), ("raft_large", 6, 224), ("tvl1", 0, 224)]
    flows = {(*case, mode): FlowEstimator(case[0], weights.get(case[0]), case[1], env.device, env.amp, mode, case[2])
             for case in cases for mode in modes}
    times = medians({key: lambda k, flow=flow: flow(clips) for key, flow in flows.items()}, reps, partial(clock, env))
    for case in cases:
        eager, compiled = (times[*case, m] / pairs * 1e3 if m in modes else None for m in (False, True))
        yield (f"{case[0]}, {case[1]} updates, at {case[2]}", eager, compiled, over(eager, compiled),
               times[*cases[0], modes[-1]] / times[*case, modes[-1]])


# ---- the run ---------------------------------------------------------------------------------------------------------

def read(root, args, env, few):
    made = make_videos(root)
    own = [p for p in sorted(Path(args.videos).rglob("*")) if p.suffix.lower() in VIDEO_FILES] if args.videos else []
    table("A random clip of 16 frames: open, decode, crop, scale to 224^2; ms of CPU time", "video | stride | against | ours, ms | "
          "other, ms | other / ours | mean difference of pixel values (of 255)", bench_clips(made | {p.name: (str(p), 4) for p in own}, 5 if few else 25))
    table("What the DataLoader delivers, clips/s of wall time", "video | workers | one process | as many plain processes | DataLoader | "
          "DataLoader / (workers x one process) | DataLoader / plain processes", bench_delivery(dict(list(made.items())[::2]), 3 if few else 9, args.workers, env.device))
    table("What length and number of clips cost, ms of CPU time", "b against a | a, ms | b, ms | b / a", bench_costs(made, 4 if few else 20))


def train(args, env, few, modes, weights):
    cuda = args.device == "cuda"
    flows = ("raft_small",) if cuda else ("tvl1", "raft_small")      # on a GPU compiling each takes minutes
    sizes = [("vit_base", 224, 16, 64)] if cuda else [("vit_tiny", 64, 8, 8), ("vit_small", 224, 16, 2), ("vit_base", 224, 16, 1)]
    cases = [dict(script=script, model=m, image_size=side, patch_size=patch, clips=clips, flow=flow, weights=weights)
             for m, side, patch, clips in sizes for flow in flows for script in ("mofo", "mme")]
    pairs = [("r2plus1d_18", 112, 32)] if cuda else [("vit_tiny", 64, 8), ("r2plus1d_18", 112, 2)]
    cases += [dict(script="fame", model=m, image_size=side, patch_size=16, clips=clips, flow=None, weights={}) for m, side, clips in pairs]
    pairs = [("mcl", "r2plus1d_50", 224, 8), ("modist", "slow_r50", 224, 64)] if cuda else [
        ("mcl", "vit_tiny", 64, 8), ("modist", "vit_tiny", 64, 8), ("mcl", "r2plus1d_50", 224, 1), ("modist", "slow_r50", 224, 2)]
    cases += [dict(script=script, model=m, image_size=side, patch_size=16, clips=clips, flow=flow, weights=weights)
              for script, m, side, clips in pairs for flow in flows]
    speed, start = bench_steps(env, modes, cases, 3 if few else 15)
    what = f"{args.device}, {str(env.amp or torch.float32)[6:]}"
    table(f"Pre-training step with clips of 16 frames (fame, modist: pairs of clips; mcl: videos), clips/s ({what})", "script, model, clips, flow | eager | compiled | "
          "compiled / eager | flow, % of eager | flow, % of compiled | GFLOP per clip without flow's | % of a matrix product's rate"
          + " | peak memory, GB" * cuda, speed)
    if not cuda:
        table("In a fresh process: building the model and the first step, s; peak memory, GB: "
              "VmHWM of the process less VmRSS before the model is built",
              "script, model, clips, flow | eager, s | compiled, s | compiled / eager | eager, GB | compiled, GB | compiled / eager", start)


def print_machine(args):
    cpuinfo = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    cpu = re.search(r"model name\s*:\s*(.*)", cpuinfo)
    versions = [f"{m.__name__} {m.__version__}" for m in (torch, torchvision, av, np)]
    versions += [f"{name} {m.__version__}" if m else f"{name} not installed (or does not load)" for name, m in OTHERS.items()]
    print(f"CPU: {cpu[1] if cpu else platform.processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start; "
          f"GPU: {torch.cuda.get_device_name() if args.device == 'cuda' else 'not used'}  \n"
          f"Python {platform.python_version()}, {', '.join(versions)}; torch uses {torch.get_num_threads()} threads to train, 1 to read  \n"
          f"Settings: {', '.join(f'{k} {v}' for k, v in vars(args).items() if k != 'case')}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--part", choices=("reading", "steps", "flow"), help="this alone")
    parser.add_argument("--videos", help="directory of videos to read too, at stride 4")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compiled steps too; default on a GPU")
    parser.add_argument("--workers", type=int, default=2, help="of the DataLoader")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    env = setup() if args.device == "cuda" else Env(torch.device("cpu"), 0, 1, None)
    if args.case:
        return first_step(env, args.case)
    cuda, few = args.device == "cuda", args.quick
    args.compile = cuda if args.compile is None else args.compile
    modes = (False, True) if args.compile else (False,)
    random.seed(0)
    if args.compile:
        torch._dynamo.config.recompile_limit = 100                 # cases share their code, not their shapes
    print_machine(args)

    with tempfile.TemporaryDirectory() as root:
        threads, parts = torch.get_num_threads(), [args.part] if args.part else ["reading", "steps", "flow"]
        weights = {name: f"{root}/{name}.pt" for name in ("raft_small", "raft_large")}
        for name, path in weights.items():
            torch.save(getattr(torchvision.models.optical_flow, name)().state_dict(), path)
        if "reading" in parts:
            torch.set_num_threads(1)                               # as in a worker of the DataLoader
            read(Path(root), args, env, few)
            torch.set_num_threads(threads)
        if "steps" in parts:
            train(args, env, few, modes, weights)
        if "flow" in parts:
            pairs, what = 256 if cuda else 4, f"{args.device}, {str(env.amp or torch.float32)[6:]}"
            table(f"Optical flow of 224^2 frames, {pairs} pairs at once, ms per pair ({what})", "estimator | eager | compiled | eager / compiled | "
                  "raft_small with 6 updates / this", bench_flow(env, modes, weights, pairs, 3 if few else 9))


if __name__ == "__main__":
    main()
