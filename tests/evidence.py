"""What the methods learn: each against its own baseline, with the same network, data, steps and read-outs.

    python tests/evidence.py --size cpu --seeds 3           # toy data; goes on where evidence.csv ends
    python tests/evidence.py --size gpu --seeds 3           # as many steps, larger batches, more videos
    python tests/evidence.py --size cpu --data DIR --groups 'seq(\\d+)'    # real videos, one group left out at a time
    python tests/evidence.py --size cpu --table             # the table and the figure, from evidence.csv
    python tests/evidence.py --size toy --no-labels         # the toy recipes, on 1,024 videos: README's table

A cell is a row of ROWS and a seed: pre-training, then all read-outs.  Each figure of it becomes a line of
tests/evidence.csv, in percent unless said.  Read-outs, fixed before any result was seen, on `test`
(n is the number of its videos):

    motion, scene   linear probe (finetune.py's) on the mean feature of the middle clip
    shortcut        the same for motion, fitted on `train_biased`, where the scene gives the motion away
    retrieval       is the nearest video of `train` (cosine) one of the same motion?
    one frame       motion on the middle frame, eight times: more than 12.5 is what the sprite's place tells (up to 31)
    few labels      fine-tuning on 256 labelled videos, motion.  At this rate some runs collapse to one class, 12 to 17

Mechanism, by the truth of the toy data, where it has a meaning also of the network with random weights:

    same sprite     cosine x 100 of a clip's feature, less the mean over clips, to that of its sprite on the background
                    of another clip: 100 = the feature ignores the background
    same scene      the same with another clip's sprite on its own background: 100 = it ignores the sprite
    box             MOFO: share of the sprite's pixels that the motion box holds;  box area: its share of the frame
    align           MCL: area under the ROC curve (x 100) of where the network looks, for the sprite's pixels.  Nearness
                    to the centre gives 76, brightness 98;  align, still: the same where the sprite stands still
    find            MoDist: to a clip's motion feature the RGB of the same video's other moment is more similar than
                    that of so many of the other 255 videos (chance 50; knowing the class 94, the place 81)
    direction       MME: cosine x 100 of the predicted and the true relative displacement, hidden tokens at the edge
                    of the sprite (chance 0; TV-L1 flow, from which it learns, gives 81)
"""
import argparse
import csv
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
import common
import finetune
import mcl
import mme
import modist
import mofo
from common import FlowEstimator, find_videos, load_file, make_backbone, normalize, parse_config

RESULTS = Path(__file__).with_name("evidence.csv")
COLUMNS = "size,data,row,seed,figure,value,n,steps,seconds,device,commit".split(",")
ROWS = {                                             # name: script, its switches, what the row is (see pretrain)
    "random, as MOFO": ("mofo", "", "random"), "supervised, as MOFO": ("mofo", "", "supervised"),
    "VideoMAE": ("mofo", "--inside-ratio none", ""), "MOFO": ("mofo", "", ""),
    "random, as MME": ("mme", "", "random"), "MME, pixels": ("mme", "--target pixel", ""),
    "MME, HOG": ("mme", "--target hog", ""), "MME, position": ("mme", "--target position", ""), "MME": ("mme", "", ""),
    "random, as FAME and MCL": ("fame", "", "random"), "random, as MCL": ("mcl", "", "random"),
    "MoCo": ("fame", "--no-merge", ""), "FAME": ("fame", "", ""),
    "MCL, any clips": ("mcl", "--no-motion-clips", ""), "MCL, any crops": ("mcl", "--no-motion-crops", ""),
    "MCL, unaligned": ("mcl", "--align-weight 0", ""), "MCL": ("mcl", "", ""),
    "random, as MoDist": ("modist", "", "random"), "MoDist, RGB alone": ("modist", "--cross-weight 0", ""),
    "MoDist": ("modist", "", ""),
}
# size: times the epochs of the toy recipe, toy videos, times its batch: `gpu` has as many steps as `cpu`
SIZES = {"toy": (1, 1024, 1), "cpu": (4, 1024, 1), "gpu": (8, 4096, 8)}
FEW, FEW_EPOCHS, FEW_LR = 256, 16, 0.07        # of 0.0027 to 0.07 where random weights and VideoMAE learn most
SUPERVISED_LR = 0.024   # of 0.008, 0.024, 0.07 the best on 256 of the videos of `train`, learned on the others
# The figure: what a method is compared with, and of each read-out the level of guessing.
BASELINES = {"MOFO": ("random, as MOFO", "VideoMAE"), "MME": ("random, as MME", "MME, pixels"),
             "FAME": ("random, as FAME and MCL", "MoCo"), "MCL": ("random, as MCL", "MCL, unaligned"),
             "MoDist": ("random, as MoDist", "MoDist, RGB alone")}
