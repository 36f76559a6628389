"""Whole runs: what a user starts, stops, continues and gets wrong.  Every pre-training script goes through the same tests."""
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common
import fame
import finetune
import mcl
import mme
import modist
import mofo
from common import UserError, parse_config
from conftest import REPO, lines, losses, put, run, start, tiny_video

METHODS = dict(mofo=mofo.MOFO, mme=mme.MME, fame=fame.FAME, mcl=mcl.MCL, modist=modist.MoDist)
SCRIPTS = list(METHODS)
CONTRASTIVE = ("fame", "mcl", "modist")
TINY = "--toy-train 24 --toy-test 16 --batch 8 --log-every 1 --steps 6 --save-every 2 --workers 1".split()
VIT, RESNET = "--model vit_tiny --flow tvl1 --mask-ratio 0.5".split(), "--backbone r2plus1d_50 --width 0.125 --queue 32".split()
SMALL = dict(mofo=VIT, mme=VIT, fame=RESNET,                             # settings for data other than toy
             mcl=[*RESNET, *"--flow tvl1 --frame-height 48 --frame-width 64".split()],
             modist=[*"--backbone slow_r50 --width 0.125 --queue 32 --flow tvl1".split()])
EXACT = dict(fame=["--no-merge"],                                        # backgrounds come from the process's own clips
             modist=["--cross-weight", "0", "--backbone", "vit_tiny"])   # others have batch norm, per process on CPUs


def wait_for_steps(out, count, process):
    for _ in range(600):
        if process.poll() is not None or (Path(out, "log.jsonl").exists() and len(lines(out)) >= count):
            return
        time.sleep(0.1)


@pytest.fixture(autouse=True)
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    yield
    for number in (signal.SIGTERM, signal.SIGINT):                       # the loop has put its own handlers there
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)


