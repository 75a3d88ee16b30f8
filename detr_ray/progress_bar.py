"""A bar of the steps under the lines of a command, where its output is a terminal; elsewhere the lines alone."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from detr_ray.cli import say
from detr_ray.printable import printable_lines

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def is_terminal() -> bool:
    """Whether standard output is a terminal on which a line can be drawn anew."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class StepsBar:
    """Shows lines, and the steps of a run below them. Used as a context, at whose end the bar is gone."""

    def __init__(self) -> None:
        self._bar: Progress | None = _new_bar() if is_terminal() else None
        self._task: TaskID | None = None
        self._total = self._step = 0

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
        """Shows a line, above the bar where there is one."""
        if self._bar is None:
            say(line)
            return
        from rich.text import Text

        self._bar.console.print(Text(printable_lines(line)), soft_wrap=True)

    def begin(self, total_steps: int) -> None:
        """Notes how many steps there are."""
        self._total = total_steps

    def step(self, step: int) -> None:
        """Notes that so many steps are taken.

        The speed is measured from the first of them on that is told. None at all are told while a run begins, or begins
        again, before it knows its last checkpoint: that would count as many steps in no time.
        """
        if self._bar is None or step in (0, self._step):
            return
        if self._task is None:
            self._task = self._bar.add_task("step", total=self._total, completed=step)
        else:
            self._bar.update(self._task, completed=step)
        self._step = step


def _new_bar() -> Progress:
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
        console=Console(file=sys.stdout),
        refresh_per_second=2,
        transient=True,
    )
