"""Weights of public files in our networks and ours in Hugging Face's: names, heads, norms, mean and std of input."""
import json
import os
import pickle
import re
import sys
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path, PosixPath

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import error_of, scrambled, seeded
from finetune import export_huggingface

import common
import fame
import finetune
import mcl
import mme
import modist
import mofo
from common import ViT, load_file, load_weights, make_backbone
from mofo import MaskedAutoencoder

SIZES = dict(image_size=32, frames=4, patch_size=8, tubelet_size=2, dim=48, depth=2, heads=4)
CONFIG = dict(model_type="videomae", image_size=32, num_frames=4, patch_size=8, tubelet_size=2, hidden_size=48,
              num_hidden_layers=2, num_attention_heads=4)                       # the same, as Hugging Face says it
DECODER = dict(decoder_dim=24, decoder_depth=2, decoder_heads=2)
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
KINETICS = dict(mean=(0.43216, 0.394666, 0.37645), std=(0.22803, 0.22145, 0.216989))
SLOWFAST = dict(mean=(0.45, 0.45, 0.45), std=(0.225, 0.225, 0.225))
ODD = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
NAMES = ["brush hair", "Kitchen: \"put\"", "zwölf"]


def small_vit(classes=0, **change):
    return scrambled(ViT(**SIZES | change, num_classes=classes))


def tiny(classes=0, **settings):
    """vit_tiny at 32 pixels: files that do not say their sizes can be named."""
    return scrambled(make_backbone("vit_tiny", 32, 4, classes, **settings))


def network_of(path, mode="extract", outputs=0, classes=None, **settings):
    """What finetune.py makes of a file."""
    settings = dict(image_size=32, frames=4, model="vit_tiny") | settings
    cfg = finetune.Config(init=str(path), mode=mode, **settings)
    return finetune.build_network(cfg, load_file(path), outputs, classes).eval()


def clips(B=2):
    return torch.randn(B, 3, 4, 32, 32, generator=seeded())


