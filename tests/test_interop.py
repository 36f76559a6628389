"""Weights of other people's files and ours in theirs: safetensors, Hugging Face, SlowFast, torchvision, timm."""
import collections
import enum
import json
import os
import re
import struct
from argparse import Namespace
from pathlib import Path, PosixPath

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import common
import fame
import finetune
import mcl
import mme
import modist
import mofo
from common import (UserError, ViT, export_huggingface, load_file, load_weights, make_backbone, read_safetensors,
                    write_safetensors)
from mofo import MaskedAutoencoder

SIZES = dict(image_size=32, frames=4, patch_size=8, tubelet_size=2, dim=48, depth=2, heads=4)
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
KINETICS = dict(mean=(0.43216, 0.394666, 0.37645), std=(0.22803, 0.22145, 0.216989))
SLOWFAST = dict(mean=(0.45, 0.45, 0.45), std=(0.225, 0.225, 0.225))
ODD = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
DECODER = dict(decoder_dim=24, decoder_depth=2, decoder_heads=2)
NAMES = ["brush hair", "Kitchen: \"put\"", "zwölf"]
WEIRD = {"half": torch.float16, "brain": torch.bfloat16, "double": torch.float64, "long": torch.int64, "int": torch.int32,
         "short": torch.int16, "signed": torch.int8, "byte": torch.uint8, "bool": torch.bool, "single": torch.float32}


