"""How much of an event log has reached its destination, kept beside the log; and what is still to come.

It is kept after each batch that was taken, so a sender that dies sends at most one batch twice.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from detr_ray.tracking.event_log import LOG_NAME
from detr_ray.tracking.whole_files import write_whole

STATE_NAME = "sent.json"


@dataclass(frozen=True, slots=True)
class Pending:
    """What was logged and has not reached MLflow; false where nothing is left.

    Attributes:
        events: lines of the log not sent.
        uploads: texts and files not stored, as their targets among the artifacts.
        left_out: files that were gone, values and files that MLflow refuses, unreadable lines: counted by reason.
            They are not waited for.
        folder: where all of it is kept.
    """

    events: int
    uploads: tuple[str, ...]
    left_out: dict[str, int]
    folder: Path

    def __bool__(self) -> bool:
        return self.events > 0 or bool(self.uploads)

    def __str__(self) -> str:
        if not self:
            return "everything that was logged is in MLflow"
        return (
            f"{self.events} events and {len(self.uploads)} files are not in MLflow yet; they are kept in {self.folder}"
        )


@dataclass(slots=True)
class SentState:
    """How far a destination has the log.

    Attributes:
        destination: store and run that this is about.
        run_id: MLflow's id of the run, once it is known.
        offset: the log's bytes before it have arrived, but for ``uploads``.
        uploads: target -> offset of the event that says what belongs there.
        left_out: counts by reason of what never arrives.
    """

    destination: str
    run_id: str | None = None
    offset: int = 0
    uploads: dict[str, int] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    @classmethod
    def load(cls, folder: Path, destination: str) -> SentState:
        """The kept state; a fresh one where there is none, or it is of another destination or another log."""
        try:
            content = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
            content["left_out"] = Counter(content["left_out"])
            state = cls(**content)
        except (FileNotFoundError, KeyError, TypeError, ValueError):
            return cls(destination)
        log = folder / LOG_NAME
        fits = state.destination == destination and log.exists() and state.offset <= log.stat().st_size
        return state if fits else cls(destination)

    def save(self, folder: Path) -> None:
        """Replaces the kept state."""
        content = {name: getattr(self, name) for name in self.__slots__}
        write_whole(folder / STATE_NAME, json.dumps(content))
