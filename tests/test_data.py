"""Data sets as they are downloaded, the user's own videos, sampling, configuration, saving."""
import dataclasses
import importlib
import inspect
import math
import os
import re
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import mofo
from common import (Clips, Env, Item, Listing, Video, clip_indices, collate, example_clips, find_videos, item_frames,
                    make_optimizer, parse_config, plan_run, rand, save_checkpoint, step_batches)
from conftest import error_of, numbers, put, tiny_video

CPU = torch.device("cpu")


def labels(listing):
    """{file name: class name, or its number where classes have no names} of what is there"""
    classes, there = listing.classes, [item for item in listing.items if item.path not in listing.missing]
    return {Path(item.path).name: classes[item.label] if classes else item.label for item in there}


def counts(listing):
    """listed, found, missing, empty"""
    return tuple(map(int, re.findall(r"(\d+) (?:listed|found|missing|empty)", listing.summary)))


# ---- 1. The published layouts ----------------------------------------------------------------------------------------

UCF_CLASSES = ["Hammering", "HammerThrow", "HandstandPushups"]  # not the order of sorted()
UCF = {"ucfTrainTestlist/classInd.txt": "1 Hammering\r\n2 HammerThrow\r\n3 HandstandPushups\r\n",
       "ucfTrainTestlist/trainlist01.txt": "Hammering/v_Hammering_g08_c01.avi 1\r\n"
                                           "HammerThrow/v_HammerThrow_g08_c01.avi 2\r\n"
                                           "HandstandPushups/v_HandStandPushups_g08_c01.avi 3\r\n"
                                           "Hammering/v_Hammering_g09_c01.avi 1\r\n"}
UCF_TEST = {"ucfTrainTestlist/testlist01.txt": "HammerThrow/v_HammerThrow_g01_c01.avi\r\n"
                                               "HandStandPushups/v_HandstandPushups_g01_c01.avi\r\n"}
UCF_VIDEOS = [f"UCF-101/{c}/v_{f}_g{g}_c01.avi" for g in ("01", "08") for c, f in
              (("Hammering", "Hammering"), ("HammerThrow", "HammerThrow"), ("HandstandPushups", "HandStandPushups"))]
CLIMB = ["#20(a)&b+c;d@e]!_climb_u_0.avi", "_start_climb_1.avi", "-dash_climb_2.avi", "a climb 3.avi"]
HMDB = {f"testTrainMulti_7030_splits/{name}": text for name, text in {
    "climb_test_split1.txt": "".join(f"{n} {code} \n" for n, code in zip(CLIMB, (1, 2, 0, 1))),
    "climb_test_split2.txt": f"{CLIMB[2]} 1 \n", "climb_stairs_test_split1.txt": "s.avi 1 \n",
    "sword_exercise_test_split1.txt": "u.avi 1 \n", "sword_test_split1.txt": "t.avi 2 \n"}.items()}
HMDB_VIDEOS = [*(f"climb/{n}" for n in CLIMB), "climb_stairs/s.avi", "sword/t.avi", "sword_exercise/u.avi"]
HMDB_CLASSES = ["climb", "climb_stairs", "sword", "sword_exercise"]  # ids of sorted directories
K400 = ('label,youtube_id,time_start,time_end,split,is_cc\nabseiling,-3B32lodo2M,59,69,train,0\n'
        '"air drumming",_dbcJuKJQNs,40,50,train,0\n"air drumming",ab_d-fgh_jk,1.0,11.0,train,0\n'
        'zumba,00000000000,2,12,train,0\nzumba,gone0000000,2,12,train,0\n')
K400_CLASSES = ["abseiling", "air drumming", "zumba"]
K400_LABELS = {"-3B32lodo2M_000059_000069.mp4": "abseiling", "_dbcJuKJQNs_000040_000050.mp4": "air drumming",
               "ab_d-fgh_jk_000001_000011.mp4": "air drumming"}
SSV2 = {"labels": '{"Holding something next to something": "1", "Approaching something": "0", "Folding": "2"}',
        "train": '[{"id": "78687", "label": "x", "template": "Holding [something] next to [something]"},'
                 ' {"id": "5", "label": "x", "template": "Folding"}]',
        "validation": '[{"id": "36585", "template": "Approaching [something]"}]', "test": '[{"id": "1420"}]'}
SSV2_CLASSES = ["Approaching something", "Holding something next to something", "Folding"]
EPIC_HEAD = "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,narration,verb_class,noun_class\n"


def epic_row(video, start, stop, verb, noun):
    return f"{video}_0,{video[:3]},{video},00:00:{start},00:00:{stop},\"take plate, put it\",{verb},{noun}\n"


