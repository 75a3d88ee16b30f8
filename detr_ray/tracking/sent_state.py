"""How much of an event log was sent to MLflow, stored in a file beside the log.

The file is written after each batch. If it is outdated, lost or damaged, events are read from the log again, but no
metric gets a second point (see `LoggedPoints`).
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from detr_ray.tracking.event_log import LOG_NAME
from detr_ray.tracking.whole_files import write_whole

STATE_NAME = "sent.json"


@dataclass(frozen=True, slots=True)
class Pending:
    """Records that MLflow does not have yet; false if there are none.

    Attributes:
        events: number of unsent lines of the log.
        uploads: artifact paths of the texts and files that are not stored yet.
        left_out: reason -> number of records that are never sent: deleted files, values and files that MLflow rejects,
            unreadable lines.
        folder: folder of the log.
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
        command = shlex.join(["python", "-m", "detr_ray.send", "--run", str(self.folder)])
        return f"{self.counts} are not in MLflow yet; `{command}` sends them, or the run does when it goes on"

    @property
    def counts(self) -> str:
        """The numbers, in words."""
        return f"{self.events} events and {len(self.uploads)} files"


@dataclass(slots=True)
class SentState:
    """How much of the log was sent to one destination.

    Attributes:
        destination: store and uid of the run.
        run_id: MLflow's id of the run, once it is known.
        offset: the events before this byte of the log were sent, except ``uploads``.
        uploads: artifact path -> offset of its event in the log.
        left_out: reason -> number of records that are never sent.
    """

    destination: str
    run_id: str | None = None
    offset: int = 0
    uploads: dict[str, int] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    @classmethod
    def load(cls, folder: Path, destination: str) -> SentState:
        """Reads the state. A new one if it is missing, damaged, or belongs to another destination or log."""
        try:
            state = cls._parsed(json.loads((folder / STATE_NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError):
            return cls(destination)
        return state if state.destination == destination and state._fits(folder / LOG_NAME) else cls(destination)

    @classmethod
    def _parsed(cls, content: Any) -> SentState:
        """Checks the content of the file.

        Raises:
            ValueError: ``save`` did not write it.
        """
        if not isinstance(content, dict) or content.keys() != set(cls.__slots__):
            raise ValueError("other keys than were written")
        run_id, uploads, left_out = content["run_id"], content["uploads"], content["left_out"]
        if not isinstance(content["destination"], str) or not isinstance(run_id, str | None):
            raise ValueError("a name that is no text")
        if not isinstance(uploads, dict) or not isinstance(left_out, dict):
            raise ValueError("a list where names belong")
        numbers = [content["offset"], *uploads.values(), *left_out.values()]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("an offset or a count that is no whole number")
        return cls(content["destination"], run_id, content["offset"], uploads, Counter(left_out))

    def _fits(self, log: Path) -> bool:
        """Whether all offsets are at the start of a line of the log."""
        offsets = {self.offset, *self.uploads.values()}
        try:
            with log.open("rb") as file:
                return max(offsets) <= log.stat().st_size and all(_begins_a_line(file, offset) for offset in offsets)
        except OSError:
            return False

    def save(self, folder: Path) -> None:
        """Writes the state."""
        content = {name: getattr(self, name) for name in self.__slots__}
        write_whole(folder / STATE_NAME, json.dumps(content))


def _begins_a_line(file: BinaryIO, offset: int) -> bool:
    if offset == 0:
        return True
    file.seek(offset - 1)
    return file.read(1) == b"\n"
