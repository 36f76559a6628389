"""Retrieval, EPIC-KITCHENS, AVA and the support vector machine against slow loops written from the protocols' texts."""
import math
import random
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import UserError
from finetune import action_to_verb_noun, ava_mean_ap, epic_accuracy, retrieval_recall, squared_hinge_svm
from conftest import seeded

torch.set_num_threads(1)
KS = (1, 5, 10, 20, 50)


# ---- Retrieval -----------------------------------------------------------------------------------------------------

def slow_recall(gallery, gallery_labels, query, query_labels, ks, center, read=None):
    """Sort the gallery for every query in Python; of equally near videos those of other classes come first."""
    read = [True] * len(query) if read is None else read.tolist()
    gallery, query = gallery.double().tolist(), query.double().tolist()

    def mean(rows):
        return [sum(column) / len(rows) for column in zip(*rows)]

    def ready(row, middle):
        row = [a - b for a, b in zip(row, middle)] if center else row
        length = math.sqrt(sum(a * a for a in row))
        return [a / length for a in row] if length else row
    of_gallery, of_query = mean(gallery), mean([row for row, known in zip(query, read) if known])
    gallery, query = [ready(row, of_gallery) for row in gallery], [ready(row, of_query) for row in query]
    found = dict.fromkeys(ks, 0)
    for row, label, known in zip(query, query_labels.tolist(), read):
        order = sorted((-sum(a * b for a, b in zip(row, other)), other_label == label)
                       for other, other_label in zip(gallery, gallery_labels.tolist()))
        for k in ks:
            found[k] += known and any(same for _, same in order[:k])
    return {k: 100 * count / len(query) for k, count in found.items()}


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_recall_is_that_of_sorting_the_gallery(seed, center):
    g = seeded(seed)
    gallery, query = torch.randn(60, 6, generator=g) + 0.7, 5 * torch.randn(23, 6, generator=g) - 0.5
    labels, query_labels = torch.randint(12, (60,), generator=g), torch.randint(14, (23,), generator=g)   # 12, 13: no video
    read = torch.rand(23, generator=g) > 0.2
    query[~read] = 0
    result = retrieval_recall(gallery, labels, query, query_labels, KS, center, read)
    assert result == pytest.approx(slow_recall(gallery, labels, query, query_labels, KS, center, read))
    assert list(result) == list(KS) and result[1] < result[10] < 100
    query[read == False] = 1e3                                                 # noqa: E712  what is unread has no say
    assert result == retrieval_recall(gallery, labels, query, query_labels, KS, center, read)
    order, other = torch.randperm(60, generator=g), torch.randperm(23, generator=g)
    again = retrieval_recall(gallery[order], labels[order], query[other], query_labels[other], KS, center, read[other])
    assert again == pytest.approx(result)
    if not center:                                                             # only directions count
        scaled = gallery * (0.1 + torch.rand(60, 1, generator=g))
        assert retrieval_recall(scaled, labels, query, query_labels, KS, False, read) == pytest.approx(result)


def test_recall_where_videos_are_equally_near():
    g = seeded(5)
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=4)))                 # lengths 2, exact cosines
    gallery, query = signs[torch.randint(16, (40,), generator=g)], signs[torch.randint(16, (30,), generator=g)]
    labels, query_labels = torch.randint(5, (40,), generator=g), torch.randint(5, (30,), generator=g)
    result = retrieval_recall(gallery, labels, query, query_labels, (1, 2, 3, 5, 10))
    assert result == pytest.approx(slow_recall(gallery, labels, query, query_labels, (1, 2, 3, 5, 10), False))
    assert len(set(result.values())) > 2


@pytest.mark.parametrize("value", [1.0, 0.0, float("nan")])
def test_a_collapsed_network_finds_nothing(value):
    labels, other = torch.arange(90) % 3, torch.randn(90, 4, generator=seeded())
    flat = torch.full((90, 4), value)
    for gallery, query in ((flat, flat), (flat, other), (other, flat))[:2 if value == 1 else 3]:
        assert retrieval_recall(gallery, labels, query, labels) == {1: 0, 5: 0, 10: 0, 20: 0, 50: 0}