EPIC_TEST = {"EPIC_100_validation.csv": EPIC_HEAD + epic_row("P01_11", "02.00", "02.50", 2, 1)}
LAYOUTS = {     # what is there: --data, split, annotations, videos, class names, class of each video found
    "ucf101": ("ucf101", "train", {**UCF, **UCF_TEST}, [*UCF_VIDEOS, "UCF-101/Hammering/._v_Hammering_g09_c01.avi"],
               UCF_CLASSES, {"v_Hammering_g08_c01.avi": "Hammering", "v_HammerThrow_g08_c01.avi": "HammerThrow",
                             "v_HandStandPushups_g08_c01.avi": "HandstandPushups"}),
    "ucf101 test": ("ucf101", "test", {"classInd.txt": UCF["ucfTrainTestlist/classInd.txt"], **UCF_TEST},
                    UCF_VIDEOS, UCF_CLASSES, {"v_HammerThrow_g01_c01.avi": "HammerThrow",
                                              "v_HandStandPushups_g01_c01.avi": "HandstandPushups"}),
    "ucf101, paths": ("ucf101", "test", {**UCF, "testlist01.txt": "UCF-101/HammerThrow/v_HammerThrow_g01_c01.avi"},
                      UCF_VIDEOS, UCF_CLASSES, {"v_HammerThrow_g01_c01.avi": "HammerThrow"}),
    "hmdb51": ("hmdb51", "train", HMDB, HMDB_VIDEOS, HMDB_CLASSES,
               {CLIMB[0]: "climb", CLIMB[3]: "climb", "s.avi": "climb_stairs", "u.avi": "sword_exercise"}),
    "hmdb51 test": ("hmdb51", "test", HMDB, HMDB_VIDEOS, HMDB_CLASSES, {CLIMB[1]: "climb", "t.avi": "sword"}),
    "k400, CVDF": ("k400", "train", {"annotations/train.csv": K400}, [f"train/{name}" for name in K400_LABELS],
                   K400_CLASSES, K400_LABELS),
    "k400, older": ("k400", "train", {"kinetics_train.csv": K400.replace("air drumming", "air_drumming")},
                    [f"videos_train/{c.replace(' ', '_')}/{name}" for name, c in K400_LABELS.items()],
                    K400_CLASSES, K400_LABELS),
    "k400, spaces": ("k400", "test", {"val.csv": "\ufeff" + K400.replace('"air drumming",', "air drumming , ", 1)},
                     K400_LABELS, K400_CLASSES, K400_LABELS),
    "k400, an empty list": ("k400", "train", {"b/train.csv": K400, "a/kinetics_train.csv": ""},
                            K400_LABELS, K400_CLASSES, K400_LABELS),
    "k400, directories": ("k400", "test", {}, ["train_video/a/0.mp4", "val_video/a/1.mp4", "val_video/b/2.mp4"],
                          ["a", "b"], {"1.mp4": "a", "2.mp4": "b"}),
    "k400, VideoMAE": ("k400", "train", {"train.csv": "/old/-3B32lodo2M_000059_000069.mp4 0\nb c/_dbcJuKJQNs.mp4 2"},
                       ["any/-3B32lodo2M_000059_000069.mp4", "_dbcJuKJQNs.mp4"], ["0", "1", "2"],
                       {"-3B32lodo2M_000059_000069.mp4": "0", "_dbcJuKJQNs.mp4": "2"}),
    "ssv2": ("ssv2", "train", {f"labels/{name}.json": text for name, text in SSV2.items()},
             ["20bn/78687.webm", "20bn/1420.webm"], SSV2_CLASSES, {"78687.webm": SSV2_CLASSES[1]}),
    "ssv2 test": ("ssv2", "test", {f"something-something-v2-{k}.json": SSV2[k] for k in ("labels", "validation")},
                  ["36585.mp4"], SSV2_CLASSES, {"36585.mp4": SSV2_CLASSES[0]}),
    "ssv2, some classes": ("ssv2", "train", {"labels.json": '\ufeff{"Folding": "3", "Moving something": "7"}',
                                             "train.json": '[{"id": "5", "template": "Moving [something]"}]'},
                           ["5.webm"], ["Folding", "Moving something"], {"5.webm": "Moving something"}),
    "epic test": ("epic", "test", {**EPIC_TEST, "EPIC_100_verb_classes.csv": "id,key\n0,take\n1,put\n2,wash\n3,open\n"},
                  ["P01_11.MP4"], ["take", "put", "wash", "open"], {"P01_11.MP4": "wash"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layouts(tmp_path, name):
    """Annotations of the other split need not be there."""
    data, split, text, videos, classes, expected = LAYOUTS[name]
    listing = find_videos(data, put(tmp_path, text, videos), split)
    assert listing.classes == classes and labels(listing) == expected


def test_what_is_missing_or_empty_is_counted_and_named(tmp_path):
    put(tmp_path, {**UCF, "train.csv": K400, "train/00000000000_000002_000012.mp4": ""}, [*UCF_VIDEOS, *K400_LABELS])
    (tmp_path / "UCF-101/Hammering/v_Hammering_g09_c01.avi").symlink_to(tmp_path / "moved.avi")
    listing = find_videos("ucf101", tmp_path)
    assert counts(listing) == (4, 3, 1, 0) and "g09_c01" in listing.missing[0]
    listing = find_videos("k400", tmp_path)
    assert counts(listing) == (5, 3, 1, 1) and len(listing.missing) == 2 and "gone0000000" in listing.missing


def test_k400_replacement_of_a_corrupt_file_is_preferred(tmp_path):
    name = "00000000000_000002_000012.mp4"
    put(tmp_path, {"train.csv": K400}, [f"train/{name}", f"replacement/for_corrupted/{name}"])
    assert "/replacement/" in find_videos("k400", tmp_path).items[0].path


def epic(root):
    rows = [epic_row("P01_11", "01.00", "01.95", 2, 10), epic_row("P01_11", "03.00", "04.95", 10, 2),
            *(epic_row(video, "01.00", "02.00", 0, 0) for video in ("P01_12", "P01_12", "P01_13"))]
    put(root, {"csv/EPIC_100_train.csv": EPIC_HEAD + "".join(rows), **EPIC_TEST, "P01/P01_13.MP4": ""})
    tiny_video(root / "P01/videos/P01_11.MP4", 60)
    return root


@pytest.mark.parametrize("label, classes, ids", [
    ("", 11, [2, 10]), ("noun", 11, [10, 2]), ("action", ["0:0", "10:2", "2:1", "2:10"], [3, 1]),  # sorted as strings
    ("verb-noun", 22, [(2, 10), (10, 2)])])
def test_epic_labels(tmp_path, label, classes, ids):
    train, test = (find_videos("epic", epic(tmp_path), split, label) for split in ("train", "test"))
    assert [item.label for item in train.items] == ids and train.classes == test.classes
    assert train.classes == classes if label == "action" else len(train.classes) == classes


def test_epic_clips_come_from_their_segment(tmp_path):
    listing = find_videos("epic", epic(tmp_path))
    assert counts(listing) == (5, 2, 2, 1)
    assert [(item.start, item.stop) for item in listing.items] == [(1, 1.95), (3, 4.95)]
    dataset = Clips(listing.items, lambda video, item, rng: video.read(clip_indices(video, item, 4, 3, rng))[None])
    got = {i: {tuple(numbers(dataset[epoch, i][0][0])) for epoch in range(20)} for i in (0, 1)}
    assert got[0] == {(10, 13, 16, 19)}                                                 # ten frames: one start
    assert len(got[1]) > 4 and min(map(min, got[1])) == 30 and 45 < max(map(max, got[1])) <= 49


@pytest.mark.parametrize("place, root", [("some/where", "some/where"), ("disk/ucf101", ""), ("data/ucf101", "")])
def test_where_a_data_set_is_looked_for(tmp_path, monkeypatch, place, root):
    monkeypatch.delenv("VIDEO_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    put(tmp_path / place, UCF, UCF_VIDEOS)
    if place.startswith("disk"):
        monkeypatch.setenv("VIDEO_ROOT", str(tmp_path / "disk"))
    assert counts(find_videos("ucf101", root))[1] == 3


def test_ucf101_and_hmdb51_have_three_splits(tmp_path):
    lists = {f"{s}list0{k}.txt": f"Jump/v_Jump_{k}_{s}.avi 1\n" for k in "123" for s in ("train", "test")}
    lists |= {f"jump_test_split{k}.txt": f"a{k}.avi 1 \nb{k}.avi 2 \n" for k in "123"}
    put(tmp_path, {"classInd.txt": "1 Jump\n", **lists}, re.findall(r"\w+\.avi", " ".join(lists.values())))
    for fold, (split, hmdb) in product((1, 2, 3), (("train", "a"), ("test", "b"))):
        assert labels(find_videos("ucf101", tmp_path, split, fold=fold)) == {f"v_Jump_{fold}_{split}.avi": "Jump"}
        assert labels(find_videos("hmdb51", tmp_path, split, fold=fold)) == {f"{hmdb}{fold}.avi": "jump"}
    assert find_videos("ucf101", tmp_path) == find_videos("ucf101", tmp_path, fold=1)


# ---- 2. The user's own videos ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("videos, split, expected", [
    (["a/b/c/1.MP4", "a/2.webm", "3.mkv", "a/._4.mp4", "notes.txt"], "train", {"1.MP4": -1, "2.webm": -1, "3.mkv": -1}),
    (["train/cat/1.mp4", "train/dog/deep/2.mp4", "val/cat/3.mp4"], "train", {"1.mp4": "cat", "2.mp4": "dog"}),
    (["train/cat/1.mp4", "val/cat/3.mp4", "val/dog/4.mp4"], "test", {"3.mp4": "cat", "4.mp4": "dog"}),
    (["Train/cat/1.mp4", "Train/dog/2.mp4", "VAL/dog/deep/3.mp4"], "test", {"3.mp4": "dog"}),  # one class of a split
    (["train/cat/1.mp4", "val/dog/3.mp4"], "all", {"1.mp4": -1, "3.mp4": -1}),                      # train is no class
    (["train/cat/1.mp4", "val/dog/3.mp4", "val/4.mp4"], "test", {"3.mp4": -1, "4.mp4": -1}),        # not all have one
    (["dog/1.mp4", "dog/2.mp4"], "train", {"1.mp4": -1, "2.mp4": -1}),                              # one directory
    ([f"{c}/{c}{i}.mp4" for c in "ab" for i in range(7)], "test", {f"{c}{i}.mp4": c for c in "ab" for i in (1, 6)}),
    ([f"{c}/{c}{i}.mp4" for c in "ab" for i in range(2)], "train", {"a0.mp4": "a", "b0.mp4": "b"}),
    ([f"{c}/{i}.mp4" for i, c in enumerate("ab")], "all", {"0.mp4": "a", "1.mp4": "b"})])
def test_own_directories(tmp_path, videos, split, expected):
    listing = find_videos(str(put(tmp_path, {}, videos)), split=split)
    assert labels(listing) == expected and listing == find_videos(str(tmp_path), split=split)
    assert bool(listing.classes) == (-1 not in expected.values())


@pytest.mark.parametrize("suffix", ".m4v .MPG .mpeg .vob .ts .MTS .m2ts .flv .wmv .3gp .ogv".split())
def test_suffixes_of_videos(tmp_path, monkeypatch, suffix):
    put(tmp_path, {"list.txt": f"a b/1{suffix} jump\n", "a b/1.gif": "x"}, [f"a b/1{suffix}"])
    monkeypatch.chdir(tmp_path)
    for data in (".", "list.txt", f"a b/1{suffix}", tmp_path / f"a b/1{suffix}"):
        item, = find_videos(str(data)).items
        assert Path(item.path).name == f"1{suffix}" and Path(item.path).exists()


@pytest.mark.parametrize("lines, expected", [
    ("a b/1.mp4 0\nc/2.mp4 2\n", ["0", "2"]), ("a b/1.mp4,0\r\nc/2.mp4,2\r\n\r\n", ["0", "2"]),
    ("a b/1.mp4\nc/2.mp4\n", [-1, -1]), ("a b/1.mp4 jump\nc/2.mp4 fly\n", ["jump", "fly"]),
    ("a b/1.mp4,high jump\nc/2.mp4,fly\n", ["high jump", "fly"]),
    ("a b/1.mp4 300 0\nc/2.mp4 7\t2\n", ["0", "2"]), ("a b/1.mp4,300,0\nc/2.mp4, 12.5, 2\n", ["0", "2"]),
    ("a b/1.mp4,300,high jump\nc/2.mp4,7,fly\n", ["high jump", "fly"]),
    ('a b/1.mp4,300,"up, then down"\nc/2.mp4 7,"3 turns"\n', ["up, then down", "3 turns"]),
    ("a b/1.mp4 making tea\nc/2.mp4 5-a-side football\n", ["making tea", "5-a-side football"]),
    ('a b/1.mp4 "up, then down"\nc/2.mp4,"3 turns"\n', ["up, then down", "3 turns"]),
    ('"a b/1.mp4",0\n"c/2.mp4", 2\n', ["0", "2"]), ("\ufeffa b/1.mp4,00,\r\n\r\nc/2.mp4,02, \r\n", ["0", "2"]),
    ("a b/1.mp4 0 -1\nc/2.mp4 0 -1\n", [-1, -1]), ("a b/1.mp4 20240131\nc/2.mp4 9000000\n", ["20240131", "9000000"]),
    ("a b/1.mp4 \u00b2\nc/2.mp4 \u0663\n", ["\u00b2", "\u0663"])])
@pytest.mark.parametrize("place", ["videos", "elsewhere"])
def test_list_files(tmp_path, lines, expected, place):
    put(tmp_path / "videos", {}, ["a b/1.mp4", "c/2.mp4"])
    put(tmp_path, {f"{place}/list.txt": lines})
    listing = find_videos(str(tmp_path / place / "list.txt"), tmp_path / "videos" if place == "elsewhere" else "")
    assert list(labels(listing).values()) == expected and counts(listing) == (2, 2, 0, 0) and len(listing.classes) < 4
    assert "0" not in expected or listing.classes == ["0", "1", "2"]


def test_a_path_in_a_list_ends_with_its_last_suffix_and_may_be_missing(tmp_path):
    lines = "v.avi raw/1.mp4 high jump\nv.ts.mp4 fly\ngone.mp4 sit\n"
    put(tmp_path, {"list.txt": lines}, ["v.avi raw/1.mp4", "v.ts.mp4"])
    listing = find_videos(str(tmp_path / "list.txt"))
    assert labels(listing) == {"1.mp4": "high jump", "v.ts.mp4": "fly"} and counts(listing) == (3, 2, 1, 0)


# ---- 3. Messages -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lines, expected", [
    ("1.mp4 0\nnonsense\n", "got 'nonsense'"), ("1.mp4 0\n1.mp4\n", "some have none"),
    ("1.mp4\n\n1.mp4 4\n", "some have none"), ("1.mp4 0\n1.mp4 -1\n", "some have none"),
    ("frames/1 300 0\n", "no directory"), ("path,label\n1.mp4,0\n", "got 'path,label'"),
    ("1.mp4 0\n1.mp4 300 jump\n", "got '1.mp4 300 jump'"), ("1.mp4 0 300 1\n", "0 300 1"), ("1.mp4x\n", "1.mp4x"),
    ("1.mp4 0\n1.mp4  3  turns\n", "3  turns"), ("1.mp4,0,300,1\n", "0,300,1"), ("1.mp4,up, then down\n", "up, then"),
    ("1.gif 0\n", "1.gif"), ("\n", "list.txt"), ("no.mp4 0\nnone.mp4 1\n", "no.mp4"),
    ("\x00\x20ftypisom\x81" + "x" * 5000, "list.txt")])
