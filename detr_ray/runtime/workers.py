"""Training workers: started by Ray Train, supervised, and restarted after failures.

The same workers can do one job after another: starting them takes 10 to 20 seconds, and the next trial of a search
needs the same kind of workers.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train.torch import TorchConfig

from detr_ray.callbacks import Say
from detr_ray.config import Config
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.hooks import Budget, JobHooks
from detr_ray.engine.job import TrainJob
from detr_ray.engine.reporting.progress import FitResult
from detr_ray.engine.stream.planned_data import PlannedData
from detr_ray.printable import counted
from detr_ray.runtime.cluster_address import cluster_address
from detr_ray.runtime.host_process import StopSignals, stop_signals
from detr_ray.runtime.job_status import Task
from detr_ray.runtime.ray_internals import refuse_other_ray, start_data_actors
from detr_ray.runtime.resources import WorkerRequest, plan_workers
from detr_ray.runtime.session import TRAIN_ENVIRONMENT, is_own_ray
from detr_ray.runtime.supervision import StatusKeeper, Supervisor
from detr_ray.runtime.trainer import Attempt, ControllerLost, StatusCallback, Trainer, describe_failure, threads_given

if TYPE_CHECKING:  # see `launch`
    from detr_ray.engine.validation.evaluation_job import EvaluationJob

# Longer than the supervision needs: workers that wait for a hanging one must not give up before it is found and ended.
COLLECTIVES_WAIT_LONGER_S = 120

# Ray Train's elastic policy chooses the number of workers from a state of the cluster that is some seconds old. After
# this time it chooses again; not needed for a fixed number.
ELASTIC_START_S = 15


class Workers:
    """The workers of a job, and of later jobs.

    Args:
        job: the first job. Its name is reserved in the cluster, so that a second job of the same run is refused.
        budget: largest resources of the workers and their data tasks.
        say: shows the user a line.

    Raises:
        ConfigError: there is no room for the workers, or another job on this cluster writes the run.
    """

    def __init__(self, job: TrainJob | EvaluationJob, budget: Budget, say: Say) -> None:
        refuse_other_ray()
        config = job.data.config
        self._say = say
        self._shape = _shape(config)
        request = plan_workers(config, budget, trains=isinstance(job, TrainJob))
        run_path, path = (job.run.path, job.run.path) if isinstance(job, TrainJob) else (None, job.storage)
        self._status = StatusKeeper(run_path, say)
        self._supervisor = Supervisor(self._status, config.train, request.missing, say)
        start_data_actors()  # otherwise the workers would start them and wait
        self._trainers = _Trainers(config, path, request, self._status, budget.threads or threads_given())
        self._data: tuple[PlannedData, ray.ObjectRef] | None = None
        self._attempt: Attempt | None = None
        self._attempts = 0
        self._tasks = 0

    def fit(self, job: TrainJob) -> bool:
        """Whether these workers can do a job: whether it needs the same number and kind of workers."""
        return _shape(job.config) == self._shape

    def run(self, job: TrainJob | EvaluationJob, hooks: JobHooks, *, last: bool) -> Any:
        """Lets the workers do a job, and returns rank 0's result.

        Args:
            job: what to do.
            hooks: what it asks and tells the program that runs it.
            last: whether the workers end after it. Otherwise they wait for another job.

        Raises:
            RunFailed: it began and cannot go on.
        """
        task = self._task(job, last)
        with stop_signals(hooks.should_stop) as signals:
            self._supervisor.begin(task, signals, hooks)
            return self._until_it_ends(task, signals)

    def end(self) -> None:
        """Ends the workers."""
        if self._attempt is not None:
            self._attempt.abort()
            self._attempt = None
        self._status.end()

    def _until_it_ends(self, task: Task, signals: StopSignals) -> Any:
        """Starts trainers until one gives a result that ends the job."""
        while True:
            outcome, lost = self._watched(task)
            result = None
            if lost is None:
                if "failed" in outcome:
                    raise RunFailed(outcome["failed"], agreed=True)
                result = outcome["result"]
            leave, step = (result.leave, result.step) if isinstance(result, FitResult) else (None, 0)
            if leave in ("asked", "resized") and not signals.asked():
                lost = f"the workers could not reach this process, and stopped after step {step}"
            if lost is not None:
                if signals.asked():
                    self._say(f"{lost}; it was to stop anyway")
                    signals.interrupt()
                if not self._supervisor.count_failure(lost):
                    limit = self._supervisor.max_failures
                    raise RunFailed(f"{lost}, and no restart is left (train.max_failures={limit})")
            elif leave == "preempted":
                self._say(f"a node is taken away; going on from step {step} without it")
            else:
                return result

    def _watched(self, task: Task) -> tuple[dict[str, Any], str | None]:
        """The outcome of the running attempt, or of a new one; or why its controller was lost."""
        attempt = self._started(task)
        try:
            lost = self._supervisor.watch(attempt, self._attempts)
        except BaseException:
            self._attempt = None
            attempt.abort()
            raise
        if self._supervisor.outcome is not None:
            content: dict[str, Any] = pickle.loads(self._supervisor.outcome)  # from this job's own worker
            return content, None
        self._attempt = None
        if lost is not None:
            return {}, lost
        try:
            return _result_of(attempt, self._supervisor), None
        except ControllerLost:
            attempt.end([])  # otherwise its placement groups would stay for ever
            return {}, "the controller died"

    def _started(self, task: Task) -> Attempt:
        if self._attempt is not None and self._attempt.wait(0):
            self._attempt = None  # its workers have ended while they had no job
        if self._attempt is None:
            self._say(f"starting {_described(self._trainers.request)}")
            self._attempts += 1
            first = task if task.last else None
            self._attempt = Attempt(self._trainers.make(self._attempts, self._supervisor.failures_left, first))
        return self._attempt

    def _task(self, job: TrainJob | EvaluationJob, last: bool) -> Task:
        self._tasks += 1
        bare = dataclasses.replace(job, data=None, initial_weights=None)  # type: ignore[arg-type]
        weights = [] if job.initial_weights is None else [ray.put(job.initial_weights)]
        return Task(self._tasks, [ray.put((bare, job.data.config))], [self._data_ref(job.data)], weights, last)

    def _data_ref(self, data: PlannedData) -> ray.ObjectRef:
        """The data in the object store: that of the previous job, if it is the same and planned in the same way.

        Data tasks then need not open it again.
        """
        if self._data is None or not data.is_planned_as(self._data[0]):
            self._data = data, ray.put(data)
        return self._data[1]


def _shape(config: Config) -> tuple[Any, ...]:
    """The settings that decide number and kind of a job's workers, and their supervision."""
    train = config.train
    return (
        train.num_workers, train.use_gpu, train.worker_resource, train.max_failures, train.stall_timeout_s,
        train.start_timeout_s, train.resize_check_s, config.data.tasks_per_worker,
    )  # fmt: skip


