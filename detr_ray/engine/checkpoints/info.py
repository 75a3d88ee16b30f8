"""What is known of a checkpoint without loading it. Needs nothing that reads or writes files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
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

    def with_scores(
        self, metrics: Mapping[str, float] | None, problem: str, measured_on: Mapping[str, Any] | None
    ) -> CheckpointInfo:
        """The same checkpoint after its evaluation: what it gave, or (without ``metrics``) why it failed for good."""
        noted = None if metrics is None else dict(metrics)
        return replace(self, metrics=noted, evaluation_problem=problem, measured_on=dict(measured_on or {}))

    @property
    def unscored(self) -> bool:
        """Whether the evaluation of these weights has not ended yet: it is made up for by who goes on with the run."""
        return self.evaluation_due and self.metrics is None and not self.evaluation_problem


def scored(found: Iterable[CheckpointInfo], metric: str) -> list[CheckpointInfo]:
    """Those of them that have a metric, oldest first."""
    return sorted((info for info in found if info.metrics and metric in info.metrics), key=lambda info: info.step)


def highest(found: Iterable[CheckpointInfo], metric: str) -> CheckpointInfo | None:
    """The one of them with the highest metric, which all of them have; the earliest of equals."""
    return max(found, key=lambda info: (info.metrics[metric], -info.step), default=None)  # type: ignore[index]


def best_of(found: Iterable[CheckpointInfo], metric: str) -> CheckpointInfo | None:
    """The one of them with the highest metric, of those that were measured as the newest of them was."""
    known = scored(found, metric)
    return highest((info for info in known if info.compares_with(known[-1])), metric)
