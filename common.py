"""Everything the five methods share: videos, data sets, optical flow, the backbone, and the plumbing of a run.

Nothing in this file is an equation of one of the five papers; those are in mofo.py and its siblings.  The sections:

    1 config    2 processes and devices    3 video    4 data sets    5 toy data    6 augmentation on the device
    7 optical flow    8 backbones    9 momentum contrast    10 public checkpoints    11 run    12 images

Clips are uint8 (B, 3, T, H, W) tensors until the network sees them.  Boxes are (x1, y1, x2, y2) in pixels, x2 and y2
exclusive.  `hidden` is a bool mask over tokens, True = masked.  Tokens are in (t, h, w) order, t slowest.
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import fcntl
import functools
import hashlib
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import typing
import zipfile
from bisect import bisect_right
from fractions import Fraction
from functools import partial
from itertools import chain, count, dropwhile, islice, pairwise, tee
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.optical_flow import Raft_Large_Weights, Raft_Small_Weights, raft_large, raft_small
from torchvision.models.optical_flow.raft import upsample_flow
from torchvision.utils import draw_bounding_boxes, flow_to_image, make_grid, save_image
from tqdm import tqdm


class UserError(SystemExit):
    """A mistake that the user can mend: ends the program with one line that says what, where, and what to do."""

    def __init__(self, message):
        super().__init__(f"error: {message}")


def _first_line(error):
    """The first line of what an exception says, or its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- 1. Config -----------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class RunConfig:
    """Where a run reads and writes, and how: the settings of all six scripts."""
    data: str = "toy"                  # toy, ssv2, epic, k400, ucf101, hmdb51, a directory, list file; finetune.py: ava
    root: str = ""                     # where the data set lies; default $VIDEO_ROOT/<data>, else data/<data>
    out: str = ""                      # directory of the run; default runs/<script>-<data>, of finetune.py with more
    fresh: bool = False                # start over instead of continuing the run in --out
    init: str = ""                     # start from the weights of this checkpoint
    steps: int = 0                     # optimiser steps instead of --epochs
    clip_grad: float = 0.0             # largest gradient norm; 0 = no clipping
    seed: int = 0                      # of everything that is random
    workers: int = 8                   # processes per GPU that read videos, in [0, 256]
    compile: bool = torch.cuda.is_available()  # torch.compile what runs in every step: network, flow
    log_every: int = 20                # steps between lines of the log
    save_every: int = 500              # steps between checkpoints
    toy_train: int = 1024              # toy: videos to train on
    toy_test: int = 256                # toy: videos to test on
    toy_size: int = 64                 # toy: side in pixels, in [16, 1024]


def parse_config(Config, recipes, argv=None):
    """Fill the dataclass `Config` from its defaults, then from `recipes`, then from the command line.

    Every field is a flag (`mask_ratio` -> `--mask-ratio`, bools also `--no-...`), its comment is the help text.  A
    recipe applies if all words of its key are among the values of data, recipe and mode; later ones override earlier
    ones.  Data of the user's own is the word "custom", a ViT as `backbone` the word "vit".
    A number must be in the interval that its comment names, e.g. `in (0, 1]`, else in [0, 1e9], or [1, 1e9] if it is
    whole and its default is not 0.  Flags that were given are in `.given`.  Raises UserError otherwise.
    """
    types, source = typing.get_type_hints(Config), inspect.getsource(RunConfig) + inspect.getsource(Config)
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", source, re.M))
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS, description=(
        f"Recipes: {', '.join(recipes)}. Defaults below are those of the class; a recipe overrides them."))
    groups = [parser.add_argument_group(title) for title in ("settings of the method", "settings of every run")]
    for field in dataclasses.fields(Config):
        name, kind, text = "--" + field.name.replace("_", "-"), types[field.name], comments.get(field.name, "")
        interval, add = "", groups[hasattr(RunConfig, field.name)].add_argument
        if {int, float} & {kind, *typing.get_args(kind)}:
            usual = "[1, 1e9]" if kind is int and field.default else "[0, 1e9]"
            interval = re.search(r"[\[(][\d.]+, [\w.]+[\])]", text + usual)[0]
        text = f"{text}{f', in {interval}' * (interval not in text)} (default: {field.default})".replace("%", "%%")
        if kind is bool:
            add(name, action=argparse.BooleanOptionalAction, help=text)
        elif typing.get_origin(kind) is typing.Literal:
            add(name, choices=typing.get_args(kind), help=text)
        else:
            add(name, type=_value(kind, interval), help=text)

    def complain(message):
        raise UserError(re.sub(r"^argument (\S+):", r"\1", message) + ". --help lists all flags")
    parser.error = complain
    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub(r"^--[\w-]+", lambda flag: flag[0].replace("_", "-"), word) for word in argv]   # --mask_ratio, too
    given = vars(parser.parse_args(argv))
    data = given.get("data", Config.data)
    words = {data if data in DATA_SETS else "custom"}
    words |= {given.get(name, getattr(Config, name, "")) for name in ("recipe", "mode")}
    for _ in range(2):                                                  # the recipe may have chosen the backbone
        settings = {}
        for key, values in recipes.items():
            settings |= values if set(key.split()) <= words else {}
        if (settings | given).get("backbone", "").startswith("vit"):
            words.add("vit")
    config = Config(**{**settings, "data": data, **given})
    config.given = set(given)
    return config


def _value(kind, interval):
    """A parser for one field type; numbers must be in the interval; `float | None` also accepts the word none."""
    convert, *others = typing.get_args(kind) or (kind,)

    def parse(text):
        if others and text.lower() == "none":
            return None
        value = convert(text)
        if interval:
            low, high = map(float, interval[1:-1].split(", "))
            open_end = value == low and interval[0] == "(" or value == high and interval[-1] == ")"
            if open_end or not low <= value <= high:
                raise argparse.ArgumentTypeError(f"{text}: must be in {interval}")
        return value
    parse.__name__ = convert.__name__                                   # argparse names it in its message
    return parse


def run(main, Config, recipes, argv=None):
    """main(its configuration).  What the system refuses (a full disk, a place not ours) or ends is a UserError, too."""
    sys.stdout.reconfigure(errors="backslashreplace")                   # a name of a file need not be text
    try:
        main(parse_config(Config, recipes, argv))
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        raise UserError("stopped by a signal") from None
    except torch.OutOfMemoryError as error:
        raise UserError(f"{_first_line(error)} Lower --device-batch or, in a test, --test-batch") from None
    except OSError as error:
        text = [type(error).__name__, *str(error).splitlines()][-1]     # a worker's error holds its traceback
        raise UserError(f"{text}. Is the disk full, or are --out and --root not for you to write to?") from None


# ---- 2. Processes and devices --------------------------------------------------------------------------------------

class Env(NamedTuple):
    """Where this process runs: its device, its rank among `world` processes, the autocast type (None = fp32)."""
    device: torch.device
    rank: int
    world: int
    amp: torch.dtype | None

    def autocast(self):
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)


def setup(seed=0):
    """Join the processes that torchrun started (one GPU each; nccl on GPUs, gloo on CPUs), or be the only one.

    Autocast is bf16, or fp16 on GPUs that lack it (then with a GradScaler); CPUs compute in fp32.
    """
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available()
    device, amp = torch.device("cuda", local) if cuda else torch.device("cpu"), None
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")                       # fp32 matmuls that remain may use TF32
        torch.backends.cudnn.benchmark = True
        torch.set_num_threads(1)                                         # the cores are the loader's: here we only draw
        amp = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if world > 1 and not dist.is_initialized():
        # torchrun keeps its store when it starts processes again: they must not read what those before wrote there.
        one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(world)              # nodes may count differently
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if one_node else ""
        store = dist.PrefixStore(attempt, next(dist.rendezvous("env://"))[0])
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world,
                                device_id=device if cuda else None)
    torch.manual_seed(seed)
    return Env(device, rank, world, amp)


def print0(*words):
    """Print on the first process only, past a progress bar if there is one."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(" ".join(map(str, words)))
        sys.stdout.flush()


def all_reduce_mean(x):
    """Mean of the tensor over all processes (itself where there is one)."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


