"""What a run logged, read back from the log on this machine. MLflow is not asked."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from detr_ray.tracking.event_log import LOG_NAME, read_events


@dataclass(frozen=True)
class Session:
    """One process that logged.

    Attributes:
        began_ms: when, in milliseconds since 1970.
        ended_ms: when it logged last.
        status: ``FINISHED``, ``FAILED`` or ``KILLED``; None: it is still at work, or was killed before it could say.
    """

    began_ms: int
    ended_ms: int
    status: str | None


@dataclass(frozen=True)
class RunHistory:
    """Everything that was logged.

    Attributes:
        metrics: name -> (``[N]`` steps, ``[N]`` values), by rising step; of a step that was logged twice, the first.
        tags: the last value of each.
        sessions: the processes that logged, in their order.
    """

    metrics: dict[str, tuple[np.ndarray, np.ndarray]]
    tags: dict[str, str]
    sessions: list[Session]

    @property
    def seconds(self) -> float:
        """Total running time of the run, over all its processes."""
        return sum(session.ended_ms - session.began_ms for session in self.sessions) / 1000

    def joined(self, other: RunHistory) -> RunHistory:
        """This history, completed by another one of the same run; values that are in both are taken from this one."""
        metrics = {}
        for name in {**other.metrics, **self.metrics}:
            steps: dict[int, float] = {}
            for history in (other, self):
                if name in history.metrics:
                    at, values = history.metrics[name]
                    steps |= dict(zip(at.tolist(), values.tolist(), strict=True))
            metrics[name] = _columns(steps)
        until = self.sessions[0].began_ms
        earlier = [session for session in other.sessions if session.began_ms < until]
        before = [replace(session, ended_ms=min(session.ended_ms, until)) for session in earlier]
        return RunHistory(metrics, other.tags | self.tags, [*before, *self.sessions])


def read_history(folder: str | Path) -> RunHistory | None:
    """Reads the log of a tracker.

    Args:
        folder: the tracker's.

    Returns:
        What was logged; None where there is no log.
    """
    path = Path(folder) / LOG_NAME
    if not path.is_file():
        return None
    points: defaultdict[str, dict[int, float]] = defaultdict(dict)
    tags: dict[str, str] = {}
    sessions: list[Session] = []
    for line in read_events(path):
        if line.event is None:
            continue
        event = line.event
        if event["kind"] == "metrics":
            for name, value in event["metrics"].items():
                points[name].setdefault(int(event["step"]), float(value))
        elif event["kind"] == "tags":
            tags |= event["tags"]
        _note_time(sessions, event)
    return RunHistory({name: _columns(steps) for name, steps in points.items()}, tags, sessions)


def _note_time(sessions: list[Session], event: dict[str, Any]) -> None:
    if event["kind"] == "start" or not sessions:
        sessions.append(Session(event["t"], event["t"], None))
    last = sessions[-1]
    sessions[-1] = Session(last.began_ms, event["t"], event["status"] if event["kind"] == "finish" else last.status)


def _columns(steps: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    ordered = sorted(steps.items())
    return np.array([step for step, _ in ordered]), np.array([value for _, value in ordered])
