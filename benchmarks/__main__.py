"""Runs the benchmarks and prints one table; figures go to ``benchmarks/results/`` as JSON too.

    python -m benchmarks              # all of them (= make bench), each in a process of its own
    python -m benchmarks step         # one, or a few
    python -m benchmarks --list

Every benchmark compares this project with something in one run; see its module's docstring.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

from benchmarks.harness import RESULTS, Row, SkippedBenchmark, machine, read_results, table, write_results

TIMEOUT_S = 600


def names() -> list[str]:
    """All benchmarks: the modules that offer ``run``; none is imported for it."""
    paths = sorted(Path(__file__).parent.glob("*.py"))
    return [path.stem for path in paths if "\ndef run() -> list[Row]:" in path.read_text()]


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


def run_here(name: str) -> int:
    """Runs one benchmark in this process, prints its table, writes its figures."""
    module = _module(name)
    seen = machine()
    print(f"{name}: {(module.__doc__ or '').strip().splitlines()[0]}")
    print("  " + ", ".join(f"{key} {value}" for key, value in seen.items()), flush=True)
    started = time.perf_counter()
    try:
        rows: list[Row] = module.run()
    except SkippedBenchmark as reason:
        print(f"  skipped: {reason}")
        return 0
    print(table(rows))
    print(f"  {time.perf_counter() - started:.0f} s; {write_results(name, rows, seen)}\n", flush=True)
    return 0


def run_each(chosen: list[str]) -> int:
    """Runs each benchmark in a process of its own, then prints all figures in one table."""
    started = time.perf_counter()
    rows: list[Row] = []
    failed = []
    for name in chosen:
        path = RESULTS / f"{name}.json"
        path.unlink(missing_ok=True)
        try:
            code = subprocess.run([sys.executable, "-m", "benchmarks", name], timeout=TIMEOUT_S, check=False).returncode
        except subprocess.TimeoutExpired:
            print(f"  {name}: ended after {TIMEOUT_S} s")
            code = 1
        if code:
            failed.append(name)
        elif path.exists():
            rows += read_results(path)
    print(f"\nAll of it, in {time.perf_counter() - started:.0f} s:\n\n{table(rows)}")
    seen = machine()
    print("\n" + ", ".join(f"{key} {value}" for key, value in seen.items()))
    print(write_results("all", rows, seen))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which ones; all of them where none is named")
    parser.add_argument("--list", action="store_true", help="say which there are")
    arguments = parser.parse_args()
    known = names()
    if arguments.list:
        for name in known:
            print(f"{name:16} {(_module(name).__doc__ or '').strip().splitlines()[0]}")
        return 0
    unknown = [name for name in arguments.names if name not in known]
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(known)}")
    if len(arguments.names) == 1:
        return run_here(arguments.names[0])
    return run_each(arguments.names or known)


if __name__ == "__main__":
    sys.exit(main())