def all_gather(x):
    """The tensors (n, ...) of all processes in order of rank, (world * n, ...); no gradient."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def once_per_disk(function):
    """Call the function on the first process, then on the first one of each node: where nodes share a disk it finds
    its work done, where they do not each has it."""
    for variable in ("RANK", "LOCAL_RANK"):
        if int(os.environ.get(variable, 0)) == 0:
            function()
        if dist.is_initialized():
            dist.barrier()


class RowGenerator(torch.Generator):
    """Knows which rows of the global batch this process computes: of .total those from .first on (see `rand`)."""


def rand(rows, *shape, generator=None, device="cpu"):
    """Uniform numbers (rows, *shape) in [0, 1).  With a RowGenerator they are drawn for the whole global batch and this
    process keeps its rows: neither the number of GPUs nor accumulation changes what a clip gets (our choice)."""
    first, total = getattr(generator, "first", 0), getattr(generator, "total", None) or rows
    return torch.rand(total, *shape, generator=generator, device=device)[first:first + rows]


# ---- 3. Video ------------------------------------------------------------------------------------------------------

# Frame n is the n-th frame that decoding the whole file yields.  The fast way trusts the packets and decodes from the
# key packet before a wanted frame on.  What is odd takes the sure way: decode from the start and count.  mp4 and mov
# list their packets in the header, so only the groups (a key packet up to the next one) that hold wanted frames are
# read; of other files, and of MPEG-4 Part 2, all packets: copy long ones once, `ffmpeg -i a.mkv -c copy a.mp4`.

FAST = {"h264", "hevc", "vp9", "libdav1d", "av1", "mpeg4"}             # codecs in which a packet is a frame, as a rule


class VideoError(ValueError):
    """The file cannot be read as a video; the message begins with its path."""


class VideoInfo(NamedTuple):
    frames: int
    fps: float          # mean frame rate
    height: int         # of the first frame as displayed: after the rotation in the metadata
    width: int
    seconds: float


class Video(contextlib.AbstractContextManager):
    """A video file, opened once; use it in `with`.  A broken file raises VideoError, now or later."""

    def __init__(self, path):
        self.path, self.file, self.counted = os.fspath(path), None, False   # counted: it takes the sure way
        self.crop_filter = functools.cache(_crop_filter)
        self._either_way(lambda: self.counted or self._list_packets())

    def __exit__(self, *_):
        if self.file:
            self.file.close()

    def _either_way(self, job, *args):
        """job(*args) the fast way or, if anything fails there, the sure one, where the file is at fault."""
        if not self.counted:
            with contextlib.suppress(Exception):
                return job(*args)
        try:
            self.counted or self._count()
            return job(*args)
        except Exception as error:
            self.__exit__()
            raise VideoError(f"{self.path}: {getattr(error, 'strerror', None) or _first_line(error)}") from error

    def _open(self):
        self.__exit__()
        if not os.path.isfile(self.path):                                       # a pipe would be waited for
            raise VideoError("no such file")
        self.file = av.open(f"file:{self.path}", metadata_errors="ignore")      # "a:b.mp4" alone names a protocol a
        cover = av.stream.Disposition.attached_pic
        self.stream = next((s for s in self.file.streams.video if s.codec_context and not s.disposition & cover), None)
        if self.stream is None:
            raise VideoError("no video stream, or none that can be decoded")
        self.codec, self.rate = self.stream.codec_context, self.stream.average_rate or self.stream.guessed_rate or 25
        self.codec.thread_count, self.codec.thread_type = 1, "NONE"         # clips run in parallel, at less cost

    def _count(self):
        self._open()
        frames, tick = self.file.decode(self.stream), self.stream.time_base
        first = next(frames, None)
        if first is None:
            raise VideoError("no frames")
        times = [first.pts, *(frame.pts for frame in frames)]
        self.first, self.total, self.counted = _upright(first), len(times), True
        self.times = sorted(int(n / self.rate / tick) if None in times else t for n, t in enumerate(times))

    def _list_packets(self):
        self._open()
        codec, index, self.packets, self.times = self.codec, self.stream.index_entries, None, None
        packets = (p for p in self.file.demux(self.stream) if p.size)
        head = next(packets)
        # Only the first packet tells some things, such as x264's build, whose faults are imitated.
        frame = [*codec.decode(head), *codec.decode(None)][0]
        codec.flush_buffers()
        self.first = _upright(frame)
        fast = codec.name in FAST and head.is_keyframe and frame.key_frame and not frame.interlaced_frame
        if codec.name != "mpeg4" and 0 < self.stream.frames == len(index):
            self.total = len(index)                                         # edit lists cut at both ends
            fast &= head.pts <= self.stream.start_time and not any(e.is_discard for e in index[:17] + index[-17:])
        else:
            packets = [head, *packets]
            self.times = sorted(p.dts if p.pts is None else p.pts for p in packets)
            self.packets, self.total = packets, len(packets)
            if codec.name == "mpeg4":
                self.packets = _mpeg4_pictures(packets, self.stream)
            shown = {p.pts for p in self.packets if not p.is_discard}
            fast &= len(shown) == self.total and self.packets[0].pts == min(shown)
        if not fast:
            raise VideoError

    @property
    def info(self):
        rate, times = self.rate, self.times or [0]
        span = (times[-1] - times[0]) * self.stream.time_base
        mean = (len(times) - 1) / span if span else rate
        rate = mean if abs(mean / rate - 1) > 0.02 else rate                # the header's may be that of packets
        seconds = max(0, self.file.duration or 0) / 1e6 or self.total / rate
        return VideoInfo(self.total, float(rate), self.first.height, self.first.width, float(seconds))

    def _group(self, n):
        """The group that holds frame n -> [(packet, frame number)] in decode order; fails if it is not as listed."""
        # What is decoded before a key packet is shown before everything from that packet on, in open groups too:
        # so the numbers of a group's frames are those of its packets, in order of display.
        listed = self.packets or self.stream.index_entries
        start = next(i for i in range(n, -1, -1) if listed[i].is_keyframe)
        stop = next((i for i in range(n + 1, self.total) if listed[i].is_keyframe), self.total)
        packets = listed[start:stop]
        if not self.packets:
            times = [entry.timestamp for entry in packets]
            self.file.seek(times[0], stream=self.stream)
            rest = dropwhile(lambda p: p.dts != times[0], self.file.demux(self.stream))
            *packets, after = islice(rest, stop - start + 1)
            if [p.dts for p in packets] != times or after.size and not after.is_keyframe:
                raise VideoError
        shown = sorted({p.pts for p in packets if not p.is_discard})
        numbers = dict(zip(shown, range(start, stop), strict=True))
        return [(p, numbers[p.pts]) for p in packets]

    def index_at(self, seconds):
        """Number of the frame on display `seconds` after the first one appears, clamped to the video."""
        return self._either_way(self._index_at, seconds)

    def _index_at(self, seconds):
        ticks = int((seconds + 5e-4) / self.stream.time_base)               # some containers round to milliseconds
        if self.times is not None:
            return max(bisect_right(self.times, self.times[0] + ticks) - 1, 0)
        now = self.stream.start_time + ticks
        n, shown = self.stream.index_entries.search_timestamp(now), []      # of the last key packet with dts <= now
        while n >= 0 and not shown:                                         # pts >= dts: it is there or before
            group = self._group(n)
            n, shown = min(k for _, k in group) - 1, [k for p, k in group if p.pts <= now]
        return max(shown, default=0)

    def _frames(self, wanted):
        """Set of frame numbers -> yields (number, frame), each once; fails if a frame is not the expected one."""
        if self.counted:
            self._open()                                                    # flushing would leave some state behind
            frames = enumerate(islice(self.file.decode(self.stream), max(wanted) + 1))
            yield from ((n, frame) for n, frame in frames if n in wanted)
            return
        runs, end = [], 0                                                   # each is decoded from a key packet on
        for n in sorted(wanted):
            if n >= end:
                run = self._group(n)
                start, stop = min(k for _, k in run), max(k for _, k in run) + 1
                if any(k in wanted and p.pts < run[0][0].pts for p, k in run):  # what is shown before the key packet
                    run = (runs.pop() if start == end else self._group(start - 1)) + run    # refers to the group before
                runs, end = [*runs, run], stop
        for run in runs:
            numbers, key, last = {p.pts: n for p, n in run}, run[0][0].pts, None
            # Time stamps that go back are those of display.  Then frames that no other refers to can be left out.
            # What follows the last wanted packet can, too, unless the order of display is not known.
            back = any(a.pts > b.pts for (a, _), (b, _) in pairwise(run))
            if back or not self.codec.has_b_frames or self.codec.name == "mpeg4":
                run = run[:1 + max(i for i, (_, n) in enumerate(run) if n in wanted)]
            skip = back and self.codec.name in ("h264", "mpeg4")
            for p, n in [*run, (None, None)]:                               # None drains the decoder
                self.codec.skip_frame = "NONREF" if skip and n not in wanted else "DEFAULT"
                for frame in self.codec.decode(p):
                    if last is None and frame.pts < key:                    # it refers to what is before the key packet
                        continue
                    n = numbers[frame.pts]
                    first = frame.pts == key and frame.key_frame
                    fits = first if last is None else n > last if back else n == last + 1
                    if not fits or frame.is_corrupt or frame.interlaced_frame:      # a field may be a packet of its own
                        raise VideoError
                    last = n
                    if n in wanted:
                        yield n, frame
            self.codec.flush_buffers()

    def read(self, indices, size=None, crop=None):
        """Frames `indices` (any order, repeats allowed) -> (len(indices), H, W, 3) uint8.

        size (H, W) of the output or None; crop (x1, y1, x2, y2) in displayed pixels, or one box per index; the same
        share of a frame of another size.  An index or box outside the video is a ValueError.
        """
        indices, (total, _, height, width, _) = [int(i) for i in indices], self.info
        if not indices or min(indices) < 0 or max(indices) >= total:
            raise ValueError(f"{self.path}: indices {indices} do not fit its {total} frames")
        boxes = np.broadcast_to((0, 0, width, height) if crop is None else crop, (len(indices), 4)).tolist()
        if not all(0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height for x1, y1, x2, y2 in boxes):
            raise ValueError(f"{self.path}: boxes {boxes} do not fit its {width} x {height} pixels")
        return self._either_way(self._read, indices, boxes, size)

    def _read(self, indices, boxes, size):
        images = [None] * len(indices)
        for n, frame in self._frames(set(indices)):
            cut = functools.cache(partial(self._cut, _upright(frame), size))    # a short video repeats its last frame
            for row in [row for row, index in enumerate(indices) if index == n]:
                images[row] = cut(*boxes[row])
        if any(image is None for image in images):
            raise VideoError("damaged, not all of its frames can be decoded")
        return np.stack(images)

    def _cut(self, frame, size, x1, y1, x2, y2):
        """Upright frame -> the box in it, (H, W, 3) uint8."""
        first = self.first                                                  # sides change in some files
        x1, x2 = x1 * frame.width // first.width, -(-x2 * frame.width // first.width)
        y1, y2 = y1 * frame.height // first.height, -(-y2 * frame.height // first.height)
        if size is None:
            return frame.to_ndarray(format="rgb24", threads=1)[y1:y2, x1:x2]
        if (x2 - x1, y2 - y1) != (frame.width, frame.height):
            if frame.format.name not in ("yuv420p", "yuvj420p"):            # of some the filter mixes up the bytes
                frame = frame.reformat(format="rgb24", threads=1)
            box = f"{x2 - x1}:{y2 - y1}:{x1}:{y1}:exact=1"
            crop = self.crop_filter(frame.width, frame.height, frame.format.name, box)
            crop.vpush(frame)
            frame = crop.vpull()
        return frame.reformat(size[1], size[0], "rgb24", interpolation="BILINEAR", threads=1).to_ndarray(threads=1)


def _crop_filter(width, height, pixel_format, box):
    graph = av.filter.Graph()
    source = graph.add_buffer(None, width, height, pixel_format, time_base=Fraction(1, 1))
    graph.link_nodes(source, graph.add("crop", box), graph.add("buffersink")).configure()
    return graph


def _upright(frame):
    """A frame as displayed: turned and mirrored by the display matrix, where the file has one."""
    matrix = frame.side_data.get("DISPLAYMATRIX")                           # x' = a x + c y, y' = b x + d y
    if matrix is None:
        return frame
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    image, right, down = frame.to_ndarray(format="rgb24", threads=1), a, d
    if abs(b) > abs(a):
        image, right, down = image.swapaxes(0, 1), c, b
    image = image[::-1 if down < 0 else 1, ::-1 if right < 0 else 1]
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")


def _mpeg4_pictures(packets, stream):
    """Packets of MPEG-4 Part 2 -> one for each picture, with its number on display as pts, which AVI does not tell."""
    # In packed streams a picture may lie in the packet before its own, which is tiny then.
    unpack, shown, waiting = av.bitstream.BitStreamFilterContext("mpeg4_unpack_bframes", stream), [], []
    pictures = [picture for p in packets for picture in unpack.filter(p)]
    if min(picture.size for picture in pictures) < 20:                      # of a picture that is left out
        raise VideoError
    for picture in pictures:
        data = bytes(picture)
        kind = data[data.index(b"\x00\x00\x01\xb6") + 4] >> 6
        picture.is_keyframe = kind == 0
        if kind == 2:                                                       # a B-frame: shown at once
            shown.append(picture)
        else:                                                               # shown when the next one that is none comes
            shown += waiting
            waiting = [picture]
    for n, picture in enumerate(shown + waiting):
        picture.pts = n
    return pictures


def probe(path):
    """Video file -> VideoInfo."""
    with Video(path) as video:
        return video.info


def read_clips(path, indices, size=None, crop=None):
    """Video.read in one call."""
    with Video(path) as video:
        return video.read(indices, size, crop)


# ---- 4. Data sets --------------------------------------------------------------------------------------------------

class Item(NamedTuple):
    """One training or test example: a file, or the part of it between two times in seconds."""
    path: str
    label: int = -1
    start: float = 0.0
    stop: float = math.inf


class Listing(NamedTuple):
    """A split of a data set: examples, class names (empty without labels), names that are listed but not there."""
    items: list
    classes: list
    missing: list
    summary: str


FILE_NAMES = dict(encoding="utf-8", errors="surrogateescape")            # in text files: names of files as they are
VIDEO_FILES = set(".mp4 .m4v .mov .avi .webm .mkv .mpg .mpeg .vob .ts .mts .m2ts .flv .wmv .3gp .ogv".split())
SPLIT_DIRS = {"train": ("train", "videos_train", "train_video", "training"),
              "test": ("val", "test", "validation", "valid", "videos_val", "val_video", "testing")}
LAYOUTS = {
    "ucf101": "v_*.avi files and ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt (02, 03 for --split 2, 3)",
    "hmdb51": "*.avi files and testTrainMulti_7030_splits/<class>_test_split1.txt (2, 3 for --split 2, 3)",
    "k400": "<youtube id>_<start>_<end>.mp4 files and train.csv, val.csv (or <split>/<class>/*.mp4)",
    "ssv2": "<id>.webm files and labels.json, train.json, validation.json (or something-something-v2-*.json)",
    "epic": "P01_01.MP4 ... files and EPIC_100_train.csv, EPIC_100_validation.csv",
}
DATA_SETS = ("toy", *LAYOUTS, "ava")
youtube_id = partial(re.sub, r"^(.{11})_\d+_\d+$", r"\1")                # of a name of k400: without start and end
LABELS = {"epic": ("verb", "noun", "action", "verb-noun"), "toy": ("motion", "scene")}         # the first by default


def find_videos(data, root=None, split="train", label="", toy=(), fold=1):
    """List a split of a data set in the layout in which it is downloaded -> Listing.

    data   toy, ucf101, hmdb51, k400, ssv2, epic; or a directory of videos; or a list file, see `_list_rows`
    root   where the data set lies, see `data_root`.  Annotations and videos may lie anywhere below and are joined by
           file stem.  For a list file: what its paths are relative to.
    split  train or test; toy also has train_biased, data of your own also all
    label  what to predict where there is a choice, see LABELS; of verb-noun labels are pairs
    toy    for toy: videos to train on, to test on, side in pixels; they are made on first use
    fold   which of the three published divisions into train and test, for ucf101 and hmdb51

    Raises UserError if nothing is found or the annotations do not join the files.
    """
    splits = TOY_SPLITS if data == "toy" else ("train", "test") if data in DATA_SETS else ("train", "test", "all")
    labels, folds = LABELS.get(data, ("",)), (1, 2, 3) if data in ("ucf101", "hmdb51") else (1,)
    label = label or labels[0]
    for flag, value, choices in (("--train-split or --part", split, splits), ("--label", label, labels),
                                 ("--split", fold, folds)):
        if value not in choices:
            raise UserError(f"{flag} {value}: {data} has {', '.join(map(str, choices)) or 'no choice'}")
    if data not in DATA_SETS:
        return _own_videos(Path(data or "''"), root, split)                # "" would be the working directory
    if data == "ava":
        raise UserError("--data ava is for finetune.py; pre-training takes its videos as --data DIR")
    root = data_root(data, root)
    if data == "toy":
        return _toy(root, split, label, *toy)
    files, videos = {}, {}                                                 # annotation file by name, video by stem
    for path in list_files(root):
        found, key = files, path.name.lower()
        if path.suffix.lower() in VIDEO_FILES:
            found, key = videos, youtube_id(path.stem) if data == "k400" else path.stem.lower()
        if not _size(found.get(key)):                                      # the first with content: k400's replacement/
            found[key] = path
    try:
        rows, classes = READERS[data](files, split, label, fold)
        ids = {name.lower(): i for i, name in enumerate(classes)}          # ucf101: copies differ in HandstandPushups
        rows = [(key, ids[name.lower()] if isinstance(name, str) else name, *times) for key, name, *times in rows]
        if not any(key in videos for key, *_ in rows):
            raise LookupError(f"listed are {[key for key, *_ in rows[:2]]}, found {list(videos)[:2]}")
    except Exception as error:
        if isinstance(error, StopIteration) and split_dir(root, split):    # k400 without a list
            return _own_videos(root, None, split)
        raise UserError(f"--data {data}: {root} (--root DIR or VIDEO_ROOT name another) is not as published, "
                        f"{type(error).__name__}: {error}. Expected there, in any depth: {LAYOUTS[data]}") from None
    return make_listing(data, split, [(key, videos.get(key), *rest) for key, *rest in rows], classes)


def data_root(data, root):
    """Where a data set lies: `root`, else $VIDEO_ROOT/<data>, else data/<data>."""
    return Path(root) if root else Path(os.environ.get("VIDEO_ROOT") or "data") / data


def list_files(root):
    """All files below root in a fixed order, without macOS's `._*` companions."""
    seen = set()                                                           # links may lead back to where they lie
    for folder, folders, names in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(d for d in folders if os.path.realpath(os.path.join(folder, d)) not in seen)
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("._"))


def _size(path):
    """Bytes of a file; None without a path, or where it leads to no file."""
    return path.stat().st_size if path and path.is_file() else None


def make_listing(data, split, rows, classes):
    """Rows (name, path or None, label[, start, stop]) -> Listing; prints the counts.  Files that are not there or empty
    are left out of training; in other splits they stay, so that they count as wrong: they cannot be read."""
    size_of = functools.cache(_size)                                       # many segments of a video
    sizes = [size_of(path) for _, path, *_ in rows]
    items = [Item(str(path or name), *rest) for (name, path, *rest), size in zip(rows, sizes)
             if size or not split.startswith("train")]
    missing = list(dict.fromkeys(str(path or name) for (name, path, *_), size in zip(rows, sizes) if not size))
    found = len(rows) - sizes.count(None) - sizes.count(0)
    summary = f"{data} {split}: {len(rows)} listed, {found} found, {sizes.count(None)} missing, {sizes.count(0)} empty"
    if not found:
        raise UserError(f"{summary}: nothing to read {missing[:1]}")
    summary += f", {len(classes)} classes" if classes else ""
    print0(summary)
    return Listing(items, classes, missing, summary)


# Each reader: annotation files by name, ... -> rows (stem of a video, name of its class[, start, stop]), class names.

def _ucf101(files, split, label, fold):
    pairs = [line.split() for line in read_lines(files["classind.txt"])]
    classes = [name for _, name in sorted((int(number), name) for number, name in pairs)]
    paths = [Path(line.split()[0]) for line in read_lines(files[f"{split}list0{fold}.txt"])]
    return [(path.stem.lower(), path.parent.name) for path in paths], classes


def _hmdb51(files, split, label, fold):
    end, wanted = f"_test_split{fold}.txt", "1" if split == "train" else "2"
    classes = sorted(name.removesuffix(end) for name in files if name.endswith(end))
    lines = [(name, *line.rsplit(None, 1)) for name in classes for line in read_lines(files[name + end])]
    return [(Path(video).stem.lower(), name) for name, video, code in lines if code == wanted], classes


