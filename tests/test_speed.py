"""What makes a step fast leaves its result alone: no waiting for a GPU, fused steps, half precision, memory layout."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import PlainHost, assert_close, assert_same, tiny
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from mpc import baselines
from mpc.checkpoint import load_weights
from mpc.device_views import Draws
from mpc.errors import UserError
from mpc.method import Batch
from mpc.model import Ema, build
from mpc.transfer import Transfer
from mpc.update import make_optimizer, update
from pipeline.card import read_card
from pipeline.config import RunConfig
from pipeline.dotted import parsed
from pipeline.loop import Loop
from pipeline.meter import Meter

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WAITING = {torch.tensor, torch.as_tensor, Tensor.new_tensor, Tensor.cpu, Tensor.tolist, Tensor.numpy}


class NoWaiting(TorchFunctionMode):
    """Refuses what copies between host and device; that nobody reads a value, FakeTensorMode sees to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in WAITING, f"{func} makes the host wait for the device"
        return func(*args, **(kwargs or {}))


class GpuHost(PlainHost):
    """A host that trains on a GPU."""

    device = GPU


def arrays_of_batch(findings: int, size: int = 32) -> list[np.ndarray]:
    """A batch as the stream yields it: images of 32 px and one label a row."""
    images = np.random.default_rng(0).integers(0, 256, (2, size, 1, 32, 32), np.uint8)
    observed = np.eye(findings, dtype=np.float32)[np.arange(size) % findings]
    return [*images, observed, observed, observed >= 0, np.arange(size)]


