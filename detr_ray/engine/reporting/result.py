"""How a training run ended. Light: whoever only passes it on needs neither the loop nor the model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from detr_ray.engine.context import LeaveReason


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Attributes:
        run_name: its name.
        run_path: where it keeps its checkpoints.
        status: ``finished``; ``stopped`` on request, to be gone on with; ``nothing to do``: it was finished before.
        step: optimizer steps taken since the beginning of the run.
        metrics: what the last evaluation gave.
        best_metrics: what the best checkpoint's evaluation gave.
        best_checkpoint: its folder.
        table: the 12 COCO numbers of the last evaluation, for people.
        train_s: seconds this process spent in the loop, evaluations included.
        leave: why it stopped before its end.
    """

    run_name: str
    run_path: str
    status: Literal["finished", "stopped", "nothing to do"]
    step: int
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    best_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    best_checkpoint: str | None = None
    table: str = ""
    train_s: float = 0.0
    leave: LeaveReason | None = None
