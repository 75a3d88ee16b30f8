"""Follows a run that another process trains."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from detr_ray.cli import EXIT_FAILED, run_command, say, usage
from detr_ray.config import Config, ConfigError

if TYPE_CHECKING:
    from detr_ray.tracking.run_progress import RunProgress

DESCRIPTION = """Follow a run that another process trains, here or elsewhere, until it ends.

RUN is the run's folder or address (runs/NAME, s3://bucket/runs/NAME); without it, run.name and run.storage name it.
Shows each new line about steps and evaluations, and in a terminal a bar. What it shows is the file progress.json that a
run keeps in its folder. Exit code 0: the run finished; 1: it stopped, failed, or its process has died."""

LOOK_S = 1.0
LOOK_REMOTE_S = 10.0
BEGIN_WITHIN_S = 600.0


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = usage("[RUN]")
    parser.add_argument("run", metavar="RUN", nargs="?", help="the run's folder or address")
    parser.add_argument("--once", action="store_true", help="say how far the run is, and stop")


def _watch(config: Config, arguments: argparse.Namespace) -> int:
    from detr_ray.engine.reporting.watching import overview

    path = _run_path(config, arguments.run)
    if not arguments.once:
        return _follow(path)
    progress = _progress(path)
    if progress is None:
        raise ConfigError(f"{path}: the run has taken no step yet, or was trained by a version without progress.json")
    for line in overview(progress, time.time()):
        say(line)
    return 0


def _follow(path: str) -> int:
    from detr_ray.addresses import is_remote
    from detr_ray.engine.reporting.watching import Follower
    from detr_ray.progress_bar import ProgressBar

    pause_s = LOOK_REMOTE_S if is_remote(path) else LOOK_S
    give_up = time.monotonic() + BEGIN_WITHIN_S
    with ProgressBar("step") as bar:
        follower = Follower(bar.say)
        while True:
            progress = _progress(path)
            if progress is None and time.monotonic() > give_up:
                raise ConfigError(f"{path}: there is no progress.json; is the run being trained by this version?")
            if progress is not None:
                bar.begin(progress.total_steps)
                bar.update(progress.step)
                if follower.see(progress):
                    return 0 if progress.status == "finished" else EXIT_FAILED
            time.sleep(pause_s)


def _run_path(config: Config, given: str | None) -> str:
    """The folder or address of an existing run."""
    from detr_ray.addresses import check_address, join, resolve
    from detr_ray.locations import file_info
    from detr_ray.retries import reason_of

    if given is None and config.run.name is None:
        raise ConfigError("RUN is missing: name a run's folder or address, or give run.name and run.storage")
    location = given if given is not None else join(config.run.storage, config.run.name or "")
    check_address(location)
    path = resolve(location)
    try:
        is_run = file_info(join(path, "run.json")).is_file
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {reason_of(error)}") from error
    if not is_run:
        raise ConfigError(f"{path} is no run's folder: there is no run.json in it")
    return path


def _progress(path: str) -> RunProgress | None:
    from detr_ray.retries import reason_of
    from detr_ray.tracking.run_progress import read_progress

    try:
        return read_progress(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {reason_of(error)}") from error
    except ValueError as error:
        raise ConfigError(f"{path}/progress.json is damaged: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m detr_ray.watch``."""
    return run_command("watch", DESCRIPTION, _watch, argv, add_arguments=_arguments)


if __name__ == "__main__":
    sys.exit(main())
