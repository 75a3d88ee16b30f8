"""Launching a job: the one place where workers are started.

`fit` is what the commands, the searches and the tests call. With ``train.launcher=local`` it runs the same loop in this
process, without Ray.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.data._internal.stats import get_or_create_stats_actor
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from detr_ray.config import Config, ConfigError
from detr_ray.engine.batches import LocalBatches
from detr_ray.engine.context import LocalContext
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.job import Say, TrainJob, prepare_job, run_summary
from detr_ray.engine.records import open_tracker
from detr_ray.engine.result import FitResult
from detr_ray.runtime.board import open_board
from detr_ray.runtime.cluster_check import preflight_nodes
from detr_ray.runtime.controller_callback import BoardCallback, describe_failure
from detr_ray.runtime.ray_address import cluster_address
from detr_ray.runtime.resources import WorkerRequest, plan_workers, usable_nodes
from detr_ray.runtime.session import session_of
from detr_ray.runtime.supervision import StopSignals, Supervisor, run_in_thread, stop_signals
from detr_ray.tracking import Status

if TYPE_CHECKING:
    # Only workers need the model, the loss and the loop: torchvision alone takes a second to import.
    from detr_ray.engine.evaluation_job import EvaluationJob, EvaluationResult

# Workers that wait for one that hangs give up only after the watch has named and ended that one.
COLLECTIVES_WAIT_LONGER_S = 120

EARLIER_JOB_ENDS_S = 20.0

# Ray Train's elastic policy chooses a number of workers from a view of the cluster that lags behind by some seconds.
# After this time it chooses again; a fixed number has nothing to choose.
ELASTIC_START_S = 15


def fit(config: Config, say: Say = lambda line: None) -> FitResult:
    """Trains what a configuration describes, or goes on with it.

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
    job = prepare_job(config, say)
    say(run_summary(job))
    say(f"to go on with it after an interruption: the same command with run.name={job.run.name}")
    try:
        with job.run.locked(say):
            if config.train.launcher == "local":
                return _fit_here(job, say)
            with session_of(config):
                preflight_nodes(config, job.run.path, say)
                return _run_workers(job, job.run.path, job.run.path, say)
    except KeyboardInterrupt:
        say(f"stopped; the same command with run.name={job.run.name} goes on from the last checkpoint")
        raise


def evaluate(config: Config, say: Say = lambda line: None) -> EvaluationResult:
    """Evaluates a checkpoint (``eval.checkpoint``) on the validation set.

    Raises:
        ConfigError: there is no such checkpoint, or it does not fit the data.
        DataError: the data is not usable.
        RunFailed: the evaluation began and cannot be finished.
    """
    from detr_ray.engine.evaluation_job import prepare_evaluation

    return run_prepared_evaluation(prepare_evaluation(config, say), say)


def run_prepared_evaluation(job: EvaluationJob, say: Say) -> EvaluationResult:
    """Does what `prepare_evaluation` prepared; see `evaluate`."""
    from detr_ray.engine.evaluation_job import run_evaluation

    config = job.data.config
    if config.train.launcher == "local":
        batches = LocalBatches(job.data.plan(1, 0), *job.data.loaders())
        result = run_evaluation(job, LocalContext(_local_device(config), say=say), batches)
        assert result is not None, "one worker is rank 0"
        return result
    with session_of(config):
        return _run_workers(job, job.storage, None, say)


def _fit_here(job: TrainJob, say: Say) -> FitResult:
    """The loop in this process."""
    from detr_ray.engine.loop import TrainingLoop

    batches = LocalBatches(job.data.plan(1, 0), *job.data.loaders())
    tracker = open_tracker(job)
    status: Status = "FAILED"
    try:
        with stop_signals() as signals:
            context = LocalContext(_local_device(job.config), say=say, should_stop=signals.asked)
            result = TrainingLoop(job, context, batches, tracker).run()
        status = "KILLED" if result.status == "stopped" else "FINISHED"
        return result
    finally:
        tracker.finish(status)


def _local_device(config: Config) -> str:
    use_gpu = torch.cuda.is_available() if config.train.use_gpu is None else config.train.use_gpu
    if use_gpu and not torch.cuda.is_available():
        raise ConfigError("train.use_gpu: true, but torch finds no GPU on this machine")
    return "cuda" if use_gpu else "cpu"


