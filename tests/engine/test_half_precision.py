"""fp16's loss scale: back-offs are ordinary, a scale that is used up is not. On the CPU, with torch's own scaler.

Most processors have no instructions for fp16, and take a second for a step that takes 30 ms in fp32: hence images of 32
pixels and few steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import fit_here, make_dataset, tiny_config
from torch import nn

from detr_ray.engine.context import LocalContext
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.job import TrainJob, prepare_job
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.engine.training_step.optimizer import build_optimizer
from detr_ray.engine.training_step.step import TrainStep
from detr_ray.tracking import MemoryTracker

FP16 = (
    "train.precision=fp16", "train.use_gpu=null", "model.dropout=0", "model.backbone_stride=8",
    "data.augment={scales: [16], max_size: 32}", "eval={size: 16, max_size: 32}", "train.global_batch_size=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes", num_train=60, num_val=2, image_size=(32, 40))


@pytest.fixture
def job(dataset: Path, tmp_path: Path) -> TrainJob:
    return prepare_job(tiny_config(dataset, tmp_path, *FP16), lambda line: None)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(model, {"lr": 1e-4, "lr_backbone": 1e-5}, weight_decay=1e-4)


def take_steps(
    job: TrainJob,
    count: int,
    scale: float,
    *,
    skip: bool = False,
    after: Callable[[TrainStep], None] | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam,
) -> TrainStep:
    """Steps of a job at a first loss scale; ``after`` sees each step once it is settled."""
    model = job.build_detector().model
    step = TrainStep(
        model, job.build_detector().criterion, optimizer(model), LocalContext(), seed=0, precision="fp16",
        clip_max_norm=0.1, skip_nonfinite=skip,
    )  # fmt: skip
    step.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    batches = LocalBatches(job.data.plan(1, 0), *job.data.loaders())
    for number, micro_batches in enumerate(batches.train_batches(0, count)):
        step(number, micro_batches)
        step.settle()
        if after is not None:
            after(step)
    return step


def test_fp16_trains(dataset: Path, tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp16", "fp32"):
        tracker = MemoryTracker()
        settings = (*FP16, f"train.precision={precision}", "train.max_steps=3")
        assert fit_here(tiny_config(dataset, tmp_path, *settings), tracker).status == "finished"
        losses[precision] = [value for _, value in tracker.history("train/loss")]
    assert losses["fp16"][0] == pytest.approx(losses["fp32"][0], rel=0.01)
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.1), "the first update may be a back-off"


def test_any_number_of_back_offs_is_ordinary(job: TrainJob) -> None:
    scales: list[float] = []
    skipped: list[int] = []

    def look(step: TrainStep) -> None:
        scales.append(step.scaler.get_scale())
        skipped.append(step.nonfinite_in_a_row)

    step = take_steps(job, 22, scale=2.0**26, after=look)
    assert scales[10] == 2.0**15, "more back-offs than train.max_nonfinite_steps"
    assert set(skipped) == {0}
    assert all(torch.isfinite(parameter).all() for parameter in step.model.parameters())
    assert {float(state["step"]) >= 1 for state in step.optimizer.state.values()} == {True}, "updates are applied"


def break_gradient(step: TrainStep) -> None:
    step.model.bbox_embed.layers[0].weight.register_hook(lambda gradient: gradient * float("inf"))


def test_a_scale_that_is_used_up_ends_the_run(job: TrainJob) -> None:
    scales: list[float] = []

    def look(step: TrainStep) -> None:
        if not scales:
            break_gradient(step)
        scales.append(step.scaler.get_scale())

    with pytest.raises(RunFailed, match=r"step 5: not finite .*\n.*gradient is not, whatever the loss is scaled by"):
        take_steps(job, 30, scale=16.0, after=look)
    assert scales[:5] == [16.0, 8.0, 4.0, 2.0, 1.0]


def test_steps_left_out_count_in_a_row(job: TrainJob) -> None:
    """An update that is applied begins the count anew; a back-off between does not."""
    counts: list[int] = []
    hooks: list[torch.utils.hooks.RemovableHandle] = []

    def look(step: TrainStep) -> None:
        counts.append(step.nonfinite_in_a_row)
        if len(counts) in (1, 5):
            weight = step.model.bbox_embed.layers[0].weight
            hooks.append(weight.register_hook(lambda gradient: gradient * float("inf")))
        elif len(counts) == 4:
            hooks.pop().remove()

    take_steps(job, 7, scale=2.0, skip=True, after=look)
    assert counts == [0, 0, 1, 2, 0, 1, 2], "at a scale of 2 the first is a back-off"


def test_clipping_is_that_of_the_real_gradient(job: TrainJob) -> None:
    """With plain gradient descent at a rate of 1 an update is as long as the clipped gradient, whatever the scale."""
    start = torch.cat([parameter.detach().flatten() for parameter in job.build_detector().model.parameters()])
    for scale in (2.0**6, 2.0**8):
        step = take_steps(job, 1, scale, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1, fused=True))
        end = torch.cat([parameter.detach().flatten() for parameter in step.model.parameters()])
        assert float((end - start).norm()) == pytest.approx(0.1, rel=1e-3)
