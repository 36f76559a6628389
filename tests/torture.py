"""Breaks runs on purpose in every way that we know, and counts what survives.

    python tests/torture.py --quick             # four minutes on 2 cores
    python tests/torture.py                     # half an hour: more tries of each, on all six scripts
    python tests/torture.py --only SIGTERM      # the rows whose name matches that

Every function that `faults` lists is one fault: its docstring is its name, and for each try it yields what went wrong,
"" if it survived.  The table `fault | times tried | survived` is printed at the end, what went wrong before; the exit
status is 1 if anything did.  Faults that come from inside of a run are functions in INSIDE, which change something in a
process of their own and then start the script there.  Linux only; as root it mounts a small tmpfs for full disks.
"""
import argparse
import importlib.util
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import torch

from conftest import REPO, losses, miniature, put, tiny_video            # it also makes `common` known

import common

SCRIPTS = ("mofo", "mme", "fame", "mcl", "modist", "finetune")
SMALL = "--toy-train 24 --toy-test 16 --image-size 32 --batch 8 --workers 0 --save-every 1 --log-every 1".split()
OWN = dict(mofo=["--frames", "8"], mme=["--frames", "8", "--length", "3"], fame=["--queue", "32"],
           mcl=["--queue", "32"], modist=["--queue", "32"], finetune=["--init", "init/last.pt"])
CONV = ["--backbone", "slow_r50", "--width", "0.0625", "--cross-weight", "0"]       # batch norm and little else
VIT = "--image-size 32 --frames 8 --model vit_tiny --flow tvl1 --mask-ratio 0.5 --batch 8 --log-every 1".split()
PLACE = Path(os.environ.get("TORTURE") or tempfile.mkdtemp(prefix="torture-"))      # where everything happens

LOCKS = defaultdict(threading.Lock)                                                  # of the runs that are shared


# ---- starting, watching, judging -------------------------------------------------------------------------------------

def start(script, *flags, out="", inside="", processes=1, restarts=0, permissions=False, **variables):
    """A script with short settings in a session of its own, `inside` a fault or as several processes of torchrun;
    with `permissions` those of files hold, even for root."""
    launch = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
        f"--max-restarts={restarts}"]
    program = [Path(__file__).resolve(), "--inside", inside, script] if inside else [REPO / f"{script}.py"]
    if permissions and os.geteuid() == 0:
        launch = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *launch]
    flags = [*SMALL, *OWN[script], *flags, *(("--out", out) if out else ())]
    env = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TORTURE=str(PLACE)) | variables
    return subprocess.Popen([*map(str, launch + program), *map(os.fsencode, map(str, flags))], cwd=PLACE, env=env,
                            text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True)


def end(process, seconds=180):
    """Wait -> (exit status, what it said)."""
    try:
        text = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        kill(process)
        return None, process.communicate()[0] + f"\nstill running after {seconds} s"
    return process.returncode, text