def test_list_file_messages(tmp_path, lines, expected):
    put(tmp_path, {"list.txt": lines}, ["1.mp4"])
    assert expected in error_of(find_videos, str(tmp_path / "list.txt"))


@pytest.mark.parametrize("data, files, words", [
    ("ucf101", {}, "classInd"), ("hmdb51", {}, "_test_split1.txt"), ("k400", {}, "train.csv"),
    ("ssv2", {}, "labels.json"), ("epic", {}, "EPIC_100_train.csv"),
    ("ucf101", {**UCF}, "v_hammering_g08_c01 renamed_1"),
    ("ucf101", {**UCF_TEST, "classInd.txt": "1 HammerThrow"}, "trainlist01.txt"),
    ("ucf101", {"classInd.txt": "Hammering\n", "trainlist01.txt": "Hammering/v.avi 1\n"}, "classInd"),
    ("ucf101", {"classInd.txt": "1 Hammering\n", "trainlist01.txt": "Unknown/v.avi 1\n"}, "unknown"),
    ("hmdb51", {"climb_test_split1.txt": "v.avi\n"}, "_test_split1"),
    ("k400", {"train.csv": "youtube_id\nv\n"}, "label"), ("ssv2", {"labels.json": "{", "train.json": "[]"}, "JSON"),
    ("ssv2", {"labels.json": '{"A": "0"}', "train.json": '[{"id": "v", "template": "B"}]'}, "KeyError"),
    ("ssv2", {"labels.json": '{"A": "0"}', "train.json": '[{"id": 7, "template": ["A"]}]'}, "labels.json"),
    ("epic", {"EPIC_100_train.csv": "video_id,start\nP01_11,1\n"}, "verb_class")])
