"""A trial: an actor that runs trainings (`detr_ray.runtime.launch`) and passes their evaluations to Ray Tune.

Ray Tune gets numbers, but no checkpoints: a trial is moved to another trial's checkpoint by an order (`control`). Its
workers are kept then, and also for the next trial in the same actor.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.actor import ActorHandle

from detr_ray.addresses import join, local_path
from detr_ray.callbacks import Say
from detr_ray.config import Config, ConfigError
from detr_ray.data.errors import DataError
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.hooks import Budget, Evaluated, JobHooks
from detr_ray.engine.job import TrainJob, prepare_job
from detr_ray.engine.opened_data import OpenedData
from detr_ray.engine.reporting.progress import FitResult
from detr_ray.engine.reporting.tracking_store import recorded_in
from detr_ray.model.state_dicts import WeightsError
from detr_ray.runtime.launch import Runs
from detr_ray.runtime.search.control import Line, Order
from detr_ray.search.space import SearchSpace
from detr_ray.search.trials import run_name
from detr_ray.tracking.reachability import UnreachableError
from detr_ray.tracking.store import STORE_VARIABLE

logger = logging.getLogger(__name__)

REFUSALS = (ConfigError, DataError, WeightsError)
"""What `prepare_job` refuses."""

LOOK_S = 0.2
ENDED_WITHIN_S = 60.0


@dataclasses.dataclass(frozen=True)
class Setup:
    """The settings that all trials of a search share.

    Attributes:
        base: the search's configuration.
        space: its space.
        folder: the search's folder: the storage of its trials' runs.
        metric: name of the metric.
        opened: the data of all trials; None where settings of the data are searched.
        control: see `control`.
        parent_run: id of the search's MLflow run; None where there is none (yet).
        tracking_uri: MLflow store of all records.
        environment_uri: the part of the driver's environment that names a store; None if it does not.
        budget: largest resources of a trial.
        last_round: epoch of the last round of a population; 0 without one.
    """

    base: Config
    space: SearchSpace
    folder: str
    metric: str
    opened: OpenedData | None
    control: ActorHandle
    parent_run: str | None
    tracking_uri: str
    environment_uri: str | None
    budget: Budget
    last_round: int = 0

    def config_of(self, trial: str, generation: int, values: Mapping[str, Any], fork_from: str | None) -> Config:
        """The configuration of a trial's run.

        Args:
            trial: its name.
            generation: how often it was moved.
            values: parameter -> value.
            fork_from: the checkpoint that it was moved to, if it was.
        """
        name = run_name(trial, generation)
        run = {"name": name, "storage": self.folder, "fork_from": fork_from}
        return recorded_in(self.space.trial_config(self.base, values, run), self.tracking_uri)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a trial begins or resumes.

    Attributes:
        trial: its name.
        values: parameter -> value.
        generation: how often it was moved.
        fork_from: the checkpoint that it was moved to last.
        known_step: step of the last evaluation that the driver knows; later evaluations are reported again.
    """

    trial: str
    values: Mapping[str, Any]
    generation: int = 0
    fork_from: str | None = None
    known_step: int = -1

    def to_config(self) -> dict[str, Any]:
        """The start as Tune's configuration of a trial; as text, because Tune would resolve placeholders in values."""
        return {"trial": self.trial, "start": json.dumps(dataclasses.asdict(self))}

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Start:
        """The inverse of `to_config`."""
        return cls(**json.loads(config["start"]))