def error_of(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@torch.no_grad()
def randomized(model):
    """No tensor stays 0 or 1: what is dropped, exchanged or left new is then seen in the outputs."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * (0.15 if p.ndim > 1 else 0.5) + (name.endswith("norm.weight")))
    return model.eval()


def small_vit(classes):
    return ViT(**SIZES, num_classes=classes)


def autoencoder():
    return MaskedAutoencoder(**SIZES, **DECODER)


def clips(seed=0, B=2):
    return torch.randn(B, 3, 4, 32, 32, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def weird_tensors():
    generator = torch.Generator().manual_seed(0)
    tensors = {name: (torch.randn(3, 5, generator=generator) * 50).abs().to(dtype) for name, dtype in WEIRD.items()}
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42]).view(torch.int32)
    odd = {"a": torch.arange(7, dtype=torch.uint8), "scalar": torch.tensor(2.5), "none": torch.empty(0, 3),
           "ünï.\"code\"": torch.ones(1), "view": torch.arange(24.0).view(4, 6).T[1:, ::2],
           "bits": special, "stride": torch.arange(6.0)[::2]}
    return tensors | odd


# ---- 1. safetensors --------------------------------------------------------------------------------------------------

def test_safetensors_come_back_bit_for_bit(tmp_path):
    tensors = weird_tensors()
    write_safetensors(tmp_path / "x.safetensors", tensors)
    back = read_safetensors(tmp_path / "x.safetensors")
    assert same(back, {k: tensors[k] for k in back}) and back.keys() == tensors.keys()
    assert load_file(tmp_path / "x.safetensors")["model"].keys() == tensors.keys()


def test_the_layout_of_safetensors(tmp_path):
    tensors = {"b": torch.tensor([1, 2], dtype=torch.uint8), "w": torch.tensor([[1.5], [-2.0]])}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    raw = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0 and raw[8:9] == b"{"
    header = json.loads(raw[8:8 + length])
    assert header == {"__metadata__": {"format": "pt"}, "w": dict(dtype="F32", shape=[2, 1], data_offsets=[0, 8]),
                      "b": dict(dtype="U8", shape=[2], data_offsets=[8, 10])}
    assert raw[8 + length:] == struct.pack("<ff", 1.5, -2.0) + b"\1\2"


def test_safetensors_and_their_own_package_read_each_other(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    tensors = {k: v.contiguous() for k, v in weird_tensors().items()}
    write_safetensors(tmp_path / "ours.safetensors", tensors)
    assert same(package.load_file(tmp_path / "ours.safetensors"), tensors)
    package.save_file(tensors, tmp_path / "theirs.safetensors")                             # without __metadata__
    assert same(read_safetensors(tmp_path / "theirs.safetensors"), tensors)


def test_safetensors_without_padding_and_out_of_order(tmp_path):
    header = json.dumps({"late": dict(dtype="F32", shape=[2], data_offsets=[3, 11]),
                         "early": dict(dtype="I8", shape=[3], data_offsets=[0, 3])}).encode()
    header += b" " * (1 - len(header) % 2)                                                  # an odd length
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes([255, 0, 7]) + struct.pack("<ff", 0.1, 3))
    assert same(read_safetensors(path), {"late": torch.tensor([0.1, 3]), "early": torch.tensor([-1, 0, 7], dtype=torch.int8)})


def test_a_file_truncated_anywhere_or_continued_is_a_message(tmp_path):
    path = tmp_path / "cut.safetensors"
    write_safetensors(path, {"w": torch.randn(3, 2), "b": torch.randn(2)})
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        assert "cut.safetensors" in error_of(load_file, path)
    path.write_bytes(whole + b"\0")
    assert "cut.safetensors" in error_of(load_file, path)


@pytest.mark.parametrize("about", [
    dict(dtype="F32", shape=[2], data_offsets=[0, 12]), dict(dtype="F32", shape=[3], data_offsets=[4, 16]), {}, 7,
    dict(dtype="F32", shape=[-1, -3], data_offsets=[0, 12]), dict(dtype="C64", shape=[3], data_offsets=[0, 12]),
    dict(dtype="F32", shape=[3], data_offsets=[-12, 0]), dict(dtype="F32", shape=[10**12], data_offsets=[0, 4 * 10**12]),
    dict(dtype="F32", shape=[3.0], data_offsets=[0, 12]), dict(dtype="F32", shape=[2], data_offsets=[0, 8]),
    dict(dtype="F32", shape=[3], data_offsets=[0])])
def test_a_header_that_lies_is_a_message(tmp_path, about):
    header = json.dumps({"w": about}).encode()
    path = tmp_path / "lie.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    assert "lie.safetensors" in error_of(load_file, path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pickle_is_refused_under_either_name(tmp_path, name):
    torch.save({"w": torch.ones(2), "evil": Malicious(tmp_path / "owned")}, tmp_path / name)
    assert name in error_of(load_file, tmp_path / name) and name in error_of(load_file, tmp_path)
    assert not (tmp_path / "owned").exists()


def test_what_is_not_there_is_a_message(tmp_path):
    for name in ("gone.safetensors", "gone.pth"):
        assert f"{name}: no such checkpoint" in error_of(load_file, tmp_path / name)
    assert "model.safetensors" in error_of(load_file, tmp_path) and str(tmp_path) in error_of(load_file, tmp_path)
    assert "gone" in error_of(load_weights, ViT(**SIZES), str(tmp_path / "gone"))


# ---- 2. Names --------------------------------------------------------------------------------------------------------

def huggingface_names(state, prefix):
    """By hand, from the specification: {our name: tensor} -> {their name: tensor} as published, q_bias and v_bias."""
    layer = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
             "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    outer = {"patch_embed.proj": prefix + "embeddings.patch_embeddings.projection", "norm": prefix + "layernorm",
             "head": "classifier", "fc_norm": "fc_norm"}
    out = {}
    for name, x in state.items():
        coder = re.match(r"(encoder\.|)blocks\.|decoder\.blocks\.", name)
        stem, kind = name.rpartition(".")[::2]
        if coder:
            layers = "decoder.decoder_layers" if name.startswith("decoder") else prefix + "encoder.layer"
            number, part = name[coder.end():].split(".", 1)
            if part == "attn.qkv.weight":
                D = x.shape[1]
                for i, which in enumerate(("query", "key", "value")):
                    out[f"{layers}.{number}.attention.attention.{which}.weight"] = x[i * D:(i + 1) * D].clone()
            elif part in ("attn.q_bias", "attn.v_bias"):
                out[f"{layers}.{number}.attention.attention.{kind}"] = x
            else:
                out[f"{layers}.{number}.{layer[part.rsplit('.', 1)[0]]}.{kind}"] = x
        elif not name.startswith(("decoder", "encoder_to", "mask")):
            out[f"{outer[stem.removeprefix('encoder.')]}.{kind}"] = x
        else:
            out[name] = x
    return out


def renamed(theirs):
    """The biases' names in the memory of transformers 5."""
    return {k.replace("q_bias", "query.bias").replace("v_bias", "value.bias"): x for k, x in theirs.items()}


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_our_names_to_theirs_and_back_is_loss_free(tmp_path, classes, dtype):
    vit = randomized(small_vit(classes)).to(dtype)
    export_huggingface(vit, NAMES[:classes], tmp_path / "hf")
    content = load_file(tmp_path / "hf")
    theirs = huggingface_names(vit.state_dict(), "videomae." if classes else "")
    new = renamed({k: x for k, x in theirs.items() if k.endswith("_bias")})
    assert len(new) == 2 * SIZES["depth"] and same(content["model"], {k: (theirs | new)[k] for k in content["model"]})
    assert content["model"].keys() == (theirs | new).keys()
    assert content["backbone"] == vit.config and content.get("classes", []) == NAMES[:classes]
    again = common.convert_names(content["model"], vit.state_dict())
    assert again.keys() == vit.state_dict().keys() and same(again, {k: vit.state_dict()[k] for k in again})


@pytest.mark.parametrize("biases, form", [("old", "folder"), ("new", "safetensors"), ("both", "bin")])
@pytest.mark.parametrize("target", ["vit", "classifier", "autoencoder"])
@pytest.mark.parametrize("source", ["classifier", "encoder", "autoencoder"])
def test_every_file_of_theirs_fits_every_network_of_ours(tmp_path, source, target, form, biases):
    model = {"classifier": small_vit(3), "encoder": small_vit(0), "autoencoder": autoencoder()}
    ours = randomized(model[source]).state_dict()
    theirs = huggingface_names(ours, "" if source == "encoder" else "videomae.")
    if biases != "old":
        new = renamed(theirs)
        theirs = new if biases == "new" else new | theirs
    if form == "bin":
        torch.save(theirs, tmp_path / "pytorch_model.bin")
    else:
        write_safetensors(tmp_path / "model.safetensors", theirs)
    path = tmp_path / {"folder": "", "safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[form]
    network = {"classifier": small_vit(3), "vit": small_vit(0), "autoencoder": autoencoder()}[target]
    fresh = {k: x.clone() for k, x in network.state_dict().items()}
    report, got = load_weights(network, path), network.state_dict()
    plain = {k.removeprefix("encoder."): x for k, x in ours.items()}
    assert set(report.loaded) == {k for k in got if k.removeprefix("encoder.") in plain}
    for name, x in got.items():
        assert torch.equal(x, plain[name.removeprefix("encoder.")] if name in report.loaded else fresh[name]), name
    assert sum("blocks." in k for k in report.loaded) >= 13 * 2                             # nothing of a block is left new
    assert len(report.loaded) + len(report.unexpected) == len(ours)


def test_a_file_of_theirs_without_biases_or_of_other_sizes_is_refused(tmp_path):
    theirs = huggingface_names(randomized(small_vit(3)).state_dict(), "videomae.")
    write_safetensors(tmp_path / "model.safetensors", {k: x for k, x in theirs.items() if not k.endswith("_bias")})
    assert "q_bias" in error_of(load_weights, small_vit(0), tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {k: x for k, x in theirs.items() if "1.attention.attention.key" not in k})
    assert "blocks.1.attn.qkv.weight" in error_of(load_weights, small_vit(0), tmp_path)
    write_safetensors(tmp_path / "model.safetensors", theirs)
    assert "(48, 3, 2, 8, 8)" in error_of(load_weights, ViT(**{**SIZES, "dim": 24}), tmp_path)


# ---- 3. Hugging Face's config ----------------------------------------------------------------------------------------

CONFIG = dict(model_type="videomae", image_size=32, num_frames=4, patch_size=8, tubelet_size=2, hidden_size=48,
              num_hidden_layers=2, num_attention_heads=4)


@pytest.mark.parametrize("change, heads", [({}, 4), (dict(hidden_size=384, num_attention_heads=16), 6),
                                           (dict(hidden_size=384, num_attention_heads=6), 6), (dict(num_attention_heads=16), 16)])
def test_the_config_next_to_the_weights_tells_the_network(tmp_path, change, heads):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change | {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}))
    write_safetensors(tmp_path / "model.safetensors", {"w": torch.ones(1)})
    content = load_file(tmp_path / "model.safetensors")
    expected = SIZES | dict(dim=(CONFIG | change)["hidden_size"], heads=heads, norms=()) | IMAGENET
    assert content["backbone"] == expected and "classes" not in content


def test_classes_are_in_the_order_of_their_numbers(tmp_path):
    labels = {str(i): f"class {i}" for i in (10, 2, 0, 1, 3, 11, 4, 5, 6, 7, 8, 9)}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"id2label": labels}))
    torch.save({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert load_file(tmp_path)["classes"] == [f"class {i}" for i in range(12)]


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({k: v for k, v in CONFIG.items() if k != "hidden_size"}), "\xff",
                                  json.dumps(CONFIG | dict(image_size=[32, 48])), json.dumps(CONFIG | {"id2label": {"1": "a"}})])
