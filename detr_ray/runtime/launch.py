"""Launches jobs, for commands, searches and programs.

`fit` prepares a training run and runs it. A program that wants to stop the run, or to get its evaluations, does the
same in two steps: `prepare_job`, which refuses bad input in seconds, and `run_job`, which takes hooks. Both work in any
thread, in a notebook, and in an actor of Ray, and use a running Ray. With ``train.launcher=local`` the same loop runs
in this process, without Ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from detr_ray.callbacks import Say
from detr_ray.config import Config, ConfigError
from detr_ray.engine.context import LocalContext, local_device
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.hooks import Budget, JobHooks
from detr_ray.engine.job import TrainJob, prepare_job, run_summary
from detr_ray.engine.reporting.progress import FitResult
from detr_ray.engine.run_report.at_end import say_how_to_report
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.runtime.cluster_address import needs_no_ray
from detr_ray.runtime.cluster_check import preflight_nodes
from detr_ray.runtime.host_process import StoppedBeforeWork, host_process_as_before, stop_signals
from detr_ray.runtime.session import session_of
from detr_ray.runtime.workers import Workers

if TYPE_CHECKING:
    # Only workers need the model, the loss and the loop: torchvision alone takes a second to import.
    from detr_ray.engine.validation.evaluation_job import EvaluationJob, EvaluationResult


@host_process_as_before()
def fit(
    config: Config, say: Say = lambda line: None, hooks_of: Callable[[TrainJob], JobHooks] = lambda job: JobHooks()
) -> FitResult:
    """Starts or resumes the training of a configuration; with ``tracking.register``, registers the best model.

    The process that calls it is afterwards as it was before; see `host_process_as_before`.

    Args:
        config: the whole configuration.
        say: shows the user a line of progress.
        hooks_of: returns the hooks for the prepared job.

    Returns:
        How the run ended.

    Raises:
        ConfigError: the configuration does not fit the data, the machine or an earlier run of that name.
        DataError: the data is not usable.
        RunFailed: the run began and cannot go on.
    """
    job = prepare_job(config, say)
    result = run_job(job, hooks_of(job), say)
    if config.tracking.register and result.status != "stopped":
        from detr_ray.runtime.registration import register_or_warn

        register_or_warn(job.config, result.run_path, say)
    return result


@host_process_as_before()
def run_job(job: TrainJob, hooks: JobHooks = JobHooks(), say: Say = lambda line: None) -> FitResult:  # noqa: B008
    """Runs a prepared job to its end, or until it is to stop.

    The process that calls it is afterwards as it was before; see `host_process_as_before`.

    Args:
        job: what `prepare_job` gave.
        hooks: the hooks of the calling program.
        say: shows the user a line of progress.

    Returns:
        How the run ended.

    Raises:
        ConfigError: the machine, the cluster or the budget has no room for the workers; another process trains the run.
        RunFailed: the run began and cannot go on.
        KeyboardInterrupt: a signal stopped it before a worker had begun.
    """
    with Runs(hooks.budget, say) as runs:
        return runs.run(job, hooks, last=True)


class Runs:
    """Runs jobs one after another. Workers are started once, and kept for the next job if they fit it.

    To be used inside `host_process_as_before`. At the end, everything that was started is ended.

    Args:
        budget: largest resources that a run may take of the cluster.
        say: shows the user a line of progress.
        says_how_to_resume: whether it says how to continue each run by its name. Programs that do this for several runs
            at once set it to False.
    """

    def __init__(self, budget: Budget, say: Say, *, says_how_to_resume: bool = True) -> None:
        self._budget = budget
        self._say = say
        self._says_how_to_resume = says_how_to_resume
        self._session = contextlib.ExitStack()
        self._workers: Workers | None = None

    def _keep_config(self, job: TrainJob) -> None:
        """Writes what a run goes on with; nothing is decided by that file, so a run goes on without it."""
        try:
            job.run.keep_config(job.config.to_yaml())
        except ConfigError as error:
            self._say(f"WARNING: the run's folder keeps the configuration of its start before: {error}")

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *error: object) -> None:
        self._end_workers()
        self._session.close()

    def run(self, job: TrainJob, hooks: JobHooks, *, last: bool = False) -> FitResult:
        """Runs a prepared job to its end, or until it is to stop; see `run_job`.

        Args:
            job: what `prepare_job` gave.
            hooks: what the job asks and tells. Its budget is that of `Runs`.
            last: whether the workers end after the job.
        """
        job = dataclasses.replace(
            job, parent_run=hooks.parent_run, gets_report=hooks.gets_report, hold_evaluated=hooks.hold_evaluated
        )
        self._say(run_summary(job))
        if self._says_how_to_resume:
            self._say(f"to go on with it after an interruption: the same command with run.name={job.run.name}")
        try:
            with job.run.locked(self._say) as is_lost:
                if not job.run.is_new:
                    self._keep_config(job)
                result = self._run_locked(job, _abandoned_if(is_lost, hooks), last=last)
                if result.leave is not None and is_lost():
                    raise RunFailed(
                        f"run.name: another process goes on with {job.run.path}, since this one had stood still; this "
                        "one has given the run up, without a checkpoint",
                        agreed=True,
                    )
        except StoppedBeforeWork:
            latest = job.run.checkpoints.latest()
            result = FitResult(job.run.name, job.run.path, "stopped", 0 if latest is None else latest.step)
        except KeyboardInterrupt:
            if self._says_how_to_resume:
                self._say(f"stopped; the same command with run.name={job.run.name} goes on from the last checkpoint")
            raise
        except RunFailed:
            say_how_to_report(job, self._say)
            raise
        if result.status == "stopped":
            say_how_to_report(job, self._say)
        return result

    def _run_locked(self, job: TrainJob, hooks: JobHooks, *, last: bool) -> FitResult:
        if job.config.train.launcher == "local":
            return _fit_here(job, hooks, self._budget, self._say)
        result: FitResult = self._workers_for(job).run(job, hooks, last=last)
        return result

    def _workers_for(self, job: TrainJob) -> Workers:
        if self._workers is None or not self._workers.fit(job):
            self._end_workers()
            self._session.enter_context(session_of(job.config, self._budget))
            preflight_nodes(job.config, job.run.path, self._say)
            self._workers = Workers(job, self._budget, self._say)
        return self._workers

    def _end_workers(self) -> None:
        if self._workers is not None:
            self._workers.end()
            self._workers = None


def _abandoned_if(is_lost: Callable[[], bool], hooks: JobHooks) -> JobHooks:
    """The hooks of a run that is also given up once another process has taken it over, which writes it from then on."""
    return dataclasses.replace(hooks, should_abandon=lambda: is_lost() or hooks.should_abandon())


@host_process_as_before()
def evaluate(config: Config, say: Say = lambda line: None) -> EvaluationResult:
    """Evaluates a checkpoint (``eval.checkpoint``) on the validation set.

    The process that calls it is afterwards as it was before; see `host_process_as_before`. Few images need no Ray; see
    `needs_no_ray`.

    Raises:
        ConfigError: there is no such checkpoint, or it does not fit the data.
        DataError: the data is not usable.
        RunFailed: the evaluation began and cannot be finished.
    """
    from detr_ray.engine.validation.evaluation_job import prepare_evaluation

    return run_prepared_evaluation(prepare_evaluation(config, say), say)


def run_prepared_evaluation(
    job: EvaluationJob, say: Say, on_images: Callable[[int], None] = lambda images: None
) -> EvaluationResult:
    """Does what `prepare_evaluation` prepared; see `evaluate`.

    Args:
        job: what it gave.
        say: shows the user a line.
        on_images: told about twice a second, or after each batch, for how many images the model has been asked.
    """
    from detr_ray.engine.validation.evaluation_job import run_evaluation

    config = job.data.config
    images_after = list(itertools.accumulate(map(len, job.data.plan(1, 0).evaluation), initial=0))

    def on_batches(batches: int) -> None:
        on_images(images_after[min(batches, len(images_after) - 1)])

    if needs_no_ray(config, job.num_images):
        batches = LocalBatches(job.data.plan(1, 0), *job.data.loaders(), config.data.prefetch_batches)
        context = LocalContext(_local_device(config, Budget()), say=say, on_step=on_batches)
        result = run_evaluation(job, context, batches)
        assert result is not None, "one worker is rank 0"
        return result
    with session_of(config), _workers(job, say) as workers:
        evaluated: EvaluationResult = workers.run(job, JobHooks(on_step=on_batches), last=True)
        return evaluated


@contextlib.contextmanager
def _workers(job: EvaluationJob, say: Say) -> Iterator[Workers]:
    workers = Workers(job, Budget(), say)
    try:
        yield workers
    finally:
        workers.end()


def _fit_here(job: TrainJob, hooks: JobHooks, budget: Budget, say: Say) -> FitResult:
    """Runs the loop in this process."""
    from detr_ray.engine.recorded_training import run_training

    batches = LocalBatches(job.data.plan(1, 0), *job.data.loaders(), job.config.data.prefetch_batches)
    with stop_signals(hooks.should_stop) as signals:
        device = _local_device(job.config, budget)
        context = LocalContext(device, say, signals.asked, hooks.on_evaluation, hooks.should_abandon, hooks.on_step)
        return run_training(job, context, batches)


def _local_device(config: Config, budget: Budget) -> str:
    threads = budget.threads or budget.cpus
    if threads is not None:
        torch.set_num_threads(max(1, min(threads, torch.get_num_threads())))
    use_gpu = config.train.use_gpu
    return local_device(False if use_gpu is None and budget.gpus == 0 else use_gpu)
