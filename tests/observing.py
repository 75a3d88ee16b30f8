"""Trains a tiny model in this process and notes what happens at the seams: what the model, the loss and the optimizer
are given at each step, and what the store and the tracker get.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_config
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from detr_ray.config import Config
from detr_ray.data.sample import SamplePlan
from detr_ray.engine.checkpoints.store import CheckpointInfo, CheckpointStore
from detr_ray.engine.context import LocalContext
from detr_ray.engine.job import TrainJob, prepare_job
from detr_ray.engine.loop import TrainingLoop
from detr_ray.engine.reporting.progress import FitResult
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.loss import SetCriterion
from detr_ray.model import DetectionModel
from detr_ray.structures import ModelOutput, Target
from detr_ray.tracking import MemoryTracker

SMALLEST = (
    "model.hidden_dim=16",
    "model.dim_feedforward=32",
    "model.backbone_stride=8",
    "model.num_queries=6",
    "train.global_batch_size=4",
    "train.epochs=1",
    "data.augment.scales=[48]",
)
"""Over those of `tiny_config`: a step takes some 30 ms."""


@dataclass(frozen=True)
class Forward:
    """What a model was given, how it stood, with which seed of random numbers, and what it gave; ``more`` is what some
    models are given beside images and mask.
    """

    images: Tensor
    mask: Tensor | None
    more: tuple[Any, ...]
    training: bool
    with_gradient: bool
    autocast: torch.dtype | None
    seed: int
    weights: dict[str, Tensor]
    output: ModelOutput


@dataclass(frozen=True)
class Loss:
    """What the criterion was given, and its weights then."""

    outputs: ModelOutput
    targets: list[Target]
    normalisers: tuple[float, ...]
    weights: dict[str, float]
    eos_coef: float
    costs: tuple[float, float, float]


@dataclass(frozen=True)
class Update:
    """The optimizer before a step: rates of the two groups, weights and gradients by name."""

    rates: tuple[float, float]
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]


@dataclass
class Noted:
    """What was noted, in the order in which it happened."""

    training: list[Forward] = field(default_factory=list)
    evaluating: list[Forward] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    models: list[DetectionModel] = field(default_factory=list)
    """The model that trains, and the one that is evaluated where it is another."""


@dataclass
class Observed(Noted):
    """A run, and what was noted of it."""

    job: TrainJob = None  # type: ignore[assignment]
    loop: TrainingLoop = None  # type: ignore[assignment]
    tracker: MemoryTracker = field(default_factory=MemoryTracker)
    stop_after: int | None = None
    lines: list[str] = field(default_factory=list)
    phases: list[tuple[str, int]] = field(default_factory=list)
    reports: list[dict[str, float]] = field(default_factory=list)
    result: FitResult | None = None

    @property
    def store(self) -> CheckpointStore:
        return self.job.run.checkpoints

    def checkpoint(self, step: int | None = None) -> tuple[CheckpointInfo, dict[str, Any], dict[str, Any]]:
        """What is known of a checkpoint (the last one), its model file, its training state."""
        found = [info for info in self.store.checkpoints() if step is None or info.step == step]
        return found[-1], self.store.load(found[-1], "model.pt"), self.store.load(found[-1], "training.pt")

    def samples(self, step: int) -> list[SamplePlan]:
        """What the plan says of a step, for one worker."""
        return [sample for batch in self.job.data.plan(1, 0).step(step) for sample in batch]

    def metric(self, name: str) -> list[float]:
        return [value for _, value in self.tracker.history(name)]


class _NotingContext(LocalContext):
    def __init__(self, phases: list[tuple[str, int]], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._phases = phases

    def enter(self, phase: Any, step: int) -> None:
        self._phases.append((phase, step))


def small_config(data_root: Path, storage: Path, *overrides: str) -> Config:
    """A configuration for a few steps in a fraction of a second."""
    return tiny_config(data_root, storage, *SMALLEST, *overrides)


def without_validation(data_root: Path) -> tuple[str, str]:
    """The training images alone: no evaluation, which takes longer than a few steps."""
    annotations = data_root / "annotations" / "instances_train2017.json"
    return "data.root=null", f"data.train={{annotations: {annotations}, images: {data_root}/train2017}}"


def prepare(config: Config, say: Callable[[str], None] = lambda line: None) -> Observed:
    """A loop before its first step."""
    job = prepare_job(config, say)
    observed = Observed(job=job)
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == observed.stop_after

    context = _NotingContext(
        observed.phases,
        say=observed.lines.append,
        should_stop=should_stop,
        on_report=lambda evaluated: observed.reports.append(dict(evaluated.metrics)),
    )
    batches = LocalBatches(job.data.plan(1, 0), *job.data.loaders())
    observed.loop = TrainingLoop(job, context, batches, observed.tracker)
    return observed


def run(observed: Observed, stop_after: int | None = None) -> Observed:
    """Runs the loop to its end, or asks it to stop after so many steps; notes what happens."""
    observed.stop_after = stop_after
    with observed.job.run.locked(), noting(observed):
        observed.result = observed.loop.run()
    return observed


def observe(config: Config, stop_after: int | None = None) -> Observed:
    """Trains, noting what happens."""
    return run(prepare(config), stop_after)


@contextlib.contextmanager
def noting(noted: Noted) -> Iterator[Noted]:
    """Notes what models, losses and optimizers of this process are given."""

    def after_module(module: nn.Module, inputs: tuple, output: Any) -> None:
        if isinstance(module, DetectionModel):
            if module not in noted.models:
                noted.models.append(module)
            (noted.training if module.training else noted.evaluating).append(_forward(module, inputs, output))

    def before_module(module: nn.Module, inputs: tuple) -> None:
        if isinstance(module, SetCriterion):
            noted.losses.append(_loss(module, inputs))

    def before_update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        names = {parameter: name for name, parameter in noted.models[0].named_parameters()}
        noted.updates.append(_update(optimizer, names))

    hooks = [
        register_module_forward_hook(after_module),
        register_module_forward_pre_hook(before_module),
        register_optimizer_step_pre_hook(before_update),
    ]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()


def copies(named: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in named}


def _forward(model: DetectionModel, inputs: tuple, output: ModelOutput) -> Forward:
    images, mask, *more = inputs
    return Forward(
        images.detach().clone(),
        None if mask is None else mask.clone(),
        tuple(more),
        model.training,
        torch.is_grad_enabled(),
        torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
        torch.initial_seed(),
        copies(model.state_dict().items()),
        _detached(output),
    )


def _loss(criterion: SetCriterion, inputs: tuple) -> Loss:
    outputs, targets, normalisers = inputs
    matcher = criterion.matcher
    return Loss(
        _detached(outputs),
        targets,
        tuple(map(float, normalisers)),
        dict(criterion.weights),
        getattr(criterion.class_loss, "eos_coef", 0.0),
        (matcher.cost_class, matcher.cost_bbox, matcher.cost_giou),
    )


def _update(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> Update:
    rates = tuple(group["lr"] for group in optimizer.param_groups)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return Update(
        (rates[0], rates[-1]),
        copies((names[parameter], parameter) for parameter in parameters),
        copies((names[parameter], parameter.grad) for parameter in parameters if parameter.grad is not None),
    )


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach().clone()
    if isinstance(output, dict):
        return {name: _detached(value) for name, value in output.items()}
    return [_detached(value) for value in output] if isinstance(output, list | tuple) else output
