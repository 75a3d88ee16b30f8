"""Changes lines of the modules at the seams, one at a time, and says which changes no test notices.

    python -m tests.mutants                            # 4 mutants of each module (= make mutants)
    python -m tests.mutants loop step --number 30      # more of some modules
    python -m tests.mutants --only loop.py:131         # those of one line
    python -m tests.mutants --list planned_data        # shows them, runs nothing

First the tests (`seams.py`) are run once, to see which lines each of them runs; a mutant is tried by those that run its
line. Which mutants are made depends on the seed alone. A mutant that survives is a line that no test holds: write the
test that would have failed, or, if the change makes no difference that anybody could see, add it to `equivalent.txt`
with the reason. The exit code is 1 where mutants survive.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.mutants.coverage import Coverage
from tests.mutants.operators import Mutant, mutants_of
from tests.mutants.seams import MODULES, TESTS
from tests.mutants.trial import PASSED, TIMED_OUT, Workshop, import_once, workshop

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent.txt")
LEAST_LIMIT_S = 120.0


def config_defaults() -> dict[str, Any]:
    """Default of each configuration key by its last name, where all keys of that name have the same."""
    from detr_ray.config import Config, flatten

    found: dict[str, set[str]] = {}
    values = {}
    for key, value in flatten(Config()).items():
        name = key.rpartition(".")[2]
        found.setdefault(name, set()).add(repr(value))
        values[name] = value
    return {name: values[name] for name, seen in found.items() if len(seen) == 1}


def equivalents() -> set[tuple[str, str]]:
    """(module, change) of the mutants that are known to make no difference."""
    lines = [line for line in EQUIVALENT.read_text().splitlines() if line.strip() and not line.startswith("#")]
    entries = [tuple(part.strip() for part in line.split(" | ")) for line in lines]
    for entry in entries:
        if len(entry) != 3:
            raise SystemExit(f"{EQUIVALENT.name}: must be 'module | change | reason': {' | '.join(entry)}")
    return {(entry[0], entry[1]) for entry in entries}


def choose(modules: list[str], number: int, seed: int, only: str | None) -> list[Mutant]:
    """So many mutants of each module, the modules taking turns."""
    defaults, known = config_defaults(), equivalents()
    by_module = []
    for module in modules:
        found = mutants_of(module, (ROOT / module).read_bytes(), defaults)
        found = [mutant for mutant in found if (mutant.path, mutant.change) not in known]
        if only is not None:
            found = [mutant for mutant in found if f"{mutant.path}:{mutant.line}".endswith(only)]
        else:
            random.Random(f"{seed} {module}").shuffle(found)
            found = found[:number]
        by_module.append(found)
    return [mutant for row in itertools.zip_longest(*by_module) for mutant in row if mutant is not None]


def try_all(
    mutants: list[Mutant], place: Workshop, coverage: Coverage, end: float, limit_s: float, verbose: bool
) -> int:
    """Runs each mutant's tests until the time is over; prints what survives, and a table. Returns the survivors."""
    tried: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for number, mutant in enumerate(mutants, 1):
        if time.monotonic() > end:
            print(f"the time is over: {len(mutants) - number + 1} mutants were not tried")
            break
        tests = coverage.tests_of(mutant.path, mutant.first, mutant.last, at_import=mutant.at_import, limit_s=limit_s)
        tried[mutant.path] += 1
        if not tests:
            left[mutant.path] += 1
            print(f"NOT RUN  {mutant}", flush=True)
            continue
        trial = place.try_mutant(mutant, tests, LEAST_LIMIT_S + 10 * limit_s)
        left[mutant.path] += trial.outcome == PASSED
        if trial.outcome == PASSED or verbose:
            word = "SURVIVED" if trial.outcome == PASSED else TIMED_OUT if trial.outcome == TIMED_OUT else "killed"
            reason = next((line for line in trial.output.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
            print(f"{word:8} {mutant}  ({len(tests)} tests, {trial.seconds:.0f} s) {reason}", flush=True)
    print(f"\n{'module':40} {'tried':>6} {'killed':>7} {'survived':>9}")
    for module, count in tried.items():
        print(f"{module:40} {count:6} {count - left[module]:7} {left[module]:9}")
    print(f"{'all':40} {tried.total():6} {tried.total() - left.total():7} {left.total():9}")
    return left.total()


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "modules", nargs="*", metavar="MODULE", help="parts of the modules' paths; all if none is given"
    )
    parser.add_argument("--number", type=int, default=4, metavar="N", help="mutants of each module (4)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds choose other mutants (0)")
    parser.add_argument("--minutes", type=float, default=60, metavar="M", help="stop after so many (60)")
    parser.add_argument("--seconds", type=float, default=150, metavar="S", help="most time of one mutant's tests (150)")
    parser.add_argument(
        "--coverage", type=Path, metavar="FILE", help="keep which lines tests run in this file, and take it from there"
    )
    parser.add_argument("--only", metavar="FILE:LINE", help="all mutants of one line")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    parser.add_argument("--verbose", action="store_true", help="show killed ones too, with the test that failed")
    arguments = parser.parse_args()
    wanted = arguments.modules
    modules = [module for module in MODULES if not wanted or any(part in module for part in wanted)]
    mutants = choose(modules, arguments.number, arguments.seed, arguments.only)
    print(f"{len(mutants)} mutants of {len({mutant.path for mutant in mutants})} modules, seed {arguments.seed}")
    if arguments.list:
        print(*mutants, sep="\n")
        return 0
    import_once()
    end = time.monotonic() + 60 * arguments.minutes
    with workshop(ROOT) as place:
        result = arguments.coverage or place.copy.parent / "coverage.json"
        if not result.exists():
            place.cover(TESTS, result)
        coverage = Coverage(json.loads(result.read_text()))
        return 1 if try_all(mutants, place, coverage, end, arguments.seconds, arguments.verbose) else 0


if __name__ == "__main__":
    sys.exit(main())
