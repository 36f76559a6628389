#!/usr/bin/env bash
# Everything that a GPU has to show, on one GPU in about 20 minutes:    bash tests/first_gpu_run.sh [DIRECTORY]
# Runs the GPU tests, each script with its published recipe on videos made here (the loss says nothing there), fine-tuning,
# linear probe and retrieval, and the benchmark of training steps and flow.  What to keep is printed last and lies in
# DIRECTORY (default runs/first_gpu).  Most of the time torch.compile works; its results are kept: a second run is fast.
# Without internet: RAFT_WEIGHTS=FILE, torchvision's RAFT-small.  In several leases: PARTS="tests mofo mme", then others of
# tests mofo mme fame mcl modist finetune bench.
set -u -o pipefail
parts=" ${PARTS:-tests mofo mme fame mcl modist finetune bench} "
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-runs/first_gpu}")
mkdir -p "$out"
python -c "import torch; assert torch.cuda.is_available(), 'no GPU'" || exit 1

[[ $parts == *" tests "* ]] && python -m pytest -q tests/test_cuda.py 2>&1 | tee "$out/tests.txt" | tail -3

python - "$out/videos" <<'END'
import sys
from pathlib import Path
sys.path.insert(0, "tests")
import bench
root = Path(sys.argv[1])
root.mkdir(parents=True, exist_ok=True)
path, _ = next(iter(bench.make_videos(root).values()))             # H.264, 340 x 256, 10 s
for split, count in (("train", 256), ("val", 16)):
    for i in range(count):
        link = root / f"{split}/class {i % 4}/{split[:2]}{i:09d}_000000_000010.mp4"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.exists() or link.hardlink_to(path)
END
data="--data k400 --root $out/videos --workers $(nproc) --fresh --log-every 10 --warmup-epochs 0"
for run in "mofo 64" "mme 64" "fame 64" "mcl 8" "modist 64"; do
    set -- $run
    [[ $parts == *" $1 "* ]] || continue
    flow=${RAFT_WEIGHTS:+--raft-weights $RAFT_WEIGHTS}
    [ "$1" = fame ] && flow=
    python "$1.py" $data --batch "$2" --steps "${STEPS:-40}" --preview-every 40 --out "$out/$1" $flow 2>&1 | tee "$out/$1.txt" | tail -2
done
if [[ $parts == *" finetune "* ]]; then
    [ -e "$out/mofo/last.pt" ] || { echo "finetune needs mofo"; exit 1; }
    for run in "finetune --batch 32 --epochs 4" "linear --batch 64 --epochs 2" retrieval; do
        set -- $run
        python finetune.py --init "$out/mofo/last.pt" $data --out "$out/$1" --mode $run 2>&1 | tee "$out/$1.txt" | tail -1
    done
fi

if [[ $parts == *" bench "* ]]; then
    python tests/bench.py --quick --part steps 2>&1 | tee "$out/steps.txt" | tail -8
    python tests/bench.py --quick --part flow 2>&1 | tee "$out/flow.txt" | tail -7
fi

python - "$out" <<'END' | tee "$out/table.md"
import json, sys, torch
from pathlib import Path
out = Path(sys.argv[1])
tests = out / "tests.txt"
print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}: {tests.read_text().splitlines()[-1] if tests.exists() else 'no tests'}\n")
print("| script, published recipe | first 10 steps, s | clips/s | data wait, % | flow, % | TFLOP/s | memory, GB |")
print("|---|---|---|---|---|---|---|")
for name in ("mofo", "mme", "fame", "mcl", "modist", "finetune"):
    log = out / name / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if len(lines) < 3:
        print(f"| {name} | not run, or failed: {out / name}.txt |")
        continue
    first, line = lines[0], lines[2]                               # the third ten: compiled, and no preview in between
    print("|", " | ".join(map(str, (name, f"{first['step_ms'] / 100:.0f}", *(line[key] for key in (
        "clips_per_s", "data_wait_pct", "flow_pct", "tflops", "memory_gb"))))), "|")
END
cat "$out/steps.txt" "$out/flow.txt" 2> /dev/null | grep -v Warning
