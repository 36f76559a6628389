"""Figures and classifiers on features against slow loops written from the protocols' texts."""
import math
import random
from itertools import count, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import UserError
from finetune import (accuracy, ava_mean_ap, epic_accuracy, fit_linear, knn_scores, retrieval_recall,
                      squared_hinge_svm)
from conftest import seeded

KS = (1, 5, 10, 20, 50)


# ---- Accuracy and retrieval ----------------------------------------------------------------------------------------

def test_accuracy_counts_unread_as_wrong_and_skips_absent_classes():
    scores = torch.eye(7)[[0, 1, 2, 0, 1]] - 0.1 * torch.arange(7.0)           # of the others the first are likelier
    read, labels = torch.tensor([True, True, False, True, True]), torch.tensor([0, 1, 2, 1, 6])
    result = accuracy(scores, read, labels, list("abcdefg"))
    assert result["acc1"] == pytest.approx(40) and result["acc5"] == pytest.approx(60)
    assert result["per_class"] == pytest.approx({"a": 100, "b": 50, "c": 0, "g": 0})
    assert result["mean_class"] == pytest.approx(150 / 4)
    assert accuracy(scores[:2, :2], read[:2], labels[:2], ["a", "b"])["acc5"] == 100


def slow_recall(gallery, gallery_labels, query, query_labels, ks, center, read):
    """Sort the gallery for every query in Python; of equally near videos those of other classes come first."""
    def ready(rows, used):
        rows = rows.double() - used.double().mean(0) if center else rows.double()
        return [(row / row.norm() if row.any() else row).tolist() for row in rows]
    found, gallery, query = dict.fromkeys(ks, 0), ready(gallery, gallery), ready(query, query[read])
    for row, label, known in zip(query, query_labels.tolist(), read.tolist()):
        order = sorted((-sum(a * b for a, b in zip(row, other)), other_label == label)
                       for other, other_label in zip(gallery, gallery_labels.tolist()))
        for k in ks:
            found[k] += known and any(same for _, same in order[:k])
    return {k: 100 * count / len(query) for k, count in found.items()}


@pytest.mark.parametrize("kind", ["centred", "random", "equally near"])
@pytest.mark.parametrize("seed", range(3))
def test_recall_is_that_of_sorting_the_gallery(seed, kind):
    g, center = seeded(seed), kind == "centred"
    gallery, query = torch.randn(45, 6, generator=g) + 0.7, 5 * torch.randn(23, 6, generator=g) - 0.5
    if kind == "equally near":                                                 # corners of a cube: exact cosines
        signs = torch.tensor(list(product((-1.0, 1.0), repeat=4)))
        gallery, query = (signs[torch.randint(16, (len(x),), generator=g)] for x in (gallery, query))
    labels, query_labels = torch.randint(12, (45,), generator=g), torch.randint(14, (23,), generator=g)
    read = torch.rand(23, generator=g) > 0.2
    result = retrieval_recall(gallery, labels, query, query_labels, KS, center, read)
    assert result == pytest.approx(slow_recall(gallery, labels, query, query_labels, KS, center, read))
    assert list(result) == list(KS) and result[1] < result[10] < 100
    query[~read] = 1e3                                                         # what is unread has no say
    assert result == retrieval_recall(gallery, labels, query, query_labels, KS, center, read)
    order, other = torch.randperm(45, generator=g), torch.randperm(23, generator=g)
    again = retrieval_recall(gallery[order], labels[order], query[other], query_labels[other], KS, center, read[other])
    assert again == pytest.approx(result)                                      # nor has the order of rows


@pytest.mark.parametrize("value", [1.0, 0.0, float("nan")])
def test_a_collapsed_network_finds_nothing(value):
    labels, other = torch.arange(90) % 3, torch.randn(90, 4, generator=seeded())
    flat = torch.full((90, 4), value)
    for gallery, query in ((flat, flat), (flat, other)):
        assert retrieval_recall(gallery, labels, query, labels) == dict.fromkeys(KS, 0)