class TrialActor(tune.Trainable):  # type: ignore[misc]
    """Ray Tune's view of a trial: its results are evaluations."""

    def setup(self, config: dict[str, Any], setup: Setup | None = None) -> None:
        """Notes the trial, which begins with the first step, because Tune may use another actor for it."""
        assert setup is not None, "given by tune.with_parameters"
        _leave_tunes_folder()
        _set_store(setup.environment_uri)
        self._setup = setup
        self._say = _Log(setup.folder)
        self._runs = Runs(setup.budget, self._say, says_how_to_resume=False)
        self._start = Start.of_config(config)
        self._training: Training | None = None

    def step(self) -> dict[str, Any]:
        """The next evaluation."""
        if self._training is None:
            self._training = Training(self._setup, self._start, self._runs, self._say)
        return self._training.next_result()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Sets another trial, which begins with the next step and uses the workers of the previous one.

        Raises:
            RuntimeError: the previous one did not give up its run. Ray Tune then ends this actor with its workers.
        """
        _leave_tunes_folder()
        previous = self._start.trial
        # Workers take a step within this time, or are ended.
        if not self._end_training(within_s := self._setup.base.train.stall_timeout_s + ENDED_WITHIN_S):
            raise RuntimeError(f"{previous}, whose workers it was to get, has not given up its run for {within_s:g} s")
        self._start = Start.of_config(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Tune needs nothing: a trial goes on from the checkpoints of its run."""
        return {}

    def cleanup(self) -> None:
        """Ends the trial, in seconds and without a further checkpoint, and its workers."""
        self._end_training()
        self._runs.__exit__()

    def _end_training(self, within_s: float = ENDED_WITHIN_S) -> bool:
        """Abandons the trial's run, if there is one; returns whether it has ended."""
        ended = self._training is None or self._training.end(within_s)
        self._training = None
        return ended


def _leave_tunes_folder() -> None:
    """Changes back to the working directory to which relative paths of the configuration refer."""
    os.chdir(os.environ["TUNE_ORIG_WORKING_DIR"])


def _set_store(uri: str | None) -> None:
    """Sets what the environment says about the MLflow store: on the driver's machine it may say something else."""
    if uri is None:
        os.environ.pop(STORE_VARIABLE, None)
    else:
        os.environ[STORE_VARIABLE] = uri


class _Log:
    """Writes the lines of a trial into a file of the search, and shows warnings to the user."""

    def __init__(self, folder: str) -> None:
        self._folder = local_path(folder)
        self._lock = threading.Lock()
        self.trial = ""
        self.warn: Say = lambda line: None

    def __call__(self, line: str) -> None:
        if line.startswith("WARNING"):
            self.warn(line)
        if self._folder is None:
            logger.info("%s: %s", self.trial, line)
            return
        try:
            with self._lock, Path(self._folder, "logs", f"{self.trial}.log").open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%H:%M:%S')} {line}\n")
        except OSError as error:  # a full disk: the trial trains on without its log
            logger.warning("%s: %s (not in its log: %s)", self.trial, line, error)