def test_recall_by_hand_and_ks_beyond_the_gallery():
    gallery, labels = torch.tensor([[1.0, 0], [0, 1], [-1, 0]]), torch.tensor([0, 1, 2])
    query = torch.tensor([[9.0, 1], [9, 1], [9, 1], [9, 1]])                   # nearest 0, then 1, then 2; 3 is not there
    result = retrieval_recall(gallery, labels, query, torch.tensor([0, 1, 2, 3]), (1, 2, 3, 50))
    assert result == {1: 25, 2: 50, 3: 75, 50: 75}
    assert retrieval_recall(gallery, labels, gallery, labels, (1,)) == {1: 100}
    shifted = gallery + torch.tensor([50.0, 20])                               # each set has an offset of its own
    assert retrieval_recall(gallery, labels, shifted, labels, (1,), center=True) == {1: 100}
    assert retrieval_recall(gallery, labels, shifted, labels, (1,))[1] < 50


def test_recall_in_chunks():
    g = seeded(8)
    gallery, query = torch.randn(2 ** 12, 2, generator=g), torch.randn(2 ** 12 + 30, 2, generator=g)     # two chunks
    labels, query_labels = torch.randint(900, (2 ** 12,), generator=g), torch.randint(900, (2 ** 12 + 30,), generator=g)
    last = torch.arange(len(query)) >= 2 ** 12 - 30                            # on both sides of the seam
    whole = retrieval_recall(gallery, labels, query, query_labels, read=last)
    part = retrieval_recall(gallery, labels, query[last], query_labels[last])
    assert whole == pytest.approx({k: part[k] * 60 / len(query) for k in KS}) and whole[50] > 0


# ---- EPIC-KITCHENS -------------------------------------------------------------------------------------------------

def slow_epic(verb_logits, noun_logits, verb, noun, read, tail, unseen):
    """Softmax, outer product, sort: row by row."""
    rows = []
    for v, n, verb_row, noun_row, known, new in zip(verb.tolist(), noun.tolist(), verb_logits.tolist(), noun_logits.tolist(),
                                                    read.tolist(), unseen.tolist()):
        p, q = [math.exp(a) for a in verb_row], [math.exp(a) for a in noun_row]    # the sum is the same for all
        pairs = {(a, b): p[a] * q[b] for a in range(len(p)) for b in range(len(q))}
        rank = dict(verb=sum(x >= p[v] for x in p), noun=sum(x >= q[n] for x in q),
                    action=sum(x >= pairs[v, n] for x in pairs.values()))      # 1 = best, after all ties
        in_tail = dict(verb=v in tail[0], noun=n in tail[1], action=v in tail[0] or n in tail[1])
        rows.append((rank, in_tail, new, known))
    result = {}
    for name in ("verb", "noun", "action"):
        for prefix, used in (("", rows), ("tail_", [r for r in rows if r[1][name]]), ("unseen_", [r for r in rows if r[2]])):
            for k in (1, 5) if not prefix else (1,):
                if used:
                    result[f"{prefix}{name}_top{k}"] = 100 * sum(r[3] and r[0][name] <= k for r in used) / len(used)
    return result


@pytest.mark.parametrize("verbs, nouns, rows", [(9, 13, 60), (7, 4, 40), (2, 30, 40), (3, 3, 30), (1, 9, 20), (97, 300, 4)])
def test_epic_accuracy_is_that_of_all_pairs(verbs, nouns, rows):
    g = seeded(verbs)
    verb, noun = torch.randint(verbs, (rows,), generator=g), torch.randint(nouns, (rows,), generator=g)
    verb_logits = torch.randn(rows, verbs, generator=g) + 1.5 * F.one_hot(verb, verbs)
    noun_logits = torch.randn(rows, nouns, generator=g) + 1.5 * F.one_hot(noun, nouns)
    read, unseen = torch.rand(rows, generator=g) > 0.1, torch.rand(rows, generator=g) > 0.6
    tail = ({0, 2, 3}, [1, 2])
    result = epic_accuracy(verb_logits, noun_logits, verb, noun, read, tail, unseen)
    assert result == pytest.approx(slow_epic(verb_logits, noun_logits, verb, noun, read, tail, unseen))
    plain = epic_accuracy(verb_logits + 700, noun_logits - 1e3 * torch.arange(rows)[:, None], verb, noun, read)
    assert plain == pytest.approx({name: result[name] for name in plain}) and len(plain) == 6
    logs = epic_accuracy(verb_logits.softmax(1).log(), noun_logits.double().softmax(1).log(), verb, noun, read, tail, unseen)
    assert logs == pytest.approx(result)


