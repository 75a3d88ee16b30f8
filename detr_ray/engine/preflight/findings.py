"""The findings of a preflight, as text and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from detr_ray.printable import counted, printable

Level = Literal["ok", "warning", "error"]

_NAMES_SHOWN = 10
_SHORT_NAME = 30


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        level: ``ok``, ``warning`` (training runs, but perhaps not as meant) or ``error`` (training would fail).
        area: for example ``images``.
        message: what was found.
        advice: what to do about it; may be empty.
        names: the files, classes or tensors concerned.
    """

    level: Level
    area: str
    message: str
    advice: str = ""
    names: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The finding as indented lines of text, with at most ten names."""
        shown, more = list(map(printable, self.names[:_NAMES_SHOWN])), len(self.names) - _NAMES_SHOWN
        if more > 0:
            shown.append(f"and {more} more")
        if all(len(name) <= _SHORT_NAME for name in shown):
            shown = [", ".join(shown).replace(", and ", " and ")] if shown else []
        return [
            f"  {self.level:<8} {_on_one_line(self.message)}",
            *(f"{'':13}{line}" for line in shown),
            *([f"{'':11}> {_on_one_line(self.advice)}"] if self.advice else []),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The finding for JSON."""
        return {
            "level": self.level,
            "area": self.area,
            "message": self.message,
            "advice": self.advice,
            "names": list(self.names),
        }


@dataclass(slots=True)
class Report:
    """All findings of a preflight.

    Attributes:
        findings: in the order of the checks.
        splits: split -> statistics, as JSON values.
    """

    findings: list[Finding] = field(default_factory=list)
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there are no errors."""
        return self.count("error") == 0

    def count(self, level: Level) -> int:
        """Number of findings of a level."""
        return Counter(finding.level for finding in self.findings)[level]

    def add(self, level: Level, area: str, message: str, advice: str = "", names: Sequence[str] = ()) -> None:
        """Adds a finding."""
        self.findings.append(Finding(level, area, message, advice, tuple(names)))

    def summary(self) -> str:
        """One line: the numbers of errors and warnings, and what they mean."""
        counts = f"{counted(self.count('error'), 'error')}, {counted(self.count('warning'), 'warning')}"
        if not self.ok:
            return f"{counts}: training would fail, now or later"
        return f"{counts}: nothing found that stands in the way of training"

    def to_dict(self) -> dict[str, Any]:
        """The whole report for JSON."""
        return {
            "ok": self.ok,
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "findings": [finding.to_dict() for finding in self.findings],
            "splits": self.splits,
        }


def _on_one_line(text: str) -> str:
    return printable(" ".join(line.strip() for line in text.split("\n")))