BARS = {"motion": 12.5, "one frame": 12.5, "shortcut": 12.5, "few labels": 12.5, "same sprite": 0, "align": 50,
        "find": 50, "direction": 0}


def start(script, *flags):
    """Run a script in a process of its own; what it prints goes to evidence.log."""
    with open("evidence.log", "a") as log:
        subprocess.run([sys.executable, REPO / f"{script}.py", *map(str, flags)], check=True, stdout=log, stderr=log)


def pretrain(script, switches, kind, seed, a):
    """The checkpoint of a row; where it is random, of one step, whose weights the read-outs ignore."""
    recipe, (times, videos, larger) = dict(importlib.import_module(script).RECIPES["toy"]), SIZES[a.size]
    factors = dict(epochs=times, preview_every=times, batch=larger, queue=larger, lr=1 / larger, min_lr=1 / larger,
                   warmup_epochs=1024 * larger / videos)               # a step's rate stays that of the toy recipe
    recipe |= {name: recipe[name] * factor for name, factor in factors.items() if name in recipe}
    recipe["device_batch"] = recipe["batch"]
    if a.data != "toy":                                                # fewer videos, as many steps
        recipe["epochs"] *= max(1, videos // len(find_videos(a.data, "", "train").items))
        if a.raft_weights and "flow" in recipe:
            recipe |= dict(flow="raft_small", raft_weights=a.raft_weights)

    def directory(name):
        return Path("runs", re.sub(r"[^\w.]+", "-", f"{a.size} {name} {script} {switches} {kind} {seed}"))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in recipe.items()] + switches.split()
    flags += ["--compile" if a.size == "gpu" else "--no-compile"] + ["--steps", 1] * bool(kind)
    flags += ["--init", directory("toy") / "last.pt"] if a.init else []
    out = directory(a.name)
    start(script, *flags, "--data", a.data, "--out", out, "--seed", seed, "--toy-train", videos)
    return out / "last.pt"


def load_network(checkpoint, kind, seed):
    """The encoder of a run, with random weights of that seed if `kind`; evaluation settings."""
    cfg = parse_config(finetune.Config, finetune.RECIPES, ["--init", str(checkpoint), "--mode", "linear"])
    content = load_file(checkpoint)
    torch.manual_seed(1000 + seed)
    cfg.random_init, cfg.env = bool(kind), common.setup(seed)
    return finetune.build_network(cfg, content).to(cfg.env.device).eval(), cfg, content


def read_out(network, cfg, videos):
    """Probes and retrieval -> figures."""
    got, listed = {}, {}
    for split in ("train", "train_biased", "test"):
        motion, scene = (find_videos("toy", "", split, label, (videos, 256, 64)).items for label in ("motion", "scene"))
        features = finetune.extract(network, motion, cfg, cfg.env, "1x1", split)[0].mean(1)
        got[split], got[f"{split} scene"] = ((features, torch.tensor([item.label for item in items]))
                                             for items in (motion, scene))
        listed[split] = motion
    frozen = network.register_forward_pre_hook(lambda _, clips: clips[0][:, :, 4:5].expand_as(clips[0]))
    for split in ("train", "test"):
        features = finetune.extract(network, listed[split], cfg, cfg.env, "1x1", split)[0].mean(1)
        got[f"{split} frame"] = features, got[split][1]
    frozen.remove()

    def probe(train, test):
        scores = finetune.fit_linear(*got[train], 8, cfg.l2)(got[test][0])
        return 100 * (scores.argmax(1) == got[test][1]).float().mean().item()
    return {"motion": probe("train", "test"), "scene": probe("train scene", "test scene"),
            "shortcut": probe("train_biased", "test"), "one frame": probe("train frame", "test frame"),
            "retrieval": finetune.retrieval_recall(*got["train"], *got["test"])[1]}


