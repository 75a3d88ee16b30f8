"""Population based training: worse trials continue from the weights of better ones, with changed settings.

(Jaderberg et al., 2017, "Population Based Training of Neural Networks".) There is a round after every `every_epochs`
epochs. It is decided once all trials have been evaluated at its epoch, and depends only on these evaluations and the
seed, not on the speed of trials. Trials do not wait for a round: they train on, and only a moved trial loses its steps
after the round. A trial that has passed an epoch without an evaluation (its scores could not be computed) is the worst.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from detr_ray.search.guided_changes import Gain
from detr_ray.search.trials import Mode

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Report:
    """An evaluation of a trial.

    Attributes:
        epoch: of the weights.
        step: optimizer steps that they had taken.
        value: the metric.
        checkpoint: folder of the checkpoint with these weights; empty where an evaluation is missing.
    """

    epoch: int
    step: int
    value: float
    checkpoint: str


@dataclasses.dataclass(frozen=True)
class Move:
    """A trial goes on from another trial's weights ("exploit"), with changed settings ("explore").

    Attributes:
        epoch: of the round.
        receiver: the trial that is moved.
        generation: the number of its moves so far, including this one.
        donor: the trial whose weights it gets.
        donor_generation: the number of the donor's moves before.
        step: step from which both continue.
        checkpoint: the donor's.
        receiver_value: the metric of the receiver.
        donor_value: that of the donor.
        old: settings of the receiver before.
        new: its new settings, made from the donor's.
        seconds: from the order to the first step after it; None where that is not known.
    """

    epoch: int
    receiver: str
    generation: int
    donor: str
    donor_generation: int
    step: int
    checkpoint: str
    receiver_value: float
    donor_value: float
    old: Values
    new: Values
    seconds: float | None = None


@dataclasses.dataclass
class Member:
    """A trial of the population.

    Attributes:
        values: its present settings.
        generation: how often it was moved.
        reports: its evaluations by epoch, including those of its ancestors.
        state: whether it trains, has ended, or has failed and no longer takes part.
        at_end: whether it has taken its last step and only waits for rounds.
    """

    values: Values
    generation: int = 0
    reports: dict[int, Report] = dataclasses.field(default_factory=dict)
    state: Literal["training", "ended", "failed"] = "training"
    at_end: bool = False

    def has_passed(self, epoch: int) -> bool:
        """Whether no evaluation of an epoch is to be waited for."""
        return self.at_end or self.state == "ended" or max(self.reports, default=0) >= epoch


Change = Callable[[Values, random.Random], Values]
"""Changes a donor's settings."""


