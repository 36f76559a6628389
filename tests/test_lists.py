"""AVA key frames and EPIC-KITCHENS-100 with two labels, in miniature trees of the published layouts."""
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import Clips, VideoError, collate, find_videos, loader
from finetune import ava_listing, key_frame_indices
from conftest import error_of, numbers, put, tiny_video

# ---- 1. AVA ----------------------------------------------------------------------------------------------------------

ACTIONS = ('item {\n  name: "bend/bow (at the waist)"\n  id: 1\n}\nitem {\n  name: "sit"\n  id: 11\n}\n'
           'label {\n  name: "talk to (e.g., self, a group)"\n  label_id: 79\n  label_type: PERSON_MOVEMENT\n}\n')
TRUTH = ("1j20qq1JyX4,0902,0.002,0.118,0.714,0.977,12,1\n"           # one person, two actions
         "1j20qq1JyX4,0902,0.444,0.054,0.992,0.990,79,0\n"
         "1j20qq1JyX4,0902,0.002,0.118,0.714,0.977,79,1\n"
         "1j20qq1JyX4,1798,0.100,0.200,0.300,0.400,1,2\n"
         "_-aBcDeFgHi,0950,0.1,0.2,0.3,0.4,80,5\n"
         "_-aBcDeFgHi,0951,0.1,0.2,0.3,0.4,11,5\n"
         "gone_video_,0903,0.1,0.2,0.3,0.4,11,5\n")
FOUND = ("1j20qq1JyX4,0902,0.01,0.12,0.71,0.98,12,0.95\n1j20qq1JyX4,0902,0.01,0.12,0.71,0.98,79,0.95\n"
         "1j20qq1JyX4,0902,0.5,0.1,0.9,0.9,,0.80\n1j20qq1JyX4,0902,0.6,0.1,0.9,0.9,,0.79\n"
         "1j20qq1JyX4,0903,0.5,0.1,0.9,0.9,,0.9\n"                  # a second without annotation
         "_-aBcDeFgHi,0950,0.5,0.1,0.9,0.9,-1,0.5\n"                # nobody certain enough
         "_-aBcDeFgHi,0951,0.5,0.1,0.9,0.9,-1,0.9\n"                # excluded
         "gone_video_,0903,0.5,0.1,0.9,0.9,,0.9\nother_video,0903,0.5,0.1,0.9,0.9,,0.9\n")
VIDEOS = "trainval/1j20qq1JyX4.mkv", "videos_15min/_-aBcDeFgHi.mp4", "trainval/._gone_video_.mp4", "x/GONE_VIDEO_.mp4"
BOXES, LTFB = "person_box_67091280_iou90/ava_detection_val_boxes_and_labels.csv", "ava_val_predicted_boxes.csv"
NAMES = "ava_v2.2/ava_action_list_v2.2_for_activitynet_2019.pbtxt"
TRAIN, VAL = "ava_v2.2/ava_train_v2.2.csv", "ava_v2.2/ava_val_v2.2.csv"
EXCLUDED = "ava_v2.2/ava_val_excluded_timestamps_v2.2.csv"


def ava(root, text={}, videos=VIDEOS):
    stamps = "_-aBcDeFgHi,0951\n"
    files = {NAMES: ACTIONS, BOXES: FOUND, TRAIN: TRUTH, VAL: TRUTH, EXCLUDED: stamps,
             EXCLUDED.replace("val", "train"): stamps, **text}
    return put(root, {name: content for name, content in files.items() if content is not None}, videos)


def test_ava_train_merges_the_actions_of_a_box(tmp_path):
    listing, truth = ava_listing(ava(tmp_path), "train")
    assert [(item.frame, item.second, len(item.boxes), item.label) for item in listing.items] == [
        ("1j20qq1JyX4,0902", 902, 2, 0), ("1j20qq1JyX4,1798", 1798, 1, 1), ("_-aBcDeFgHi,0950", 950, 1, 2)]
    first, last = listing.items[0], listing.items[2]
    assert first.boxes.dtype == np.float32 and first.actions.dtype == bool and first.actions.shape == (2, 80)
    assert np.allclose(first.boxes, [[.002, .118, .714, .977], [.444, .054, .992, .990]])
    assert [(np.flatnonzero(row) + 1).tolist() for row in first.actions] == [[12, 79], [79]]   # action id = column + 1
    assert (np.flatnonzero(last.actions) + 1).tolist() == [80] and first.scores.tolist() == [1, 1]
    assert (first.path, last.path) == (str(tmp_path / VIDEOS[0]), str(tmp_path / VIDEOS[1]))
    assert listing.missing == ["gone_video_"] and "3 listed, 2 found, 1 missing, 0 empty" in listing.summary
    assert len(listing.classes) == 80 and truth["class_ids"] == [1, 11, 79]
    assert [listing.classes[i] for i in (0, 1, 10, 78)] == ["bend/bow (at the waist)", "action 2", "sit",
                                                            "talk to (e.g., self, a group)"]