def test_epic_top5_is_of_pairs_and_not_of_parts():
    """Verb and noun each third of three: nine pairs, theirs is the worst."""
    logits = torch.tensor([[3.0, 2, 1]])
    result = epic_accuracy(logits, logits, torch.tensor([2]), torch.tensor([2]))
    assert result["verb_top5"] == result["noun_top5"] == 100 and result["action_top5"] == 0
    assert epic_accuracy(logits, logits * 9, torch.tensor([2]), torch.tensor([0]))["action_top5"] == 100   # third pair
    assert epic_accuracy(logits, logits * 9, torch.tensor([2]), torch.tensor([1]))["action_top5"] == 0     # sixth


def test_epic_counts_ties_nan_and_impossible_ids_as_wrong():
    verb, noun = torch.tensor([0]), torch.tensor([0])
    good, flat, bad = torch.eye(8)[:1], torch.zeros(1, 8), torch.full((1, 8), float("nan"))
    assert set(epic_accuracy(good, good, verb, noun).values()) == {100.0}
    assert set(epic_accuracy(flat, flat, verb, noun).values()) == {0.0}
    assert set(epic_accuracy(bad, good, verb, noun).values()) == {0.0, 100.0}
    assert epic_accuracy(bad, good, verb, noun)["action_top5"] == 0
    impossible = torch.tensor([[-math.inf, 0, -math.inf, -math.inf]])          # log of probability 0
    assert epic_accuracy(impossible, good, verb, noun)["verb_top5"] == 0
    assert epic_accuracy(impossible, good, verb + 1, noun)["action_top1"] == 100
    none = epic_accuracy(good, good, verb, noun, tail=([], [3]), unseen=torch.tensor([False]))
    assert len(none) == 6                                                      # nothing of a subset without rows


def test_verbs_and_nouns_of_one_action_head():
    g = seeded(3)
    actions = sorted({f"{v}:{n}" for v, n in torch.randint(12, (40, 2), generator=g).tolist() if v != 4 and n != 0})
    p = torch.randn(5, len(actions), generator=g).softmax(1)
    verbs, nouns = action_to_verb_noun(p, actions, 12, 14)
    for i, (v, n) in product(range(5), product(range(12), range(14))):
        assert verbs[i, v].item() == pytest.approx(sum(p[i, a].item() for a, name in enumerate(actions)
                                                       if name.split(":")[0] == str(v)), abs=1e-6)
        assert nouns[i, n].item() == pytest.approx(sum(p[i, a].item() for a, name in enumerate(actions)
                                                       if name.split(":")[1] == str(n)), abs=1e-6)
    assert verbs.shape == (5, 12) and nouns.shape == (5, 14) and not verbs[:, 4].any() and not nouns[:, 12:].any()
    assert torch.allclose(verbs.sum(1), torch.ones(5)) and torch.allclose(nouns.sum(1), torch.ones(5))
    result = epic_accuracy(verbs.log(), nouns.log(), torch.full((5,), 4), torch.zeros(5, dtype=torch.long))
    assert set(result.values()) == {0.0}                                       # no action has them


@pytest.mark.parametrize("actions", [["1:2", "cut onion"], ["1:2", "1"], ["1:2", "12:3"], ["1:2", "1:14"], ["1:2", "-1:3"],
                                     ["1:2:3", "1:2:3"], ["1:2"], ["1:2", "1:3", "2:2"], ["1:2", "1:"]])
def test_action_names_of_another_form(actions):
    with pytest.raises(UserError, match="actions"):
        action_to_verb_noun(torch.full((3, 2), 0.5), actions, 12, 14)


# ---- AVA -----------------------------------------------------------------------------------------------------------

def slow_overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height)