class Training:
    """The runs of a trial, one after another, in a thread; its results are put into a queue.

    Args:
        setup: what trials share.
        start: where the trial begins.
        runs: runs jobs; may have workers of an earlier trial.
        log: takes lines of progress.
    """

    def __init__(self, setup: Setup, start: Start, runs: Runs, log: _Log) -> None:
        self._setup = setup
        self._start = start
        self._runs = runs
        self._log = log
        self._line = Line(setup.control, start.trial)
        log.trial, log.warn = start.trial, self._line.say
        self._generation = start.generation
        self._given_up = False
        self._total_steps = 0
        self._steps_per_epoch = 1
        self._last: dict[str, Any] | None = None
        self._ordered: tuple[int, float, int] | None = None  # generation, time of the order, step to continue from
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name=f"trial {start.trial}", daemon=True)
        self._thread.start()

    def next_result(self) -> dict[str, Any]:
        """The next evaluation, for Ray Tune; the last one is marked ``done``."""
        while True:
            result = self._events.get()
            if result["generation"] == self._generation or result["done"]:
                return result

    def end(self, within_s: float) -> bool:
        """Abandons the run, waits for its end, and returns whether it has ended.

        Args:
            within_s: how long to wait.
        """
        self._given_up = True
        self._thread.join(within_s)
        self._line.end()
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            self._put_done(**self._train())
        except RunFailed as error:
            self._put_done(problem=str(error), again=not error.agreed)
        except REFUSALS as error:  # of the run's workers: another process may still have the run, or their room
            self._put_done(problem=str(error), again=True)
        except BaseException as error:  # reported to the driver, which decides
            logger.exception("trial %s", self._start.trial)
            self._put_done(problem=f"{type(error).__name__}: {error}", again=True)

    def _train(self) -> dict[str, Any]:
        """Trains to the end; returns the final result for Ray Tune."""
        values, fork_from = self._start.values, self._start.fork_from
        known_step = self._start.known_step
        while True:
            job = self._prepared(values, fork_from)
            self._total_steps, self._steps_per_epoch = job.total_steps, job.steps_per_epoch
            self._tell_earlier(job, known_step)
            result = self._runs.run(job, self._hooks())
            order = self._order() or self._wait_for_rounds(result)
            if order is None:
                # One that waited for a round may still be moved when the search is resumed.
                is_over = result.status != "stopped" and self._line.decided_epoch >= self._setup.last_round
                return {} if is_over else {"stopped": True}
            self._last = None
            self._generation, values, fork_from, known_step = order.generation, order.values, order.checkpoint, -1
            self._ordered = order.generation, time.monotonic(), _step_of(order.checkpoint)

    def _prepared(self, values: Mapping[str, Any], fork_from: str | None) -> TrainJob:
        """The job of the next run.

        Raises:
            RunFailed: it is refused. The same would be refused again, unless the storage was the reason.
        """
        try:
            config = self._setup.config_of(self._start.trial, self._generation, values, fork_from)
            return prepare_job(config, self._log, self._setup.opened)
        except REFUSALS as error:
            raise RunFailed(str(error), agreed=not _is_of_storage(error)) from error

    def _hooks(self) -> JobHooks:
        return JobHooks(
            should_stop=lambda: self._line.stopping,
            should_abandon=lambda: self._given_up or self._order() is not None,
            on_evaluation=self._tell,
            on_step=self._note_step,
            parent_run=self._setup.parent_run,
            gets_report=False,
            budget=self._setup.budget,
            hold_evaluated=self._setup.last_round > 0,
        )

    def _order(self) -> Order | None:
        order = self._line.order
        return order if order is not None and order.generation > self._generation else None

    def _wait_for_rounds(self, result: FitResult) -> Order | None:
        """At the end of a run: waits until no round can move it any more. Returns the order if one does."""
        if result.status != "stopped" and self._line.decided_epoch < self._setup.last_round:
            self._events.put({"generation": self._generation, "done": False, "waits": True})
        while result.status != "stopped" and self._line.decided_epoch < self._setup.last_round:
            if self._given_up or self._line.stopping:
                return None
            if (order := self._order()) is not None:
                return order
            time.sleep(LOOK_S)
        return self._order()

    def _tell_earlier(self, job: TrainJob, known_step: int) -> None:
        """Reports evaluations of an earlier process that the driver does not know."""
        for info in job.run.checkpoints.checkpoints():
            if info.metrics and info.step > known_step:
                self._tell(Evaluated(info.step, info.metrics, info.path))

    def _tell(self, evaluated: Evaluated) -> None:
        value = evaluated.metrics.get(self._setup.metric)
        if value is None:
            raise RunFailed(
                f"tune.metric: evaluations give no {self._setup.metric}, only {', '.join(sorted(evaluated.metrics))}",
                agreed=True,
            )
        self._last = {
            "generation": self._generation,
            "epoch": evaluated.step // self._steps_per_epoch,
            "step": evaluated.step,
            "value": float(value),
            "checkpoint": evaluated.checkpoint
            or join(self._setup.folder, run_name(self._start.trial, self._generation)),
            "done": False,
        }
        if evaluated.step < self._total_steps:  # the last one is reported when the run has ended
            self._events.put(self._last)

    def _put_done(self, *, problem: str = "", again: bool = False, stopped: bool = False) -> None:
        last = self._last or {"generation": self._generation}
        self._events.put({**last, "done": True, "problem": problem, "again": again, "stopped": stopped})

    def _note_step(self, step: int) -> None:
        self._line.share = step / self._total_steps
        if self._ordered is not None and step > self._ordered[2]:
            self._line.moved(self._ordered[0], time.monotonic() - self._ordered[1])
            self._ordered = None


def _is_of_storage(error: BaseException | None) -> bool:
    """Whether a failure of the storage or of the store of records led to this error."""
    while error is not None:
        if isinstance(error, (OSError, UnreachableError)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _step_of(checkpoint: str) -> int:
    return int(checkpoint.rstrip("/").rpartition("_")[2])
