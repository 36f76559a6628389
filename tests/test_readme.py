"""The README against the code: its commands, its reading guide, which `python tests/test_readme.py` writes anew."""
import importlib
import inspect
import re
import shlex

import pytest

from conftest import REPO
from common import parse_config

SCRIPTS = "mofo", "mme", "fame", "mcl", "modist", "finetune"
GUIDE = (
    ("MOFO: motion, free of camera pans", "mean over windows of \\|∇ mean flow\\|", "mofo.motion_map"),
    ("MOFO: the region that moves", "columns and rows between the map's 1 % and 99 % quantiles", "mofo.motion_box"),
    ("MOFO: mask by motion", "m_in = clamp(⌊r n_in⌋, max(0, K − n_out), min(n_in, K))", "mofo.motion_tube_mask"),
    ("VideoMAE: masked autoencoder", "mean of (prediction − target)² over hidden patches", "mofo.MaskedAutoencoder"),
    ("MOFO: what moves attends to the rest", "softmax(q_in k_outᵀ / √d) v_out", "finetune.MotionFocus"),
    ("MME: trajectories", "p_{k+1} = p_k + flow_k(p_k)", "mme.trajectories"),
    ("MME: position change", "(d − mean d) / √(var d + noise²) within a token", "mme.position_target"),
    ("MME: shape change", "oriented gradients of frame k where the point is then", "mme.shape_target"),
    ("FAME: what moves, and what has its colours", "p_fg(colour) / (p_fg + p_bg), cut at the β H W largest",
     "fame.foreground_mask"),
    ("FAME: other backgrounds", "m x + (1 − m) x_other", "fame.merge"),
    ("MoCo: contrast with a queue", "−log exp(q·k/τ) / (exp(q·k/τ) + Σ exp(q·n/τ))", "modist.info_nce"),
    ("MCL: motion boundary", "\\|∇ Σ_t u\\| + \\|∇ Σ_t v\\|", "mcl.motion_boundary"),
    ("MCL: crops with motion", "cover of the hottest cells' box ≥ 0.9, 0.8, 0.7", "mcl.hot_box"),
    ("MCL: where the network looks", "ReLU(Σ_c mean_hw(g_c) g_c), g = ∂ similarity / ∂X", "mcl.alignment_map"),
    ("MCL: it should look at motion", "3 − cos_st − cos_s − cos_t", "mcl.alignment_loss"),
    ("MoDist: flow edges", "min(\\|∇flow\\| / clip, 1)", "modist.flow_edges"),
    ("MoDist: RGB learns from motion", "NCE(rgb, rgb) + w (NCE(rgb, motion) + NCE(motion, rgb))", "modist.MoDist"),
)


def guide():
    rows = ["| idea | equation | where | lines |", "|---|---|---|---|"]
    for idea, equation, place in GUIDE:
        module, name = place.split(".")
        lines = len(inspect.getsource(getattr(importlib.import_module(module), name)).splitlines())
        rows.append(f"| {idea} | {equation} | `{module}.py`, `{name}` | {lines} |")
    return "\n".join(rows)


def with_guide(text):
    return re.sub(r"(?s)(<!-- guide: [^>]*-->\n).*(<!-- end of guide -->)", lambda m: f"{m[1]}{guide()}\n{m[2]}", text)


def test_the_reading_guide_is_that_of_the_code():
    text = (REPO / "README.md").read_text()
    assert text == with_guide(text), "run python tests/test_readme.py"


def commands():
    text = (REPO / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.S)).replace("\\\n", " ")
    blocks += "\n" + "\n".join(re.findall(r"`((?:python )?(?:%s)\.py --[^`]*)`" % "|".join(SCRIPTS), text))
    return re.findall(r"(?:^|python |torchrun [^#\n]*? )((?:%s)\.py[^#\n&|]*)" % "|".join(SCRIPTS), blocks, re.M)


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_parses(command):
    script, *argv = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    parse_config(module.Config, module.RECIPES, [a for a in argv if a != "--help"])


if __name__ == "__main__":
    (REPO / "README.md").write_text(with_guide((REPO / "README.md").read_text()))
