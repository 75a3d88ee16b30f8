"""The report at the end of a training."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from detr_ray.addresses import join
from detr_ray.callbacks import Say
from detr_ray.engine.pictures.request import PictureRequest
from detr_ray.engine.reporting.progress import FitResult
from detr_ray.locations import write_bytes

if TYPE_CHECKING:
    from detr_ray.engine.job import TrainJob
    from detr_ray.tracking import Tracker

logger = logging.getLogger(__name__)


def report_at_end(job: TrainJob, result: FitResult, tracker: Tracker, say: Say) -> None:
    """Writes the report of a run that came to its end, and its pictures, into its folder, and records them.

    An error here affects only the report: training is over, and its result is saved.

    Args:
        job: the run. A trial of a search gets no report.
        result: how it ended.
        tracker: not finished yet.
        say: shows the user a line.
    """
    if not job.config.tracking.report or job.parent_run is not None or result.status != "finished":
        return
    try:
        location = _write(job, tracker)
    except Exception as error:
        logger.exception("the report could not be written")
        say(
            f"WARNING: the report could not be written: {error}; `python -m detr_ray.report {job.run.path}` tries again"
        )
    else:
        say(f"report            {location}")


def _write(job: TrainJob, tracker: Tracker) -> str:
    """Where the report is."""
    # Matplotlib takes a second to import, and training does without it.
    from detr_ray.engine.past_run import open_past_run
    from detr_ray.engine.pictures.of_data import planned_batch
    from detr_ray.engine.run_report.report import PICTURED_IMAGES, PICTURES, REPORT, run_report

    path = job.run.path
    batch = planned_batch(job.data, PictureRequest(images=PICTURED_IMAGES))
    report = run_report(open_past_run(path).with_status("FINISHED"), job.data.val, batch.figure)
    for name, content in report.pictures.items():
        write_bytes(join(path, PICTURES, name), content)
        tracker.log_file(join(path, PICTURES, name), PICTURES)
    location = join(path, REPORT)
    write_bytes(location, report.html.encode())
    tracker.log_file(location, "")
    return location
