"""What happens to a run must not cost more than the steps since its last checkpoint: damage, nan, restarts."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import mofo
from conftest import REPO, error_of, losses, run, start

SMALL = "--toy-train 24 --toy-test 16 --batch 8 --log-every 1 --save-every 1 --workers 0".split()


pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize("damage", [b"", b"PK", "half", "list", "other"])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(damage, tmp_path, capsys):
    flags = [*SMALL, "--steps", 4, "--out", tmp_path]
    run("mofo", *flags)
    last, whole = tmp_path / "last.pt", losses(tmp_path)
    weights = torch.load(last, weights_only=True)["model"]
    content = last.read_bytes()
    if damage == "half":
        last.write_bytes(content[:len(content) // 2])
    elif isinstance(damage, bytes):
        last.write_bytes(damage)
    else:
        torch.save([1, 2] if damage == "list" else dict(model=weights, step=4), last)
    run("mofo", *flags)
    assert "previous.pt" in capsys.readouterr().out and losses(tmp_path) == whole
    again = torch.load(last, weights_only=True)["model"]
    assert all(torch.equal(x, again[name]) for name, x in weights.items())
    (tmp_path / "previous.pt").unlink()
    last.write_bytes(b"PK")
    assert str(last) in error_of(run, "mofo", *flags)                       # and nothing is overwritten
    assert last.read_bytes() == b"PK"


def test_weights_that_are_not_finite_are_neither_saved_nor_used(tmp_path):
    flags = [*SMALL, "--steps", 2, "--out", tmp_path / "run"]
    run("mofo", *flags)
    content = torch.load(tmp_path / "run/last.pt", weights_only=True)
    content["model"]["mask_token"] += float("nan")
    torch.save(content, tmp_path / "nan.pt")
    assert "mask_token" in error_of(run, "mofo", *SMALL, "--init", tmp_path / "nan.pt", "--out", tmp_path / "other")
    before = (tmp_path / "run/last.pt").read_bytes()
    model = mofo.MaskedAutoencoder(32, 4, 16, 2, *common.VITS["vit_tiny"].values())
    model.mask_token.data += float("inf")
    message = error_of(common.save_checkpoint, tmp_path / "run/last.pt", mofo.Config(), None, 3, model, model.encoder,
                       torch.optim.SGD(model.parameters()), torch.amp.GradScaler("cpu", enabled=False))
    assert "mask_token" in message and (tmp_path / "run/last.pt").read_bytes() == before


def test_a_restart_by_torchrun_goes_on_in_spite_of_fresh(tmp_path, monkeypatch, capsys):
    flags = [*SMALL, "--steps", 2, "--fresh", "--out", tmp_path]
    run("mofo", *flags)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run("mofo", *flags)
    assert "continuing at step 2" in capsys.readouterr().out and not (tmp_path / "last.pt.old").exists()


def test_a_signal_to_the_process_group_saves(tmp_path):
    """As `timeout` and a terminal's Ctrl-C send it: the workers get it, too, and must go on until the step is done."""
    flags = [*SMALL, "--workers", 2, "--steps", 500, "--save-every", 500, "--out", tmp_path]
    process = subprocess.Popen([sys.executable, REPO / "mofo.py", *map(str, flags)], text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in process.stdout:
        if line.startswith("step 2/"):
            os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == 0 and "stopped and saved" in line, line
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == len(losses(tmp_path)) >= 2


def test_two_processes_with_batch_norm_go_on_bit_for_bit():
    """Running statistics, with which keys are encoded, are the same in both processes."""
    flags = [*SMALL, *"--backbone slow_r50 --width 0.0625 --cross-weight 0 --image-size 32 --queue 16".split()]
    for out, steps in (("runs/whole", (4,)), ("runs/parts", (2, 4))):
        for stop in steps:
            last = Path(out, "last.pt")
            if last.exists():                                               # as if it had been killed after 2 steps
                content = torch.load(last, weights_only=True)
                content["config"]["steps"] = 4
                torch.save(content, last)
            process = start("modist", *flags, "--steps", stop, "--lr", 0.4, "--min-lr", 0.4, "--warmup-epochs", 0,
                            "--out", out, processes=2)
            text = process.communicate()[0]
            assert process.returncode == 0, text
    assert losses("runs/whole") == losses("runs/parts")
    whole, parts = (torch.load(f"runs/{name}/last.pt", weights_only=True)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(x, parts[name]) for name, x in whole.items())