def slow_map(detections, truth, class_ids, excluded=(), iou=0.5, cap=None):
    """Rows as tuples; frame after frame, class after class, detection after detection."""
    def rows(table, scored):
        columns = (table["frame"], np.asarray(table["box"]).tolist(), np.asarray(table["label"]).tolist(),
                   np.asarray(table["score"]).tolist() if scored else [0.0] * len(table["frame"]))
        return [row for row in zip(*columns, strict=True) if row[0] not in excluded and row[2] in class_ids]
    found, real = rows(detections, True), rows(truth, False)
    if cap:
        best = []
        for name in {row[0] for row in found}:
            best += sorted([i for i, row in enumerate(found) if row[0] == name], key=lambda i: -found[i][3])[:cap]
        found = [found[i] for i in sorted(best)]
    found = [row for row in found if row[1][0] < row[1][2] and row[1][1] < row[1][3]]
    result = {}
    for c in class_ids:
        positives = sum(row[2] == c for row in real)
        if not positives:
            result[c] = math.nan
            continue
        pooled = []                                                            # (row number, score, true or false)
        for name in {row[0] for row in found}:
            boxes = [row[1] for row in real if row[0] == name and row[2] == c]
            taken = set()
            for i in sorted([i for i, row in enumerate(found) if row[0] == name and row[2] == c], key=lambda i: -found[i][3]):
                overlaps = [slow_overlap(found[i][1], box) for box in boxes]
                best = overlaps.index(max(overlaps)) if boxes else None
                true = boxes != [] and overlaps[best] >= iou and best not in taken
                taken |= {best} if true else set()
                pooled.append((i, found[i][3], true))
        pooled.sort(key=lambda entry: (-entry[1], entry[0]))
        points, hits = [(0.0, 1.0)], 0                                         # recall, precision
        for n, (_, _, true) in enumerate(pooled, 1):
            hits += true
            points.append((hits / positives, hits / n))
        result[c] = sum((points[j][0] - points[j - 1][0]) * max(p for _, p in points[j:]) for j in range(1, len(points)))
    valid = [ap for ap in result.values() if not math.isnan(ap)]
    return sum(valid) / len(valid), result


def scene(seed, frames=12, classes=6, distinct=False):
    """A table each: true boxes on two thirds of the frames, detections near them, doubles, strays and boxes of no area."""
    rng = random.Random(seed)
    true, found = [], []
    for name in [f"film{i % 3},{902 + i:04d}" for i in range(frames)]:
        people = []
        for _ in range(rng.choice((0, 1, 2, 3))):
            x, y = rng.randrange(8) / 16, rng.randrange(8) / 16
            people.append((x, y, x + rng.randrange(2, 9) / 16, y + rng.randrange(2, 9) / 16))
            true += [(name, people[-1], c) for c in rng.sample(range(1, classes + 1), 2)]
        for _ in range(rng.randrange(8)):
            x1, y1, x2, y2 = rng.choice(people) if people and rng.random() < 0.8 else (0.25, 0.25, 0.5, 0.5)
            box = (x1 + rng.choice((0, 0, 1 / 32)), y1, x2, y2 - rng.choice((0, 0, 1 / 16)))
            box = rng.choice(((box[2], *box[1:]), (*box[:3], box[1]))) if rng.random() < 0.1 else box
            score = rng.random() if distinct else rng.randrange(1, 9) / 8
            found += [(name, box, c, score if not distinct else rng.random()) for c in rng.sample(range(1, classes + 1), 3)]
    rng.shuffle(found)
    return stack_results(found), stack_results(true)


def stack_results(rows):
    names = ("frame", "box", "label", "score")[:len(rows[0])]
    columns = dict(zip(names, map(list, zip(*rows))))
    return {name: column if name == "frame" else np.array(column) for name, column in columns.items()}


def pick(rows, index):
    return {name: [column[i] for i in index] if name == "frame" else column[index] for name, column in rows.items()}


def same(a, b):
    assert list(a[1]) == list(b[1])
    assert a[0] == pytest.approx(b[0]) and a[1] == pytest.approx(b[1], nan_ok=True)


@pytest.mark.parametrize("cap", [None, 5])
@pytest.mark.parametrize("seed", range(12))
def test_map_is_that_of_the_loop(seed, cap):
    detections, truth = scene(seed)
    classes, excluded = [1, 2, 4, 5, 9], sorted(set(truth["frame"]))[:2]       # 3 and 6 do not count, 9 never happens
    result = ava_mean_ap(detections, truth, classes, excluded, cap=cap)
    same(result, slow_map(detections, truth, classes, excluded, cap=cap))
    assert 0 < result[0] < 1 and math.isnan(result[1][9])
    same(ava_mean_ap(detections, truth, classes, excluded, 0.75, cap), slow_map(detections, truth, classes, excluded, 0.75, cap))
    halves = {**detections, "box": detections["box"].astype(np.float32), "score": torch.from_numpy(detections["score"])}
    same(ava_mean_ap(halves, truth, classes, set(excluded), cap=cap), result)  # sixteenths are exact in float32


@pytest.mark.parametrize("cap", [None, 5])
@pytest.mark.parametrize("seed", range(3))
def test_map_does_not_depend_on_the_order_of_rows(seed, cap):
    detections, truth = scene(seed, distinct=True)
    result = ava_mean_ap(detections, truth, range(1, 7), cap=cap)
    rng = np.random.default_rng(seed)
    order, other = rng.permutation(len(detections["frame"])), rng.permutation(len(truth["frame"]))
    same(ava_mean_ap(pick(detections, order), pick(truth, other), range(1, 7), cap=cap), result)
    shards = np.concatenate([np.arange(rank, len(order), 3) for rank in range(3)])     # three processes' rows, put together
    same(ava_mean_ap(pick(detections, shards), truth, range(1, 7), cap=cap), result)


