"""Writes the report of a run, or of two runs side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from detr_ray.cli import EXIT_FAILED, run_command, say, write_result
from detr_ray.config import Config, ConfigError

if TYPE_CHECKING:
    from detr_ray.data.index import DatasetIndex
    from detr_ray.engine.past_run import PastRun

DESCRIPTION = """Write the report of a run: one HTML file that needs no network.

RUN is the run's folder; with a second RUN, both are compared. Training writes the report of its run by itself
(tracking.report). Images are pictured where the run's validation data is at hand; data.* keys say where it lies now."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s RUN [RUN] [--config FILE]... [options] [key=value]..."
    parser.add_argument("runs", metavar="RUN", nargs="*", help="folder of a run, on a disk or in a bucket")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="file to write (default: report.html in the run's folder, or comparison.html here)",
    )


def _report(config: Config, arguments: argparse.Namespace) -> int:
    if not 1 <= len(arguments.runs) <= 2:
        raise ConfigError(f"RUN: give the folder of one run or of two, not of {len(arguments.runs)}")
    from detr_ray.addresses import join
    from detr_ray.engine.past_run import open_past_run
    from detr_ray.engine.preflight.writing import check_outputs
    from detr_ray.engine.run_report.report import REPORT

    runs = [open_past_run(location, say) for location in arguments.runs]
    alone = len(runs) == 1
    out = arguments.out or (join(runs[0].directory.path, REPORT) if alone else "comparison.html")
    check_outputs({"--out": out})
    if alone:
        from detr_ray.engine.run_report.report import run_report

        content = run_report(runs[0], _validation_set(config, runs[0])).html
    else:
        from detr_ray.engine.run_report.comparison import comparison_report

        content = comparison_report(*runs)
    return 0 if write_result("--out", out, content.encode, "report") else EXIT_FAILED


def _validation_set(config: Config, run: PastRun) -> DatasetIndex | None:
    """The images that the run was validated on; None if they are not available."""
    from detr_ray.data.errors import DataError
    from detr_ray.engine.opened_data import open_evaluation_data

    data = config.data if config.data.has_val else run.config.data
    if not data.has_val:
        return None
    try:
        index = open_evaluation_data(data, lambda line: None)
    except (DataError, ConfigError) as error:
        say(f"WARNING: no images in the report: {error}")
        return None
    if index.fingerprint != run.record["fingerprints"].get("val"):
        say(f"WARNING: no images in the report: {index.source} is not what the run was validated on")
        return None
    return index


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m detr_ray.report``."""
    return run_command("report", DESCRIPTION, _report, argv, add_arguments=_arguments)


if __name__ == "__main__":
    sys.exit(main())
