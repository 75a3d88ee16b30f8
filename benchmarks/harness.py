"""Measuring two things side by side, and saying what was found.

A benchmark is a module of this package that offers ``def run() -> list[Row]`` and says in its docstring what it
compares and by which command. What is compared runs in turns in one process, so that whatever else the machine does
falls on both; what is reported are medians. Peak memory is taken in a fresh process each.

    times = alternate({"ours": step_of_ours, "baseline": step_of_theirs}, rounds=5)
    return [Row("step", ours=2 / times["ours"].median, baseline=2 / times["baseline"].median, unit="images/s")]
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).parent / "results"


class SkippedBenchmark(Exception):  # noqa: N818 - not a fault
    """A benchmark can't run here; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: what was measured.
        ours: this project's figure.
        baseline: what it is compared with; None where there is nothing to compare with.
        unit: of both.
        better: whether higher or lower figures are better.
        note: what a reader has to know, in a few words.
        spread: how far half of the rounds stay from the median, as a share of it (the worse of the two).
    """

    name: str
    ours: float
    baseline: float | None
    unit: str
    better: Literal["higher", "lower"] = "higher"
    note: str = ""
    spread: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times better this project's figure is; below 1 it is worse."""
        if self.baseline is None:
            return None
        better, worse = (self.ours, self.baseline) if self.better == "higher" else (self.baseline, self.ours)
        return better / worse if worse else float("inf")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the rounds of one thing that was measured."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle round."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """How far half of the rounds stay from the median, as a share of it."""
        return statistics.median(abs(value - self.median) for value in self.seconds) / self.median


def alternate(runs: Mapping[str, Callable[[], Any]], rounds: int = 5, warmup: int = 1) -> dict[str, Timing]:
    """Runs everything once a round, in turns.

    Args:
        runs: what to run, by name.
        rounds: rounds that count.
        warmup: rounds before them that do not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-warmup, rounds):
        names = list(runs) if number % 2 == 0 else list(runs)[::-1]
        for name in names:
            started = time.perf_counter()
            runs[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def in_fresh_process(function: Callable[..., Any], *arguments: Any, timeout_s: float = 300.0) -> dict[str, Any]:
    """Calls a module's function in a process of its own.

    Args:
        function: defined at the top of a module.
        arguments: what JSON can carry.
        timeout_s: the process is ended after so many seconds.

    Returns:
        ``result`` (what the function gave; JSON has to carry it), ``seconds`` of the call, ``before_mb`` and
        ``peak_mb``: resident memory before the call (the imports), and at its highest.
    """
    module = function.__module__
    assert module != "__main__", "run it as `python -m benchmarks NAME`, so that its module has a name"
    call = json.dumps([module, function.__qualname__, list(arguments)])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.harness", call],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{module}.{function.__qualname__} failed in its process:\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _answer_call(call: str) -> None:
    module, function, arguments = json.loads(call)
    target = getattr(importlib.import_module(module), function)
    before = memory_mb()["VmRSS"]
    started = time.perf_counter()
    result = target(*arguments)
    seconds = time.perf_counter() - started
    answer = {"result": result, "seconds": seconds, "before_mb": before, "peak_mb": memory_mb()["VmHWM"]}
    print("\n" + json.dumps(answer))


def memory_mb(pid: int | Literal["self"] = "self") -> dict[str, float]:
    """Resident memory of a process now (``VmRSS``) and at its highest (``VmHWM``), in MB of 1,000,000 bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {name: int(kilobytes) * 1024 / 1e6 for name, kilobytes in found.items()}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "at": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as text, columns aligned."""
    cells = [("", "ours", "baseline", "unit", "times better", "+-", "")]
    for row in rows:
        cells.append(
            (
                row.name,
                _figure(row.ours),
                "" if row.baseline is None else _figure(row.baseline),
                row.unit,
                "" if row.ratio is None else f"{row.ratio:.2f}",
                "" if row.spread is None else f"{row.spread:.0%}",
                row.note,
            )
        )
    widths = [max(len(line[column]) for line in cells) for column in range(7)]
    aligned = [
        [cell.ljust(width) if column in (0, 3, 6) else cell.rjust(width) for column, (cell, width) in
         enumerate(zip(line, widths, strict=True))]
        for line in cells
    ]  # fmt: skip
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write_results(name: str, rows: Sequence[Row], seen: Mapping[str, Any]) -> Path:
    """Writes rows and machine to ``benchmarks/results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    described = [{**dataclasses.asdict(row), "ratio": row.ratio} for row in rows]
    path.write_text(json.dumps({"benchmark": name, "machine": dict(seen), "rows": described}, indent=2) + "\n")
    return path


def read_results(path: Path) -> list[Row]:
    """The rows of a file that `write_results` wrote."""
    described = json.loads(path.read_text())["rows"]
    return [Row(**{key: value for key, value in row.items() if key != "ratio"}) for row in described]


if __name__ == "__main__":
    _answer_call(sys.argv[1])
