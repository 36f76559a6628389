"""Data sets as they are downloaded, the user's own videos, sampling, configuration and checkpoints of other people."""
import dataclasses
import os
import re
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

import common
import finetune
import mofo
from common import (Clips, Env, Item, Listing, StepSampler, UserError, ViT, adamw, clip_indices, collate, cosine_lr,
                    find_videos, load_file, load_weights, loader, parse_config, plan_run, rand, save_checkpoint)
from conftest import SHARED, error_of, golden_arrays, numbers, put, tiny_video

CPU = torch.device("cpu")


def labels(listing):
    """{file name: class name, or its number where classes have no names}"""
    return {Path(item.path).name: listing.classes[item.label] if listing.classes else item.label for item in listing.items}


def counts(listing):
    return tuple(map(int, re.search(r"(\d+) listed, (\d+) found, (\d+) missing, (\d+) empty", listing.summary).groups()))


# ---- 1. The published layouts ----------------------------------------------------------------------------------------

UCF = {"ucfTrainTestlist/classInd.txt": "1 Hammering\r\n2 HammerThrow\r\n3 HandstandPushups\r\n",
       "ucfTrainTestlist/trainlist01.txt": "Hammering/v_Hammering_g08_c01.avi 1\r\nHammerThrow/v_HammerThrow_g08_c01.avi 2\r\n"
                                           "HandstandPushups/v_HandStandPushups_g08_c01.avi 3\r\nHammering/v_Hammering_g09_c01.avi 1\r\n",
       "ucfTrainTestlist/testlist01.txt": "HammerThrow/v_HammerThrow_g01_c01.avi\r\nHandstandPushups/v_HandStandPushups_g01_c01.avi\r\n"}
UCF_VIDEOS = [f"UCF-101/{c}/v_{f}_g{g}_c01.avi" for g in ("01", "08") for c, f in
              (("Hammering", "Hammering"), ("HammerThrow", "HammerThrow"), ("HandstandPushups", "HandStandPushups"))]


def test_ucf101_labels_are_the_ids_of_classind(tmp_path):
    put(tmp_path, UCF, [*UCF_VIDEOS, "UCF-101/Hammering/._v_Hammering_g09_c01.avi"])
    train, test = (find_videos("ucf101", tmp_path, split) for split in ("train", "test"))
    assert train.classes == test.classes == ["Hammering", "HammerThrow", "HandstandPushups"]        # not the order of sorted()
    assert labels(train) == {"v_Hammering_g08_c01.avi": "Hammering", "v_HammerThrow_g08_c01.avi": "HammerThrow",
                             "v_HandStandPushups_g08_c01.avi": "HandstandPushups"}
    assert labels(test) == {"v_HammerThrow_g01_c01.avi": "HammerThrow", "v_HandStandPushups_g01_c01.avi": "HandstandPushups"}
    assert counts(train) == (4, 3, 1, 0) and [m.lower() for m in train.missing] == ["v_hammering_g09_c01"]


@pytest.mark.parametrize("directory, stem", [("HandStandPushups", "HandStandPushups"), ("HandstandPushups", "HandstandPushups")])
def test_ucf101_lists_that_write_handstand_in_one_way(tmp_path, directory, stem):
    put(tmp_path, {**UCF, "ucfTrainTestlist/testlist01.txt": f"{directory}/v_{stem}_g01_c01.avi\n"}, UCF_VIDEOS)
    assert labels(find_videos("ucf101", tmp_path, "test")) == {"v_HandStandPushups_g01_c01.avi": "HandstandPushups"}


def test_ucf101_lists_with_longer_paths(tmp_path):
    put(tmp_path, {**UCF, "testlist01.txt": "UCF-101/HammerThrow/v_HammerThrow_g01_c01.avi\n"}, UCF_VIDEOS)
    (tmp_path / "ucfTrainTestlist/testlist01.txt").unlink()
    assert labels(find_videos("ucf101", tmp_path, "test")) == {"v_HammerThrow_g01_c01.avi": "HammerThrow"}


def test_hmdb51_codes_odd_names_and_class_order(tmp_path):
    names = ["#20(a)&b+c;d@e]!_climb_u_0.avi", "_start_climb_1.avi", "-dash_climb_2.avi", "a climb 3.avi"]
    lists = {"climb": "".join(f"{n} {code} \n" for n, code in zip(names, (1, 2, 0, 1))), "climb_stairs": "s.avi 1 \n",
             "sword": "t.avi 2 \n", "sword_exercise": "u.avi 1 \n"}
    put(tmp_path, {f"testTrainMulti_7030_splits/{c}_test_split1.txt": text for c, text in lists.items()},
        [*(f"climb/{n}" for n in names), "climb_stairs/s.avi", "sword/t.avi", "sword_exercise/u.avi"])
    put(tmp_path, {f"testTrainMulti_7030_splits/climb_test_split{k}.txt": f"{names[2]} 1 \n" for k in (2, 3)})      # other splits
    train, test = (find_videos("hmdb51", tmp_path, split) for split in ("train", "test"))
    assert train.classes == test.classes == ["climb", "climb_stairs", "sword", "sword_exercise"]    # ids of sorted directories
    assert labels(train) == {names[0]: "climb", names[3]: "climb", "s.avi": "climb_stairs", "u.avi": "sword_exercise"}
    assert labels(test) == {names[1]: "climb", "t.avi": "sword"}


K400_CSV = ('label,youtube_id,time_start,time_end,split,is_cc\nabseiling,-3B32lodo2M,59,69,train,0\n"air drumming",_dbcJuKJQNs,40,50,train,0\n'
            '"air drumming",ab_d-fgh_jk,1.0,11.0,train,0\nzumba,00000000000,2,12,train,0\nzumba,gone0000000,2,12,train,0\n')
K400_LABELS = {"-3B32lodo2M_000059_000069.mp4": "abseiling", "_dbcJuKJQNs_000040_000050.mp4": "air drumming",
               "ab_d-fgh_jk_000001_000011.mp4": "air drumming"}


@pytest.mark.parametrize("folders, annotations, text", [
    (["train"] * 3, "annotations/train.csv", K400_CSV),                                             # CVDF
    (["videos_train/abseiling", *["videos_train/air_drumming"] * 2], "kinetics_train.csv", K400_CSV.replace("air drumming", "air_drumming")),
    (["train"] * 3, "train.csv", "\ufeff" + K400_CSV.replace('"air drumming",', "air drumming , ", 1))])
def test_k400_csv_with_quoted_labels_and_ids_with_dashes(tmp_path, folders, annotations, text):
    put(tmp_path, {annotations: text, "train/00000000000_000002_000012.mp4": ""},
        [f"{folder}/{name}" for folder, name in zip(folders, K400_LABELS)])
    listing = find_videos("k400", tmp_path, "train")
    assert listing.classes == ["abseiling", "air drumming", "zumba"] and labels(listing) == K400_LABELS
    assert counts(listing) == (5, 3, 1, 1)
    assert len(listing.missing) == 2 and "gone0000000" in listing.missing            # what is empty is named, too


