"""What happens to a run must not cost more than the steps since its last checkpoint: damage, nan, restarts."""
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import finetune
import mofo
from conftest import REPO, error_of, losses, put, run, start

SMALL = "--toy-train 24 --toy-test 16 --batch 8 --log-every 1 --save-every 1 --workers 0".split()
VIT = "--model vit_tiny --flow tvl1 --image-size 32 --frames 8 --mask-ratio 0.5".split()

pytestmark = pytest.mark.usefixtures("here")


def spoiled(path):                                                          # a checkpoint of which one weight is nan
    content = torch.load(path, weights_only=True)
    content["model"]["mask_token"][..., 0] = float("nan")
    return content


@pytest.mark.parametrize("damage", [b"", b"PK", "half", "list", "other", "step", "nan"])
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
        other = dict(list=[1, 2], other=dict(model=weights, step=4), nan=spoiled(last),
                     step=torch.load(last, weights_only=True) | dict(step="4"))
        torch.save(other[damage], last)
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
    torch.save(spoiled(tmp_path / "run/last.pt"), tmp_path / "nan.pt")
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
    """As `timeout` and Ctrl-C send it, and torchrun repeats it: workers get it, too, and must go on until the save."""
    flags = [*SMALL, "--workers", 2, "--steps", 500, "--save-every", 500, "--out", tmp_path]
    process = subprocess.Popen([sys.executable, REPO / "mofo.py", *map(str, flags)], text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in process.stdout:
        if line.startswith("step 2/"):
            [os.killpg(process.pid, number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert process.wait() == 0 and "stopped and saved" in line, line
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == len(losses(tmp_path)) >= 2


def test_ctrl_c_ends_at_once_where_it_is_repeated_later(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    stop = common.StopSignal()
    stop._receive(signal.SIGINT, None), stop._receive(signal.SIGINT, None)
    stop.at -= 2
    stop._receive(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        stop._receive(signal.SIGINT, None)


def test_a_killed_loader_worker_ends_the_step_and_saves(tmp_path, monkeypatch):
    flags, log_step = [*SMALL, "--workers", 1, "--steps", 8, "--device-batch", 4], common.Log.step
    run("mofo", *flags, "--out", tmp_path / "whole")
    def killing(log, step, *args, **kwargs):
        log_step(log, step, *args, **kwargs)
        [os.kill(child.pid, signal.SIGKILL) for child in multiprocessing.active_children()]
    with monkeypatch.context() as patched:
        patched.setattr(common.Log, "step", killing)
        assert "worker was killed" in error_of(run, "mofo", *flags, "--save-every", 1000, "--out", tmp_path / "run")
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == len(losses(tmp_path / "run")) < 8
    run("mofo", *flags, "--out", tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for flags in (["--out", tmp_path / "file"], ["--out", tmp_path / "file/run"], ["--root", tmp_path / "file"]):
        assert "/file" in error_of(run, "mofo", *SMALL, "--steps", 1, *flags)
    monkeypatch.setattr(common, "save_image", lambda *_: open("/dev/full", "w", buffering=1).write("x\n"))
    assert "No space left" in error_of(run, "mofo", *SMALL, "--steps", 1, "--out", tmp_path / "run")


def test_a_second_run_in_the_same_directory_is_refused(tmp_path):
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    put(tmp_path, {"log.jsonl": ""})
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "config.json"], stdin=-1, stdout=-1) as other:
        other.stdout.readline()
        assert f"{tmp_path}: another run" in error_of(run, "mofo", *SMALL, "--steps", 1, "--fresh", "--out", tmp_path)
        assert (tmp_path / "log.jsonl").exists()
        other.communicate(b"\n")
    run("mofo", *SMALL, "--steps", 1, "--out", tmp_path)


def test_what_cannot_be_read_is_named_and_counts_as_wrong_and_a_signal_ends_the_test(tmp_path, monkeypatch):
    good, odd = Path("data/toy/64px/test/000000.mp4").read_bytes(), os.fsdecode(b"\xff.mp4")
    for part in ("train", "val"):
        put(tmp_path / part, {"0/empty.mp4": ""}, [f"0/{odd}", *(f"{i % 2}/{i}.mp4" for i in range(8))])
        for i in range(8):
            (tmp_path / part / f"{i % 2}/{i}.mp4").write_bytes(good)
        os.mkfifo(tmp_path / part / "1/pipe.mp4")
    run("mofo", *SMALL, "--data", tmp_path, *VIT, "--steps", 4, "--out", tmp_path / "run")
    assert (tmp_path / "run/bad_videos.txt").read_bytes().count(b"/\xff.mp4: ") == 1
    probe = ["--data", tmp_path, "--mode", "knn", "--workers", 0, "--init", tmp_path / "run/last.pt"]
    run("finetune", *probe, "--out", tmp_path / "knn")
    result = json.loads((tmp_path / "knn/results.json").read_text())
    assert result["videos"] == 11 and len(result["unreadable"]) == 3 + 1 and len(result["missing"]) == 2
    monkeypatch.setattr(finetune, "test_clips", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert "signal" in error_of(run, "finetune", *probe, "--out", tmp_path / "stopped")


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