def test_annotations_that_are_missing_malformed_or_of_other_videos(tmp_path, data, files, words):
    put(tmp_path, files, ["renamed_1.avi", "P01_11.mp4"])
    text = error_of(find_videos, data, tmp_path)
    assert all(word in text for word in (str(tmp_path), f"--data {data}", *words.split()))


@pytest.mark.parametrize("data, options, words", [
    ("epic", dict(label="colour"), "--label colour verb verb-noun"),
    ("toy", dict(label="colour"), "--label motion scene"), ("ucf101", dict(label="colour"), "--label colour ucf101"),
    ("k400", dict(split="middle"), "middle train test"), ("toy", dict(split="middle"), "middle train_biased"),
    ("own", dict(split="middle"), "middle all"), ("ucf101", dict(fold=0), "--split 0"),
    ("hmdb51", dict(fold=4), "--split 4"), ("toy", dict(fold=2), "--split 2"),
    ("ucf101", dict(root="nowhere"), "nowhere classInd --root VIDEO_ROOT"), ("ava", {}, "finetune.py"),
    ("no", {}, "--data"), ("only", {}, "train"), ("empty", {}, "empty 0 listed"), ("zero", {}, "1 empty"),
    ("other.mp4", {}, "neither one of")])
def test_other_messages(tmp_path, data, options, words):
    put(tmp_path, {"zero/1.mp4": ""}, ["only/val/a/1.mp4", "own/1.mp4"])
    (tmp_path / "empty").mkdir()
    data = data if data in common.DATA_SETS else str(tmp_path / data)
    text = error_of(find_videos, data, **{"root": tmp_path, **options})
    assert all(word in text for word in words.split())