def test_recall_in_chunks():
    g = seeded(8)
    gallery, query = torch.randn(2 ** 12, 2, generator=g), torch.randn(2 ** 12 + 30, 2, generator=g)     # two chunks
    labels, query_labels = torch.randint(900, (2 ** 12,), generator=g), torch.randint(900, (2 ** 12 + 30,), generator=g)
    last = torch.arange(len(query)) >= 2 ** 12 - 30                            # on both sides of the seam
    whole = retrieval_recall(gallery, labels, query, query_labels, read=last)
    part = retrieval_recall(gallery, labels, query[last], query_labels[last])
    assert whole == pytest.approx({k: part[k] * 60 / len(query) for k in KS}) and whole[50] > 0


# ---- EPIC-KITCHENS -------------------------------------------------------------------------------------------------

def slow_epic(verb_logits, noun_logits, verb, noun, read):
    """Softmax, outer product, sort: row by row."""
    rows, result = [], {}
    columns = (verb, noun, verb_logits.exp(), noun_logits.exp(), read)
    for v, n, p, q, known in zip(*(column.tolist() for column in columns)):
        pairs = [a * b for a in p for b in q]
        rank = dict(verb=sum(x >= p[v] for x in p), noun=sum(x >= q[n] for x in q),
                    action=sum(x >= p[v] * q[n] for x in pairs))               # 1 = best, after all ties
        rows.append((rank, known))
    for name, k in product(("verb", "noun", "action"), (1, 5)):
        result[f"{name}_top{k}"] = 100 * sum(known and rank[name] <= k for rank, known in rows) / len(rows)
    return result


@pytest.mark.parametrize("verbs, nouns, rows", [(9, 13, 60), (7, 4, 40), (2, 30, 40), (1, 9, 20), (97, 300, 4)])
def test_epic_accuracy_is_that_of_all_pairs(verbs, nouns, rows):
    g = seeded(verbs)
    verb, noun = torch.randint(verbs, (rows,), generator=g), torch.randint(nouns, (rows,), generator=g)
    verb_logits = torch.randn(rows, verbs, generator=g, dtype=torch.float64) + 1.5 * F.one_hot(verb, verbs)
    noun_logits = torch.randn(rows, nouns, generator=g, dtype=torch.float64) + 1.5 * F.one_hot(noun, nouns)
    read = torch.rand(rows, generator=g) > 0.1
    result = epic_accuracy(verb_logits, noun_logits, verb, noun, read)
    assert result == pytest.approx(slow_epic(verb_logits, noun_logits, verb, noun, read))
    plain = epic_accuracy(verb_logits + 700, noun_logits - 1e3 * torch.arange(rows)[:, None], verb, noun, read)
    assert plain == pytest.approx(result) and len(plain) == 6
    logs = verb_logits.softmax(1).log()
    assert epic_accuracy(logs, noun_logits, verb, noun, read) == pytest.approx(result)


def test_epic_by_hand():
    """Ties, nan and impossible ids are wrong."""
    zero = torch.tensor([0])
    good, flat, bad = torch.eye(8)[:1], torch.zeros(1, 8), torch.full((1, 8), float("nan"))
    assert set(epic_accuracy(good, good, zero, zero).values()) == {100.0}
    assert set(epic_accuracy(flat, flat, zero, zero).values()) == {0.0}
    assert epic_accuracy(bad, good, zero, zero) == dict.fromkeys(
        ("verb_top1", "verb_top5", "action_top1", "action_top5"), 0.0) | dict(noun_top1=100.0, noun_top5=100.0)
    impossible = torch.tensor([[-math.inf, 0, -math.inf, -math.inf]])          # log of probability 0
    assert epic_accuracy(impossible, good, zero, zero)["verb_top5"] == 0
    assert epic_accuracy(impossible, good, zero + 1, zero)["action_top1"] == 100


# ---- AVA -----------------------------------------------------------------------------------------------------------

def table(rows):
    """Rows (frame, box, label, score or nothing) -> columns."""
    columns = dict(zip(("frame", "box", "label", "score"), map(list, zip(*rows))))
    return {name: column if name == "frame" else np.array(column) for name, column in columns.items()}


