"""Running statistics of batch norm that trains: each worker's own while it trains, their mean where weights are used.

Training never reads them, so that workers need not agree on them. What is kept in a checkpoint and what is evaluated
has the mean over workers; the workers' own go on beside it, also over a restart with as many workers, so that the
weights at the end do not depend on when checkpoints were written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from detr_ray.engine.context import WorkerContext


class RunningStatistics:
    """One worker's statistics.

    Args:
        model: the model that trains.
        averaged_model: the average of its weights, which is what is used where there is one.
        context: this worker's group.
    """

    def __init__(self, model: nn.Module, averaged_model: nn.Module | None, context: WorkerContext) -> None:
        self._context = context
        norms = [
            name
            for name, part in model.named_modules()
            if isinstance(part, nn.BatchNorm2d) and part.weight.requires_grad  # a frozen backbone's stay as they are
        ]
        self._copies = [_statistics(part, norms) for part in (model, averaged_model) if part is not None]

    def of_all_workers(self) -> list[Tensor] | None:
        """Each worker's own in one row, on rank 0; every worker must call it. None where there is nothing to keep."""
        if self._context.world_size == 1 or not self._copies[0]:
            return None
        return self._context.gather_to_first(_row(self._copies[0]).cpu())

    def restore(self, rows: Sequence[Tensor] | None) -> None:
        """Takes up its own ones; where there were more or fewer workers, what is in the model stays: their mean."""
        if rows is not None and len(rows) == self._context.world_size and self._copies[0]:
            _fill(self._copies[0], rows[self._context.rank])

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the models have the mean over workers; every worker must call it."""
        if self._context.world_size == 1 or not self._copies[0]:
            yield
            return
        before = [_row(copy) for copy in self._copies]
        mean = self._context.all_reduce_sum(before[0].clone()) / self._context.world_size
        for copy in self._copies:
            _fill(copy, mean)
        try:
            yield
        finally:
            for copy, values in zip(self._copies, before, strict=True):
                _fill(copy, values)


def _statistics(model: nn.Module, norms: Sequence[str]) -> list[Tensor]:
    """Means and variances of some of a model's norms."""
    return [model.get_buffer(f"{norm}.{kind}") for norm in norms for kind in ("running_mean", "running_var")]


def _row(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values])


@torch.no_grad()
def _fill(values: Sequence[Tensor], row: Tensor) -> None:
    for value, part in zip(values, row.to(values[0].device).split([value.numel() for value in values]), strict=True):
        value.copy_(part.view_as(value))