def test_toy_data_hold_their_truth_and_are_continued(tmp_path):
    toy = (5, 3, 32)
    first = find_videos("toy", tmp_path, "train_biased", toy=toy)
    assert counts(first) == (5, 5, 0, 0) and first.classes == list(common.TOY_CLASSES)
    scenes = find_videos("toy", tmp_path, "train_biased", "scene", toy=toy)
    for i, (item, scene) in enumerate(zip(first.items, scenes.items)):
        video, truth = common.toy_video(0, "train_biased", i, size=32)
        assert (item.label, scene.label) == (truth["label"], truth["scene"]) and Path(item.path).stem == f"{i:06d}"
        assert np.abs(common.read_clips(item.path, range(36)) - video.astype(float)).mean() < 6
        stored = np.load(item.path.replace(".mp4", ".npz"))
        assert all(np.array_equal(stored[key], truth[key]) for key in truth)
    before = Path(first.items[0].path).read_bytes()
    Path(first.items[3].path).unlink()                                  # as if it had been interrupted
    (tmp_path / "32px/train_biased.csv").unlink()
    assert find_videos("toy", tmp_path, "train_biased", toy=(6, 3, 32)).items[:5] == first.items
    assert Path(first.items[0].path).read_bytes() == before and not list(tmp_path.rglob("*.tmp"))
    assert find_videos("toy", tmp_path, "train_biased", toy=toy).items == first.items       # of the longer list
    assert len((tmp_path / "32px/train_biased.csv").read_text().splitlines()) == 7
    assert len(find_videos("toy", tmp_path, "test", toy=toy).items) == 3