def test_ava_test_takes_detected_people_and_keeps_all_of_the_truth(tmp_path):
    listing, truth = ava_listing(ava(tmp_path), "test")
    first, second = listing.items
    assert (first.frame, second.frame) == ("1j20qq1JyX4,0902", "1j20qq1JyX4,0903")
    assert np.array_equal(first.boxes, np.float32([[.01, .12, .71, .98], [.5, .1, .9, .9]]))
    assert np.array_equal(first.scores, np.float32([.95, .8])) and first.scores.dtype == first.boxes.dtype == np.float32
    assert not first.actions.any() and first.actions.shape == (2, 80)
    real = truth["ground_truth"]
    assert real["frame"] == [",".join(line.split(",")[:2]) for line in TRUTH.split()]         # of missing videos, too
    assert real["label"].tolist() == [12, 79, 79, 1, 80, 11, 11] and truth["excluded"] == {"_-aBcDeFgHi,0951"}
    assert real["box"].shape == (7, 4) and real["box"][1].tolist() == [.444, .054, .992, .990]
    low, _ = ava_listing(tmp_path, "test", min_score=0.5)
    assert [(item.frame, len(item.boxes)) for item in low.items] == [
        ("1j20qq1JyX4,0902", 3), ("1j20qq1JyX4,0903", 1), ("_-aBcDeFgHi,0950", 1)]
    crlf, (own, _) = TRUTH.replace("\n", "\r\n"), ava_listing(tmp_path, "test", "gt")
    assert [len(item.boxes) for item in own.items] == [2, 1, 1] and own.items[0].actions.sum(1).tolist() == [2, 1]
    again, _ = ava_listing(ava(tmp_path, {VAL: "\ufeff" + crlf + "\r\n"}), "test", "gt")
    assert [item.frame for item in again.items] == [item.frame for item in own.items]


@pytest.mark.parametrize("boxes, files", [
    ("", {BOXES: None, LTFB: "mine"}), ("", {LTFB: FOUND, BOXES: "mine"}), ("mINE.csv", {"b/Mine.csv": "mine"}),
    ("", {BOXES: "mine", BOXES.replace("iou90", "iou99"): FOUND}), ("PATH", {"elsewhere.csv": "mine"})])
def test_where_detected_people_are_looked_for(tmp_path, boxes, files):
    mine = FOUND.replace("0.5,0.1", "0.25,0.1")
    root = ava(tmp_path, {name: mine if text == "mine" else text for name, text in files.items()})
    boxes = str(root / "elsewhere.csv") if boxes == "PATH" else boxes
    assert ava_listing(root, "test", boxes)[0].items[1].boxes[0, 0] == 0.25


GOOD, SEEN = "1j20qq1JyX4,0902,0.1,0.2,0.3,0.4,12,1", "1j20qq1JyX4,0902,0.1,0.2,0.3,0.4,,0.9"


@pytest.mark.parametrize("name, text, message", [
    *((VAL, f"{GOOD}\r\n\r\n{bad}\r\n{GOOD}\r\n", "3: expected video,second,x1") for bad in (
        "1j20qq1JyX4,0902,0.1,0.2,0.3", "video_id,second,x1,y1,x2,y2,action,person", "nonsense", GOOD + ",7",
        GOOD.replace("0.2", "nan"), GOOD.replace("0.3", "213.5"), GOOD.replace("0.1", "-1.0"), GOOD.replace("0.4", ""),
        GOOD.replace(",12,", ",81,"), GOOD.replace(",12,", ",0,"), GOOD.replace(",12,", ",,"),
        GOOD.replace("0902", "x"))),
    *((BOXES, f"{SEEN}\n{bad}\n", "2: expected video,second,x1") for bad in (
        GOOD.replace(",12,1", ""), SEEN.replace("0.9", ""), SEEN.replace("0.9", "nan"), SEEN.replace("0.9", "99"),
        SEEN.replace("0.4", "400"), SEEN.replace(",,", ","))),
    *((EXCLUDED, bad, "1: expected video,second") for bad in ("1j20qq1JyX4", "1j20qq1JyX4,x", GOOD)),
    *((NAMES, bad, " expected blocks item") for bad in (
        "", "nothing", ACTIONS.replace("11", "1"), 'item { id: 4 }', ACTIONS + 'item { name: "x" }',
        ACTIONS.replace("11", "81"), ACTIONS.replace("11", "0"))),
    (VAL, None, "no ava_val_v2.2.csv below .*ava_v2.2.zip.*--root"), (NAMES, None, "no ava_action_list"),
    (EXCLUDED, None, "no ava_val_excluded"), (BOXES, None, f"no .*labels.csv or {LTFB} .*--boxes gt, the truth"),
    (VAL, GOOD.replace("1j20qq1JyX4", "elsewhere"), "1 listed, 0 found"), (BOXES, "", "no boxes"),
    (BOXES, SEEN.replace("0.9", "0.7"), "no boxes with score >= 0.8 in .*labels.csv")])