def test_perfect_detections():
    _, truth = scene(1)
    ground = pick(truth, np.array([i for i, _ in enumerate(truth["frame"])]))
    distinct = {(f, c, tuple(b)): i for i, (f, c, b) in enumerate(zip(ground["frame"], ground["label"], ground["box"].tolist()))}
    ground = pick(ground, np.array(sorted(distinct.values())))
    perfect = {**ground, "score": np.linspace(1, 0.1, len(ground["frame"]))}
    mean, ap = ava_mean_ap(perfect, ground, range(1, 7))
    assert mean == 1 and set(ap.values()) == {1.0}
    twice = {name: np.concatenate([np.array(column)] * 2) for name, column in perfect.items()}
    twice["score"][len(ground["frame"]):] -= 2                                 # doubles below all others cost nothing
    assert ava_mean_ap(twice, ground, range(1, 7))[0] == 1


def test_map_by_hand():
    """The definition's clauses one by one, on boxes whose overlaps are plain fractions."""
    person, half, less = (0, 0, 4, 4), (0, 0, 4, 2), (0, 0, 4, 1.9)
    truth = stack_results([("a,0902", person, 1), ("b,0902", person, 1)])

    def ap(*rows, of=truth, **settings):
        return ava_mean_ap(stack_results(rows), of, [1], **settings)[1][1]
    assert ap(("a,0902", half, 1, 0.5)) == 0.5                                 # IoU of exactly 1/2 counts, no + 1
    assert ap(("a,0902", less, 1, 0.5)) == 0
    assert ap(("a,0902", person, 1, 0.5), ("b,0902", person, 1, 0.4)) == 1
    assert ap(("c,0902", person, 1, 0.9), ("a,0902", person, 1, 0.5)) == 0.25  # a frame without ground truth: false
    assert ap(("c,0902", person, 1, 0.9), ("a,0902", person, 1, 0.5), excluded=["c,0902"]) == 0.5
    assert ap(("a,0902", person, 1, 0.5), excluded=["b,0902"]) == 1            # neither side counts
    assert ap(("b,0902", half, 1, 0.9), ("b,0902", person, 1, 0.8), ("a,0902", person, 1, 0.7)) == pytest.approx(5 / 6)
    assert ap(("a,0902", (4, 0, 0, 4), 1, 0.9), ("a,0902", person, 1, 0.5)) == 0.5     # no area: not even false
    assert ap(("a,0902", (4, 0, 0, 4), 1, 0.9), ("a,0902", person, 1, 0.5), cap=1) == 0    # but it fills the cap
    assert ap(("c,0902", person, 1, math.nan), ("a,0902", person, 1, 0.1)) == 0.5      # nan is last
    pair = stack_results([("a,0902", (0, 0, 4, 4), 1), ("a,0902", (0, 0, 4, 5), 1)])  # a box goes to the one it overlaps most,
    assert ap(("a,0902", (0, 0, 4, 4), 1, 0.9), ("a,0902", (0, 0, 4, 4), 1, 0.8), of=pair) == 0.5     # even if taken
    pair = stack_results([("a,0902", (0, 0, 4, 4), 1), ("a,0902", (1, 0, 5, 4), 1)])  # of equal overlaps the first row's
    assert ap(("a,0902", (0.5, 0, 4.5, 4), 1, 0.9), ("a,0902", (0, 0, 4, 4), 1, 0.8), of=pair) == 0.5
    zigzag = [("a,0902", person, 1, 0.9), ("c,0902", person, 1, 0.8), ("d,0902", person, 1, 0.7), ("b,0902", person, 1, 0.6)]
    assert ap(*zigzag) == pytest.approx(0.5 * 1 + 0.5 * 0.5)                   # precision 1, 1/2, 1/3, 1/2: envelope