@pytest.fixture
def absent_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets tensors without data claim to lie on a GPU: what would ask the driver, or needs their data, is left out."""
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self, raising=False)
    monkeypatch.setattr(nn.Module, "to", lambda self, *args, **kwargs: self)  # they are there from the beginning
    monkeypatch.setattr(Draws, "unit", lambda self, *shape: torch.rand((self.count, *shape), device=self.device))
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device=None: generator())


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # by the copy that becomes the average
@pytest.mark.parametrize("method", ["mpc", *baselines.NAMES])
def test_no_step_waits_for_the_gpu(
    method: str, phantom_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent_gpu: None
) -> None:
    """Everything from the views to the watch for NaN, on a GPU that need not exist: reading a value raises an error.

    Mixing devices does, too. Two steps, since the second one finds state.
    """
    run = tiny(
        train={"method": method, "amp": "off"},
        pseudo={"align": "distribution", "kappa": 2.0, "source": "ema"},
        loss={"warmup_epochs": 0},
    )
    card = read_card(phantom_data)
    with FakeTensorMode(), torch.device("cuda"):
        loop = Loop(run, phantom_data, card, GpuHost(tmp_path))

        def backward(loss: Tensor) -> None:  # the engine asks the driver
            for parameter in loop.step_module.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

        monkeypatch.setattr(torch.autograd, "backward", backward)
        fields = [torch.empty(a.shape, dtype=torch.from_numpy(a).dtype) for a in arrays_of_batch(len(card.findings))]
        with NoWaiting():
            for _ in range(2):
                loop.train_step(Batch(*fields))
        assert loop.views is not None
        assert {tensor.device.type for tensor in (loop.meter.totals, loop.watch.first)} == {"cuda"}
    assert loop.step == 2


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch calls it a prototype
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_no_step_waits_for_a_real_gpu(amp: str, phantom_data: str, tmp_path: Path) -> None:
    card = read_card(phantom_data)
    loop, transfer = Loop(tiny(train={"amp": amp}), phantom_data, card, GpuHost(tmp_path)), Transfer(GPU)
    loop.train_step(transfer(arrays_of_batch(len(card.findings))))
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.train_step(transfer(arrays_of_batch(len(card.findings))))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loop.model.head.weight).all()


def test_fp16_scaling_reads_nothing_back() -> None:
    """The scaler asks an optimiser that is not fused for its overflows, which a host would wait for."""
    with FakeTensorMode(), NoWaiting():
        weight = nn.Parameter(torch.ones(3))
        optimizer = make_optimizer("adamw", [{"params": [weight]}], lr=0.1, weight_decay=0.0, device=CPU)
        scaler = torch.amp.GradScaler("cpu")
        for _ in range(2):
            update(weight.sum(), optimizer, scaler, clip=1.0)
    assert {step["step"].shape for step in optimizer.state.values()} == {torch.Size()}
    assert weight.grad is None


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_fused_steps_equal_those_of_the_plain_optimizer(name: Any) -> None:
    """The loop's settings, decay and two groups among them, against PyTorch's loop over single tensors."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in ((3, 4, 5, 5), (7,))]

    def trained(*, fused: bool) -> list[Tensor]:
        weights = [nn.Parameter(start.clone()) for start in starts]
        groups = [{"params": [weight], "lr": lr} for weight, lr in zip(weights, (0.1, 0.01), strict=True)]
        optimizer = make_optimizer(name, groups, lr=0.1, weight_decay=0.05, device=CPU)
        for group in optimizer.param_groups:
            assert group["fused"]
            group["fused"] = fused
        for step in range(5):
            loss = torch.stack([(weight - step).square().sum() for weight in weights]).sum()
            update(loss, optimizer, torch.amp.GradScaler(enabled=False), clip=1.0)
        return [weight.detach() for weight in weights]

    for fused, plain, start in zip(trained(fused=True), trained(fused=False), starts, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
        assert not torch.equal(fused, start)


def test_clipping_sees_unscaled_gradients_and_an_overflow_changes_nothing() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer("sgd", [{"params": [weight]}], lr=1.0, weight_decay=0.0, device=CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    update((weight * torch.tensor([3.0, 4.0])).sum(), optimizer, scaler, clip=1.0)  # Nesterov: 1.9 times the gradient
    torch.testing.assert_close(weight.detach(), torch.tensor([-1.14, -1.52]))
    before = weight.detach().clone()
    update((weight * float("inf")).sum(), optimizer, scaler, clip=1.0)
    assert torch.equal(weight, before)
    assert scaler.get_scale() == 512.0
    update(weight.sum(), optimizer, scaler, clip=100.0)
    assert torch.isfinite(weight).all()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_trains_with_losses_in_float32(amp: str, phantom_data: str, tmp_path: Path) -> None:
    card = read_card(phantom_data)
    loop = Loop(tiny(train={"amp": amp}, loss={"warmup_epochs": 0}), phantom_data, card, PlainHost(tmp_path))
    seen: dict[str, torch.dtype] = {}
    loop.model.backbone.register_forward_hook(lambda module, args, out: seen.update(backbone=out.dtype))
    loop.model.head.register_forward_hook(lambda module, args, out: seen.update(head=out.dtype))
    before = loop.model.head.weight.detach().clone()
    for _ in range(3):
        loop.train_step(Transfer(CPU)(arrays_of_batch(len(card.findings))))
    dtype = torch.bfloat16 if amp == "bf16" else torch.float16
    assert seen == {"backbone": dtype, "head": torch.float32}
    assert not torch.equal(loop.model.head.weight, before)
    assert {p.dtype for p in loop.step_module.parameters()} == {torch.float32}


def test_loaded_moments_lie_as_their_parameters_do() -> None:
    """Fused kernels read by address: moments from a run with another memory layout were applied to other elements."""
    layouts = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}

    def steps(layout: str, start: Tensor, state: Any, count: int) -> tuple[Tensor, Any]:
        weight = nn.Parameter(start.clone(memory_format=layouts[layout]))
        optimizer = make_optimizer("adamw", [{"params": [weight]}], lr=0.1, weight_decay=0.0, device=CPU)
        if state is not None:
            optimizer.load_state_dict(deepcopy(state))
        for step in range(count):
            update((weight * (direction + step)).square().sum(), optimizer, torch.amp.GradScaler(enabled=False), 1.0)
        return weight.detach(), optimizer.state_dict()

    generator = torch.Generator().manual_seed(0)
    start, direction = torch.randn((2, 3, 4, 5, 5), generator=generator)
    half, state = steps("channels last", start, None, 2)
    expected, _ = steps("contiguous", half, steps("contiguous", start, None, 2)[1], 2)
    for layout in layouts:
        torch.testing.assert_close(steps(layout, half, state, 2)[0], expected)


def test_a_batch_is_copied_once_and_keeps_its_types() -> None:
    arrays = [array.copy() for array in arrays_of_batch(3, size=4)]
    for array in arrays:
        array.setflags(write=False)  # as Ray's are
    batch = Transfer(CPU)([arrays[0], None, *arrays[2:]])
    assert batch.strong is None
    for tensor, array in zip(batch, [arrays[0], None, *arrays[2:]], strict=True):
        assert (tensor is None) == (array is None)
        if tensor is not None:
            assert np.array_equal(tensor.numpy(), array)
            assert tensor.numpy().dtype == array.dtype
            assert not np.shares_memory(tensor.numpy(), array)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_batch_arrives_whole_though_the_host_goes_on() -> None:
    transfer = Transfer(GPU)
    for number in range(50):
        array = np.full((64, 1, 128, 128), number, np.uint8)
        batch = transfer([array] * len(Batch._fields))
        array[:] = 255
        assert torch.equal(batch.weak, torch.full_like(batch.weak, number))


def test_average_equals_that_of_timm() -> None:
    """Batch statistics too: floats are averaged, the count of batches is copied."""
    torch.manual_seed(0)
    model = build("test_resnet", 3).train()
    ours, theirs = Ema(model, 0.9), Ema(model, 0.9)
    for step in range(1, 4):
        model(torch.randint(0, 256, (2, 1, 32, 32)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1
        ours.update(model, step=step)
        super(Ema, theirs).update(model, step=step)
    for (name, value), other in zip(ours.module.state_dict().items(), theirs.module.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert ours.module.state_dict()["backbone.bn1.num_batches_tracked"] == 3


def test_channels_last_changes_rounding_alone(phantom_data: str, tmp_path: Path) -> None:
    card, found = read_card(phantom_data), []
    for channels_last in (False, True):
        run = tiny(train={"channels_last": channels_last}, optim={"name": "sgd"}, loss={"warmup_epochs": 0})
        loop = Loop(run, phantom_data, card, PlainHost(tmp_path))
        layouts: list[bool] = []
        first = next(module for module in loop.model.modules() if isinstance(module, nn.Conv2d))
        first.register_forward_hook(
            lambda module, args, out, to=layouts: to.append(out.is_contiguous(memory_format=torch.channels_last))
        )
        for _ in range(2):
            loop.train_step(Transfer(CPU)(arrays_of_batch(len(card.findings))))
        assert layouts == [channels_last] * 2
        found.append(loop.model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_meter_continues_and_adds_terms_that_begin_later() -> None:
    from mpc.method import StepOutput

    def output(loss: float, **terms: float) -> StepOutput:
        values = {name: torch.tensor(value) for name, value in terms.items()}
        return StepOutput(torch.tensor(loss), values, {"selected": torch.tensor(3), "entries": torch.tensor(4.0)})

    meter, again = Meter(CPU), Meter(CPU)
    meter.add(output(1.0, sup=1.0))
    again.load_state_dict(meter.state_dict())
    for one in (meter, again):
        one.add(output(2.0, sup=2.0, ipc=5.0))
        assert one.metrics() == {"loss": 1.5, "loss_sup": 1.5, "loss_ipc": 5.0, "selected_share": 0.75}
    again.load_state_dict({})  # of a checkpoint at the end of an epoch
    again.add(output(4.0, sup=4.0))
    assert again.metrics() == {"loss": 4.0, "loss_sup": 4.0, "selected_share": 0.75}


def test_a_compiled_backbone_is_one_piece() -> None:
    wanted = {"train": {"compile": True}, "model": {"perturb": {"place": "before_last_stage"}}}
    with pytest.raises(UserError, match=r"exclude each other; set train\.compile=false or model\.perturb\.place=last"):
        parsed(RunConfig, wanted, "run.yaml")


def test_compiling_without_a_compiler_is_told(
    phantom_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler, no-such-compiler is not to be found"):
        Loop(tiny(train={"compile": True}), phantom_data, read_card(phantom_data), PlainHost(tmp_path))


@pytest.mark.long
def test_compiled_runs_equal_eager_ones_and_continue(phantom_data: str, tmp_path: Path) -> None:
    """Through warm-up, validation and a resume; the checkpoints of either continue in the other."""
    sections = {"optim": {"name": "sgd", "lr": 0.01}, "data": {"backend": "torch"}}
    card = read_card(phantom_data)
    for name in ("eager", "compiled", "broken"):
        (tmp_path / name).mkdir()
        train = {"epochs": 1, "checkpoint_every": 7, "compile": name != "eager"}
        run = tiny(train=train, loss={"warmup_epochs": 0.2, "ramp_epochs": 0.2}, **sections)
        if name == "broken":
            first = min((tmp_path / "compiled").iterdir())
            first.rename(tmp_path / name / first.name)
        Loop(run, phantom_data, card, PlainHost(tmp_path / name)).fit()
    last = max(path.name for path in (tmp_path / "eager").iterdir())
    assert_close(tmp_path / "compiled" / last, tmp_path / "eager" / last)
    assert_same(tmp_path / "compiled" / last, tmp_path / "broken" / last)
    weights = load_weights(tmp_path / "compiled" / last, "model")
    assert weights.keys() == load_weights(tmp_path / "eager" / last, "model").keys()