def test_a_damaged_config_is_a_message(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    write_safetensors(tmp_path / "model.safetensors", {"w": torch.ones(1)})
    assert "config.json" in error_of(load_file, tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "last.pt", "pytorch_model.bin"])
def test_a_config_of_something_else_changes_nothing(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(dict(method="mofo", model="vit_base")))
    tensors = {"w": torch.ones(1)}
    write_safetensors(tmp_path / name, tensors) if name.endswith("safetensors") else torch.save(tensors, tmp_path / name)
    content = load_file(tmp_path / name)
    assert same(content["model"], tensors) and content["backbone"] == dict(norms=(), **IMAGENET) and len(content) == 2


@pytest.mark.parametrize("classes", [0, 3])
def test_what_is_written_next_to_the_weights(tmp_path, classes):
    folder = tmp_path / "new" / "folder"
    export_huggingface(small_vit(classes), NAMES[:classes], folder)
    config, processor = (json.loads((folder / f"{name}config.json").read_text()) for name in ("", "preprocessor_"))
    labels = dict(id2label={"0": NAMES[0], "1": NAMES[1], "2": NAMES[2]}, label2id={NAMES[0]: 0, NAMES[1]: 1, NAMES[2]: 2})
    assert config == CONFIG | (labels if classes else {}) | dict(
        architectures=["VideoMAEForVideoClassification" if classes else "VideoMAEModel"], num_channels=3, intermediate_size=192,
        hidden_act="gelu", hidden_dropout_prob=0, attention_probs_dropout_prob=0, initializer_range=0.02, layer_norm_eps=1e-6,
        qkv_bias=True, use_mean_pooling=bool(classes), norm_pix_loss=True)
    assert processor == dict(
        image_processor_type="VideoMAEImageProcessor", do_resize=True, size={"shortest_edge": 32}, resample=2,
        do_center_crop=True, crop_size={"height": 32, "width": 32}, do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])


def test_our_own_file_next_to_their_config_keeps_its_sizes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save(dict(model={"w": torch.ones(1)}, backbone=SIZES | dict(dim=96)), tmp_path / "last.pt")
    assert load_file(tmp_path / "last.pt")["backbone"] == SIZES | dict(dim=96, norms=()) | IMAGENET


def test_what_is_no_vit_or_has_other_classes_or_no_place_is_a_message(tmp_path):
    assert "ViT" in error_of(export_huggingface, make_backbone("r3d_18", 32, 4, 2), NAMES[:2], tmp_path / "a")
    assert "3" in error_of(export_huggingface, small_vit(3), NAMES[:2], tmp_path / "a") and not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    assert "file" in error_of(export_huggingface, small_vit(3), NAMES, tmp_path / "file")


# ---- 4. Other networks -----------------------------------------------------------------------------------------------

def test_the_classifier_of_torchvision_s_files_is_our_head(tmp_path):
    public = torchvision.models.video.r2plus1d_18(num_classes=5).eval()
    torch.save(public.state_dict(), tmp_path / "r2plus1d_18.pth")
    network = make_backbone("r2plus1d_18", 32, 4, 5).eval()
    report = load_weights(network, tmp_path / "r2plus1d_18.pth", "all")
    assert not report.missing and not report.unexpected
    with torch.no_grad():
        torch.testing.assert_close(network(clips(B=1)), public(clips(B=1)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prefix, head", [("", "head."), ("module.", "module.head."), ("sfc.", "sfc.fc."),
                                          ("module.backbone.", "module.backbone.head."),
                                          ("module.encoder_q.", "module.encoder_q.fc.")])
def test_only_a_whole_network_s_fc_is_a_head(prefix, head):
    state = {prefix + "fc.weight": 1, prefix + "fc.bias": 2, prefix + "fc.0.weight": 3}     # MoCo's is a projection
    assert common.convert_names(state, {}) == {head + "weight": 1, head + "bias": 2, prefix + "fc.0.weight": 3}


def test_names_and_shapes_of_other_networks_stay():
    state = {k: torch.ones(2, 3, 8, 8) for k in ("features.5.branch1.0.0.weight", "a.norm.weight", "x.output.dense.weight",
                                                 "patch_embed.proj.weight")}               # S3D's, for one
    assert same(common.convert_names(state, {}), state)


def slowfast_name(name):
    """By hand: our slow_r50's name -> PySlowFast's."""
    part = name.split(".")
    if part[0] == "stem":
        return f"s1.pathway0_stem.{part[1][:-1]}.{part[2]}"
    inner = {"conv1": "branch2.a", "conv2": "branch2.b", "conv3": "branch2.c", "bn1": "branch2.a_bn", "bn2": "branch2.b_bn",
             "bn3": "branch2.c_bn", "downsample.0": "branch1", "downsample.1": "branch1_bn"}
    return f"s{int(part[0][5:]) + 1}.pathway0_res{part[1]}.{inner['.'.join(part[2:-1])]}.{part[-1]}"


@pytest.mark.parametrize("prefix", ["", "encoder_q.", "module.encoder_q."])
def test_maclr_s_files_fit_slow_r50(tmp_path, prefix):
    network = make_backbone("slow_r50", 32, 8, width=0.125)
    ours = {k: torch.randn(x.shape) if x.is_floating_point() else x for k, x in network.state_dict().items()}
    theirs = {prefix + slowfast_name(k): x for k, x in ours.items()}
    assert len(theirs) == len(ours) and prefix + "s3.pathway0_res0.branch1_bn.weight" in theirs
    theirs |= {prefix + "s2.pathway1_res0.branch2.a.weight": torch.ones(2), prefix + "head.projection.weight": torch.ones(2)}
    torch.save(dict(model_state=theirs, cfg="TRAIN: ..."), tmp_path / "maclr.pyth")
    report = load_weights(network, tmp_path / "maclr.pyth")
    assert not report.missing and len(report.unexpected) == 2 and same(network.state_dict(), ours)


@pytest.mark.parametrize("wrapper, prefix", [("state_dict", "module.encoder_q."), ("model", "module.backbone.")])
def test_wrapped_convolutional_networks(tmp_path, wrapper, prefix):
    network = make_backbone("r2plus1d_50", 32, 8, width=0.0625)
    ours = {k: torch.randn(x.shape) if x.is_floating_point() else x for k, x in network.state_dict().items()}
    torch.save({wrapper: {prefix + k: x for k, x in ours.items()}}, tmp_path / "file.pth")
    assert not load_weights(network, tmp_path / "file.pth").missing and same(network.state_dict(), ours)


