"""Runs a search: Ray Tune starts trials, each a whole training; their results are kept and shown here."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray import tune

from detr_ray.callbacks import Say
from detr_ray.config import Config, ConfigError
from detr_ray.data.index import DatasetIndex
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.opened_data import OpenedData, open_data
from detr_ray.engine.reporting.tracking_store import check_tracking, run_tracking_uri
from detr_ray.retries import reason_of
from detr_ray.runtime.cluster_check import preflight_nodes
from detr_ray.runtime.host_process import StopSignals, host_process_as_before, stop_signals
from detr_ray.runtime.search.capacity import Capacity, capacity_for
from detr_ray.runtime.search.control import Control
from detr_ray.runtime.search.directory import SearchDirectory, open_search
from detr_ray.runtime.search.records import SearchRecords
from detr_ray.runtime.search.results import BEST_CONFIG, EXPLOITS, SCHEDULE, SearchResult, best_values
from detr_ray.runtime.search.schedulers import build_scheduler
from detr_ray.runtime.search.session import search_session
from detr_ray.runtime.search.sources import Listed, OptunaTpe, Proposer, Source
from detr_ray.runtime.search.trial_actor import Setup, Start, TrialActor
from detr_ray.runtime.search.unsaved import Unsaved
from detr_ray.runtime.search.watch import Moves, SearchWatch
from detr_ray.search.book import Book
from detr_ray.search.lived_schedule import schedule_file
from detr_ray.search.new_population import new_population
from detr_ray.search.space import SearchSpace, with_values
from detr_ray.search.tables import Ending
from detr_ray.search.trials import Trial
from detr_ray.tracking.store import STORE_VARIABLE

# They warn about Tune's result files, which are not written, and about calls that wait for an actor.
_LOUD = ("ray.tune.analysis.experiment_analysis", "ray.tune.utils.util")

ASKED = "asked to stop"
MOST_STARTS = 1_000_000
STOPPED_WITHIN_S = 180.0


@host_process_as_before()
def run_search(
    config: Config,
    say: Say,
    *,
    resume: bool = False,
    on_progress: Callable[[float], None] = lambda trials: None,
) -> SearchResult:
    """Runs the search of the section ``tune``.

    Settings of the calling process are restored at the end.

    Args:
        config: the configuration with its section ``tune``.
        say: shows the user a line.
        resume: whether to resume an existing search of that name.
        on_progress: told how many trials are over, with the done parts of those that train, several times a second.

    Raises:
        ConfigError: the space or a setting cannot be used, the data does not fit, the name is taken, or a node cannot
            use the storage.
        DataError: the data is not usable.
        RunFailed: the storage failed, and what the search found or decided could not be written.
    """
    space = SearchSpace.from_config(config)
    for warning in space.warnings:
        say(f"WARNING: {warning}")
    opened = None if _searches_data(space) else open_data(config.data, say)
    fingerprints = {} if opened is None else _fingerprints(opened)
    check_metric(config, opened)
    check_tracking(config, say)
    directory = open_search(config, fingerprints, resume=resume)
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        if not directory.is_new:
            directory = stack.enter_context(directory.locked(say))
        stack.enter_context(search_session(config))
        # Each trial looks, too, at the nodes that there are then; what it finds is a failure of the trial.
        preflight_nodes(config, directory.path, say)
        capacity = capacity_for(config)
        if directory.is_new:  # what the cluster refuses leaves no folder
            directory = stack.enter_context(directory.locked(say))
        try:
            result = _Search(config, space, opened, directory, capacity, say, on_progress).run()
        except OSError as error:
            raise RunFailed(
                f"the files of the search in {directory.path} cannot be used: {reason_of(error)}; once they can, the "
                f"same command with --resume tune.name={directory.name} goes on"
            ) from error
    if config.tracking.register and result.status != "stopped" and result.best is not None:
        register_best(config, result, say)
    return result


def register_best(config: Config, result: SearchResult, say: Say) -> None:
    """Makes the best checkpoint of the best trial a version of the registered model.

    Args:
        config: the configuration of the search.
        result: how it ended, with a best trial.
        say: shows the user a line.
    """
    from detr_ray.runtime.registration import register_or_warn

    assert result.best is not None and result.best.run_path is not None, "it was measured"
    best = with_values(config, result.best_values or {})
    register_or_warn(best, result.best.run_path, say)


def check_metric(config: Config, opened: OpenedData | None) -> None:
    """Refuses a search without evaluations, or by the AP of a category that the data does not have.

    Raises:
        ConfigError: see above.
    """
    if opened is None:
        return
    _, val = opened
    if val is None:
        raise ConfigError("data.val: a search compares trials on validation data, and none is given")
    prefix, _, category = config.tune.metric.partition("val/AP/")
    names = [name for _, name in val.categories]
    if not prefix and category and category not in names:
        raise ConfigError(
            f"tune.metric: {config.tune.metric}: the data has no category {category!r}; it has {', '.join(names)}"
        )


def _fingerprints(opened: OpenedData) -> dict[str, str]:
    train, val = opened
    named: dict[str, DatasetIndex | None] = {"train": train, "val": val}
    return {name: index.fingerprint for name, index in named.items() if index is not None}


def _searches_data(space: SearchSpace) -> bool:
    return any(name.startswith("data.") for name in space.templates)


class _Search:
    """One process's part of a search: runs its remaining trials."""

    def __init__(
        self,
        config: Config,
        space: SearchSpace,
        opened: OpenedData | None,
        directory: SearchDirectory,
        capacity: Capacity,
        say: Say,
        on_progress: Callable[[float], None],
    ) -> None:
        self._config, self._settings, self._space, self._say = config, config.tune, space, say
        self._capacity = capacity
        self._on_progress = on_progress
        self._opened = opened
        self._directory = directory
        self._deadline = (
            None if self._settings.time_budget_s is None else time.monotonic() + self._settings.time_budget_s
        )
        failures = self._settings.max_trial_failures
        self._book = Book(directory.path, self._settings.mode, failures, directory.trials, say)
        self._control = Control(say)
        self._population = new_population(config, space)
        if self._population is not None and directory.population is not None:
            self._population.restore(directory.population)
        self._uri = run_tracking_uri(config)
        self._records = SearchRecords(
            config,
            opened,
            space,
            directory,
            self._book,
            self._uri if config.tracking.enabled else None,
            say,
            self._population,
        )
        self._parent_run: str | None = None
        self._moves = None
        if self._population is not None:
            self._moves = Moves(self._population, self._book, self._control, directory, self._records, say)

    def run(self) -> SearchResult:
        """Runs the rest of the search, and returns its result."""
        self._announce()
        started = time.monotonic()
        ended: Ending = "failed"
        watch: SearchWatch | None = None
        try:
            with stop_signals() as signals:
                watch = SearchWatch(
                    self._book,
                    self._control,
                    self._records,
                    lambda: self._why_stop(signals),
                    self._say,
                    self._on_progress,
                )
                self._run_trials(watch)
            if not watch.stopping and self._moves is not None:
                self._moves.end(self._config.train.keep_last)
            ended = "finished" if not watch.stopping else "stopped" if watch.stopping == ASKED else "out of time"
        finally:
            self._control.end()
            if watch is not None:
                watch.end_all()
            self._book.save()
            if self._moves is not None:
                self._moves.save()
            best = self._records.best
            values = None if best is None else best_values(best, self._space, self._population)
            files = {} if best is None else self._files(best, values or {})
            self._records.end(ended, files, time.monotonic() - started)
        return SearchResult(
            self._directory.name,
            self._directory.path,
            ended,
            self._settings.metric,
            self._settings.mode,
            tuple(self._book.trials),
            self._space.parameters,
            time.monotonic() - started,
            best,
            values,
            self._uri if self._config.tracking.enabled else None,
            "" if self._moves is None else self._moves.exploits(),
            self._parent_run,
            self._records.report,
            None if best is None else self._records.confirmed,
        )

    def _files(self, best: Trial, values: Mapping[str, Any]) -> dict[str, str]:
        """Files with the configuration of the best trial, and the schedule of its values in a population."""
        files = {BEST_CONFIG: with_values(self._config, values).to_yaml()}
        if self._moves is not None:
            schedule = schedule_file(values, f"What {best.run_name} trained with, ancestors included.")
            files |= {SCHEDULE: schedule, EXPLOITS: f"{self._moves.exploits()}\n"}
        return files

    def _announce(self) -> None:
        settings, trials = self._settings, self._book.trials
        self._say(
            f"search {self._directory.name}: {len(self._space.parameters)} parameters, {settings.trials} trials of "
            f"{self._config.train.epochs} epochs, searcher {settings.searcher}, scheduler {settings.scheduler}"
        )
        self._say(
            f"to go on with it after an interruption: the same command with --resume tune.name={self._directory.name}"
        )
        over = [trial.name for trial in trials if trial.is_over]
        if trials:
            left = [trial.name for trial in trials if not trial.is_over]
            self._say(f"going on: {len(over)} trials are over and not run again; {', '.join(left) or 'none'} go on")

    def _why_stop(self, signals: StopSignals) -> str:
        if signals.asked():
            return ASKED
        if self._deadline is not None and time.monotonic() > self._deadline:
            return f"the time of the search is over (tune.time_budget_s={self._settings.time_budget_s:g})"
        return ""

    def _run_trials(self, watch: SearchWatch) -> None:
        config, settings = self._config, self._settings
        try:
            self._parent_run = self._records.parent_run()
            setup = Setup(
                base=config,
                space=self._space,
                folder=self._directory.path,
                metric=settings.metric,
                opened=self._opened,
                control=self._control.actor,
                parent_run=self._parent_run,
                tracking_uri=self._uri,
                environment_uri=os.environ.get(STORE_VARIABLE) or None,
                budget=self._capacity.budget(config),
                last_round=0 if self._population is None else self._population.last_round,
            )
            source = self._source(watch)
            if self._population is not None and self._moves is not None:
                watch.follow(self._population, self._moves, config.train.start_timeout_s, source.no_more)
                self._moves.note_earlier()
                self._moves([])
            with tempfile.TemporaryDirectory(prefix="detr_ray-tune-", ignore_cleanup_errors=True) as folder:
                self._tuner(setup, source, watch, folder).fit()
        finally:
            self._capacity.end()

    def _source(self, watch: SearchWatch) -> Source:
        return Source(
            self._book,
            self._proposer(),
            self._settings.trials,
            lambda values: self._space.refusal(self._config, values),
            self._capacity.has_room,
            lambda: bool(watch.stopping),
            self._start,
            self._say,
            self._close_population,
            self._capacity.want,
        )

    def _tuner(self, setup: Setup, source: Source, watch: SearchWatch, folder: str) -> tune.Tuner:
        settings = self._settings
        earlier = [trial for trial in self._directory.trials if trial.history]
        trainable = tune.with_resources(
            tune.with_parameters(TrialActor, setup=setup),
            # The trial actor computes nothing, but Tune needs a resource: one byte of memory is free on every node.
            tune.PlacementGroupFactory([{"memory": 1}]),
        )
        return tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=source,
                scheduler=build_scheduler(settings, self._config.train.epochs, earlier),
                num_samples=MOST_STARTS,
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.config["trial"],
                trial_dirname_creator=lambda trial: f"{trial.config['trial']}-{trial.trial_id}",
            ),
            run_config=tune.RunConfig(
                name=self._directory.name,
                storage_path=folder,
                callbacks=[watch],
                stop=_StopLate(watch),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )

    def _proposer(self) -> Proposer:
        if self._settings.searcher == "tpe":
            return OptunaTpe(self._space, self._settings, list(self._directory.trials))
        return Listed(self._space, self._settings)

    def _start(self, trial: Trial) -> Start:
        if self._population is not None:
            self._population.add(trial.name, trial.values)
            known = [report.step for report in self._population.members[trial.name].reports.values()]
            moves = [move for move in self._population.moves if move.receiver == trial.name]
            checkpoint = moves[-1].checkpoint if moves else None
            return Start(trial.name, trial.values, trial.generation, checkpoint, max(known, default=-1))
        return Start(trial.name, trial.values, known_step=trial.step if trial.history else -1)

    def _close_population(self) -> None:
        if self._population is not None and self._moves is not None:
            self._moves(self._population.close())


@dataclasses.dataclass
class _StopLate(Unsaved, tune.Stopper):  # type: ignore[misc]
    """Ends Tune's trials by force if they have not stopped by themselves in time.

    Attributes:
        watch: tells whether the search is stopping.
    """

    watch: SearchWatch
    since: float | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stops no single trial."""
        return False

    def stop_all(self) -> bool:
        """Whether all trials must be stopped now."""
        if self.watch.stopping and self.since is None:
            self.since = time.monotonic()
        return self.since is not None and time.monotonic() - self.since > STOPPED_WITHIN_S