def few_labels(checkpoint, kind, seed, out, videos):
    """Accuracy after fine-tuning on a few labels; of the supervised row after as many epochs on all of `train`."""
    extra = ["--random-init"] if kind else []
    extra += ["--toy-train", videos, "--lr", SUPERVISED_LR] if kind == "supervised" else [
        "--toy-train", FEW, "--lr", FEW_LR, "--root", "few"]
    start("finetune", "--mode", "finetune", "--init", checkpoint, "--out", out, "--seed", seed, "--epochs", FEW_EPOCHS,
          *extra)
    return json.loads(Path(out, "results.json").read_text())["acc1_1x1"]


# ---- mechanism, by the truth of the toy data --------------------------------------------------------------------

def toy_clips(indices, stride=2, frames=8, first=10, **changes):
    """Toy videos of `test` -> clips uint8 (B, 3, T, 64, 64), masks of the sprite (B, T, 64, 64), truths, frames."""
    shown = np.arange(frames) * stride + first
    videos, truths = zip(*[common.toy_video(0, "test", i, **changes) for i in indices])
    masks = np.stack([common._toy_depth(t, shown) > 0 for t in truths])
    clips = torch.from_numpy(np.stack([v[shown] for v in videos])).permute(0, 4, 1, 2, 3)
    return clips.contiguous(), torch.from_numpy(masks), truths, shown


def toy_flow(truth, first, second):
    """True flow (2, H, W) in px from frame `first` to frame `second`, and the sprite's mask (H, W) in `first`."""
    inside = common._toy_depth(truth, first) > 0
    (c1, c2), (s1, s2) = truth["centre"][[first, second]], truth["scale"][[first, second]]
    pan = truth["camera"][second] - truth["camera"][first]
    sprite = (c2 - c1)[:, None, None] + (common._toy_grid(truth["size"]) - c1[:, None, None]) * (s2 / s1 - 1)
    return np.where(inside, sprite, pan[:, None, None]), inside


def swaps(network, device, count=128):
    """The feature of a clip against that of its sprite elsewhere and that of another sprite in its place."""
    clips, masks, _, _ = toy_clips(range(2 * count))
    ground, *_ = toy_clips(range(2 * count), sprite=False)
    here, there = slice(0, count), slice(count, None)
    swapped = [clips[here], torch.where(masks[here, None], clips[here], ground[there]),
               torch.where(masks[there, None], clips[there], ground[here])]
    with torch.no_grad():
        f = [torch.cat([network(normalize(x.to(device), network.config)) for x in part.split(32)]).float()
             for part in swapped]
    f = [F.normalize(x - x.mean(0), dim=1) for x in f]
    cosines = [100 * (f[0] * other).sum(1).mean().item() for other in f[1:]]
    return dict(zip(("same sprite", "same scene"), cosines))


def auc(score, positive):
    """Area under the ROC curve, x 100, mean over clips: score, positive (B, n); ties count half."""
    areas = []
    for s, p in zip(score.double(), positive.bool()):
        above, same = ((x(s[p][:, None], s[~p][None])).double().mean().item() for x in (torch.gt, torch.eq))
        areas.append(above + same / 2)
    return 100 * float(np.nanmean(areas))


