"""Averages of a model's state: of its weights over steps, and of its running statistics over workers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from detr_ray.engine.context import WorkerContext
from detr_ray.model import DetectionModel


class ModelEma:
    """A moving average of a model's weights. The decay is warmed up as ``min(decay, (1 + n) / (10 + n))`` after ``n``
    updates, so that the average forgets the
    random start. Buffers (running statistics) are copied.

    Args:
        model: the model that trains.
        decay: share of the old average that one update keeps, e.g. 0.9997.
    """

    def __init__(self, model: DetectionModel, decay: float) -> None:
        self.module: DetectionModel = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model's weights as they are now."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        averaged: list[torch.Tensor] = list(self.module.parameters())
        current: list[torch.Tensor] = list(model.parameters())
        torch._foreach_lerp_(averaged, current, 1 - decay)
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)


class RunningStatistics:
    """One worker's running statistics of those batch norms that train.

    Training never reads them, so each worker has its own. Checkpoints and evaluations have the mean over workers. Each
    worker keeps its own statistics after that, also over a restart with the same number of workers, so that the final
    weights do not depend on when checkpoints were written.

    Args:
        model: the model that trains.
        averaged_model: the moving average of its weights; None without one.
        context: this worker's group.
    """

    def __init__(self, model: nn.Module, averaged_model: nn.Module | None, context: WorkerContext) -> None:
        self._context = context
        norms = [
            name
            for name, part in model.named_modules()
            if isinstance(part, nn.BatchNorm2d) and any(p.requires_grad for p in part.parameters())  # others stay
        ]
        self._copies = [_statistics(part, norms) for part in (model, averaged_model) if part is not None]

    def of_all_workers(self) -> list[Tensor] | None:
        """The statistics of all workers, a row each, on rank 0; every worker must call it. None if there are none."""
        if self._context.world_size == 1 or not self._copies[0]:
            return None
        return self._context.gather_to_first(_row(self._copies[0]).cpu())

    def restore(self, rows: Sequence[Tensor] | None) -> None:
        """Restores this worker's statistics. If the number of workers has changed, the mean in the model stays."""
        if rows is not None and len(rows) == self._context.world_size and self._copies[0]:
            _fill(self._copies[0], rows[self._context.rank])

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the models have the mean over workers; every worker must call it."""
        if self._context.world_size == 1 or not self._copies[0]:
            yield
            return
        before = [_row(own) for own in self._copies]
        mean = self._context.all_reduce_sum(before[0].clone()) / self._context.world_size
        for own in self._copies:
            _fill(own, mean)
        try:
            yield
        finally:
            for own, values in zip(self._copies, before, strict=True):
                _fill(own, values)


def _statistics(model: nn.Module, norms: Sequence[str]) -> list[Tensor]:
    """Means and variances of some of a model's norms."""
    return [model.get_buffer(f"{norm}.{kind}") for norm in norms for kind in ("running_mean", "running_var")]


def _row(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values])


@torch.no_grad()
def _fill(values: Sequence[Tensor], row: Tensor) -> None:
    for value, part in zip(values, row.to(values[0].device).split([value.numel() for value in values]), strict=True):
        value.copy_(part.view_as(value))
