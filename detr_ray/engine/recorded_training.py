"""A training from start to end: the loop, its records, and its report."""

from __future__ import annotations

from detr_ray.engine.context import WorkerContext
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.job import TrainJob
from detr_ray.engine.loop import TrainingLoop
from detr_ray.engine.reporting.progress import FitResult
from detr_ray.engine.reporting.records import FAILURE_TAG, open_tracker
from detr_ray.engine.run_report.at_end import report_at_end
from detr_ray.engine.stream.batches import BatchSource
from detr_ray.tracking import NullTracker, Status, Tracker


def run_training(job: TrainJob, context: WorkerContext, batches: BatchSource) -> FitResult:
    """Runs a worker's loop; rank 0 keeps the run's records, and writes the report at the end.

    Args:
        job: the run.
        context: the worker's.
        batches: what the worker trains on.

    Returns:
        How the run ended.

    Raises:
        RunFailed: the run cannot go on.
    """
    tracker: Tracker = open_tracker(job) if context.rank == 0 else NullTracker()
    status: Status = "FAILED"
    try:
        result = TrainingLoop(job, context, batches, tracker).run()
        if context.rank == 0:
            report_at_end(job, result, tracker, context.say)
        status = "KILLED" if result.status == "stopped" else "FINISHED"
        return result
    except BaseException as error:
        reason = str(error) if isinstance(error, RunFailed) else f"{type(error).__name__}: {error}"
        tracker.set_tags({FAILURE_TAG: reason})
        raise
    finally:
        tracker.finish(status)
