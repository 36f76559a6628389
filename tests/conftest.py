"""What several test files share: where things are, miniature videos, runs in this process and in others."""
import functools
import importlib
import inspect
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.distributed as dist

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
import common
from common import RowGenerator, UserError, VideoInfo, to_float01, toy_video

torch.set_num_threads(1)                                                   # as `start` does: the same numbers
inspect.getsource = functools.cache(inspect.getsource)                     # slow, and each Config needs it
SHARED = REPO.parent / "shared"                                            # golden numbers, real clips: or tests skip


def pytest_configure(config):
    if not any("test_cuda" in str(word) for word in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""                            # fp32 of the CPU is compared with loops


def golden_arrays(name):
    """The arrays of a golden file as tensors, by name; skips the test where the file is not."""
    path = SHARED / "golden" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return {k: torch.from_numpy(v) for k, v in np.load(path).items()}


def tiny_video(path, frames=12, fps=10, side=32, codec="libx264", options={"qp": "0"}):
    """Frame n is grey 8 + 4 n, so that a picture tells its number (see `numbers`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, fps, width=side, height=side, pix_fmt="yuv420p", options=options)
        for n in range(frames):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((side, side, 3), 8 + 4 * n, np.uint8))))
        file.mux(stream.encode())
    return path


def numbers(clips):
    """Pictures (..., H, W, 3) of tiny videos -> frame numbers (...); scaling darkens them by up to 2 levels."""
    return ((np.asarray(clips, float).mean((-3, -2, -1)) - 7) / 4).round().astype(int)


def put(root, text={}, videos=()):
    """Write files below root: text {name: content}, and something under each name of videos (listing opens none)."""
    for name, content in {**text, **dict.fromkeys(videos, "x")}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode())
    return root


def error_of(function, *args, **kwargs):
    """The message of the UserError, which must be one line."""
    with pytest.raises(UserError) as info:
        function(*args, **kwargs)
    assert "\n" not in str(info.value) and str(info.value).startswith("error: ")
    return str(info.value)


def slow_gradient(x, middle=1):
    """d/dx and d/dy of x (H, W): central differences, averaged over three lines of weights 1, middle, 1."""
    H, W = len(x), len(x[0])
    out = np.zeros((2, H, W))
    def at(r, c):                                                               # the border is replicated
        return x[min(max(r, 0), H - 1)][min(max(c, 0), W - 1)]
    for r, c, (k, weight) in itertools.product(range(H), range(W), ((-1, 1), (0, middle), (1, 1))):
        out[0, r, c] += weight / (2 + middle) * (at(r + k, c + 1) - at(r + k, c - 1)) / 2
        out[1, r, c] += weight / (2 + middle) * (at(r + 1, c + k) - at(r - 1, c + k)) / 2
    return out


def seeded(seed=0, first=0, total=None):
    """A generator; with `total` one for rows first, first + 1, ... of a global batch of that many."""
    generator = torch.Generator() if total is None else RowGenerator()
    if total is not None:
        generator.first, generator.total = first, total
    return generator.manual_seed(seed)


def noise(*shape, seed=0, least=0.0, most=1.0, dtype=torch.float32):
    """Uniform random numbers."""
    return least + (most - least) * torch.rand(*shape, generator=seeded(seed), dtype=dtype)


def scrambled(module, scale=0.3):
    """The module with all parameters and running statistics random: nothing is 0 or 1 by initialisation."""
    g = seeded()
    with torch.no_grad():
        for p in module.parameters():
            size = scale if p.ndim < 2 else scale / math.sqrt(p[0].numel())
            p.copy_(torch.randn(p.shape, generator=g) * size + (p.ndim < 2))
        for name, b in module.named_buffers():
            if "running" in name:
                b.copy_(torch.rand(b.shape, generator=g) + 0.5)
    return module.eval()


class FakeFlow:
    """In place of a FlowEstimator: numbers made of the colours of both frames; it keeps what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, clips):
        self.asked.append(clips.clone())
        x = to_float01(clips)
        return torch.stack([5 * x[:, 0, 1:] - 2 * x[:, 1, :-1], 3 * x[:, 2, 1:] * x[:, 0, :-1]], 2)


class FakeVideo:
    """A video that notes which frames and boxes are asked for."""

    def __init__(self, frames, height, width, fps=10.0):
        self.info, self.path = VideoInfo(frames, fps, height, width, frames / fps), "video.mp4"

    def index_at(self, seconds):
        return min(int(seconds * self.info.fps + 1e-6), self.info.frames - 1)

    def read(self, indices, size=None, crop=None):
        assert 0 <= min(indices) and max(indices) < self.info.frames
        self.asked = [(int(n), tuple(map(int, box))) for n, box in zip(indices, crop)]
        for _, (x1, y1, x2, y2) in self.asked:
            assert 0 <= x1 < x2 <= self.info.width and 0 <= y1 < y2 <= self.info.height
        return np.zeros((len(indices), *size, 3), np.uint8)

    def views(self, frames):
        """[(frame numbers, box)], one for each view"""
        parts = [self.asked[i:i + frames] for i in range(0, len(self.asked), frames)]
        assert all(len({box for _, box in part}) == 1 for part in parts)
        return [([n for n, _ in part], part[0][1]) for part in parts]


