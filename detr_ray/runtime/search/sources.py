"""The source of trials: Ray Tune's searcher, which draws values and starts a trial when there is room for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ray.tune.search import Searcher

from detr_ray.callbacks import Say
from detr_ray.config import ConfigError, TuneConfig
from detr_ray.runtime.search.trial_actor import Start
from detr_ray.runtime.search.unsaved import Unsaved
from detr_ray.search.book import Book
from detr_ray.search.checks import DRAWS_TRIED
from detr_ray.search.distributions import Distribution
from detr_ray.search.space import SearchSpace
from detr_ray.search.trials import Trial

MOST_REFUSED = DRAWS_TRIED
"""For each trial: after this many consecutive draws that the configuration refuses, no more trials are begun. With a
smaller number, a search with narrow constraints would pass the check before it, and end after a few trials."""


class Proposer(Protocol):
    """Draws the values of trials."""

    @property
    def is_finite(self) -> bool:
        """Whether there is a last proposal."""
        ...

    def propose(self, number: int) -> Mapping[str, Any] | None:
        """The values of the next trial; None if there are no more.

        Args:
            number: of the trial, from 0. A resumed search asks only for those that it does not have.
        """
        ...

    def tell(self, number: int, trial: Trial) -> None:
        """Passes on the result of a trial that it proposed."""
        ...


class Listed:
    """Proposes values that do not depend on results: random ones, or a grid.

    Args:
        space: the space.
        settings: searcher and seed.
    """

    def __init__(self, space: SearchSpace, settings: TuneConfig) -> None:
        self._space = space
        self._settings = settings

    @property
    def is_finite(self) -> bool:
        """Whether it is a grid."""
        return self._settings.searcher == "grid"

    def propose(self, number: int) -> Mapping[str, Any] | None:
        """The values; those of trial ``number`` are always the same."""
        return self._space.proposal(number, self._settings)

    def tell(self, number: int, trial: Trial) -> None:
        """Does nothing."""


class OptunaTpe:
    """Proposes values near the good ones so far (Optuna's TPE, through Ray Tune).

    Args:
        space: the space.
        settings: mode and seed.
        earlier: trials of an earlier process, to learn from.

    Raises:
        ConfigError: Optuna is not installed.
    """

    is_finite = False

    def __init__(self, space: SearchSpace, settings: TuneConfig, earlier: list[Trial]) -> None:
        try:
            import optuna
            from ray.tune.search.optuna import OptunaSearch
        except ImportError as error:
            raise ConfigError("tune.searcher: tpe needs Optuna: pip install 'detr_ray[tune]'") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._parameters = space.parameters
        self._proposed: set[int] = set()
        self._search = OptunaSearch(
            {name: _distribution(distribution) for name, distribution in space.parameters.items()},
            metric="value",
            mode=settings.mode,
            # Another process must not draw what the first one drew.
            seed=settings.seed + len(earlier),
        )
        for number, trial in enumerate(earlier):
            if trial.is_over:
                self.tell(number, trial)

    def propose(self, number: int) -> Mapping[str, Any] | None:
        """The values."""
        self._proposed.add(number)
        # Steps of floating point numbers may miss the decimal ones: 0.1 + 2 * 0.1 is not 0.3.
        return {
            name: value if self._parameters[name].values is not None else self._parameters[name].nearest(value)
            for name, value in self._search.suggest(str(number)).items()
        }

    def tell(self, number: int, trial: Trial) -> None:
        """Learns from a trial's best value."""
        failed = trial.state in ("failed", "refused") or trial.best is None
        if number not in self._proposed:  # an earlier process proposed it
            self._search.add_evaluated_point(dict(trial.values), trial.best, error=failed)
            return
        result = None if failed else {"value": trial.best, "training_iteration": 1}
        self._search.on_trial_complete(str(number), result, error=failed)


def _distribution(distribution: Distribution) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if distribution.values is not None:
        return CategoricalDistribution(distribution.values)
    low, high, step = distribution.low, distribution.high, distribution.step
    assert low is not None and high is not None
    if step is None:
        return FloatDistribution(low, high, log=distribution.log)
    # Optuna would shorten a range that does not end on a step, with a warning.
    last = distribution.ends()[1]
    if distribution.kind == "randint":
        return IntDistribution(int(low), last)
    return FloatDistribution(low, last, step=step)


class Source(Unsaved, Searcher):  # type: ignore[misc]
    """Ray Tune's searcher: suggests the waiting trials of a book, and adds new ones to it.

    Args:
        book: the trials.
        proposer: draws values of new ones.
        most: number of trials in all; those that are refused do not count.
        refusal: returns why the configuration refuses values; empty if it does not.
        has_room: whether one more trial can run now, beside this number.
        ending: whether the search is ending, so that no trial may begin.
        start: returns where a trial begins.
        say: shows the user a line.
        exhausted: called once when there will be no more new trials.
        wanted: told how many trials are left: those that run, and those that will.
    """

    def __init__(
        self,
        book: Book,
        proposer: Proposer,
        most: int,
        refusal: Callable[[Mapping[str, Any]], str],
        has_room: Callable[[int], bool],
        ending: Callable[[], bool],
        start: Callable[[Trial], Start],
        say: Say,
        exhausted: Callable[[], None] = lambda: None,
        wanted: Callable[[int], None] = lambda trials: None,
    ) -> None:
        super().__init__(metric="value", mode="max")
        self._book, self._proposer, self._most = book, proposer, most
        self._refusal, self._has_room, self._ending, self._start, self._say = refusal, has_room, ending, start, say
        self._on_exhausted, self._wanted = exhausted, wanted
        self._exhausted = False
        self._told: set[str] = {trial.name for trial in book.trials if trial.is_over}

    def no_more(self) -> None:
        """Draws no further trials."""
        if not self._exhausted:
            self._exhausted = True
            self._on_exhausted()

    def set_search_properties(self, *arguments: Any, **named: Any) -> bool:
        """Ignores the arguments: metric and space are known."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial; None if there is no room, or no trial that could begin now."""
        self._tell_proposer()
        self._wanted(self._left())
        running = self._book.counts["running"]
        if self._ending():
            return str(Searcher.FINISHED)
        trial = self._book.next_waiting()
        if trial is None and not self._exhausted:
            if running and not self._has_room(running):
                return None
            trial = self._propose()
        if trial is None:
            return None if running else str(Searcher.FINISHED)
        if running and not self._has_room(running):
            return None
        return self._start(self._book.start(trial.name)).to_config()

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Does nothing: the book has the result."""

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: the book is written."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing."""

    def _left(self) -> int:
        counts = self._book.counts
        begun = counts["running"] + counts["waiting"]
        return begun if self._exhausted else begun + self._most - (counts.total() - counts["refused"])

    def _propose(self) -> Trial | None:
        refused = 0
        while len(self._book.trials) - self._book.counts["refused"] < self._most:
            number = len(self._book.trials)
            values = self._proposer.propose(number)
            if values is None:
                break
            problem = self._refusal(values)
            trial = self._book.add(values, problem)
            if not problem:
                return trial
            self._say(f"{trial.name} is refused, and not started: {problem}")
            self._tell_proposer()
            refused += 1
            if refused >= MOST_REFUSED and not self._proposer.is_finite:
                self._say(f"WARNING: {refused} draws in a row were refused; no more trials are begun")
                break
        self.no_more()
        return None

    def _tell_proposer(self) -> None:
        for number, trial in enumerate(self._book.trials):
            if trial.is_over and trial.name not in self._told:
                self._told.add(trial.name)
                self._proposer.tell(number, trial)