def _result_of(attempt: Attempt, supervisor: Supervisor) -> dict[str, Any]:
    """The return value of rank 0 in an attempt that has ended.

    Raises:
        RunFailed: the workers failed too often.
        ControllerLost: the controller's process died.
    """
    try:
        outcome: dict[str, Any] = attempt.result()
    except (ray.train.WorkerGroupError, ray.train.ControllerError) as error:
        lines = ["the workers failed, and train.max_failures restarts did not help:", describe_failure(error)]
        raise RunFailed("\n".join([*lines, *supervisor.stalls])) from error
    return outcome


class _Trainers:
    """Creates the trainers, one for each attempt.

    Args:
        config: of their first job.
        path: folder or URI for Ray Train's files.
        request: the workers.
        status: keeps their status.
        threads: threads of torch in each CPU worker; None shares a node's cores among its workers.
    """

    def __init__(
        self, config: Config, path: str, request: WorkerRequest, status: StatusKeeper, threads: int | None
    ) -> None:
        self.request = request
        self._config = config
        self._path = path
        self._status = status.actor
        self._parts = {"status": self._status, "threads": threads, "tasks": request.tasks_per_worker}
        self._environment = dict(TRAIN_ENVIRONMENT)
        if request.min_workers < request.max_workers:
            self._environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(ELASTIC_START_S)

    def make(self, number: int, failures: int, only_task: Task | None) -> Trainer:
        """The trainer of one attempt.

        Args:
            number: of the attempt, from 1.
            failures: how often it may restart the workers; -1 for any number.
            only_task: the only job of the workers; None: they ask for jobs.
        """
        train = self._config.train
        # Gloo for sums of host tensors: with NCCL, each step would have to wait for the GPU.
        backend = "cpu:gloo,cuda:nccl" if self.request.use_gpu else "gloo"
        return Trainer(
            _run_worker,
            environment=self._environment,
            own_ray=is_own_ray(),
            keep_state=cluster_address() is not None and "RAY_TRAIN_ENABLE_STATE_TRACKING" not in os.environ,
            train_loop_config=self._parts | {"attempt": number, "only_task": only_task},
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
    """Runs on the workers; imports modules that the driver does not need."""
    from detr_ray.runtime.worker import run_worker

    return run_worker(parts)


def _described(request: WorkerRequest) -> str:
    kind = "GPU" if request.use_gpu else "CPU"
    if request.min_workers == request.max_workers:
        return counted(request.max_workers, f"{kind} worker")
    return f"{request.min_workers} to {request.max_workers} {kind} workers, as many as have room"