def _k400(files, split, label, fold):
    ends = "train.csv" if split == "train" else ("val.csv", "validate.csv", "validation.csv")
    path = next(path for name, path in files.items() if name.endswith(ends) and _size(path))
    if "youtube_id" not in read_lines(path)[0]:                            # VideoMAE's form: path label
        rows, classes = _list_rows(path)
        return [(youtube_id(Path(video).stem), number) for video, number in rows], classes
    table = csv.DictReader(read_lines(path))
    rows = [(row["youtube_id"].strip(), row["label"].replace("_", " ").strip()) for row in table]
    return rows, sorted({name for _, name in rows})


def _ssv2(files, split, label, fold):
    def read(name):
        path = files.get(f"something-something-v2-{name}.json") or files[f"{name}.json"]
        return json.loads(path.read_text(encoding="utf-8-sig"))
    numbers, entries = read("labels"), read("train" if split == "train" else "validation")
    rows = [(e["id"].lower(), e["template"].replace("[", "").replace("]", "")) for e in entries]
    return rows, sorted(numbers, key=lambda name: int(numbers[name]))


def _epic(files, split, label, fold):
    names = {"train": "epic_100_train.csv", "test": "epic_100_validation.csv"}
    tables = {part: [*csv.DictReader(read_lines(files[name]))] for part, name in names.items() if name in files}
    pairs = {(int(row["verb_class"]), int(row["noun_class"])) for table in tables.values() for row in table}
    verbs, nouns = (_epic_names(files, kind, ids) for kind, ids in zip(("verb", "noun"), zip(*pairs)))
    classes = {"verb": verbs, "noun": nouns,
               "action": sorted(f"{verb}:{noun}" for verb, noun in pairs),                     # the 3,806 that occur
               "verb-noun": [f"verb:{name}" for name in verbs] + [f"noun:{name}" for name in nouns]}    # for one head
    rows = []
    for row in tables[split]:
        verb, noun = int(row["verb_class"]), int(row["noun_class"])
        target = {"verb": verb, "noun": noun, "action": f"{verb}:{noun}", "verb-noun": (verb, noun)}[label]
        stamps = ([float(x) for x in row[f"{end}_timestamp"].split(":")] for end in ("start", "stop"))
        rows.append((row["video_id"].lower(), target, *(3600 * h + 60 * m + s for h, m, s in stamps)))
    return rows, classes[label]


def _epic_names(files, kind, ids):
    """Names of the verb or noun classes from EPIC_100_{kind}_classes.csv; numbers where it has none."""
    path = files.get(f"epic_100_{kind}_classes.csv")
    names = {int(row["id"]): row["key"] for row in csv.DictReader(read_lines(path))} if path else {}
    if (last := max(*ids, *names, 0)) > 9999:
        raise ValueError(f"{kind} class {last}")
    return [names.get(i, str(i)) for i in range(1 + last)]


READERS = {"ucf101": _ucf101, "hmdb51": _hmdb51, "k400": _k400, "ssv2": _ssv2, "epic": _epic}


def read_lines(path):
    """The lines of a text file that are not empty, stripped."""
    text = Path(path).read_text(encoding="utf-8-sig", errors=FILE_NAMES["errors"])
    return [line.strip() for line in text.split("\n") if line.strip()]


def _toy(root, split, label, train=1024, test=256, size=64):
    """The toy data, written on first use; in its third split, `train_biased`, the scene gives the motion away."""
    root, videos = root / f"{size}px", test if split == "test" else train
    once_per_disk(lambda: make_toy(root, split, videos, size))
    column, classes = ("label", TOY_CLASSES) if label == "motion" else ("scene", TOY_SCENES)
    table = islice(csv.DictReader(read_lines(root / f"{split}.csv")), videos)
    rows = [(row["path"], root / split / Path(row["path"]).name, int(row[column])) for row in table]
    return make_listing("toy", split, rows, list(classes))


def _own_videos(path, root, split):
    """A directory ({train,val}/<class>/*, <class>/*, or any videos in any depth), a list file or a single video of
    the user's own; split "all" is everything below a directory."""
    if path.is_file() and path.suffix.lower() in VIDEO_FILES:
        return make_listing(path, split, [(path, path, -1)], [])
    if path.is_file():
        rows, classes = _list_rows(path)
        rows = [(video, Path(root or path.parent, video), label) for video, label in rows]
        return make_listing(path, split, rows, classes)
    if not path.is_dir():
        raise UserError(f"--data {path}: neither one of {', '.join(DATA_SETS)} nor an existing directory or list file")
    base, divided = split_dir(path, split) or path, any(split_dir(path, s) for s in SPLIT_DIRS)
    if split != "all" and base == path and divided:
        raise UserError(f"--data {path}: no directory {' or '.join(SPLIT_DIRS[split][:2])}, so no {split} split")
    files = [f for f in list_files(base) if f.suffix.lower() in VIDEO_FILES]
    folders = [f.relative_to(base).parts[0] if f.parent != base else "" for f in files]
    labelled = base != path or len(set(folders)) > 1 and not divided       # train, val of split "all" are no classes
    classes = sorted(set(folders)) if labelled and "" not in folders else []
    items = [Item(f, classes.index(c) if classes else -1) for f, c in zip(files, folders)]
    if classes and base == path and split != "all":                        # it comes without a split: make one
        items = hold_out(items, split)
    return make_listing(path, split, [(item.path, item.path, item.label) for item in items], classes)


def split_dir(path, split):
    """The directory of a split below path, in upper or lower case, or None."""
    below = {d.name.lower(): d for d in Path(path).glob("*") if d.is_dir()}  # none where path is a file
    return next((below[name] for name in SPLIT_DIRS.get(split, ()) if name in below), None)


def hold_out(items, split):
    """Items with labels -> those of split "train" or "test": the second of every five of a class is for testing."""
    places = {item.label: count() for item in items}
    return [item for item in items if (next(places[item.label]) % 5 == 1) == (split == "test")]


def _list_rows(path):
    """A text file with lines `path`, `path label` or `path,label` -> [(video, label or -1)], class names.

    The path ends with the suffix of a video and may hold spaces.  A number of frames before the label is skipped:
    `path 300 0`, `path,300,jump`.  Labels are numbers, -1 for none, or names; a name that holds a comma or begins with
    a number and a space is in quotes.  Raises UserError with the line.
    """
    suffixes = "|".join(suffix[1:] for suffix in VIDEO_FILES)
    form = re.compile(rf""" "?(.+\.(?:{suffixes}))"?                                # path
                            (?:[\s,]+\d[\d.]*(?=\s*,|\s+-?\d+$))?                  # number of frames
                            (?:[\s,]+("[^"]+"|(?!\d+\s)[^\s,"][^,"]*))?           # label
                        """, re.I | re.X)
    rows = []
    for line in read_lines(path):
        match = form.fullmatch(line.strip(" ,"))
        if not match:
            raise UserError(f"{path}: expected `path`, `path label` or `path,label` (of a video, no directory; quotes "
                            f"around a label with a comma or a number in front), got {line[:80]!r}")
        rows.append((match[1], (match[2] or "-1").strip('"')))
    labels = {label for _, label in rows}
    if labels <= {"-1"}:
        return [(video, -1) for video, _ in rows], []
    if "-1" in labels:
        raise UserError(f"{path}: some lines have a label and some have none or -1")
    if all(re.fullmatch("[0-9]{1,5}", label) for label in labels):         # longer ones are names
        return [(video, int(label)) for video, label in rows], [str(i) for i in range(1 + max(map(int, labels)))]
    ids = {name: i for i, name in enumerate(sorted(labels))}
    return [(video, ids[label]) for video, label in rows], list(ids)


class Clips(torch.utils.data.Dataset):
    """Clips of listed videos, read in worker processes.

    sample(video, item, rng) -> uint8 (K, T, H, W, 3), or a dict of arrays: the script's choice, e.g. K random clips.
    A key is (epoch, index), and the randomness of a sample is a function of (seed, epoch, index) alone.  A video that
    cannot be read is replaced by another one of the same epoch, if `replace`, and is reported in any case.  Returns
    (clips or None, name, label, errors).
    """

    def __init__(self, items, sample, seed=0, replace=True):
        self.items, self.sample, self.seed, self.replace = items, sample, seed, replace

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rng, errors = np.random.default_rng((self.seed, epoch, index)), []
        for _ in range(10 if self.replace else 1):
            item = self.items[index]
            try:
                with Video(item.path) as video:
                    return self.sample(video, item, rng), item.path, item.label, errors
            except VideoError as error:
                errors.append(" ".join(str(error).splitlines()))       # a file's name may hold several
                index = int(rng.integers(len(self.items)))
        return None, item.path, item.label, errors


def collate(samples):
    """n samples of `Clips` -> dict(clips, names, labels (n,), read (n,) bool, errors).

    clips is uint8 (B, T, H, W, 3), or a dict of such: the K clips of each sample that could be `read`, or None.
    """
    def join(found):
        if isinstance(found[0], dict):
            return {key: join([c[key] for c in found]) for key in found[0]}
        return torch.from_numpy(np.concatenate(found))

    clips, names, labels, errors = zip(*samples)
    found = [c for c in clips if c is not None]
    return dict(clips=join(found) if found else None, names=list(names), labels=torch.tensor(labels),
                read=torch.tensor([c is not None for c in clips]), errors=sum(errors, []))


def example_clips(dataset, count=8):
    """`count` samples evenly over the data set, for pictures; UserError if none of them can be read."""
    batch = collate([dataset[0, int(i)] for i in np.linspace(0, len(dataset) - 1, count)])
    if batch["clips"] is None:
        raise UserError(f"no video can be read; the first: {batch['errors'][0]}")
    return batch["clips"]


def loader(dataset, batches, workers, device):
    """Yields batches of keys as `collate` makes them, read ahead by worker processes with one thread each, which leave
    signals to us.  If one is killed the rest is read here, and batches say so: they hold `killed`."""
    batches, again = tee(batches)
    found = iter(torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate, worker_init_fn=_worker_init,
        pin_memory=device.type == "cuda"))                   # each is two batches ahead
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)              # else torch raises at once, in the middle of a step
    for keys in again:
        try:
            yield next(found)
        except (RuntimeError, ConnectionError, EOFError) as error:     # the last two: while it handed a batch over
            if "in DataLoader worker process" in str(error):           # of our own
                raise
            print(f"warning: a loader worker is gone ({error}): out of memory?", flush=True)
            yield from (dict(collate([dataset[key] for key in keys]), killed=True) for keys in chain([keys], again))


def _worker_init(_):
    torch.set_num_threads(1)
    os.setsid()                                                # what stops the process group lets the step end
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))      # how the parent ends its workers: quietly


def to_device(clips, device):
    """uint8 clips (B, T, H, W, 3) -> (B, 3, T, H, W) on the device; or a dict of clips and other tensors."""
    if isinstance(clips, dict):
        return {k: to_device(v, device) for k, v in clips.items()}
    moved = clips.to(device, non_blocking=True)
    return moved.permute(0, 4, 1, 2, 3) if clips.ndim == 5 else moved


def clip_indices(video, item, frames, stride, rng):
    """Frame numbers (frames,) of a random clip of a video, `stride` (rounded where it is no whole number) apart,
    inside the item's time span.  A span that is too short repeats its last frame.
    """
    (first, last), steps = item_frames(video, item), np.round(stride * np.arange(frames)).astype(int)
    return np.minimum(first + rng.integers(max(1, last - first + 1 - steps[-1])) + steps, last)


def item_frames(video, item):
    """First and last frame number of an item; a VideoError if the video ends before it begins."""
    if 0 < item.start > video.info.seconds:
        raise VideoError(f"{video.path}: lasts {video.info.seconds:.1f} s, without the segment from {item.start:.1f} s")
    first = video.index_at(item.start) if item.start else 0
    last = video.index_at(item.stop) if item.stop < math.inf else video.info.frames - 1
    return first, max(first, last)


def read_views(video, indices, boxes, size):
    """K clips of one video, from frame numbers (K, T) and boxes (K, 4) -> uint8 (K, T, H, W, 3) for a size (H, W) or
    the side of a square."""
    indices, size = np.stack(indices), (size, size) if isinstance(size, int) else size
    pixels = video.read(indices.ravel(), size, np.repeat(boxes, indices.shape[1], 0))
    return pixels.reshape(*indices.shape, *size, 3)


# ---- 5. Toy data ---------------------------------------------------------------------------------------------------

TOY_CLASSES = ("left", "right", "up", "down", "clockwise", "counter-clockwise", "to-and-fro", "zoom")
TOY_SCENES = ("gradient", "vertical", "horizontal", "diagonal", "checks", "rings", "rays", "blobs")
TOY_SPLITS = ("train", "test", "train_biased")