def test_a_run_that_writes_the_toy_data_starts_with_the_weights_of_one_that_finds_them(tmp_path):
    before = torch.random.get_rng_state()
    find_videos("toy", tmp_path, toy=(3, 2, 32))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_toy_files_are_the_same_each_time(workplace, tmp_path):
    (tmp_path / "train").mkdir()
    for i in range(96):                                                 # in one process; those there are of a pool
        common._write_toy(tmp_path, "train", 64, i % 24)
        (tmp_path / f"train/{i % 24:06d}.mp4").rename(tmp_path / f"{i}.mp4")
    there = [(workplace / f"data/toy/64px/train/{i:06d}.mp4").read_bytes() for i in range(24)]
    assert [(tmp_path / f"{i}.mp4").read_bytes() == there[i % 24] for i in range(96)] == [True] * 96


# ---- 4. Clips --------------------------------------------------------------------------------------------------------

CLIP = SimpleNamespace(frames=4, stride=2, image_size=16, repeats=2, min_crop=0.66)


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    return [Item(str(tiny_video(root / f"{i}.mp4", 30, side=48)), i) for i in range(5)]


def test_epochs_repeats_and_seeds_draw_new_clips(items):
    dataset = Clips(items, partial(mofo.sample_clips, cfg=CLIP), seed=3)
    clips = np.concatenate([dataset[epoch, 0][0] for epoch in range(6)])                # (12, T, H, W, 3), two per key
    starts = numbers(clips)[:, 0]
    assert clips.shape == (12, 4, 16, 16, 3) and clips.dtype == np.uint8
    assert len(set(starts)) > 5 and (starts[0::2] != starts[1::2]).any()
    assert (np.diff(numbers(clips)) == CLIP.stride).all()
    first, second = (Clips(items, lambda video, item, rng: rng.random(8)[None], seed)[0, 0][0] for seed in (0, 1))
    assert (first != second).all()


@pytest.mark.parametrize("kind", ["empty", "truncated", "text", "gone"])
def test_broken_videos_are_replaced_in_training_and_reported_in_any_case(items, tmp_path, kind):
    path = tiny_video(tmp_path / "broken.mp4")
    path.write_bytes({"empty": b"", "truncated": path.read_bytes()[:-200]}.get(kind, b"not a video\n" * 50))
    bad, sample = Item(str(path) + "?" * (kind == "gone"), 9), partial(mofo.sample_clips, cfg=CLIP)
    batch = collate([Clips([bad, *items], sample)[0, i] for i in range(3)])
    assert len(batch["clips"]) == 6 and batch["read"].all() and set(batch["names"]) <= {item.path for item in items}
    assert batch["labels"].tolist() == [int(Path(name).stem) for name in batch["names"]]  # the replacement's own label
    assert len(batch["errors"]) >= 1 and all(error.startswith(bad.path) for error in batch["errors"])
    batch = collate([Clips([bad, *items], sample, replace=False)[0, i] for i in range(3)])
    assert batch["read"].tolist() == [False, True, True] and len(batch["clips"]) == 4
    assert batch["labels"].tolist() == [9, 0, 1] and batch["names"][0] == bad.path and len(batch["errors"]) == 1
    for replace in (True, False):                                                       # nothing but broken videos
        batch = collate([Clips([bad], sample, replace=replace)[0, 0]])
        assert batch["clips"] is None and not batch["read"].any() and batch["errors"]
    assert bad.path in error_of(example_clips, Clips([bad], sample))


@pytest.mark.parametrize("frames, stride, expected", [(8, 1, [0, 1, 2, 3, 4, 4, 4, 4]), (4, 3, [0, 3, 4, 4])])
def test_short_videos_repeat_their_last_frame(tmp_path, frames, stride, expected):
    item = Item(str(tiny_video(tmp_path / "short.mp4", 5)))
    dataset = Clips([item], lambda video, item, rng: video.read(clip_indices(video, item, frames, stride, rng))[None])
    assert all(numbers(dataset[epoch, 0][0][0]).tolist() == expected for epoch in range(3))


