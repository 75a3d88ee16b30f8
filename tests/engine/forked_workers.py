"""Processes of a process group, forked from a server that has imported what they need: imports take seconds in each."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from ports import free_port

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["one_worker", "loop_worker", "torchvision.models"])  # the first model imports the last


def start_workers(main: Callable[..., None], config_file: Path, world_size: int, *arguments: str) -> None:
    """Runs ``main(config_file, rank, world_size, port, *arguments)`` in so many processes; all of them must succeed."""
    port = free_port()
    processes = [
        FORKS.Process(target=main, args=(str(config_file), rank, world_size, port, *arguments))
        for rank in range(world_size)
    ]
    # The server, which the first start starts, does not get this process's sys.path.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        for process in processes:
            process.start()
    give_up = time.monotonic() + 240
    for process in processes:
        process.join(max(0.0, give_up - time.monotonic()))
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * world_size, "standard error has the reasons"
