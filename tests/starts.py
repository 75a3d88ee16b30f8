"""Several processes that start one run in the same moment. Imports little: each of them imports it anew."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

from detr_ray.config import ConfigError
from detr_ray.engine.checkpoints.run_directory import open_run


def begin_and_hold(storage: str, name: str, environment: dict[str, str], barrier: Any, answers: Any) -> None:
    """One start; holds the run until all have tried."""
    os.environ.update(environment)  # the server of the processes may have started with another one
    barrier.wait(200)
    try:
        run = open_run(name, storage, {"optim.lr": 1.0}, {"train": "abc"}, "optim: {lr: 1}")
        with run.locked():
            answers.put(("held", run.run_id, os.getpid()))
            barrier.wait(200)
    except ConfigError as error:
        answers.put(("refused", str(error), os.getpid()))
        barrier.wait(200)


def start_at_once(storage: str, name: str, count: int) -> tuple[list[tuple[str, int]], list[str]]:
    """What so many starts of one run gave: (run id, process) of those that held it, and what the others were told."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["detr_ray.engine.checkpoints.run_directory"])
    barrier, answers = context.Barrier(count), context.Queue()
    arguments = (storage, name, dict(os.environ), barrier, answers)
    processes = [context.Process(target=begin_and_hold, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=200) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    held = [(text, pid) for kind, text, pid in found if kind == "held"]
    return held, [text for kind, text, _ in found if kind == "refused"]