def slow_overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def slow_map(found, real, class_ids, excluded, iou, cap):
    """Rows as tuples; class after class, frame after frame, detection after detection."""
    found, real = ([row for row in rows if row[0] not in excluded and row[2] in class_ids] for rows in (found, real))
    found = sorted(found, key=lambda row: math.inf if math.isnan(row[3]) else -row[3])     # stable, nan is last
    places = {name: count() for name, *_ in found}
    found = [row for row in found if next(places[row[0]]) < (cap or math.inf)]
    found = [row for row in found if row[1][0] < row[1][2] and row[1][1] < row[1][3]]
    result = {}
    for c in class_ids:
        positives, taken, right = sum(row[2] == c for row in real), set(), []
        for frame, box, _, _ in [row for row in found if row[2] == c]:
            overlaps = {i: slow_overlap(box, row[1]) for i, row in enumerate(real) if row[0] == frame and row[2] == c}
            best = max(overlaps, key=overlaps.get, default=None)               # of equal ones the first
            right.append(best is not None and overlaps[best] >= iou and best not in taken)
            taken |= {best} if right[-1] else set()
        precision = [sum(right[:n]) / n for n in range(1, len(right) + 1)]
        steps = [max(precision[i:]) / positives for i, true in enumerate(right) if true]       # where recall grows
        result[c] = sum(steps) if positives else math.nan
    valid = [ap for ap in result.values() if not math.isnan(ap)]
    return sum(valid) / len(valid), result


def scene(seed):
    """Rows of detections and of true boxes: detections near them, doubles, strays and boxes of no area."""
    rng, true, found = random.Random(seed), [], []
    for name in [f"video{i % 3},{902 + i:04d}" for i in range(12)]:
        people = []
        for _ in range(rng.choice((0, 1, 2, 3))):
            x, y = rng.randrange(8) / 16, rng.randrange(8) / 16
            people.append((x, y, x + rng.randrange(2, 9) / 16, y + rng.randrange(2, 9) / 16))
            true += [(name, people[-1], c) for c in rng.sample(range(1, 7), 2)]
        for _ in range(rng.randrange(8)):
            x1, y1, x2, y2 = rng.choice(people) if people and rng.random() < 0.8 else (0.25, 0.25, 0.5, 0.5)
            box = (x1 + rng.choice((0, 0, 1 / 32)), y1, x2, y2 - rng.choice((0, 0, 1 / 16)))
            box = rng.choice(((box[2], *box[1:]), (*box[:3], box[1]))) if rng.random() < 0.1 else box
            score = rng.choice((*range(1, 9), math.nan)) / 8                    # so few that there are ties
            found += [(name, box, c, score) for c in rng.sample(range(1, 7), 3)]
    rng.shuffle(found)
    return found, true


@pytest.mark.parametrize("iou, cap", [(0.5, None), (0.5, 5), (0.75, None)])
@pytest.mark.parametrize("seed", range(8))
def test_map_is_that_of_the_loop(seed, iou, cap):
    found, real = scene(seed)
    classes, excluded = [1, 2, 4, 5, 9], sorted({row[0] for row in real})[:2]  # 3 and 6 do not count, 9 never happens
    mean, ap = ava_mean_ap(table(found), table(real), classes, excluded, iou, cap)
    expected = slow_map(found, real, classes, excluded, iou, cap)
    assert mean == pytest.approx(expected[0]) and ap == pytest.approx(expected[1], nan_ok=True)
    assert 0 < mean < 1 and math.isnan(ap[9]) and list(ap) == classes
    halves = table(found) | dict(box=np.array([row[1] for row in found], np.float32))
    assert ava_mean_ap(halves, table(real), classes, set(excluded), iou, cap)[0] == mean       # sixteenths are exact


def test_of_boxes_that_overlap_equally_the_first_is_taken():
    people = [("a,0902", (0, 0, 4, 4), 1), ("a,0902", (1, 0, 5, 4), 1)]
    found = [("a,0902", (0.5, 0, 4.5, 4), 1, 0.9), ("a,0902", (0, 0, 4, 4), 1, 0.8)]
    assert ava_mean_ap(table(found), table(people), [1])[0] == 0.5