def test_what_is_not_as_published_is_named(tmp_path, name, text, message):
    error = error_of(ava_listing, ava(tmp_path, {name: text}), "test")
    assert re.search(message, error)
    assert "expected" not in message or f"{tmp_path / name}:{message}" in error                     # file and line


def test_missing_and_empty_videos_are_named_and_their_ground_truth_stays(tmp_path):
    root = ava(tmp_path, {"trainval/_-aBcDeFgHi.mp4": "", EXCLUDED: ""}, [*VIDEOS[:1], "trainval2/1j20qq1JyX4.mp4"])
    listing, truth = ava_listing(root, "test")
    assert listing.missing == [str(root / "trainval/_-aBcDeFgHi.mp4"), "gone_video_"] and "1 empty" in listing.summary
    assert {item.path for item in listing.items} == {str(root / VIDEOS[0])}             # of several the first
    assert len(truth["ground_truth"]["frame"]) == 7 and truth["excluded"] == set()


# ---- 2. Clips around key frames --------------------------------------------------------------------------------------

def fake(fps, frames, seconds):
    info = SimpleNamespace(frames=frames, fps=fps, seconds=seconds)
    return SimpleNamespace(path="video.mp4", info=info, index_at=lambda time: min(frames - 1, int((time + 5e-4) * fps)))


