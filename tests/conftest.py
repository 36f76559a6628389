"""What several test files share: where things are, miniature videos, runs in this process and in others."""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
import common
from common import RowGenerator, UserError, parse_config, to_float01

SHARED = REPO.parent / "shared"                                            # golden numbers, real clips: tests skip without it


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
    """Write files below root: text {name: content}, and something with a video's name for each of videos (listing opens none)."""
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


def seeded(seed=0, first=0, total=None):
    """A generator; with `total` one for rows first, first + 1, ... of a global batch of that many."""
    generator = torch.Generator() if total is None else RowGenerator()
    if total is not None:
        generator.first, generator.total = first, total
    return generator.manual_seed(seed)


def noise(*shape, seed=0, least=0.0, most=1.0, dtype=torch.float32):
    """Uniform random numbers."""
    return least + (most - least) * torch.rand(*shape, generator=seeded(seed), dtype=dtype)


class FakeFlow:
    """In place of a FlowEstimator: numbers made of the colours of both frames; it keeps what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, clips):
        self.asked.append(clips.clone())
        x = to_float01(clips)
        return torch.stack([5 * x[:, 0, 1:] - 2 * x[:, 1, :-1], 3 * x[:, 2, 1:] * x[:, 0, :-1]], 2)


def toy_flow(truth, first, second):
    """True flow (2, H, W) in px from frame `first` to frame `second`, and the sprite's mask (H, W) in `first`."""
    inside = common._toy_depth(truth, first) > 0
    (c1, c2), (s1, s2) = truth["centre"][[first, second]], truth["scale"][[first, second]]
    pan = truth["camera"][second] - truth["camera"][first]
    sprite = (c2 - c1)[:, None, None] + (common._toy_grid(truth["size"]) - c1[:, None, None]) * (s2 / s1 - 1)
    return np.where(inside, sprite, pan[:, None, None]), inside


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A directory in which the toy data has been written once, for all tests."""
    place = tmp_path_factory.mktemp("workplace")
    common.make_toy(place / "data/toy/64px", "train", 24)
    common.make_toy(place / "data/toy/64px", "test", 16)
    return place


def run(script, *argv):
    """The script's main in this process."""
    module = importlib.import_module(script)
    module.main(parse_config(module.Config, module.RECIPES, [str(a) for a in argv]))


def start(script, *argv, processes=1):
    launch = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                      f"--nproc_per_node={processes}"]
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    return subprocess.Popen([*launch, str(REPO / f"{script}.py"), *map(str, argv)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def lines(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def losses(out):
    return {line["step"]: line["loss"] for line in lines(out)}
