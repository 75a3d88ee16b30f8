"""The report at the end of a training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from detr_ray.engine.reporting.progress import FitResult

if TYPE_CHECKING:
    from detr_ray.engine.job import TrainJob
    from detr_ray.tracking import Tracker

logger = logging.getLogger(__name__)


def report_at_end(job: TrainJob, result: FitResult, tracker: Tracker, say: Callable[[str], None]) -> None:
    """Writes the report of a run that came to its end into its folder, and records it.

    Whatever fails costs the report alone: training is over, and its result is safe.

    Args:
        job: the run. A trial of a search gets no report.
        result: how it ended.
        tracker: not finished yet.
        say: shows the user a line.
    """
    if not job.config.tracking.report or job.parent_run is not None or result.status != "finished":
        return
    try:
        from detr_ray.engine.past_run import open_past_run
        from detr_ray.engine.run_report.report import write_report  # matplotlib, which training does without

        location = write_report(open_past_run(job.run.path).with_status("FINISHED"), job.data.val)
        tracker.log_file(location, "")
    except Exception as error:
        logger.exception("the report could not be written")
        say(
            f"WARNING: the report could not be written: {error}; `python -m detr_ray.report {job.run.path}` tries again"
        )
    else:
        say(f"report            {location}")
