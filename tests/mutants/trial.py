"""Runs tests against a mutant, in a copy of the project: the checkout is never changed, also when this is killed.

What takes seconds to import (torch and the like, nothing of the project) is imported once; each mutant's tests run in
a process forked from there.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.coverage import Tracing
from tests.mutants.operators import Mutant

COPIED = ("detr_ray", "tests", "configs", "docs", "cluster", "benchmarks", "pyproject.toml", "README.md", "Makefile")
IMPORTED_ONCE = (
    "pytest", "torch", "torchvision", "torch.utils.data", "torchvision.models.resnet", "torchvision.transforms.v2",
    "numpy", "scipy.optimize", "pyarrow.fs", "pyarrow.parquet", "pydantic", "yaml", "PIL.Image", "PIL.ImageDraw",
)  # fmt: skip
PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"


@dataclass(frozen=True)
class Trial:
    """How tests ended.

    Attributes:
        outcome: ``passed``, ``failed`` or ``timed out``.
        seconds: how long they took.
        output: what they printed.
    """

    outcome: str
    seconds: float
    output: str


class Workshop:
    """A copy of the project in which lines are changed and tests run.

    Args:
        root: the project.
        folder: an empty folder for the copy.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.copy = folder / "checkout"
        self.copy.mkdir()
        for name in COPIED:
            source = root / name
            if source.is_dir():
                shutil.copytree(source, self.copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
            elif source.exists():
                shutil.copy2(source, self.copy / name)
        if (root.parent / "shared").is_dir():  # the reference data is looked for beside the checkout
            (folder / "shared").symlink_to(root.parent / "shared")
        self._temporary = folder / "tmp"
        self._output = folder / "output.txt"

    def try_mutant(self, mutant: Mutant, tests: Sequence[str], limit_s: float) -> Trial:
        """Runs tests with a mutant in place of its module, which is put back afterwards."""
        path = self.copy / mutant.path
        original = path.read_bytes()
        path.write_bytes(mutant.apply(original))
        try:
            return self.run(tests, limit_s)
        finally:
            path.write_bytes(original)

    def run(self, tests: Sequence[str], limit_s: float) -> Trial:
        """Runs tests, which stop at the first that fails, in a process and a session of their own."""
        started = time.monotonic()
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir()
        process = os.fork()
        if process == 0:
            self._run_tests(tests, None)
        code = _wait(process, limit_s)
        with contextlib.suppress(ProcessLookupError):  # what the tests may have left running
            os.killpg(process, signal.SIGKILL)
        outcome = TIMED_OUT if code is None else PASSED if code == 0 else FAILED
        return Trial(outcome, time.monotonic() - started, self._output.read_text(errors="replace"))

    def cover(self, tests: Sequence[str], result: Path) -> None:
        """Runs tests once, all of them, and writes which lines each of them runs.

        Raises:
            SystemExit: a test fails without any change.
        """
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir()
        process = os.fork()
        if process == 0:
            self._run_tests([test for test in tests if (self.copy / test).exists()], result)
        code = _wait(process, 3600)
        if code != 0:
            raise SystemExit(f"{self._output.read_text()[-4000:]}\nthe tests do not pass without a change ({code})")

    def _run_tests(self, tests: Sequence[str], coverage: Path | None) -> None:
        """Never returns: this is the forked process.

        Args:
            tests: what to run.
            coverage: file for the lines that they run; None to stop at the first that fails instead.
        """
        code: int = 1
        try:
            os.setsid()
            output = os.open(self._output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(output, stream)
            os.chdir(self.copy)
            os.environ |= {"PYTHONPATH": str(self.copy), "TMPDIR": str(self._temporary), "PYTHONDONTWRITEBYTECODE": "1"}
            tempfile.tempdir = None
            sys.dont_write_bytecode = True
            sys.path[:] = [str(self.copy), *(entry for entry in sys.path if entry not in ("", str(Path.cwd())))]
            for name in [name for name in sys.modules if name.partition(".")[0] in ("detr_ray", "tests")]:
                del sys.modules[name]
            import pytest

            options = ["-q", "--no-header", "--durations=0", "-p", "no:cacheprovider", "--tb=line"]
            options += [f"--basetemp={self._temporary}/pytest", "-m", "not slow and not ray"]
            options += ["-x"] if coverage is None else []
            plugins = [] if coverage is None else [Tracing(self.copy, coverage)]
            code = int(pytest.main([*options, *tests], plugins=plugins))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def import_once() -> None:
    """Imports what every test needs and no mutant changes."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in IMPORTED_ONCE:
        importlib.import_module(name)


def _wait(process: int, limit_s: float) -> int | None:
    """Exit code of a process; None where it took too long and was ended."""
    give_up = time.monotonic() + limit_s
    while time.monotonic() < give_up:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


@contextlib.contextmanager
def workshop(root: Path) -> Iterator[Workshop]:
    """A copy of the project, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        yield Workshop(root, Path(folder))
