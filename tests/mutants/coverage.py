"""Which tests run which lines of the project: so that a mutant is tried by those alone that could notice it.

The tests are run once for it, slower than usual. Lines that run in other processes are not seen.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest


class Tracing:
    """Notes the lines of the package that run while a test does, its fixtures included.

    Args:
        root: the project, which the files' names will be relative to.
        result: the file to write.
    """

    def __init__(self, root: Path, result: Path) -> None:
        self._root, self._package, self._result = f"{root}{os.sep}", f"{root}{os.sep}detr_ray{os.sep}", result
        self._lines: set[tuple[str, int]] = set()
        self._is_ours: dict[CodeType, bool] = {}
        self._tests: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._lines = set()
        started = time.process_time()
        threading.settrace(self._call)
        sys.settrace(self._call)
        yield
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        by_file = defaultdict(list)
        for file, line in sorted(self._lines):
            by_file[file.removeprefix(self._root)].append(line)
        self._tests[item.nodeid] = {"seconds": time.process_time() - started, "lines": by_file}

    def pytest_sessionfinish(self) -> None:
        self._result.write_text(json.dumps(self._tests))

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        is_ours = self._is_ours.get(code)
        if is_ours is None:
            is_ours = self._is_ours[code] = code.co_filename.startswith(self._package)
        return self._line if is_ours else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line


class Coverage:
    """What tests run.

    Args:
        tests: node id -> ``seconds`` that it takes, and ``lines`` by file, relative to the project's root.
    """

    def __init__(self, tests: dict[str, dict[str, Any]]) -> None:
        self._seconds = {name: float(test["seconds"]) for name, test in tests.items()}
        self._by_line: dict[tuple[str, int], list[str]] = defaultdict(list)
        self._by_file: dict[str, list[str]] = defaultdict(list)
        for name in sorted(tests, key=lambda name: self._seconds[name]):
            for file, lines in tests[name]["lines"].items():
                self._by_file[file].append(name)
                for line in lines:
                    self._by_line[file, line].append(name)

    def tests_of(self, file: str, first: int, last: int, *, at_import: bool, limit_s: float) -> list[str]:
        """The tests that run any of these lines, the fastest first, as many as fit into a time.

        Args:
            file: relative to the project's root.
            first: first line of a statement.
            last: its last line.
            at_import: whether it runs when its module is imported: then the tests of the whole file.
            limit_s: seconds that they may take together; the first one may take longer.
        """
        found = {name for line in range(first, last + 1) for name in self._by_line.get((file, line), ())}
        if at_import:
            found = set(self._by_file[file])
        chosen, seconds = [], 0.0
        for name in sorted(found, key=lambda name: self._seconds[name]):
            seconds += self._seconds[name]
            if chosen and seconds > limit_s:
                break
            chosen.append(name)
        return chosen
