"""On a GPU: with one `python -m pytest tests/test_cuda.py` takes real steps.  Without one its tensors are fake: they
have a shape, a type and a device, but no data, so whatever would make the host wait for numbers raises an error."""
import copy
import functools
import time

import pytest
import torch
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import fame
import finetune
import mcl
import mme
import modist
import mofo
from common import Env, FlowEstimator, ResNet3D, make_backbone, parse_config, wrap_model
from conftest import run

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
VIT = dict(image_size=128, frames=8, patch_size=16, tubelet_size=2, dim=48, depth=2, heads=3)
DECODER = dict(decoder_dim=24, decoder_depth=1, decoder_heads=3)
QUEUE = dict(queue=64, outputs=16)


def clips(count, frames=8):
    """Bytes on the GPU that differ from frame to frame."""
    x = torch.arange(count * 3 * frames * 128 * 128, device="cuda").view(count, 3, frames, 128, 128)
    return ((x * 0.37).sin() * 60 + (x % 128 / 7).sin() * 60 + 128).byte()


def vit(**changes):
    return make_backbone(**VIT | changes)


def resnet(name="slow_r50", frames=8):
    return ResNet3D(name, 1 / 8, 128, frames)


def downstream(*flags, detect=False, network=None):
    cfg = parse_config(finetune.Config, finetune.RECIPES, [*flags])
    network = network or vit(num_classes=0 if detect else 5, drop_path=0.0)
    if detect:
        network.head = torch.nn.Linear(network.dim, 80)
        return finetune.Detector(network, cfg)
    if cfg.focused:
        network.local_MCA = torch.nn.ModuleList([finetune.MotionFocus(network.dim)])
    return finetune.Classifier(network, [5], cfg, estimator() if cfg.focused else None)


def estimator(name="raft_small", **options):
    return FlowEstimator(name, None, 2, **options)


def pairs(count=4, frames=8):
    return (clips(2 * count, frames),)


def order(candidates=6):
    return (dict(clips=clips(2 * candidates, 9), order=torch.ones(2, dtype=torch.long, device="cuda")),)


def labelled():
    return clips(4), torch.ones(4, dtype=torch.long, device="cuda")


def people():
    boxes = torch.tensor([[8, 8, 70, 90], [0, 0, 128, 128], [30, 20, 60, 100]], device="cuda", dtype=torch.float32)
    actions, count = torch.ones(3, 80, device="cuda"), torch.tensor([1, 0, 2, 0], device="cuda")
    return dict(clips=clips(4), boxes=boxes, actions=actions, count=count), None


def an_mme(target):
    def model():
        flow = estimator() if target in ("trajectory", "position") else None
        return mme.MME(flow, target, 6, 4, 0.7, **VIT, **DECODER)
    return model, lambda: (clips(4, mme.frames_to_read(target, 8, 2, 4, 6)[0]),)


CASES = {   # what makes the model, what makes its arguments
    "mofo": (lambda: mofo.MOFO(estimator(), 0.75, 0.75, **VIT, **DECODER), lambda: (clips(4),)),
    "mofo tvl1": (lambda: mofo.MOFO(estimator("tvl1"), 0.75, 0.75, **VIT, **DECODER), lambda: (clips(4),)),
    "videomae": (lambda: mofo.MOFO(None, 0.75, None, **VIT, **DECODER), lambda: (clips(4),)),
    **{f"mme {target}": an_mme(target) for target in ("trajectory", "position", "hog", "pixel")},
    "fame vit": (lambda: fame.FAME(vit(), **QUEUE), pairs),
    "fame": (lambda: fame.FAME(make_backbone("r2plus1d_18", 128, 8), **QUEUE), pairs),
    "moco": (lambda: fame.FAME(resnet(), merge=False, **QUEUE), pairs),
    "mcl vit": (lambda: mcl.MCL(vit(), estimator(), 10, order_weight=1.0, **QUEUE), order),
    "mcl": (lambda: mcl.MCL(resnet("r2plus1d_50"), estimator(), 10, **QUEUE), order),
    "mcl without its ideas": (lambda: mcl.MCL(resnet("r2plus1d_50"), None, 10, motion_clips=False, motion_crops=False,
                                              align_weight=0.0, **QUEUE), lambda: order(3)),
    "modist vit": (lambda: modist.MoDist(vit(), resnet("motion_r50"), estimator(), rgb_step=1, **QUEUE),
                   lambda: pairs(4, 9)),
    "modist": (lambda: modist.MoDist(resnet(), resnet("motion_r50"), estimator(), rgb_step=1, motion_motion=True,
                                     **QUEUE), lambda: pairs(4, 9)),
    "modist flow": (lambda: modist.MoDist(resnet(), resnet("motion_r50"), estimator(), rgb_step=1, motion_input="flow",
                                          **QUEUE), lambda: pairs(4, 9)),
    "finetune": (lambda: downstream("--data", "ssv2"), labelled),
    "finetune resnet": (lambda: downstream("--data", "ucf101", "--recipe", "mcl", "--dropout", "0",     # a GPU drops
        network=make_backbone("r2plus1d_18", 128, 8, num_classes=5)), labelled),                 # others in bf16
    "linear": (lambda: downstream("--data", "k400", "--mode", "linear"), labelled),
    "focused": (lambda: downstream("--data", "ssv2", "--recipe", "mofo"), labelled),
    "detect": (lambda: downstream("--data", "ava", detect=True), people)}
NEED_BACKWARD = {"mcl", "mcl vit"}                                          # in the forward pass: a driver, too


@pytest.fixture(autouse=True)
def random_raft(monkeypatch):
    monkeypatch.setattr(common.Raft_Small_Weights, "get_state_dict",
                        lambda self, **_: torchvision.models.optical_flow.raft_small().state_dict())


