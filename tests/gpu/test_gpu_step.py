"""The optimizer step on a device: as on the CPU, with one wait a step, from pinned memory."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from drawn import deviation, draw_batch, draw_step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from detr_ray.engine.training_step.optimizer import LearningRates
from detr_ray.engine.training_step.step import StepOutcome, TrainStep
from detr_ray.schedules import constant
from detr_ray.structures import IMAGENET_PIXELS, HostCopy, StepInfo, to_device

STEPS = 3
# Shares by which a step may differ from fp32 on the CPU. CPUs against themselves: 1e-7 and 4e-4 (bf16) for losses, 1e-7
# and 5e-3 for the gradient's norm, 1e-5 and 0.09 for what three updates change. Adam divides by the gradient's size:
# where a gradient is nearly zero, its rounding decides the direction of the update.
OF_LOSSES = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 1e-2}
OF_NORMS = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 2e-2}
OF_UPDATES = {"fp32": 0.1, "bf16": 0.4, "fp16": 0.3}


def take(step: TrainStep, steps: int = STEPS) -> list[StepOutcome]:
    outcomes = [step(number, [draw_batch(seed=number)]) for number in range(steps)]
    step.settle()
    return outcomes


def changes(step: TrainStep, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() - before[name] for name, value in step.model.named_parameters()}


def state(step: TrainStep) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in step.model.named_parameters()}


@pytest.fixture(scope="module")
def on_cpu() -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms and changes of the weights of three steps on the CPU in fp32."""
    step = draw_step("cpu", channels_last=False)
    before = state(step)
    outcomes = take(step)
    losses = [outcome.losses["loss"].item() for outcome in outcomes]
    return losses, [outcome.grad_norm for outcome in outcomes], changes(step, before)


def test_steps_are_those_of_the_cpu(placed: tuple[torch.device, str], on_cpu) -> None:
    device, precision = placed
    step = draw_step(device, precision)
    before = state(step)
    outcomes = take(step)
    losses, norms, updates = on_cpu
    assert [outcome.losses["loss"].item() for outcome in outcomes] == pytest.approx(losses, rel=OF_LOSSES[precision])
    assert not any(outcome.skipped for outcome in outcomes)
    assert [outcome.grad_norm for outcome in outcomes] == pytest.approx(norms, rel=OF_NORMS[precision])
    assert deviation(changes(step, before), updates) < OF_UPDATES[precision]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_batch_is_learnt(gpu: torch.device, precision: str) -> None:
    step = draw_step(gpu, precision)
    LearningRates({"lr": 1e-3, "lr_backbone": 1e-4}, constant(1.0)).set(step.optimizer, 0.0)
    losses = [step(number, [draw_batch()]).losses["loss"].item() for number in range(12)]
    step.settle()
    assert np.isfinite(losses).all() and losses[-1] < 0.9 * losses[0]


def test_micro_batches_add_up_to_the_batch(device: torch.device) -> None:
    """The same images in one forward pass and in three; none is padded in either."""
    whole = draw_batch(images=3)
    whole.sizes[:, 1] = whole.images.shape[3]
    first = np.concatenate([[0], whole.counts.cumsum()])
    parts = [
        type(whole)(
            **{
                name: getattr(whole, name)[i : i + 1]
                for name in ("images", "sizes", "orig_sizes", "image_ids", "positions", "counts")
            },
            labels=whole.labels[first[i] : first[i + 1]],
            boxes_cxcywh=whole.boxes_cxcywh[first[i] : first[i + 1]],
        )
        for i in range(3)
    ]
    norms = []
    for micro_batches in ([whole], parts):
        step = draw_step(device)
        outcome = step(0, micro_batches)
        step.settle()
        norms.append(outcome.grad_norm)
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_an_update_that_is_not_finite_is_left_out_on_the_device(device: torch.device) -> None:
    step = draw_step(device, skip_nonfinite=True)
    take(step, 1)
    before, moments = state(step), [value.clone() for value in step.optimizer.state_dict()["state"][0].values()]
    bias = step.model.class_embed.bias
    handle = bias.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    outcome = step(1, [draw_batch(seed=1)])
    handle.remove()
    step.settle()
    assert outcome.skipped and step.nonfinite_in_a_row == 1
    assert all(torch.equal(value, before[name]) for name, value in state(step).items())
    after = step.optimizer.state_dict()["state"][0].values()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(after, moments, strict=True))
    applied = step(2, [draw_batch(seed=2)])
    step.settle()
    assert not applied.skipped and step.nonfinite_in_a_row == 0


def test_fp16_finds_its_scale(gpu: torch.device) -> None:
    """A scale that is far too high is halved until the gradients fit; that is ordinary, and no step counts as bad."""
    step = draw_step(gpu, "fp16")
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 2.0**40})
    outcomes = take(step, 40)
    assert outcomes[0].skipped and not outcomes[-1].skipped
    assert step.nonfinite_in_a_row == 0
    assert 1 < step.scaler.get_scale() < 2.0**40


