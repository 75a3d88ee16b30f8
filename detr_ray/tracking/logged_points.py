"""Which points of a run's metrics MLflow has, so that each metric gets one point a step however often it was logged.

A run that resumes at step ``k`` logs the steps after ``k`` again, although an earlier process may have logged some of
them after its last checkpoint; and a sender that died may have sent what it did not note. The first point of a step
stays: training is deterministic, so that a later one differs in its times only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

Row = tuple[str, float, int, int]
"""Name, value, milliseconds since 1970, step."""


class LoggedPoints:
    """The points in MLflow, known as far as they have to be.

    The last step of each metric tells most rows to be new. Only for a metric whose steps begin again are all its steps
    asked for, and forgotten once they are passed.

    Args:
        last_steps: metric -> its last step in MLflow.
        steps_of: asks MLflow for all steps of a metric.
    """

    def __init__(self, last_steps: Mapping[str, int], steps_of: Callable[[str], Iterable[int]]) -> None:
        self._last = dict(last_steps)
        self._steps_of = steps_of
        self._steps: dict[str, set[int]] = {}

    def new_among(self, rows: Iterable[Row]) -> list[Row]:
        """The rows whose point MLflow does not have; of several rows of one point the first."""
        found: dict[tuple[str, int], Row] = {}
        for row in rows:
            name, _, _, step = row
            if (name, step) not in found and not self._has(name, step):
                found[name, step] = row
        return list(found.values())

    def add(self, rows: Iterable[Row]) -> None:
        """Notes rows that MLflow has taken."""
        for name, _, _, step in rows:
            if step > self._last.get(name, step - 1):
                self._last[name] = step
                self._steps.pop(name, None)
            elif name in self._steps:
                self._steps[name].add(step)

    def _has(self, name: str, step: int) -> bool:
        if step > self._last.get(name, step - 1):
            return False
        if name not in self._steps:
            self._steps[name] = set(self._steps_of(name))
        return step in self._steps[name]