@pytest.mark.parametrize("root", ["k400", "replacement_disk"])
@pytest.mark.parametrize("place", ["replacement/replacement_for_corrupted_k400", "z_replacement"])          # before and after train/
def test_k400_substitute_for_a_corrupt_file_is_preferred(tmp_path, root, place):
    root = tmp_path / root
    put(root, {"train.csv": K400_CSV, "train/00000000000_000002_000012.mp4": ""}, [f"{place}/00000000000_000002_000012.mp4"])
    listing = find_videos("k400", root, "train")
    assert [item.path for item in listing.items] == [str(root / place / "00000000000_000002_000012.mp4")]


def test_k400_directories_without_csv(tmp_path):
    put(tmp_path, {}, [f"{d}/{c}/{i}.mp4" for d in ("train_video", "val_video") for c in ("air_drumming", "zumba") for i in range(2)])
    train, test = (find_videos("k400", tmp_path, split) for split in ("train", "test"))
    assert [item.label for item in train.items] == [0, 0, 1, 1] and train.classes == test.classes
    assert all("/val_video/" in item.path for item in test.items)


@pytest.mark.parametrize("between", [" ", ","])
def test_k400_list_of_videomae(tmp_path, between):
    put(tmp_path, {"train.csv": f"/old/place/-3B32lodo2M_000059_000069.mp4{between}0\nb c/_dbcJuKJQNs_000040_000050.mp4{between}2\n"},
        ["any/-3B32lodo2M_000059_000069.mp4", "_dbcJuKJQNs.mp4"])
    listing = find_videos("k400", tmp_path, "train")
    assert labels(listing) == {"-3B32lodo2M_000059_000069.mp4": "0", "_dbcJuKJQNs.mp4": "2"} and listing.classes == ["0", "1", "2"]


SSV2 = {"labels": '{"Holding something next to something": "1", "Approaching something": "0", "Something falling like a feather or paper": "2"}',
        "train": '[{"id": "78687", "label": "x", "template": "Holding [something] next to [something]", "placeholders": []},'
                 ' {"id": "5", "label": "x", "template": "[Something] falling like a feather or paper"}]',
        "validation": '[{"id": "36585", "template": "Approaching [something]"}]', "test": '[{"id": "1420"}]'}


@pytest.mark.parametrize("names, suffix", [("labels/{}.json", "webm"), ("something-something-v2-{}.json", "mp4")])
def test_ssv2_templates_give_the_labels(tmp_path, names, suffix):
    put(tmp_path, {names.format(k): text for k, text in SSV2.items()},
        [f"20bn-something-something-v2/{i}.{suffix}" for i in (78687, 36585, 1420)])
    train, test = (find_videos("ssv2", tmp_path, split) for split in ("train", "test"))
    assert train.classes == test.classes == ["Approaching something", "Holding something next to something",
                                             "Something falling like a feather or paper"]
    assert labels(train) == {f"78687.{suffix}": train.classes[1]} and labels(test) == {f"36585.{suffix}": train.classes[0]}
    assert counts(train) == (2, 1, 1, 0) and train.missing == ["5"]


EPIC_HEAD = ("narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,narration,"
             "verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n")


def epic_row(video, start, stop, verb, noun):
    return (f"{video}_0,{video[:3]},{video},,00:00:{start},00:00:{stop},9999,9999,\"take plate, put it\",take,{verb},plate,{noun},"
            f"\"['plate', 'cup']\",\"[{noun}, 7]\"\n")


def epic(root):
    put(root, {"csv/EPIC_100_train.csv": EPIC_HEAD + epic_row("P01_11", "01.00", "01.95", 2, 10) + epic_row("P01_11", "03.00", "04.95", 10, 2)
               + epic_row("P01_12", "01.00", "02.00", 0, 0) + epic_row("P01_12", "03.00", "04.00", 0, 0)
               + epic_row("P01_13", "01.00", "02.00", 0, 0) + epic_row("P01_13", "03.00", "04.00", 0, 0),
               "csv/EPIC_100_validation.csv": EPIC_HEAD + epic_row("P01_11", "02.00", "02.50", 2, 1), "P01/videos/P01_13.MP4": ""})
    tiny_video(root / "P01/videos/P01_11.MP4", 60)
    return root


@pytest.mark.parametrize("label, classes, ids", [("", 11, [2, 10]), ("verb", 11, [2, 10]), ("noun", 11, [10, 2]), ("action", 4, [3, 1])])
def test_epic_labels(tmp_path, label, classes, ids):
    train, test = (find_videos("epic", epic(tmp_path), split, label) for split in ("train", "test"))
    assert [item.label for item in train.items] == ids and len(train.classes) == classes and train.classes == test.classes
    if label == "action":
        assert train.classes == ["0:0", "10:2", "2:1", "2:10"]                          # train and validation, sorted as strings


def test_epic_counts_segments_in_every_column(tmp_path):
    assert counts(find_videos("epic", epic(tmp_path))) == (6, 2, 2, 2)


def test_epic_clips_come_from_their_segment(tmp_path):
    items = find_videos("epic", epic(tmp_path)).items
    assert [(item.start, item.stop) for item in items] == [(1, 1.95), (3, 4.95)]
    dataset = Clips(items, lambda video, item, rng: video.read(clip_indices(video, item, 4, 3, rng))[None])
    got = {i: {tuple(numbers(dataset[epoch, i][0][0])) for epoch in range(20)} for i in (0, 1)}
    assert got[0] == {(10, 13, 16, 19)}                                                 # ten frames: one start
    assert len(got[1]) > 4 and min(map(min, got[1])) == 30 and 45 < max(map(max, got[1])) <= 49