def waits(step: TrainStep, number: int) -> list[str]:
    """What makes the processor wait for the GPU in one step, as torch reports it."""
    batch = draw_batch(seed=number)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(number, [batch])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(one.message) for one in caught if "synchronizing CUDA operation" in str(one.message)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_waits_once(gpu: torch.device, precision: str) -> None:
    step = draw_step(gpu, precision)
    take(step)  # kernels are chosen, memory and the scaler's scale are made
    found = [waits(step, number) for number in range(STEPS, 2 * STEPS)]
    step.settle()
    assert [len(one) for one in found] == [1] * STEPS, found


def test_waits_would_be_noticed(gpu: torch.device) -> None:
    step = draw_step(gpu)
    take(step)
    handle = step.model.register_forward_hook(lambda module, inputs, output: output["pred_boxes"].sum().item())
    assert len(waits(step, STEPS)) == 2
    handle.remove()


class _Reads(TorchDispatchMode):
    """Notes operations whose result, or its size, the processor has to know: on a GPU each of them waits."""

    KINDS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2", "equal"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        picks = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in self.KINDS or any(isinstance(one, Tensor) and one.dtype is torch.bool for one in picks):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "overrides",
    [(), ("model.architecture=deformable_detr", "model.two_stage=true"), ("model.architecture=dino",)],
    ids=["detr", "deformable_detr", "dino"],
)
def test_forward_loss_and_backward_read_nothing(device: torch.device, overrides: tuple[str, ...]) -> None:
    """What a step waits for beside the matching would be one of these, on any device."""
    step = draw_step(device, channels_last=False, overrides=overrides)
    take(step, 1)
    padded = draw_batch()
    batch = to_device(padded, device, IMAGENET_PIXELS, step_info=StepInfo(seed=0, step=1, most_boxes=2))
    with _Reads() as reads:
        outputs = step.model(*step.model.inputs_of(batch))
        losses = step.criterion(outputs, batch.targets, step.criterion.normalisers(padded.counts.tolist()))
        step.criterion.total(losses).backward()
    assert reads.found == []
    with _Reads() as reads:
        losses["loss_ce"].item()
    assert len(reads.found) == 1, "it would have been noticed"


class _Copies(TorchDispatchMode):
    """Notes for each copy from the host to a GPU whether it came from pinned memory and lets the processor go on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[bool, bool]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            target = kwargs.get("device")
            if target is not None and torch.device(target).type == "cuda":
                self.found.append((args[0].is_pinned(), bool(kwargs.get("non_blocking"))))
        return function(*args, **kwargs)


def test_batches_are_copied_from_pinned_memory(gpu: torch.device) -> None:
    with _Copies() as copies:
        batch = to_device(draw_batch(), gpu, IMAGENET_PIXELS, channels_last=True)
    assert len(copies.found) >= 4, "pixels, sizes, labels and boxes at least"
    assert set(copies.found) == {(True, True)}
    assert batch.images.is_cuda and batch.targets[0]["boxes"].is_cuda


def test_batches_are_those_of_the_cpu_and_keep_their_values(device: torch.device) -> None:
    """Pinned memory is used again while copies are under way; what arrived must not change."""
    batches = [to_device(draw_batch(seed=seed), device, IMAGENET_PIXELS) for seed in range(8)]
    for seed, batch in enumerate(batches):
        plain = to_device(draw_batch(seed=seed), torch.device("cpu"), IMAGENET_PIXELS)
        assert torch.allclose(batch.images.cpu(), plain.images, atol=1e-6)
        assert batch.mask is not None and torch.equal(batch.mask.cpu(), plain.mask)
        for mine, theirs in zip(batch.targets, plain.targets, strict=True):
            assert torch.equal(mine["labels"].cpu(), theirs["labels"])
            assert torch.equal(mine["boxes"].cpu(), theirs["boxes"])


def test_numbers_are_read_when_they_have_arrived(device: torch.device) -> None:
    big = torch.randn(*(2 * [4000 if device.type == "cuda" else 200]), device=device)
    for _ in range(20):  # enough work for a copy that is read too early to hold something else
        big = big @ big
        big = big / big.norm()
    copy = HostCopy(torch.stack([big.norm(), big.sum()]))
    expected = [big.norm().item(), big.sum().item()]
    assert copy.read().device.type == "cpu"
    assert copy.read().tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_compiled_step_gives_the_same(gpu: torch.device, on_cpu) -> None:
    pytest.importorskip("triton", reason="torch.compile needs triton on GPUs")
    step = draw_step(gpu, compile_model=True)
    outcomes = take(step)
    assert [outcome.losses["loss"].item() for outcome in outcomes] == pytest.approx(on_cpu[0], rel=OF_LOSSES["fp32"])