def to_fake_gpu(model):
    flow = getattr(model, "flow", None)
    for module in [*model.modules(), *(flow.raft.modules() if hasattr(flow, "raft") else ())]:
        for tensors in (module._parameters, module._buffers):
            for key, x in tensors.items():
                if x is not None:
                    fake = torch.empty(x.shape, dtype=x.dtype, device="cuda")
                    tensors[key] = torch.nn.Parameter(fake, x.requires_grad) if key in module._parameters else fake
    if flow:
        flow.device = torch.device("cuda")


class CountCopies(TorchDispatchMode):
    """Copies between CPU and GPU for which the host waits."""
    waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and not kwargs.get("non_blocking"):
            ends = {x.device.type for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
            self.waits += len(ends | {torch.device(kwargs.get("device") or args[0].device).type}) > 1
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", sorted(CASES.keys() - NEED_BACKWARD))
def test_a_forward_pass_mixes_no_devices_and_does_not_wait(name, monkeypatch):
    """Numbers that stay on the GPU (see `constant`) are copied once, so the second pass is the one that counts."""
    make, arguments = CASES[name]
    monkeypatch.setattr(FlowEstimator, "_now", lambda self: time.perf_counter())
    monkeypatch.setattr(finetune, "per_clip", lambda transform, clips, *_: clips)    # numbers from a CPU
    common.constant.cache_clear()
    model = make()
    getattr(model, "mixing", []).clear()
    with FakeTensorMode(), torch.backends.cudnn.flags(enabled=False), CountCopies() as copies:
        to_fake_gpu(model)
        given = arguments()
        for _ in range(2):
            copies.waits = 0
            loss, _ = model.train()(*given)
        assert loss.device.type == "cuda" and loss.requires_grad and not copies.waits
    common.constant.cache_clear()


def step(name, amp, compile=False):
    """Two steps on the GPU, of which the second may not wait for it -> loss and length of the gradient of that one."""
    torch.manual_seed(0)
    make, arguments = CASES[name]
    model, given = make().cuda().train(), arguments()
    env = Env(torch.device("cuda", 0), 0, 1, amp)
    flow = getattr(model, "flow", None)
    if flow:
        model.flow = FlowEstimator(flow.name, None, 2, device="cuda", amp=amp, compile=compile)
        if hasattr(flow, "raft"):
            model.flow.raft.load_state_dict(flow.raft.state_dict())
    state, net = copy.deepcopy(model.state_dict()), wrap_model(model, env, compile)
    for mode in ("default", "default" if getattr(model, "randaugment", None) else "error"):     # torchvision's waits
        model.load_state_dict(state)
        model.zero_grad()
        torch.manual_seed(0)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with env.autocast():
                loss, _ = net(*given)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    length = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm()
    return torch.stack([loss.detach().float(), length]).tolist()


@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_a_real_step_does_not_wait_and_is_nearly_the_same_in_bf16(name):
    exact, rounded = step(name, None), step(name, torch.bfloat16)
    print(name, exact, rounded)
    assert rounded[0] == pytest.approx(exact[0], rel=0.1)
    assert name.startswith("mcl") or rounded[1] == pytest.approx(exact[1], rel=0.2)     # (it has second derivatives)


@needs_gpu
@pytest.mark.parametrize("name", ["mofo", "mme trajectory", "fame", "mcl", "modist", "finetune"])
def test_a_compiled_step_is_the_same(name):
    compiled, eager = (step(name, torch.bfloat16, compile) for compile in (True, False))
    assert compiled[0] == pytest.approx(eager[0], rel=0.02)
    bound = 0.1 if name == "fame" else 0.05                                     # H200: fame 5 %, and nearer to fp32
    assert name == "mcl" or compiled[1] == pytest.approx(eager[1], rel=bound)   # (it has second derivatives)


@needs_gpu
def test_flow_is_that_of_a_cpu():
    pair = clips(2, 3)
    for name in ("raft_small", "tvl1"):
        here, there = estimator(name), estimator(name, device="cuda")
        if name != "tvl1":
            there.raft.load_state_dict(here.raft.state_dict())
        torch.testing.assert_close(there(pair).cpu(), here(pair.cpu()), atol=0.05, rtol=0.01)


@pytest.mark.parametrize("script, flags", [("mofo", ""), ("fame", "--backbone slow_r50 --width 0.0625 --image-size 32"),
                                           ("modist", "--backbone slow_r50 --width 0.0625 --image-size 32"),
                                           ("finetune", "--image-size 64 --views 1x2 --test-batch 3")])
def test_no_graph_is_added_after_the_first_compiled_step(script, flags, here, tmp_path, monkeypatch):
    """Neither by previews and tests, which have sizes of their own, nor once batch norms have seen a batch."""
    counts, log, init = [], common.Log.step, tmp_path / "init"
    if script == "finetune":
        run("mofo", "--steps", 1, "--no-compile", "--workers", 0, "--batch", 8, "--out", init)

    def note(*args, **kwargs):
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        log(*args, **kwargs)
    monkeypatch.setattr(common.Log, "step", note)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flags = [*flags.split(), "--compile", "--workers", 0, "--batch", 8, "--out", tmp_path]
    more = ["--epochs", 1, "--init", init / "last.pt"] if script == "finetune" else ["--steps", 3, "--preview-every", 2]
    run(script, *flags, *more, "--toy-train", 24, "--toy-test", 16)
    first = counts[torch.cuda.is_available()]                               # on a GPU the first step is eager
    assert 0 < first == counts[-1] == torch._dynamo.utils.counters["stats"]["unique_graphs"], counts
