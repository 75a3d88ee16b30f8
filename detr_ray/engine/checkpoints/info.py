"""Metadata of checkpoints, and the choice of the best one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

MANIFEST = "manifest.json"
"""The file of a checkpoint's folder with its metadata; a folder without it is no checkpoint."""


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """Metadata of a complete checkpoint.

    Attributes:
        step: optimizer steps taken.
        path: its folder, as an absolute path or URI.
        metrics: scores of these weights; None if they were not evaluated yet or the evaluation failed.
        details: further values (epoch, world size, ...).
        files: name -> {"bytes", "sha256"}.
        evaluation_due: whether these weights are to be evaluated.
        evaluation_problem: why their evaluation failed and is not repeated; empty if it did not fail.
        measured_on: data and settings of the evaluation; empty if unknown.
        held: whether it stays until it is released.
    """

    step: int
    path: str
    metrics: dict[str, float] | None
    details: dict[str, Any]
    files: dict[str, dict[str, Any]]
    evaluation_due: bool = False
    evaluation_problem: str = ""
    measured_on: Mapping[str, Any] = field(default_factory=dict)
    held: bool = False

    def compares_with(self, other: CheckpointInfo) -> bool:
        """Whether the metrics of both are comparable."""
        return measured_alike(self.measured_on, other.measured_on)

    def with_scores(
        self, metrics: Mapping[str, float] | None, problem: str, measured_on: Mapping[str, Any] | None
    ) -> CheckpointInfo:
        """The metadata after the evaluation: with its metrics, or with the reason why it failed."""
        noted = None if metrics is None else dict(metrics)
        return replace(self, metrics=noted, evaluation_problem=problem, measured_on=dict(measured_on or {}))

    @property
    def unscored(self) -> bool:
        """Whether these weights still have to be evaluated; a resumed run does it."""
        return self.evaluation_due and self.metrics is None and not self.evaluation_problem


def manifest_text(info: CheckpointInfo) -> str:
    """The content of a checkpoint's manifest."""
    manifest = {
        "step": info.step,
        "metrics": info.metrics,
        "evaluation_due": info.evaluation_due,
        "evaluation_problem": info.evaluation_problem,
        "measured_on": dict(info.measured_on),
        "details": info.details,
        "files": info.files,
    }
    return json.dumps(manifest, indent=1)


def measured_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two evaluations are comparable, by their data and settings.

    Settings that only one of them has, since the other is of an earlier release, count as equal: they cannot change
    within a run, and an older checkpoint could not be compared with anything otherwise.
    """
    return all(one[name] == other[name] for name in one.keys() & other.keys())


def scored(found: Iterable[CheckpointInfo], metric: str) -> list[CheckpointInfo]:
    """The checkpoints that have the metric, oldest first."""
    return sorted((info for info in found if info.metrics and metric in info.metrics), key=lambda info: info.step)


def highest(found: Iterable[CheckpointInfo], metric: str) -> CheckpointInfo | None:
    """The checkpoint with the highest metric, the earliest of equals; all must have the metric."""
    return max(found, key=lambda info: (info.metrics[metric], -info.step), default=None)  # type: ignore[index]


def best_of(found: Iterable[CheckpointInfo], metric: str) -> CheckpointInfo | None:
    """The checkpoint with the highest metric among those that are comparable with the newest."""
    known = scored(found, metric)
    return highest((info for info in known if info.compares_with(known[-1])), metric)