def state_of(model):
    return {k: x.clone() for k, x in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def prefixed(prefix, state):
    return {prefix + k: x for k, x in state.items()}


def statistics_of(network):
    return {k: network.config[k] for k in ("mean", "std")}


# ---- 1. Reading files ------------------------------------------------------------------------------------------------

class Harmful:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
def test_no_function_of_a_file_is_called(tmp_path, legacy):
    owned, path = tmp_path / "owned", tmp_path / "file.pt"
    for call in ((exec, (f"open({str(owned)!r}, 'w')",)), (Path.touch, (owned,)), (os.mkdir, (str(owned),))):
        content = dict(model={"w": torch.ones(1)}, args=Harmful(*call))
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        try:
            load_file(path)
        except common.UserError as error:
            assert "file.pt: cannot be read" in str(error) and "weights_only" not in str(error)
        assert not owned.exists()
    torch.load(path, weights_only=False)                                        # it does harm where it can
    assert owned.exists()


@pytest.mark.parametrize("thing", [
    PosixPath("/a/b"), Namespace(out=PosixPath("/a"), betas=[0.9]), np.float64(3), np.zeros(3), np.dtype("f4"),
    OrderedDict(a=1), torch.Size([2]), torch.__version__, {PosixPath("/a"): 1}], ids=lambda x: type(x).__name__)
def test_what_training_scripts_leave_in_their_files_does_no_harm(tmp_path, thing):
    torch.save(dict(model={"w": torch.arange(3.0)}, args=thing, epoch=4), tmp_path / "file")
    before = dict(model={"w": torch.arange(3.0)}, args=Namespace(lr=1), epoch=4)        # torch 1.6
    torch.save(before, tmp_path / "before", _use_new_zipfile_serialization=False)
    for name in ("file", "before"):
        content = load_file(tmp_path / name)
        assert same(content["model"], {"w": torch.arange(3.0)}) and content["epoch"] == 4


@pytest.mark.parametrize("content", [b"", b"hello\n", b"PK\x03\x04" + bytes(50), "cut", pickle.dumps({"w": 1}, 2)])
@pytest.mark.parametrize("name", ["file.pth", "model.safetensors"])
def test_a_file_that_is_no_checkpoint_is_a_message(tmp_path, name, content):
    path, save = tmp_path / name, torch.save
    if name == "model.safetensors":
        save = pytest.importorskip("safetensors.torch").save_file
    save({"w": torch.zeros(1000)}, path)
    assert load_file(path)["model"].keys() == {"w"}
    path.write_bytes(path.read_bytes()[:2000] if content == "cut" else content)
    assert f"{name}: cannot be read" in error_of(load_file, path)


def test_what_is_not_there_is_a_message(tmp_path, monkeypatch):
    assert "gone.pth: no such checkpoint" in error_of(load_file, tmp_path / "gone.pth")
    assert "model.safetensors" in error_of(load_file, tmp_path) and str(tmp_path) in error_of(load_file, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)                       # as if it were not installed
    assert "pip install safetensors" in error_of(load_file, tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in error_of(export_huggingface, small_vit(), [], tmp_path / "out")


# ---- 2. Files of ViTs ------------------------------------------------------------------------------------------------

INNER = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
         "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}


def huggingface_names(state, prefix="videomae.", biases="old"):
    """By hand, from the specification: {our name: tensor} -> {their name: tensor}, the biases as published ("old"), as
    in the memory of transformers 5 ("new") or both."""
    outer = {"patch_embed.proj.": prefix + "embeddings.patch_embeddings.projection.", "norm.": prefix + "layernorm.",
             "head.": "classifier."}
    out = {}
    for name, x in state.items():
        decoder, number, part, kind = re.fullmatch(
            r"(?:encoder\.)?(?:(decoder\.)?blocks\.(\d+)\.)?(.*\.)?(.*)", name).groups()
        layer = ("decoder.decoder_layers." if decoder else prefix + "encoder.layer.") + f"{number}."
        if kind in ("q_bias", "v_bias"):
            new = dict(q_bias="query.bias", v_bias="value.bias")[kind]
            for name in dict(old=[kind], new=[new], both=[kind, new])[biases]:
                out[f"{layer}attention.attention.{name}"] = x
        elif part == "attn.qkv.":
            for name, rows in zip(("query", "key", "value"), x.chunk(3)):
                out[f"{layer}attention.attention.{name}.weight"] = rows
        elif number:
            out[f"{layer}{INNER[part[:-1]]}.{kind}"] = x
        else:
            out[outer.get(part, part or "") + kind] = x
    return out


def save_ours(path, vit, **change):
    torch.save(dict(model=vit.state_dict(), backbone=vit.config, classes=NAMES) | change, path)


def save_as(key, prefix="", **more):
    return lambda path, vit: torch.save({key: prefixed(prefix, vit.state_dict()), **more}, path)


def save_pretrained(path, vit, prefix="", **more):
    """VideoMAE's pre-training: an encoder among other things that have norms, too."""
    mae = prefixed("encoder.", vit.state_dict()) | {"mask_token": torch.randn(1, 1, 24)}
    mae |= {f"decoder.{k}": torch.randn(24) for k in ("norm.weight", "norm.bias", "blocks.0.norm1.weight")}
    torch.save(dict(model=prefixed(prefix, mae), args=Namespace(lr=1), **more), path)


def save_moco(path, vit):
    keys = {k: torch.randn_like(x) for k, x in vit.state_dict().items()}
    state = prefixed("module.encoder_q.", vit.state_dict()) | prefixed("module.encoder_k.", keys)
    torch.save(dict(state_dict=state | {"module.queue": torch.zeros(3, 4)}, arch="vit"), path)


def save_huggingface(path, vit, prefix="videomae.", biases="old"):
    """A folder of theirs, by hand."""
    path.mkdir()
    torch.save(huggingface_names(vit.state_dict(), prefix, biases), path / "pytorch_model.bin")
    sizes = {theirs: vit.config[ours] for ours, theirs in common.SIZES.items()}
    (path / "config.json").write_text(json.dumps(sizes | dict(model_type="videomae")))


def save_export(path, vit):
    pytest.importorskip("safetensors")
    export_huggingface(vit, NAMES if isinstance(vit.head, torch.nn.Linear) else [], path)


KINDS = {   # which norm the network in the file has, and how it is written
    "ours": ("norm", save_ours), "ours, fine-tuned": ("fc_norm", save_ours),
    "ours, pre-training": ("norm", lambda path, vit: save_pretrained(path, vit, backbone=vit.config)),
    "VideoMAE": ("norm", save_pretrained), "MoCo": ("norm", save_moco),
    "VideoMAE, DDP": ("norm", lambda path, vit: save_pretrained(path, vit, "module.")),
    "VideoMAE, fine-tuned": ("fc_norm", save_as("module", args=Namespace(lr=1), best=np.float64(81.5))),
    "DDP": ("fc_norm", save_as("state_dict", "module.")), "MME": ("norm", save_as("model", "encoder.model.")),
    "MME, momentum": ("norm", save_as("model", "encoder_q.encoder.model.")),
    "bare, without norm": ("", lambda path, vit: torch.save(vit.state_dict(), path)),
    "Hugging Face": ("norm", save_huggingface), "Hugging Face, classifier": ("fc_norm", save_huggingface),
    "Hugging Face, new": ("norm", lambda path, vit: save_huggingface(path, vit, biases="new")),
    "Hugging Face, both": ("norm", lambda path, vit: save_huggingface(path, vit, biases="both")),
    "Hugging Face, mean pooling": ("", lambda path, vit: save_huggingface(path, vit, "")),
    "export": ("norm", save_export), "export, classifier": ("fc_norm", save_export),
    "export, mean pooling": ("", save_export),
}


@torch.no_grad()
@pytest.mark.parametrize("mode", ["extract", "linear"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_what_the_head_of_the_file_gets(tmp_path, kind, mode):
    norm, save = KINDS[kind]
    vit = tiny(3 * (norm == "fc_norm"), norms=(norm,))
    save(tmp_path / "file", vit)
    network = network_of(tmp_path / "file", mode)
    assert "".join(network.config["norms"]) == norm
    x = vit.patch_embed(common.patchify(clips(), 16, 2)) + vit.positions
    for block in vit.blocks:
        x = block(x)
    features = {"norm": vit.norm(x).mean(1), "fc_norm": vit.fc_norm(x.mean(1)), "": x.mean(1)}
    torch.testing.assert_close(network(clips()), features[norm], atol=1e-5, rtol=1e-4)
    others = x.mean(1), F.layer_norm(x.mean(1), (96,)), F.layer_norm(x, (96,)).mean(1)    # none passes for another
    assert sum((other - features[norm]).abs().mean() < 0.02 for other in others) == (not norm)


NETWORKS = {"classifier": lambda: ViT(**SIZES, num_classes=3), "encoder": lambda: ViT(**SIZES),
            "autoencoder": lambda: MaskedAutoencoder(**SIZES, **DECODER)}


@pytest.mark.parametrize("theirs", [True, False])
@pytest.mark.parametrize("target", NETWORKS)
@pytest.mark.parametrize("source", NETWORKS)
def test_every_file_fits_every_network_of_ours(tmp_path, source, target, theirs):
    ours, network = state_of(scrambled(NETWORKS[source]())), NETWORKS[target]()
    renamed = huggingface_names(ours, "" if source == "encoder" else "videomae.")
    torch.save(renamed if theirs else dict(model=ours), tmp_path / "file")
    fresh, report, got = state_of(network), load_weights(network, tmp_path / "file"), network.state_dict()
    plain = {k.removeprefix("encoder."): x for k, x in ours.items()}
    assert set(report.loaded) == {k for k in got if k.removeprefix("encoder.") in plain}
    for name, x in got.items():
        assert torch.equal(x, plain[name.removeprefix("encoder.")] if name in report.loaded else fresh[name]), name
    assert sum("blocks." in k for k in report.loaded) >= 13 * 2                 # nothing of a block is left new
    assert sorted(report.loaded + report.missing) == sorted(got)
    assert len(report.loaded) + len(report.unexpected) == len(ours)


@pytest.mark.parametrize("save", [save_ours, save_pretrained, save_huggingface])
@pytest.mark.parametrize("change, word", [
    (dict(dim=24), "(48, 3, 2, 8, 8)"), (dict(depth=3), "blocks.2."), (dict(depth=1), "blocks.1."),
    (dict(patch_size=16), "(48, 3, 2, 16, 16)"), (dict(tubelet_size=1), "(48, 3, 1, 8, 8)")])
def test_a_file_of_other_sizes_is_refused_and_nothing_is_half_loaded(tmp_path, save, change, word):
    save(tmp_path / "file", small_vit())
    load_weights(ViT(**SIZES | dict(image_size=48, frames=8)), tmp_path / "file")           # positions are not stored
    for model in (ViT(**SIZES | change), MaskedAutoencoder(**SIZES | change, **DECODER)):
        before = state_of(model)
        message = error_of(load_weights, model, tmp_path / "file")
        assert word in message and "--model" in message and same(model.state_dict(), before)


def test_what_may_be_missing(tmp_path):
    file = tmp_path / "file"
    torch.save(state := state_of(small_vit(5)), file)
    other, deeper, vit = (ViT(**SIZES | change) for change in (dict(num_classes=3), dict(num_classes=5, depth=3),
                                                               dict(num_classes=5)))
    report = load_weights(other, file)                                          # a head of another width is left new
    assert set(report.missing) == set(report.unexpected) == {"head.weight", "head.bias"}
    assert "head.weight (3, 48)" in error_of(load_weights, other, file, "all")
    report = load_weights(deeper, file, strict_backbone=False)
    assert len(report.missing) == 13 and all(name.startswith("blocks.2.") for name in report.missing)
    fresh = state_of(vit)
    assert load_weights(vit, file, True, ("head.",)).missing == ["head.weight", "head.bias"]
    assert same(vit.state_dict(), {k: (fresh if k.startswith("head.") else state)[k] for k in fresh})
    for gone, word in (("_bias", "q_bias"), ("1.attention.attention.key.weight", "blocks.1.attn.qkv.weight")):
        torch.save({k: x for k, x in huggingface_names(state).items() if not k.endswith(gone)}, file)
        assert word in error_of(load_weights, ViT(**SIZES), file)


@pytest.mark.parametrize("content", [{"conv1.weight": torch.zeros(3)}, {"model": {"a": 1}}, {}, [torch.zeros(2)], None])
@pytest.mark.parametrize("strict", [True, False])
def test_a_file_without_matching_weights_is_refused(tmp_path, content, strict):
    torch.save(content, tmp_path / "file.pth")
    assert "file.pth does not fit: 0 of" in error_of(load_weights, ViT(**SIZES), tmp_path / "file.pth", strict)


# ---- 3. Hugging Face's folders ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("dim, heads, expected", [(48, 4, 4), (48, 16, 16), (384, 16, 6), (384, 12, 12)])
def test_the_config_next_to_the_weights_tells_the_network(tmp_path, dim, heads, expected):
    torch.save({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    torch.save(dict(model={"w": torch.ones(1)}, backbone=SIZES | dict(dim=96)), tmp_path / "last.pt")
    labels = {str(i): f"class {i}" for i in (10, 2, 0, 1, 3, 11, 4, 5, 6, 7, 8, 9)}
    config = CONFIG | dict(hidden_size=dim, num_attention_heads=heads)
    for id2label, classes in (({"0": "LABEL_0", "1": "LABEL_1"}, None), (labels, [f"class {i}" for i in range(12)])):
        (tmp_path / "config.json").write_text(json.dumps(config | dict(id2label=id2label)))
        content = load_file(tmp_path)
        assert content["backbone"] == SIZES | dict(dim=dim, heads=expected, norms=()) | IMAGENET
        assert content.get("classes") == classes
    assert load_file(tmp_path / "last.pt")["backbone"]["dim"] == 96             # of our own file it says nothing


@pytest.mark.parametrize("name, text", [
    ("config", ""), ("config", "[]"), ("config", json.dumps(dict(method="mofo", model="vit_base"))), ("config", "\xff"),
    ("config", json.dumps(CONFIG | dict(image_size=[32, 48]))), ("config", json.dumps(CONFIG | {"id2label": {"1": 2}})),
    ("preprocessor_config", "{"), ("preprocessor_config", "[]"), ("preprocessor_config", '{"image_mean": 0.5}')])
def test_a_damaged_folder_is_a_message(tmp_path, name, text):
    save_huggingface(tmp_path / "hf", tiny(3))
    (tmp_path / f"hf/{name}.json").write_text(text, encoding="latin-1")
    assert f"{name}.json" in error_of(load_file, tmp_path / "hf")


@pytest.mark.parametrize("classes", [0, 3])
def test_what_is_exported(tmp_path, classes):
    pytest.importorskip("safetensors")
    vit, folder = small_vit(classes, **ODD), tmp_path / "new" / "folder"
    export_huggingface(vit, NAMES[:classes], folder)
    config, processor = (json.loads((folder / f"{name}config.json").read_text()) for name in ("", "preprocessor_"))
    labels = dict(id2label=dict(zip("012", NAMES)), label2id=dict(zip(NAMES, range(3)))) if classes else {}
    assert config == CONFIG | labels | dict(
        architectures=["VideoMAEForVideoClassification" if classes else "VideoMAEModel"], intermediate_size=192,
        layer_norm_eps=1e-6, use_mean_pooling=bool(classes))
    assert processor == dict(
        image_processor_type="VideoMAEImageProcessor", size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    content = load_file(folder)
    assert same(content["model"], huggingface_names(state_of(vit), "videomae." if classes else "", "both"))
    assert content["backbone"] == vit.config and content.get("classes", []) == NAMES[:classes]
    assert same(common.convert_names(content["model"]), vit.state_dict())


def test_what_cannot_be_exported_is_a_message(tmp_path):
    pytest.importorskip("safetensors")
    for network, classes, word in (
            (make_backbone("r3d_18", 32, 4, 2), NAMES[:2], "ViT"), (small_vit(3), NAMES[:2], "3"),
            (small_vit(norms=("fc_norm",)), [], "fc_norm")):
        assert word in error_of(export_huggingface, network, classes, tmp_path / "folder")


@pytest.mark.parametrize("save", [save_as("module"), save_as("state_dict", "module.")])
def test_export_finds_the_head_under_every_name(tmp_path, monkeypatch, save):
    done = []
    monkeypatch.setattr(finetune, "export_huggingface", lambda network, classes, out: done.extend((network, classes)))
    cfg = finetune.Config(init=str(tmp_path / "file"), mode="export", model="vit_tiny", image_size=32, frames=4)
    save(tmp_path / "file", tiny(3))
    finetune.export(cfg, load_file(tmp_path / "file"))
    assert same(done[0].state_dict(), tiny(3).state_dict()) and done[1] == ["0", "1", "2"]


# ---- 4. Convolutional networks ---------------------------------------------------------------------------------------

def slowfast_name(name):
    """By hand: our slow_r50's name -> PySlowFast's."""
    part = name.split(".")
    if part[0] == "head":
        return name
    if part[0] == "stem":
        return f"s1.pathway0_stem.{part[1][:-1]}.{part[2]}"
    inner = {"conv1": "branch2.a", "conv2": "branch2.b", "conv3": "branch2.c", "bn1": "branch2.a_bn",
             "bn2": "branch2.b_bn", "bn3": "branch2.c_bn", "downsample.0": "branch1", "downsample.1": "branch1_bn"}
    return f"s{int(part[0][5:]) + 1}.pathway0_res{part[1]}.{inner['.'.join(part[2:-1])]}.{part[-1]}"


@pytest.mark.parametrize("name, key, prefix, statistics", [
    ("slow_r50", "model_state", "", SLOWFAST), ("slow_r50", "model_state", "module.encoder_q.", SLOWFAST),
    ("r2plus1d_50", "model", "module.backbone.", IMAGENET), ("r2plus1d_50", "state_dict", "encoder_q.", IMAGENET),
    ("r2plus1d_18", "model", "", KINETICS), ("r3d_18", "model", "backbone.", KINETICS), ("s3d", "model", "", KINETICS)])
def test_files_of_convolutional_networks(tmp_path, name, key, prefix, statistics):
    network = make_backbone(name, 64, 16, 5, width=0.0625)
    ours = {k: torch.randn(x.shape) if x.is_floating_point() else x for k, x in network.state_dict().items()}
    theirs = {slowfast_name(k) if name == "slow_r50" else k.replace("head.", "fc."): x for k, x in ours.items()}
    extra = {k: torch.ones(2) for k in ("s2.pathway1_res0.branch2.a.weight", "head.projection.weight", "fc.0.weight")}
    torch.save({key: prefixed(prefix, theirs | extra), "cfg": "TRAIN: ..."}, tmp_path / "file.pyth")
    report = load_weights(network, tmp_path / "file.pyth", "all")
    assert len(theirs) == len(ours) and same(network.state_dict(), ours)
    assert not report.missing and len(report.unexpected) == len(extra) and statistics_of(network) == statistics


def test_raft_s_weights_in_a_wrapper(tmp_path):
    raft = torchvision.models.optical_flow.raft_small()
    save_as("state_dict", "module.")(tmp_path / "raft.pth", raft)
    assert same(common.FlowEstimator("raft_small", str(tmp_path / "raft.pth")).raft.state_dict(), raft.state_dict())


# ---- 5. Heads and norms ----------------------------------------------------------------------------------------------

def test_detection_has_the_norm_of_the_tokens(tmp_path):
    for file, classes in (("encoder", 0), ("classifier", 3)):                   # of a classifier it is new, and trained
        save_ours(tmp_path / file, vit := tiny(classes))
        network = network_of(tmp_path / file, "finetune", data="ava")
        assert torch.equal(network.norm.weight, torch.ones(96) if classes else vit.norm.weight)
        assert isinstance(network.fc_norm, torch.nn.Identity)
        save_ours(tmp_path / "tuned", network)
        assert same(network_of(tmp_path / "tuned", "test", data="ava").state_dict(), network.state_dict())


@pytest.mark.parametrize("mode", ["extract", "test", "export"])
def test_a_norm_that_is_not_in_the_file_is_a_message(tmp_path, mode):
    outputs, name = (0, "norm.weight") if mode == "extract" else (3, "fc_norm.weight")
    vit = tiny(outputs)
    save_ours(tmp_path / "file", vit, model={k: x for k, x in vit.state_dict().items() if k != name})
    assert f"missing ['{name} (96,)']" in error_of(network_of, tmp_path / "file", mode, outputs, NAMES)


@pytest.mark.parametrize("mode", ["finetune", "linear"])
@pytest.mark.parametrize("classes", [NAMES, ["a", "b", "c"], NAMES[::-1]])
def test_a_head_is_kept_only_for_the_same_classes(tmp_path, mode, classes):
    save_ours(tmp_path / "file", vit := tiny(3))
    network = network_of(tmp_path / "file", mode, 3, classes)
    for layer in ("weight", "bias"):
        assert torch.equal(getattr(network.head, layer), getattr(vit.head, layer)) == (classes == NAMES)
    assert torch.equal(network.fc_norm.weight, vit.fc_norm.weight)
    save_as("module")(tmp_path / "public", vit)                                 # of classes without names
    assert not torch.equal(network_of(tmp_path / "public", mode, 3, classes).head.weight, vit.head.weight)
    save_pretrained(tmp_path / "encoder", tiny())                               # its norm of tokens is dropped
    network = network_of(tmp_path / "encoder", mode, 3, classes)
    assert torch.equal(network.fc_norm.weight, torch.ones(96)) and "norm.weight" not in network.state_dict()


@pytest.mark.parametrize("save", [save_ours, save_as("module")])
@pytest.mark.parametrize("mode", ["test", "predict", "export"])
def test_testing_takes_every_head(tmp_path, mode, save):
    save(tmp_path / "file", vit := tiny(3))
    assert same(network_of(tmp_path / "file", mode, 3, NAMES).state_dict(), vit.state_dict())
    for other in (tiny(), tiny(5)):                                             # and does not go without
        save(tmp_path / "other", other)
        assert "other does not fit" in error_of(network_of, tmp_path / "other", mode, 3, NAMES)


# ---- 6. Mean and std of the input ------------------------------------------------------------------------------------

def test_our_own_files_and_hugging_face_s_say_what_their_networks_have_seen(tmp_path):
    network = make_backbone("r3d_18", 64, 8)
    for said in (IMAGENET, ODD):
        save_ours(tmp_path / "ours", network, backbone=network.config | said)
        assert statistics_of(network_of(tmp_path / "ours", image_size=64, frames=8)) == said
    save_huggingface(tmp_path / "hf", tiny(3))
    assert statistics_of(network_of(tmp_path / "hf")) == IMAGENET
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (tmp_path / "hf" / name).write_text(json.dumps(dict(image_mean=ODD["mean"], image_std=ODD["std"])))
        assert statistics_of(network_of(tmp_path / "hf")) == ODD
        (tmp_path / "hf" / name).unlink()


def test_a_run_that_goes_on_keeps_the_statistics_it_began_with(tmp_path):
    nothing = Namespace(load_state_dict=lambda _: None, state_dict=dict)
    save_ours(tmp_path / "init", ViT(**SIZES, **ODD))
    new, again = (fame.FAME(make_backbone(**SIZES), queue=8) for _ in range(2))
    assert common.resume_or_init(None, str(tmp_path / "init"), new, nothing, nothing) == 0
    checkpoint = dict(model=new.state_dict(), backbone=new.encoder.config, optimizer={}, scaler={}, step=7)
    assert common.resume_or_init(checkpoint, "", again, nothing, nothing) == 7
    assert statistics_of(new.encoder) == statistics_of(again.encoder) == ODD


def watch(vit):
    """A list that gets the patches (B, n, 3, -1) that the encoder sees."""
    seen = []
    vit.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].unflatten(-1, (3, -1))))
    return seen


def shows_grey(seen):
    """Whether all of seen, each (..., 3, n), are grey 0.2, normalised by ODD."""
    expected = ((0.2 - torch.tensor(ODD["mean"])) / torch.tensor(ODD["std"]))[:, None]
    return bool(seen) and all(torch.allclose(x, expected.expand_as(x), atol=1e-5) for x in seen)


@torch.no_grad()
@pytest.mark.parametrize("method", ["mofo", "mme", "fame", "mcl", "modist"])
def test_each_method_normalizes_by_its_network_s_statistics(method, monkeypatch):
    for script in (fame, mcl, modist):
        monkeypatch.setattr(script, "colour_jitter", lambda clips, *_, **__: clips)
    vit, grey = ViT(**SIZES, **ODD), torch.full((4, 3, 10, 32, 32), 51, dtype=torch.uint8)      # 0.2 everywhere
    if method in ("mofo", "mme"):
        sizes = SIZES | ODD | DECODER
        model = mofo.MOFO(None, 0.5, None, **sizes) if method == "mofo" else mme.MME(None, "pixel", 2, 1, 0.5, **sizes)
        views = watch(model.encoder)
        model(grey[:, :, :4] / 255, torch.Generator().manual_seed(0))
    elif method == "mcl":
        views = [mcl.MCL(vit, None, 10, queue=8).view(grey, torch.zeros(4, 32, 32))[0].flatten(2)]
    elif method == "fame":
        views = [view.flatten(2) for view in fame.FAME(vit, queue=8).views(grey)]
    else:
        views = [view.flatten(2) for view in modist.MoDist(vit, None, None, queue=8).inputs(grey)[0]]
    assert shows_grey(views)


@torch.no_grad()
def test_fine_tuning_and_testing_normalize_by_them():
    vit, grey = tiny(3, **ODD), torch.full((2, 3, 4, 32, 32), 51, dtype=torch.uint8)
    cfg, seen = finetune.Config(randaugment="none", erasing=0.0, mixup=0.0, cutmix=0.0), watch(vit)
    model = finetune.Classifier(vit, [3], cfg, None).eval()
    model(grey, torch.tensor([0, 1]))
    model.scores(grey)
    torch.testing.assert_close(common.unnormalize(common.normalize(grey, vit.config), vit.config), grey / 255)
    vit.head = torch.nn.Linear(96, 80)
    people = dict(boxes=torch.tensor([[0, 0, 9, 9.0]]), actions=torch.ones(1, 80), count=torch.tensor([1, 0]))
    finetune.Detector(vit, cfg)(dict(clips=grey, **people), None)
    assert len(seen) == 3 and shows_grey(seen)


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, dict(image_size=48, patch_size=16, tubelet_size=4, dim=36, depth=3, heads=6)])
def test_transformers_computes_our_logits(tmp_path, change):
    transformers = pytest.importorskip("transformers")
    vit = small_vit(3, **change)
    export_huggingface(vit, NAMES, tmp_path)
    model = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path).eval()
    x = torch.randn(2, 3, 4, vit.config["image_size"], vit.config["image_size"])
    torch.testing.assert_close(model(x.transpose(1, 2)).logits, vit(x), atol=1e-4, rtol=0)
    assert vit(x).std() > 0.1 and model.config.id2label == dict(enumerate(NAMES))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    frames = processor([np.full((40, 64, 3), 51, np.uint8)] * 4, return_tensors="np")["pixel_values"]
    grey = (0.2 - torch.tensor(IMAGENET["mean"])) / torch.tensor(IMAGENET["std"])
    expected = grey.view(3, 1, 1).expand(x[:1].transpose(1, 2).shape)
    torch.testing.assert_close(torch.as_tensor(np.asarray(frames)), expected, atol=1e-5, rtol=0)