def toy_clips(count, labels=(None,), frames=36):
    """The first toy videos of `test` -> uint8 (count, 3, frames, 64, 64), their truths; labels are taken in turn."""
    videos, truths = zip(*[toy_video(0, "test", i, frames=frames, label=labels[i % len(labels)]) for i in range(count)])
    return torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3).contiguous(), truths


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A directory in which the toy data has been written once, for all tests."""
    place = tmp_path_factory.mktemp("workplace")
    common.make_toy(place / "data/toy/64px", "train", 24)
    common.make_toy(place / "data/toy/64px", "test", 16)
    return place


@pytest.fixture
def here(workplace, monkeypatch):
    """In the workplace."""
    monkeypatch.chdir(workplace)


def run(script, *argv):
    """The script's main in this process."""
    module = importlib.import_module(script)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)}
    try:
        common.run(module.main, module.Config, module.RECIPES, [str(a) for a in argv])
    finally:
        for number, handler in handlers.items():                            # the loop has put its own there
            signal.signal(number, handler)


def start(script, *argv, processes=1, cwd=None, **variables):
    """The script in one new Python process, or several; `variables` are of the environment."""
    launch = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                      f"--nproc_per_node={processes}"]
    variables = dict(OMP_NUM_THREADS=1, CUDA_VISIBLE_DEVICES="") | variables
    env = os.environ | {name: str(value) for name, value in variables.items()}
    return subprocess.Popen([*launch, str(REPO / f"{script}.py"), *map(str, argv)], env=env, text=True, cwd=cwd,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def lines(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def losses(out):
    return {line["step"]: line["loss"] for line in lines(out)}


def miniature(data, root):
    """A data set in its published layout: 5 training videos, one of them missing and one broken, and 2 to test."""
    stems = ["-aB_cd-EF1g", "_hIjKlMnOp2", "qRsTuVwXyZ3", "broken-f1l3", "missing-f1l", "t3st-aaaaaa", "t3st-bbbbbb"]
    names = {"k400": [f"{stem}_000010_000020.mp4" for stem in stems], "ssv2": [f"{i}.webm" for i in range(7)],
             "ucf101": [f"v_Jump_g0{i}_c01.avi" for i in range(7)], "epic": [f"P0{i}_01.MP4" for i in range(7)],
             "hmdb51": [f"a!#&b(+)@;]_{i}.avi" for i in range(7)]}[data]
    codec = {"k400": "libx264", "epic": "libx264", "ssv2": "libvpx-vp9"}.get(data, "mpeg4")
    for i in (0, 1, 2, 5, 6):
        tiny_video(root / "videos" / names[i], 40, codec=codec, **({} if codec == "libx264" else dict(options={})))
    put(root, videos=[f"videos/{names[3]}"])

    def split(line, head=""):
        lines = [line(i, name) + "\n" for i, name in enumerate(names)]
        return head + "".join(lines[:5]), head + "".join(lines[5:])
    if data == "k400":
        train, test = split(lambda i, n: f'"class {i % 2}",{n[:11]},10,20,x', "label,youtube_id,time_start,time_end\n")
        put(root, {"train.csv": train, "val.csv": test})
    elif data == "ssv2":
        rows = [dict(id=str(i), template=f"Moving [something] {i % 2}") for i in range(7)]
        put(root, {"labels.json": json.dumps({"Moving something 0": "0", "Moving something 1": "1"}),
                   "train.json": json.dumps(rows[:5]), "validation.json": json.dumps(rows[5:])})
    elif data == "ucf101":
        train, test = split(lambda i, n: f"Jump/{n}")
        put(root, {"classInd.txt": "1 Jump\n2 Run\n", "trainlist01.txt": train, "testlist01.txt": test})
    elif data == "hmdb51":
        put(root, {"jump_test_split1.txt": "".join(split(lambda i, n: f"{n} {2 if i > 4 else 1} ")),
                   "run_test_split1.txt": ""})
    elif data == "epic":
        train, test = split(lambda i, n: f"P0{i}_01,00:00:00.50,00:00:02.50,{i % 2},3",
                            "video_id,start_timestamp,stop_timestamp,verb_class,noun_class\n")
        put(root, {"EPIC_100_train.csv": train, "EPIC_100_validation.csv": test})


if __name__ == "__main__":                                                  # [[script, flags ...], ...] in turn,
    leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None            # in the same processes
    for script, *argv in json.loads(sys.argv[1]):
        run(script, *argv)
    leave()