class Population:
    """Decides which trials are moved to which others.

    Args:
        size: number of trials. Nothing is decided before all of them have been added.
        change: changes settings.
        every_epochs: epochs between two rounds.
        epochs: length of a training; a round at its end would be of no use.
        quantile: share of the trials that are moved in a round, and of those that they are moved to.
        mode: whether a larger (``max``) or a smaller metric is better.
        seed: of all random choices.
    """

    def __init__(
        self,
        size: int,
        change: Change,
        *,
        every_epochs: int,
        epochs: int,
        quantile: float,
        mode: Mode,
        seed: int,
    ) -> None:
        self._size = size
        self._change = change
        self._every_epochs = every_epochs
        self._epochs = epochs
        self._quantile = quantile
        self._sign = 1 if mode == "max" else -1
        self._seed = seed
        self.members: dict[str, Member] = {}
        self.moves: list[Move] = []
        self.gains: list[Gain] = []
        self.decided_epoch = 0

    @property
    def last_round(self) -> int:
        """Epoch of the last round; 0 where there is none."""
        return (self._epochs - 1) // self._every_epochs * self._every_epochs

    def is_round(self, epoch: int) -> bool:
        """Whether there is a round after this epoch."""
        return 0 < epoch <= self.last_round and epoch % self._every_epochs == 0

    def add(self, trial: str, values: Values) -> None:
        """Adds a trial with its first settings; an existing one does not change."""
        self.members.setdefault(trial, Member(dict(values)))

    def report(self, trial: str, generation: int, report: Report) -> list[Move]:
        """Notes an evaluation.

        Args:
            trial: which trial.
            generation: the number of its moves when it was evaluated; a report from before its last move is dropped.
            report: the evaluation.

        Returns:
            The moves of all rounds that can be decided now.
        """
        member = self.members[trial]
        if generation != member.generation:
            return []
        member.reports[report.epoch] = report
        return self._decide()

    def wait(self, trial: str, generation: int) -> list[Move]:
        """Notes that a trial has taken its last step, and that all of its evaluations were reported.

        Args:
            trial: which trial.
            generation: the number of its moves when it took the step; see `report`.
        """
        member = self.members[trial]
        if generation != member.generation:
            return []
        member.at_end = True
        return self._decide()

    def end(self, trial: str, *, failed: bool) -> list[Move]:
        """Notes that a trial has ended: rounds no longer wait for it, and a failed one no longer takes part.

        Nothing changes if it was never added, because it had no room from the beginning.
        """
        if trial in self.members:
            self.members[trial].state = "failed" if failed else "ended"
        return self._decide()

    def close(self) -> list[Move]:
        """Notes that no more trials will be added."""
        self._size = len(self.members)
        return self._decide()

    def to_release(self) -> Iterable[Report]:
        """Evaluations whose checkpoints are no longer needed for moves.

        Those of the last decided round are still needed: a trial that was moved there may not have its own one yet.
        """
        for member in self.members.values():
            for epoch, report in member.reports.items():
                if report.checkpoint and (epoch < self.decided_epoch or not self.is_round(epoch)):
                    yield report

    def ancestry(self, trial: str, generation: int | None = None) -> list[tuple[int, Values]]:
        """The settings with which a trial's weights were trained: (first step, settings), in order.

        Args:
            trial: any of the population.
            generation: the number of its moves before; None for all of them.
        """
        generation = self.members[trial].generation if generation is None else generation
        if generation == 0:
            moved = [move for move in self.moves if move.receiver == trial]
            return [(0, moved[0].old if moved else self.members[trial].values)]
        move = self._move_of(trial, generation)
        return [*self.ancestry(move.donor, move.donor_generation), (move.step, move.new)]

    def run_of(self, trial: str, generation: int, step: int) -> tuple[str, int]:
        """The run that took a step of a run's training, the run itself or an ancestor: (trial, number of moves before).

        Args:
            trial: any of the population.
            generation: the number of its moves before the run.
            step: which step.
        """
        while generation and step <= (move := self._move_of(trial, generation)).step:
            trial, generation = move.donor, move.donor_generation
        return trial, generation

    def _move_of(self, receiver: str, generation: int) -> Move:
        return next(move for move in self.moves if (move.receiver, move.generation) == (receiver, generation))

    def _decide(self) -> list[Move]:
        moves: list[Move] = []
        while (epoch := self.decided_epoch + self._every_epochs) <= self.last_round:
            taking_part = {name: member for name, member in self.members.items() if member.state != "failed"}
            waits = len(self.members) < self._size
            if waits or not taking_part or not all(member.has_passed(epoch) for member in taking_part.values()):
                break
            for member in taking_part.values():
                member.reports.setdefault(epoch, Report(epoch, 0, math.nan, ""))
            moves += self._round(epoch, taking_part)
            self.decided_epoch = epoch
        return moves

    def _round(self, epoch: int, members: Mapping[str, Member]) -> list[Move]:
        # NaN comes last; of equal values, the trial that was added first is the better one.
        order = list(members)
        ranked = sorted(members, key=lambda name: (-self._score(members[name].reports[epoch]), order.index(name)))
        count = min(math.ceil(len(ranked) * self._quantile), len(ranked) // 2)
        best = ranked[:count]
        self.gains += [gain for name in ranked if (gain := self._gain(epoch, members[name])) is not None]
        moves = [self._move(epoch, name, best) for name in ranked[len(ranked) - count :]]
        made = [move for move in moves if move is not None]
        for move in made:
            self._apply(move)
        return made

    def _gain(self, epoch: int, member: Member) -> Gain | None:
        before = member.reports.get(epoch - self._every_epochs)
        if before is None:
            return None
        return Gain(epoch, member.values, self._sign * (member.reports[epoch].value - before.value))

    def _move(self, epoch: int, receiver: str, best: Sequence[str]) -> Move | None:
        chance = random.Random(f"{self._seed} {epoch} {receiver}")
        donor = chance.choice(best)
        own, other = self.members[receiver], self.members[donor]
        if own.state == "ended" or self._score(other.reports[epoch]) <= self._score(own.reports[epoch]):
            return None
        new = self._change(other.values, chance)
        report = other.reports[epoch]
        return Move(
            epoch, receiver, own.generation + 1, donor, other.generation, report.step, report.checkpoint,
            own.reports[epoch].value, report.value, dict(own.values), dict(new),
        )  # fmt: skip

    def _apply(self, move: Move) -> None:
        member, donor = self.members[move.receiver], self.members[move.donor]
        member.values, member.generation, member.at_end = move.new, move.generation, False
        # Its evaluations after the round are dropped.
        member.reports = {epoch: report for epoch, report in member.reports.items() if epoch < move.epoch}
        member.reports[move.epoch] = donor.reports[move.epoch]
        self.moves.append(move)

    def _score(self, report: Report) -> float:
        return -math.inf if math.isnan(report.value) else self._sign * report.value

    def state(self) -> dict[str, Any]:
        """Its state as JSON values, for `restore`."""
        return {
            "decided_epoch": self.decided_epoch,
            "moves": [dataclasses.asdict(move) for move in self.moves],
            "gains": [dataclasses.asdict(gain) for gain in self.gains],
            "members": {name: _member_state(member) for name, member in self.members.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores the state of an earlier process."""
        self.decided_epoch = state["decided_epoch"]
        self.moves = [Move(**move) for move in state["moves"]]
        self.gains = [Gain(**gain) for gain in state["gains"]]
        self.members = {name: _member_of(member) for name, member in state["members"].items()}


def _member_state(member: Member) -> dict[str, Any]:
    reports = [dataclasses.asdict(report) for report in member.reports.values()]
    return dataclasses.asdict(dataclasses.replace(member, reports={})) | {"reports": reports}


def _member_of(state: Mapping[str, Any]) -> Member:
    reports = [Report(**report) for report in state["reports"]]
    return Member(state["values"], state["generation"], {report.epoch: report for report in reports}, state["state"])