@torch.no_grad()
def box_of(device):
    clips, masks, *_ = toy_clips(range(256))
    *_, boxes, found = mofo.find_motion(FlowEstimator("tvl1", device=device), clips.to(device))
    y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    x1, y1, x2, y2 = boxes.cpu().T[..., None, None]
    inside = (x > x1) & (x < x2) & (y > y1) & (y < y2)                               # (B, 64, 64)
    cover = (masks & inside[:, None]).sum((1, 2, 3)) / masks.sum((1, 2, 3))
    return {"box": 100 * cover.mean().item(), "box area": 100 * inside.float().mean().item()}


def load_method(model, content, kind, device):
    """The method as it was trained or, if `kind`, as it is."""
    if not kind:
        model.load_state_dict(content["model"])
    return model.to(device).eval()


def align_of(content, kind, device):
    """Where MCL's network looks for the similarity of a clip to its own mirror image."""
    c = content["config"]
    encoder = make_backbone(**content["backbone"])
    model = load_method(mcl.MCL(encoder, None, 1, queue=c["queue"]), content, kind, device)
    figures = {}
    for figure, changes in (("align", {}), ("align, still", dict(label=-1))):
        clips, masks, *_ = toy_clips(range(128), **changes)
        x = normalize(clips.to(device), model.encoder.config)
        X, q = model.embed(model.encoder, model.heads, x)
        with torch.no_grad():
            _, k = model.embed(model.keys["encoder"], model.keys["heads"], x.flip(-1))
        P = model.look((q["inter"] * k["inter"]).sum(1), X).detach()                 # (B, t, h, w)
        cells = F.adaptive_avg_pool3d(masks.float(), P.shape[1:])                    # share of the cell
        figures[figure] = auc(P.cpu().flatten(1), cells.flatten(1) > 0.25)
    return figures


@torch.no_grad()
def find_of(content, kind, device):
    c = content["config"]
    motion = common.ResNet3D("motion_r50", 1 / 8, c["image_size"], c["motion_frames"])
    flow = FlowEstimator("tvl1", device=device)
    encoder = make_backbone(**content["backbone"])
    model = load_method(modist.MoDist(encoder, motion, flow, queue=c["queue"]), content, kind, device)
    first, second = (toy_clips(range(256), frames=9, first=at)[0].to(device) for at in (6, 9))     # in training: 0 to 3
    query = torch.cat([model.motion_head(model.motion(modist.motion_maps(x, flow, clip=c["edge_clip"])))
                       for x in first.split(32)])
    key = torch.cat([model.keys["head"](model.keys["encoder"](normalize(x[:, :, :-1], model.encoder.config)))
                     for x in second.split(32)])
    return dict(find=auc(F.normalize(query, dim=1) @ F.normalize(key, dim=1).T, torch.eye(256)))


@torch.no_grad()
def direction_of(content, kind, device):
    c = content["config"]
    sizes = {name: content["backbone"][name] for name in ("image_size", "patch_size", "tubelet_size", "frames")}
    model = mme.MME(None, c["target"], c["length"], c["stride"], c["mask_ratio"], **sizes,
                    **common.VITS[c["model"]] | dict(decoder_depth=1))
    model = load_method(model, content, kind, device)
    count, _ = mme.frames_to_read(c["target"], c["frames"], c["tubelet_size"], c["stride"], c["length"])
    clips, masks, truths, shown = toy_clips(range(128), 1, count, 0)
    true = np.stack([[toy_flow(t, a, b)[0] for a, b in zip(shown, shown[1:])] for t in truths])
    model.flow = lambda x: torch.from_numpy(true).float().to(x.device)               # (B, F - 1, 2, 64, 64)
    target, valid, _ = model.targets(clips.to(device))
    generator = torch.Generator(device).manual_seed(0)
    hidden = mme.tube_mask(len(clips), model.encoder.grid, model.mask_ratio, generator, device)
    guess, masked = model.predict(normalize(model.seen(clips).to(device), model.encoder.config), hidden, model.count)
    z = target["position"].take_along_dim(masked[..., None], 1)
    moves = (z.square().mean(-1) > 0.25) & valid.gather(1, masked)
    return dict(direction=100 * F.cosine_similarity(guess["position"], z, dim=-1)[moves].mean().item())


