"""Crops and colours: what pre-training and fine-tuning do to clips besides torchvision's augmentations."""
import numpy as np
import pytest
import torch

from common import normalize, unnormalize
from mofo import multi_scale_crop


@pytest.mark.parametrize("height, width", [(240, 320), (320, 240), (224, 224), (222, 300), (300, 223), (1, 1)])
def test_multi_scale_crops_lie_inside_the_frame_and_snap(height, width):
    rng, boxes = np.random.default_rng(0), []
    for _ in range(300):
        x1, y1, x2, y2 = multi_scale_crop(height, width, rng, snap=224)
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        assert {x2 - x1, y2 - y1}.isdisjoint({222, 223, 225, 226}) or min(height, width) < 224
        boxes.append((x1, y1, x2, y2))
    x1, y1, x2, y2 = np.array(boxes).T
    assert min(x1) == min(y1) == 0 and max(x2) > width - 4 and max(y2) > height - 4         # up to all edges


@pytest.mark.parametrize("smallest, scales", [
    (0.66, [1, 0.875, 0.75, 0.66]), (1.0, [1]), (0.7, [1, 0.875, 0.75, 0.7]), (0.75, [1, 0.875, 0.75]),
    (0.4, [1, 0.875, 0.75, 0.66, 0.5, 0.4])])
def test_min_crop_is_the_smallest_side_of_a_crop(smallest, scales):
    rng, seen = np.random.default_rng(0), set()
    for _ in range(600):
        x1, y1, x2, y2 = multi_scale_crop(1000, 1000, rng, smallest)
        seen.add((x2 - x1, y2 - y1))
    sides = [int(1000 * s) for s in scales]
    assert seen == {(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1}


def test_normalize_takes_bytes_and_colours_and_is_undone():
    clips = torch.randint(256, (2, 3, 2, 4, 4), dtype=torch.uint8)
    for config in ({}, dict(mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))):
        x = normalize(clips, config)
        mean, std = config.get("mean", (0.485, 0.456, 0.406)), config.get("std", (0.229, 0.224, 0.225))
        for c in range(3):
            torch.testing.assert_close(x[:, c], (clips[:, c].float() / 255 - mean[c]) / std[c])
        assert torch.equal(normalize(clips.float() / 255, config), x)
        torch.testing.assert_close(unnormalize(x, config) * 255, clips.float())
