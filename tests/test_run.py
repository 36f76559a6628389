"""Whole runs: what a user starts, stops, continues and gets wrong, alike for all pre-training scripts."""
import importlib
import json
import math
import os
import re
import shutil
import signal
import socket
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
import fame
import mofo
from common import parse_config
from conftest import REPO, error_of, lines, losses, miniature, run, seeded, start

SCRIPTS = ["mofo", "mme", "fame", "mcl", "modist"]
CONTRASTIVE = ("fame", "mcl", "modist")
TINY = ("--toy-train 24 --toy-test 16 --image-size 32 --batch 8 --workers 0 --steps 5 --save-every 2 "
        "--log-every 1").split()
VIT = "--model vit_tiny --flow tvl1 --mask-ratio 0.5".split()
RESNET = "--backbone r2plus1d_50 --width 0.125 --queue 32".split()
SMALL = dict(mofo=VIT, mme=VIT, fame=RESNET,                            # settings for data other than toy
             mcl=[*RESNET, *"--flow tvl1 --frame-height 48 --frame-width 64".split()],
             modist="--backbone slow_r50 --width 0.125 --queue 32 --flow tvl1".split())
EXACT = dict(mofo=["--frames", "8"], mme=["--frames", "8", "--length", "3"], mcl=[],      # independent of processes:
             fame=["--no-merge"], modist=[])                            # (backgrounds are of the process's own clips)
MASKED, TRACKED = ["mofo", "mme"], ["mofo", "mme", "mcl", "modist"]     # which hide patches, which estimate flow
TRAINED = "runs/reference-mofo/last.pt"                                # once `reference("mofo")` was called
CPU = common.Env(torch.device("cpu"), 0, 1, None)


pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="session")
def reference(workplace):
    """Per script: the losses of an uninterrupted run of one process."""
    done = {}

    def losses_of(script):
        if script not in done:
            run(script, *TINY, *EXACT[script], "--out", f"runs/reference-{script}")
            done[script] = losses(f"runs/reference-{script}")
        return done[script]
    return losses_of


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_leaves_everything_it_promises_and_starts_others(script, reference):
    values, out = reference(script), Path(f"runs/reference-{script}")
    assert sorted(values) == list(range(5))
    config = json.loads((out / "config.json").read_text())
    assert config["batch"] == 8 and config["videos"] == 24 and config["method"] == script
    assert {"lr", "grad_norm", "clips_per_s", "data_wait_pct", "flow_pct", "step_ms"} <= set(lines(out)[0])
    content = torch.load(out / "last.pt", weights_only=True)            # plain dicts and tensors only
    vit = common.make_backbone(**content["backbone"])
    assert common.load_weights(vit, out / "last.pt").missing == []
    assert (out / "preview.png").stat().st_size > 5_000
    assert values[4] < values[0] or script in CONTRASTIVE               # MoCo's first steps only fill the queue
    again, more = f"runs/init-{script}", ["--momentum", 0, "--warmup-epochs", 0] if script in CONTRASTIVE else []
    run(script, *TINY, *EXACT[script], *more, "--steps", 1, "--out", again, "--init", out / "last.pt")
    assert losses(again)[0] < values[0] or script in CONTRASTIVE
    if script in CONTRASTIVE:                                           # after each step the keys follow, by 0 at once
        model = torch.load(f"{again}/last.pt", weights_only=True)["model"]
        assert (content["model"]["updates"], model["updates"]) == (5, 1)
        assert not torch.equal(content["model"]["queue.keys"][:8], model["queue.keys"][:8])    # a queue of its own
        assert all(torch.equal(x, model[name.removeprefix("keys.")]) for name, x in model.items()
                   if name.startswith("keys.") and x.is_floating_point())


