"""Launching a job: the one place where workers are started.

`fit` is what the commands, the searches and the tests call. With ``train.launcher=local`` it runs the same loop in this
process, without Ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Empty, Queue

from detr_ray.config import Config, ConfigError
from detr_ray.engine.batches import LocalBatches
from detr_ray.engine.context import LocalContext
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.evaluation_job import EvaluationJob, EvaluationResult, prepare_evaluation, run_evaluation
from detr_ray.engine.job import Say, TrainJob, prepare_job, run_summary
from detr_ray.engine.loop import FitResult, TrainingLoop
from detr_ray.engine.records import open_tracker
from detr_ray.runtime.session import ray_session, warm_data_workers
from detr_ray.runtime.worker import evaluate_worker, train_worker
from detr_ray.tracking import Status


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
        with job.run.locked():
            if config.train.launcher == "local":
                return _fit_here(job, say)
            with ray_session(config.train.num_workers or 1, config.data.tasks_per_worker, config.train.use_gpu):
                return _run_workers(train_worker, job, job.run.path, config, say)
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
    job = prepare_evaluation(config, say)
    if config.train.launcher == "local":
        batches = LocalBatches(job.data.plan(1, 0), *job.data.loaders())
        result = run_evaluation(job, LocalContext(_local_device(config)), batches)
        assert result is not None, "one worker is rank 0"
        return result
    with ray_session(config.train.num_workers or 1, config.data.tasks_per_worker, config.train.use_gpu):
        return _run_workers(evaluate_worker, job, job.storage, config, say)


def _fit_here(job: TrainJob, say: Say) -> FitResult:
    """The loop in this process."""
    batches = LocalBatches(job.data.plan(1, 0), *job.data.loaders())
    tracker = open_tracker(job)
    status: Status = "FAILED"
    try:
        with _stop_on_signals() as stop_requested:
            context = LocalContext(_local_device(job.config), say=say, should_stop=stop_requested)
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


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or termination into a request to stop after the step."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: types.FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_workers(
    worker: Callable[[dict[str, Any]], dict[str, Any]],
    job: TrainJob | EvaluationJob,
    path: str,
    config: Config,
    say: Say,
) -> Any:
    """Runs a worker function on every training worker and gives back what rank 0 returned."""
    num_workers, use_gpu = _scaling(config)
    say(f"starting {num_workers} {'GPU' if use_gpu else 'CPU'} worker{'s' if num_workers > 1 else ''}")
    warming = warm_data_workers(max(1, min(config.data.tasks_per_worker * num_workers, 8)))
    lines = Queue(maxsize=1000, actor_options={"num_cpus": 0})
    bare = dataclasses.replace(job, data=None, initial_weights=None)  # type: ignore[arg-type]
    trainer = TorchTrainer(
        worker,
        train_loop_config={
            "job": [ray.put(bare)],
            "data": [ray.put(job.data)],
            "weights": [] if job.initial_weights is None else [ray.put(job.initial_weights)],
            "lines": lines,
        },
        torch_config=TorchConfig(timeout_s=config.train.stall_timeout_s),
        scaling_config=ray.train.ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=path,
            failure_config=ray.train.FailureConfig(max_failures=config.train.max_failures),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    with _showing(lines, say):
        try:
            outcome = trainer.fit().return_value
        except (ray.train.WorkerGroupError, ray.train.ControllerError) as error:
            raise RunFailed(_explain(error)) from error
        except SystemExit:
            # Ray Train's own handler ends the process without a word when Ctrl-C is pressed.
            raise KeyboardInterrupt from None
    del warming
    if "failed" in outcome:
        raise RunFailed(outcome["failed"])
    return outcome["result"]


def _scaling(config: Config) -> tuple[int, bool]:
    """Number of workers, and whether they use GPUs, from the configuration and what the cluster has."""
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    use_gpu = gpus > 0 if config.train.use_gpu is None else config.train.use_gpu
    if use_gpu and gpus == 0:
        raise ConfigError("train.use_gpu: true, but the cluster has no GPU (set train.use_gpu=false to train on CPUs)")
    num_workers = config.train.num_workers or (gpus if use_gpu else 1)
    available, unit = (gpus, "GPU") if use_gpu else (int(resources.get("CPU", 0)) - 1, "CPU")
    if num_workers > available:
        raise ConfigError(
            f"train.num_workers: {num_workers} workers need {num_workers} {unit}s"
            + ("" if use_gpu else " and one more for data tasks")
            + f"; the cluster has {available if use_gpu else available + 1}"
        )
    if num_workers > config.train.global_batch_size:
        raise ConfigError(
            f"train.num_workers: {num_workers} workers for train.global_batch_size={config.train.global_batch_size} "
            "leave some without an image; ask for fewer workers or a larger batch"
        )
    return num_workers, use_gpu


@contextlib.contextmanager
def _showing(lines: Queue, say: Say) -> Iterator[None]:
    """Shows the workers' lines as they come."""
    done = threading.Event()

    def show() -> None:
        while True:
            try:
                say(lines.get(timeout=0.5))
            except Empty:
                if done.is_set():
                    return
            except ray.exceptions.RayError as error:
                say(f"progress is not shown any more: {error}")
                return

    thread = threading.Thread(target=show, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)
        lines.shutdown(force=True)


def _explain(error: Exception) -> str:
    """What a failed worker group means to a user: the first worker's own error."""
    failures = getattr(error, "worker_failures", None) or {}
    lines = [f"rank {rank}: {str(failure).strip()}" for rank, failure in sorted(failures.items())]
    return "the workers failed, and train.max_failures restarts did not help:\n" + ("\n".join(lines) or str(error))