def test_map_without_detections_and_without_ground_truth():
    found, real = scene(2)
    mean, ap = ava_mean_ap(dict(frame=[], box=[], label=[], score=[]), table(real), [1, 2, 9])
    assert mean == 0 and ap[1] == ap[2] == 0 and math.isnan(ap[9])
    assert ava_mean_ap(table([row for row in found if row[2] == 1]), table(real), [1, 2])[1][2] == 0
    for classes, excluded in (([9], ()), ([1, 2], {row[0] for row in real})):
        with pytest.raises(UserError, match="no ground truth"):
            ava_mean_ap(table(found), table(real), classes, excluded)


# ---- Classifiers on fixed features -----------------------------------------------------------------------------------

def test_linear_probe_solves_what_is_linear_and_knn_votes():
    labels = torch.arange(90) % 3
    features = torch.randn(90, 8, generator=seeded()) + 4 * torch.eye(8)[labels]
    features[:, 7] *= 1e4                                                      # a loud feature that says nothing
    assert (fit_linear(features, labels, 3, 1e-3)(features).argmax(1) == labels).float().mean() > 0.98
    f, mean, std = fit_linear(features, labels, 3, 0.1), features.mean(0), features.std(0, correction=0)
    W, x = f(mean + std * torch.eye(8)) - f(mean), (features - mean) / std     # of standardised features
    slope = x.T @ (f(features).softmax(1) - F.one_hot(labels, 3)) / 90 + 0.1 * W
    assert slope.abs().max() < 1e-3 < W.abs().max()                            # where its loss has its minimum
    shares = fit_linear(torch.ones(90, 2), labels.clamp(max=1), 2, 1.0)(torch.ones(1, 2)).softmax(1)
    torch.testing.assert_close(shares, torch.tensor([[1 / 3, 2 / 3]]), rtol=1e-3, atol=1e-3)       # the bias is free
    features = features[:, :7] / features[:, :7].norm(dim=1, keepdim=True)
    votes = torch.zeros(90, 3)
    for q in range(90):
        for i in sorted(range(90), key=lambda i: -float(features[q] @ features[i]))[:5]:
            votes[q, labels[i]] += torch.exp(features[q] @ features[i] / 0.07)
    torch.testing.assert_close(knn_scores(3 * features, labels, 2 * features, 3, k=5), votes, rtol=1e-3, atol=1e-3)
    assert knn_scores(features, labels, features, 3, k=200).equal(knn_scores(features, labels, features, 3, k=90))
    assert knn_scores(features, labels, features.repeat(2100, 1), 3, k=5)[-90:].allclose(votes, 1e-3, 1e-3)  # in parts


def pooled_features(seed, rows=80, dim=12, classes=4, apart=1.0):
    """Positive features with a common mean, as average pooling after a ReLU leaves them, and their labels."""
    g = seeded(seed)
    labels = torch.randint(classes, (rows,), generator=g)
    x = apart * torch.randn(classes, dim, generator=g)[labels] + torch.randn(rows, dim, generator=g) + 1
    return x.clamp(min=0), labels


@pytest.mark.parametrize("rows, dim, apart, C", [(300, 40, 1.0, 1.0), (300, 40, 0.1, 0.01), (30, 90, 1.0, 10.0),
                                                 (400, 60, 3.0, 1.0)])
def test_svm_has_no_gradient(rows, dim, apart, C):
    """The condition for the only minimum: w = 2 C sum of y (1 - y w.x) x over the rows within the margin."""
    x, labels = pooled_features(1, rows, dim, 5, apart)
    x = 20 * x.double()
    W = squared_hinge_svm(x, labels, 7, C)                                     # classes 5 and 6 have no row
    for c in range(7):
        right = torch.zeros(dim, dtype=torch.float64)
        for row, label in zip(x, labels.tolist()):
            y = 1 if label == c else -1
            right += 2 * C * max(0, 1 - y * (W[:, c] @ row).item()) * y * row
        torch.testing.assert_close(W[:, c], right, rtol=1e-6, atol=1e-8)
    assert ((x @ W).argmax(1) == labels).double().mean() > (0.95 if apart == 3 else 0.4)


def test_svm_of_features_that_say_nothing_and_of_nan():
    assert not squared_hinge_svm(torch.zeros(6, 4), torch.arange(6) % 3, 3).any()      # features that say nothing
    with pytest.raises(UserError, match="finite"):
        squared_hinge_svm(torch.full((6, 4), float("nan")), torch.arange(6) % 3, 3)
