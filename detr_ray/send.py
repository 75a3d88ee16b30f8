"""Sends the records of a run that its tracking store does not have yet."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from detr_ray.cli import EXIT_FAILED, run_command, say
from detr_ray.config import Config, ConfigError

DESCRIPTION = """Send the records of a run that its tracking store does not have yet, for example because it was down.

Name the run by run.name (and run.storage), or by --run. Records go to tracking.uri; without it, to the store of the
run. User and password are read from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or from MLFLOW_TRACKING_URI.
Exit code 0: the store has all records; 1: some are not sent yet; 2: there is no such run or store."""

TIMEOUT_S = 300


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="FOLDER", help="the run's folder, or the folder that a warning named")
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=TIMEOUT_S, help=f"how long to try (default {TIMEOUT_S})"
    )


def _send(config: Config, arguments: argparse.Namespace) -> int:
    from detr_ray.tracking import recorded_uri, send_pending
    from detr_ray.tracking.reachability import UnreachableError, UnusableError, try_store

    folder = _tracking_folder(config, arguments.run)
    uri = _address(config, recorded_uri(folder))
    try:
        say(f"{try_store(uri)}; sending what is in {folder}")
    except UnusableError as error:
        raise ConfigError(f"tracking.uri: {error}") from error
    except UnreachableError as error:
        say(f"{error}; trying for {arguments.timeout:.0f} s")
    pending = send_pending(folder, uri, arguments.timeout, say)
    for reason, count in pending.left_out.items():
        say(f"left out: {count} {reason}")
    if pending:
        return EXIT_FAILED
    say(str(pending))
    return 0


def _tracking_folder(config: Config, given: str | None) -> Path:
    """The folder of a run's tracker."""
    from detr_ray.addresses import local_path
    from detr_ray.engine.checkpoints.run_directory import find_run
    from detr_ray.engine.reporting.tracking_store import tracking_folder
    from detr_ray.tracking import holds_records

    if given is not None:
        place = local_path(given)
        folders = () if place is None else (place / "tracking", place)
        found = next((folder for folder in folders if holds_records(folder)), None)
        if found is None:
            raise ConfigError(f"--run: {place or given} holds no records of a run")
        return found
    if config.run.name is None:
        raise ConfigError("run.name: is missing: name the run whose records are to be sent, or give --run FOLDER")
    folder = tracking_folder(config, find_run(config.run.name, config.run.storage))
    if not holds_records(folder):
        raise ConfigError(f"run.name: there are no records of {config.run.name!r} on this machine (in {folder})")
    return folder


def _address(config: Config, recorded: str) -> str:
    """The store to send to. The recorded address has no password; the one in the environment may have one."""
    from detr_ray.tracking.store import STORE_VARIABLE, public_uri, tracking_uri

    in_environment = os.environ.get(STORE_VARIABLE, "")
    if config.tracking.uri is None and public_uri(in_environment) != recorded:
        return recorded
    return tracking_uri(config.tracking.uri, "")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m detr_ray.send``."""
    return run_command("send", DESCRIPTION, _send, argv, add_arguments=_arguments)


if __name__ == "__main__":
    sys.exit(main())