def kill(process):
    """-9 to the process and to all that it started."""
    for pid in [process.pid, *descendants(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def descendants(pid):
    """Ids of the processes that a process started, and so on."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
        except OSError:
            pass
    below, todo = [], [pid]
    while todo:
        todo += (children := parents.get(todo.pop(), []))
        below += children
    return below


def until(process, pattern):
    """Read the output of a process up to a line that matches -> what it said so far."""
    text = ""
    for line in process.stdout:
        text += line
        if re.search(pattern, line):
            break
    return text


def went_well(code, text, *words):
    """"" if it ended with status 0, without a traceback, and said all words; else what is wrong."""
    gone = [word for word in words if word not in text]
    return "" if code == 0 and "Traceback" not in text and not gone else f"{code}, {gone} not said: {text[-1500:]}"


def one_line(code, text, *words):
    """"" if it ended with a status above 0 and one line for the user that holds all words."""
    last = text.strip().split("\n")[-1]
    fine = code and code > 0 and last.startswith("error: ") and "Traceback" not in text
    return "" if fine and all(str(word) in last for word in words) else f"{code}, expected {words}: {text[-1500:]}"


def unreadable(out):
    """"" if each checkpoint of a run loads, and there is at most the unfinished rest of one."""
    for path in (PLACE / out).glob("*.pt"):
        try:
            torch.load(path, weights_only=True)
        except Exception as error:
            return f"{path}: {error}"
    return ""


def same_losses(out, whole):
    a, b = losses(PLACE / out), losses(PLACE / whole)
    return "" if a == b else f"losses of {out} {a} are not those of {whole} {b}"


def whole_run(script, *flags, processes=1):
    """An uninterrupted run of 8 steps -> its directory.  Those who want the same one share it."""
    out = "-".join(["whole", script, *map(str, flags), str(processes)]).replace("/", "-")
    with LOCKS[out]:
        if not (PLACE / out).exists():
            problem = went_well(*end(start(script, "--steps", 8, *flags, out=out, processes=processes)))
            if problem:
                raise RuntimeError(f"{script} itself: {problem}")
    return out


@contextmanager
def small_disk(name, megabytes):
    """A full file system of its own below PLACE; None where none can be mounted."""
    folder = PLACE / name
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder])


def fill(folder, leave):
    """Fill a small disk so that `leave` kB are free."""
    free = shutil.disk_usage(folder).free - 1024 * leave
    (folder / "filling").write_bytes(b"x" * max(0, free))


# ---- what happens inside of a run ------------------------------------------------------------------------------------

def die():
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_checkpoint(module):
    """The second checkpoint is cut in half, then the process is killed."""
    save, calls = torch.save, itertools.count()

    def broken(content, path):
        save(content, path)
        if next(calls) == 1:
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    torch.save = broken


def between_names(module):
    """Killed when last.pt has become previous.pt and nothing has taken its name."""
    replace = os.replace

    def broken(old, new):
        replace(old, new)
        if Path(new).name == "previous.pt":
            die()
    os.replace = broken


def clock_goes_back(module):
    """Every look at the clock is an hour before the last."""
    began, looks = time.time(), itertools.count()
    time.time = lambda: began - 3600 * next(looks)


def bad_loss(module, value, passes):
    """The loss of these forward passes is `value`, and so are its gradients."""
    wrap, calls = module.wrap_model, itertools.count()

    def wrapped(*args):
        net = wrap(*args)

        def forward(*batch):
            loss, stats = net(*batch)
            return loss * value if next(calls) in passes else loss, stats
        return forward
    module.wrap_model = wrapped


def dies_once(module):
    """The second of two processes is killed at its third step, until torchrun has started it again."""
    step = common.Log.step

    def broken(log, number, *args, **kwargs):
        if number == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            die()
        step(log, number, *args, **kwargs)
    common.Log.step = broken


def small_files(module):
    """No file can grow beyond 100 kB: a full disk where none can be mounted."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


INSIDE = dict(half=half_a_checkpoint, names=between_names, clock=clock_goes_back, restart=dies_once,
              full=small_files,
              nan=lambda module: bad_loss(module, math.nan, {1}), inf=lambda module: bad_loss(module, math.inf, {1}),
              always=lambda module: bad_loss(module, math.nan, range(2, 1000)))


# ---- kills and signals -----------------------------------------------------------------------------------------------

def killed(script, processes, times, *flags):
    """kill -9 at a random moment"""
    whole, out = whole_run(script, *flags, processes=processes), f"killed-{script}-{processes}"
    flags, problems, at = [*flags, "--steps", 8], [], 0
    for i in range(times):
        process = start(script, *flags, out=out, processes=processes)
        at = min(7, at + random.randint(0, 2))
        until(process, rf"^step {at}/" if at else "steps of")
        time.sleep(random.choice([0, random.random() / 10, random.random()]))
        kill(process)
        problems.append(unreadable(out))
        if (PLACE / out / "last.pt").exists():
            at = max(at, torch.load(PLACE / out / "last.pt", weights_only=True)["step"] + 1)
    ended = went_well(*end(start(script, *flags, out=out, processes=processes))) or same_losses(out, whole)
    yield from (problem or ended for problem in problems)


def killed_while_saving(script, inside):
    """kill -9 while a checkpoint is written"""
    whole, out = whole_run(script), f"saving-{script}-{inside}"
    code, text = end(start(script, "--steps", 8, out=out, inside=inside))
    again = end(start(script, "--steps", 8, out=out))
    yield (f"not killed: {text}" if code != -9 else unreadable(out) or went_well(*again) or same_losses(out, whole))


def restarted(script):
    """a process killed under torchrun --max-restarts"""
    whole, out = whole_run(script, processes=2), f"restart-{script}"
    code, text = end(start(script, "--steps", 8, "--fresh", out=out, inside="restart", processes=2, restarts=3))
    fine = code == 0 and "continuing at step" in text             # of the killed process torchrun prints a traceback
    yield same_losses(out, whole) if fine else f"{code}: {text[-1500:]}"


def terminated(script, processes):
    """SIGTERM, to torchrun or to a process group with workers, then on"""
    flags, out = ["--steps", 300, "--save-every", 1000, "--workers", 1], f"term-{script}-{processes}"
    process = start(script, *flags, out=out, processes=processes)
    text = until(process, "^step 3/")
    if processes > 1:
        process.terminate()
    else:
        os.killpg(process.pid, signal.SIGTERM)
    code, rest = end(process, 60)
    text = (text + rest).split("Traceback (most recent call last):\n  File \"<frozen runpy>")[0]     # torchrun's own
    step = torch.load(PLACE / out / "last.pt", weights_only=True)["step"] if (PLACE / out / "last.pt").exists() else 0
    yield (went_well(0 if processes > 1 else code, text, "stopped and saved") or
           ("" if step == len(losses(PLACE / out)) >= 3 else f"saved at step {step}") or unreadable(out))


def terminated_in_test(number):
    """SIGTERM or Ctrl-C while finetune.py tests"""
    flags = ["--steps", 1, "--views", "500x3", "--test-batch", 1]
    process = start("finetune", *flags, out=f"term-test-{number}")
    text = until(process, r"trained:")
    time.sleep(1)
    began = time.time()
    process.send_signal(number)
    code, rest = end(process, 60)
    yield (one_line(code, text + rest) if code != -number else "") or (
        "" if time.time() - began < 5 else f"{time.time() - began:.0f} s")


def worker_killed(script):
    """a loader worker killed by the system"""
    flags, out = ["--steps", 40, "--workers", 2, "--save-every", 1000, "--device-batch", 4], f"worker-{script}"
    whole, process = whole_run(script, *flags), start(script, *flags, out=out)
    text = until(process, "^step 3/")
    os.kill(descendants(process.pid)[-1], signal.SIGKILL)
    code, rest = end(process, 60)
    again = end(start(script, *flags, out=out))
    yield (one_line(code, text + rest, "worker") or went_well(*again, "continuing at step") or
           same_losses(out, whole))


def toy_writer_killed():
    """kill -9 while the toy videos are written"""
    flags = ["--toy-train", 4000, "--root", "killed-toy", "--steps", 1]
    process = start("mofo", *flags, out="toy-killed")
    while len(list((PLACE / "killed-toy").glob("*/train/*.mp4"))) < 10 and process.poll() is None:
        time.sleep(0.1)
    below = descendants(process.pid)
    process.kill()
    process.wait()
    for _ in range(15):                                         # they look every 5 seconds
        left = [pid for pid in below if Path(f"/proc/{pid}").exists()]
        time.sleep(bool(left))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    count = len(list((PLACE / "killed-toy").glob("*/train/*.mp4")))
    again = end(start("mofo", "--root", "killed-toy", "--toy-train", count + 1, "--steps", 3, out="toy-killed"))
    yield f"left running: {left}" if left or not below else went_well(*again)


def two_runs():
    """two runs with one --out"""
    whole = whole_run("mofo", "--steps", 30)
    first = start("mofo", "--steps", 30, out="two")
    text = until(first, "^step 1/")
    os.kill(first.pid, signal.SIGSTOP)                      # else it may be at its end before the second begins
    second = end(start("mofo", "--steps", 30, out="two"))
    os.kill(first.pid, signal.SIGCONT)
    code, rest = end(first)
    yield one_line(*second, "--out", "two") or went_well(code, text + rest) or same_losses("two", whole)


# ---- files that are broken -------------------------------------------------------------------------------------------

def sound(path):
    """An mp4 file with silence and no picture."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", 44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
        frame.sample_rate = 44100
        for packet in [*stream.encode(frame), *stream.encode()]:
            file.mux(packet)


def some_broken(folder):
    """Videos of which a tenth is broken, each in a way of its own -> the names of those."""
    folder.mkdir(parents=True)
    content, text = tiny_video(folder / "good-0.mp4", 40).read_bytes(), b"this is not a video\n" * 50
    head, body = content.index(b"moov"), content.index(b"mdat")
    damaged = {b"empty.mp4": b"", b"header.mp4": content[:head + 40], b"body.mp4": content[:body + 300],
               b"no-frames.mp4": content[:body - 4], b"text.mp4": text, b"text.webm": text, b"zeros.avi": bytes(5000),
               b"closed.mp4": content, b"sound.mp4": b"", b"not-utf-8-\xff\xfe.mp4": text}
    for name, data in damaged.items():
        Path(folder, os.fsdecode(name)).write_bytes(data)
    sound(folder / "sound.mp4")
    (folder / "closed.mp4").chmod(0)
    (folder / "folder.mp4").mkdir()                             # is none of the files listed
    os.mkfifo(folder / "fifo.mp4")
    (folder / "link.mp4").symlink_to("nowhere.mp4")
    bad = [*map(os.fsdecode, damaged), "fifo.mp4", "link.mp4"]
    (folder / "extension.avi").write_bytes(content)             # from here on all can be read
    tiny_video(folder / "pixel.mkv", 40, side=1, codec="ffv1", options={})
    parts = [tiny_video(folder / f"{side}.h264", 20, side=side).read_bytes() for side in (32, 64)]
    (folder / "sizes.ts").write_bytes(b"".join(parts))          # the picture changes its size
    for side in (32, 64):
        (folder / f"{side}.h264").unlink()
    for i in range(9 * len(bad) - 3):
        (folder / f"good-{i}.mp4").write_bytes(content)
    return bad


def names_in(out, *files):
    """The names of videos in lists that a run leaves."""
    paths = [PLACE / out / name for name in files if (PLACE / out / name).exists()]
    return [line.split(": ")[0] for path in paths for line in path.read_text("utf-8", "surrogateescape").splitlines()]


def broken_training(script):
    """training videos, 10 % of them broken in every way: each named once"""
    flags = [*(["--mask-ratio", 0.5] if script in ("mofo", "mme") else ()), "--data", "videos", "--min-lr", 0,
             *(["--flow", "tvl1"] if script not in ("fame", "finetune") else ())]
    flags += ["--model", "vit_tiny"] if script in ("mofo", "mme") else []
    flags += ["--backbone", "vit_tiny"] if script in ("fame", "mcl", "modist") else []
    code, text = end(start(script, *flags, "--steps", 80, out=f"broken-{script}", permissions=True), 400)
    named = [Path(name) for name in names_in(f"broken-{script}", "bad_videos.txt", "missing_videos.txt")]
    named = [str(name) for name in named if "val" not in name.parts]
    for name in [f"videos/train/{c}/{name}" for c in "ab" for name in BAD]:
        count = named.count(name)
        yield went_well(code, text) or ("" if count == 1 and len(named) == 2 * len(BAD)
                                        else f"{name!a}, one of {len(named)}, is named {count} times: {text[-500:]}")


def broken_testing(mode, *flags):
    """test videos, 10 % of them broken in every way: each counts as wrong, each is named"""
    out = "broken-test-" + "-".join(map(str, [mode, *flags]))
    code, text = end(start("finetune", "--data", "videos", "--mode", mode, "--views", "1x1", "--steps", 1, *flags,
                           out=out, permissions=True), 300)
    result = json.loads((PLACE / out / "results.json").read_text()) if (PLACE / out / "results.json").exists() else {}
    scores, total, broken = PLACE / out / "scores.npz", 20 * len(BAD), 2 * len(BAD)
    read = np.load(scores)["read"] if scores.exists() else [False] * broken + [True] * (total - broken)     # retrieval
    named = [line.split(": ")[0] for line in result.get("unreadable", ())]
    for name in [f"videos/val/{c}/{name}" for c in "ab" for name in BAD]:
        fine = result.get("videos") == len(read) == total and sum(np.invert(read)) == broken
        yield went_well(code, text) or ("" if fine and named.count(name) == 1 else
                                        f"{name!a} is named {named.count(name)} times: {text[-500:]}")


def segments_beyond_the_end():
    """EPIC segments that begin after the film's end"""
    miniature("epic", PLACE / "epic")
    head = "video_id,start_timestamp,stop_timestamp,verb_class,noun_class\n"
    names = "EPIC_100_train.csv", "EPIC_100_validation.csv"
    rows = [f"P0{i}_01,00:00:0{at},00:00:0{at + 1},0,0\n" for i, at in ((0, 1), (1, 1), (2, 7), (5, 1), (6, 7))]
    put(PLACE / "epic", dict(zip(names, (head + "".join(rows[:3]), head + "".join(rows[3:])))))
    flags = ["--data", "epic", "--root", "epic", "--mode", "knn", "--label", "verb"]
    code, text = end(start("finetune", *flags, out="beyond"))
    yield went_well(code, text, "on 2 videos", "P02_01", "P06_01")


def odd_names(few):
    """file names with every odd character"""
    folder = PLACE / "odd names"
    folder.mkdir()
    names = [b"a b", b"'", b'"', b"a\nb", b"a\tb", b"a:b", b"%s%d", b"#", b"{}", b"*?", b"-x", b"a\\b", b"$(x);&|<>",
             b"a,b", "\u00fc\u4f60\U0001f600\u202e".encode(), b"\xff\xfe", b"\x01\x1b[31m", b".hidden", b"~", b" ",
             b"http:b", b"x" * 250]
    names = [name + b".mp4" for name in names] + [b"a.MP4"]
    content = tiny_video(PLACE / "odd.mp4", 40).read_bytes()
    for name in names:
        (folder / os.fsdecode(name)).write_bytes(content)
    strict, plain = dict(PYTHONIOENCODING="utf-8:strict"), dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    for variables in [strict] if few else [strict, plain, {}]:
        out = f"odd-{len(variables)}"
        trained = end(start("mofo", *VIT, "--data", "odd names", "--steps", 3, out=out, **variables))
        again = end(start("mofo", *VIT, "--data", "odd names", "--steps", 3, out=out, **variables))
        taken = end(start("finetune", "--data", "odd names", "--mode", "extract", out=f"{out}-features", **variables))
        problem = went_well(*trained) or went_well(*again) or went_well(*taken, f"{len(names)} of {len(names)} videos")
        yield from [problem] * len(names)
    for name in names:                                          # and broken ones, which are written to a list
        (folder / os.fsdecode(name)).write_bytes(b"broken" * 100)
    for i in range(9 * len(names)):
        (folder / f"good-{i}.mp4").write_bytes(content)
    trained = end(start("mofo", *VIT, "--data", "odd names", "--steps", 60, out="odd-broken", **strict))
    path = PLACE / "odd-broken/bad_videos.txt"
    listed = path.read_bytes() if path.exists() else b""
    for name in names:
        yield went_well(*trained) or ("" if name.split(b"\n")[0] in listed else f"{name} is not listed")


def outside_root():
    """annotations that point outside --root"""
    outside = tiny_video(PLACE / "outside.mp4", 40)
    for name in ("v_secret.avi", "secret.webm", "P01_01.MP4", "secretsecr_000001_000002.mp4"):
        shutil.copy(outside, PLACE / name)
    root, there = PLACE / "inside/data", "../../"
    for data, text, videos in (
            ("ucf101", {"classInd.txt": "1 A\n", "trainlist01.txt": f"{there}A/v_secret.avi 1\nA/v_a.avi 1\n"},
             ["v_a.avi"]),
            ("hmdb51", {"a_test_split1.txt": f"{there}v_secret.avi 1\na.avi 1\n"}, ["a.avi"]),
            ("k400", {"train.csv": f"{there}secretsecr_000001_000002.mp4 0\naaaaaaaaaaa_000001_000002.mp4 0\n"},
             ["aaaaaaaaaaa_000001_000002.mp4"]),
            ("ssv2", {"labels.json": '{"A": "0"}', "train.json": json.dumps(
                [dict(id=i, template="A") for i in (there + "secret", "1", str(PLACE / "secret"))])}, ["1.webm"]),
            ("epic", {"EPIC_100_train.csv": "video_id,start_timestamp,stop_timestamp,verb_class,noun_class\n" + "".join(
                f"{i},00:00:00,00:00:01,0,0\n" for i in (there + "P01_01", "P02_01"))}, ["P02_01.MP4"]),
            ("toy", {"64px/train.csv": "path,label,scene\n../../../../outside.mp4,0,0\ntrain/a.mp4,0,0"},
             ["64px/train/a.mp4"])):
        put(root / data, text, videos)
        items = common.find_videos(data, root / data, "train", toy=(2, 2, 64)).items
        reached = [item.path for item in items if root.resolve() not in Path(item.path).resolve().parents]
        yield f"{data} reads {reached}" if reached or not items else ""


# ---- disks and directories -------------------------------------------------------------------------------------------

def full_disk(script, kilobytes, *flags):
    """a full disk, one line; with space again the same command goes on"""
    name = f"disk-{script}-{kilobytes}-{len(flags)}" + "-".join(flags[1::2]).replace("/", "-")
    with small_disk(name, 300) as folder:
        if folder is None:
            yield one_line(*end(start(script, "--steps", 3, *flags, out=name, inside="full")))
            return
        fill(folder, kilobytes)
        problem = one_line(*end(start(script, "--steps", 3, *flags, out=f"{name}/run"))) or unreadable(f"{name}/run")
        (folder / "filling").unlink()
        yield problem or went_well(*end(start(script, "--steps", 3, *flags, out=f"{name}/run")))


def full_toy_disk():
    """a full disk, one line; with space again the same command goes on"""
    with small_disk("disk-toy", 20) as folder:
        if folder:
            fill(folder, 300)
            flags = ["--root", "disk-toy", "--toy-train", 64, "--steps", 2]
            problem = one_line(*end(start("mofo", *flags, out="disk-toy-run")))
            (folder / "filling").unlink()
            yield problem or went_well(*end(start("mofo", *flags, out="disk-toy-run")))


def unusable_output(script, kind):
    """an --out or --root that cannot be used: read-only, a file, below a file, last.pt a directory"""
    out = f"unusable-{script}-{kind}"
    if kind == "read-only":
        (PLACE / out).mkdir(mode=0o555)
    elif kind in ("file", "toy"):
        (PLACE / out).write_text("")
    elif kind == "below":
        (PLACE / out).write_text("")
        out += "/run"
    elif kind == "directory":
        (PLACE / out / "last.pt").mkdir(parents=True)
    flags = ["--root", out] if kind == "toy" else ["--out", out]
    yield one_line(*end(start(script, "--steps", 2, *flags, permissions=True)), Path(out).parts[0])


# ---- clocks, numbers, checkpoints ------------------------------------------------------------------------------------

def clock(script):
    """a clock that goes backwards"""
    code, text = end(start(script, "--steps", 8, out=f"clock-{script}", inside="clock"))
    yield went_well(code, text) or same_losses(f"clock-{script}", whole_run(script))


def bad_loss_once(script, value):
    """a loss that is not finite, once: the step is skipped"""
    out = f"loss-{script}-{value}"
    code, text = end(start(script, "--steps", 5, out=out, inside=value))
    yield went_well(code, text, "step skipped") or not_finite(out)


def bad_losses(script):
    """a loss that is not finite, again and again: the run stops, the checkpoint is from before"""
    out = f"losses-{script}"
    yield one_line(*end(start(script, "--steps", 9, out=out, inside="always")), "finite") or not_finite(out)


def not_finite(out):
    """"" if all numbers of the last checkpoint are finite."""
    state = torch.load(PLACE / out / "last.pt", weights_only=True)["model"]
    return "".join(name for name, x in state.items() if not x.isfinite().all())


def change(out, how, name="last.pt"):
    """Change the content of a checkpoint."""
    content = torch.load(PLACE / out / name, weights_only=True)
    torch.save(how(content) or content, PLACE / out / name)


def poison(content):
    key = next(k for k, x in content["model"].items() if x.ndim > 1 and "mask_token" not in k)
    content["model"][key] += math.nan


def poison_statistics(content):
    key = next((k for k in content["model"] if k.endswith("running_var")), "")
    if key:
        content["model"][key] += math.nan


def bad_weights(script):
    """weights that are not finite, as --init or in last.pt: one line, or on from the checkpoint before"""
    flags, out = CONV if script == "modist" else [], f"weights-{script}"
    whole = whole_run(script, *flags)
    shutil.copytree(PLACE / whole, PLACE / out)
    change(out, poison_statistics if flags else poison)
    shutil.copy(PLACE / out / "last.pt", PLACE / f"{out}.pt")
    change(out, poison)
    if script != "finetune":
        yield one_line(*end(start(script, *flags, "--init", f"{out}.pt", out=f"{out}-init")), "finite")
    yield (went_well(*end(start(script, "--steps", 8, *flags, out=out)), "previous.pt") or not_finite(out) or
           same_losses(out, whole))
    for mode in ("export", "extract", "knn", "finetune") if script == "mofo" else ():
        yield one_line(*end(start("finetune", "--mode", mode, "--init", f"{out}.pt", out=f"{out}-{mode}")), "finite")


def damaged_checkpoint(script, few):
    """last.pt cut in half, empty, text, a list, without a key: on from previous.pt, which is said"""
    whole, out = whole_run(script), f"damaged-{script}"
    content, last = (PLACE / whole / "last.pt").read_bytes(), PLACE / out / "last.pt"
    damages = (lambda: last.write_bytes(content[:len(content) // 2]), lambda: last.write_bytes(b""),
               lambda: last.write_text("text"), lambda: torch.save([1], last), lambda: torch.save(torch.ones(1), last),
               lambda: change(last.parent, lambda c: c.pop("optimizer") and None))
    for damage in damages[::2 if few else 1] if script == "mofo" else damages[:1]:
        shutil.rmtree(PLACE / out, ignore_errors=True)
        shutil.copytree(PLACE / whole, PLACE / out)
        damage()
        yield went_well(*end(start(script, "--steps", 8, out=out)), "previous.pt") or same_losses(out, whole)


def foreign_checkpoint(script):
    """last.pt of another script or configuration: one line, and it stays"""
    out, other = whole_run(script), next(name for name in SCRIPTS if name != script)
    before = (PLACE / out / "last.pt").read_bytes()
    yield one_line(*end(start(script, "--steps", 8, "--lr", 0.123, out=out)), "lr")
    yield one_line(*end(start(other, "--steps", 8, out=out)), out)
    yield "" if before == (PLACE / out / "last.pt").read_bytes() else "last.pt has changed"


def other_world(script):
    """another number of processes on resume: allowed, and said"""
    out = f"world-{script}"
    shutil.copytree(PLACE / whole_run(script), PLACE / out)
    for processes, steps in ((2, 9), (1, 10)):
        change(out, lambda c: c["config"].update(steps=steps))
        yield went_well(*end(start(script, "--steps", steps, out=out, processes=processes)), "processes there")
    yield "" if set(losses(PLACE / out)) == set(range(10)) else "steps are missing"


def unsafe_pickle(few):
    """a pickle that would run code, as every kind of file"""
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {PLACE}/exploded",)
    for name, wrap in (("plain.pt", lambda x: x), ("model.pt", lambda x: dict(model=x)),
                       ("more.pt", lambda x: dict(model=dict(a=torch.ones(2)), other=x))):
        for old in [name == "model.pt"] if few else [False, True]:
            torch.save(wrap(Bomb()), PLACE / name, _use_new_zipfile_serialization=not old)
            for flag in ("--init", "--raft-weights")[:1 if few and not old else 2]:
                more = ["--flow", "raft_small"] if flag == "--raft-weights" else []
                code, text = end(start("mofo", flag, name, *more, "--steps", 1, out=f"bomb-{name}-{old}-{flag}"))
                advice = "weights_only=False" in text
                yield one_line(code, text, name) or ("it ran" if (PLACE / "exploded").exists() else "") or (
                    text if advice else "")


HOSTILE = ("-1", "-0.5", "nan", "inf", "0", "-inf", "1e30", "1e400", "9" * 30, "x", "", "0x10", "\u00b2")


def hostile_values(script, every):
    """hostile values of every numeric flag: one line with flag, value and range, or a run without nan"""
    module = importlib.import_module(script)
    types = common.typing.get_type_hints(module.Config)
    left = []
    for name, kind in types.items():
        if not {int, float} & {kind, *common.typing.get_args(kind)}:
            continue
        flag = "--" + name.replace("_", "-")
        for value in HOSTILE if every else HOSTILE[::2]:
            try:
                common.parse_config(module.Config, module.RECIPES, [f"{flag}={value}"])
                left.append((flag, value))
            except common.UserError as error:
                fine = "\n" not in str(error) and flag in str(error) and value in str(error)
                fine &= "must be in" in str(error) or value not in ("-1", "0", "9" * 30)   # others may be no number
                yield "" if fine else str(error)
            except Exception as error:
                yield f"{flag} {value}: {error!r}"
    for flag, value in left if every else random.sample(left, 1):
        flags = [f"{flag}={value}", *([] if flag == "--steps" else ["--steps", 2])]
        out = f"hostile-{script}{flag}-{value}"
        code, text = end(start(script, *flags, out=out), 120)
        logged = (PLACE / out / "log.jsonl").read_text() if (PLACE / out / "log.jsonl").exists() else ""
        bad = "a traceback" if "Traceback" in text else "nan in the log" if "NaN" in logged and code == 0 else ""
        yield f"{script} {flag} {value}: {bad}: {text[-700:]}" if bad or code is None else ""
        shutil.rmtree(PLACE / out, ignore_errors=True)


def memory(steps):
    """memory and open files flat over the steps of a run and 8 times as many loader items"""
    process = start("mofo", "--workers", 2, "--steps", steps, "--save-every", steps // 20,
                    "--preview-every", steps // 10, out="memory")
    text, seen = "", []
    for number in (steps // 4, steps - 10):
        text += until(process, f"^step {number}/")
        all_three = [process.pid, *descendants(process.pid)]
        status = [Path(f"/proc/{pid}/status").read_text() for pid in all_three]
        seen.append((sum(int(re.search(r"RssAnon:\s+(\d+)", s)[1]) for s in status) / 1000,
                     sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in all_three)))
    code, rest = end(process)
    (before, files), (after, files_after) = seen
    print(f"after {steps // 4} and {steps - 10} steps {before:.0f} and {after:.0f} MB, {files} and {files_after} files")
    flat = after < 1.03 * before + 20 and files_after <= files + 2          # one may just be open
    yield went_well(code, text + rest) or ("" if flat else f"MB, open files: {seen}")


# ---- the table -------------------------------------------------------------------------------------------------------

def faults(few):
    """[(function, arguments)]; few: those of --quick."""
    one, two = (["mofo"], ["mofo", "modist"]) if few else (SCRIPTS, SCRIPTS)
    modes = [["knn"], ["linear"], ["retrieval"], ["finetune"], ["linear", "--recipe", "mme"]]
    tuned = [("--mode", mode, "--init", "tuned/last.pt") for mode in ("predict", "test", "export")]
    tuned = tuned if importlib.util.find_spec("safetensors") else tuned[:-1]
    kinds = ("read-only", "file", "below", "directory", "toy")
    return [
        *((killed, script, 1, 2 if few else 4) for script in SCRIPTS),
        *((killed, script, 2, 2, *(CONV if script == "modist" else ())) for script in two),
        *((killed_while_saving, script, how) for script in SCRIPTS for how in (["half"] if few else ["half", "names"])),
        *((restarted, script) for script in one),
        *((terminated, script, processes) for script in one for processes in (1, 2)),
        *((terminated_in_test, number) for number in (signal.SIGTERM, signal.SIGINT)),
        *((worker_killed, script) for script in one),
        (toy_writer_killed,), (two_runs,),
        *((broken_training, script) for script in one),
        *((broken_testing, *mode) for mode in modes[:1 if few else None]),
        (segments_beyond_the_end,), (odd_names, few), (outside_root,),
        *((full_disk, script, leave) for script in one for leave in ((10_000,) if few else (0, 4, 1000, 10_000))),
        *((full_disk, "finetune", 2, "--mode", mode) for mode in ("extract", "knn", "linear")[:1 if few else None]),
        *((full_disk, "finetune", 2, *flags) for flags in tuned[:1 if few else None]),
        (full_toy_disk,),
        *((unusable_output, script, kind) for script in one for kind in kinds),
        *((clock, script) for script in one),
        *((bad_loss_once, script, value) for script in one for value in (["nan"] if few else ["nan", "inf"])),
        *((bad_losses, script) for script in one), *((bad_weights, script) for script in one),
        *((damaged_checkpoint, script, few) for script in one), *((foreign_checkpoint, script) for script in one),
        *((other_world, script) for script in one),
        (unsafe_pickle, few), *((hostile_values, script, not few) for script in SCRIPTS),
        (memory, 200 if few else 2000)]


def prepare():
    """What many faults need: toy data, a checkpoint to begin from, videos of which a tenth is broken."""
    global BAD
    for script, out in (("mofo", "init"), ("finetune", "tuned")):
        problem = went_well(*end(start(script, "--steps", 1, out=out)))
        if problem:
            sys.exit(problem)
    for part in ("train/a", "train/b", "val/a", "val/b"):
        BAD = some_broken(PLACE / "videos" / part)


def attempt(job):
    """Run a fault -> its name, what went wrong in each try."""
    function, *args = job
    began, tries = time.time(), []
    try:
        for problem in function(*args):
            tries.append(problem)
    except (Exception, SystemExit) as error:
        tries.append(f"{type(error).__name__}: {error}")
    label = " ".join([function.__name__, *map(str, args)])
    for problem in sorted({problem for problem in tries if problem}):
        print(f"\n--- {label}: {problem}\n", flush=True)
    print(f"{label}: {tries.count('')} of {len(tries)}, {time.time() - began:.0f} s", flush=True)
    return function.__doc__, tries


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="fewer tries of each fault")
    parser.add_argument("--only", default="", help="faults whose name or function matches this pattern")
    parser.add_argument("--inside", choices=INSIDE, help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.inside:
        script, *flags = flags
        module = importlib.import_module(script)
        INSIDE[args.inside](module)
        return common.run(module.main, module.Config, module.RECIPES, flags)
    began = time.time()
    try:
        prepare()
        jobs = [job for job in faults(args.quick) if re.search(args.only, f"{job[0].__name__} {job[0].__doc__}")]
        with ThreadPoolExecutor(2) as pool:
            done = list(pool.map(attempt, jobs))
    finally:
        shutil.rmtree(PLACE, ignore_errors=True)
    rows = {}
    for name, tries in done:
        rows.setdefault(name, []).extend(tries)
    print("\n| fault | times tried | survived |\n|---|---|---|")
    for name, tries in rows.items():
        print(f"| {name} | {len(tries)} | {tries.count('')} |")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"\n{(time.time() - began) / 60:.1f} minutes, {(used.ru_utime + used.ru_stime) / 60:.1f} of CPU time")
    sys.exit(any(problem for tries in rows.values() for problem in tries))


if __name__ == "__main__":
    main()