def mechanism(script, switches, kind, network, content, device):
    """The figures that have a meaning for this row."""
    figures = swaps(network, device)
    if script == "mofo" and switches + kind == "":
        figures |= box_of(device)
    if script == "mcl" and kind != "supervised":
        figures |= align_of(content, kind, device)
    if script == "modist" and "--cross-weight 0" not in switches:
        figures |= find_of(content, kind, device)
    if script == "mme" and content["config"]["target"] in ("trajectory", "position"):
        figures |= direction_of(content, kind, device)
    return figures


# ---- real videos ------------------------------------------------------------------------------------------------

def leave_one_out(network, cfg, data, pattern):
    """Linear probe on the videos of a directory, tested on each group in turn -> figure, number of videos."""
    items = [item for split in ("train", "test") for item in find_videos(data, "", split).items]
    groups = [re.search(pattern, Path(item.path).name) for item in items]
    if None in groups:
        raise common.UserError(f"--groups {pattern}: not found in the name {items[groups.index(None)].path}")
    groups, labels = np.array([g[1] for g in groups]), torch.tensor([item.label for item in items])
    features = finetune.extract(network, items, cfg, cfg.env, "3x1", data)[0].mean(1)
    right = torch.zeros(len(items))
    for group in sorted(set(groups)):
        out = torch.from_numpy(groups == group)
        fit = finetune.fit_linear(features[~out], labels[~out], int(labels.max()) + 1, cfg.l2)
        right[out] = (fit(features[out]).argmax(1) == labels[out]).float()
    return {"left out": 100 * right.mean().item()}, len(items)


# ---- cells, table -----------------------------------------------------------------------------------------------

