"""Callbacks of the driver while Ray Tune runs a search: keep the trials' book and records, show progress."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray import tune

from detr_ray.callbacks import Say
from detr_ray.runtime.search.control import Control, Order, Progress
from detr_ray.runtime.search.directory import SearchDirectory
from detr_ray.runtime.search.records import SearchRecords
from detr_ray.runtime.search.unsaved import Unsaved
from detr_ray.search.book import Book
from detr_ray.search.population import Move, Population, Report
from detr_ray.search.tables import aligned, trial_table
from detr_ray.search.trials import run_name

TABLE_EVERY_S = 30.0
"""Least time between two tables of progress."""


class SearchWatch(Unsaved, tune.Callback):  # type: ignore[misc]
    """A callback that Ray Tune calls at each event of a trial, and in each round of its loop.

    Args:
        book: the trials.
        control: the connection to trials.
        records: the records in MLflow and in the search's folder.
        should_stop: returns whether the search is to end now.
        say: shows the user a line.
        on_progress: told how many trials are over, with the done parts of those that train, after each round of Tune's.
    """

    def __init__(
        self,
        book: Book,
        control: Control,
        records: SearchRecords,
        should_stop: Callable[[], str],
        say: Say,
        on_progress: Callable[[float], None] = lambda trials: None,
    ) -> None:
        self._book, self._control, self._records = book, control, records
        self._should_stop, self._say, self._on_progress = should_stop, say, on_progress
        self._names: dict[str, str] = {}  # Tune's id of a trial -> its name
        self._done: dict[str, Mapping[str, Any]] = {}
        self._population: Population | None = None
        self._carry_out: Callable[[list[Move]], object] = lambda moves: None
        self._patience_s = math.inf
        self._no_more: Callable[[], None] = lambda: None
        self._stuck_since: float | None = None
        self._said_stuck = False
        self._changed = False
        self._shown_at = time.monotonic()
        self.stopping = ""

    def follow(
        self,
        population: Population,
        carry_out: Callable[[list[Move]], object],
        patience_s: float = math.inf,
        no_more: Callable[[], None] = lambda: None,
    ) -> None:
        """Passes results and ends of trials to a population, and carries out its moves.

        Args:
            population: the population.
            carry_out: carries out moves.
            patience_s: how long trials that have taken their last step wait for one that has no room in the cluster.
            no_more: called when they have waited that long: no further trial may be added.
        """
        self._population, self._carry_out = population, carry_out
        self._patience_s, self._no_more = patience_s, no_more

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Notes that a trial runs."""
        name = trial.config["trial"]
        if trial.trial_id not in self._names:
            self._names[trial.trial_id] = name
            self._say(f"{name} starts: {values_text(self._book[name].values)}")
        self._note_path(name)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        """Notes an evaluation."""
        name = trial.config["trial"]
        if "problem" in result:  # the trial's own end; a scheduler marks results done, too
            self._done[trial.trial_id] = result
        if "waits" in result and self._population is not None:
            self._carry_out(self._population.wait(name, result["generation"]))
        known = self._book[name]
        if "value" not in result or result["generation"] != known.generation:
            return
        if result["step"] > known.step or not known.history:
            best = self._book.best
            now = self._book.measure(name, result["epoch"], result["step"], result["value"])
            self._changed = True
            if best is None or (self._book.best is not None and self._book.best.best != best.best):
                self._say(f"{name} is the best so far: {self._records.metric} {now.value:.3f} at epoch {now.epoch:g}")
        # Also one that is in the book: an earlier process may have ended before it reported it to the population.
        if self._population is not None:
            report = Report(int(result["epoch"]), result["step"], result["value"], result["checkpoint"])
            self._carry_out(self._population.report(name, result["generation"], report))
        self._records.progress()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Notes how a trial ended."""
        name = trial.config["trial"]
        last = self._done.get(trial.trial_id)
        if last is None:
            stopped_early = not self.stopping
            self._end(name, "stopped early" if stopped_early else "stopped")
        elif last["problem"]:
            self._fail(name, last["problem"], again=last["again"])
        else:
            self._end(name, "stopped" if last["stopped"] else "finished")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Notes that a trial's process was lost."""
        error = trial.get_error()
        reason = str(error).strip().split("\n")[-1] if error is not None else "its process was lost"
        self._fail(trial.config["trial"], f"the process of the trial was lost: {reason}", again=True)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called several times a second: passes on orders, checks whether to stop, shows progress."""
        if not self.stopping and (why := self._should_stop()):
            self.stopping = why
            self._say(f"{why}: stopping {self._book.counts['running']} trials, each with a checkpoint")
            self._control.stop()
        self._control.exchange()
        self._book.save_again()
        self._end_waiting()
        self._on_progress(self._trials_done())
        if self._changed and time.monotonic() - self._shown_at > TABLE_EVERY_S:
            self.show_table()

    def _end_waiting(self) -> None:
        """Gives up trials that have had no room for long, while all others only wait for them at their ends."""
        population, running = self._population, [one.name for one in self._book.trials if one.state == "running"]
        if population is None or self.stopping or population.decided_epoch >= population.last_round:
            return
        if not running or not all(population.members[name].at_end for name in running):
            self._stuck_since, self._said_stuck = None, False
            return
        self._stuck_since = self._stuck_since or time.monotonic()
        stuck_s = time.monotonic() - self._stuck_since
        if not self._said_stuck and stuck_s >= min(TABLE_EVERY_S, self._patience_s):  # a restart takes a moment, too
            self._said_stuck = True
            self._say(
                f"{', '.join(running)} wait at their ends for trials that have no room in the cluster; these are given "
                f"up after {self._patience_s:g} s (train.start_timeout_s)"
            )
        if stuck_s < self._patience_s:
            return
        problem = f"there was no room for it in the cluster for {self._patience_s:g} s"
        for trial in self._book.trials:
            if trial.state == "waiting":
                self._fail(trial.name, problem, again=False)
        self._no_more()

    def _trials_done(self) -> float:
        at_work = self._control.progress
        return sum(1.0 if one.is_over else at_work.get(one.name, Progress()).share for one in self._book.trials)

    def end_all(self) -> None:
        """Notes that nothing runs any more; interrupted trials can continue when the search is resumed."""
        for trial in self._book.trials:
            if trial.state in ("running", "waiting"):
                self._book.end(trial.name, "stopped")

    def show_table(self) -> None:
        """Shows the table of progress."""
        self._changed, self._shown_at = False, time.monotonic()
        names, metric, mode = self._records.parameters, self._records.metric, self._records.mode
        self._say(f"\n{trial_table(self._book.trials, names, metric, mode)}\n")

    def _end(self, name: str, state: Any) -> None:
        trial = self._book.end(name, state)
        self._changed = True
        value = "" if trial.value is None else f", {self._records.metric} {trial.value:.3f}"
        self._say(f"{name} {state} at epoch {trial.epoch:g}{value}")
        if state != "stopped":
            self._leave_population(name, failed=False)
        self._records.progress()

    def _fail(self, name: str, problem: str, *, again: bool) -> None:
        if again and self.stopping:  # it continues when the search is resumed
            self._end(name, "stopped")
            return
        trial = self._book.fail(name, problem, again=again)
        self._changed = True
        self._say(f"WARNING: {name} failed: {problem}" + ("; it is tried again" if trial.state == "waiting" else ""))
        if trial.state == "failed":
            self._leave_population(name, failed=True)
        self._records.progress()

    def _leave_population(self, name: str, *, failed: bool) -> None:
        if self._population is not None:
            self._carry_out(self._population.end(name, failed=failed))

    def _note_path(self, name: str) -> None:
        self._book.set_path(name, self._records.path_of(self._book[name].run_name))


class Moves:
    """Carries out the decisions of a population.

    Args:
        population: the population.
        book: the trials.
        control: the connection to them.
        directory: keeps the state of the population.
        records: keeps paths.
        say: shows the user a line.
    """

    def __init__(
        self,
        population: Population,
        book: Book,
        control: Control,
        directory: SearchDirectory,
        records: SearchRecords,
        say: Say,
    ) -> None:
        self._population, self._book, self._control = population, book, control
        self._directory, self._records, self._say = directory, records, say
        self._released: set[str] = set()
        self._tidied: set[str] = set()

    def __call__(self, moves: list[Move]) -> None:
        """Gives orders after they are saved, so that a resumed search can repeat them."""
        self.save()
        for move in moves:
            self._note(move)
            self._say(
                f"epoch {move.epoch}: {move.receiver} ({move.receiver_value:.3f}) goes on from {move.donor} "
                f"({move.donor_value:.3f}) at step {move.step}: {changes_text(move.old, move.new)}"
            )
        self._control.order(self._population.decided_epoch, self.orders())
        for report in self._population.to_release():
            if report.checkpoint not in self._released:
                self._released.add(report.checkpoint)
                self._records.release(report.checkpoint)
        for move in self._population.moves:
            # Trials that were moved in earlier rounds have their own checkpoints now.
            old = run_name(move.receiver, move.generation - 1)
            if move.epoch < self._population.decided_epoch and old not in self._tidied:
                self._tidied.add(old)
                self._records.tidy(old, 1)

    def save(self) -> None:
        """Writes the state of the population, with the seconds that moves took."""
        at_work = self._control.progress
        self._population.moves = [
            dataclasses.replace(move, seconds=at_work.get(move.receiver, Progress()).moved.get(move.generation))
            if move.seconds is None
            else move
            for move in self._population.moves
        ]
        self._directory.write_population(self._population.state())

    def note_earlier(self) -> None:
        """Notes what an earlier process decided but did not note: moves, and ends of trials."""
        for name, member in self._population.members.items():
            trial = self._book[name]
            if trial.is_over and member.state == "training":
                self._population.end(name, failed=trial.state == "failed")
        for move in self._population.moves:
            if self._book[move.receiver].generation < move.generation:
                self._note(move)

    def _note(self, move: Move) -> None:
        self._book.move(move.receiver, move.new, move.generation, self._book[move.donor], move.step)
        self._book.set_path(move.receiver, self._records.path_of(run_name(move.receiver, move.generation)))

    def end(self, keep_last: int) -> None:
        """Removes checkpoints that were kept for moves, after the search.

        Args:
            keep_last: number of newest checkpoints of each trial's last run that stay, besides the best.
        """
        for name, member in self._population.members.items():
            for generation in range(member.generation + 1):
                self._records.tidy(run_name(name, generation), keep_last if generation == member.generation else 1)

    def exploits(self) -> str:
        """All moves as a table, with the seconds from the order to the first step after it."""
        rows = [["epoch", "trial", "from", "step", "seconds", "values"]]
        for move in self._population.moves:
            rows.append(
                [
                    str(move.epoch),
                    run_name(move.receiver, move.generation),
                    run_name(move.donor, move.donor_generation),
                    str(move.step),
                    "" if move.seconds is None else f"{move.seconds:.1f}",
                    changes_text(move.old, move.new),
                ]
            )
        return "\n".join(aligned(rows))

    def orders(self) -> dict[str, Order]:
        """The last order of each trial."""
        return {move.receiver: Order(move.generation, move.new, move.checkpoint) for move in self._population.moves}


def values_text(values: Mapping[str, Any]) -> str:
    """Values on one line."""
    return ", ".join(f"{name}={value_text(value)}" for name, value in values.items()) or "nothing is searched"


def value_text(value: Any) -> str:
    """A value as short text; the files have all digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def changes_text(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The changed values, on one line."""
    return ", ".join(
        f"{name} {value_text(old[name])} -> {value_text(new[name])}" for name in new if old[name] != new[name]
    )
