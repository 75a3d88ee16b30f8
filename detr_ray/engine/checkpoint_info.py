"""What is known of a checkpoint without loading it. Needs nothing that reads or writes files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What is known of a whole checkpoint without loading it.

    Attributes:
        step: optimizer steps taken.
        path: its folder, as an absolute path or URI.
        metrics: what an evaluation of these weights gave; None where there was none yet, or where it failed.
        details: whatever the writer noted (epoch, world size, ...).
        files: name -> {"bytes", "sha256"}.
        evaluation_due: whether these weights are to be evaluated.
        evaluation_problem: why their evaluation failed for good; empty where it did not.
        measured_on: what the metrics were measured with and on; empty where that is not known.
    """

    step: int
    path: str
    metrics: dict[str, float] | None
    details: dict[str, Any]
    files: dict[str, dict[str, Any]]
    evaluation_due: bool = False
    evaluation_problem: str = ""
    measured_on: Mapping[str, Any] = field(default_factory=dict)

    def compares_with(self, other: CheckpointInfo) -> bool:
        """Whether the metrics of both mean the same; those of earlier releases, which did not say, count as if."""
        return not self.measured_on or not other.measured_on or self.measured_on == other.measured_on

    @property
    def unscored(self) -> bool:
        """Whether the evaluation of these weights has not ended yet: it is made up for by who goes on with the run."""
        return self.evaluation_due and self.metrics is None and not self.evaluation_problem