def run_cell(row, seed, a):
    """Pre-train and read out one row with one seed; append its figures to the csv."""
    (script, switches, kind), began = ROWS[row], time.time()
    checkpoint = pretrain(script, switches, kind, seed, a)
    network, cfg, content = load_network(checkpoint, kind, seed)
    if a.data == "toy":
        figures, n = {}, 256
        if kind != "supervised":
            figures = read_out(network, cfg, SIZES[a.size][1]) | mechanism(script, switches, kind, network, content,
                                                                           cfg.env.device)
        if a.labels or kind == "supervised":
            name = "motion" if kind == "supervised" else "few labels"
            figures[name] = few_labels(checkpoint, kind, seed, checkpoint.parent / "few", SIZES[a.size][1])
    else:
        figures, n = leave_one_out(network, cfg, a.data, a.groups)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True).stdout
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    about = dict(size=a.size, data=a.name, row=row, seed=seed, n=n, device=device,
                 steps=0 if kind else content["step"], seconds=round(time.time() - began), commit=commit.strip())
    fresh = not RESULTS.exists()
    with open(RESULTS, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerows(dict(about, figure=k, value=round(v, 2)) for k, v in figures.items())
    print(f"{row}, seed {seed}: " + ", ".join(f"{k} {v:.1f}" for k, v in figures.items()) + f"  ({about['seconds']} s)",
          flush=True)


def results(size, data):
    """Lines of the csv about one size and data set."""
    lines = csv.DictReader(open(RESULTS, newline="")) if RESULTS.exists() else ()
    return [line for line in lines if (line["size"], line["data"]) == (size, data)]


def table(size, data):
    """Markdown of mean and, from three seeds on, spread (standard deviation) over seeds."""
    mine = results(size, data)
    columns = list(dict.fromkeys(r["figure"] for r in mine))
    lines = [f"| network | seeds | {' | '.join(columns)} |", "|---|" + "---|" * (len(columns) + 1)]
    for row in ROWS:
        own = [r for r in mine if r["row"] == row]
        values = {c: [float(r["value"]) for r in own if r["figure"] == c] for c in columns}
        cells = [f"{np.mean(v):.1f}" + (f" ± {np.std(v, ddof=1):.1f}" if len(v) > 2 else "") if v else ""
                 for v in values.values()]
        if own:
            lines.append(f"| {row} | {len({r['seed'] for r in own})} | {' | '.join(cells)} |")
    made = sorted({(r["n"], r["device"], r["commit"]) for r in mine})
    print(*lines, "", *(f"{n} test videos, {device}, commit {commit}" for n, device, commit in made), sep="\n")


def draw(size):
    """Write evidence.svg: a panel for each method and in it, for each figure of BARS, what random weights (light), its
    baseline (grey) and itself (blue) reach of 100, with the spread over seeds; a red line is what guessing reaches."""
    mine, shapes = results(size, "toy"), []
    bars = {figure: chance for figure, chance in BARS.items() if any(r["figure"] == figure for r in mine)}
    for i, (method, others) in enumerate(BASELINES.items()):
        left = 80 + 150 * i
        shapes.append(f'<text x="{left}" y="16"><tspan font-weight="bold">{method}</tspan> / {others[1]}</text>')
        for j, (figure, chance) in enumerate(bars.items()):
            found = [[float(r["value"]) for r in mine if (r["row"], r["figure"]) == (row, figure)]
                     for row in (*others, method)]
            top = 26 + 40 * j
            if i == 0:
                shapes.append(f'<text x="72" y="{top + 18}" text-anchor="end">{figure}</text>')
            for k, values in enumerate(found):
                if values:
                    mean, spread = max(0, np.mean(values)), np.std(values, ddof=len(values) > 1)
                    y, ends = top + 10 * k, [left + 1.3 * max(0, end) for end in (mean - spread, mean + spread)]
                    shapes.append(f'<rect x="{left}" y="{y}" width="{1.3 * mean:.1f}" height="9" '
                                  f'fill="{("#ddd", "#999", "#38d")[k]}"/><path stroke="black" '
                                  f'd="M{ends[0]:.1f} {y + 4.5}H{ends[1]:.1f}"/>')
            if any(found):
                x = left + 1.3 * chance
                shapes.append(f'<path stroke="#aaa" d="M{left} {top}v29"/><path stroke="red" d="M{x} {top}v29"/>')
    size = f'width="{80 + 150 * len(BASELINES)}" height="{26 + 40 * len(bars)}"'
    RESULTS.with_suffix(".svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">\n'
        f'<rect {size} fill="white"/>\n' + "\n".join(shapes) + "\n</svg>\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", default="", help="these rows of ROWS alone, separated by ;")
    parser.add_argument("--no-labels", dest="labels", action="store_false", help="no fine-tuning with few labels")
    parser.add_argument("--data", default="toy", help="a directory of real videos, <split>/<class>/* or <class>/*")
    parser.add_argument("--groups", default=r"(.*)", help="real videos: the part of a name that tells the group")
    parser.add_argument("--raft-weights", default="", help="real videos: RAFT-small's, instead of TV-L1 flow")
    parser.add_argument("--init", action="store_true", help="real videos: start from the same row's toy run")
    parser.add_argument("--out", default="runs/evidence", help="where the runs and the toy data lie")
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    a = parser.parse_args()
    a.data = a.data if a.data == "toy" else str(Path(a.data).resolve())
    a.name = Path(a.data).stem + " after toy" * a.init + " with RAFT" * bool(a.raft_weights)
    if a.table:
        table(a.size, a.name)
        return draw(a.size)
    a.raft_weights = a.raft_weights and str(Path(a.raft_weights).resolve())
    Path(a.out).mkdir(parents=True, exist_ok=True)
    os.chdir(a.out)
    done = {(r["row"], int(r["seed"])) for r in results(a.size, a.name)}
    for seed in range(a.seeds):
        for row, (_, _, kind) in ROWS.items():
            wanted = not a.rows or row in a.rows.split(";")
            if wanted and (row, seed) not in done and not (a.data != "toy" and kind == "supervised"):
                run_cell(row, seed, a)


if __name__ == "__main__":
    main()