@pytest.mark.parametrize("fps", [15.0, 23.976, 25.0, 29.97, 30.0, 60.0])
@pytest.mark.parametrize("frames, stride", [(16, 4), (8, 8), (32, 2), (5, 1), (3, 3), (1, 1)])
@pytest.mark.parametrize("seconds, start", [(901, 900), (905, 900), (905.1, 0), (7200, 0)])      # cut out; whole
def test_clip_around_a_key_frame_against_a_slow_loop(fps, frames, stride, seconds, start):
    video = fake(fps, int(fps * seconds), seconds)
    for second in (902, 1000, 1798)[:3 if seconds != 905.1 else 1]:
        centre, expected = video.index_at(second - start), []
        for k in range(frames):
            away = (k * stride - frames * stride // 2) * fps / 30                 # frames of this video
            nearest = min(range(int(away) - 2, int(away) + 3), key=lambda n: (abs(n - away), -n))   # the later of two
            expected.append(min(max(centre + nearest, 0), video.info.frames - 1))
        got = key_frame_indices(video, second, frames, stride)
        assert got.tolist() == expected and got.shape == (frames,)


def test_clips_are_clipped_to_the_video_which_must_hold_the_key_frame():
    assert key_frame_indices(fake(30, 100, 10 / 3), 900, 8, 8).tolist() == [0, 0, 0, 0, 0, 8, 16, 24]
    assert key_frame_indices(fake(30, 100, 10 / 3), 903, 8, 8).tolist() == [58, 66, 74, 82, 90, 98, 99, 99]
    assert key_frame_indices(fake(30, 300, 10), 910, 1, 1).tolist() == [299]          # the last moment is in it
    for second, seconds in ((911, 10), (899, 10), (1201, 300), (1798, 1500)):
        with pytest.raises(VideoError, match=rf"^video.mp4: .*{seconds}\.0 s.* {second}$"):
            key_frame_indices(fake(30, 30 * seconds, seconds), second, 16, 4)


def key_frame_clip(video, item, rng):
    clip = video.read(key_frame_indices(video, item.second, 4, 3), (16, 16))[None]
    return {"clips": clip, "boxes": item.boxes, "actions": item.actions, "people": np.array([len(item.boxes)])}


@pytest.mark.parametrize("workers", [0, 1])
def test_key_frames_travel_through_clips_and_collate(tmp_path, workers):
    box = "0.1,0.2,0.3,0.4"
    truth = [f"video_num_1,0902,{box},1,0", f"video_num_1,0904,{box},2,0", "video_num_1,0904,0.5,0.2,0.8,0.4,3,1",
             f"video_num_2,0903,{box},4,0", f"video_num_1,0990,{box},5,0"]
    root = ava(tmp_path, {TRAIN: "\n".join(truth)}, ["video_num_2.mp4"])                            # not a video
    tiny_video(root / "video_num_1.mkv", 60)
    listing, _ = ava_listing(root, "train")
    sets = [Clips(listing.items, key_frame_clip, replace=replace) for replace in (False, True)]
    keys = [(0, 0), (0, 1), (0, 2), (0, 3)]
    batch, again = (next(iter(loader(data, [keys], workers, torch.device("cpu")))) for data in sets)
    assert batch["read"].tolist() == [True, True, False, False] and batch["labels"].tolist() == [0, 1, 2, 3]
    assert len(batch["errors"]) == 2 and "990" in batch["errors"][0] and "video_num_2" in batch["errors"][1]
    clips = batch["clips"]
    assert clips["people"].tolist() == [1, 2] and clips["boxes"].shape == (3, 4)
    assert clips["actions"].nonzero().tolist() == [[0, 0], [1, 1], [2, 2]]
    assert numbers(clips["clips"]).tolist() == [[18, 19, 20, 21], [38, 39, 40, 41]]               # 10 frames a second
    assert again["read"].all() and set(again["labels"].tolist()) == {0, 1}        # replacements say which they are
    assert again["clips"]["people"].tolist() == [len(listing.items[i].boxes) for i in again["labels"]]


# ---- 3. EPIC-KITCHENS-100 --------------------------------------------------------------------------------------------

HEAD = "video_id,start_timestamp,stop_timestamp,verb_class,noun_class\n"
ROW = "{},00:00:01.00,00:01:02.50,{},{}\n".format
NAMED = {"EPIC_100_verb_classes.csv": "id,key\n" + "".join(f"{i},verb-{i}\n" for i in (1, 0, *range(2, 12))),
         "EPIC_100_noun_classes.csv": "id,key,instances\r\n0,tap,\"['tap', 'tap:water']\"\r\n1,board:big,['board']\r\n"}


@pytest.mark.parametrize("files, verbs, nouns", [
    ({}, [str(i) for i in range(11)], [str(i) for i in range(12)]),
    (NAMED, [f"verb-{i}" for i in range(12)], ["tap", "board:big", *map(str, range(2, 12))])])
def test_epic_with_two_labels(tmp_path, files, verbs, nouns):
    train, test = ROW("P01_11", 2, 10) + ROW("P18_102", 10, 2), ROW("P18_102", 2, 1) + ROW("P03_01", 0, 11)
    put(tmp_path, {"EPIC_100_train.csv": HEAD + train, "EPIC_100_validation.csv": HEAD + test, **files},
        ["P01/videos/P01_11.MP4", "x/p18_102.mp4", "P03/P03_01.MP4"])
    train, test = (find_videos("epic", tmp_path, split, "verb-noun") for split in ("train", "test"))
    assert [item.label for item in train.items] == [(2, 10), (10, 2)] and train.items[0].stop == 62.5
    assert train.classes == test.classes == [f"verb:{name}" for name in verbs] + [f"noun:{name}" for name in nouns]
    samples = [(np.zeros((1, 2)), item.path, item.label, []) for item in test.items]
    assert collate(samples)["labels"].tolist() == [[2, 1], [0, 11]]               # a column per head


@pytest.mark.parametrize("rows", [ROW("P01_11", 3_000_000_000, 10), ROW("P" * 200_000, 1, 1)])
def test_epic_annotations_that_cannot_be_true_are_a_message(tmp_path, rows):
    put(tmp_path, {"EPIC_100_train.csv": HEAD + rows}, ["P01_11.MP4"])
    assert "is not as published" in error_of(find_videos, "epic", tmp_path)


def test_lists_and_kinetics_with_names_of_their_own(tmp_path):
    """Latin-1 in a list, and copies of Kinetics that are not called by YouTube's id."""
    names = ["kinetics_vid_0000", "kinetics_vid_0001", "abc-_567890_000010_000020"]
    put(tmp_path, {"train.csv": "".join(f"train/{name}.mp4 {i}\n" for i, name in enumerate(names))},
        [f"train/{name}.mp4" for name in names])
    found = [(item.path, item.label) for item in find_videos("k400", tmp_path).items]
    assert found == [(f"{tmp_path}/train/{name}.mp4", i) for i, name in enumerate(names)]
    (tmp_path / "odd.txt").write_bytes(b"train/\xe9t\xe9.mp4 run\n")
    (tmp_path / os.fsdecode(b"train/\xe9t\xe9.mp4")).write_bytes(b"x")
    assert len(find_videos(str(tmp_path / "odd.txt")).items) == 1