# ---- stopping and going on, other processes --------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_stopped_and_started_again_gives_the_same_losses_bit_for_bit(script, reference, monkeypatch, capsys):
    argv, last = [*TINY, *EXACT[script], "--out", f"runs/stopped-{script}"], int(torch.randint(0, 3, ()))
    log_step = common.Log.step
    def interrupted(log, step, *args, **kwargs):
        log_step(log, step, *args, **kwargs)
        if step == last:                                                # anywhere: the place must not matter
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(common.Log, "step", interrupted)
        run(script, *argv, "--save-every", 1000)
    assert "the same command (without --fresh) goes on" in capsys.readouterr().out and len(losses(argv[-1])) < 5
    run(script, *argv, "--workers", 2)                                  # another number of workers, too
    assert losses(argv[-1]) == reference(script)


def test_two_processes_give_the_losses_and_results_of_one(reference):
    expected = {script: reference(script) for script in SCRIPTS}
    knn = f"--toy-train 24 --toy-test 15 --mode knn --init {TRAINED} --workers 0 --test-batch 4 --out".split()
    run("finetune", *knn, "runs/one-knn")
    jobs = [[script, *TINY, *EXACT[script], "--out", f"runs/two-{script}"] for script in SCRIPTS]
    process = start("tests/conftest", json.dumps([*jobs, ["finetune", *knn, "runs/two-knn"]]), processes=2)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    for script in SCRIPTS:
        steps, rel = (4, 1e-4) if script == "modist" else (5, 2e-5)     # batch norm: other sums, tenfold a step
        one, two = (list(found.values())[:steps] for found in (expected[script], losses(f"runs/two-{script}")))
        assert two == pytest.approx(one, rel=rel), script
    one, two = (json.loads(Path(f"runs/{n}-knn/results.json").read_text()) for n in ("one", "two"))
    assert one["per_class"] == two["per_class"] and one["videos"] == two["videos"] == 15


@pytest.mark.parametrize("script", SCRIPTS)
def test_accumulation_and_repeats(script, reference):
    out = f"runs/accumulated-{script}"
    if script in CONTRASTIVE:                                           # there a pass finds the keys of the one before
        run(script, *TINY, "--device-batch", 4, "--steps", 2, "--out", out)
        assert len(losses(out)) == 2
    else:
        run(script, *TINY, *EXACT[script], "--device-batch", 4, "--out", out)
        assert losses(out) == pytest.approx(reference(script), rel=2e-5)
    run(script, *TINY, *EXACT[script], "--repeats", 2, "--steps", 2, "--out", f"runs/repeats-{script}")
    assert len(losses(f"runs/repeats-{script}")) == 2