def test_an_image_vit_computes_the_same_attention_and_embedding(tmp_path):
    D, vit = SIZES["dim"], small_vit(3)
    state = {k: torch.randn(x.shape) * 0.2 for k, x in vit.state_dict().items() if not k.endswith(("q_bias", "v_bias"))}
    state |= {f"blocks.{i}.attn.qkv.bias": torch.randn(3 * D) for i in range(2)}
    state |= {"patch_embed.proj.weight": torch.randn(D, 3, 8, 8), "head.weight": torch.randn(1000, D),
              "head.bias": torch.randn(1000), "cls_token": torch.randn(1, 1, D), "pos_embed": torch.randn(1, 17, D)}
    torch.save(state, tmp_path / "timm.pth")
    report = load_weights(vit, tmp_path / "timm.pth")
    assert set(report.unexpected) == {"cls_token", "pos_embed", "head.weight", "head.bias"}
    assert set(report.missing) == {"head.weight", "head.bias"}
    with torch.no_grad():
        x, attention = torch.randn(2, 7, D), vit.blocks[1].attn
        q, k, v = F.linear(x, state["blocks.1.attn.qkv.weight"], state["blocks.1.attn.qkv.bias"]).chunk(3, -1)
        heads = []
        for h in range(4):                                                                  # with the key bias
            s = slice(12 * h, 12 * h + 12)
            heads.append((q[..., s] @ k[..., s].transpose(1, 2) / 12**0.5).softmax(-1) @ v[..., s])
        expected = F.linear(torch.cat(heads, -1), state["blocks.1.attn.proj.weight"], state["blocks.1.attn.proj.bias"])
        torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-4)
        image = torch.randn(1, 3, 32, 32)
        expected = F.conv2d(image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], 8)
        still = image[:, :, None].expand(-1, -1, 2, -1, -1)
        torch.testing.assert_close(vit.patch_embed.proj(still)[:, :, 0], expected, atol=1e-5, rtol=1e-4)


# ---- 5. Norms --------------------------------------------------------------------------------------------------------

def network_of(path, mode="extract", outputs=0, classes=None, **settings):
    """What finetune.py makes of a file, and what the file says."""
    network, content = finetune.build_network(finetune.Config(init=str(path), mode=mode, **settings), outputs, classes)
    return network.eval(), content


def tiny(classes=0, **settings):
    """vit_tiny at 32 pixels: files that do not say their sizes can be named."""
    return randomized(make_backbone("vit_tiny", 32, 4, classes, **settings))


def save_ours(path, vit, **change):
    torch.save(dict(model=vit.state_dict(), backbone=vit.config, classes=NAMES, config=dict(mode="finetune")) | change, path)


def save_before(path, vit):
    """Ours, as written when the config had only sizes."""
    save_ours(path, vit, backbone={k: x for k, x in vit.config.items() if k not in ("norms", "mean", "std")})


def save_pretrained(path, vit, wrap=lambda state: dict(model=state, args=Namespace(lr=1))):
    """VideoMAE's pre-training: an encoder among other things that have norms, too."""
    mae = {f"encoder.{k}": x for k, x in vit.state_dict().items()}
    other = {f"decoder.{k}": torch.randn(24) for k in ("norm.weight", "norm.bias", "blocks.0.norm1.weight")}
    torch.save(wrap(mae | other | {"mask_token": torch.randn(1, 1, 24)}), path)


def save_moco(path, vit):
    state = {f"module.encoder_q.{k}": x for k, x in vit.state_dict().items()}
    keys = {f"module.encoder_k.{k}": torch.randn_like(x) for k, x in vit.state_dict().items()}
    torch.save(dict(state_dict=state | keys | {"module.queue": torch.zeros(3, 4)}, arch="vit"), path)


def save_huggingface(path, vit, prefix="videomae."):
    """A folder of theirs, by hand."""
    path.mkdir()
    write_safetensors(path / "model.safetensors", huggingface_names(vit.state_dict(), prefix))
    sizes = {theirs: vit.config[ours] for ours, theirs in common.SIZES.items()}
    (path / "config.json").write_text(json.dumps(sizes | dict(model_type="videomae", use_mean_pooling="norm" not in vit.config["norms"])))


KINDS = {   # norms of the network in the file, whether it has a head, how it is written
    "ours": (("norm",), 0, save_ours), "ours, fine-tuned": (("fc_norm",), 3, save_ours),
    "ours, from before": (("norm",), 0, save_before), "ours, fine-tuned, from before": (("fc_norm",), 3, save_before),
    "ours, pre-training": (("norm",), 0, lambda path, vit: save_pretrained(path, vit, lambda state: dict(model=state, backbone=vit.config))),
    "VideoMAE": (("norm",), 0, save_pretrained),
    "VideoMAE, fine-tuned": (("fc_norm",), 3, lambda path, vit: torch.save(dict(module=vit.state_dict()), path)),
    "MoCo": (("norm",), 0, save_moco), "without": ((), 0, lambda path, vit: torch.save(vit.state_dict(), path)),
    "Hugging Face": (("norm",), 0, save_huggingface), "Hugging Face, classifier": (("fc_norm",), 3, save_huggingface),
    "Hugging Face, mean pooling": ((), 0, lambda path, vit: save_huggingface(path, vit, "")),
    "export": (("norm",), 0, lambda path, vit: export_huggingface(vit, [], path)),
    "export, classifier": (("fc_norm",), 3, lambda path, vit: export_huggingface(vit, NAMES, path)),
    "export, mean pooling": ((), 0, lambda path, vit: export_huggingface(vit, [], path)),
}


