"""The report at the end of a training."""

from __future__ import annotations

import logging
import shlex
from typing import TYPE_CHECKING

from detr_ray.callbacks import Say
from detr_ray.engine.reporting.progress import FitResult

if TYPE_CHECKING:
    from detr_ray.engine.job import TrainJob
    from detr_ray.tracking import Tracker

logger = logging.getLogger(__name__)


def report_at_end(job: TrainJob, result: FitResult, tracker: Tracker, say: Say) -> None:
    """Writes the report of a run that came to its end, and its pictures, into its folder, and records them.

    An error here affects only the report: training is over, and its result is saved. A run that is to stop has no time
    for a report; see `say_how_to_report`.

    Args:
        job: the run.
        result: how it ended.
        tracker: not finished yet.
        say: shows the user a line.
    """
    if not _gets_report(job) or result.status != "finished":
        return
    try:
        location = _write(job, tracker)
    except Exception as error:
        logger.exception("the report could not be written")
        say(f"WARNING: the report could not be written: {error}; `{_command(job)}` tries again")
    else:
        say(f"report            {location}")


def say_how_to_report(job: TrainJob, say: Say) -> None:
    """Says which command reports on a run that was stopped or has failed, and so has no report of this start."""
    if _gets_report(job):
        say(f"report            `{_command(job)}` writes one of what there is so far")


def _gets_report(job: TrainJob) -> bool:
    return job.config.tracking.report and job.gets_report


def _command(job: TrainJob) -> str:
    return f"python -m detr_ray.report {shlex.quote(job.run.path)}"


def _write(job: TrainJob, tracker: Tracker) -> str:
    """Where the report is."""
    # Matplotlib takes a second to import, and training does without it.
    from detr_ray.engine.past_run import open_past_run
    from detr_ray.engine.run_report.report import PICTURES, first_batch, run_report

    report = run_report(open_past_run(job.run.path).with_status("FINISHED"), job.data.val, first_batch(job.data))
    *pictures, page = report.save(job.run.path)
    for location in pictures:
        tracker.log_file(location, PICTURES)
    tracker.log_file(page, "")
    return page
