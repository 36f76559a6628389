"""AVA key frames and EPIC-KITCHENS-100 with two labels, in miniature trees of the published layouts."""
import csv
import re
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

import finetune
from common import Clips, collate, find_videos, loader, UserError, VideoError
from finetune import ava_listing, epic_participants, epic_subsets, time_in_file, key_frame_indices


def tiny_video(path, frames=12, fps=10, side=32):
    """Frame n is grey 8 + n mod 60 * 4, so that a picture tells its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", fps, width=side, height=side, pix_fmt="yuv420p", options={"qp": "0"})
        for n in range(frames):
            picture = np.full((side, side, 3), 8 + 4 * (n % 60), np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        file.mux(stream.encode())
    return path


def put(root, text={}, videos=()):
    for name, content in {**text, **dict.fromkeys(videos, "x")}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode())
    return root


def error_of(function, *args, **kwargs):
    with pytest.raises(UserError) as info:
        function(*args, **kwargs)
    assert "\n" not in str(info.value) and str(info.value).startswith("error: ")
    return str(info.value)


# ---- 1. AVA ----------------------------------------------------------------------------------------------------------

SIXTY = ('item {\n  name: "bend/bow (at the waist)"\n  id: 1\n}\nitem {\n  name: "sit"\n  id: 11\n}\n'
         'item {\n  name: "talk to (e.g., self, a person, a group)"\n  id: 79\n}\n')
EIGHTY = ('label {\n  name: "bend/bow (at the waist)"\n  label_id: 1\n  label_type: PERSON_MOVEMENT\n}\nlabel {\n  label_id: 2\n'
          '  name: "crawl"\n  label_type: PERSON_MOVEMENT\n}\n')
TRUTH = ("1j20qq1JyX4,0902,0.002,0.118,0.714,0.977,12,1\n"           # one person, two actions
         "1j20qq1JyX4,0902,0.444,0.054,0.992,0.990,79,0\n"
         "1j20qq1JyX4,0902,0.002,0.118,0.714,0.977,79,1\n"
         "1j20qq1JyX4,1798,0.100,0.200,0.300,0.400,1,2\n"
         "_-aBcDeFgHi,0950,0.1,0.2,0.3,0.4,80,5\n"
         "_-aBcDeFgHi,0951,0.1,0.2,0.3,0.4,11,5\n"
         "gone_film_x,0903,0.1,0.2,0.3,0.4,11,5\n")
FOUND = ("1j20qq1JyX4,0902,0.01,0.12,0.71,0.98,12,0.95\n1j20qq1JyX4,0902,0.01,0.12,0.71,0.98,79,0.95\n"
         "1j20qq1JyX4,0902,0.5,0.1,0.9,0.9,,0.80\n1j20qq1JyX4,0902,0.6,0.1,0.9,0.9,,0.79\n"
         "1j20qq1JyX4,0903,0.5,0.1,0.9,0.9,,0.9\n"                  # a second without annotation
         "1j20qq1JyX4,0901,0.5,0.1,0.9,0.9,,0.9\n1j20qq1JyX4,1799,0.5,0.1,0.9,0.9,,0.9\n"       # outside of what is annotated
         "_-aBcDeFgHi,0950,0.5,0.1,0.9,0.9,-1,0.5\n"                # nobody certain enough
         "_-aBcDeFgHi,0951,0.5,0.1,0.9,0.9,-1,0.9\n"                # excluded
         "gone_film_x,0903,0.5,0.1,0.9,0.9,,0.9\nother_movie,0903,0.5,0.1,0.9,0.9,,0.9\n")
FILMS = "trainval/1j20qq1JyX4.mkv", "videos_15min/_-aBcDeFgHi.mp4", "trainval/._gone_film_x.mp4"
SLOWFAST = "person_box_67091280_iou90/ava_detection_val_boxes_and_labels.csv"


def ava(root, text={}, videos=FILMS):
    files = {"ava_v2.2/ava_action_list_v2.2_for_activitynet_2019.pbtxt": SIXTY, "ava_v2.2/ava_action_list_v2.2.pbtxt": EIGHTY,
             SLOWFAST: FOUND}
    for part in ("train", "val"):
        files |= {f"ava_v2.2/ava_{part}_v2.2.csv": TRUTH,
                  f"ava_v2.2/ava_{part}_excluded_timestamps_v2.2.csv": "_-aBcDeFgHi,0951\n"}
    return put(root, {name: content for name, content in {**files, **text}.items() if content is not None}, videos)


def test_ava_train_merges_the_actions_of_a_box(tmp_path):
    listing = ava_listing(ava(tmp_path), "train")
    assert [(item.frame, item.second, len(item.boxes), item.label) for item in listing.items] == [
        ("1j20qq1JyX4,0902", 902, 2, 0), ("1j20qq1JyX4,1798", 1798, 1, 1), ("_-aBcDeFgHi,0950", 950, 1, 2)]
    first = listing.items[0]
    assert first.boxes.dtype == np.float32 and first.actions.dtype == bool and first.actions.shape == (2, 80)
    assert np.allclose(first.boxes, [[.002, .118, .714, .977], [.444, .054, .992, .990]])
    assert [(np.flatnonzero(row) + 1).tolist() for row in first.actions] == [[12, 79], [79]]        # action id = column + 1
    assert (np.flatnonzero(listing.items[2].actions) + 1).tolist() == [80] and first.scores.tolist() == [1, 1]
    assert first.path == str(tmp_path / FILMS[0]) and listing.items[2].path == str(tmp_path / FILMS[1])
    assert listing.missing == ["gone_film_x"] and "3 listed, 2 found, 1 missing, 0 empty" in listing.summary
    assert "3 key frames, 4 boxes of the ground truth" in listing.summary and "oracle" not in listing.summary


def test_ava_class_names_and_evaluated_ids(tmp_path):
    listing = ava_listing(ava(tmp_path), "train")
    assert len(listing.classes) == 80 and listing.class_ids == [1, 11, 79]
    assert listing.classes[:2] == ["bend/bow (at the waist)", "crawl"] and listing.classes[10] == "action 11"
    without = ava_listing(ava(tmp_path / "b", {"ava_v2.2/ava_action_list_v2.2.pbtxt": None}), "train")
    assert (without.classes[0], without.classes[1], without.classes[10]) == ("bend/bow (at the waist)", "action 2", "sit")
    assert without.classes[78] == "talk to (e.g., self, a person, a group)" and without.class_ids == [1, 11, 79]


@pytest.mark.parametrize("name, content", [("60", SIXTY), ("80", EIGHTY)])
def test_both_dialects_of_the_action_list(tmp_path, name, content):
    for text in (content, content.replace("\n", "\r\n"), content.replace("\n", " "), "\ufeff" + content):
        (tmp_path / name).write_bytes(text.encode())
        more = {11: "sit", 79: "talk to (e.g., self, a person, a group)"} if name == "60" else {2: "crawl"}
        expected = {1: "bend/bow (at the waist)", **more}
        assert finetune._pbtxt(tmp_path / name) == expected


@pytest.mark.parametrize("text, line", [
    ("", ""), ("nothing\n", ""), (SIXTY.replace("item {", "item", 1), ""), (SIXTY.replace("11", "1"), ""),
    ('\n\nitem {\n  id: 4\n}\n', 3), ('item {\n  name: "sit"\n}\n', 1),
    (SIXTY + 'item {\n  name: "x"\n  id: 12\n', 13),
    (SIXTY.replace("}", "", 1), 1), ('item { name: "sit" id: 81 }', 1),
    ('item { name: "sit" id: 0 }', 1), ('item { name: "sit" id: x }', 1)])
def test_a_broken_action_list_is_a_message_with_its_line(tmp_path, text, line):
    name = "ava_v2.2/ava_action_list_v2.2_for_activitynet_2019.pbtxt"
    text = error_of(ava_listing, ava(tmp_path, {name: text}), "train")
    assert f"{tmp_path / name}:{line}{':' * bool(line)} expected item" in text


def test_ava_test_takes_detected_people(tmp_path):
    listing = ava_listing(ava(tmp_path), "test")
    first, second = listing.items
    assert (first.frame, second.frame, first.actions, second.actions) == ("1j20qq1JyX4,0902", "1j20qq1JyX4,0903", None, None)
    assert np.array_equal(first.boxes, np.float32([[.01, .12, .71, .98], [.5, .1, .9, .9]]))
    assert np.array_equal(first.scores, np.float32([.95, .8])) and first.scores.dtype == first.boxes.dtype == np.float32
    assert np.array_equal(second.boxes, np.float32([[.5, .1, .9, .9]])) and second.scores.tolist() == [np.float32(.9)]
    assert f"of {tmp_path / SLOWFAST} with score >= 0.8" in listing.summary
    assert "1 films cannot be read, their ground truth counts as missed" in listing.summary
    assert listing.excluded == {"_-aBcDeFgHi,0951"}
    assert listing.ground_truth["frame"] == [",".join(line.split(",")[:2]) for line in TRUTH.split()]       # all of it
    assert listing.ground_truth["label"].tolist() == [12, 79, 79, 1, 80, 11, 11]
    assert listing.ground_truth["box"].shape == (7, 4) and listing.ground_truth["box"][1].tolist() == [.444, .054, .992, .990]
    low = ava_listing(tmp_path, "test", min_score=0.5)
    assert [(item.frame, len(item.boxes)) for item in low.items] == [
        ("1j20qq1JyX4,0902", 3), ("1j20qq1JyX4,0903", 1), ("_-aBcDeFgHi,0950", 1)]


def test_ava_test_on_the_ground_truth_says_so(tmp_path):
    listing = ava_listing(ava(tmp_path, {SLOWFAST: None}), "test", "gt")
    train = ava_listing(tmp_path, "train")
    assert "oracle" in listing.summary and [item.frame for item in listing.items] == [item.frame for item in train.items]
    for a, b in zip(listing.items, train.items):
        assert np.array_equal(a.boxes, b.boxes) and np.array_equal(a.actions, b.actions)


def test_of_several_files_of_a_name_the_first_is_taken(tmp_path):
    other = FOUND.replace("0.5,0.1", "0.25,0.1")
    root = ava(tmp_path, {SLOWFAST.replace("iou90", "iou99"): other, "trainval2/1j20qq1JyX4.mp4": "x"})
    listing = ava_listing(root, "test")
    assert listing.items[1].boxes[0, 0] == 0.5 and listing.items[0].path.endswith("trainval/1j20qq1JyX4.mkv")


@pytest.mark.parametrize("where", ["ava_val_predicted_boxes.csv", "a/Mine.csv", "path"])
def test_where_detected_people_are_looked_for(tmp_path, where):
    mine = FOUND.replace("0.5,0.1", "0.25,0.1")
    root = ava(tmp_path / "root", {SLOWFAST: None if where.startswith("ava") else FOUND})
    file = put(tmp_path, {("x.csv" if where == "path" else f"root/{where}"): mine}) / "x.csv"
    boxes = {"path": str(file), "a/Mine.csv": "b/mINE.csv"}.get(where, "")
    assert ava_listing(root, "test", boxes).items[1].boxes[0, 0] == 0.25
    assert ava_listing(root, "train", boxes).items[0].scores.tolist() == [1, 1]                     # training does not use them


@pytest.mark.parametrize("boxes", ["", "nowhere.csv"])
def test_no_detected_people_says_what_to_get_and_where_to_put_it(tmp_path, boxes):
    text = error_of(ava_listing, ava(tmp_path, {SLOWFAST: FOUND if boxes else None}), "test", boxes)
    assert all(word in text for word in (*finetune.AVA_BOXES, str(tmp_path), "--boxes gt", "oracle", boxes))


@pytest.mark.parametrize("found", ["", "other_movie,0903,0.5,0.1,0.9,0.9,,0.9\n", "1j20qq1JyX4,0902,0.5,0.1,0.9,0.9,,0.7\n"])
def test_detections_of_other_films_or_too_uncertain_are_a_message(tmp_path, found):
    text = error_of(ava_listing, ava(tmp_path, {SLOWFAST: found}), "test")
    assert "nothing to read" in text and SLOWFAST in text and "0.8" in text


def test_random_annotations_against_a_slow_loop(tmp_path):
    rng = np.random.default_rng(0)
    films = [f"film{i:07d}" for i in range(5)]
    some = ["0.000,0.1,0.5,0.6", "0.2,0.2,0.9,1.000", "0.3,0.05,0.35,0.8", "0.25,0.1,0.5,0.6"]
    truth = [f"{rng.choice(films)},{rng.integers(900, 910):04d},{rng.choice(some)},{rng.integers(1, 81)},{rng.integers(9)}"
             for _ in range(300)]
    found = [f"{rng.choice([*films, 'else'])},{rng.integers(898, 915):04d},{rng.choice(some)},"
             f"{rng.choice(['', '-1', '5'])},{score}" for score in rng.choice([0.3, 0.79999, 0.8, 0.97], 300)]
    excluded = [f"{rng.choice(films)},{rng.integers(902, 910):04d}" for _ in range(8)]
    score_of = {}                                                    # the same box has the same score in all its rows
    for i, fields in enumerate(csv.reader(found)):
        found[i] = ",".join([*fields[:7], score_of.setdefault(tuple(fields[:6]), fields[7])])
    root = ava(tmp_path, {"ava_v2.2/ava_val_v2.2.csv": "\n".join(truth), SLOWFAST: "\r\n".join(found) + "\r\n",
                          "ava_v2.2/ava_val_excluded_timestamps_v2.2.csv": "\r\n".join(excluded)},
               [f"{film}.webm" for film in films[:4]])
    for boxes in ("gt", ""):
        expected = {}
        for line in truth if boxes else found:
            video, second, *box, label, last = line.split(",")
            usable = boxes or (float(last) >= 0.8 and 902 <= int(second) <= 1798)
            if usable and video in films[:4] and f"{video},{second}" not in excluded:
                people = expected.setdefault(f"{video},{second}", {})
                people.setdefault(tuple(np.float32(box).tolist()), set()).add(int(label) if boxes else np.float32(last))
        listing = ava_listing(root, "test", boxes)
        got = {item.frame: {tuple(box): set((np.flatnonzero(a) + 1).tolist()) if boxes else {s} for box, a, s in zip(
            item.boxes.tolist(), item.scores if item.actions is None else item.actions, item.scores)} for item in listing.items}
        assert got == expected and len(got) == len(listing.items) > 20
        assert all(len(item.boxes) == len(got[item.frame]) for item in listing.items)               # no box twice
        assert [item.label for item in listing.items] == list(range(len(got)))
        rows = zip(listing.ground_truth["frame"], listing.ground_truth["box"].tolist(), listing.ground_truth["label"].tolist())
        assert [(f, b, a) for f, b, a in rows] == [(",".join(r[:2]), [float(x) for x in r[2:6]], int(r[6]))
                                                   for r in csv.reader(truth)]
        assert listing.excluded == set(excluded) and listing.missing == ["film0000004"]


@pytest.mark.parametrize("change", [lambda text: text.replace("\n", "\r\n"),
                                    lambda text: "\ufeff" + text, lambda text: "\n \n" + text + "\n\n"])
def test_line_ends_marks_and_blank_lines_do_not_matter(tmp_path, change):
    listings = [[ava_listing(root, split) for split in ("train", "test")] for root in (ava(tmp_path / "same" / "ava"), put(
        ava(tmp_path / "other" / "ava"), {f"ava_v2.2/ava_{part}_v2.2.csv": change(TRUTH) for part in ("train", "val")} | {
            SLOWFAST: change(FOUND), "ava_v2.2/ava_val_excluded_timestamps_v2.2.csv": change("_-aBcDeFgHi,0951\n")}))]
    for a, b in zip(*listings):
        here, there = ([(i.frame, i.boxes.tolist(), i.scores.tolist()) for i in x.items] for x in (a, b))
        assert here == there
        assert a.ground_truth["frame"] == b.ground_truth["frame"] and a.excluded == b.excluded


GOOD = "1j20qq1JyX4,0902,0.1,0.2,0.3,0.4,12,1"


@pytest.mark.parametrize("line", [
    "1j20qq1JyX4,0902,0.1,0.2,0.3", "video_id,second,x1,y1,x2,y2,action,person", "nonsense", GOOD + ",7",
    GOOD.replace("0.2", "nan"), GOOD.replace("0.3", "213.5"), GOOD.replace("0.4", ""), GOOD.replace(",12,", ",81,"),
    GOOD.replace(",12,", ",0,"),
    GOOD.replace(",12,", ",,"), GOOD.replace(",12,", ",1.5,"), GOOD.replace("0902", "x"),
    GOOD.replace("0.1", "-1.0"), GOOD[11:], GOOD.replace(",", " "), "\xff\xfe\x00"])
def test_a_broken_annotation_names_its_line(tmp_path, line):
    name = "ava_v2.2/ava_train_v2.2.csv"
    root = ava(tmp_path, {name: f"{GOOD}\r\n\r\n{line}\r\n{GOOD}\r\n"})
    assert f"{root / name}:3: expected video,second" in error_of(ava_listing, root, "train")


SEEN = "1j20qq1JyX4,0902,0.1,0.2,0.3,0.4,,0.9"


@pytest.mark.parametrize("line", [
    GOOD.replace(",12,1", ""), SEEN.replace("0.9", ""), SEEN.replace("0.9", "nan"), SEEN.replace("0.9", "99"),
    SEEN.replace("0.2", "inf"), SEEN.replace("0.4", "400"), SEEN.replace(",,", ","), "video,sec,x1,y1,x2,y2,label,score"])
def test_a_broken_detection_names_its_line(tmp_path, line):
    root = ava(tmp_path, {SLOWFAST: f"{SEEN}\n{line}\n"})
    assert f"{root / SLOWFAST}:2: expected video,second" in error_of(ava_listing, root, "test")


@pytest.mark.parametrize("line", ["1j20qq1JyX4", "1j20qq1JyX4,x", GOOD, ",0902"])
def test_a_broken_excluded_stamp_names_its_line(tmp_path, line):
    name = "ava_v2.2/ava_val_excluded_timestamps_v2.2.csv"
    assert f"{tmp_path / name}:1:" in error_of(ava_listing, ava(tmp_path, {name: line}), "test")


def test_an_empty_list_of_excluded_stamps_is_none(tmp_path):
    listing = ava_listing(ava(tmp_path, {"ava_v2.2/ava_val_excluded_timestamps_v2.2.csv": ""}), "test")
    assert listing.excluded == set() and len(listing.items) == 3


@pytest.mark.parametrize("name", ["ava_val_v2.2.csv", "ava_val_excluded_timestamps_v2.2.csv",
                                  "ava_action_list_v2.2_for_activitynet_2019.pbtxt"])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    text = error_of(ava_listing, ava(tmp_path, {f"ava_v2.2/{name}": None}), "test")
    assert name in text and str(tmp_path) in text and "ava_v2.2.zip" in text and "--root" in text


def test_youtube_ids_differ_in_case(tmp_path):
    videos = "abcdefghijK", "abcdefghijk", "UPPERCASED-", "OTHERS_film"
    truth = "".join(f"{video},0902,0.1,0.2,0.3,0.4,1,0\n" for video in videos)
    root = ava(tmp_path, {"ava_v2.2/ava_train_v2.2.csv": truth},
               [f"v/{n}.mp4" for n in ("abcdefghijk", "ABCDEFGHIJK", "uppercased-")])
    listing = ava_listing(root, "train")
    assert {item.frame[:11]: Path(item.path).name for item in listing.items} == {
        "abcdefghijk": "abcdefghijk.mp4", "abcdefghijK": "ABCDEFGHIJK.mp4", "UPPERCASED-": "uppercased-.mp4"}
    alone = ava(tmp_path / "alone", {"ava_v2.2/ava_train_v2.2.csv": truth}, ["abcdefghijk.mp4"])
    assert ava_listing(alone, "train").missing == ["abcdefghijK", "UPPERCASED-", "OTHERS_film"]     # never another film's file


def test_missing_and_empty_films_are_named_and_their_ground_truth_stays(tmp_path):
    root = ava(tmp_path, {"trainval/_-aBcDeFgHi.mp4": ""}, FILMS[:1])
    listing = ava_listing(root, "test")
    assert listing.missing == [str(root / "trainval/_-aBcDeFgHi.mp4"), "gone_film_x"] and "1 missing, 1 empty" in listing.summary
    assert "2 films cannot be read" in listing.summary and len(listing.ground_truth["frame"]) == 7
    assert {item.frame[:11] for item in listing.items} == {"1j20qq1JyX4"}


def test_nothing_is_said_of_missing_films_where_none_is(tmp_path):
    listing = ava_listing(ava(tmp_path, videos=[*FILMS, "gone_film_x.webm"]), "test")
    assert not listing.missing and "cannot" not in listing.summary
    assert listing.items[-1].frame == "gone_film_x,0903"


def test_films_that_do_not_join_show_both_sides(tmp_path):
    text = error_of(ava_listing, ava(tmp_path, videos=["a/renamed_1.mkv"]), "train")
    assert "1j20qq1JyX4" in text and "renamed_1" in text and str(tmp_path) in text


def test_where_ava_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIDEO_ROOT", raising=False)
    assert "data/ava" in error_of(ava_listing, "", "train") and "nowhere" in error_of(ava_listing, "nowhere", "train")
    ava(tmp_path / "data/ava")
    assert len(ava_listing("", "train").items) == len(ava_listing("data/ava", "train").items) == 3
    monkeypatch.setenv("VIDEO_ROOT", str(tmp_path / "data"))
    monkeypatch.chdir("/")
    assert len(ava_listing(None, "train").items) == 3 and "val" in error_of(ava_listing, "", "val")


# ---- 2. Clips around key frames --------------------------------------------------------------------------------------

@pytest.mark.parametrize("second, seconds, expected", [(902, 901.0, 2), (1798, 905.0, 898), (902, 10.2, 2), (902, 905.1, 902),
                                                       (902, 5400.0, 902), (1798, 1802.3, 1798)])
def test_whole_films_and_films_cut_out_at_900(second, seconds, expected):
    assert time_in_file(second, seconds) == expected


def fake(fps, frames, seconds=None):
    info = SimpleNamespace(frames=frames, fps=fps, seconds=seconds or frames / fps)
    return SimpleNamespace(path="film.mp4", info=info, index_at=lambda time: min(frames - 1, int((time + 5e-4) * fps)))


@pytest.mark.parametrize("fps", [15.0, 23.976, 24.0, 25.0, 29.97, 30.0, 60.0])
@pytest.mark.parametrize("frames, stride", [(16, 4), (8, 8), (32, 2), (5, 1), (3, 3), (1, 1), (8, 1)])
@pytest.mark.parametrize("seconds", [901, 7200])
def test_clip_around_a_key_frame_against_a_slow_loop(fps, frames, stride, seconds):
    video = fake(fps, int(fps * seconds), seconds)
    for second in (902, 1000, 1531, 1798):
        centre, expected = video.index_at(second - 900 if seconds == 901 else second), []
        for k in range(frames):
            away = (k * stride - frames * stride // 2) * fps / 30                # frames of this film
            nearest = min(range(int(away) - 2, int(away) + 3), key=lambda n: (abs(n - away), -n))   # of two, the later one
            expected.append(min(max(centre + nearest, 0), video.info.frames - 1))
        got = key_frame_indices(video, second, frames, stride)
        assert got.tolist() == expected and got.shape == (frames,)
    if fps == 30 and frames * stride == 64:                                      # as published
        half, centre = 32, (1000 if seconds == 7200 else 100) * 30
        assert key_frame_indices(video, 1000, frames, stride).tolist() == list(range(centre - half, centre + half, stride))


def test_clips_are_clipped_to_the_film():
    assert key_frame_indices(fake(30, 100), 900, 8, 8).tolist() == [0, 0, 0, 0, 0, 8, 16, 24]
    assert key_frame_indices(fake(30, 100), 903, 8, 8).tolist() == [58, 66, 74, 82, 90, 98, 99, 99]


def test_the_last_moment_of_a_film_is_in_it():
    assert key_frame_indices(fake(30, 300), 910, 1, 1).tolist() == [299]


@pytest.mark.parametrize("second, seconds", [(911, 10), (899, 10), (1201, 300), (1798, 1500)])
def test_a_film_that_ends_before_the_key_frame_is_broken(second, seconds):
    with pytest.raises(VideoError, match=rf"^film.mp4: .*{seconds}\.0 s.* {second}$"):
        key_frame_indices(fake(30, 30 * seconds), second, 16, 4)


def key_frame_clip(video, item, rng):
    picture = video.read(key_frame_indices(video, item.second, 4, 3), (16, 16))[None]
    return {"clips": picture, "boxes": item.boxes, "actions": item.actions, "people": np.array([len(item.boxes)])}


@pytest.mark.parametrize("workers", [0, 1])
def test_key_frames_travel_through_clips_and_collate(tmp_path, workers):
    truth = ("film_number1,0902,0.1,0.2,0.3,0.4,1,0\nfilm_number1,0904,0.1,0.2,0.3,0.4,2,0\n"
             "film_number1,0904,0.5,0.2,0.8,0.4,3,1\n"
             "film_number2,0903,0.1,0.2,0.3,0.4,4,0\nfilm_number1,0990,0.1,0.2,0.3,0.4,5,0\n")
    root = ava(tmp_path, {"ava_v2.2/ava_train_v2.2.csv": truth}, ["film_number2.mp4"])            # not a video
    tiny_video(root / "film_number1.mkv", 60)
    listing = ava_listing(root, "train")
    sets = [Clips(listing.items, key_frame_clip, replace=replace) for replace in (False, True)]
    keys = [(0, 0), (0, 1), (0, 2), (0, 3)]
    batch, again = (next(iter(loader(data, [keys], workers, torch.device("cpu")))) for data in sets)
    assert batch["read"].tolist() == [True, True, False, False] and batch["labels"].tolist() == [0, 1, 2, 3]
    assert len(batch["errors"]) == 2 and "990" in batch["errors"][0] and "film_number2" in batch["errors"][1]
    clips = batch["clips"]
    assert clips["people"].tolist() == [1, 2] and clips["boxes"].shape == (3, 4) and clips["actions"].shape == (3, 80)
    assert clips["actions"].nonzero().tolist() == [[0, 0], [1, 1], [2, 2]]
    numbers = ((clips["clips"].float().mean((2, 3, 4)) - 7) / 4).round().int().tolist()           # 10 frames a second
    assert numbers == [[18, 19, 20, 21], [38, 39, 40, 41]]
    assert again["read"].all() and set(again["labels"].tolist()) == {0, 1}            # replacements say which they are
    assert again["clips"]["people"].tolist() == [len(listing.items[i].boxes) for i in again["labels"]]


# ---- 3. EPIC-KITCHENS-100 --------------------------------------------------------------------------------------------

EPIC_HEAD = ("narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
             "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n")
VERBS = "id,key,instances,category\n" + "".join(f"{i},verb-{i},\"['do {i}', 'did']\",x\n" for i in (1, 0, *range(2, 12)))
NOUNS = "id,key,instances,category\r\n0,tap,\"['tap', 'tap:water']\",x\r\n1,board:chopping,['board'],y\r\n"


def epic_row(video, verb, noun):
    return (f"{video}_0,{video[:3]},{video},,00:00:01.00,00:01:02.50,9999,9999,\"take plate, put it\",take,{verb},plate,{noun},"
            f"\"['plate', 'cup']\",\"[{noun}, 7]\"\n")


def epic(root, text={}):
    train = epic_row("P01_11", 2, 10) + epic_row("P18_102", 10, 2) + epic_row("P01_11", 0, 0)
    return put(root, {"csv/EPIC_100_train.csv": EPIC_HEAD + train,
                      "csv/EPIC_100_validation.csv": EPIC_HEAD + epic_row("P18_102", 2, 1) + epic_row("P03_01", 0, 11), **text},
               ["P01/videos/P01_11.MP4", "x/p18_102.mp4", "P03/P03_01.MP4"])


@pytest.mark.parametrize("label, classes, ids", [("", 11, [2, 10, 0]), ("verb", 11, [2, 10, 0]), ("noun", 12, [10, 2, 0]),
                                                 ("action", 5, [4, 2, 0]), ("verb-noun", 23, [(2, 10), (10, 2), (0, 0)])])
def test_epic_labels(tmp_path, label, classes, ids):
    train, test = (find_videos("epic", epic(tmp_path), split, label) for split in ("train", "test"))
    assert [item.label for item in train.items] == ids and len(train.classes) == classes and train.classes == test.classes
    assert (train.items[0].start, train.items[0].stop) == (1, 62.5)
    if label == "action":
        assert train.classes == ["0:0", "0:11", "10:2", "2:1", "2:10"]                  # of both files, sorted as strings
    if label == "verb-noun":
        assert train.classes == [f"verb:{i}" for i in range(11)] + [f"noun:{i}" for i in range(12)]


def test_epic_class_names_come_from_their_files(tmp_path):
    root = epic(tmp_path, {"csv/EPIC_100_verb_classes.csv": VERBS, "csv/EPIC_100_noun_classes.csv": NOUNS})
    names = {label: find_videos("epic", root, "train", label).classes for label in ("verb", "noun", "action", "verb-noun")}
    assert names["verb"] == [f"verb-{i}" for i in range(12)]                            # all of the file: the heads are complete
    assert names["noun"] == ["tap", "board:chopping", *map(str, range(2, 12))] and names["action"][0] == "0:0"
    assert names["verb-noun"] == [f"verb:{n}" for n in names["verb"]] + [f"noun:{n}" for n in names["noun"]]


def test_epic_pairs_are_collated_to_two_columns(tmp_path):
    listing = find_videos("epic", epic(tmp_path), "test", "verb-noun")
    samples = [(np.zeros((1, 2)), item.path, item.label, []) for item in listing.items]
    assert collate(samples)["labels"].tolist() == [[2, 1], [0, 11]]
    assert epic_participants(listing.items) == ["P18", "P03"]
    assert "23 classes" in listing.summary


@pytest.mark.parametrize("files", [
    {"csv/EPIC_100_train.csv": EPIC_HEAD + "P01_11_0,P01,P01_11\n"}, {"csv/EPIC_100_train.csv": "video_id\nP01_11\n"},
    {"csv/EPIC_100_train.csv": EPIC_HEAD, "csv/EPIC_100_validation.csv": EPIC_HEAD},
    {"csv/EPIC_100_verb_classes.csv": "number,name\n0,take\n"}, {"csv/EPIC_100_noun_classes.csv": "id,key\nx,take\n"}])
@pytest.mark.parametrize("label", ["verb", "noun", "action", "verb-noun"])
def test_a_malformed_epic_file_is_a_message(tmp_path, files, label):
    text = error_of(find_videos, "epic", epic(tmp_path, files), label=label)
    assert str(tmp_path) in text and "--data epic" in text


SUBSETS = {"csv/EPIC_100_tail_verbs.csv": "verb\n18\n96\n18\n", "csv/EPIC_100_tail_nouns.csv": "noun\r\n7\r\n299\r\n",
           "csv/EPIC_100_unseen_participant_ids_validation.csv": "participant_id\nP18\nP32\n"}


def test_epic_subsets(tmp_path):
    put(tmp_path, {**SUBSETS, "later/EPIC_100_tail_verbs.csv": "verb\n5\n"})                     # of two, the first
    assert epic_subsets(tmp_path) == ({18, 96}, {7, 299}, {"P18", "P32"})


@pytest.mark.parametrize("text", [",verb\n0,18\n1,96\n", "verb,name\n18,put\n96,take\n", "class\n18\n96\n",
                                  "key,whatever\nput-3,18\ntake,96\n", "18\n96\n"])
def test_columns_of_the_tail_are_found(tmp_path, text):
    assert epic_subsets(put(tmp_path, {**SUBSETS, "csv/EPIC_100_tail_verbs.csv": text}))[0] == {18, 96}


@pytest.mark.parametrize("gone, expected", [
    ("tail_verbs", (set(), {7, 299}, {"P18", "P32"})), ("tail_nouns", ({18, 96}, set(), {"P18", "P32"})),
    ("unseen_participant_ids_validation", ({18, 96}, {7, 299}, set()))])
def test_a_subset_without_file_is_empty_and_said(tmp_path, capsys, gone, expected):
    put(tmp_path, {name: text for name, text in SUBSETS.items() if gone not in name})
    assert epic_subsets(tmp_path) == expected
    assert re.findall(r"EPIC_100_\w+\.csv", capsys.readouterr().out) == [f"EPIC_100_{gone}.csv"]


@pytest.mark.parametrize("name", SUBSETS)
@pytest.mark.parametrize("text", ["", "verb\n", "verb\nput\n", "name\nP18\nother\n", "verb\n1\nput\n"])
def test_a_subset_file_without_ids_is_a_message(tmp_path, name, text):
    assert str(tmp_path / name) in error_of(epic_subsets, put(tmp_path, {**SUBSETS, name: text}))