def toy_video(seed, split, index, size=64, frames=36, label=None, sprite=True):
    """One clip -> (video uint8 (F, H, W, 3), truth).  Same arguments, same clip.

    A sprite of one of four textures and three shapes, so that its looks do not tell its video, moves over a textured
    background while the camera pans; the class is only the sprite's motion.  In "train" and "test" the scene is
    independent of it; in "train_biased" the scene is the class with probability 0.9, else uniform over the other
    seven.  `label` overrides the class and changes nothing else; -1 = the sprite stands still in the scene, which
    without `sprite` is empty.  Lengths grow with `size` from 64 pixels; a clip holds the whole motion at any `frames`.

    truth: label, scene, size; order and radius of the sprite (see `_toy_depth`); per frame its centre (F, 2), scale
    (F,) and box (F, 4), clipped to the frame; camera (F, 2), the pan so far.  In pixels; pixel i covers [i, i + 1).
    """
    look, motion = np.random.default_rng([seed, TOY_SPLITS.index(split), index]).spawn(2)
    own, scene, other = look.integers(8), look.integers(8), look.integers(1, 8)
    if split == "train_biased":
        scene = own if look.random() < 0.9 else (own + other) % 8
    label = own if label is None else label

    time = np.linspace(0, 1, frames)[:, None]                                # (F, 1)
    start, end = motion.uniform(-3.2, 3.2, (2, 2))                           # pan: up to 0.3 px per frame at stride 2
    camera = start * time + (end - start) * time ** 2 / 2                    # (F, 2)
    path, scale = _toy_path(motion, label, time)
    path = path + camera
    centre = path + motion.uniform(7 - path.min(0), 57 - path.max(0))        # stays 7 px inside the frame
    order, radius = look.choice([1, 2, np.inf]), look.uniform(9, 14)
    reach = radius * scale                                                   # (F, 1)
    boxes = np.hstack([centre - reach, centre + reach]).clip(0, 64)

    unit = size / 64
    truth = {k: np.asarray(v, np.int64) for k, v in dict(label=label, scene=scene, size=size).items()}
    truth |= {k: np.asarray(v, np.float32) for k, v in dict(
        order=order, radius=radius * unit, centre=centre * unit, scale=scale[:, 0], boxes=boxes * unit,
        camera=camera * unit).items()}

    xy = _toy_grid(size)                                                     # (2, H, W)
    colours = look.uniform([[0.05], [0.25]], [[0.2], [0.45]], (2, 3))        # of the background
    texture = np.random.default_rng(look.integers(4))                        # and the sprite's: bright, and any
    colours = np.vstack([colours, texture.uniform([[0.75], [0.1]], [[1.0], [0.9]], (2, 3))])
    dark, middle, bright, fourth = colours.astype(np.float32)[..., None, None, None]             # (3, 1, 1, 1): fast
    ground = _toy_scene(look, TOY_SCENES[scene], *(xy[:, None] - truth["camera"].T[:, :, None, None]) / unit)
    x, y = (xy[:, None] - truth["centre"].T[:, :, None, None]) / (truth["scale"][:, None, None] * unit)
    angle, wave = texture.uniform(0, 6.28), 6.28 / texture.uniform(8, 14)    # the texture moves and zooms with it
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    plaid = 0.5 + 0.5 * np.sin(wave * u) * np.sin(wave * v)
    alpha = (_toy_depth(truth, slice(None)) + 0.5).clip(0, 1) * sprite       # the edge moves by fractions of a px
    video = (1 - alpha) * (dark + (middle - dark) * ground) + alpha * (bright + (fourth - bright) * plaid)
    return (video * 255).round().clip(0, 255).astype(np.uint8).transpose(1, 2, 3, 0), truth


def _toy_grid(size):
    """Pixel centres (2, H, W), x before y."""
    return np.mgrid[:size, :size][::-1].astype(np.float32) + 0.5


def _toy_path(rng, label, time):
    """The sprite's own motion: path (F, 2) in px, scale (F, 1), for time (F, 1) in [0, 1]."""
    travel = rng.uniform(36, 46)                                             # 2.1 to 2.6 px per frame at stride 2
    phase, turn = rng.uniform(0, 6.28), rng.uniform(0.4, 0.6)
    along, scale = 0 * time, 1 + 0 * time
    axis = np.array([np.cos(phase), np.sin(phase)])
    match TOY_CLASSES[label] if label >= 0 else "still":
        case "left" | "right" | "up" | "down" as name:
            along, axis = travel * time, np.array(dict(left=(-1, 0), right=(1, 0), up=(0, -1), down=(0, 1))[name])
        case "clockwise" | "counter-clockwise" as name:                      # y points down: + is clockwise
            along = travel / 6.28                                            # the radius: one turn
            angle = phase + 6.28 * time * (1 if name == "clockwise" else -1)
            axis = np.hstack([np.cos(angle), np.sin(angle)])                 # (F, 2)
        case "to-and-fro":
            along = travel * np.minimum(time, 2 * turn - time)
        case "zoom":                                                         # by 2.0 to 2.5, about as far as the rest
            scale = np.exp(rng.choice([-1, 1]) * rng.uniform(0.7, 0.9) * (time - 0.5))
    return along * axis, scale


def _toy_scene(rng, name, x, y):
    """Background texture in [0, 1] at the points x, y (F, H, W) in px.  A scene has the same layout in every clip, up
    to shifts of a few px, and long waves: so a network can learn in minutes what belongs where it cannot see."""
    a, b, cx, cy, length = rng.uniform([-0.2, -0.2, 30, 30, 31], [0.2, 0.2, 34, 34, 33]).tolist()   # keep float32
    dx, dy, wave = x - cx, y - cy, 6.28 / length
    spots = ((-20, -18), (16, -22), (22, 14), (-14, 20), (0, 0))             # of the blobs
    scenes = {
        "gradient": lambda: (dx * math.cos(a) + dy * math.sin(a)) / 40,
        "vertical": lambda: np.sin(wave * x + a),
        "horizontal": lambda: np.sin(wave * y + a),
        "diagonal": lambda: np.sin(wave * (x + y) / 1.41 + a),
        "checks": lambda: np.sin(wave * x + a) * np.sin(wave * y + b),
        "rings": lambda: np.sin(wave * np.hypot(dx, dy)),
        # faded at the centre, where they are too fine
        "rays": lambda: np.sin(6 * np.arctan2(dy, dx) + a) * np.hypot(dx, dy) / (np.hypot(dx, dy) + 6),
        "blobs": lambda: 2 * sum(np.exp(-((dx - u) ** 2 + (dy - v) ** 2) / 100) for u, v in spots).clip(0, 1) - 1}
    z = np.tanh(4 * scenes[name]())                                          # two colours with soft edges: see FAME
    plaid = np.sin(0.5 * x + a) * np.sin(0.42 * y + b)  # faint: without it stripes and plain areas would
    return 0.5 + 0.4 * z + 0.1 * plaid                                       # not tell flow how they move


def _toy_depth(truth, frame):
    """How many px each pixel centre lies inside the sprite, (..., H, W): radius - |p - centre|, in the norm that
    makes the sprite a diamond (order 1), a disc (2) or a square (inf)."""
    offset = np.abs(_toy_grid(truth["size"]) - truth["centre"][frame][..., None, None])        # (..., 2, H, W)
    edge = truth["radius"] * truth["scale"][frame][..., None, None]
    return edge - np.linalg.norm(offset, truth["order"], axis=-3)


def make_toy(root, split, count, size=64):
    """Write root/<split>/<index>.mp4, the truth of each as .npz, and root/<split>.csv with lines path,label,scene.

    The list is written last: with `count` videos or more there is nothing to do; videos that are there are kept.
    One root holds one size; a shorter list is the start of a longer one.  The global generator is left alone.
    """
    root, listing = Path(root), Path(root, f"{split}.csv")
    if listing.exists() and len(listing.read_text().splitlines()) > count:
        return
    (root / split).mkdir(parents=True, exist_ok=True)
    jobs = torch.utils.data.DataLoader(range(count), None, num_workers=os.cpu_count(), generator=torch.Generator(),
                                       collate_fn=partial(_write_toy, root, split, size))
    rows = list(tqdm(jobs, f"writing toy videos, {split}", count, unit="video", disable=None))
    temporary = Path(f"{listing}.{os.getpid()}.tmp")
    temporary.write_text("\n".join(["path,label,scene", *rows]))
    temporary.replace(listing)


def _write_toy(root, split, size, index):
    """Write one video and its truth unless they are there -> its row of the list."""
    path = root / split / f"{index:06d}.mp4"
    temporary = f"{path}.{os.getpid()}.tmp"
    if path.exists():                                                        # written after its truth: both complete
        truth = np.load(path.with_suffix(".npz"))
    else:
        video, truth = toy_video(0, split, index, size)
        np.savez(path.with_suffix(".npz"), **truth)
        content = io.BytesIO()                                               # a full disk is then Python's OSError
        with av.open(content, "w", format="mp4") as file:
            stream = file.add_stream("libx264", 16, width=size, height=size, pix_fmt="yuv420p", options=dict(
                preset="veryfast", qp="14", threads="1"))                    # of crf's files some differ each time
            for frame in video:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            file.mux(stream.encode())
        Path(temporary).write_bytes(content.getvalue())
        os.replace(temporary, path)
    return f"{split}/{path.name},{truth['label']},{truth['scene']}"


# ---- 6. Augmentation on the device ---------------------------------------------------------------------------------

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                  # ImageNet, as VideoMAE normalises


def to_float01(clips):
    """uint8 clips -> float32 in [0, 1]; float clips are that already."""
    return clips.float() / 255 if clips.dtype == torch.uint8 else clips


@functools.cache
def constant(values, device):
    """A tensor of numbers that never change, made once per device: making one lets the host wait for a GPU."""
    return torch.tensor(values, device=device)


def normalize(clips, config={}):
    """Clips (B, 3, T, H, W), uint8 or float in [0, 1] -> float32, with the mean and std of a network's config."""
    mean, std = (constant(config.get(k, v), clips.device).view(3, 1, 1, 1) for k, v in (("mean", MEAN), ("std", STD)))
    return (to_float01(clips) - mean) / std


def unnormalize(clips, config={}):
    """Inverse of `normalize`, up to the factor 255: (..., 3, T, H, W) -> colours in [0, 1]."""
    mean, std = (constant(config.get(k, v), clips.device).view(3, 1, 1, 1) for k, v in (("mean", MEAN), ("std", STD)))
    return clips * std + mean


def random_resized_crop(height, width, rng, area, ratio=(3 / 4, 4 / 3)):
    """A random box: its share of the frame is drawn from `area`, its aspect from `ratio`, each (least, most); the whole
    frame if none of 10 draws fits (our choice)."""
    for _ in range(10):
        size = height * width * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(size * aspect)), round(math.sqrt(size / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return x, y, x + w, y + h
    return 0, 0, width, height


def flip(clips, generator=None, p=0.5):
    """Mirror each clip (B, 3, T, H, W) left-right with probability p -> (clips, flipped (B,) bool)."""
    flipped = rand(len(clips), generator=generator, device=clips.device) < p
    return torch.where(flipped[:, None, None, None, None], clips.flip(-1), clips), flipped


YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))     # grey, and two of colour
FROM_YIQ = tuple(map(tuple, np.linalg.inv(YIQ).tolist()))


def colour_jitter(clips, generator=None, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8, grey=0.2):
    """Change the colours of clips (B, 3, T, H, W) in [0, 1], alike in all frames of a clip: with probability p jitter
    of up to the given strengths (hue in turns), with probability `grey` no colour.

    All of it is one affine map of colours per clip: factors in [1 - x, 1 + x] on everything (brightness), on the
    difference to the clip's mean grey (contrast), and on the colour's difference to its grey (saturation), which is
    also turned by up to `hue` (in YIQ).  So the four commute and their order, which torchvision draws, does not
    matter; we clamp once, at the end, where it clamps after each (our choice).
    """
    draw = rand(len(clips), 6, generator=generator, device=clips.device)        # (B, 6)
    amount = (2 * draw[:, :4] - 1) * (draw[:, 4:5] < p)                         # in (-1, 1), 0 = as it is
    b, c, s = ((1 + x * most).clamp(min=0) for x, most in zip(amount.unbind(1), (brightness, contrast, saturation)))
    s, turn = s * (draw[:, 5] >= grey), 2 * math.pi * hue * amount[:, 3]
    yiq, back = constant(YIQ, clips.device), constant(FROM_YIQ, clips.device)
    x, y, zero = s * turn.cos(), s * turn.sin(), torch.zeros_like(s)
    change = torch.stack([zero + 1, zero, zero, zero, x, -y, zero, y, x], 1).view(-1, 3, 3)           # of (Y, I, Q)
    colour = (b * c)[:, None, None] * (back @ change @ yiq)                     # (B, 3, 3)
    mean = clips.mean((2, 3, 4)) @ yiq[0]                                       # (B,) grey of the clip
    pixels = colour @ clips.flatten(2) + (b * (1 - c) * mean)[:, None, None]    # (B, 3, T H W)
    return pixels.clamp(0, 1).view_as(clips)


