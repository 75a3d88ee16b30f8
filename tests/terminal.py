"""A terminal for tests of what commands draw on one."""

from __future__ import annotations

import contextlib
import os
import pty
import threading
from collections.abc import Iterator

import pytest

COLOUR = r"\x1b\[[0-9;?]*[a-zA-Z]"
"""What moves the cursor or changes colours, as a regular expression."""


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Standard output is a terminal, whose bytes are kept."""
    leader, follower_end = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # at its end
            while data := os.read(leader, 65536):
                shown.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    try:
        with open(follower_end, "w") as stream, contextlib.redirect_stdout(stream):  # noqa: PTH123
            yield shown
    finally:
        reader.join(10)
        os.close(leader)