def test_random_clips_reach_both_ends_of_a_video(items):
    dataset = Clips(items, lambda video, item, rng: video.read(clip_indices(video, item, 4, 3, rng))[None])
    got = np.stack([numbers(dataset[epoch, 0][0][0]) for epoch in range(150)])
    assert got.min() == 0 and got.max() == 29
    with Video(items[0].path) as video:                                 # a segment may end before it starts
        assert item_frames(video, Item("", -1, 1.5, 2)) == (15, 20)
        assert item_frames(video, Item("", -1, 2, 1)) == (20, 20)


# ---- 5. Batches, learning rate, optimiser ----------------------------------------------------------------------------

def plan(videos=10, batch=12, world=1, device_batch=12, repeats=1, steps=7, rank=0):
    env = Env(CPU, rank, world, None)
    cfg = SimpleNamespace(batch=batch, device_batch=device_batch, repeats=repeats, steps=steps, epochs=1,
                          warmup_epochs=0, lr=1.0, min_lr=0.0)
    return plan_run(cfg, videos, env), env


def steps_of(videos=10, seed=5, start=0, **spread):
    """The global batch of each step: micro-batch by micro-batch, process by process."""
    world = spread.get("world", 1)
    ranks = []
    for rank in range(world):
        p, env = plan(videos, rank=rank, **spread)
        ranks.append(list(step_batches(videos, p, env, seed, start)))
        assert len(ranks[-1]) == (p.steps - start) * p.accum
    return [[key for i in range(s * p.accum, (s + 1) * p.accum) for r in range(world) for key in ranks[r][i]]
            for s in range(p.steps - start)]


@pytest.mark.parametrize("world, device_batch", [(1, 12), (1, 3), (2, 6), (2, 2), (3, 4), (4, 1), (12, 64)])
@pytest.mark.parametrize("videos", [10, 4, 100])
def test_the_batch_and_the_random_numbers_of_a_step_are_the_same_however_it_is_spread(world, device_batch, videos):
    assert steps_of(videos, world=world, device_batch=device_batch) == steps_of(videos)
    processes, (whole, env) = [plan(world=world, device_batch=device_batch, rank=r) for r in range(world)], plan()
    got = torch.cat([rand(p.micro, 2, generator=p.generator(own, 0, 3, i))
                     for i in range(processes[0][0].accum) for p, own in processes])
    third, fourth = (rand(12, 2, generator=whole.generator(env, 0, step, 0)) for step in (3, 4))
    assert torch.equal(got, third) and not torch.equal(got, fourth)


@pytest.mark.parametrize("repeats", [1, 3])
def test_sampling_continues_at_any_step(repeats):
    whole = steps_of(repeats=repeats)
    assert all(steps_of(repeats=repeats, start=k, world=2, device_batch=3) == whole[k:] for k in range(7))
    assert all(len(batch) == 12 for batch in whole)                                     # videos; each gives `repeats`


@pytest.mark.parametrize("videos", [10, 5, 1])                                          # also fewer than the batch
def test_each_epoch_is_a_permutation_of_its_own(videos):
    stream = sum(steps_of(videos, steps=20), [])
    epochs = [stream[i:i + videos] for i in range(0, len(stream) - videos + 1, videos)]
    assert all(sorted(epoch) == [(n, i) for i in range(videos)] for n, epoch in enumerate(epochs))
    assert videos == 1 or len({tuple(i for _, i in epoch) for epoch in epochs}) > 5
    assert stream != sum(steps_of(videos, steps=20, seed=6), []) or videos == 1


@pytest.mark.parametrize("spread", [dict(batch=100, world=3, device_batch=8), dict(batch=8, world=16, device_batch=32),
                                    dict(batch=12, world=1, device_batch=8)])
def test_a_batch_that_does_not_divide_names_the_numbers(spread):
    text = error_of(plan, **spread)
    assert all(re.search(rf"\b{number}\b", text) for number in spread.values())


def test_plan_counts_steps():
    p, _ = plan(videos=100, batch=8, world=2, device_batch=2, steps=0)
    assert (p.micro, p.accum, p.steps, p.per_epoch) == (2, 2, 12, 12.5)
    assert plan(videos=3, batch=8, device_batch=8, steps=0)[0].steps == 1


@pytest.mark.parametrize("script, start, whole", [("mofo", 0.0, False), ("mcl", 0.01, False), ("modist", 0.01, True)])
@pytest.mark.parametrize("warmup", [0, 1, 10, 35])
def test_the_rate_rises_to_a_cosine_and_follows_it(script, start, whole, warmup):
    """VideoMAE's is there in the last step of warm-up already; MoDist's cosine is that over all steps."""
    rates = [importlib.import_module(script).cosine_lr(step, 100, warmup, 2.0, 0.5) for step in range(101)]
    first = 0 if whole else warmup
    cosine = [0.5 + 0.75 * (1 + math.cos(math.pi * (step - first) / (100 - first))) for step in range(101)]
    rise = np.linspace(2 * start, cosine[warmup], warmup, endpoint=not start)
    assert rates == pytest.approx([*rise, *cosine[warmup:]])


