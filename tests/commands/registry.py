"""The commands with their options, and which case shows which option."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from observing import small_config

from detr_ray.config import Config


class Place:
    """What a case works with: a data set, a trained run, and commands that are called in this process."""

    def __init__(self, data: Path, run: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.data, self.run, self.folder, self.patch = data, run, folder, patch

    def config(self, *overrides: str) -> Config:
        return small_config(self.data, self.folder / "runs", f"eval.checkpoint={self.run}", *overrides)

    def file(self, *overrides: str) -> str:
        """The configuration as a file."""
        path = self.folder / "config.yaml"
        path.write_text(self.config(*overrides).to_yaml())
        return str(path)

    def call(self, command: str, *argv: object) -> tuple[int, str, str]:
        """Exit code, output and errors."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = importlib.import_module(f"detr_ray.{command}").main([str(item) for item in argv])
        return code, out.getvalue(), err.getvalue()

    def done(self, command: str, *argv: object) -> str:
        """Output of a command that succeeds with this place's configuration."""
        code, out, err = self.call(command, "--config", self.file(), *argv)
        assert code == 0, err + out
        return out


def options_of(command: str) -> list[str]:
    """The options of a command, as its help lists them."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert importlib.import_module(f"detr_ray.{command}").main(["--help"]) == 0
    return sorted(set(re.findall(r"^  (?:-\w, )?(--[a-z][a-z-]*)", out.getvalue(), re.MULTILINE)))


Case = Callable[[Place], None]
CASES: dict[tuple[str, str], Case] = {}
OF_ALL: dict[str, Callable[[Place, str], None]] = {}


def shows(command: str, *options: str) -> Callable[[Case], Case]:
    """Says which options of a command a case shows."""

    def register(case: Case) -> Case:
        CASES.update({(command, option): case for option in options})
        return case

    return register