def nodes(script, *argv):
    """One process on each of two nodes that share no disk -> exit codes, outputs."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in (0, 1):
        Path(f"node{rank}").mkdir(exist_ok=True)
        place = dict(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        processes.append(start(script, *argv, cwd=f"node{rank}", **place))
    texts = [process.communicate(timeout=120)[0] for process in processes]
    return [process.returncode for process in processes], texts


def test_nodes_without_a_shared_disk_agree_on_the_step_or_stop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, *EXACT["mofo"], "--toy-train", 8, "--toy-test", 4, "--steps", 2]
    with monkeypatch.context() as patched:
        patched.setattr(mofo, "StopSignal", lambda: SimpleNamespace(received=True))     # after the first step
        run("mofo", *argv, "--out", "node0/runs/mofo-toy")
    codes, texts = nodes("mofo", *argv)                                 # one would go on at step 1, one start over
    assert 0 not in codes and "at steps [1, 0]" in texts[0], texts
    assert all(len(list(Path(f"node{k}/data/toy/64px/train").glob("*.mp4"))) == 8 for k in (0, 1))
    shutil.copytree("node0/runs", "node1/runs", dirs_exist_ok=True)
    codes, texts = nodes("mofo", *argv)
    assert codes == [0, 0] and "continuing at step 1" in texts[0], texts
    assert [len(losses(f"node{k}/runs/mofo-toy")) for k in (0, 1)] == [2, 1]            # only the first writes
    Path("node1/data/toy/64px/train/000000.mp4").unlink()
    codes, texts = nodes("mofo", *argv, "--fresh")
    assert 0 not in codes and "there are [8, 7] videos" in texts[0], texts


# ---- settings --------------------------------------------------------------------------------------------------------

def test_other_settings_and_other_first_weights_are_refused_and_fresh_starts_over(reference, tmp_path):
    reference("mofo")
    content = torch.load(TRAINED, weights_only=True)
    torch.save(content, tmp_path / "a.pt")
    content["model"]["mask_token"] += 1
    torch.save(content, tmp_path / "b.pt")
    shutil.copy(tmp_path / "a.pt", tmp_path / "moved.pt")
    argv = [*TINY, *EXACT["mofo"], "--steps", 1, "--out", tmp_path / "out"]
    run("mofo", *argv, "--init", tmp_path / "a.pt")
    for other, words in ((["--lr", 0.1], r"lr: 0.\d+ there, 0.1 now"),
                         (["--toy-train", 12], "videos: 24 there, 12 now"),
                         (["--init", tmp_path / "b.pt"], "init: weights of .*a.pt there, of .*b.pt now"),
                         (["--init", ""], "init: weights of .*a.pt there, of none now")):
        message = error_of(run, "mofo", *argv, "--init", tmp_path / "a.pt", *other)
        assert re.search(words + ".*--fresh", message), message
    run("mofo", *argv, "--init", tmp_path / "moved.pt")                 # the path does not matter, the content does
    (tmp_path / "a.pt").unlink()
    run("mofo", *argv, "--init", tmp_path / "a.pt")                     # nor that the file is still there
    shutil.copy(tmp_path / "b.pt", tmp_path / "a.pt")
    assert "init: weights of" in error_of(run, "mofo", *argv, "--init", tmp_path / "a.pt")
    last = tmp_path / "out/last.pt"
    assert "moves aside" in error_of(run, "mofo", *argv, "--fresh", "--init", last) and last.exists()
    run("mofo", *argv, "--lr", 0.1, "--fresh")
    assert json.loads((tmp_path / "out/config.json").read_text())["lr"] == 0.1
    assert (tmp_path / "out/last.pt.old").exists()                      # nothing is lost


# Scripts, what is wrong, and what the one line must name (else the first flag and its value, as they are here).
MISTAKES = [
    (SCRIPTS, "--data nowhere", "nowhere", "toy", "list"), (SCRIPTS, "--bacth 8"),
    (SCRIPTS, "--batch many", "--batch", "int", "many"), (SCRIPTS, "--init nowhere.pt", "nowhere.pt"),
    (SCRIPTS, "--data ssv2 --root nowhere", "nowhere", "<id>.webm", "labels.json"),
    (SCRIPTS, "--batch 9 --device-batch 2"), (SCRIPTS, "--frames 0"), (SCRIPTS, "--stride 0"),
    (SCRIPTS, "--min-crop 1.5"), (SCRIPTS, "--image-size 60", "60", "divide"),
    (TRACKED, "--flow farneback", "farneback", "raft_small", "tvl1"),
    (TRACKED, "--raft-weights nowhere.pth --flow raft_small", "nowhere.pth", "--flow tvl1"),
    (MASKED, "--model vit_giant", "vit_giant", "vit_tiny"), (MASKED, "--mask-ratio 1"), (["mofo"], "--inside-ratio 2"),
    (["mme"], "--target mbh", "mbh", "trajectory", "pixel"), (["mme"], "--length 0"),
    (CONTRASTIVE, "--width 0"), (CONTRASTIVE, "--temperature 0"), (CONTRASTIVE, "--queue 0"),
    (["fame", "modist"], "--optimizer lamb", "lamb", "sgd"), (["fame"], "--backbone vgg", "vgg", "vit_tiny"),
    (["fame"], "--batch 8 --device-batch 1", "one pair"), (["fame"], "--frames 1"), (["fame"], "--beta 1.5"),
    (["fame"], "--backbone s3d --image-size 32 --frames 4", "s3d", "4 frames", "32 pixels"),
    (["mcl"], "--backbone s3d", "s3d", "align"), (["mcl"], "--attention hard", "hard", "softmax"),
    (["mcl"], "--frames 10", "10 frames"), (["mcl"], "--momentum 1.5"), (["mcl"], "--frame-width 16"),
    (["modist"], "--stride 3", "--motion-stride 2"), (["modist"], "--motion-input edges", "edges", "frame_diff"),
    (["modist"], "--frames 4 --motion-frames 8 --stride 4 --motion-stride 3", "--motion-stride 3"),
    (["modist"], "--frames 4 --motion-frames 6 --stride 3", "multiple"),
    (["modist"], "--frames 4 --motion-frames 2 --stride 2 --motion-stride 4", "multiple"),
    (["modist"], "--frames 4 --motion-frames 9 --stride 4", "--motion-frames 9"),
    (["modist"], "--max-crop 0.4 --min-crop 0.5"), (["modist"], "--max-shift 2 --min-shift 3"),
    (["finetune"], "--mode knn", "--init FILE"), (["finetune"], f"--mode guess --init {TRAINED}", "guess", "export"),
    (["finetune"], f"--views 3 --init {TRAINED}", "--views 3", "2x3"),
    (["finetune"], f"--label taste --init {TRAINED}", "taste", "motion", "scene"),
    (["finetune"], f"--mode test --init {TRAINED}", "head.weight")]


@pytest.mark.parametrize("script, argv, words", [(script, argv, words) for scripts, argv, *words in MISTAKES
                                                 for script in scripts])
def test_a_mistake_gets_one_line_that_names_it(script, argv, words, reference, tmp_path):
    reference("mofo")
    vit = ["--backbone", "vit_tiny"] if script in CONTRASTIVE else []
    base = TINY[:4] if script == "finetune" else [*TINY, *vit, "--out", tmp_path / "out", "--steps", 1]
    message = error_of(run, script, *base, *argv.split())
    assert all(word in message for word in words or [" ".join(argv.split()[:2])]), message
    assert "motion" not in argv or not (tmp_path / "out").exists()      # found before anything is written


def test_the_one_line_is_all_that_is_printed_and_of_a_full_gpu_says_what_to_lower():
    process = start("mofo", "--data", "nowhere")
    text = process.communicate()[0]
    assert process.returncode == 1 and text.startswith("error: --data nowhere") and text.count("\n") == 1
    def full(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")
    assert "out of memory. Lower --device-batch" in error_of(common.run, full, mofo.Config, mofo.RECIPES, [])


@pytest.mark.parametrize("script", [*SCRIPTS, "finetune"])
def test_a_warm_up_longer_than_the_run_is_said(script, capsys):
    module = importlib.import_module(script)
    for argv, videos, said in (("--steps 3 --batch 8 --warmup-epochs 2", 16, "--warmup-epochs 2, of 2 steps each"),
                               ("--steps 3 --batch 8 --warmup-epochs 2", 12, ""),
                               ("--data my_videos", 300, ""), ("--data toy", 300, "")):     # these reach their peak
        cfg = parse_config(module.Config, module.RECIPES, [*argv.split(), "--frames", "8"])
        common.plan_run(cfg, videos, CPU)
        assert said in (out := capsys.readouterr().out) and bool(said) == bool(out)
        assert "--data" not in argv or cfg.warmup_epochs <= cfg.epochs / 2


def test_all_scripts_have_the_same_loop():
    loops = [re.search(r"# >>> same: loop\n(.*)# <<< same", (REPO / f"{s}.py").read_text(), re.S)[1] for s in SCRIPTS]
    assert len(set(loops)) == 1 and loops[0].count("\n") > 30


# ---- what may go wrong on the way ------------------------------------------------------------------------------------

def test_broken_videos_do_not_stop_a_run_but_too_many_do(workplace, tmp_path):
    videos = sorted((workplace / "data/toy/64px/train").glob("*.mp4"))
    for i in range(12):
        (tmp_path / f"{i:02d}.mp4").write_bytes(videos[i].read_bytes()[:700 if i == 5 else None])
    argv = ["--data", tmp_path, *SMALL["mofo"], *"--image-size 32 --frames 8 --batch 4 --workers 0 --steps 6".split()]
    run("mofo", *argv, "--out", "runs/broken")
    reported = Path("runs/broken/bad_videos.txt").read_text()
    assert len(losses("runs/broken")) == 6 and reported.count("\n") == 1 and "05.mp4" in reported
    for i in range(8):
        (tmp_path / f"{i:02d}.mp4").write_text("no video")
    message = error_of(run, "mofo", *argv, "--out", "runs/too-many", "--steps", 20)
    assert "more than a fifth" in message and "bad_videos.txt" in message


PLAN = common.Plan(8, 8, 1, 1, 10, 1.0, 0, 0.1, 0.0)


@pytest.mark.parametrize("tried, bad, stops", [
    (18, 16, False), (20, 8, False), (20, 10, True), (1000, 236, False), (1000, 238, True), (2, 2, True)])
def test_a_fifth_of_broken_videos_is_counted_with_a_margin_of_three_deviations(tried, bad, stops, tmp_path):
    log, errors = common.Log(tmp_path, CPU, PLAN, 0, 1), [f"{i}.mp4: broken" for i in range(bad // 2)]
    half = dict(names=["a.mp4"] * (tried // 2 - len(errors)), errors=errors, read=torch.tensor([bad < tried]),
                clips=torch.zeros(1), labels=torch.zeros(1))
    if bad < tried:
        log.next_batch(iter([half]))
    with pytest.raises(common.UserError, match="more than a fifth") if stops else nullcontext():
        log.next_batch(iter([half]))


def test_three_losses_in_a_row_that_are_not_finite_stop_the_run(tmp_path):
    log = common.Log(tmp_path, CPU, PLAN, 0, 1)
    nan, inf = float("nan"), float("inf")
    steps = ((1.0, 1.0), (nan, 1.0), (1.0, 1.0), (inf, 1.0), (1.0, nan))            # loss, norm of the gradient
    norm = torch.nn.BatchNorm3d(2)
    norm.running_mean.fill_(3)[0] = norm.running_var[1] = nan
    assert [log.finite(*step, ["a"], norm) for step in steps] == [True, False, True, False, False]
    assert norm.running_mean.tolist() == [0, 3] and norm.running_var.tolist() == [1, 1]      # of steps that are skipped
    message = error_of(log.finite, nan, 1.0, ["c.mp4"], norm)
    assert "last.pt" in message and "c.mp4" in message


def test_operations_per_second_are_logged_on_a_gpu(tmp_path):
    gpu = CPU._replace(device=type("Pretended", (str,), dict(type="cuda"))("cpu"))      # a CPU that says that it is one
    log, x, layer = common.Log(tmp_path, gpu, PLAN, 0, 2), torch.ones(5000, 1000), torch.nn.Linear(1000, 2000)
    for step in range(4):
        log.next_batch(iter([dict(names=["a"], errors=[], read=x, clips=x, labels=x)]))
        layer(x).sum().backward()                                       # the gradient of x is not needed
        log.step(step, 0.0, lr=0.0)
    for line in lines(tmp_path):
        assert line["tflops"] == pytest.approx(0.04 / (line["step_ms"] / 1000), rel=0.01, abs=0.051)


@pytest.mark.parametrize("script, method", [("mofo", mofo.MOFO), ("fame", fame.FAME)])
def test_a_step_that_is_not_finite_changes_no_weight(script, method, monkeypatch):
    forward, seen = method.forward, []

    def poisoned(self, clips, generator=None):
        loss, stats = forward(self, clips, generator)
        seen.append(next(self.parameters()).detach().clone())
        return loss * (float("nan") if len(seen) == 3 else 1), stats
    monkeypatch.setattr(method, "forward", poisoned)
    run(script, *TINY, *EXACT[script], "--out", f"runs/nan-{script}")
    assert torch.equal(seen[2], seen[3]) and not torch.equal(seen[3], seen[4])


@pytest.mark.parametrize("script", SCRIPTS)
def test_fp16_with_a_scaler_skips_what_overflows_and_goes_on(script, reference, monkeypatch):
    module, out = importlib.import_module(script), Path(f"runs/fp16-{script}")
    monkeypatch.setattr(module, "setup", lambda seed: common.setup(seed)._replace(amp=torch.float16))
    run(script, *TINY, *EXACT[script], "--out", out)
    assert losses(out)[0] == pytest.approx(reference(script)[0], rel=0.01)
    assert all(map(math.isfinite, losses(out).values())) and math.isfinite(lines(out)[-1]["grad_norm"])
    assert 0 < torch.load(out / "last.pt", weights_only=True)["scaler"]["scale"] <= 65536
    shutil.copytree(f"runs/reference-{script}", f"{out}-later")                         # begun without a scaler
    run(script, *TINY, *EXACT[script], "--out", f"{out}-later")


def test_without_a_c_compiler_it_runs_eagerly_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(common.shutil, "which", lambda name: None)
    common.can_compile.cache_clear()
    run("mofo", *TINY, *EXACT["mofo"], "--steps", 1, "--compile", "--out", "runs/no-compiler")
    common.can_compile.cache_clear()
    assert "needs a C compiler" in capsys.readouterr().out


@pytest.mark.skipif(not any(map(shutil.which, ("gcc", "cc", "clang"))), reason="needs a C compiler")
def test_compiled_blocks_give_the_eager_result_without_recompiling():
    sizes = dict(image_size=32, frames=4, patch_size=8, tubelet_size=2, dim=32, depth=2, heads=2, decoder_dim=16,
                 decoder_depth=2, decoder_heads=1)
    model, eager = mofo.MaskedAutoencoder(**sizes), mofo.MaskedAutoencoder(**sizes)
    eager.load_state_dict(model.state_dict())
    names = list(model.state_dict())
    common.wrap_model(model, CPU, compile=True)
    assert list(model.state_dict()) == names
    clips, none = torch.randn(2, 3, 4, 32, 32), torch.zeros(2, 4)
    for seed in range(3):                                               # all graphs are made in the first step
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            hidden = mofo.motion_tube_mask(none, none[:, 0] > 0, (2, 4, 4), 0.75, None, seeded(seed), 8)
            torch.testing.assert_close(model(clips, hidden)[1], eager(clips, hidden)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("script, data", list(zip(SCRIPTS, ("ssv2", "k400", "ucf101", "hmdb51", "epic"))))
def test_a_published_layout_trains_and_tests(script, data, tmp_path):
    miniature(data, tmp_path)
    small = [*SMALL[script], *"--image-size 32 --batch 4 --workers 0 --steps 2".split()]
    out = Path(f"runs/mini-{script}")
    run(script, "--data", data, "--root", tmp_path, *small, "--out", out)
    assert len(losses(out)) == 1 and json.loads((out / "config.json").read_text())["videos"] == 4
    assert len((out / "missing_videos.txt").read_text().splitlines()) == 1
    assert len((out / "bad_videos.txt").read_text().splitlines()) == 1
    run("finetune", "--data", data, "--root", tmp_path, "--mode", "knn", "--init", out / "last.pt", "--workers", 0,
        "--out", f"{out}-knn")
    results = json.loads(Path(f"{out}-knn/results.json").read_text())
    assert results["videos"] == 2 and len(results["unreadable"]) == 1   # the broken one, of the training videos