def _run_workers(job: TrainJob | EvaluationJob, path: str, run_path: str | None, say: Say) -> Any:
    """Has training workers do a job, and gives back what rank 0 returned.

    Args:
        job: what to do.
        path: folder or URI for what Ray Train keeps.
        run_path: the run that the job writes; None if it writes none.
        say: shows the user a line.
    """
    config = job.data.config
    request = plan_workers(config)
    board = _open_board(run_path)
    # Two actors of Ray's that it would start, and wait for, later on. They outlive the job, on the node of who asks for
    # them first: on a training node they would keep the autoscaler from ever taking that node away.
    get_or_create_stats_actor()
    get_or_create_autoscaling_coordinator()
    trainer_class = _TrainerOnOneMachine if len(usable_nodes()) == 1 else TorchTrainer
    bare = dataclasses.replace(job, data=None, initial_weights=None)  # type: ignore[arg-type]
    parts = {
        "job": [ray.put(bare)],
        "data": [ray.put(job.data)],
        "weights": [] if job.initial_weights is None else [ray.put(job.initial_weights)],
        "board": board,
        "threads": _threads_given(),
    }
    if request.min_workers < request.max_workers:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(ELASTIC_START_S))
    supervisor = Supervisor(board, config.train, request.missing, say)
    # Numbers of the host are summed on the host: a GPU would have to be waited for otherwise, each step.
    backend = "cpu:gloo,cuda:nccl" if request.use_gpu else "gloo"
    with stop_signals() as signals:
        while True:
            say(f"starting {_described(request)}")
            trainer = trainer_class(
                _run_worker,
                train_loop_config=parts,
                torch_config=TorchConfig(backend, timeout_s=config.train.stall_timeout_s + COLLECTIVES_WAIT_LONGER_S),
                scaling_config=request.scaling_config(config.train.resize_check_s),
                run_config=ray.train.RunConfig(
                    name="ray",
                    storage_path=path,
                    failure_config=ray.train.FailureConfig(max_failures=config.train.max_failures),
                    callbacks=[BoardCallback(board)],
                    logging_config=ray.train.LoggingConfig(log_level="ERROR"),
                ),
            )
            outcome = _watched(trainer, supervisor, signals)
            if "failed" in outcome:
                raise RunFailed(outcome["failed"])
            result = outcome["result"]
            if not isinstance(result, FitResult) or result.leave != "preempted":
                return result
            say(f"a node is taken away; going on from step {result.step} without it")
            ray.get(board.forget_workers.remote())


def _threads_given() -> int | None:
    """Torch threads that the user allows on this machine; in jobs on a cluster Ray sets the variable by itself."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and cluster_address() is None else None


def _run_worker(parts: dict[str, Any]) -> dict[str, Any]:
    """Runs on the workers, which import what the driver need not."""
    from detr_ray.runtime.worker import run_worker

    return run_worker(parts)


class _TrainerOnOneMachine(TorchTrainer):  # type: ignore[misc]
    """Without what costs a process each and has nothing to do here.

    No data set goes through Ray Train, and there is nobody to give workers' places back to when the driver has ended.
    """

    def _create_default_callbacks(self) -> list[Any]:
        idle = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, idle)]


def _watched(trainer: TorchTrainer, supervisor: Supervisor, signals: StopSignals) -> dict[str, Any]:
    """Runs a trainer under the driver's watch."""
    thread, results, errors = run_in_thread(lambda: trainer.fit().return_value)
    try:
        supervisor.watch(thread, signals)
    except BaseException:
        supervisor.abort(thread)
        raise
    if not errors:
        return results[0]
    if isinstance(errors[0], ray.train.WorkerGroupError | ray.train.ControllerError):
        lines = ["the workers failed, and train.max_failures restarts did not help:", describe_failure(errors[0])]
        raise RunFailed("\n".join([*lines, *supervisor.stalls])) from errors[0]
    raise errors[0]


def _open_board(run_path: str | None) -> ActorHandle:
    """The job's board; waits a little for that of an earlier job of the run, which has just ended."""
    give_up = time.monotonic() + EARLIER_JOB_ENDS_S
    while True:
        try:
            return open_board(run_path)
        except ValueError:
            if time.monotonic() > give_up:
                raise ConfigError(
                    f"run.name: another job on this cluster is writing {run_path}; wait for it, stop it, or choose "
                    "another run.name"
                ) from None
            time.sleep(1)


def _described(request: WorkerRequest) -> str:
    kind = "GPU" if request.use_gpu else "CPU"
    if request.min_workers == request.max_workers:
        return f"{request.max_workers} {kind} worker{'s' if request.max_workers > 1 else ''}"
    return f"{request.min_workers} to {request.max_workers} {kind} workers, as many as have room"