@torch.no_grad()
@pytest.mark.parametrize("mode", ["extract", "linear"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_what_the_head_of_the_file_gets(tmp_path, kind, mode):
    norms, classes, save = KINDS[kind]
    vit = tiny(classes, norms=norms)
    save(tmp_path / "file", vit)
    network, content = network_of(tmp_path / "file", mode, image_size=32, frames=4, model="vit_tiny")
    assert set(network.config["norms"]) == set(norms) == set(content["backbone"]["norms"])
    norm = {"norm": lambda x: vit.norm(x).mean(1), "fc_norm": lambda x: vit.fc_norm(x.mean(1)), "": lambda x: x.mean(1)}["".join(norms)]
    x = common.patchify(clips(), 16, 2)
    x = vit.patch_embed(x) + vit.positions
    for block in vit.blocks:
        x = block(x)
    torch.testing.assert_close(network(clips()), norm(x), atol=1e-5, rtol=1e-4)
    others = [x.mean(1), F.layer_norm(x.mean(1), (192,)), F.layer_norm(x, (192,)).mean(1)]     # none of them passes for another
    assert sum((other - norm(x)).abs().mean() < 0.02 for other in others) == (not norms)


def test_a_new_head_gets_a_new_norm_and_the_encoder_s_is_dropped(tmp_path):
    vit = tiny()
    save_pretrained(tmp_path / "file", vit)
    for mode in ("finetune", "linear"):
        network, _ = network_of(tmp_path / "file", mode, 3, NAMES, image_size=32, frames=4, model="vit_tiny")
        assert isinstance(network.norm, torch.nn.Identity) and torch.equal(network.fc_norm.weight, torch.ones(192))
        assert not any("norm.weight" == k for k in network.state_dict())
    save_ours(tmp_path / "tuned", tuned := tiny(3))
    for mode in ("finetune", "linear"):                                                     # what is there is kept
        assert torch.equal(network_of(tmp_path / "tuned", mode, 3, NAMES)[0].fc_norm.weight, tuned.fc_norm.weight)


def test_detection_has_the_norm_of_the_tokens(tmp_path):
    save_ours(tmp_path / "file", vit := tiny())
    network, _ = network_of(tmp_path / "file", "finetune", data="ava")
    assert torch.equal(network.norm.weight, vit.norm.weight) and isinstance(network.fc_norm, torch.nn.Identity)
    save_ours(tmp_path / "tuned", network)
    again, _ = network_of(tmp_path / "tuned", "test", data="ava")
    assert same(again.state_dict(), network.state_dict())
    save_ours(tmp_path / "classifier", tiny(3))
    network, _ = network_of(tmp_path / "classifier", "finetune", data="ava")                # new, and trained
    assert torch.equal(network.norm.weight, torch.ones(192)) and isinstance(network.fc_norm, torch.nn.Identity)


@pytest.mark.parametrize("mode", ["extract", "test", "export"])
def test_a_norm_that_is_not_in_the_file_is_a_message(tmp_path, mode):
    vit, outputs = tiny(3 * (mode != "extract")), 3 * (mode != "extract")
    name = "fc_norm.weight" if outputs else "norm.weight"
    save_ours(tmp_path / "file", vit, model={k: x for k, x in vit.state_dict().items() if k != name})
    assert f"missing ['{name}']" in error_of(network_of, tmp_path / "file", mode, outputs, NAMES)


def test_only_what_hugging_face_has_is_exported(tmp_path):
    assert "fc_norm" in error_of(export_huggingface, tiny(norms=("fc_norm",)), [], tmp_path / "a") and not (tmp_path / "a").exists()


def test_export_finds_the_head_under_every_name(tmp_path, monkeypatch):
    vit = tiny(3)
    monkeypatch.setattr(finetune, "export_huggingface", lambda network, classes, out: done.append((network, classes)))
    for wrap in (lambda s: dict(module=s), lambda s: dict(state_dict={f"module.{k}": x for k, x in s.items()}), lambda s: s):
        torch.save(wrap(vit.state_dict()), tmp_path / "file")
        done = []
        finetune.export(finetune.Config(init=str(tmp_path / "file"), mode="export", model="vit_tiny", image_size=32, frames=4), tmp_path,
                        load_file(tmp_path / "file"))
        assert same(done[0][0].state_dict(), vit.state_dict()) and done[0][1] == ["0", "1", "2"]
    save_pretrained(tmp_path / "file", tiny(), lambda s: dict(model=s | {"decoder.head.weight": torch.ones(5, 24)}))
    done = []
    finetune.export(finetune.Config(init=str(tmp_path / "file"), mode="export", model="vit_tiny", image_size=32, frames=4), tmp_path,
                    load_file(tmp_path / "file"))
    assert not hasattr(done[0][0], "head")


# ---- 6. Mean and std of the input ------------------------------------------------------------------------------------

def statistics_of(network):
    return {k: network.config[k] for k in ("mean", "std")}


def prefixed(state, prefix):
    return {prefix + k: x for k, x in state.items()}


@pytest.mark.parametrize("name, prefix", [("r2plus1d_18", ""), ("r3d_18", "module.encoder_q."), ("s3d", "")])
def test_torchvision_s_files_have_seen_kinetics_colours(tmp_path, name, prefix):
    public = prefixed(getattr(torchvision.models.video, name)().state_dict(), prefix)
    torch.save(dict(state_dict=public) if prefix else public, tmp_path / "file")
    assert statistics_of(network_of(tmp_path / "file", model=name, image_size=224)[0]) == KINETICS
    network = make_backbone(name, 224, 16)                                                  # as the pre-training scripts do it
    assert statistics_of(network) == IMAGENET
    common.resume_or_init(None, str(tmp_path / "file"), network, None, None)
    assert statistics_of(network) == KINETICS
    for said, expected in (({}, IMAGENET), (ODD, ODD)):                                     # ours say what they have seen
        backbone = {k: x for k, x in network.config.items() if k not in IMAGENET} | said
        torch.save(dict(model=network.state_dict(), backbone=backbone), tmp_path / "ours")
        assert statistics_of(network_of(tmp_path / "ours")[0]) == expected


def test_slowfast_s_and_other_files_have_theirs(tmp_path):
    network = make_backbone("slow_r50", 32, 8, width=0.125)
    torch.save(dict(model_state={slowfast_name(k): x for k, x in network.state_dict().items()}), tmp_path / "maclr")
    load_weights(network, tmp_path / "maclr")
    assert statistics_of(network) == SLOWFAST
    resnet = torchvision.models.resnet50()
    torch.save(prefixed(resnet.state_dict(), "module.encoder_q."), tmp_path / "moco")
    network = make_backbone("slow_r50", 32, 8)
    load_weights(network, tmp_path / "moco")
    assert statistics_of(network) == IMAGENET
    save_pretrained(tmp_path / "videomae", tiny())
    assert load_file(tmp_path / "videomae")["backbone"] == dict(norms=("norm",), **IMAGENET)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "video_preprocessor_config.json"])
@pytest.mark.parametrize("about, expected", [
    (dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]), ODD), (dict(do_normalize=False), dict(mean=(0, 0, 0), std=(1, 1, 1))),
    (dict(image_mean=[0.2, 0.4, 0.6], image_std=[0.8, 1, 1.2], rescale_factor=2 / 255, do_normalize=True), ODD)])
def test_a_hugging_face_folder_says_its_own(tmp_path, name, about, expected):
    save_huggingface(tmp_path / "hf", tiny(3))
    assert statistics_of(network_of(tmp_path / "hf")[0]) == IMAGENET
    (tmp_path / "hf" / name).write_text(json.dumps(about))
    got = statistics_of(network_of(tmp_path / "hf")[0])
    assert {k: pytest.approx(x) for k, x in got.items()} == expected and all(type(x) is tuple for x in got.values())


@pytest.mark.parametrize("text", ["{", json.dumps(dict(image_mean=0.5, image_std=0.5)), json.dumps(dict(do_normalize=True)), "[]"])
def test_a_damaged_preprocessor_is_a_message(tmp_path, text):
    save_huggingface(tmp_path / "hf", tiny(3))
    (tmp_path / "hf" / "preprocessor_config.json").write_text(text)
    assert "preprocessor_config.json" in error_of(load_file, tmp_path / "hf")


