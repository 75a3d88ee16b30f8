"""Launching a job: the one place where workers are started.

`fit` prepares a training run and runs it. A program that wants to stop the run, or to be told of its evaluations, does
the same in two steps: `prepare_job`, which refuses bad input in seconds, and `run_job`, which takes hooks. Both work in
any thread, in a notebook, in an actor of Ray, and use the Ray that is there. With ``train.launcher=local`` the same
loop runs in this process, without Ray.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig

from detr_ray.config import Config, ConfigError
from detr_ray.engine.context import LocalContext
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.hooks import Budget, JobHooks
from detr_ray.engine.job import Say, TrainJob, prepare_job, run_summary
from detr_ray.engine.reporting.progress import FitResult
from detr_ray.engine.reporting.records import open_tracker
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.runtime.cluster_check import preflight_nodes
from detr_ray.runtime.host_process import StoppedBeforeWork, StopSignals, host_process_as_before, stop_signals
from detr_ray.runtime.ray_internals import refuse_other_ray, start_data_actors
from detr_ray.runtime.resources import WorkerRequest, plan_workers
from detr_ray.runtime.session import TRAIN_ENVIRONMENT, cluster_address, is_own_ray, session_of
from detr_ray.runtime.supervision import StatusKeeper, Supervisor
from detr_ray.runtime.trainer import Attempt, ControllerLost, StatusCallback, Trainer, describe_failure, threads_given
from detr_ray.tracking import Status

if TYPE_CHECKING:
    # Only workers need the model, the loss and the loop: torchvision alone takes a second to import.
    from detr_ray.engine.validation.evaluation_job import EvaluationJob, EvaluationResult

# Workers that wait for one that hangs give up only after the watch has named and ended that one.
COLLECTIVES_WAIT_LONGER_S = 120

# Ray Train's elastic policy chooses a number of workers from a view of the cluster that lags behind by some seconds.
# After this time it chooses again; a fixed number has nothing to choose.
ELASTIC_START_S = 15


@host_process_as_before()
def fit(config: Config, say: Say = lambda line: None) -> FitResult:
    """Trains what a configuration describes, or goes on with it.

    The process that calls it is afterwards as it was before; see `host_process_as_before`.

    Args:
        config: the whole configuration.
        say: shows the user a line of progress.

    Returns:
        How the run ended.

    Raises:
        ConfigError: the configuration fits neither the data, the machine nor an earlier run of that name.
        DataError: the data is not usable.
        RunFailed: the run began and cannot go on.
    """
    return run_job(prepare_job(config, say), say=say)


@host_process_as_before()
def run_job(job: TrainJob, hooks: JobHooks = JobHooks(), say: Say = lambda line: None) -> FitResult:  # noqa: B008
    """Runs a prepared job to its end, or until it is to stop.

    The process that calls it is afterwards as it was before; see `host_process_as_before`.

    Args:
        job: what `prepare_job` gave.
        hooks: what the job asks and tells the program that calls this.
        say: shows the user a line of progress.

    Returns:
        How the run ended.

    Raises:
        ConfigError: the machine, the cluster or the budget has no room for the workers; another process trains the run.
        RunFailed: the run began and cannot go on.
        KeyboardInterrupt: a signal stopped it before a worker had begun.
    """
    config = job.config
    job = dataclasses.replace(job, parent_run=hooks.parent_run)
    say(run_summary(job))
    say(f"to go on with it after an interruption: the same command with run.name={job.run.name}")
    try:
        with job.run.locked(say):
            if config.train.launcher == "local":
                return _fit_here(job, hooks, say)
            with session_of(config, hooks.budget):
                preflight_nodes(config, job.run.path, say)
                return _run_workers(job, job.run.path, job.run.path, hooks, say)
    except StoppedBeforeWork:
        latest = job.run.checkpoints.latest()
        return FitResult(job.run.name, job.run.path, "stopped", 0 if latest is None else latest.step)
    except KeyboardInterrupt:
        say(f"stopped; the same command with run.name={job.run.name} goes on from the last checkpoint")
        raise


@host_process_as_before()
def evaluate(config: Config, say: Say = lambda line: None) -> EvaluationResult:
    """Evaluates a checkpoint (``eval.checkpoint``) on the validation set.

    The process that calls it is afterwards as it was before; see `host_process_as_before`.

    Raises:
        ConfigError: there is no such checkpoint, or it does not fit the data.
        DataError: the data is not usable.
        RunFailed: the evaluation began and cannot be finished.
    """
    from detr_ray.engine.validation.evaluation_job import prepare_evaluation

    return run_prepared_evaluation(prepare_evaluation(config, say), say)


def run_prepared_evaluation(job: EvaluationJob, say: Say) -> EvaluationResult:
    """Does what `prepare_evaluation` prepared; see `evaluate`."""
    from detr_ray.engine.validation.evaluation_job import run_evaluation

    config = job.data.config
    if config.train.launcher == "local":
        batches = LocalBatches(job.data.plan(1, 0), *job.data.loaders())
        result = run_evaluation(job, LocalContext(_local_device(config, Budget()), say=say), batches)
        assert result is not None, "one worker is rank 0"
        return result
    with session_of(config):
        return _run_workers(job, job.storage, None, JobHooks(), say)


def _fit_here(job: TrainJob, hooks: JobHooks, say: Say) -> FitResult:
    """The loop in this process."""
    from detr_ray.engine.loop import TrainingLoop

    batches = LocalBatches(job.data.plan(1, 0), *job.data.loaders())
    tracker = open_tracker(job)
    status: Status = "FAILED"
    try:
        with stop_signals(hooks.should_stop) as signals:
            device = _local_device(job.config, hooks.budget)
            context = LocalContext(device, say, signals.asked, hooks.on_evaluation)
            result = TrainingLoop(job, context, batches, tracker).run()
        status = "KILLED" if result.status == "stopped" else "FINISHED"
        return result
    finally:
        tracker.finish(status)


def _local_device(config: Config, budget: Budget) -> str:
    if budget.cpus is not None:
        torch.set_num_threads(max(1, min(budget.cpus, torch.get_num_threads())))
    there = torch.cuda.is_available() and budget.gpus != 0
    use_gpu = there if config.train.use_gpu is None else config.train.use_gpu
    if use_gpu and not torch.cuda.is_available():
        raise ConfigError("train.use_gpu: true, but torch finds no GPU on this machine")
    return "cuda" if use_gpu else "cpu"


def _run_workers(job: TrainJob | EvaluationJob, path: str, run_path: str | None, hooks: JobHooks, say: Say) -> Any:
    """Has training workers do a job, and gives back what rank 0 returned.

    Args:
        job: what to do.
        path: folder or URI for what Ray Train keeps.
        run_path: the run that the job writes; None if it writes none.
        hooks: what the job asks and tells the program that runs it.
        say: shows the user a line.
    """
    refuse_other_ray()
    request = plan_workers(job.data.config, hooks.budget)
    status = StatusKeeper(run_path, say)
    try:
        with stop_signals(hooks.should_stop) as signals:
            supervisor = Supervisor(status, job.data.config.train, request.missing, signals, hooks.on_evaluation, say)
            return _run_attempts(_Trainers(job, path, request, status), supervisor, signals, say)
    finally:
        status.end()


def _run_attempts(trainers: _Trainers, supervisor: Supervisor, signals: StopSignals, say: Say) -> Any:
    """Starts trainers until one gives a result that ends the job."""
    for number in itertools.count(1):
        say(f"starting {_described(trainers.request)}")
        attempt = Attempt(trainers.make(number, supervisor.failures_left))
        try:
            lost = supervisor.watch(attempt, number)
        except BaseException:
            attempt.abort()
            raise
        result = None
        if lost is None:
            try:
                result = _result_of(attempt, supervisor)
            except ControllerLost:
                attempt.end([])  # the places of its workers, which it would hold for ever
                lost = "the controller died"
        if isinstance(result, FitResult) and result.leave in ("asked", "resized") and not signals.asked():
            lost = f"the workers could not reach this process, and stopped after step {result.step}"
        if lost is not None:
            if signals.asked():
                say(f"{lost}; it was to stop anyway")
                signals.interrupt()
            if not supervisor.count_failure(lost):
                limit = supervisor.max_failures
                raise RunFailed(f"{lost}, and no restart is left (train.max_failures={limit})")
        elif isinstance(result, FitResult) and result.leave == "preempted":
            say(f"a node is taken away; going on from step {result.step} without it")
        else:
            return result
    raise AssertionError("there is always another number")


def _result_of(attempt: Attempt, supervisor: Supervisor) -> Any:
    """What rank 0 returned.

    Raises:
        RunFailed: the workers agreed that the job cannot go on, or failed too often.
        ControllerLost: the controller's process died.
    """
    try:
        outcome = attempt.result()
    except (ray.train.WorkerGroupError, ray.train.ControllerError) as error:
        lines = ["the workers failed, and train.max_failures restarts did not help:", describe_failure(error)]
        raise RunFailed("\n".join([*lines, *supervisor.stalls])) from error
    if "failed" in outcome:
        raise RunFailed(outcome["failed"])
    return outcome["result"]


class _Trainers:
    """Makes the trainers of a job, one for each attempt.

    Args:
        job: what the workers do.
        path: folder or URI for what Ray Train keeps.
        request: the workers.
        status: keeps the job's status.
    """

    def __init__(self, job: TrainJob | EvaluationJob, path: str, request: WorkerRequest, status: StatusKeeper) -> None:
        self.request = request
        self._config = job.data.config
        self._path = path
        self._status = status.actor
        start_data_actors()  # which the workers would start, and wait for, later on
        bare = dataclasses.replace(job, data=None, initial_weights=None)  # type: ignore[arg-type]
        self._parts = {
            "job": [ray.put(bare)],
            "data": [ray.put(job.data)],
            "weights": [] if job.initial_weights is None else [ray.put(job.initial_weights)],
            "status": self._status,
            "threads": threads_given(),
            "tasks": request.tasks_per_worker,
        }
        self._environment = dict(TRAIN_ENVIRONMENT)
        if request.min_workers < request.max_workers:
            self._environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(ELASTIC_START_S)

    def make(self, number: int, failures: int) -> Trainer:
        """The trainer of one attempt.

        Args:
            number: of the attempt, from 1.
            failures: times that it may start the workers again; -1 for any number.
        """
        train = self._config.train
        # Numbers of the host are summed on the host: a GPU would have to be waited for otherwise, each step.
        backend = "cpu:gloo,cuda:nccl" if self.request.use_gpu else "gloo"
        return Trainer(
            _run_worker,
            environment=self._environment,
            own_ray=is_own_ray(),
            keep_state=cluster_address() is not None and "RAY_TRAIN_ENABLE_STATE_TRACKING" not in os.environ,
            train_loop_config=self._parts | {"attempt": number},
            torch_config=TorchConfig(backend, timeout_s=train.stall_timeout_s + COLLECTIVES_WAIT_LONGER_S),
            scaling_config=self.request.scaling_config(train.resize_check_s),
            run_config=ray.train.RunConfig(
                name="ray",
                storage_path=self._path,
                failure_config=ray.train.FailureConfig(max_failures=failures),
                callbacks=[StatusCallback(self._status, number)],
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        )


def _run_worker(parts: dict[str, Any]) -> dict[str, Any]:
    """Runs on the workers, which import what the driver need not."""
    from detr_ray.runtime.worker import run_worker

    return run_worker(parts)


def _described(request: WorkerRequest) -> str:
    kind = "GPU" if request.use_gpu else "CPU"
    if request.min_workers == request.max_workers:
        return f"{request.max_workers} {kind} worker{'s' if request.max_workers > 1 else ''}"
    return f"{request.min_workers} to {request.max_workers} {kind} workers, as many as have room"