def blur(clips, generator=None, p=0.5, sigma=(0.1, 2.0)):
    """Gaussian blur of clips (B, 3, T, H, W) with probability p, sigma in pixels drawn per clip; the kernel is about
    a tenth of the width wide, the border reflected."""
    B, _, T, H, W = clips.shape
    draw = rand(B, 2, generator=generator, device=clips.device)
    width = (sigma[0] + (sigma[1] - sigma[0]) * draw[:, 0]).where(draw[:, 1] < p, 1e-3)               # (B,)
    reach = max(1, int(0.1 * W) // 2)
    x = torch.arange(-reach, reach + 1, device=clips.device)
    kernel = torch.exp(-x**2 / (2 * width[:, None] ** 2))                       # (B, k)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)     # (3 B, k), of colour c of clip b
    images = F.pad(clips.permute(2, 0, 1, 3, 4).flatten(1, 2), (reach,) * 4, mode="reflect")          # (T, 3 B, ...)
    images = F.conv2d(images, kernel[:, None, None], groups=3 * B)
    images = F.conv2d(images, kernel[:, None, :, None], groups=3 * B)           # (T, 3 B, H, W)
    return images.unflatten(1, (B, 3)).permute(1, 2, 0, 3, 4)


# ---- 7. Optical flow -----------------------------------------------------------------------------------------------

RAFT = {"raft_small": (raft_small, Raft_Small_Weights), "raft_large": (raft_large, Raft_Large_Weights)}


class FlowEstimator:
    """Optical flow between consecutive frames, computed where the clips are.

    name     "raft_small", "raft_large": torchvision's RAFT (Teed and Deng 2020), `updates` refinement steps; "tvl1"
    weights  a file with RAFT's weights under torchvision's names; None downloads torchvision's own
    amp      autocast type of RAFT's convolutions; correlations and coordinates stay fp32 (TF32 where the GPU has it)
    compile  compile the parts that run many times
    size     what the shorter side of larger frames is scaled to first

    Call with clips (B, 3, T, H, W), uint8 or float in [0, 1] -> flow (B, T-1, 2, h, w): the (x, y) displacement in
    pixels of the (h, w) grid from frame t to frame t+1.  The grid is that of the (scaled) clips; RAFT's has sides of
    multiples of 8, at least 128.  Raises UserError if the weights cannot be had.
    """

    def __init__(self, name, weights=None, updates=6, device="cpu", amp=None, compile=False, size=math.inf):
        self.name, self.updates, self.device, self.amp, self.size = name, updates, torch.device(device), amp, size
        self._marks = []                                         # when each call began and ended
        compile = compile and can_compile()
        self.inner = torch.compile(_tvl1_inner, dynamic=False) if compile else _tvl1_inner
        if name == "tvl1":
            return
        try:
            make, published = RAFT[name]
            self.raft, download = make(), published.DEFAULT.get_state_dict
            state = load_file(weights)["model"] if weights else download(progress=False, check_hash=True)
            self.raft.load_state_dict({k.removeprefix("module."): x for k, x in state.items()})
        except (Exception, UserError) as error:                  # network, file or names: each is for the user to mend
            what = f"--raft-weights {weights}" if weights else f"downloading torchvision's {name}"
            raise UserError(f"{what} failed ({_first_line(error)[:200]}). Give torchvision's {name} as --raft-weights "
                            "FILE, or --flow tvl1, which needs none") from None
        self.raft.to(self.device).eval().requires_grad_(False)
        self.refine = torch.compile(_refine, dynamic=False) if compile else _refine
        for part in (self.raft.feature_encoder, self.raft.context_encoder) if compile else ():
            part.compile(dynamic=False)

    @torch.no_grad()
    def __call__(self, clips):
        began = self._now()
        video = to_float01(clips).transpose(1, 2).float()                                     # (B, T, 3, H, W)
        B, T, _, H, W = video.shape
        scale, (least, multiple) = min(1, self.size / min(H, W)), (1, 1) if self.name == "tvl1" else (128, 8)
        side = tuple(max(least, round(s * scale / multiple) * multiple) for s in (H, W))
        if side != (H, W):
            video = F.interpolate(video.flatten(0, 1), side, mode="bilinear", antialias=True).unflatten(0, (B, T))
        some, flow = self.chunk(*side), []                                                    # pairs at a time
        clips_at_once = max(1, some // (T - 1))                                               # a longer clip in pieces
        even = max(n for n in range(1, clips_at_once + 1) if B % n == 0)                      # divides B
        estimate = partial(tvl1, inner=self.inner) if self.name == "tvl1" else self._raft
        with torch.autocast(self.device.type, enabled=False):
            for part in video.split(even if 2 * even > clips_at_once else clips_at_once):     # even: one graph for all
                pieces = [part[:, t:t + some + 1] for t in range(0, T - 1, some)]
                flow.append(torch.cat([estimate(piece).unflatten(0, (len(part), -1)) for piece in pieces], 1))
        self._marks.append((began, self._now()))
        return torch.cat(flow)

    def chunk(self, h, w):
        """Pairs at a time: on a GPU so that RAFT's correlations take 1.4 GB at most, on a CPU to stay in its cache."""
        return max(1, min(512, 2**28 // (h * w // 64) ** 2) if self.device.type == "cuda" else 2**19 // (h * w))

    def _raft(self, video):
        """RAFT of neighbouring frames, video (n, T, 3, h, w) -> (n (T-1), 2, h, w).

        What torchvision's `forward` does, but every frame is encoded once instead of as first and as second one, only
        the last flow is upsampled, and nothing is made on the CPU for a GPU that would have to wait for it.
        """
        raft, video = self.raft, video * 2 - 1
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            maps = raft.feature_encoder(video.flatten(0, 1)).float()                          # (n T, C, h / 8, w / 8)
            context = raft.context_encoder(video[:, :-1].flatten(0, 1)).float()               # (n (T-1), ...)
        maps = maps.unflatten(0, video.shape[:2])
        raft.corr_block.build_pyramid(maps[:, :-1].flatten(0, 1), maps[:, 1:].flatten(0, 1))
        size = raft.update_block.hidden_state_size
        hidden, context = context[:, :size].tanh(), context[:, size:].relu()
        y, x = (torch.arange(side, device=self.device) for side in context.shape[-2:])
        here = torch.stack(torch.meshgrid(x, y, indexing="xy")).float().expand(len(context), -1, -1, -1)
        there = here                                                                          # (n (T-1), 2, ...)
        for _ in range(self.updates):
            hidden, there = self.refine(raft, hidden, context, here, there, self.amp)
        return upsample_flow(there - here, raft.mask_predictor and raft.mask_predictor(hidden))

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self):
        """Time spent in flow since the last call of this method (on a GPU: its own time; waits for it to finish)."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        marks, self._marks = self._marks, []
        return sum(a.elapsed_time(b) / 1000 if self.device.type == "cuda" else b - a for a, b in marks)


def _refine(raft, hidden, context, here, there, amp):
    """One update of RAFT: its hidden state and where each point `here` (n, 2, h, w) goes -> both, new."""
    correlation = _look_up(raft.corr_block.corr_pyramid, there, raft.corr_block.radius)
    with torch.autocast(there.device.type, amp, enabled=amp is not None):
        hidden, change = raft.update_block(hidden, context, correlation, there - here)
    return hidden.float(), there + change.float()


def _look_up(pyramid, there, radius):
    """Correlations around points there (n, 2, h, w): pyramid, of each level maps (n h w, 1, H, W) -> (n, C, h, w).

    torchvision samples each place of a window by itself, bilinearly, 0 outside.  All lie between the same pixels, so
    we read one patch per point and mix neighbours: half the time, and cuDNN's limit of 65,535 maps does not matter.
    """
    found, reach = [], torch.arange(-radius, radius + 2, device=there.device)
    for level, maps in enumerate(pyramid):
        H, W = maps.shape[-2:]
        place = (there / 2**level).permute(0, 2, 3, 1).reshape(-1, 2, 1).nan_to_num()
        (x, y), (right, down) = place.floor().long().unbind(1), (place - place.floor()).unbind(1)       # (n h w, 1)
        x, y = x + reach, y + reach                                                             # (n h w, 2 radius + 2)
        inside = ((y >= 0) & (y < H))[:, :, None] & ((x >= 0) & (x < W))[:, None]
        index = y.clamp(0, H - 1)[:, :, None] * W + x.clamp(0, W - 1)[:, None]
        patch = maps.flatten(1).gather(1, index.flatten(1)).view(index.shape) * inside
        patch = patch[:, :-1].lerp(patch[:, 1:], down[..., None])
        found.append(patch[:, :, :-1].lerp(patch[:, :, 1:], right[..., None]).mT.flatten(1))   # x slowest
    return torch.cat(found, 1).unflatten(0, there[:, 0].shape).permute(0, 3, 1, 2)


def spatial_gradient(x, middle=1):
    """True gradient per pixel of maps (..., H, W) -> (..., 2, H, W), d/dx first.

    Central differences averaged over the three rows (columns) around a pixel, i.e. the Prewitt kernel / 6, or with
    the `middle` one weighted twice the Sobel kernel / 8; the border is replicated.
    """
    shape = x.shape
    x = F.pad(x.reshape(1, -1, *shape[-2:]), (1, 1, 1, 1), mode="replicate")[0]               # (n, H + 2, W + 2)
    rows = x[:, :-2] + middle * x[:, 1:-1] + x[:, 2:]                                          # (sums: 2 to 15 times
    columns = x[..., :-2] + middle * x[..., 1:-1] + x[..., 2:]                                 # as fast as conv2d)
    d = torch.stack([rows[..., 2:] - rows[..., :-2], columns[:, 2:] - columns[:, :-2]], 1) / (4 + 2 * middle)
    return d.reshape(*shape[:-2], 2, *shape[-2:])


def warp(image, flow):
    """Read image (B, C, H, W) where the flow (B, 2, H, W), in pixels, points: bilinear, border replicated."""
    H, W = flow.shape[-2:]
    y, x = torch.meshgrid(*(torch.arange(0.5, n, device=flow.device) * 2 / n - 1 for n in (H, W)), indexing="ij")
    grid = flow.permute(0, 2, 3, 1) * constant((2 / W, 2 / H), flow.device) + torch.stack([x, y], -1)     # (B, H, W, 2)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _tvl1_inner(flow, px, py, gradient, slope, residual, step, theta, tau=0.25):
    """One step on the data term and one on the dual (px, py), which is held times theta / tau.  Neighbours are those in
    memory, three times as fast: beyond a last column (row) they are wrong, but there differences and dual are 0."""
    rho = residual.addcmul(slope[:, :1], flow[:, :1]).addcmul_(slope[:, 1:], flow[:, 1:]).clamp_(-step, step)
    flow = flow.addcmul(gradient, rho, value=-1).add_(px, alpha=tau).add_(py, alpha=tau)
    u, W, dx, dy = flow.view(-1), flow.shape[-1], torch.empty_like(flow), torch.empty_like(flow)
    u[1:].sub_(px.view(-1)[:-1], alpha=tau)
    u[W:].sub_(py.view(-1)[:-W], alpha=tau)                          # flow + theta * divergence of the dual
    torch.sub(u[1:], u[:-1], out=dx.view(-1)[:-1])                   # forward differences
    torch.sub(u[W:], u[:-W], out=dy.view(-1)[:-W])
    dx[..., -1], dy[..., -1, :] = 0, 0
    length = (dx * dx).addcmul_(dy, dy).sqrt_().mul_(tau / theta).add_(1)
    return flow, dx.add_(px).div_(length), dy.add_(py).div_(length)


def tvl1(video, smoothness=0.1, theta=0.15, warps=3, iterations=10, coarsest=16, inner=_tvl1_inner):
    """TV-L1 flow (Zach, Pock and Bischof 2007) of neighbouring frames, (n, T, 3, H, W) in [0, 1] -> (n (T-1), 2, H, W).

    Minimises |grad u| + smoothness * |second(x + u) - first(x)| from coarse to fine, alternating a pointwise step on
    the data term with a dual step on the total variation; flow in pixels, grey values 0..255.  The constants (usual:
    0.15, 0.3) take a third off the error on the toy sprites and agree better with RAFT on real clips.  The finest level
    has half the image's size: 4x cheaper at the same agreement (our choices).
    """
    H, W = video.shape[-2:]
    grey = video.mul(constant((76.2, 149.7, 29.1), video.device)[:, None, None]).sum(2)        # (n, T, H, W)
    sides = [(H // 2**k, W // 2**k) for k in range(1, 8) if min(H, W) // 2**k >= coarsest] or [(H, W)]
    flow = grey.new_zeros(grey[:, 1:, 0, 0].numel(), 2, *sides[-1])               # (B, 2, h, w), B = n (T-1)
    for h, w in reversed(sides):
        small = F.interpolate(grey, (h, w), mode="bilinear", antialias=True, align_corners=False)
        I0, I1 = (x.reshape(-1, 1, h, w) for x in (small[:, :-1], small[:, 1:]))
        flow = resize_flow(flow, h, w)
        px, py = torch.zeros_like(flow), torch.zeros_like(flow)                   # the dual: (B, component of u, h, w)
        for _ in range(warps):
            warped = warp(I1, flow)
            gradient = spatial_gradient(warped[:, 0])                             # (B, 2, h, w)
            square = gradient.square().sum(1, keepdim=True) + 1e-6
            slope, residual = gradient / square, (warped - I0 - (gradient * flow).sum(1, keepdim=True)) / square
            for _ in range(iterations):
                flow, px, py = inner(flow, px, py, gradient, slope, residual, smoothness * theta, theta)
    return resize_flow(flow, H, W)


def resize_flow(flow, h, w):
    """Flow (B, 2, H, W) in pixels of its grid -> (B, 2, h, w) in pixels of the new one."""
    if flow.shape[-2:] == (h, w):
        return flow
    scale = constant((w / flow.shape[-1], h / flow.shape[-2]), flow.device).view(2, 1, 1)
    return F.interpolate(flow, (h, w), mode="bilinear", align_corners=False) * scale


# ---- 8. Backbones --------------------------------------------------------------------------------------------------

# Sizes of the encoder, then of the decoder that VideoMAE puts on it (tiny: our choice).
VITS = {name: dict(zip(("dim", "depth", "heads", "decoder_dim", "decoder_depth", "decoder_heads"), sizes))
        for name, sizes in dict(vit_tiny=(96, 3, 3, 96, 2, 3), vit_small=(384, 12, 6, 192, 4, 3),
                                vit_base=(768, 12, 12, 384, 4, 6), vit_large=(1024, 24, 16, 512, 12, 8),
                                vit_huge=(1280, 32, 16, 640, 12, 8)).items()}


def patchify(clips, patch_size, tubelet_size):
    """Clips (B, C, T, H, W) -> tokens (B, N, C * tubelet * patch^2); inside a token the order is (c, t, h, w)."""
    B, C, T, H, W = clips.shape
    t, p = tubelet_size, patch_size
    x = clips.reshape(B, C, T // t, t, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(B, -1, C * t * p * p)


def unpatchify(tokens, grid, patch_size, tubelet_size):
    """Inverse of `patchify`: (B, N, C * tubelet * patch^2) -> (B, C, T, H, W) for a token grid (T', H', W')."""
    (T, H, W), t, p = grid, tubelet_size, patch_size
    x = tokens.reshape(len(tokens), T, H, W, -1, t, p, p)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(len(tokens), -1, T * t, H * p, W * p)


def sincos_positions(count, dim):
    """Fixed positions (1, count, dim) over the flat token index: sin in even features, cos in odd ones (VideoMAE)."""
    angle = np.arange(count)[:, None] / 10000 ** (2 * (np.arange(dim) // 2) / dim)
    angle[:, 0::2], angle[:, 1::2] = np.sin(angle[:, 0::2]), np.cos(angle[:, 1::2])
    return torch.tensor(angle, dtype=torch.float32)[None]


def init_linear(network, init, **options):
    """Set the weights of all linear layers in a network by `init`, a function of nn.init; their biases become 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            init(layer.weight, **options)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):                                                          # (B, n, D)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])  # softmax ignores a key bias
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))  # (B, n, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                       # each (B, heads, n, d)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Sequential):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.gelu, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)


class Block(nn.Module):
    """Pre-norm transformer block; drop_path, if not None: share of samples whose residual branch is 0, in training."""

    def __init__(self, dim, heads, drop_path=None):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim, 4 * dim)
        rate = None if drop_path is None else torch.tensor(float(drop_path))     # a tensor: one graph for all blocks
        self.register_buffer("drop_path", rate, persistent=False)

    def dropped(self, branch):
        if self.drop_path is None or not self.training:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)

    def forward(self, x):
        x = x + self.dropped(self.attn(self.norm1(x)))
        return x + self.dropped(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Linear embedding of patches (B, n, 3 * tubelet * patch^2); stored as the Conv3d of the public checkpoints."""

    def __init__(self, dim, patch_size, tubelet_size):
        super().__init__()
        size = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(3, dim, size, size)

    def forward(self, patches):
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ViT(nn.Module):
    """Joint space-time transformer (VideoMAE): normalised clips (B, 3, T, H, W) -> (B, dim) or (B, num_classes).

    norms names the layer norms that exist: `norm` on the tokens (pre-training), `fc_norm` on their mean.  With
    num_classes only fc_norm does, before `head`, as VideoMAE fine-tunes.  State-dict names: those of its checkpoints.
    """

    def __init__(self, image_size, frames, patch_size, tubelet_size, dim, depth, heads, num_classes=0, drop_path=0.0,
                 norms=("norm",), mean=MEAN, std=STD):
        super().__init__()
        if image_size % patch_size or frames % tubelet_size or dim % heads:
            raise UserError(f"image_size {image_size} / patch_size {patch_size}, frames {frames} / tubelet_size "
                            f"{tubelet_size} and dim {dim} / heads {heads} must divide without rest")
        norms = ("fc_norm",) if num_classes else tuple(norms)
        self.config = dict(image_size=image_size, frames=frames, patch_size=patch_size, tubelet_size=tubelet_size,
                           dim=dim, depth=depth, heads=heads, norms=norms, mean=mean, std=std)
        self.dim, self.patch_size, self.tubelet_size = dim, patch_size, tubelet_size
        self.grid = (frames // tubelet_size, image_size // patch_size, image_size // patch_size)   # (T', H', W')
        self.patch_embed = PatchEmbed(dim, patch_size, tubelet_size)
        self.register_buffer("positions", sincos_positions(math.prod(self.grid), dim), persistent=False)
        rates = [drop_path * i / max(1, depth - 1) if drop_path else None for i in range(depth)]
        self.blocks = nn.Sequential(*(Block(dim, heads, rate) for rate in rates))
        self.norm, self.fc_norm = (nn.LayerNorm(dim, eps=1e-6) if name in norms else nn.Identity()
                                   for name in ("norm", "fc_norm"))
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        init_linear(self, nn.init.trunc_normal_, std=0.02)
        if num_classes:
            self.head.weight.data.mul_(0.001)                                      # VideoMAE's init_scale

    def tokens(self, patches, keep=None, positions=None):
        """Encode patches (B, N, P), or only those at keep (B, n) -> (B, n, dim): the cost is that of what is kept."""
        positions = self.positions if positions is None else positions
        if keep is not None:
            patches, positions = (x.take_along_dim(keep[..., None], 1) for x in (patches, positions))
        return self.norm(self.blocks(self.patch_embed(patches) + positions))

    def forward_map(self, clips):
        """(B, 3, T, H, W) -> feature map (B, dim, T', H', W').  For frames of another size than the network's the
        positions are interpolated, bicubically, frame by frame."""
        grid, positions = (self.grid[0], *(side // self.patch_size for side in clips.shape[-2:])), self.positions
        if grid != self.grid:
            maps = positions[0].T.unflatten(1, self.grid).transpose(0, 1)                  # (T', dim, H', W')
            maps = F.interpolate(maps, grid[1:], mode="bicubic", align_corners=False)
            positions = maps.transpose(0, 1).flatten(1).T[None]
        x = self.tokens(patchify(clips, self.patch_size, self.tubelet_size), positions=positions)
        return x.transpose(1, 2).unflatten(2, grid)

    def pooled(self, clips):
        """(B, 3, T, H, W) -> (B, dim): what the head gets."""
        return self.fc_norm(self.forward_map(clips).flatten(2).mean(-1))

    def forward(self, clips):
        return self.head(self.pooled(clips))


class ConvNet(nn.Module):
    """Convolutional stages: normalised clips (B, 3, T, H, W) -> (B, dim), or logits (B, num_classes)."""

    def __init__(self, stages, dim, num_classes=0, **config):
        super().__init__()
        self.stages, self.dim, self.config = list(stages), dim, config
        for name, stage in stages.items():
            self.add_module(name, stage)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        init_linear(self.head, nn.init.normal_, std=0.01)

    def forward_map(self, x):
        """(B, 3, T, H, W) -> feature map (B, dim, T', H', W')."""
        for name in self.stages:
            x = getattr(self, name)(x)
        return x

    def pooled(self, clips):
        """(B, 3, T, H, W) -> (B, dim): what the head gets."""
        return self.forward_map(clips).mean((2, 3, 4))

    forward = ViT.forward                                                          # the head of what is pooled


def conv3d(inputs, outputs, kernel, stride=1):
    """Convolution without bias by a kernel (t, h, w) of odd sides, padded, with a stride in space."""
    return nn.Conv3d(inputs, outputs, kernel, (1, stride, stride), [side // 2 for side in kernel], bias=False)


class Bottleneck(nn.Module):
    """ResNet bottleneck in 3-D: `time` is the temporal kernel, of the first convolution or, if `split`, of one behind
    the spatial convolution, without norm or activation between them."""

    def __init__(self, inputs, width, stride, time, split):
        super().__init__()
        self.conv1 = conv3d(inputs, width, (1 if split else time, 1, 1))
        self.conv2 = conv3d(width, width, (1, 3, 3), stride)
        if split:
            self.conv2 = nn.Sequential(self.conv2, conv3d(width, width, (time, 1, 1)))
        self.conv3 = conv3d(width, 4 * width, (1, 1, 1))
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm3d(width), nn.BatchNorm3d(width), nn.BatchNorm3d(4 * width)
        self.downsample = None
        if stride > 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(conv3d(inputs, 4 * width, (1, 1, 1), stride), nn.BatchNorm3d(4 * width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (self.downsample(x) if self.downsample else x))


class ResNet3D(ConvNet):
    """ResNet-50 for video, no temporal stride behind the stem.  `width` multiplies all channels.

    "slow_r50"     MoDist's: temporal kernels 1, 1, 3, 3 on the bottlenecks' first convolution, stem stride 2 in time
    "motion_r50"   MoDist's for motion: the same without temporal kernels behind the stem
    "r2plus1d_50"  MCL's: every 3x3 convolution is followed by a temporal one, stem stride 4 in time
    """

    def __init__(self, name, width=1.0, image_size=224, frames=16, num_classes=0):
        kernel, stride, times = {"slow_r50": (5, 2, (1, 1, 3, 3)), "motion_r50": (5, 2, (1, 1, 1, 1)),
                                 "r2plus1d_50": (4, 4, (3, 3, 3, 3))}[name]
        split, inputs = name == "r2plus1d_50", int(64 * width)
        padding = (0 if split else kernel // 2, 3, 3)
        stem = nn.Sequential()
        stem.conv1 = nn.Conv3d(3, inputs, (kernel, 7, 7), (stride, 2, 2), padding, bias=False)
        stem.bn1, stem.relu = nn.BatchNorm3d(inputs), nn.ReLU()
        stem.pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        stages = dict(stem=stem)
        for i, (blocks, kernel) in enumerate(zip((3, 4, 6, 3), times)):
            inner, layer = int(64 * width) * 2**i, []
            for j in range(blocks):
                layer.append(Bottleneck(inputs, inner, 2 if i and not j else 1, kernel, split))
                inputs = 4 * inner
            stages[f"layer{i + 1}"] = nn.Sequential(*layer)
        super().__init__(stages, inputs, num_classes, name=name, width=width, image_size=image_size, frames=frames)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Bottleneck) and not split:
                nn.init.zeros_(module.bn3.weight)                                  # each block starts as the identity


BACKBONES = (*VITS, "r2plus1d_18", "r3d_18", "s3d", "slow_r50", "r2plus1d_50")


def make_backbone(name="", image_size=224, frames=16, num_classes=0, patch_size=16, tubelet_size=2, width=1.0,
                  mean=MEAN, std=STD, **vit):
    """A network by name, or from the `config` of one that exists: ViT, ResNet3D or one of torchvision's (18 layers:
    Tran et al. 2018; S3D: Xie et al. 2018).  All have .config, .dim and forward_map; with num_classes also a head."""
    if name in VITS:
        vit |= {key: VITS[name][key] for key in ("dim", "depth", "heads")}
    if "dim" in vit:
        return ViT(image_size, frames, patch_size, tubelet_size, num_classes=num_classes, mean=mean, std=std, **vit)
    if name not in BACKBONES:
        raise UserError(f"--backbone {name}: choose {', '.join(BACKBONES)}")
    if name in ("slow_r50", "r2plus1d_50"):
        net = ResNet3D(name, width, image_size, frames, num_classes)
    else:
        public = getattr(torchvision.models.video, name)()
        stages = {k: v for k, v in public.named_children() if k not in ("avgpool", "fc", "classifier")}
        dim = 1024 if name == "s3d" else 512
        net = ConvNet(stages, dim, num_classes, name=name, image_size=image_size, frames=frames)
    net.config |= dict(mean=mean, std=std)
    try:                                                                          # on "meta" only shapes are computed
        copy.deepcopy(net).to("meta")(torch.empty(2, 3, frames, image_size, image_size, device="meta"))
    except RuntimeError as error:
        raise UserError(f"{name} cannot take {frames} frames of {image_size} pixels ({_first_line(error)}): raise "
                        "--frames or --image-size") from None
    return net


# ---- 9. Momentum contrast ------------------------------------------------------------------------------------------

class Queue(nn.Module):
    """The last `size` keys of all processes, keys (size, dim), the oldest of them at `pointer`.  Both are buffers:
    they are saved and go on with the run.  All processes hold the same."""

    def __init__(self, size, dim):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys):
        """Put keys (B, dim) of every process in the place of the oldest; what is not finite becomes 0."""
        keys = all_gather(keys).nan_to_num(0, 0, 0)[-len(self.keys):]
        places = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.keys)
        self.keys[places] = keys
        self.pointer.copy_((self.pointer + len(keys)) % len(self.keys))


class MomentumContrast(nn.Module):
    """A model whose `keys`, a ModuleDict that its script makes, follow the modules of the same names."""

    def __init__(self, momentum):
        super().__init__()
        self.momentum, self.from_scratch = momentum, False                         # without weights to start from
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))         # of the keys

    @torch.no_grad()
    def update_keys(self, momentum=None):
        """keys <- momentum * keys + (1 - momentum) * queries' networks, after every step of the optimiser.  Running
        statistics are averaged over the first updates instead, so that what they start with does not linger."""
        momentum = self.momentum if momentum is None else momentum
        self.updates += 1
        weight = (1 / self.updates).clamp(min=1 - momentum)
        for name, key in self.keys.items():
            query = getattr(self, name)
            torch._foreach_lerp_(list(key.parameters()), list(query.parameters()), 1 - momentum)
            for norm in batch_norms(query) if self.from_scratch else ():
                start = (1 - norm.momentum) ** norm.num_batches_tracked              # what is left of it, 0 and 1
                norm.running_mean.div_(1 - start)
                norm.running_var.sub_(start).div_(1 - start)
            keys, queries = ([b for b in net.buffers() if b.is_floating_point()] for net in (key, query))
            if keys:                                                 # as two vectors: single ones are 2,600 kernels
                k, q = (torch.cat([b.flatten() for b in buffers]) for buffers in (keys, queries))
                parts = k.lerp(q, weight).split([b.numel() for b in keys])
                torch._foreach_copy_(keys, [part.view_as(b) for part, b in zip(parts, keys)])
        self.from_scratch = False


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm3d)]


class MeanOfProcesses(torch.autograd.Function):
    """`all_reduce_mean` with a gradient, which has one itself."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce_mean(x.clone())

    @staticmethod
    def backward(ctx, gradient):
        return MeanOfProcesses.apply(gradient)


class SyncBatchNorm(nn.BatchNorm3d):
    """Batch norm over the batches of all processes, which must be of one size.  nn.SyncBatchNorm allows others, so it
    waits for the GPU three times; it needs GPUs, is not compiled and cannot be differentiated twice, as MCL must."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        var, mean = torch.var_mean(x.float(), (0, 2, 3, 4), correction=0)                    # (C,)
        mean, square = MeanOfProcesses.apply(torch.stack([mean, var + mean**2]))
        var = square - mean**2
        with torch.no_grad():
            self.num_batches_tracked += 1
            count = x.numel() // x.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        scale, shift = (v.view(-1, 1, 1, 1) for v in (scale, self.bias - mean * scale))
        return (x.float() * scale + shift).to(x.dtype)


# ---- 10. Public checkpoints ----------------------------------------------------------------------------------------

class LoadReport(NamedTuple):
    """Names of tensors: what was loaded, what only the model has, what only the file has."""
    loaded: list
    missing: list
    unexpected: list


# Where the weights lie in a file, and what is put before their names.
WRAPPERS = ("model", "module", "model_state", "state_dict")
PREFIXES = ("", "encoder.", "model.", "module.", "backbone.", "encoder.model.", "encoder_q.encoder.model.",
            "module.encoder_q.", "encoder_q.", "module.backbone.", "module.encoder.")

# Parts of names there and here, in the order in which they are replaced, either way; a name gets a dot in front.
HUGGING_FACE = (
    (".embeddings.patch_embeddings.projection.", ".patch_embed.proj."), (".encoder.layer.", ".blocks."),
    (".decoder.decoder_layers.", ".decoder.blocks."), (".layernorm.", ".norm."), (".classifier.", ".head."),
    (".layernorm_before.", ".norm1."), (".layernorm_after.", ".norm2."), (".intermediate.dense.", ".mlp.fc1."),
    (".attention.attention.query.bias", ".attn.q_bias"), (".attention.attention.value.bias", ".attn.v_bias"),
    (".attention.output.dense.", ".attn.proj."), (".output.dense.", ".mlp.fc2."), (".attention.attention.", ".attn."))
SLOWFAST = (
    (".s1.pathway0_stem.conv.", ".stem.conv1."), (".s1.pathway0_stem.bn.", ".stem.bn1."),
    *((f".s{i + 1}.pathway0_res", f".layer{i}.") for i in (1, 2, 3, 4)),
    (".branch1.", ".downsample.0."), (".branch1_bn.", ".downsample.1."),
    *((f".branch2.{c}{a}.", f".{b}{i}.") for i, c in enumerate("abc", 1) for a, b in (("", "conv"), ("_bn", "bn"))))

# What ViT.config and Hugging Face's config.json call the same sizes.
SIZES = dict(image_size="image_size", frames="num_frames", patch_size="patch_size", tubelet_size="tubelet_size",
             dim="hidden_size", depth="num_hidden_layers", heads="num_attention_heads")
# What names of tensors tell of a network: its norms; torchvision's have seen Kinetics' colours, SlowFast's its own.
HINTS = {r"(^|\.)fc_norm\.weight$": dict(norms=("fc_norm",)),
         r"(^|\.)(layer)?norm\.weight$": dict(norms=("norm",)),
         r"\b(stem|features\.0\.0)\.0\.w": dict(mean=(0.43216, 0.394666, 0.37645), std=(0.22803, 0.22145, 0.216989)),
         r"pathway0_": dict(mean=(0.45,) * 3, std=(0.225,) * 3)}


class Unknown:
    """Stands for what is not torch's in a checkpoint, e.g. paths, Namespaces, numpy's numbers; keeps nothing of it."""
    __init__ = __setstate__ = lambda *_: None


def weights_file(path):
    """The file of a checkpoint: itself, or that in a Hugging Face folder.  Raises UserError if there is none."""
    for file in (Path(path, "model.safetensors"), Path(path, "pytorch_model.bin"), Path(path)):
        if file.is_file():
            return file
    raise UserError(f"{path}: no such checkpoint; of a directory, model.safetensors or pytorch_model.bin is read")


def huggingface_config(folder):
    """The .json files of Hugging Face's VideoMAE -> dict(backbone=sizes, mean, std, classes=names if it has some)."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    backbone = {ours: int(config[theirs]) for ours, theirs in SIZES.items()}
    if (backbone["dim"], backbone["heads"]) == (384, 16):                          # their ViT-S was trained with 6
        backbone["heads"] = 6
    for file in folder.glob("*preprocessor_config.json"):                          # video_, too
        processor = json.loads(file.read_text(encoding="utf-8"))
        backbone |= dict(mean=tuple(processor["image_mean"]), std=tuple(processor["image_std"]))
    names = config.get("id2label", {})
    classes = [names[str(i)] for i in range(len(names))]
    return dict(backbone=backbone) | (dict(classes=classes) if classes and "LABEL_0" not in classes else {})


def load_file(path):
    """A checkpoint -> dict(model=its tensors by name, backbone=what is known of its network: norms, mean, std, perhaps
    sizes, classes if it has them, and what else is there); no code of the file runs.  Raises UserError.  Takes
    torch.save's files and Hugging Face's model.safetensors, pytorch_model.bin or the folder that holds either.
    """
    path = weights_file(path)
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch                                               # nothing else needs it
            content = safetensors.torch.load_file(path)
        else:
            strange = ["argparse.Namespace"]                                       # in a file from before torch 1.6
            if zipfile.is_zipfile(path):
                strange = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            with torch.serialization.safe_globals([(Unknown, name) for name in strange]):
                content = torch.load(path, map_location="cpu", weights_only=True)
        content = content if isinstance(content, dict) else {}
        weights = next((content[k] for k in WRAPPERS if isinstance(content.get(k), dict)), content)
        if path.suffix in (".safetensors", ".bin") and path.with_name("config.json").exists():
            content |= huggingface_config(path.parent)
        state = {k: x for k, x in weights.items() if isinstance(x, torch.Tensor)}
        backbone, told = dict(norms=(), mean=MEAN, std=STD), content.get("backbone")
        for pattern, values in HINTS.items():
            if any(re.search(pattern, k) for k in state):
                backbone |= values
        if isinstance(told, dict) and told.keys() <= {*backbone, *SIZES, "name", "width"}:     # else not ours
            backbone |= told
        if not all(0 < backbone.get(key, 1) < 1e4 for key in SIZES):
            raise ValueError
    except ImportError as error:
        raise UserError(f"{path}: {error}: pip install safetensors") from None
    except Exception as error:                                                     # torch's advice is to run its code
        raise UserError(f"{path}: cannot be read as a checkpoint; is it damaged, or a config.json or "
                        f"preprocessor_config.json beside it? ({type(error).__name__})") from None
    return content | dict(model=state, backbone=backbone)


def replace_parts(name, pairs):
    """Replace parts of a dotted name: pairs (old, new), each beginning with a dot."""
    return functools.reduce(lambda name, pair: name.replace(*pair), pairs, "." + name)[1:]


def convert_names(state):
    """A file's tensors under our names.  Of Hugging Face's, q, k and v are apart; the others only have other names."""
    if any(".attention.attention.query." in k for k in state):
        base = "encoder." if any("decoder." in k for k in state) else ""           # pre-training files have both
        state = {replace_parts(k, HUGGING_FACE).replace("videomae.", base): x for k, x in state.items()}
    elif any("pathway0_" in k for k in state):
        state = {replace_parts(k, SLOWFAST): x for k, x in state.items()}
    state = {re.sub(r"(^|\.)fc\.(weight|bias)$", r"\1head.\2", k): x for k, x in state.items()}
    for name in [k for k in state if k.endswith(".attn.query.weight")]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        state[name.replace(".query.", ".qkv.")] = torch.cat([state.pop(part) for part in parts if part in state])
    return state


def inflate_resnet2d(state, own):
    """A 2-D ResNet's tensors under the names and in the shapes of `own`, a model with a ResNet3D; if either is
    something else, `state` as it is.

    Kernels get one tap in time that is not 0, temporal kernels of their own are the identity: each step of the
    features is what the 2-D network makes of one frame.  A MoCo head goes to heads.inter.  Source: MCL's code.
    """
    first = next((k for k, x in state.items() if k.endswith("conv1.weight") and x.ndim == 4), "")
    stem = next((k for k in own if k.endswith("stem.conv1.weight")), "")
    if not first or not stem:
        return state

    def inflate(x, taps):
        return F.pad(x[:, :, None], (0, 0, 0, 0, (taps - 1) // 2, taps // 2))
    theirs, ours, out = first.removesuffix("conv1.weight"), stem.removesuffix("stem.conv1.weight"), {}
    for old in [k for k in state if k.startswith(theirs)]:       # MoCo's key encoder is left out
        x, name = state[old], re.sub(r"^(conv1|bn1)\.", r"stem.\1.", old.removeprefix(theirs))
        name = "heads.inter." + name.removeprefix("fc.") if name.startswith("fc.") else ours + name
        temporal = name.replace("conv2.", "conv2.1.")
        if temporal != name and temporal in own:
            out[temporal] = inflate(torch.eye(len(x))[..., None, None], 3)
            name = name.replace("conv2.", "conv2.0.")
        out[name] = inflate(x, own[name].shape[2]) if name in own and x.ndim == 4 else x
    return out


def load_weights(model, path, strict_backbone=True, new=()):
    """Load weights by name from our own files and those that `load_file` and `convert_names` tell of -> LoadReport.

    Of all prefixes that one is taken under which most names match.  Raises UserError, naming the first tensors, if
    none fits, the backbone there or here lacks one or one is not finite: never train on silently random weights.  The
    backbone is the encoder without its last norm and head; strict_backbone False drops the check, "all" extends it to
    everything.  What begins with one of `new` stays as it is.  Mean and std of the input go into the network's config.
    """
    content, everything = load_file(path), model.state_dict()
    own = {k: x for k, x in everything.items() if not k.startswith(new)}
    state = inflate_resnet2d(convert_names(content["model"]), own)
    readings = [{add + k.removeprefix(prefix): k for k in state if k.startswith(prefix)}
                for prefix in PREFIXES for add in ("", "encoder.")]     # a bare encoder also fits into an autoencoder
    names = max(readings, key=lambda names: len(names.keys() & own.keys()))
    fits = {k: names[k] for k, x in own.items() if k in names and state[names[k]].shape == x.shape}
    missing = [k for k in everything if k not in fits]
    unexpected = [k for k in state if k not in fits.values()]
    encoder, inside = getattr(model, "encoder", model), "encoder." if hasattr(model, "encoder") else ""
    needed = [k for k in missing if strict_backbone == "all" or k.startswith(inside)
              and not k.removeprefix(inside).startswith(("norm.", "fc_norm.", "head.", "local_MCA."))]
    kinds = {re.sub(r"\d+", "0", k) for k in everything if k.startswith(inside)}
    deeper = [file for k, file in names.items() if k not in everything and re.sub(r"\d+", "0", k) in kinds]
    config, there = getattr(encoder, "config", {}), content["backbone"]
    heads = there.get("heads", config.get("heads"))                    # which do not show in the shapes
    if not fits or strict_backbone and (needed or deeper or heads != config.get("heads")):
        gone = [f"{k} {tuple(everything[k].shape)}" for k in needed[:3]]
        left = [f"{k} {tuple(state[k].shape)}" for k in [*deeper, *unexpected][:3]]
        raise UserError(f"{path} does not fit: {len(fits)} of {len(own)} tensors match; missing {gone}, unexpected "
                        f"{left}; heads {heads} there, {config.get('heads')} here. Choose the file's network with "
                        "--model or --backbone; sizes of a ViT that have no name get one in VITS in common.py")
    model.load_state_dict({k: state[name] for k, name in fits.items()}, strict=False)
    check_finite(model.state_dict().items(), f"{path}: cannot be used")
    config.update({k: there[k] for k in ("mean", "std")})
    return LoadReport(list(fits), missing, unexpected)


# ---- 11. Run -------------------------------------------------------------------------------------------------------

class Plan(NamedTuple):
    """How a global batch of videos is spread: `micro` videos per process and forward pass, `accum` passes per step.  A
    step sees `repeats` samples of each of its videos."""
    batch: int
    micro: int
    accum: int
    repeats: int
    steps: int
    per_epoch: float    # steps per epoch, which is a pass over the videos
    warmup: int         # steps
    lr: float           # at its peak
    min_lr: float       # at the end

    def generator(self, env, seed, step, micro):
        """The random numbers of one forward pass, a function of (seed, step) and of the rows that it computes."""
        torch.manual_seed(hash((seed, step, micro, env.rank)) % 2**63)             # dropout, torchvision's transforms
        generator = RowGenerator(env.device)
        generator.manual_seed(hash((seed, step)) % 2**63)
        first = (micro * env.world + env.rank) * self.micro
        generator.first, generator.total = first * self.repeats, self.batch * self.repeats
        return generator


def plan_run(cfg, videos, env):
    """Spread cfg.batch over processes and accumulation -> Plan.  Raises UserError if it does not divide."""
    micro = min(cfg.device_batch, cfg.batch // env.world)
    if not micro or cfg.batch % (env.world * micro):
        raise UserError(f"--batch {cfg.batch} does not spread evenly over {env.world} processes with --device-batch "
                        f"{cfg.device_batch} ({micro} videos per pass): change one of them")
    plan = Plan(batch=cfg.batch, micro=micro, accum=cfg.batch // (env.world * micro), repeats=cfg.repeats,
                steps=cfg.steps or max(1, int(cfg.epochs * videos / cfg.batch)), per_epoch=videos / cfg.batch,
                warmup=int(cfg.warmup_epochs * videos / cfg.batch), lr=cfg.lr * cfg.batch / 256,
                min_lr=cfg.min_lr * cfg.batch / 256)
    if plan.warmup > plan.steps:
        print0(f"warning: --warmup-epochs {cfg.warmup_epochs:g}, of {plan.per_epoch:.4g} steps each, are longer than "
               f"the run of {plan.steps} steps: the learning rate does not reach its peak")
    return plan


def step_batches(videos, plan, env, seed, start=0):
    """Yields, from step `start` to the end, the batches of (epoch, index) that this process reads: cut from one
    endless stream of shuffled epochs, which is the same for any number of processes and any start."""
    order = functools.lru_cache(2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(videos))
    for i in range(start * plan.accum, plan.steps * plan.accum):
        first = (i * env.world + env.rank) * plan.micro
        places = [divmod(k, videos) for k in range(first, first + plan.micro)]
        yield [(epoch, int(order(epoch)[place])) for epoch, place in places]


def make_optimizer(name, model, lr, weight_decay, betas=(0.9, 0.95), layer_decay=1.0):
    """adamw, sgd or nesterov (momentum 0.9).  Vectors (biases, norms) and the mask token have no weight decay, except
    with sgd.  A group's `scale`, of its rate, falls by layer_decay per layer of a ViT below the head."""
    top, groups = len(getattr(model, "blocks", ())) + 1, {}            # layers: 0 = patch_embed .. top = head
    for n, p in model.named_parameters():
        layer = 0 if n.startswith("patch_embed") else top
        if block := re.match(r"blocks\.(\d+)\.", n):
            layer = int(block[1]) + 1
        decay = 0.0 if name != "sgd" and (p.ndim <= 1 or "mask_token" in n) else weight_decay
        if p.requires_grad:
            groups.setdefault((layer_decay ** (top - layer), decay), []).append(p)
    groups = [dict(params=params, scale=scale, weight_decay=decay) for (scale, decay), params in groups.items()]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, betas, fused=True)
    return torch.optim.SGD(groups, lr, momentum=0.9, nesterov=name == "nesterov", fused=True)


def cosine_lr(step, steps, warmup, peak, floor, start=0.0, whole=False):
    """Linear from start * peak to `peak` in `warmup` steps, then half a cosine towards `floor` at `steps` (VideoMAE).
    With `whole` the cosine is that over all steps, and warm-up ends where it is by then (SlowFast, MoDist)."""
    first, now = 0 if whole else warmup, max(step, warmup)
    rate = floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (now - first) / max(1, steps - first)))
    if step < warmup:                                      # VideoMAE's last step of warm-up is at the peak already
        rate = start * peak + (rate - start * peak) * step / (warmup if start else max(1, warmup - 1))
    return rate


@functools.cache
def can_compile():
    """Whether torch.compile has the C compiler that it needs; says so once if not."""
    found = any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
    if not found:
        print0("warning: torch.compile needs a C compiler and there is none: running eagerly, more slowly")
    torch._dynamo.config.recompile_limit = 64              # blocks, stages and scales share code, each has its graph
    return found


def wrap_model(model, env, compile):
    """The model as the loop calls it: compiled, and with several processes in DistributedDataParallel.

    Compiled block by block, in place: one graph per width and token count, and no `_orig_mod.` in the state dict.
    Convolutional networks get channels last, and batch norms that all processes share: their buffers are the same.
    """
    parts = [module for module in model.modules() if isinstance(module, Block)]
    for network in [module for module in model.modules() if isinstance(module, ConvNet)]:
        network.to(memory_format=torch.channels_last_3d)
        parts += [getattr(network, name) for name in network.stages]
    for norm in batch_norms(model) if env.world > 1 else ():
        norm.__class__ = SyncBatchNorm
    for part in parts if compile and can_compile() else ():
        part.compile(dynamic=False)
    if env.world == 1:
        return model
    gpu, parallel = [env.device.index] if env.device.type == "cuda" else None, nn.parallel.DistributedDataParallel
    new = "forward_sync_buffers" in inspect.signature(parallel).parameters           # the name since torch 2.14
    unsynced = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return parallel(model, device_ids=gpu, gradient_as_bucket_view=True, **unsynced)


@contextlib.contextmanager
def eagerly():
    """For what runs now and then at a size of its own, previews and tests: neither compiled nor with a search for the
    fastest convolutions, either of which takes longer than it saves."""
    with torch.compiler.set_stance("force_eager"), torch.backends.cudnn.flags(enabled=True, benchmark=False):
        yield


def check_finite(tensors, what):
    """Raise UserError if one of the tensors, pairs of name and tensor, is nan or infinite."""
    broken = [name for name, x in tensors if not x.isfinite().all()]
    if broken:
        raise UserError(f"{what}, weights are not finite: {', '.join(broken[:3])}")


def resume_or_init(checkpoint, init, model, optimizer, scaler):
    """Continue from a checkpoint of this run or, without one, start from the weights of `init` -> first step."""
    if checkpoint:
        try:
            model.load_state_dict(checkpoint["model"])
            getattr(model, "encoder", model).config.update({k: checkpoint["backbone"][k] for k in ("mean", "std")})
            optimizer.load_state_dict(checkpoint["optimizer"])
            scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())      # empty where there was no fp16
        except (KeyError, RuntimeError, ValueError) as error:    # e.g. of an older version of this script
            raise UserError(f"last.pt does not fit this script ({_first_line(error)}); --fresh starts over") from None
        print0(f"continuing at step {checkpoint['step']}")
        return checkpoint["step"]
    if init:
        report = load_weights(model, init, new=("updates", "queue.", "motion_queue."))       # of that run, not weights
        print0(f"{init}: {len(report.loaded)} tensors loaded, {len(report.missing)} missing {report.missing[:3]}, "
               f"{len(report.unexpected)} unexpected {report.unexpected[:3]}")
        if any(name.startswith("keys.") for name in report.missing):
            model.update_keys(momentum=0)                        # the key encoder starts where the query encoder does
    elif hasattr(model, "keys"):                                 # which are encoded with running statistics: else
        model.from_scratch = True                                # these would be of no use for some 30 steps
    return 0


# Settings that may change when a run goes on; of --init the path, not the content.
MAY_CHANGE = {"out", "fresh", "init", "init_sha256", "world", "root", "place", "raft_weights", "device_batch",
              "workers", "compile", "log_every", "save_every", "preview_every", "test_data", "part", "classes", "views",
              "train_views", "test_size", "test_crop", "average", "test_batch", "neighbours", "l2",
              "center", "boxes", "min_score", "times_score"}


def run_directory(name, cfg):
    """--out, or runs/<name>-<data>."""
    data = cfg.data if cfg.data in DATA_SETS else Path(cfg.data).resolve().stem
    return Path(cfg.out or f"runs/{name}-{data}")


def last_checkpoint(out):
    """The content of last.pt in a run's directory or, if that is damaged, of previous.pt; None if there is neither."""
    files = [file for file in (out / "last.pt", out / "previous.pt") if file.exists()]
    for i, file in enumerate(files):
        try:
            content = load_file(file)
            check_finite((pair for pair in content["model"].items() if "running" not in pair[0]), f"{file}: not used")
            kinds = [type(content.get(name)) for name in ("optimizer", "scaler", "step", "classes", "config")]
            if kinds == [dict, dict, int, list, dict]:
                return content
            raise UserError(f"{file}: is not the checkpoint of a run")
        except UserError as error:
            if i + 1 == len(files):
                raise UserError(f"{error}. Move it away, or --fresh starts over".removeprefix("error: ")) from None
            print0(f"{error}. Going on from previous.pt")


def open_run(name, cfg, env, listing, plan):
    """Make the run's directory, write config.json there -> (directory, checkpoint to continue from or None).

    Raises UserError if a checkpoint is there that was made with other settings or from other weights, or if nodes
    hold different ones.  `--fresh` moves it aside, with the log.
    """
    last = (out := run_directory(name, cfg)) / "last.pt"
    out.mkdir(parents=True, exist_ok=True)                       # on every node
    if env.rank == 0:
        open_run.lock = open(out / "config.json", "a")           # until Log.close
        try:
            fcntl.lockf(open_run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another run is writing there; --out names another directory") from None
    if cfg.fresh and Path(cfg.init).resolve().parent == out.resolve():
        raise UserError(f"--init {cfg.init}: lies in {out}, which --fresh moves aside; --out names another directory")
    if cfg.fresh and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:        # torchrun's, after a crash
        old = [out / name for name in ("last.pt", "previous.pt", "log.jsonl")]
        once_per_disk(lambda: [os.replace(file, f"{file}.old") for file in old if file.exists()])
    checkpoint = last_checkpoint(out)
    was = checkpoint["config"] if checkpoint else {}
    if was.get("world", env.world) != env.world:
        print0(f"note: {was['world']} processes there, {env.world} now; the batch is the same")
    init_sha256 = was.get("init_sha256", "")                     # if the file is gone
    if cfg.init and (was.get("init") != cfg.init or Path(cfg.init).exists()):
        with open(weights_file(cfg.init), "rb") as file:
            init_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    cfg.settings = dict(dataclasses.asdict(cfg), videos=len(listing.items), world=env.world,
                        place="" if cfg.data in DATA_SETS else os.path.realpath(cfg.data),
                        init_sha256=init_sha256 * bool(cfg.init))
    differ = [f"{k}: {was[k]} there, {v} now" for k, v in cfg.settings.items()
              if k not in MAY_CHANGE and was.get(k, v) != v]
    if was.get("init_sha256", cfg.settings["init_sha256"]) != cfg.settings["init_sha256"]:
        differ.append(f"init: weights of {was['init'] or 'none'} there, of {cfg.init or 'none'} now")
    if differ:
        raise UserError(f"{last} was made with other settings ({'; '.join(differ)}). Use them again, or --out for "
                        f"another run, or --fresh to start over, or --init {last} --out DIR for its weights alone")
    state = [checkpoint["step"] if checkpoint else 0, len(listing.items)]
    steps, videos = all_gather(torch.tensor([state], device=env.device)).T.tolist()
    if len({*steps}) + len({*videos}) > 2:
        raise UserError(f"{last} is at steps {steps} (0: not there) and there are {videos} videos for processes 0, 1, "
                        "...: nodes without a shared disk must hold the same files, copy them")
    if env.rank == 0:
        about = dict(cfg.settings, method=name, accumulation=plan.accum, steps_planned=plan.steps,
                     peak_lr=plan.lr, torch=str(torch.__version__))
        open_run.lock.truncate(0)
        print(json.dumps(about, indent=1), file=open_run.lock, flush=True)
        if listing.missing:
            (out / "missing_videos.txt").write_text("\n".join([*listing.missing, ""]), **FILE_NAMES)
    print0(f"{plan.steps} steps of {plan.batch} videos = {env.world} x {plan.micro} x {plan.accum} accumulated, "
           f"{plan.repeats} of each, peak lr {plan.lr:.2g}, {env.device.type} {env.amp or torch.float32} -> {out}")
    return out, checkpoint


def save_checkpoint(path, cfg, listing, step, model, backbone, optimizer, scaler):
    """Write everything that continuing needs, as plain dicts and tensors, to a temporary file that then takes the name;
    the one before stays as previous.pt, so nothing is ever lost.  Raises UserError if it cannot be written, or if the
    weights are not finite."""
    check_finite(model.named_parameters(), f"{path}: not written")
    content = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), step=step,
                   backbone=backbone.config, classes=listing.classes, torch=str(torch.__version__), config=cfg.settings)
    unfinished = path.with_name(path.name + ".partial")
    try:
        torch.save(content, unfinished)
        if path.exists():
            os.replace(path, path.with_name("previous.pt"))
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{path}: could not be written, is the disk full? Its predecessor stays ({error})") from None


class StopSignal:
    """Turns SIGTERM and SIGINT into a flag: the loop finishes its step and saves.  One more SIGINT ends at once, if it
    comes later: torchrun repeats signals that reached all processes."""

    def __init__(self):
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        if not self.received:
            self.received, self.at = True, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() > self.at + 2:
            signal.default_int_handler(number, frame)


class Log:
    """What a run tells: log.jsonl (one object per logged step), a progress bar on a terminal, or else plain lines."""

    def __init__(self, out, env, plan, start, every):
        self.out, self.env, self.plan, self.every = out, env, plan, every
        self.tried = self.bad = self.not_finite = self.killed = 0
        self.counter, self.counting = FlopCounterMode(display=False), contextlib.ExitStack()
        self.waited, self.began, self.logged = 0.0, time.perf_counter(), start
        if env.rank == 0:
            path = out / "log.jsonl"                            # forget what was logged after the checkpoint
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < start]
            path.write_text("".join(line + "\n" for line in kept))
            self.file = open(path, "a", buffering=1)
        self.bar = tqdm(total=plan.steps, initial=start, unit="step", disable=True if env.rank else None)

    def next_batch(self, batches):
        """The next batch of the loader (see `collate`), on the device; counts the wait and the broken videos.  Raises
        UserError when these are more than a fifth."""
        began = time.perf_counter()
        batch = next(batches)
        # On one GPU a new run's first step is eager, to count its operations.  (Eager SyncBatchNorm takes more memory.)
        if self.env.device.type == "cuda" and self.env.world == 1 and self.logged == self.tried == 0:
            self.counting.enter_context(eagerly())
            self.counting.enter_context(self.counter)
        self.waited += time.perf_counter() - began
        self.tried += len(batch["names"]) + len(batch["errors"])
        self.bad += len(batch["errors"])
        if "killed" in batch and not self.killed:               # a loader worker: end this step, save
            self.killed = True
            signal.raise_signal(signal.SIGTERM)
        path = self.out / "bad_videos.txt"                      # of earlier runs and of other processes, too
        listed = path.read_text(**FILE_NAMES).splitlines() if batch["errors"] and path.exists() else []
        for error in sorted({*batch["errors"]} - {*listed}):
            tqdm.write(f"skipped {error}")
            with open(path, "a", **FILE_NAMES) as file:
                file.write(error + "\n")
        chance = 3 * math.sqrt(0.2 * 0.8 * self.tried)          # of 10 % a few tries may hold more than a fifth
        if not batch["read"].all() or self.tried >= 20 and self.bad > 0.2 * self.tried + chance:
            raise UserError(f"{self.bad} of {self.tried} videos could not be read, more than a fifth; the last: "
                            f"{batch['errors'][-1]}. All are in {path}")
        return dict(batch, **{name: to_device(batch[name], self.env.device) for name in ("clips", "labels")})

    def finite(self, loss, norm, names, model):
        """False if the step must be skipped, with what it left in running statistics; after three of them in a row
        raises UserError with the videos' names."""
        self.not_finite = 0 if math.isfinite(loss + norm) else self.not_finite + 1
        if self.not_finite:
            print0(f"the loss is {loss}, the gradient's norm {norm}: step skipped")
            for layer in batch_norms(model):
                layer.running_mean.nan_to_num_(0, 0, 0)
                layer.running_var.nan_to_num_(1, 1, 1)
        if self.not_finite == 3:
            raise UserError("loss or gradient is not finite for 3 steps in a row; last.pt is from before. Videos of "
                            f"the last batch: {', '.join(names)}")
        return not self.not_finite

    def step(self, step, loss, flow=None, **values):
        """Log a step: its loss, the given numbers or 0-d tensors (means over the processes), and the run's speed."""
        self.bar.update()
        self.counting.close()
        if (step + 1) % self.every and step + 1 != self.plan.steps:
            return
        names = sorted(values)
        numbers = [torch.as_tensor(values[n], dtype=torch.float32, device=self.env.device) for n in names]
        means = all_reduce_mean(torch.stack(numbers)).tolist()
        flow_seconds, now = flow.seconds() if flow else 0.0, time.perf_counter()
        seconds, steps = now - self.began, step + 1 - self.logged
        line = dict(step=step, epoch=round((step + 1) / self.plan.per_epoch, 3), loss=loss, **dict(zip(names, means)),
                    clips_per_s=round(steps * self.plan.batch * self.plan.repeats / seconds, 1),
                    step_ms=round(1000 * seconds / steps, 1),
                    data_wait_pct=round(100 * self.waited / seconds, 1),
                    flow_pct=round(100 * flow_seconds / seconds, 1))
        if self.env.device.type == "cuda":
            line["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        if flop := self.counter.get_total_flops():
            line["tflops"] = round(flop * steps / seconds / 1e12, 1)
        self.began, self.waited, self.logged = now, 0.0, step + 1
        if self.env.rank == 0:
            self.file.write(json.dumps(line) + "\n")
            left = (self.plan.steps - step - 1) * seconds / steps
            text = (f"loss {loss:.4f}  lr {line['lr']:.1e}  {line['clips_per_s']:.0f} clips/s  "
                    f"data wait {line['data_wait_pct']:.0f}%  flow {line['flow_pct']:.0f}%")
            self.bar.set_postfix_str(text)
            if self.bar.disable:
                print0(f"step {step + 1}/{self.plan.steps}  {text}  {left / 60:.1f} min left")

    def close(self, stopped):
        """Say how the run ended and, if it was stopped, how to go on."""
        self.bar.close()
        open_run.lock = None                                    # which closes it: other runs may begin
        if dist.is_initialized():                               # torchrun ends all when one has failed: the first saves
            dist.barrier()
        files = [self.out / name for name in ("last.pt", "log.jsonl", "preview.png")]
        text = f"saved; the same command (without --fresh) goes on from {files[0]}"
        if self.killed:
            raise UserError(f"a loader worker was killed (out of memory? --workers sets their number). {text}")
        print0(f"stopped and {text}" if stopped else f"trained: {', '.join(str(f) for f in files if f.exists())}")


# ---- 12. Images ----------------------------------------------------------------------------------------------------

def save_sheet(path, rows, tile=112):
    """Write rows of images, each (n, 3, h, w) in [0, 1], as one PNG; tiles are scaled to `tile` pixels."""
    rows = [F.interpolate(row.float().cpu(), (tile, tile), mode="bilinear", antialias=True) for row in rows]
    save_image(make_grid(torch.cat(rows), nrow=len(rows[0]), padding=2, pad_value=1.0), path)


def flow_picture(flow):
    """Flow (n, 2, h, w) in pixels -> colours (n, 3, h, w) in [0, 1]: hue = direction, saturation = length."""
    return flow_to_image(flow.float().cpu()).float() / 255


def map_to_rgb(maps):
    """Maps (n, h, w) -> grey images (n, 3, h, w), each scaled to its own maximum."""
    maps = maps.float().cpu()
    return (maps / maps.amax((-2, -1), keepdim=True).clamp_min(1e-12))[:, None].expand(-1, 3, -1, -1)


def draw_box(images, box, colour="red"):
    """Outline one box (4,) on images (n, 3, h, w) in [0, 1]."""
    box, width = box[None].cpu(), max(1, images.shape[-1] // 75)
    return torch.stack([draw_bounding_boxes(x, box, colors=colour, width=width) for x in images.cpu()])
