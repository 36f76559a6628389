"""Optical flow: gradients against loops, TV-L1 and RAFT against shifts that are known, the toy data's true flow."""
import itertools
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from common import FlowEstimator, _tvl1_inner, read_clips, resize_flow, spatial_gradient, toy_video, tvl1, warp
from conftest import SHARED, error_of, seeded, slow_gradient, toy_clips
from evidence import toy_flow

RAFT = SHARED / "weights" / "raft_small.pth"
needs_raft = pytest.mark.skipif(not RAFT.exists(), reason=f"{RAFT} is not here")


@pytest.mark.parametrize("shape", [(5, 7), (1, 4), (6, 1), (2, 3, 4, 5)])
@pytest.mark.parametrize("options", [{}, dict(middle=1), dict(middle=2)])
def test_spatial_gradient_equals_loops_with_a_replicated_border(shape, options):
    x = torch.randn(shape, generator=seeded())
    expected = np.stack([slow_gradient(m, **options) for m in x.reshape(-1, *shape[-2:]).tolist()])
    expected = torch.from_numpy(expected).float().view(*shape[:-2], 2, *shape[-2:])
    torch.testing.assert_close(spatial_gradient(x, **options), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("label", range(-1, 8))
def test_true_toy_flow_carries_the_last_frame_back_to_the_first(label):
    video, truth = toy_video(1, "train", label + 1, size=192, frames=16, label=label)   # large: warping loses little
    flow, sprite = toy_flow(truth, 0, 15)
    _, later = toy_flow(truth, 15, 0)
    first, last = (torch.from_numpy(video[t]).permute(2, 0, 1)[None].float() / 255 for t in (0, 15))
    back = warp(last, torch.from_numpy(flow)[None].float())
    change, error = ((x - first).abs().mean((0, 1)) for x in (last, back))
    x, y = np.mgrid[:192, :192][::-1] + flow                                    # where each pixel goes
    stays = (x > 0) & (x < 191) & (y > 0) & (y < 191)
    def grow(mask):
        return F.max_pool2d(torch.as_tensor(mask)[None, None].float(), 5, 1, 2)[0, 0].numpy() > 0
    edge = grow(sprite) & grow(~sprite)                                         # two pixels on either side
    hit = grow(warp(torch.from_numpy(later)[None, None].float(), torch.from_numpy(flow)[None].float())[0, 0] > 0)
    for part in (sprite & ~edge & stays, ~sprite & ~edge & stays & ~hit):
        assert part.sum() > 300 and change[part].mean() > 0.004, "or the test would prove nothing"
        assert error[part].mean() < 0.3 * change[part].mean()


def waves(dx, dy, h=48, w=64):
    """A smooth image (3, h, w) in [0, 1] whose content is shifted by (dx, dy)."""
    y, x = torch.meshgrid(torch.arange(h) - dy, torch.arange(w) - dx, indexing="ij")
    z = [torch.sin(x / 3.1 + y / 7 + k) + torch.sin(y / 2.7 - x / 9 + 2 * k) + torch.sin((x + y) / 4.3)
         for k in range(3)]
    return 0.5 + torch.stack(z) / 6


def test_a_step_of_tvl1_is_that_of_plain_differences():
    """On frames of 4 x 5, which the neighbours of a last column or row must not leave."""
    u, px, py, gradient, slope = torch.randn(5, 2, 2, 4, 5, generator=seeded()).unbind()
    residual, px[..., -1], py[..., -1, :] = torch.randn(2, 1, 4, 5, generator=seeded(1)), 0, 0
    new = u - gradient * (residual + (slope * u).sum(1, keepdim=True)).clamp(-0.3, 0.3)
    new += 0.25 * (px - F.pad(px, (1, -1)) + py - F.pad(py, (0, 0, 1, -1)))                    # the divergence
    dx, dy = F.pad(new.diff(dim=-1), (0, 1)), F.pad(new.diff(dim=-2), (0, 0, 0, 1))
    length = 1 + 0.25 / 0.15 * (dx**2 + dy**2).sqrt()
    found = _tvl1_inner(u, px, py, gradient, slope, residual, 0.3, 0.15)
    torch.testing.assert_close(found, (new, (px + dx) / length, (py + dy) / length))


@pytest.mark.parametrize("dx, dy", [(0.4, -0.7), (1.5, 0.8), (-2.3, 1.1), (0.0, 3.0), (0.0, 0.0)])
def test_tvl1_finds_a_known_sub_pixel_shift(dx, dy):
    first, second = waves(0, 0)[None], waves(dx, dy)[None]
    flow = tvl1(torch.stack([first, second], 1))
    error = (flow - torch.tensor([dx, dy]).view(2, 1, 1)).norm(dim=1)[0, 6:-6, 6:-6].mean()
    assert error < (0.2 if dx or dy else 1e-5)
    left = (warp(second, flow) - first)[..., 6:-6, 6:-6].abs().mean()           # the sign: second(x + u) = first(x)
    assert left <= 0.25 * (second - first)[..., 6:-6, 6:-6].abs().mean() + 1e-6


def test_flow_of_each_clip_is_what_it_would_be_alone_and_has_one_flow_per_pair():
    clips, estimate = toy_clips(3)[0][:, :, :8:2], FlowEstimator("tvl1")
    flow = estimate(clips)
    assert flow.shape == (3, 3, 2, 64, 64) and estimate.seconds() > 0 and estimate.seconds() == 0
    for i, t in itertools.product(range(3), range(3)):
        torch.testing.assert_close(estimate(clips[i:i + 1, :, t:t + 2])[0, 0], flow[i, t], atol=1e-4, rtol=0)
    torch.testing.assert_close(estimate(clips.float() / 255), flow, atol=1e-4, rtol=0)


def shifted_pair(height, width, dx=5, dy=3):
    """A real frame and itself moved by (dx, dy) pixels -> uint8 (1, 3, 2, height, width)."""
    video = SHARED / "videos" / "juggling.mp4"
    if not video.exists():
        pytest.skip(f"{video} is not here")
    frame = torch.tensor(read_clips(video, [10], size=(360, 640))[0]).permute(2, 0, 1)
    return torch.stack([frame[:, y:y + height, x:x + width] for x, y in ((60, 40), (60 - dx, 40 - dy))], 1)[None]


@needs_raft
@pytest.mark.parametrize("height, width, size, grid", [
    (224, 224, 300, (224, 224)), (132, 156, 132, (128, 160)), (100, 182, 100, (128, 184)), (64, 64, 64, (128, 128)),
    (224, 288, 144, (144, 184))])                                   # 288 * 144 / 224 = 185
def test_raft_finds_the_shift_of_a_real_frame_in_pixels_of_its_grid(height, width, size, grid):
    flow = FlowEstimator("raft_small", RAFT, size=size)(shifted_pair(height, width, 4, 2))
    expected = torch.tensor([4 * grid[1] / width, 2 * grid[0] / height])        # a multiple of 8, at least 128
    assert flow.shape == (1, 1, 2, *grid)
    torch.testing.assert_close(flow[0, 0].flatten(1).median(1).values, expected, atol=0.75, rtol=0.1)
    if width == 224:
        assert (flow[0, 0] - expected.view(2, 1, 1)).norm(dim=0)[16:-16, 16:-16].mean() < 0.3


@needs_raft
def test_raft_takes_bytes_and_floats_each_clip_alone_and_may_round():
    exact, rounding = (FlowEstimator("raft_small", RAFT, 4, amp=amp) for amp in (None, torch.bfloat16))
    clips = torch.cat([shifted_pair(128, 128, *shift) for shift in ((5, 3), (-3, 1), (0, 8))])
    flow, rounded = exact(clips), rounding(clips)
    torch.testing.assert_close(exact(clips.float() / 255), flow, atol=1e-3, rtol=0)
    torch.testing.assert_close(exact(clips[1:2])[0], flow[1], atol=1e-3, rtol=0)
    assert not flow.requires_grad and rounded.dtype == torch.float32
    assert 0 < (flow - rounded).norm(dim=2).mean() < 0.1


def test_a_chunk_s_correlations_fit_a_gpu():
    estimate = FlowEstimator("tvl1")
    assert estimate.chunk(64, 64) == 128
    estimate.device = torch.device("cuda")                                      # as it would choose there
    for side in (64, 128, 224, 448, 2048):
        pairs = estimate.chunk(side, side)
        assert pairs == 1 or pairs * (side // 8) ** 4 * 4 * 4 / 3 < 1.5e9, side
        assert pairs == (512 if side <= 128 else pairs)


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", {"wrong": torch.zeros(1)}])
@pytest.mark.parametrize("fault", [OSError("network is unreachable"), TimeoutError(), RuntimeError("invalid hash")])
def test_weights_that_cannot_be_had_name_both_ways_out(tmp_path, content, fault):
    if content is not None:
        torch.save(content, tmp_path / "raft.pth")
    if isinstance(content, bytes):
        (tmp_path / "raft.pth").write_bytes(content)
    with mock.patch.object(torchvision.models._api, "load_state_dict_from_url", side_effect=fault):
        remote = error_of(FlowEstimator, "raft_large")
    local = error_of(FlowEstimator, "raft_small", str(tmp_path / "raft.pth"))
    assert "raft.pth" in local and all("--raft-weights" in m and "--flow tvl1" in m for m in (local, remote))


@pytest.mark.parametrize("name, pairs", [("raft_small", 100), ("raft_small", 2), ("raft_large", 4)])
def test_raft_s_loop_is_torchvision_s(name, pairs, tmp_path, monkeypatch):
    """Each frame encoded once, in parts of so many pairs: the same flow."""
    torch.manual_seed(0)
    raft = getattr(torchvision.models.optical_flow, name)().eval()
    torch.save(raft.state_dict(), tmp_path / "raft.pth")
    estimator = FlowEstimator(name, tmp_path / "raft.pth", 3)
    monkeypatch.setattr(estimator, "chunk", lambda h, w: pairs)
    clips = torch.rand(2, 3, 6, 128, 136, generator=seeded())
    first, second = (x.transpose(1, 2).flatten(0, 1) * 2 - 1 for x in (clips[:, :, :-1], clips[:, :, 1:]))
    with torch.no_grad():
        expected = torch.cat([raft(a, b, num_flow_updates=3)[-1] for a, b in zip(first.split(5), second.split(5))])
    torch.testing.assert_close(estimator(clips).flatten(0, 1), expected, rtol=1e-4, atol=1e-3)


def test_flow_that_has_the_size_is_not_resized():
    flow = torch.randn(2, 2, 6, 8)
    assert resize_flow(flow, 6, 8) is flow
    resized = resize_flow(torch.ones_like(flow), 12, 24)
    assert resized.shape == (2, 2, 12, 24) and (resized[:, 0] == 3).all() and (resized[:, 1] == 2).all()
