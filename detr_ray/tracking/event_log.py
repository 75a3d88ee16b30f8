"""An append-only log of a run's events: one JSON object a line, in the file ``events.jsonl`` of a folder.

Each line is written by one ``write`` call, so appended events survive the death of the process. After the next ``sync``
they also survive a loss of power. A line that was cut short (by a crash or a full disk) is skipped when reading.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr_ray.tracking.whole_files import sync_folder

logger = logging.getLogger(__name__)

LOG_NAME = "events.jsonl"
_KEPT_IN_MEMORY = 10_000


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """One line of the log.

    Attributes:
        start: offset of the line in bytes.
        end: offset of the next line.
        event: ``kind``, ``t`` (milliseconds since 1970) and the fields of this kind; None if the line cannot be parsed.
    """

    start: int
    end: int
    event: dict[str, Any] | None


class EventLog:
    """Appends events to the log of a folder; several threads and processes may write at once.

    If the disk is full or fails, the caller is not stopped: a warning is logged once, and the last 10,000 events are
    kept in memory and written as soon as the disk accepts them.

    Raises:
        OSError: The folder or the file cannot be made.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / LOG_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self._dropped = 0
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._torn = self._ends_in_the_middle_of_a_line()
        sync_folder(self.path.parent)

    def append(self, kind: str, **fields: Any) -> None:
        """Writes one event, stamped with the wall-clock time."""
        event = {"t": time.time_ns() // 1_000_000, "kind": kind, **fields}
        line = json.dumps(event, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._waiting.append(line)
            if len(self._waiting) > _KEPT_IN_MEMORY:
                self._waiting.popleft()
                self._dropped += 1
            self._write_waiting()

    def sync(self) -> None:
        """Flushes all appended events to the disk, so that they survive a loss of power."""
        with self._lock:
            if self._file < 0:
                return
            self._write_waiting()
            self._sync()

    def _sync(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            logger.warning("%s may not survive a loss of power: %s", self.path, error)

    def close(self) -> None:
        """Writes the events still in memory, if possible, flushes the log to the disk and closes it."""
        with self._lock:
            if self._file < 0:
                return
            self._write_waiting()
            if self._waiting or self._dropped:
                lost = len(self._waiting) + self._dropped
                logger.error("%d tracking events could not be written to %s and are lost", lost, self.path)
            self._sync()
            os.close(self._file)
            self._file = -1

    def _write_waiting(self) -> None:
        had_to_wait = len(self._waiting) > 1
        while self._waiting:
            line = b"\n" + self._waiting[0] if self._torn else self._waiting[0]
            try:
                written = os.write(self._file, line)
                self._torn = written < len(line)
                if self._torn:
                    raise OSError(f"only {written} of {len(line)} bytes were taken")
            except OSError as error:
                if not had_to_wait:
                    logger.warning("%s cannot be written (%s): tracking events are kept in memory", self.path, error)
                return
            self._waiting.popleft()
        if had_to_wait:
            logger.warning("%s can be written again (%d events were dropped)", self.path, self._dropped)

    def _ends_in_the_middle_of_a_line(self) -> bool:
        size = os.fstat(self._file).st_size
        return size > 0 and os.pread(self._file, 1, size - 1) != b"\n"


def read_events(path: Path, offset: int = 0) -> Iterator[LoggedEvent]:
    """Yields the lines from ``offset`` (bytes) on. A last line without a newline is skipped: it is being written."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            end = offset + len(line)
            yield LoggedEvent(offset, end, _parse(line))
            offset = end


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "kind" in event and "t" in event else None