@pytest.fixture(scope="session")
def reference(workplace):
    """Per script: the losses of an uninterrupted run of one process."""
    done = {}

    def losses_of(script):
        if script not in done:
            process = start(script, *TINY, *EXACT.get(script, []), "--out", f"runs/reference-{script}")
            text = process.communicate()[0]
            assert process.returncode == 0, text
            done[script] = losses(workplace / f"runs/reference-{script}")
        return done[script]
    return losses_of


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_leaves_everything_it_promises(script, reference):
    assert sorted(reference(script)) == list(range(6))
    out = Path(f"runs/reference-{script}")
    config = json.loads((out / "config.json").read_text())
    assert config["batch"] == 8 and config["videos"] == 24 and config["method"] == script
    assert {"lr", "grad_norm", "clips_per_s", "data_wait_pct", "flow_pct", "step_ms"} <= set(lines(out)[0])
    content = torch.load(out / "last.pt", weights_only=True)             # plain dicts and tensors only
    vit = common.make_backbone(**content["backbone"])
    assert common.load_weights(vit, out / "last.pt").missing == []
    assert (out / "preview.png").stat().st_size > 10_000
    values = list(reference(script).values())
    assert values[-1] < values[0] or script in CONTRASTIVE               # MoCo's first steps only fill the queue


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_and_started_again_gives_the_same_losses_bit_for_bit(script, reference):
    out = f"runs/killed-{script}"
    process = start(script, *TINY, *EXACT.get(script, []), "--out", out)
    wait_for_steps(out, int(torch.randint(1, 6, ())), process)           # anywhere: the place must not matter
    process.kill()
    process.communicate()
    again = start(script, *TINY, *EXACT.get(script, []), "--out", out, "--workers", 2)           # another number of workers, too
    text = again.communicate()[0]
    assert again.returncode == 0, text
    assert losses(out) == reference(script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_sigterm_saves_exits_with_0_and_the_same_command_goes_on(script, reference):
    out = f"runs/terminated-{script}"
    process = start(script, *TINY, *EXACT.get(script, []), "--save-every", 1000, "--out", out)
    wait_for_steps(out, 1, process)
    process.send_signal(signal.SIGTERM)
    text = process.communicate()[0]
    assert process.returncode == 0 and "same command goes on" in text, text
    done = torch.load(Path(out, "last.pt"), weights_only=True)["step"]
    assert 1 <= done < 6
    run(script, *TINY, *EXACT.get(script, []), "--out", out)
    assert losses(out).keys() == reference(script).keys()
    assert all(abs(losses(out)[k] - v) < 1e-4 for k, v in reference(script).items())    # other thread counts, not bit for bit


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_give_the_losses_of_one(script, reference):
    out = f"runs/two-{script}"
    process = start(script, *TINY, *EXACT.get(script, []), "--out", out, processes=2)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    assert [losses(out)[k] for k in range(6)] == pytest.approx([reference(script)[k] for k in range(6)], rel=2e-5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_accumulation_and_repeats(script, reference):
    run(script, *TINY, *EXACT.get(script, []), "--device-batch", 2, "--out", f"runs/accumulated-{script}")
    if script not in CONTRASTIVE:                                        # there a pass finds the keys of the one before
        assert [*losses(f"runs/accumulated-{script}").values()] == pytest.approx([*reference(script).values()], rel=2e-5)
    assert len(losses(f"runs/accumulated-{script}")) == 6
    run(script, *TINY, "--repeats", 2, "--steps", 2, "--out", f"runs/repeats-{script}")
    assert len(losses(f"runs/repeats-{script}")) == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_other_settings_are_refused_and_fresh_starts_over(script):
    argv = [*TINY, "--steps", 1, "--out", f"runs/settings-{script}"]
    run(script, *argv)
    with pytest.raises(UserError, match=r"lr: 0.\d+ there, 0.1 now.*--fresh"):
        run(script, *argv, "--lr", 0.1)
    with pytest.raises(UserError, match=r"videos: 24 there, 12 now"):
        run(script, *argv, "--toy-train", 12)
    run(script, *argv, "--lr", 0.1, "--fresh")
    assert json.loads(Path(f"runs/settings-{script}/config.json").read_text())["lr"] == 0.1
    assert Path(f"runs/settings-{script}/last.pt.old").exists()          # nothing is lost
    run(script, *TINY, "--steps", 1, "--out", f"runs/init-{script}", "--init", f"runs/settings-{script}/last.pt")


MISTAKES = [
    (["--data", "nowhere"], r"--data nowhere: neither one of toy, .* nor an existing directory or list file"),
    (["--data", "ssv2", "--root", "nowhere"], r"--data ssv2: no directory nowhere.*<id>.webm files and labels.json.*--root"),
    (["--bacth", "8"], r"unknown flag --bacth, did you mean --batch\?"),
    (["--batch", "many"], r"--batch.*invalid int value: 'many'"),
    (["--batch", "9", "--device-batch", "2"], r"--batch 9 does not spread evenly over 1 processes with --device-batch 2"),
    (["--init", "nowhere.pt"], r"nowhere.pt: no such checkpoint"),
    (["--image-size", "60"], r"image_size 60 / patch_size 16.*must divide"), (["--frames", "0"], "--frames 0 must be at least 1"),
    (["--stride", "0"], "--stride 0 must be at least 1"), (["--min-crop", "1.5"], "--min-crop 1.5 must be above 0 and at most 1")]
FLOW = [
    (["--flow", "farneback"], r"--flow farneback: choose raft_small, raft_large or tvl1"),
    (["--flow", "raft_small", "--raft-weights", "nowhere.pth"], r"--raft-weights nowhere.pth failed.*--flow tvl1"),
    (["--model", "vit_giant"], r"--model vit_giant: choose vit_tiny"),
    (["--mask-ratio", "1"], r"--mask-ratio 1.0 must leave some of the 16 patches hidden")]
OWN = dict(mofo=[*FLOW, (["--inside-ratio", "2"], "--mask-ratio 0.75 .* --inside-ratio 2.0 must be in")],
           mme=[*FLOW, (["--target", "mbh"], "--target mbh: choose trajectory, position, hog, pixel"),
                (["--length", "0"], "--length 0 and --stride 2 must be at least 1")],
           fame=[(["--backbone", "vgg"], "--backbone vgg: choose vit_tiny"), (["--optimizer", "lamb"], "--optimizer lamb: choose sgd"),
                 (["--batch", "8", "--device-batch", "1"], "one pair per forward pass"), (["--frames", "1"], "--frames 1 must be at least 2"),
                 (["--backbone", "s3d", "--image-size", "32", "--frames", "4"], "s3d cannot take 4 frames of 32 pixels"),
                 (["--width", "0"], "--width 0.0 must be above 0"), (["--temperature", "0"], "--temperature 0.0 must be above 0"),
                 (["--queue", "0"], "--queue 0 must be at least 1"), (["--beta", "1.5"], "--frames 8 .* --beta 1.5 and")],
           mcl=[*FLOW[:2], (["--backbone", "s3d"], "--attention l1: .*--backbone s3d: any but s3d"),
                (["--attention", "hard"], "--attention hard: choose l1 or softmax"), (["--frames", "10"], "10 frames do not fall into"),
                (["--momentum", "1.5"], "--momentum 1.5 must be in"), (["--frame-width", "16"], ".*--frame-width 16 at least 32")],
           modist=[*FLOW[:2], (["--stride", "3"], "--stride 3 must be a multiple of --motion-stride 2, and --frames 8 x"),
                   (["--motion-input", "edges"], "--motion-input edges: choose flow_edge, flow or frame_diff"),
                   (["--max-crop", "0.5"], ".*--max-crop 0.5 between --min-crop"), (["--optimizer", "lamb"], "--optimizer lamb: choose sgd")])


@pytest.mark.parametrize("script, argv, message", [(s, *mistake) for s in SCRIPTS for mistake in MISTAKES + OWN[s]])
def test_a_mistake_gets_one_line(script, argv, message):
    with pytest.raises(UserError, match=f"^error: {message}") as error:
        vit = ["--backbone", "vit_tiny"] if script in CONTRASTIVE else []
        run(script, *TINY, "--out", "runs/mistake", "--steps", 1, *vit, *argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_belongs_to_the_weights_that_it_started_from(script, reference, tmp_path):
    reference(script)
    content = torch.load(f"runs/reference-{script}/last.pt", weights_only=True)
    torch.save(content, tmp_path / "a.pt")
    name = next(name for name, x in content["model"].items() if x.is_floating_point())
    torch.save(dict(content, model=content["model"] | {name: content["model"][name] + 1}), tmp_path / "b.pt")
    shutil.copy(tmp_path / "a.pt", tmp_path / "moved.pt")
    argv = [*TINY, *EXACT.get(script, []), "--workers", 0, "--steps", 1, "--out", tmp_path / "out"]
    run(script, *argv, "--init", tmp_path / "a.pt")
    for other, words in ((["--init", tmp_path / "b.pt"], "of .*a.pt there, of .*b.pt now"), ([], "of .*a.pt there, of none now")):
        with pytest.raises(UserError, match=f"init: weights {words}.*--fresh"):
            run(script, *argv, *other)
    run(script, *argv, "--init", tmp_path / "moved.pt")                  # the path does not matter, the content does
    (tmp_path / "a.pt").unlink()
    run(script, *argv, "--init", tmp_path / "a.pt")                      # nor that the file is still there
    shutil.copy(tmp_path / "b.pt", tmp_path / "a.pt")
    with pytest.raises(UserError, match="init: weights of"):
        run(script, *argv, "--init", tmp_path / "a.pt")


def nodes(script, *argv):
    """One process on each of two nodes that share no disk -> exit codes, outputs."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in (0, 1):
        Path(f"node{rank}").mkdir(exist_ok=True)
        env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0",
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        processes.append(subprocess.Popen([sys.executable, REPO / f"{script}.py", *map(str, argv)], cwd=f"node{rank}", env=env,
                                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    texts = [process.communicate(timeout=120)[0] for process in processes]
    return [process.returncode for process in processes], texts


def test_nodes_without_a_shared_disk_agree_on_the_step_or_stop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = "--toy-train 8 --toy-test 4 --batch 4 --workers 0 --steps 2 --save-every 1 --log-every 1 --mask-ratio 0.5".split()
    codes, texts = nodes("mofo", *argv)
    assert codes == [0, 0], texts                                        # each has written its toy data and its directory
    assert all(len(list(Path(f"node{k}/data/toy/64px/train").glob("*.mp4"))) == 8 for k in (0, 1))
    assert Path("node1/runs/mofo-toy").is_dir() and not Path("node1/runs/mofo-toy/last.pt").exists()
    codes, texts = nodes("mofo", *argv)                                  # one would go on at step 2, one start over
    assert 0 not in codes and "is at step 2 for process 0 and at step 0 for process 1" in texts[0], texts
    shutil.copy("node0/runs/mofo-toy/last.pt", "node1/runs/mofo-toy/last.pt")
    codes, texts = nodes("mofo", *argv)
    assert codes == [0, 0] and "continuing at step 2" in texts[0], texts
    codes, texts = nodes("mofo", *argv, "--fresh")
    assert codes == [0, 0] and "continuing" not in texts[0] and Path("node1/runs/mofo-toy/last.pt.old").exists(), texts


@pytest.mark.parametrize("script", [*SCRIPTS, "finetune"])
def test_batch_and_epochs_count_videos_and_repeats_the_clips_of_each(script):
    module, env = importlib.import_module(script), common.Env(torch.device("cpu"), 0, 1, None)
    flags = "--data k400 --repeats 2 --epochs 3 --batch 64 --device-batch 16 --frames 16".split()
    plan = common.plan_run(parse_config(module.Config, module.RECIPES, flags), 640, env)
    assert (plan.steps, plan.per_epoch, plan.micro, plan.accum) == (30, 10, 16, 4)
    passes = [key for keys in common.StepSampler(640, plan, env, 0) for key in keys]
    assert len(passes) == 3 * 640 and len(set(passes)) == len(passes)    # every video once in each of the three
    assert plan.generator(env, 0, 0, 3).first == 96 and plan.generator(env, 0, 0, 3).total == 128        # rows are clips
    text = (REPO / f"{script}.py").read_text()
    for field in ("epochs", "batch", "device_batch", "lr", "min_lr"):
        assert re.search(rf"^    {field}: \w+ = .*#.*videos", text, re.M), field


@pytest.mark.parametrize("script", [*SCRIPTS, "finetune"])
def test_a_warm_up_longer_than_the_run_is_said(script, capsys):
    module = importlib.import_module(script)
    cfg = parse_config(module.Config, module.RECIPES, "--steps 3 --batch 8 --warmup-epochs 2 --frames 8".split())
    env = common.Env(torch.device("cpu"), 0, 1, None)
    assert common.plan_run(cfg, 16, env).steps == 3
    assert "--warmup-epochs 2, of 2 steps each, are longer than the run of 3 steps" in capsys.readouterr().out
    common.plan_run(cfg, 12, env)
    assert not capsys.readouterr().out
    for data in ("my_videos", "toy"):                                    # what a user starts with reaches its peak
        cfg = parse_config(module.Config, module.RECIPES, ["--data", data, "--frames", "8"])
        common.plan_run(cfg, 300, env)
        assert not capsys.readouterr().out and cfg.warmup_epochs <= cfg.epochs / 4


def test_all_scripts_have_the_same_loop():
    loops = [re.search(r"# >>> same: loop\n(.*)# <<< same", (REPO / f"{s}.py").read_text(), re.S)[1] for s in SCRIPTS]
    assert len(set(loops)) == 1 and loops[0].count("\n") > 30


def test_the_one_line_is_all_that_is_printed():
    process = start("mofo", "--data", "nowhere")
    text = process.communicate()[0]
    assert process.returncode == 1 and text.startswith("error: --data nowhere") and text.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_broken_videos_do_not_stop_a_run_but_too_many_do(script, workplace, tmp_path):
    videos = sorted((workplace / "data/toy/64px/train").glob("*.mp4"))
    for i in range(12):
        (tmp_path / f"{i:02d}.mp4").write_bytes(videos[i].read_bytes())
    (tmp_path / "05.mp4").write_bytes(videos[5].read_bytes()[:700])
    argv = [*SMALL[script], *"--image-size 64 --batch 4 --workers 0 --steps 6".split()]
    run(script, "--data", tmp_path, *argv, "--out", f"runs/broken-{script}")
    assert len(losses(f"runs/broken-{script}")) == 6
    reported = Path(f"runs/broken-{script}/bad_videos.txt").read_text()
    assert reported.count("\n") == 1 and "05.mp4" in reported
    for i in range(8):
        (tmp_path / f"{i:02d}.mp4").write_text("no video")
    with pytest.raises(UserError, match="more than a fifth.*bad_videos.txt"):
        run(script, "--data", tmp_path, *argv, "--out", f"runs/too-many-{script}", "--steps", 20)


def test_three_losses_in_a_row_that_are_not_finite_stop_the_run(tmp_path):
    env = common.Env(torch.device("cpu"), 0, 1, None)
    log = common.Log(tmp_path, env, common.Plan(8, 8, 1, 1, 10, 1.0), 0, 1)
    assert log.finite(1.0, ["a"]) and not log.finite(float("nan"), ["a"]) and log.finite(1.0, ["a"])
    assert not log.finite(float("inf"), ["a"]) and not log.finite(float("nan"), ["b"])
    with pytest.raises(UserError, match="3 steps in a row.*last.pt.*c.mp4"):
        log.finite(float("nan"), ["c.mp4"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_that_is_not_finite_changes_no_weight(script, monkeypatch):
    forward, calls, seen = METHODS[script].forward, [], []

    def poisoned(self, clips, generator=None):
        loss, stats = forward(self, clips, generator)
        calls.append(1)
        seen.append(next(self.parameters()).detach().clone())
        return loss * (float("nan") if len(calls) == 3 else 1), stats
    monkeypatch.setattr(METHODS[script], "forward", poisoned)
    run(script, *TINY, "--workers", 0, "--out", f"runs/nan-{script}")
    assert torch.equal(seen[2], seen[3]) and not torch.equal(seen[3], seen[4])


def test_compiled_blocks_give_the_eager_result_without_recompiling():
    if not any(map(__import__("shutil").which, ("gcc", "cc", "clang"))):
        pytest.skip("needs a C compiler")
    env = common.Env(torch.device("cpu"), 0, 1, None)
    sizes = dict(image_size=32, frames=4, patch_size=8, tubelet_size=2, dim=32, depth=2, heads=2, decoder_dim=16,
                 decoder_depth=2, decoder_heads=1)
    torch.manual_seed(0)
    model, eager = mofo.MaskedAutoencoder(**sizes), mofo.MaskedAutoencoder(**sizes)
    eager.load_state_dict(model.state_dict())
    names = list(model.state_dict())
    common.wrap_model(model, env, compile=True)
    assert list(model.state_dict()) == names
    clips = torch.randn(2, 3, 4, 32, 32)
    found = torch.zeros(2, dtype=torch.bool)
    for seed in range(3):                                                # all graphs are made in the first step
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            hidden = mofo.motion_tube_mask(torch.zeros(2, 4), found, (2, 4, 4), 0.75, None, torch.Generator().manual_seed(seed), 8)
            torch.testing.assert_close(model(clips, hidden)[1], eager(clips, hidden)[1], rtol=1e-5, atol=1e-6)


def miniature(data, root):
    """A data set in its published layout: 5 training videos, of which one is missing and one is broken, and 2 to test."""
    stems = ["-aB_cd-EF1g", "_hIjKlMnOp2", "qRsTuVwXyZ3", "broken-f1l3", "missing-f1l", "t3st-aaaaaa", "t3st-bbbbbb"]
    names = {"k400": [f"{s}_000010_000020.mp4" for s in stems], "ssv2": [f"{i}.webm" for i in range(7)],
             "ucf101": [f"v_Jump_g0{i}_c01.avi" for i in range(7)], "hmdb51": [f"a!#&b(+)@;]_{i}.avi" for i in range(7)],
             "epic": [f"P0{i}_01.MP4" for i in range(7)]}[data]
    codec = {"k400": "libx264", "epic": "libx264", "ssv2": "libvpx-vp9"}.get(data, "mpeg4")
    for i, name in enumerate(names):
        if i == 3:
            put(root, videos=[f"videos/{name}"])
        elif i != 4:
            tiny_video(root / "videos" / name, 40, codec=codec, **({} if codec == "libx264" else dict(options={})))
    split = lambda line: ["\n".join(line(i, n) for i, n in enumerate(names) if (i > 4) == test) + "\n" for test in (False, True)]
    if data == "k400":
        head, (train, test) = "label,youtube_id,time_start,time_end,split\n", split(lambda i, n: f'"class {i % 2}",{n[:11]},10,20,x')
        put(root, {"train.csv": head + train, "val.csv": head + test})
    if data == "ssv2":
        rows = [[dict(id=str(i), template=f"Moving [something] {i % 2}") for i in range(7) if (i > 4) == test] for test in (False, True)]
        put(root, {"labels.json": json.dumps({"Moving something 0": "0", "Moving something 1": "1"}),
                   "train.json": json.dumps(rows[0]), "validation.json": json.dumps(rows[1])})
    if data == "ucf101":
        train, test = split(lambda i, n: f"Jump/{n} 1")
        put(root, {"classInd.txt": "1 Jump\n2 Run\n", "trainlist01.txt": train, "testlist01.txt": test.replace(" 1", "")})
    if data == "hmdb51":
        put(root, {"jump_test_split1.txt": "".join(f"{n} {2 if i > 4 else 1} \n" for i, n in enumerate(names)), "run_test_split1.txt": ""})
    if data == "epic":
        train, test = split(lambda i, n: f"x,P0{i},P0{i}_01,,00:00:00.50,00:00:02.50,1,2,take,take,{i % 2},cup,3,[],[]")
        head = ("narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
                "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n")
        put(root, {"EPIC_100_train.csv": head + train, "EPIC_100_validation.csv": head + test})


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("data", ["ssv2", "k400", "ucf101", "hmdb51", "epic"])
def test_published_layouts_train_and_test(data, script, tmp_path):
    miniature(data, tmp_path)
    small = [*SMALL[script], *"--image-size 32 --batch 4 --workers 0 --steps 2".split()]
    out = Path(f"runs/mini-{script}-{data}")
    run(script, "--data", data, "--root", tmp_path, *small, "--out", out)
    assert len(losses(out)) == 1 and json.loads((out / "config.json").read_text())["videos"] == 4
    assert len((out / "missing_videos.txt").read_text().splitlines()) == 1
    assert len((out / "bad_videos.txt").read_text().splitlines()) == 1
    run("finetune", "--data", data, "--root", tmp_path, "--mode", "knn", "--init", out / "last.pt", "--workers", 0, "--out",
        f"runs/mini-knn-{script}-{data}")
    results = json.loads(Path(f"runs/mini-knn-{script}-{data}/results.json").read_text())
    assert results["videos"] == 2 and len(results["unreadable"]) == 1                    # the broken one, of the training videos


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_c_compiler_it_runs_eagerly_and_says_so(script, monkeypatch, capsys):
    monkeypatch.setattr(common.shutil, "which", lambda name: None)
    common.can_compile.cache_clear()
    run(script, *TINY, "--steps", 1, "--workers", 0, "--compile", "--out", f"runs/no-compiler-{script}")
    common.can_compile.cache_clear()
    assert "needs a C compiler" in capsys.readouterr().out


# ---- fine-tuning -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backbone", ["vit_tiny", "r2plus1d_50"])
@pytest.mark.parametrize("mode", ["linear", "knn", "finetune", "test"])
def test_every_mode_of_finetune(mode, backbone, reference):
    if backbone == "vit_tiny":
        reference("mofo")
        init = "runs/reference-mofo/last.pt"
    else:
        init = "runs/convolutional/last.pt"
        if not Path(init).exists():
            run("fame", *TINY, *RESNET, "--steps", 1, "--workers", 0, "--out", "runs/convolutional")
    argv = ["--toy-train", 24, "--toy-test", 16, "--batch", 8, "--workers", 0, "--views", "1x2", "--log-every", 1]
    tuned, out = Path(f"runs/tuned-{backbone}"), f"runs/{mode}-{backbone}"
    if mode in ("finetune", "test") and not (tuned / "last.pt").exists():
        run("finetune", *argv, "--mode", "finetune", "--steps", 2, "--init", init, "--out", tuned)
    if mode == "finetune":
        out = tuned
    else:
        run("finetune", *argv, "--mode", mode, "--init", tuned / "last.pt" if mode == "test" else init, "--out", out)
    results = json.loads(Path(out, "results.json").read_text())
    assert 0 <= results["acc1_1x2"] <= results["acc5_1x2"] <= 100 and results["videos"] == 16 and not results["unreadable"]
    if mode == "test":                                                   # testing again gives what fine-tuning gave
        assert results["acc1_1x2"] == json.loads((tuned / "results.json").read_text())["acc1_1x2"]


def test_two_processes_test_like_one(reference):
    reference("mofo")
    argv = ["--toy-train", 24, "--toy-test", 15, "--mode", "knn", "--init", "runs/reference-mofo/last.pt", "--workers", 0]
    for processes in (1, 2):
        process = start("finetune", *argv, "--test-batch", 4, "--out", f"runs/knn{processes}", processes=processes)
        text = process.communicate()[0]
        assert process.returncode == 0, text
    one, two = (json.loads(Path(f"runs/knn{n}/results.json").read_text()) for n in (1, 2))
    assert one["per_class"] == two["per_class"] and one["videos"] == two["videos"] == 15


def test_a_test_video_that_cannot_be_read_counts_as_wrong_and_is_named(workplace, tmp_path, reference):
    reference("mofo")
    for split, count in (("train", 12), ("val", 6)):
        for i in range(count):
            folder = tmp_path / split / ("even", "odd")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            source = workplace / f"data/toy/64px/train/{i:06d}.mp4"
            (folder / f"{i}.mp4").write_bytes(source.read_bytes()[:600] if (split, i) == ("val", 3) else source.read_bytes())
    run("finetune", "--data", tmp_path, "--mode", "knn", "--neighbours", 1, "--init", "runs/reference-mofo/last.pt",
        "--workers", 0, "--views", "1x1", "--out", "runs/unreadable")
    results = json.loads(Path("runs/unreadable/results.json").read_text())
    assert results["acc1_1x1"] == pytest.approx(500 / 6) and results["per_class"] == {"even": 100.0, "odd": pytest.approx(200 / 3)}
    assert len(results["unreadable"]) == 1 and "3.mp4" in results["unreadable"][0]


@pytest.mark.parametrize("argv, message", [
    ([], "--init FILE: name a checkpoint"),
    (["--init", "x.pt", "--mode", "guess"], "--mode guess: choose finetune, linear, knn, retrieval, test, predict, extract or export"),
    (["--init", "x.pt", "--views", "3"], "--views 3: expected e.g. 2x3"),
    (["--init", "x.pt", "--label", "taste"], "--label taste: toy has motion, scene"),
    (["--init", "runs/reference-mofo/last.pt", "--mode", "test"], "missing .*head.weight"),
])
def test_a_mistake_with_finetune_gets_one_line(argv, message, reference):
    reference("mofo")
    with pytest.raises(UserError, match=message):
        run("finetune", "--toy-train", 24, "--toy-test", 16, *argv)


def test_linear_probe_solves_what_is_linear_and_knn_votes():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.randn(90, 8, generator=g) + 4 * torch.eye(8)[labels]
    logits = finetune.fit_linear(features, labels, 3, 1e-3)(features)
    assert (logits.argmax(1) == labels).float().mean() > 0.98
    scores = finetune.knn_scores(features, labels, features, 3, k=1)
    assert (scores.argmax(1) == labels).all()
    slow = torch.zeros(90, 3)
    unit = features / features.norm(dim=1, keepdim=True)
    for q in range(90):
        near = sorted(range(90), key=lambda i: -float(unit[q] @ unit[i]))[:5]
        for i in near:
            slow[q, labels[i]] += torch.exp(unit[q] @ unit[i] / 0.07)
    torch.testing.assert_close(finetune.knn_scores(features, labels, features, 3, k=5), slow, rtol=1e-3, atol=1e-3)


def test_accuracy_counts_unread_as_wrong_and_skips_absent_classes():
    scores = torch.eye(6)[[0, 1, 2, 0, 1]]
    result = finetune.accuracy(scores, torch.tensor([True, True, False, True, True]), torch.tensor([0, 1, 2, 1, 1]), list("abcdef"))
    assert result["acc1"] == pytest.approx(60) and result["per_class"] == pytest.approx({"a": 100, "b": 200 / 3, "c": 0})
    assert result["mean_class"] == pytest.approx((100 + 200 / 3) / 3)


# ---- the README ------------------------------------------------------------------------------------------------------

def readme_commands():
    text = (REPO / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.S)).replace("\\\n", " ")
    return re.findall(r"(?:python|torchrun [^#\n]*?)\s+((?:%s)\.py[^#\n&|]*)" % "|".join([*SCRIPTS, "finetune"]), blocks)


def test_every_command_of_the_readme_parses():
    commands = readme_commands()
    assert len(commands) >= 5
    for command in commands:
        script, *argv = shlex.split(command)
        module = importlib.import_module(script.removesuffix(".py"))
        parse_config(module.Config, module.RECIPES, [a for a in argv if a != "--help"])