@pytest.mark.parametrize("way", ["root", "environment", "default"])
def test_where_a_data_set_is_looked_for(tmp_path, monkeypatch, way):
    monkeypatch.delenv("VIDEO_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    put(tmp_path / {"root": "some/where", "environment": "disk/ucf101", "default": "data/ucf101"}[way], UCF, UCF_VIDEOS)
    if way == "environment":
        monkeypatch.setenv("VIDEO_ROOT", str(tmp_path / "disk"))
    assert counts(find_videos("ucf101", "some/where" if way == "root" else ""))[1] == 3


def test_a_dangling_link_counts_as_missing(tmp_path):
    put(tmp_path, UCF, UCF_VIDEOS)
    (tmp_path / "UCF-101/Hammering/v_Hammering_g09_c01.avi").symlink_to(tmp_path / "moved.avi")
    assert counts(find_videos("ucf101", tmp_path)) == (4, 3, 1, 0)


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_ucf101_and_hmdb51_have_three_splits(tmp_path, fold):
    lists = {f"{s}list0{k}.txt": f"Hammering/v_Hammering_g0{k}_c0{n}.avi{' 1' * (s == 'train')}\n" for n, s in enumerate(("train", "test"), 1)
             for k in (1, 2, 3)}
    lists |= {f"climb_test_split{k}.txt": "".join(f"climb_{n}.avi {1 if n == k else 2 if n == k % 3 + 1 else 0} \n" for n in (1, 2, 3))
              for k in (1, 2, 3)}
    put(tmp_path, {"classInd.txt": "1 Hammering\n", **lists},
        [*(f"v_Hammering_g0{k}_c0{n}.avi" for k in (1, 2, 3) for n in (1, 2)), *(f"climb_{n}.avi" for n in (1, 2, 3))])
    for n, split in enumerate(("train", "test"), 1):
        assert labels(find_videos("ucf101", tmp_path, split, fold=fold)) == {f"v_Hammering_g0{fold}_c0{n}.avi": "Hammering"}
        video = fold if split == "train" else fold % 3 + 1
        assert labels(find_videos("hmdb51", tmp_path, split, fold=fold)) == {f"climb_{video}.avi": "climb"}
    assert find_videos("ucf101", tmp_path) == find_videos("ucf101", tmp_path, fold=1)


@pytest.mark.parametrize("data, fold", [("ucf101", 0), ("hmdb51", 4), ("ucf101", -1), ("k400", 2), ("epic", 3), ("toy", 2), ("own", 2)])
def test_a_split_that_is_not_published_names_the_flag(tmp_path, data, fold):
    put(epic(tmp_path), {**UCF, "train.csv": K400_CSV}, ["v.mp4"])
    assert f"--split {fold}:" in error_of(find_videos, str(tmp_path) if data == "own" else data, tmp_path, fold=fold)
    put(tmp_path, {}, UCF_VIDEOS)
    assert "no annotations" in error_of(find_videos, "ucf101", tmp_path, fold=2)                    # which are not there: not split 1


TEST_ONLY = {
    "ucf101": ({name: UCF[name] for name in UCF if "trainlist" not in name}, UCF_VIDEOS, ["Hammering", "HammerThrow", "HandstandPushups"],
               {"v_HammerThrow_g01_c01.avi": "HammerThrow", "v_HandStandPushups_g01_c01.avi": "HandstandPushups"}),
    "hmdb51": ({"climb_test_split1.txt": "a.avi 2 \n", "sword_test_split1.txt": "b.avi 2 \n"}, ["a.avi", "b.avi"], ["climb", "sword"],
               {"a.avi": "climb", "b.avi": "sword"}),
    "k400": ({"val.csv": K400_CSV}, K400_LABELS, ["abseiling", "air drumming", "zumba"], K400_LABELS),
    "ssv2": ({f"{name}.json": SSV2[name] for name in ("labels", "validation")}, ["36585.webm"],
             ["Approaching something", "Holding something next to something", "Something falling like a feather or paper"],
             {"36585.webm": "Approaching something"}),
    "epic": ({"EPIC_100_validation.csv": EPIC_HEAD + epic_row("P01_11", "02.00", "02.50", 2, 1),
              "EPIC_100_verb_classes.csv": "id,key\n0,take\n1,put\n2,wash\n3,open\n"}, ["P01_11.MP4"], ["take", "put", "wash", "open"],
             {"P01_11.MP4": "wash"}),
    "k400 directories": ({}, ["val/zumba/1.mp4", "val/zumba/2.mp4"], ["zumba"], {"1.mp4": "zumba", "2.mp4": "zumba"}),
    "k400 list": ({"val.csv": "x/-3B32lodo2M.mp4 17\n"}, ["x/-3B32lodo2M.mp4"], [str(i) for i in range(18)], {"-3B32lodo2M.mp4": "17"})}


@pytest.mark.parametrize("name", TEST_ONLY)
def test_the_test_split_needs_nothing_of_the_training_split(tmp_path, name):
    text, videos, classes, expected = TEST_ONLY[name]
    listing = find_videos(name.split()[0], put(tmp_path, text, videos), "test")
    assert listing.classes == classes and labels(listing) == expected


@pytest.mark.parametrize("label, classes, target", [("noun", ["0", "1"], 1), ("action", ["2:1"], 0),
                                                    ("verb-noun", ["verb:0", "verb:1", "verb:2", "noun:0", "noun:1"], (2, 1))])
def test_epic_validation_alone(tmp_path, label, classes, target):
    text = {"EPIC_100_validation.csv": EPIC_HEAD + epic_row("P01_11", "02.00", "02.50", 2, 1)}
    listing = find_videos("epic", put(tmp_path, text, ["P01_11.MP4"]), "test", label)
    assert listing.classes == classes and [item.label for item in listing.items] == [target]


def test_ssv2_with_a_part_of_the_classes(tmp_path):
    text = {"labels.json": '\ufeff{"Approaching something": "3", "Moving something": "7"}', "train.json": '[{"id": "5", "template": "Moving [something]"}]'}
    listing = find_videos("ssv2", put(tmp_path, text, ["5.webm"]))
    assert listing.classes == ["Approaching something", "Moving something"] and labels(listing) == {"5.webm": "Moving something"}


K400_ONE = {"train.csv": 'label,youtube_id\nzumba,00000000000\n'}


@pytest.mark.parametrize("data, text, name", [("k400", K400_ONE, "00000000000_000002_000012.mp4"),
                                              ("ucf101", UCF, "v_HammerThrow_g08_c01.avi")])
@pytest.mark.parametrize("empty, good", [("a", "b"), ("b", "a"), ("replacement", "train"), ("train", "replacement")])
@pytest.mark.parametrize("dangling", [False, True])
def test_an_empty_copy_does_not_hide_a_good_one(tmp_path, data, text, name, empty, good, dangling):
    put(tmp_path, text, [f"{good}/{name}"])
    (tmp_path / empty).mkdir()
    if dangling:
        (tmp_path / empty / name).symlink_to(tmp_path / "moved.mp4")
    else:
        (tmp_path / empty / name).touch()
    assert [item.path for item in find_videos(data, tmp_path).items] == [str(tmp_path / good / name)]


@pytest.mark.parametrize("empty", ["a/train.csv", "a/kinetics_train.csv", "train.csv"])
@pytest.mark.parametrize("dangling", [False, True])
def test_an_empty_annotation_does_not_hide_a_good_one(tmp_path, empty, dangling):
    put(tmp_path, {"b/kinetics_train.csv": K400_CSV}, K400_LABELS)
    if dangling:
        (tmp_path / "a").mkdir()
        (tmp_path / empty).symlink_to(tmp_path / "moved.csv")
    else:
        put(tmp_path, {empty: ""})
    assert labels(find_videos("k400", tmp_path)) == K400_LABELS


def test_an_annotation_that_cannot_be_read_is_a_message(tmp_path):
    put(tmp_path, {name: UCF[name] for name in UCF if "trainlist" not in name}, UCF_VIDEOS)
    (tmp_path / "trainlist01.txt").symlink_to(tmp_path / "moved.txt")
    assert "trainlist01.txt" in error_of(find_videos, "ucf101", tmp_path)


# ---- 2. The user's own videos ----------------------------------------------------------------------------------------

def test_own_directory_without_labels_in_any_depth(tmp_path):
    put(tmp_path, {"notes.txt": "x", "a/b/empty.avi": ""}, ["a/b/c/1.MP4", "a/2.webm", "3.mkv", "a/._4.mp4"])
    listing = find_videos(str(tmp_path))
    assert labels(listing) == {"1.MP4": -1, "2.webm": -1, "3.mkv": -1} and not listing.classes and counts(listing) == (4, 3, 0, 1)


def test_own_directories_train_and_val(tmp_path):
    put(tmp_path, {}, ["train/cat/1.mp4", "train/dog/deep/2.mp4", "val/cat/3.mp4", "val/dog/4.mp4"])
    assert labels(find_videos(str(tmp_path), split="train")) == {"1.mp4": "cat", "2.mp4": "dog"}
    assert labels(find_videos(str(tmp_path), split="test")) == {"3.mp4": "cat", "4.mp4": "dog"}


@pytest.mark.parametrize("per_class", [2, 5, 11])
def test_own_directories_without_split_are_split_the_same_way_each_time(tmp_path, per_class):
    names = [f"{c}/{c}{i}.mp4" for c in ("cat", "dog") for i in range(per_class)]
    put(tmp_path, {}, names)
    train, test = (find_videos(str(tmp_path), split=split) for split in ("train", "test"))
    assert set(labels(train).values()) == set(labels(test).values()) == {"cat", "dog"} and train.classes == test.classes
    assert sorted([*labels(train), *labels(test)]) == sorted(Path(n).name for n in names)           # all, and none twice
    assert len(test.items) < len(train.items) or per_class == 2
    assert find_videos(str(tmp_path), split="train") == train


@pytest.mark.parametrize("suffix", [".m4v", ".MPG", ".mpeg", ".vob", ".ts", ".MTS", ".m2ts", ".flv", ".wmv", ".3gp", ".ogv"])
def test_suffixes_of_videos(tmp_path, suffix):
    put(tmp_path, {"list.txt": f"a b/1{suffix} jump\n", "a b/1.gif": "x"}, [f"a b/1{suffix}"])
    for data in (tmp_path, tmp_path / "list.txt", tmp_path / f"a b/1{suffix}"):
        assert list(labels(find_videos(str(data)))) == [f"1{suffix}"]


def test_one_class_in_a_split_is_a_class_and_one_directory_elsewhere_is_none(tmp_path):
    put(tmp_path, {}, ["Train/cat/1.mp4", "Train/dog/2.mp4", "VAL/dog/deep/3.mp4"])
    assert labels(find_videos(str(tmp_path), split="train")) == {"1.mp4": "cat", "2.mp4": "dog"}
    assert labels(find_videos(str(tmp_path), split="test")) == {"3.mp4": "dog"}
    every = find_videos(str(tmp_path), split="all")
    assert not every.classes and labels(every) == {"1.mp4": -1, "2.mp4": -1, "3.mp4": -1}           # train is no class
    assert labels(find_videos(str(tmp_path / "VAL"))) == {"3.mp4": -1}
    put(tmp_path, {}, ["VAL/4.mp4"])
    assert labels(find_videos(str(tmp_path), split="test")) == {"3.mp4": -1, "4.mp4": -1}


def test_hold_out_takes_the_second_of_every_five_of_a_class(tmp_path):
    items = [Item(f"{i}.mp4", i % 2) for i in range(24)]
    train, test = (common.hold_out(items, split) for split in ("train", "test"))
    assert [int(item.path[:-4]) for item in test] == [2, 3, 12, 13, 22, 23]             # of 0, 2, 4 ... and of 1, 3, 5 ...
    assert train == [item for item in items if item not in test] and len(items) == 24
    names = [f"{'cat' if i % 2 else 'ape'}/{i:02d}.mp4" for i in range(24)]
    listing = find_videos(str(put(tmp_path, {}, names)), split="test")
    assert sorted(Path(item.path).stem for item in listing.items) == ["02", "03", "12", "13", "22", "23"]


@pytest.mark.parametrize("lines, expected", [
    ("a b/1.mp4 0\nc/2.mp4 2\n", {"1.mp4": "0", "2.mp4": "2"}),
    ("a b/1.mp4,0\r\nc/2.mp4,2\r\n\r\n", {"1.mp4": "0", "2.mp4": "2"}),
    ("a b/1.mp4\nc/2.mp4\n", {"1.mp4": -1, "2.mp4": -1}),
    ("a b/1.mp4 jump\nc/2.mp4 fly\n", {"1.mp4": "jump", "2.mp4": "fly"}),
    ("a b/1.mp4,high jump\nc/2.mp4,fly\n", {"1.mp4": "high jump", "2.mp4": "fly"}),
    ('a b/1.mp4 "put a plate, gently" 0\nc/2.mp4 "take" 2\n', {"1.mp4": "0", "2.mp4": "2"}),
    ("a b/1.mp4 300 0\nc/2.mp4 7\t2\n", {"1.mp4": "0", "2.mp4": "2"}),
    ("a b/1.mp4,300,0\nc/2.mp4, 12.5, 2\n", {"1.mp4": "0", "2.mp4": "2"}),
    ("a b/1.mp4,300,high jump\nc/2.mp4,7,fly\n", {"1.mp4": "high jump", "2.mp4": "fly"}),
    ('a b/1.mp4 "put a plate" 300 0\nc/2.mp4 "take" 9 2\n', {"1.mp4": "0", "2.mp4": "2"}),
    ("a b/1.mp4 making tea\nc/2.mp4 5-a-side football\n", {"1.mp4": "making tea", "2.mp4": "5-a-side football"}),
    ('a b/1.mp4 "up, then down"\nc/2.mp4,"3 turns"\n', {"1.mp4": "up, then down", "2.mp4": "3 turns"}),
    ('"a b/1.mp4",0\n"c/2.mp4", 2\n', {"1.mp4": "0", "2.mp4": "2"}),
    ("\ufeffa b/1.mp4,00,\r\n\r\nc/2.mp4,02, \r\n", {"1.mp4": "0", "2.mp4": "2"}),
    ("a b/1.mp4 0 -1\nc/2.mp4 0 -1\n", {"1.mp4": -1, "2.mp4": -1}),
    ("a b/1.mp4 20240131\nc/2.mp4 9000000\n", {"1.mp4": "20240131", "2.mp4": "9000000"}),
    ("a b/1.mp4 \u00b2\nc/2.mp4 \u0663\n", {"1.mp4": "\u00b2", "2.mp4": "\u0663"}),
], ids=["space", "comma", "bare", "names", "names with spaces", "videomae", "frames", "frames in a csv", "frames and names", "videomae frames",
        "names with spaces only", "names in quotes", "paths in quotes", "zeros and trailing commas", "none", "long numbers", "other digits"])
@pytest.mark.parametrize("away", [False, True])
def test_list_files(tmp_path, lines, expected, away):
    put(tmp_path / "videos", {}, ["a b/1.mp4", "c/2.mp4"])
    put(tmp_path, {("elsewhere" if away else "videos") + "/list.txt": lines})
    listing = find_videos(str(tmp_path / ("elsewhere" if away else "videos") / "list.txt"), tmp_path / "videos" if away else "")
    assert labels(listing) == expected and counts(listing) == (2, 2, 0, 0) and len(listing.classes) < 4
    if "0" in expected.values():
        assert listing.classes == ["0", "1", "2"]


def test_a_path_in_a_list_ends_with_its_last_suffix(tmp_path):
    put(tmp_path, {"list.txt": "v.avi raw/1.mp4 high jump\nv.ts.mp4 fly\n"}, ["v.avi raw/1.mp4", "v.ts.mp4"])
    assert labels(find_videos(str(tmp_path / "list.txt"))) == {"1.mp4": "high jump", "v.ts.mp4": "fly"}


@pytest.mark.parametrize("line", ["gone.mp4 1", "gone.mp4,1", "gone.mp4", "a b/gone.mp4"])
def test_a_video_missing_from_a_list_is_counted_not_fatal(tmp_path, line):
    label = " 0" if line.endswith("1") else ""
    put(tmp_path, {"list.txt": f"1.mp4{label}\n{line}\n"}, ["1.mp4"])
    listing = find_videos(str(tmp_path / "list.txt"))
    assert counts(listing) == (2, 1, 1, 0) and Path(listing.missing[0]).name == "gone.mp4"


# ---- 3. Messages -----------------------------------------------------------------------------------------------------

def test_data_set_not_found_names_the_place_and_the_layout(tmp_path):
    text = error_of(find_videos, "ucf101", tmp_path / "nowhere")
    assert all(word in text for word in (str(tmp_path / "nowhere"), "classInd", "--root", "VIDEO_ROOT"))


@pytest.mark.parametrize("data, expected", [("ucf101", "classInd"), ("hmdb51", "_test_split1.txt"), ("k400", "train.csv"),
                                            ("ssv2", "labels.json"), ("epic", "EPIC_100_train.csv")])
def test_no_annotations_names_the_place_and_the_layout(tmp_path, data, expected):
    put(tmp_path, {}, ["v.mp4"])
    assert str(tmp_path) in error_of(find_videos, data, tmp_path) and expected in error_of(find_videos, data, tmp_path)


def test_annotations_that_do_not_join_show_both_sides(tmp_path):
    put(tmp_path, UCF, ["clips/renamed_1.avi", "clips/renamed_2.avi"])
    text = error_of(find_videos, "ucf101", tmp_path)
    assert "v_hammering_g08_c01" in text.lower() and "renamed_1" in text and str(tmp_path) in text


@pytest.mark.parametrize("data, files", [
    ("ucf101", {"classInd.txt": "Hammering\n", "trainlist01.txt": "Hammering/v.avi 1\n"}),
    ("ucf101", {"classInd.txt": "1 Hammering\n", "trainlist01.txt": "Unknown/v.avi 1\n"}),
    ("hmdb51", {"climb_test_split1.txt": "v.avi\n"}),
    ("k400", {"train.csv": "v.mp4\n"}),
    ("k400", {"train.csv": "\n"}),
    ("ssv2", {"labels.json": "{", "train.json": "[]"}),
    ("ssv2", {"labels.json": '{"A": "0"}', "train.json": '[{"id": "v", "template": "B"}]'}),
    ("ssv2", {"labels.json": '{"A": "0"}', "train.json": '[{"id": 7, "template": ["A"]}]'}),
    ("epic", {"EPIC_100_train.csv": EPIC_HEAD + "P01_11_0,P01,P01_11\n"}),
    ("epic", {"EPIC_100_train.csv": "video_id,start\nP01_11,1\n"}),
])
@pytest.mark.parametrize("label", ["", "action"])
def test_a_malformed_annotation_is_a_message(tmp_path, data, files, label):
    put(tmp_path, files, ["v.mp4", "P01_11.mp4"])
    text = error_of(find_videos, data, tmp_path, label=label if data == "epic" else "")
    assert str(tmp_path) in text and f"--data {data}" in text


@pytest.mark.parametrize("data, choices", [("epic", "verb"), ("toy", "scene"), ("ucf101", "ucf101")])
def test_an_unknown_label_names_the_choices(tmp_path, data, choices):
    text = error_of(find_videos, data, put(epic(tmp_path), UCF, UCF_VIDEOS), label="colour")
    assert "--label colour" in text and choices in text


@pytest.mark.parametrize("data", ["ucf101", "k400", "toy", "own"])
def test_an_unknown_split_is_a_message(tmp_path, data):
    put(tmp_path, {**UCF, "train.csv": "v 0\n"}, UCF_VIDEOS)
    assert "middle" in error_of(find_videos, str(tmp_path) if data == "own" else data, tmp_path, "middle")


def test_own_data_messages_name_the_place(tmp_path):
    put(tmp_path / "only", {}, ["val/a/1.mp4"])
    assert str(tmp_path / "no") in error_of(find_videos, str(tmp_path / "no"))
    assert "train" in error_of(find_videos, str(tmp_path / "only"), split="train")
    (tmp_path / "empty").mkdir()
    assert ".mp4" in error_of(find_videos, str(tmp_path / "empty")) and str(tmp_path / "empty") in error_of(
        find_videos, str(tmp_path / "empty"))
    put(tmp_path / "zero", {"1.mp4": ""})
    assert "1 empty" in error_of(find_videos, str(tmp_path / "zero"))


@pytest.mark.parametrize("lines, expected", [
    ("1.mp4 0\nnonsense\n", "list.txt:2"), ("1.mp4 0\n1.mp4\n", "label"), ("1.mp4 0\n\n1.mp4 -1\n", "list.txt:3"),
    ("1.mp4\n\n1.mp4 4\n", "list.txt:3"), ("1.mp4 0\n\nnonsense\n", "list.txt:3"), ("1.mp4 0\nframes/1 300 0\n", "list.txt:2"),
    ("frames/1 300 0\n", "directory of frames"), ("path,label\n1.mp4,0\n", "list.txt:1"), ("1.mp4 0\n1.mp4 300 jump\n", "list.txt:2"),
    ("1.mp4 0\n1.mp4 0 300 1\n", "list.txt:2"), ("1.mp4 0\n1.mp4 0.5 2.5 1\n", "list.txt:2"), ("1.mp4 0\n1.mp4  3  turns\n", "list.txt:2"),
    ("1.mp4,0\n1.mp4,0,300,1\n", "list.txt:2"), ("1.mp4 0\n1.mp4,up, then down\n", "list.txt:2"), ("1.gif 0\n", "list.txt:1"), (
        "\n", "list.txt"), ("no.mp4 0\nnone.mp4 1\n", "no.mp4"), ("", "list.txt")])
def test_list_file_messages(tmp_path, lines, expected):
    put(tmp_path, {"list.txt": lines}, ["1.mp4"])
    assert expected in error_of(find_videos, str(tmp_path / "list.txt"))


@pytest.mark.parametrize("content", [b"\x00\x00\x00\x20ftypisom\xff\xfe\x81", b"{" + b"x" * 5000 + b"}"])
def test_a_file_that_is_no_list_is_a_message(tmp_path, content):
    (tmp_path / "clip.bin").write_bytes(content)
    assert "clip.bin" in error_of(find_videos, str(tmp_path / "clip.bin"))


def test_a_single_video_is_a_listing_of_one(tmp_path):
    put(tmp_path, videos=["clip.MP4"])
    assert [Path(item.path).name for item in find_videos(str(tmp_path / "clip.MP4")).items] == ["clip.MP4"]
    assert "neither one of" in error_of(find_videos, str(tmp_path / "other.mp4"))


# ---- 4. Clips --------------------------------------------------------------------------------------------------------

CLIP = SimpleNamespace(frames=4, stride=2, image_size=16, repeats=2, min_crop=0.66)


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    return [Item(str(tiny_video(root / f"{i}.mp4", 30, side=48)), i) for i in range(5)]


def read_all(items, keys, workers):
    dataset = Clips(items, partial(mofo.sample_clips, cfg=CLIP), seed=3)
    batches = list(loader(dataset, [keys[:3], keys[3:]], workers, CPU))
    return torch.cat([b["clips"] for b in batches]), sum((b["names"] for b in batches), []), torch.cat([b["labels"] for b in batches])


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(items, workers):
    keys = [(0, 0), (0, 3), (1, 0), (1, 1), (2, 4), (0, 0)]
    clips, names, ids = read_all(items, keys, 0)
    again, names_again, _ = read_all(items, keys, workers)
    assert torch.equal(clips, again) and names == names_again == [items[i].path for _, i in keys]
    assert ids.tolist() == [i for _, i in keys]
    assert torch.equal(clips[:2], clips[10:])                                           # the same key, the same two clips


def test_epochs_and_repeats_draw_new_clips(items):
    clips = read_all(items, [(epoch, 0) for epoch in range(6)], 0)[0]                   # (12, T, H, W, 3), two per key
    starts = numbers(clips)[:, 0]
    assert clips.shape == (12, 4, 16, 16, 3) and clips.dtype == torch.uint8
    assert len(set(starts)) > 5 and (starts[0::2] != starts[1::2]).any()
    assert (np.diff(numbers(clips)) == CLIP.stride).all()


def test_a_seed_gives_other_clips(items):
    first, second = (Clips(items, lambda video, item, rng: rng.random(8)[None], seed)[0, 0][0] for seed in (0, 1))
    assert (first != second).all()


def broken(root, kind):
    path = tiny_video(root / "broken.mp4")
    path.write_bytes({"empty": b"", "truncated": path.read_bytes()[:-200], "text": b"not a video\n" * 50}[kind])
    return Item(str(path), 9)


@pytest.mark.parametrize("kind", ["empty", "truncated", "text", "gone"])
def test_broken_videos_are_replaced_in_training_and_reported_in_any_case(items, tmp_path, kind):
    bad = Item(str(tmp_path / "gone.mp4"), 9) if kind == "gone" else broken(tmp_path, kind)
    sample = partial(mofo.sample_clips, cfg=CLIP)
    batch = collate([Clips([bad, *items], sample)[0, i] for i in range(3)])
    assert len(batch["clips"]) == 6 and batch["read"].all() and set(batch["names"]) <= {item.path for item in items}
    assert batch["labels"].tolist() == [int(Path(name).stem) for name in batch["names"]]            # the replacement's own label
    assert len(batch["errors"]) >= 1 and all(error.startswith(bad.path) for error in batch["errors"])
    batch = collate([Clips([bad, *items], sample, replace=False)[0, i] for i in range(3)])
    assert batch["read"].tolist() == [False, True, True] and len(batch["clips"]) == 4
    assert batch["labels"].tolist() == [9, 0, 1] and batch["names"][0] == bad.path and len(batch["errors"]) == 1


def test_nothing_but_broken_videos_gives_no_clips(tmp_path):
    for replace in (True, False):
        batch = collate([Clips([broken(tmp_path, "text")], partial(mofo.sample_clips, cfg=CLIP), replace=replace)[0, 0]])
        assert batch["clips"] is None and not batch["read"].any() and batch["errors"]


def test_collate_joins_dicts_of_clips():
    samples = [({"a": np.zeros((1, 2)), "b": np.full((2, 3), i)}, f"{i}", i, []) for i in range(3)] + [(None, "x", 7, ["e"])]
    batch = collate(samples)
    assert batch["clips"]["a"].shape == (3, 2) and batch["clips"]["b"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch["read"].tolist() == [True] * 3 + [False] and batch["labels"].tolist() == [0, 1, 2, 7] and batch["errors"] == ["e"]


@pytest.mark.parametrize("frames, stride, expected", [(8, 1, [0, 1, 2, 3, 4, 4, 4, 4]), (4, 3, [0, 3, 4, 4])])
def test_short_videos_repeat_their_last_frame(tmp_path, frames, stride, expected):
    item = Item(str(tiny_video(tmp_path / "short.mp4", 5)))
    dataset = Clips([item], lambda video, item, rng: video.read(clip_indices(video, item, frames, stride, rng))[None])
    assert all(numbers(dataset[epoch, 0][0][0]).tolist() == expected for epoch in range(3))


def test_random_clips_reach_both_ends_of_a_video(items):
    dataset = Clips(items, lambda video, item, rng: video.read(clip_indices(video, item, 4, 3, rng))[None])
    got = np.stack([numbers(dataset[epoch, 0][0][0]) for epoch in range(150)])
    assert got.min() == 0 and got.max() == 29


# ---- 5. Batches, learning rate, optimiser ----------------------------------------------------------------------------

def plan(videos=10, batch=12, world=1, device_batch=12, repeats=1, steps=7, rank=0):
    env = Env(CPU, rank, world, None)
    return plan_run(SimpleNamespace(batch=batch, device_batch=device_batch, repeats=repeats, steps=steps, epochs=1), videos, env), env


def steps_of(videos=10, seed=5, start=0, **spread):
    """The global batch of each step: micro-batch by micro-batch, process by process."""
    world = spread.get("world", 1)
    ranks = []
    for rank in range(world):
        p, env = plan(videos, rank=rank, **spread)
        sampler = StepSampler(videos, p, env, seed, start)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler) == (p.steps - start) * p.accum
    return [[key for i in range(s * p.accum, (s + 1) * p.accum) for r in range(world) for key in ranks[r][i]]
            for s in range(p.steps - start)]


@pytest.mark.parametrize("world, device_batch", [(1, 12), (1, 3), (2, 6), (2, 2), (3, 4), (4, 1), (12, 64)])
@pytest.mark.parametrize("videos", [10, 4, 100])
def test_the_batch_of_a_step_is_the_same_however_it_is_spread(world, device_batch, videos):
    assert steps_of(videos, world=world, device_batch=device_batch) == steps_of(videos)


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


@pytest.mark.parametrize("world, device_batch", [(1, 3), (2, 6), (4, 1)])
def test_random_numbers_of_a_step_are_the_same_however_it_is_spread(world, device_batch):
    whole, env = plan()
    expected = rand(12, 2, generator=whole.generator(env, 0, 3, 0))
    got = []
    for i in range(12 // world // device_batch):
        for rank in range(world):
            p, env = plan(world=world, device_batch=device_batch, rank=rank)
            got.append(rand(p.micro, 2, generator=p.generator(env, 0, 3, i)))
    assert torch.equal(torch.cat(got), expected) and not torch.equal(expected, rand(12, 2, generator=whole.generator(env, 0, 4, 0)))


@pytest.mark.parametrize("spread", [dict(batch=100, world=3, device_batch=8), dict(batch=8, world=16, device_batch=32),
                                    dict(batch=12, world=1, device_batch=8)])
def test_a_batch_that_does_not_divide_names_the_numbers(spread):
    text = error_of(plan, **spread)
    assert all(re.search(rf"\b{number}\b", text) for number in spread.values())


def test_plan_counts_steps():
    p, _ = plan(videos=100, batch=8, world=2, device_batch=2, steps=0)
    assert (p.micro, p.accum, p.steps, p.per_epoch) == (2, 2, 12, 12.5)
    assert plan(videos=3, batch=8, device_batch=8, steps=0)[0].steps == 1


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_cosine_lr_rises_to_the_peak_and_falls_to_the_floor(warmup):
    rates = [cosine_lr(step, 100, warmup, 2.0, 0.5) for step in range(101)]
    assert rates[0] == (0 if warmup else 2.0) and rates[warmup] == max(rates) == 2.0 and rates[100] == pytest.approx(0.5)
    assert rates[max(0, warmup - 1)] == (0 if warmup == 1 else 2.0)                     # the last warm-up step is at the peak
    assert np.all(np.diff(rates[:warmup]) > 0) and np.all(np.diff(rates[warmup:]) < 0)
    assert rates[(100 + warmup) // 2] == pytest.approx(1.25, abs=0.02)


SIZES = dict(image_size=16, frames=4, patch_size=8, tubelet_size=2, dim=12, depth=2, heads=2)
DECODER = dict(decoder_dim=8, decoder_depth=1, decoder_heads=2)


def autoencoder(**sizes):
    return mofo.MaskedAutoencoder(**{**SIZES, **DECODER, **sizes})


def test_optimiser_groups_hold_every_parameter_once_and_vectors_do_not_decay():
    model = autoencoder()
    groups = adamw(model, 1e-3, 0.05, (0.9, 0.95), CPU).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay) == len(list(model.parameters()))
    assert all(decay[id(p)] == (0 if p.ndim == 1 or name == "mask_token" else 0.05) for name, p in model.named_parameters())


def test_layer_decay_groups_hold_every_parameter_once():
    vit = ViT(**SIZES, num_classes=3)
    groups = finetune.layer_decay_groups(vit, 1.0, 0.05, 0.5)
    found = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(list(vit.parameters()))
    for name, p in vit.named_parameters():
        layer = {"patch_embed": 0, "blocks.0": 1, "blocks.1": 2}.get(re.match(r"blocks\.\d|\w+", name)[0], 3)
        assert found[id(p)]["scale"] == 0.5 ** (3 - layer) and found[id(p)]["weight_decay"] == (0.05 if p.ndim > 1 else 0)


# ---- 6. Configuration ------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Config:
    data: str = "toy"                   # what to read
    batch_size: int = 8                 # clips, of which 50 % are mirrored
    lr: float = 1e-3                    # per 256 # clips
    ratio: float | None = 0.75          # share that is hidden; none = baseline
    compile: bool = True                # torch.compile


TOY_RECIPES = {"toy": {}, "ssv2": dict(batch_size=32, lr=2e-3, compile=False), "custom": dict(batch_size=2)}


@pytest.mark.parametrize("line, expected", [
    ("", {}),
    ("--data ssv2", dict(data="ssv2", batch_size=32, lr=2e-3, compile=False)),
    ("--data ssv2 --lr 5 --compile", dict(data="ssv2", batch_size=32, lr=5.0)),
    ("--batch_size 4", dict(batch_size=4)), ("--batch-size=4", dict(batch_size=4)), ("--batch_size=4", dict(batch_size=4)),
    ("--no-compile", dict(compile=False)), ("--no_compile", dict(compile=False)),
    ("--ratio none", dict(ratio=None)), ("--ratio None", dict(ratio=None)), ("--ratio .5", dict(ratio=0.5)),
    ("--data my_videos/a-b", dict(data="my_videos/a-b", batch_size=2)),
    ("--data=my_videos --batch-size 3", dict(data="my_videos", batch_size=3)),
])
def test_command_line_beats_recipe_beats_default(line, expected):
    assert parse_config(Config, TOY_RECIPES, line.split()) == Config(**expected)


@pytest.mark.parametrize("line, words", [
    ("--batchsize 4", ["--batchsize", "--batch-size"]), ("--lr 1 --batch_sise 3", ["--batch-sise", "--batch-size"]),
    ("--rat 3", ["--rat"]), ("--lr high", ["--lr", "high"]), ("--batch-size 1.5", ["--batch-size", "1.5"]),
    ("--ratio nothing", ["--ratio", "nothing"]), ("--batch-size none", ["--batch-size", "none"]), ("--lr", ["--lr"]),
    ("stray", ["stray"])])
def test_a_wrong_command_line_is_one_line(line, words):
    text = error_of(parse_config, Config, TOY_RECIPES, line.split())
    assert all(word in text for word in words)


@pytest.mark.parametrize("config, recipes", [(Config, TOY_RECIPES), (mofo.Config, mofo.RECIPES), (finetune.Config, finetune.RECIPES)],
                         ids=["tiny", "mofo", "finetune"])
def test_help_is_the_comments(config, recipes, capsys):
    with pytest.raises(SystemExit) as info:
        parse_config(config, recipes, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert info.value.code == 0 and "{" not in shown
    if config is Config:
        assert all(word in shown for word in ("clips, of which 50 % are mirrored (default: 8)", "per 256 # clips", "--no-compile", "(default: 0.75)"))
    for name in recipes:
        assert name in shown


@pytest.mark.parametrize("script", [mofo, finetune])
def test_every_setting_has_a_comment_and_a_use(script):
    source = Path(script.__file__).read_text()
    everything = source + Path(common.__file__).read_text()
    for field in dataclasses.fields(script.Config):
        assert re.search(rf"^    {field.name}: .*#\s*\w.*$", source, re.M), f"{field.name} has no help"
        assert re.search(rf"\b(cfg|c)\.{field.name}\b", everything), f"{field.name} is not used"


@pytest.mark.parametrize("script", [mofo, finetune])
def test_recipes_set_existing_fields_to_values_of_their_type(script):
    defaults = dataclasses.asdict(script.Config())
    assert {"toy", "custom", "ucf101", "hmdb51", "k400", "ssv2", "epic"} <= set(script.RECIPES)
    for name, recipe in script.RECIPES.items():
        for key, value in recipe.items():
            assert type(value) is type(defaults[key]) or isinstance(defaults[key], float) and isinstance(value, int), (name, key)
        if script is not finetune:                                        # its number of frames comes from --init
            plan_run(parse_config(script.Config, script.RECIPES, ["--data", name]), 1000, Env(CPU, 0, 1, None))


# ---- 7. Checkpoints of other people ----------------------------------------------------------------------------------

def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def random_state(model):
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


FILES = {   # prefix of the backbone's names, content of the file given the state dicts of a ViT and of a masked autoencoder
    "bare": ("", lambda vit, mae: vit),
    "own": ("", lambda vit, mae: dict(model=vit, optimizer={"state": {}}, step=3, backbone=SIZES)),
    "VideoMAE": ("encoder.", lambda vit, mae: dict(model=mae, args=Namespace(lr=1e-3, betas=[0.9]), epoch=3)),
    "DeepSpeed": ("", lambda vit, mae: dict(module=vit, args=Namespace(lr=1), best=np.float64(81.5), steps=np.int64(3), loss=np.float32(1))),
    "DDP": ("module.", lambda vit, mae: dict(state_dict=prefixed(vit, "module."), arch="vit")),
    "DDP of VideoMAE": ("module.encoder.", lambda vit, mae: dict(model=prefixed(mae, "module."))),
    "MME": ("encoder.model.", lambda vit, mae: dict(model=prefixed(vit, "encoder.model."))),
    "MME, momentum": ("encoder_q.encoder.model.", lambda vit, mae: dict(model=prefixed(vit, "encoder_q.encoder.model."))),
    "MoCo": ("module.encoder_q.", lambda vit, mae: dict(state_dict={**prefixed(vit, "module.encoder_q."), "module.queue": torch.zeros(2)})),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("classes", [0, 3])
def test_weights_of_other_peoples_files(tmp_path, kind, classes):
    prefix, content = FILES[kind]
    vit, mae = random_state(ViT(**SIZES)), random_state(autoencoder())
    torch.save(content(vit, mae), tmp_path / "file.pth")
    source = {name: value for name, value in (mae if "VideoMAE" in kind else vit).items()}
    source = {name.removeprefix("encoder."): value for name, value in source.items()}
    in_file = {**source, **({"module.queue": 0} if kind == "MoCo" else {})}
    model = ViT(**SIZES, num_classes=classes)
    report = load_weights(model, tmp_path / "file.pth")
    own = model.state_dict()
    assert set(report.loaded) == {name for name in own if name in source} and len(report.loaded) >= 2 + 13 * SIZES["depth"] - 2
    assert all(torch.equal(own[name], source[name]) for name in report.loaded)
    assert set(report.missing) == ({"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"} if classes else set())
    assert {n.removeprefix("module.").removeprefix("encoder.") if "VideoMAE" in kind else n.removeprefix(prefix)
            for n in report.unexpected} == {n for n in in_file if n not in own}


def test_every_tensor_of_a_file_is_reported_once(tmp_path):
    torch.save({"model": random_state(autoencoder())}, tmp_path / "file.pth")
    model = ViT(**SIZES)
    report = load_weights(model, tmp_path / "file.pth")
    assert len(report.loaded) + len(report.unexpected) == len(autoencoder().state_dict())
    assert sorted(report.loaded + report.missing) == sorted(model.state_dict())


def test_a_fine_tuned_file_fits_into_a_masked_autoencoder(tmp_path):
    vit = random_state(ViT(**SIZES, num_classes=3))
    torch.save({"module": vit}, tmp_path / "file.pth")
    model = autoencoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_weights(model, tmp_path / "file.pth")
    shared = {f"encoder.{name}" for name in vit if not name.startswith(("head", "fc_norm"))}
    assert set(report.loaded) == shared and set(report.missing) == set(before) - shared
    assert all(torch.equal(value, vit[name[len("encoder."):]] if name in shared else before[name]) for name, value in model.state_dict().items())


def test_a_head_of_another_width_is_left_new(tmp_path):
    torch.save({"model": random_state(ViT(**SIZES, num_classes=5))}, tmp_path / "file.pth")
    report = load_weights(ViT(**SIZES, num_classes=3), tmp_path / "file.pth")
    assert set(report.missing) == set(report.unexpected) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("kind", ["own", "VideoMAE", "MME"])
@pytest.mark.parametrize("change", [dict(dim=24), dict(depth=3)])
def test_a_file_of_another_size_is_refused_with_names_and_shapes(tmp_path, kind, change):
    torch.save(FILES[kind][1](random_state(ViT(**SIZES)), random_state(autoencoder())), tmp_path / "file.pth")
    model = ViT(**{**SIZES, **change})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text = error_of(load_weights, model, tmp_path / "file.pth")
    assert "file.pth" in text
    assert "blocks.2." in text if "depth" in change else "(12, 3, 2, 8, 8)" in text and "(24, 3, 2, 8, 8)" in text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())      # nothing half loaded


def test_strict_backbone_can_be_waived(tmp_path):
    torch.save(random_state(ViT(**SIZES)), tmp_path / "file.pth")
    report = load_weights(ViT(**{**SIZES, "depth": 3}), tmp_path / "file.pth", strict_backbone=False)
    assert len(report.missing) == 13 and all(name.startswith("blocks.2.") for name in report.missing)


def test_testing_wants_the_head_too(tmp_path):
    cfg = Namespace(init=str(tmp_path / "file.pth"), mode="test", model="vit_base", random_init=False, data="toy", image_size=0,
                    frames=0, focused=False)
    for refused in (random_state(autoencoder()), random_state(ViT(**SIZES)), random_state(ViT(**SIZES, num_classes=5))):
        torch.save(dict(model=refused, backbone=SIZES), cfg.init)
        assert "file.pth" in error_of(finetune.build_network, cfg, 3)
    tuned = random_state(ViT(**SIZES, num_classes=3))
    for wrapper in ("model", "module"):                                                 # ours, DeepSpeed's
        torch.save({wrapper: tuned, "backbone": SIZES}, cfg.init)
        vit = finetune.build_network(cfg, 3)
        vit = vit[0] if isinstance(vit, tuple) else vit
        assert all(torch.equal(value, tuned[name]) for name, value in vit.state_dict().items())


@pytest.mark.parametrize("content", [{"conv1.weight": torch.zeros(3)}, {"step": 3}, {"model": {"a": 1}}, {}, [torch.zeros(2)],
                                     torch.zeros(2), None], ids=["conv", "no tensors", "empty model", "empty", "list", "tensor", "None"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_file_without_matching_weights_is_refused(tmp_path, content, strict):
    torch.save(content, tmp_path / "file.pth")
    assert "file.pth" in error_of(load_weights, ViT(**SIZES), tmp_path / "file.pth", strict)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x80\x02.", b"PK\x03\x04" + bytes(50), b"<!DOCTYPE html>\n<html>", None],
                         ids=["empty", "text", "pickle", "zip", "html", "truncated"])
def test_a_file_that_is_no_checkpoint_is_a_message(tmp_path, content):
    torch.save({"model": torch.zeros(1000)}, tmp_path / "file.pth")
    (tmp_path / "file.pth").write_bytes((tmp_path / "file.pth").read_bytes()[:2000] if content is None else content)
    assert "file.pth" in error_of(load_weights, ViT(**SIZES), tmp_path / "file.pth")


def test_a_missing_checkpoint_and_a_directory_are_messages(tmp_path):
    assert "gone.pth" in error_of(load_weights, ViT(**SIZES), tmp_path / "gone.pth")
    assert tmp_path.name in error_of(load_weights, ViT(**SIZES), tmp_path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_loading_runs_no_code_from_the_file(tmp_path):
    torch.save({"model": ViT(**SIZES).state_dict(), "args": Malicious(tmp_path / "owned")}, tmp_path / "file.pth")
    assert "file.pth" in error_of(load_weights, ViT(**SIZES), tmp_path / "file.pth")
    assert not (tmp_path / "owned").exists()
    torch.load(tmp_path / "file.pth", weights_only=False)                               # it does harm where it can
    assert (tmp_path / "owned").exists()


# ---- 8. Saving -------------------------------------------------------------------------------------------------------

def save(path, step=1):
    model = autoencoder()
    save_checkpoint(path, Config(), Listing([Item("a.mp4", 0)], ["cat"], [], ""), step, model, model.encoder,
                    adamw(model, 1e-3, 0.05, (0.9, 0.95), CPU), torch.amp.GradScaler("cpu", enabled=False))
    return model


def test_a_checkpoint_reads_back_and_tells_its_network(tmp_path):
    model = save(tmp_path / "last.pt", 7)
    content = load_file(tmp_path / "last.pt")
    assert content["step"] == 7 and content["classes"] == ["cat"] and content["backbone"] == model.encoder.config and content["config"]["data"] == "toy"
    vit = ViT(**content["backbone"])
    load_weights(vit, tmp_path / "last.pt")
    assert all(torch.equal(value, model.encoder.state_dict()[name]) for name, value in vit.state_dict().items())
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 7             # plain dicts and tensors
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc]")])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_write_that_fails_leaves_the_previous_checkpoint(tmp_path, monkeypatch, error, earlier):
    path = tmp_path / "last.pt"
    if earlier:
        save(path)
    was = path.read_bytes() if earlier else None

    def half(content, place, *args, **kwargs):
        Path(place).write_bytes(b"half a checkpoint")
        raise error
    monkeypatch.setattr(torch, "save", half)
    text = error_of(save, path)
    assert "last.pt" in text and "disk" in text
    assert os.listdir(tmp_path) == (["last.pt"] if earlier else []) and (not earlier or path.read_bytes() == was)