def test_map_without_detections_and_without_ground_truth():
    detections, truth = scene(2)
    nothing = dict(frame=[], box=np.zeros((0, 4)), label=np.zeros(0, int), score=np.zeros(0))
    mean, ap = ava_mean_ap(nothing, truth, [1, 2, 9])
    assert mean == 0 and ap[1] == ap[2] == 0 and math.isnan(ap[9])
    assert ava_mean_ap(dict(frame=[], box=[], label=[], score=[]), truth, [1, 2, 9])[0] == 0
    only = pick(detections, np.flatnonzero(detections["label"] == 1))
    assert ava_mean_ap(only, truth, [1, 2])[1][2] == 0                         # a class that nothing was found of
    for classes, excluded in (([9], ()), ([1, 2], set(truth["frame"]))):
        with pytest.raises(UserError, match="ground-truth"):
            ava_mean_ap(detections, truth, classes, excluded)


# ---- Support vector machine ----------------------------------------------------------------------------------------

def pooled_features(seed, rows=80, dim=12, classes=4, apart=1.0):
    """Positive features with a common mean, as average pooling after a ReLU leaves them, and their labels."""
    g = seeded(seed)
    labels = torch.randint(classes, (rows,), generator=g)
    x = apart * torch.randn(classes, dim, generator=g)[labels] + torch.randn(rows, dim, generator=g) + 1
    return x.clamp(min=0), labels


def slow_svm(x, y, C):
    """Accelerated gradient descent on one class, a strongly convex function with a Lipschitz gradient."""
    x, y = x.double(), y.double()
    lipschitz = 1 + 2 * C * torch.linalg.matrix_norm(x, 2).item() ** 2
    ratio = (math.sqrt(lipschitz) - 1) / (math.sqrt(lipschitz) + 1)
    w = ahead = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(4000):
        new = ahead - (ahead - 2 * C * x.T @ (y * (1 - y * (x @ ahead)).clamp(min=0))) / lipschitz
        w, ahead = new, new + ratio * (new - w)
    return w


@pytest.mark.parametrize("C, apart, dim", [(1.0, 1.0, 12), (0.01, 0.3, 7), (10.0, 2.0, 5), (1.0, 0.0, 6)])
def test_svm_is_where_gradient_descent_ends(C, apart, dim):
    x, labels = pooled_features(0, dim=dim, apart=apart)
    W = squared_hinge_svm(x.double(), labels, 4, C)
    for c in range(4):
        assert torch.allclose(W[:, c], slow_svm(x, torch.where(labels == c, 1.0, -1.0), C), atol=1e-5, rtol=1e-4), c


@pytest.mark.parametrize("rows, dim, apart", [(300, 40, 1.0), (300, 40, 0.1), (30, 90, 1.0), (400, 60, 3.0)])
def test_svm_has_no_gradient(rows, dim, apart):
    """The condition for the only minimum: w = 2 C sum of y (1 - y w.x) x over the rows within the margin."""
    x, labels = pooled_features(1, rows, dim, 5, apart)
    x = 20 * x.double()
    W = squared_hinge_svm(x, labels, 7)                                        # classes 5 and 6 have no row
    for c in range(7):
        w, right = W[:, c], torch.zeros(dim, dtype=torch.float64)
        start = torch.zeros(dim, dtype=torch.float64)
        for row, label in zip(x, labels.tolist()):
            y = 1 if label == c else -1
            right += 2 * max(0, 1 - y * (w @ row).item()) * y * row
            start += 2 * y * row
        assert (w - right).norm() <= 1e-7 * start.norm()
    if apart == 3:
        assert ((x @ W).argmax(1) == labels).double().mean() > 0.95


def test_svm_classes_are_independent_and_rows_have_no_order():
    x, labels = pooled_features(2, rows=120, classes=3)
    W = squared_hinge_svm(x, labels, 3)
    assert W.dtype == torch.float32 and W.shape == (12, 3)
    two = squared_hinge_svm(x, (labels == 1).long(), 2)                        # class 1 against the others
    assert torch.allclose(two[:, 1], W[:, 1], atol=1e-6) and torch.allclose(two[:, 0], -two[:, 1], atol=1e-6)
    order = torch.randperm(120, generator=seeded())
    assert torch.allclose(squared_hinge_svm(x[order], labels[order], 3), W, atol=1e-6)
    assert torch.allclose(squared_hinge_svm(torch.cat([x, x]), torch.cat([labels, labels]), 3, 0.5), W, atol=1e-6)


def test_svm_of_features_that_say_nothing_or_are_broken():
    assert not squared_hinge_svm(torch.zeros(6, 4), torch.arange(6) % 3, 3).any()
    with pytest.raises((UserError, RuntimeError)):
        squared_hinge_svm(torch.full((6, 4), float("nan")), torch.arange(6) % 3, 3)