# ---- 6. Configuration ------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Config:
    data: str = "toy"                   # what to read
    batch_size: int = 8                 # clips, of which 50 % are mirrored
    lr: float = 1e-3                    # per 256 # clips
    ratio: float | None = 0.75          # share that is hidden, in [0, 1); none = baseline
    compile: bool = True                # torch.compile


TOY_RECIPES = {"toy": {}, "ssv2": dict(batch_size=32, lr=2e-3, compile=False), "custom": dict(batch_size=2)}


@pytest.mark.parametrize("line, expected", [
    ("", {}), ("--data ssv2", dict(data="ssv2", batch_size=32, lr=2e-3, compile=False)),
    ("--data ssv2 --lr 5 --compile", dict(data="ssv2", batch_size=32, lr=5.0)), ("--batch_size 4", dict(batch_size=4)),
    ("--batch-size=4", dict(batch_size=4)), ("--batch_size=4", dict(batch_size=4)),
    ("--no-compile", dict(compile=False)), ("--no_compile", dict(compile=False)), ("--ratio none", dict(ratio=None)),
    ("--ratio None", dict(ratio=None)), ("--ratio .5", dict(ratio=0.5)),
    ("--data my_videos/a-b", dict(data="my_videos/a-b", batch_size=2)),
    ("--data=my_videos --batch-size 3", dict(data="my_videos", batch_size=3))])
def test_command_line_beats_recipe_beats_default(line, expected):
    assert parse_config(Config, TOY_RECIPES, line.split()) == Config(**expected)


@pytest.mark.parametrize("line, words", [
    ("--batchsize 4", "--batchsize --help"), ("--lr 1 --batch_sise 3", "--batch-sise"), ("--rat 3", "--rat"),
    ("--lr high", "--lr high"), ("--batch-size 1.5", "--batch-size 1.5"),
    ("--ratio nothing", "--ratio nothing"), ("--batch-size none", "--batch-size none"), ("--lr", "--lr"),
    ("stray", "stray"), ("--lr inf", "--lr inf"), ("--lr nan", "--lr nan"), ("--batch-size 0", "--batch-size 0 [1,"),
    ("--ratio 1", "--ratio [0, 1)")])
def test_a_wrong_command_line_is_one_line(line, words):
    text = error_of(parse_config, Config, TOY_RECIPES, line.split())
    assert all(word in text for word in words.split())


def test_help_is_the_comments(capsys):
    with pytest.raises(SystemExit) as info:
        parse_config(Config, TOY_RECIPES, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert info.value.code == 0 and "{" not in shown
    help_text = "clips, of which 50 % are mirrored, in [1, 1e9] (default: 8)"
    for words in (help_text, "per 256 # clips", "--no-compile", *TOY_RECIPES):
        assert words in shown


@pytest.mark.parametrize("script", ["mofo", "mme", "fame", "mcl", "modist", "finetune"])
def test_settings_have_help_and_a_use_and_recipes_set_them_to_values_of_their_type(script):
    module = importlib.import_module(script)
    source, defaults = Path(module.__file__).read_text(), dataclasses.asdict(module.Config())
    everything = source + Path(common.__file__).read_text() + Path(mofo.__file__).read_text()
    shared = inspect.getsource(common.RunConfig)
    for name in defaults:
        assert re.search(rf"^    {name}: .*#\s*\w.*$", shared + source, re.M), f"{name} has no help"
        assert re.search(rf"\b(cfg|c)\.{name}\b|\"{name}\"", everything), f"{name} is not used"
    assert {"toy", "custom", "ucf101", "hmdb51", "k400", "ssv2", "epic"} <= set(module.RECIPES)
    for recipe in module.RECIPES.values():
        for name, value in recipe.items():
            assert type(value) in {type(defaults[name]), int if type(defaults[name]) is float else None}, name


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline]")])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_write_that_fails_leaves_the_previous_checkpoint(tmp_path, monkeypatch, error, earlier):
    path, model, nothing = tmp_path / "last.pt", torch.nn.Linear(2, 2), SimpleNamespace(config={}, settings={})

    def save():
        save_checkpoint(path, nothing, Listing([], [], [], ""), 1, model, nothing,
                        make_optimizer("adamw", model, 1e-3, 0.05), torch.amp.GradScaler("cpu", enabled=False))
    if earlier:
        save()
    was = path.read_bytes() if earlier else None

    def half(content, place, *args, **kwargs):
        Path(place).write_bytes(b"half a checkpoint")
        raise error
    monkeypatch.setattr(torch, "save", half)
    text = error_of(save)
    assert "last.pt" in text and "disk" in text
    assert os.listdir(tmp_path) == (["last.pt"] if earlier else []) and (not earlier or path.read_bytes() == was)