def test_statistics_are_exported(tmp_path):
    export_huggingface(tiny(3, **ODD), NAMES, tmp_path)
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.1, 0.2, 0.3] and processor["image_std"] == [0.4, 0.5, 0.6]
    assert load_file(tmp_path)["backbone"] == tiny(3, **ODD).config


class Seen(torch.nn.Module):
    """Stands before an encoder's first layer and keeps what comes."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.inputs = layer, []

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        return self.layer(x)


def models(vit):
    """Each method around a ViT with statistics of its own, on 4 frames of 32 pixels; clips (B, 3, T, H, W) that it takes."""
    flow, sizes = common.FlowEstimator("tvl1"), {k: x for k, x in vit.config.items() if k != "norms"}
    grey = torch.full((4, 3, 4, 32, 32), 51, dtype=torch.uint8)                             # 0.2 everywhere: no augmentation shows
    both = torch.full((4, 3, 10, 32, 32), 51, dtype=torch.uint8)
    return {"mofo": lambda: (mofo.MOFO(flow, 0.5, None, **sizes, **DECODER), grey),
            "mme": lambda: (mme.MME(None, "pixel", 2, 1, 0.5, **sizes, **DECODER), grey),
            "fame": lambda: (fame.FAME(make_backbone(**vit.config), queue=8), grey),
            "mcl": lambda: (mcl.MCL(make_backbone(**vit.config), flow, 10, queue=8), both),
            "modist": lambda: (modist.MoDist(make_backbone(**vit.config), None, None, queue=8), both)}


@pytest.mark.parametrize("method", ["mofo", "mme"])
def test_masked_autoencoders_see_their_statistics_and_paint_pixels(method):
    model, grey = models(ViT(**SIZES, **ODD))[method]()
    clips01 = torch.rand(4, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    x = torch.tensor(ODD["mean"]).view(3, 1, 1, 1), torch.tensor(ODD["std"]).view(3, 1, 1, 1)
    expected = common.patchify((clips01 - x[0]) / x[1], 8, 2)
    seen = model.encoder.patch_embed = Seen(model.encoder.patch_embed)
    model(clips01, torch.Generator().manual_seed(0))
    patches = seen.inputs[0]                                                                # (B, visible, P)
    for b in range(4):
        near = torch.cdist(patches[b].double(), expected[b].double())
        assert near.amin(1).max() < 1e-4 and near.argmin(1).unique().numel() == len(patches[b])
    if method == "mofo":                                                                    # the target knows no statistics
        targets = []
        real = mofo.pixel_target
        mofo.pixel_target = lambda x, *sizes: targets.append(x) or real(x, *sizes)
        try:
            model(clips01, torch.Generator().manual_seed(0))
        finally:
            mofo.pixel_target = real
        torch.testing.assert_close(targets[0], clips01, atol=1e-5, rtol=0)


@torch.no_grad()
def test_hog_of_mme_is_of_the_network_s_input():
    sizes = SIZES | ODD
    model = mme.MME(None, "hog", 2, 1, 0.5, **sizes, **DECODER)
    clips01 = torch.rand(1, 3, 4, 32, 32)
    plain = mme.MME(None, "hog", 2, 1, 0.5, **SIZES, **DECODER).targets(clips01)[0]["shape"].unflatten(-1, (3, 36))
    ratio = torch.tensor(IMAGENET["std"]) / torch.tensor(ODD["std"])
    torch.testing.assert_close(model.targets(clips01)[0]["shape"].unflatten(-1, (3, 36)), plain * ratio[:, None], atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("method", ["fame", "mcl", "modist"])
def test_views_have_the_network_s_statistics(method, monkeypatch):
    monkeypatch.setattr(dict(fame=fame, mcl=mcl, modist=modist)[method], "colour_jitter", lambda clips, *_, **__: clips)
    model, grey = models(ViT(**SIZES, **ODD))[method]()
    if method == "mcl":
        views = [model.view(grey, torch.zeros(4, 32, 32))[0]]
    else:
        views = model.views(grey) if method == "fame" else model.inputs(grey)[0]
    expected = ((0.2 - torch.tensor(ODD["mean"])) / torch.tensor(ODD["std"])).view(3, 1, 1, 1)
    for view in views:
        torch.testing.assert_close(view, expected.expand_as(view), atol=1e-5, rtol=0)
    assert len(views) == (1 if method == "mcl" else 2)


@torch.no_grad()
def test_fine_tuning_and_testing_use_them(monkeypatch):
    vit = tiny(3, **ODD)
    seen, x = [], torch.full((2, 3, 4, 32, 32), 51, dtype=torch.uint8)
    monkeypatch.setattr(vit, "pooled", lambda clips: seen.append(clips) or torch.zeros(len(clips), 192))
    monkeypatch.setattr(vit, "forward_map", lambda clips: seen.append(clips) or torch.zeros(len(clips), 192, 2, 2, 2))
    plain = dict(randaugment="none", erasing=0.0, mixup=0.0, cutmix=0.0)
    model = finetune.Classifier(vit, [3], finetune.Config(**plain)).eval()
    model(x, torch.tensor([0, 1]))
    model.scores(x)
    vit.head = torch.nn.Linear(192, 80)
    detector = finetune.Detector(vit, finetune.Config(**plain))
    detector(dict(clips=x, boxes=torch.tensor([[0, 0, 9, 9.0]]), actions=torch.ones(1, 80), count=torch.tensor([1, 0])), None)

    def run_inference(compute, items, *_):
        compute(x, 2)
        return {0: torch.zeros(1)}, []
    monkeypatch.setattr(finetune, "run_inference", run_inference)
    finetune.extract(vit, [0], finetune.Config(), None, (1, 1), "")
    test = Namespace(items=[Namespace(boxes=torch.zeros(1, 4).numpy(), frame="a", scores=torch.ones(1).numpy())], classes=[""] * 80,
                     ground_truth=dict(frame=["a"], box=np.zeros((1, 4)), label=np.ones(1)), class_ids=[1], excluded=())
    monkeypatch.setattr(finetune, "run_inference", lambda compute, *_: ({0: compute(dict(
        clips=x, boxes=torch.tensor([[0, 0, 9, 9.0]]), count=torch.tensor([1, 0])), 2)[0]}, []))
    finetune.detect(detector, test, finetune.Config(), None)
    assert len(seen) == 5
    expected = ((0.2 - torch.tensor(ODD["mean"])) / torch.tensor(ODD["std"])).view(3, 1, 1, 1)
    for clips in seen:
        torch.testing.assert_close(clips, expected.expand_as(clips), atol=1e-5, rtol=0)


def test_a_run_that_goes_on_keeps_the_statistics_it_began_with(tmp_path):
    model, _ = models(ViT(**SIZES, **ODD))["fame"]()
    nothing = Namespace(load_state_dict=lambda _: None)
    checkpoint = dict(model=model.state_dict(), backbone=model.encoder.config, optimizer={}, scaler={}, step=7)
    torch.save(checkpoint, tmp_path / "last.pt")
    again = fame.FAME(make_backbone(**SIZES), queue=8)                                      # as main makes it
    assert common.resume_or_init(load_file(tmp_path / "last.pt"), "", again, nothing, nothing) == 7
    assert statistics_of(again.encoder) == ODD
    save_ours(tmp_path / "init", ViT(**SIZES, **ODD))
    new = fame.FAME(make_backbone(**SIZES), queue=8)
    assert common.resume_or_init(None, str(tmp_path / "init"), new, nothing, nothing) == 0 and statistics_of(new.encoder) == ODD


# ---- 7. Heads, sizes, contents ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["finetune", "linear"])
@pytest.mark.parametrize("classes, kept", [(NAMES, True), (["a", "b", "c"], False), (NAMES[::-1], False)])
def test_a_head_is_kept_only_for_the_same_classes(tmp_path, mode, classes, kept, capsys):
    save_ours(tmp_path / "file", vit := tiny(3))
    network, _ = network_of(tmp_path / "file", mode, 3, classes)
    assert torch.equal(network.head.weight, vit.head.weight) == torch.equal(network.head.bias, vit.head.bias) == kept
    assert torch.equal(network.fc_norm.weight, vit.fc_norm.weight) and network.head.weight.abs().max() < 0.01 or kept
    assert ("new here ['head.weight', 'head.bias']" in capsys.readouterr().out) != kept
    torch.save(dict(module=vit.state_dict()), tmp_path / "public")                          # of classes without names
    network, _ = network_of(tmp_path / "public", mode, 3, classes, image_size=32, frames=4, model="vit_tiny")
    assert not torch.equal(network.head.weight, vit.head.weight)


@pytest.mark.parametrize("mode", ["test", "predict", "export"])
def test_testing_takes_every_head(tmp_path, mode):
    torch.save(dict(module=(vit := tiny(3)).state_dict()), tmp_path / "public")
    network, _ = network_of(tmp_path / "public", mode, 3, NAMES, image_size=32, frames=4, model="vit_tiny")
    assert same(network.state_dict(), vit.state_dict())
    save_ours(tmp_path / "file", vit)
    assert same(network_of(tmp_path / "file", mode, 3, NAMES)[0].state_dict(), vit.state_dict())


@pytest.mark.parametrize("change, text", [(dict(heads=3), "heads 4 there, 3 here"), (dict(dim=96), "dim 48 there, 96 here"),
                                          (dict(depth=1), "depth 2 there, 1 here"), (dict(patch_size=16), "patch_size 8 there, 16 here"),
                                          (dict(tubelet_size=1), "tubelet_size 2 there, 1 here")])
def test_a_network_of_other_sizes_than_the_file_says_is_refused(tmp_path, change, text):
    for name, save in (("ours", save_ours), ("hf", save_huggingface)):
        save(tmp_path / name, small_vit(0))
        load_weights(ViT(**SIZES | dict(image_size=48, frames=8)), tmp_path / name)         # positions are not stored
        for model in (ViT(**SIZES | change), mofo.MaskedAutoencoder(**SIZES | change, **DECODER)):
            before = {k: x.clone() for k, x in model.state_dict().items()}
            message = error_of(load_weights, model, tmp_path / name)
            assert text in message and "--model" in message and same(model.state_dict(), before)


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize("thing", [
    PosixPath("/a/b"), Namespace(out=PosixPath("/a"), betas=[0.9]), np.float64(3), np.int64(3), np.bool_(True), np.zeros(3),
    np.dtype("f4"), collections.defaultdict(list, a=[1]), collections.OrderedDict(a=1), torch.Size([2]), Colour.RED,
    torch.__version__, {PosixPath("/a"): 1}], ids=lambda x: type(x).__name__)
def test_what_training_scripts_leave_in_their_files_does_no_harm(tmp_path, thing):
    torch.save(dict(model={"w": torch.arange(3.0)}, args=thing, epoch=4), tmp_path / "file")
    content = load_file(tmp_path / "file")
    assert same(content["model"], {"w": torch.arange(3.0)}) and content["epoch"] == 4


@pytest.mark.parametrize("name", ["pathlib WindowsPath", "pathlib._local PosixPath", "numpy.core.multiarray scalar", "omegaconf DictConfig"])
def test_names_of_other_machines_and_versions_do_no_harm(tmp_path, name, monkeypatch):
    torch.save(dict(model={"w": torch.arange(3.0)}, args=PosixPath("/a")), tmp_path / "file")
    raw = (tmp_path / "file").read_bytes()
    assert raw.count(b"cpathlib\nPosixPath\n") == 1
    module, _, kind = name.partition(" ")
    with __import__("zipfile").ZipFile(tmp_path / "file") as old, __import__("zipfile").ZipFile(tmp_path / "new", "w") as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry).replace(b"cpathlib\nPosixPath\n", f"c{module}\n{kind}\n".encode()))
    assert same(load_file(tmp_path / "new")["model"], {"w": torch.arange(3.0)})


class Harmful:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
def test_no_function_of_a_file_is_called(tmp_path, legacy):
    touch = (exec, (f"open({str(tmp_path / 'owned')!r}, 'w')",))
    for call in (touch, (eval, (touch[1][0],)), (Path.touch, (tmp_path / "owned",)), (os.mkdir, (str(tmp_path / "owned"),))):
        torch.save(dict(model={"w": torch.ones(1)}, args=Harmful(call)), tmp_path / "file", _use_new_zipfile_serialization=not legacy)
        try:
            load_file(tmp_path / "file")
        except UserError as error:
            assert "file: cannot be read" in str(error) and "weights_only" not in str(error)
        assert not (tmp_path / "owned").exists()
    torch.load(tmp_path / "file", weights_only=False)                                       # it does harm where it can
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 1, "args": Namespace(a=PosixPath("a"))},
                                  lambda s: prefixed(s, "module."), lambda s: {"state_dict": prefixed(s, "module.")}])
def test_raft_s_weights_in_every_wrapper(tmp_path, wrap):
    state = torchvision.models.optical_flow.raft_small().state_dict()
    torch.save(wrap(state), tmp_path / "raft.pth")
    assert same(common.FlowEstimator("raft_small", str(tmp_path / "raft.pth")).raft.state_dict(), state)


def test_raft_s_weights_under_other_names_are_a_message(tmp_path):
    torch.save({"module.fnet.conv1.weight": torch.ones(2)}, tmp_path / "raft.pth")         # as its authors publish them
    message = error_of(common.FlowEstimator, "raft_small", str(tmp_path / "raft.pth"))
    assert "raft.pth failed" in message and "Missing key(s) in state_dict: \"feature_encoder" in message
    assert "torchvision's raft_small" in message and "--flow tvl1" in message


# ---- 8. transformers -------------------------------------------------------------------------------------------------

def huggingface_model(kind, **change):
    """A random VideoMAE of theirs, small; layer_norm_eps as it was trained."""
    transformers = pytest.importorskip("transformers")
    known = {k: v for k, v in CONFIG.items() if k != "model_type"}
    config = transformers.VideoMAEConfig(**known | dict(intermediate_size=192, layer_norm_eps=1e-6, decoder_hidden_size=24,
                                         decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=96,
                                         num_labels=3) | change)
    return randomized(getattr(transformers, kind)(config))


def loaded(kind, folder):
    """transformers' model from a folder, nothing of it new.  5.5 to 5.12 at least have a key bias, which softmax ignores; others
    find the biases of q and v a second time, under names that they do not know."""
    transformers = pytest.importorskip("transformers")
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert all(k.endswith("attention.key.bias") for k in info["missing_keys"]) and not info["mismatched_keys"], info
    assert all(re.search(r"(query|value)\.bias$|[qv]_bias$", k) for k in info["unexpected_keys"]), info
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, dict(image_size=48, frames=6, patch_size=16, tubelet_size=3, dim=36, depth=3, heads=6)])
def test_transformers_computes_our_logits(tmp_path, change):
    vit = randomized(ViT(**SIZES | change, num_classes=3))
    export_huggingface(vit, NAMES, tmp_path)
    model, size = loaded("VideoMAEForVideoClassification", tmp_path), vit.config["image_size"]
    x = torch.randn(2, 3, vit.config["frames"], size, size)
    expected = vit(x)
    torch.testing.assert_close(model(x.transpose(1, 2)).logits, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1 and model.config.id2label == dict(enumerate(NAMES)) and model.config.label2id[NAMES[2]] == 2
    assert model.config.layer_norm_eps == 1e-6 and model.config.intermediate_size == 4 * vit.dim


@torch.no_grad()
def test_transformers_computes_our_tokens(tmp_path):
    vit = randomized(ViT(**SIZES))
    export_huggingface(vit, [], tmp_path)
    hidden = loaded("VideoMAEModel", tmp_path)(clips().transpose(1, 2)).last_hidden_state   # (B, N, D)
    torch.testing.assert_close(hidden, vit.forward_map(clips()).flatten(2).transpose(1, 2), atol=1e-4, rtol=0)


@torch.no_grad()
def test_transformers_prepares_frames_as_we_do(tmp_path):
    transformers = pytest.importorskip("transformers")
    export_huggingface(small_vit(3), NAMES, tmp_path)
    frames = [np.full((40, 64, 3), 200, np.uint8) for _ in range(4)]
    for frame in frames:
        frame[:, :12], frame[:, -12:], frame[:10, 12:-12] = 0, 0, 100                       # the crop has no 0 and all of 100
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    except ImportError as error:
        pytest.skip(str(error))
    x = torch.as_tensor(np.asarray(processor(frames, return_tensors="pt")["pixel_values"]))
    assert x.shape == (1, 4, 3, 32, 32)
    for value, rows in ((100, slice(0, 7)), (200, slice(9, 32))):
        expected = (value / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
        seen = x[0, :, :, rows, 2:-2]
        torch.testing.assert_close(seen, expected.view(3, 1, 1).expand(seen.shape), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("safe", [True, False])
def test_we_compute_their_logits(tmp_path, safe):
    model = huggingface_model("VideoMAEForVideoClassification", use_mean_pooling=True, id2label=dict(enumerate(NAMES)))
    save(model, tmp_path, safe)
    content = load_file(tmp_path)
    assert content["classes"] == NAMES
    vit = make_backbone(**content["backbone"], num_classes=3).eval()
    report = load_weights(vit, tmp_path, "all")
    assert not report.missing and all(k.endswith("key.bias") for k in report.unexpected)
    torch.testing.assert_close(vit(clips()), model(clips().transpose(1, 2)).logits, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind, pooling", [("VideoMAEModel", True), ("VideoMAEModel", False), ("VideoMAEForVideoClassification", True)])
def test_our_features_are_theirs_and_go_back(tmp_path, kind, pooling):
    model = huggingface_model(kind, use_mean_pooling=pooling)
    model.save_pretrained(tmp_path / "theirs")
    x = clips().transpose(1, 2)
    expected = getattr(model, "videomae", model)(x).last_hidden_state.mean(1)
    expected = model.fc_norm(expected) if hasattr(model, "fc_norm") else expected
    network, content = network_of(tmp_path / "theirs")
    torch.testing.assert_close(network(clips()), expected, atol=1e-4, rtol=0)
    if kind == "VideoMAEModel":
        export_huggingface(network, [], tmp_path / "ours")
        again = loaded(kind, tmp_path / "ours")
        assert again.config.use_mean_pooling == pooling
        torch.testing.assert_close(again(x).last_hidden_state.mean(1), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_we_compute_their_tokens_and_their_reconstruction(tmp_path):
    model = huggingface_model("VideoMAEForPreTraining", use_mean_pooling=False)
    model.save_pretrained(tmp_path)
    hidden = torch.zeros(2, 32, dtype=torch.bool)
    hidden[0, 5:25], hidden[1, ::2], hidden[1, 1:8:2] = True, True, True                    # 20 of 32 in both
    ours = MaskedAutoencoder(**load_file(tmp_path)["backbone"], **DECODER).eval()
    report = load_weights(ours, tmp_path, "all")
    assert not report.missing and all(k.endswith("key.bias") for k in report.unexpected)
    prediction, loss = ours(clips(), hidden)
    theirs = model(clips().transpose(1, 2), bool_masked_pos=hidden)
    torch.testing.assert_close(prediction, theirs.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, theirs.loss, atol=1e-4, rtol=0)
    vit = ViT(**SIZES).eval()
    report = load_weights(vit, tmp_path)
    assert not report.missing and all(re.match(r"decoder|encoder_to|mask|.*key\.bias", k) for k in report.unexpected)
    tokens = vit.forward_map(clips()).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, model.videomae(clips().transpose(1, 2)).last_hidden_state, atol=1e-4, rtol=0)


def save(model, folder, safe):
    """save_pretrained, or what old versions wrote."""
    model.save_pretrained(folder)
    if not safe:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
