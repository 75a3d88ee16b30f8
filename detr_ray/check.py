"""Looks for problems in data, weights, storage and tracking before a run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from detr_ray.cli import EXIT_FAILED, run_command, say
from detr_ray.config import Config, ConfigError

DESCRIPTION = """Look for problems before a run: annotations, labels, images, first weights, storage and tracking.

All checks are made, also after errors; nothing is changed. With --cluster, the cluster of RAY_ADDRESS is checked first:
resources for the workers, and on each node versions, storage, images and tracking. Exit code 0: no error (there may be
warnings); 1: at least one error; 2: the configuration cannot be used."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decode", action="store_true", help="decode every image; without it, only the headers of the images are read"
    )
    parser.add_argument("--cluster", action="store_true", help="check the cluster and each of its nodes, too")
    parser.add_argument("--json", metavar="FILE", help="write the whole report to this file; - is standard output")


def _check(config: Config, arguments: argparse.Namespace) -> int:
    from detr_ray.engine.preflight.checks import run_preflight, section
    from detr_ray.engine.preflight.findings import Report
    from detr_ray.progress_bar import ImagesBar

    to_stdout = arguments.json == "-"
    report = Report()
    with ImagesBar(sys.stderr if to_stdout else None) as bar:
        if arguments.cluster:
            from detr_ray.runtime.cluster_check import AREA, check_cluster

            with section(AREA, report, bar.say):
                check_cluster(config, report, bar.say)
        run_preflight(config, bar.say, decode=arguments.decode, report=report, pace=bar.pace)
        bar.say(f"\n{report.summary()}")
    if arguments.json:
        content = json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"
        if to_stdout:
            say(content.rstrip("\n"))
        else:
            _write(Path(arguments.json), content)
            say(f"the whole report   {arguments.json}")
    return 0 if report.ok else EXIT_FAILED


def _write(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    except OSError as error:
        raise ConfigError(f"--json: {path} cannot be written: {error.strerror or error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m detr_ray.check``."""
    return run_command("check", DESCRIPTION, _check, argv, add_arguments=_arguments, check=Config.check_training)


if __name__ == "__main__":
    sys.exit(main())
