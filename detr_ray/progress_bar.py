"""A progress bar below the lines of a command, if its output is a terminal; otherwise only lines.

`ProgressBar` counts one thing to its end: the steps of a training, the trials of a search, the images of an evaluation.
`ImagesBar` has a bar for each piece of work over images, and writes lines about it into a log.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from detr_ray.cli import say
from detr_ray.printable import printable_lines

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


_SPEED_OVER_S = 3600.0
"""The speed is that of the last 1,000 changes, or of this time: a trial's share changes once in several minutes."""


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal on which a line can be redrawn."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class _Lines:
    """Shows lines, above a bar if the stream is a terminal. A context manager; the bar is removed at its end.

    Args:
        stream: where to; None: standard output.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._bar: Progress | None = _new_bar(self._stream) if is_terminal(self._stream) else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Shows a line, above the bar if there is one."""
        if self._bar is None:
            say(line, self._stream)
            return
        from rich.text import Text

        self._bar.console.print(Text(printable_lines(line)), soft_wrap=True)


class ProgressBar(_Lines):
    """Shows lines, and below them a progress bar.

    Args:
        unit: what is counted; the word at the left of the bar.
    """

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit
        self._task: TaskID | None = None
        self._total = 0
        self._done = 0.0

    def begin(self, total: int) -> None:
        """Sets the total number."""
        self._total = total

    def update(self, done: float) -> None:
        """Sets the number that is done, including parts of those in work.

        The speed is measured from the first number on. While a run starts or resumes, before its last checkpoint is
        known, the number is 0, which is ignored: otherwise the steps before the checkpoint would count as taken in no
        time.
        """
        if self._bar is None or done in (0, self._done):
            return
        if self._task is None:
            self._task = self._bar.add_task(self._unit, total=self._total, completed=done)  # type: ignore[arg-type]
        else:
            self._bar.update(self._task, completed=done)
        self._done = done


class ImagesBar(_Lines):
    """Shows lines, and below them how far the work over images is; in a log, a line about it every few seconds."""

    def pace(self, what: str) -> Callable[[int, int], None]:
        """A function to call with the number of images that are done, and of all.

        Args:
            what: beginning of the line, such as ``train: read the sizes of``.
        """
        if self._bar is None:
            from detr_ray.engine.reporting.progress import Pace

            return Pace(f"  {what}", self.say)
        bar = self._bar
        task: TaskID | None = None

        def tell(done: int, total: int) -> None:
            nonlocal task
            if task is None and done < total:
                task = bar.add_task(what, total=total)
            if task is not None:
                bar.update(task, completed=done)
                if done >= total:
                    bar.remove_task(task)
                    bar.refresh()  # or the next lines would be shown above a finished bar
                    task = None

        return tell


def _new_bar(stream: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(file=stream),
        refresh_per_second=1,
        speed_estimate_period=_SPEED_OVER_S,
        transient=True,
    )
