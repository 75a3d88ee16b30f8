"""Writes the report of a run, or of two runs side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from detr_ray.cli import EXIT_FAILED, run_command, say, usage, write_result
from detr_ray.config import Config, ConfigError
from detr_ray.data.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from detr_ray.data.index import DatasetIndex
    from detr_ray.engine.past_run import PastRun

DESCRIPTION = """Write the report of a run: one HTML file that needs no network.

RUN is the run's folder; with a second RUN, both are compared. Training writes the report of its run by itself
(tracking.report). Images are pictured where the run's data is at hand; data.* keys say where it lies now."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = usage("RUN [RUN]")
    parser.add_argument("runs", metavar="RUN", nargs="*", help="folder of a run, on a disk or in a bucket")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="file to write (default: report.html in the run's folder, or comparison.html here)",
    )


def _report(config: Config, arguments: argparse.Namespace) -> int:
    if not 1 <= len(arguments.runs) <= 2:
        raise ConfigError(f"RUN: give the folder of one run or of two, not of {len(arguments.runs)}")
    from detr_ray.engine.past_run import open_past_run
    from detr_ray.engine.preflight.writing import check_outputs

    runs = [open_past_run(location, say) for location in arguments.runs]
    if len(runs) == 1:
        return _of_one(config, runs[0], arguments.out)
    from detr_ray.engine.run_report.comparison import comparison_report

    out = arguments.out or "comparison.html"
    check_outputs({"--out": out})
    return 0 if write_result("--out", out, comparison_report(*runs).encode, "report") else EXIT_FAILED


def _of_one(config: Config, run: PastRun, out: str | None) -> int:
    """Writes the report of a run, and, beside a report in the run's folder, its pictures."""
    from detr_ray.addresses import join
    from detr_ray.engine.checkpoints.run_directory import storage_errors
    from detr_ray.engine.preflight.writing import check_outputs
    from detr_ray.engine.run_report.report import REPORT, run_report

    path = run.directory.path
    location = out or join(path, REPORT)
    check_outputs({"--out": location})
    report = run_report(run, *_images_of(config, run))
    if out is None:
        with storage_errors(path, "RUN"):
            report.save_pictures(path)
    return 0 if write_result("--out", location, report.html.encode, "report") else EXIT_FAILED


def _images_of(config: Config, run: PastRun) -> tuple[DatasetIndex | None, Figure | None]:
    """The run's validation set and its first batch; None for what is not available."""
    from detr_ray.engine.run_report.report import first_batch
    from detr_ray.engine.run_report.run_data import RunData

    data = RunData(run, config.data, lambda reason: say(f"WARNING: {reason}"))
    val = data.validation_set()
    try:
        planned = data.training_data()
        batch = None if planned is None else first_batch(planned)
    except (DataError, ConfigError) as error:
        say(f"WARNING: the report is without the first batch: {error}")
        batch = None
    return val, batch


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m detr_ray.report``."""
    return run_command("report", DESCRIPTION, _report, argv, add_arguments=_arguments)


if __name__ == "__main__":
    sys.exit(main())
