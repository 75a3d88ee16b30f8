"""Who is moved where in a population, from evaluations alone: no trial is trained here."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from detr_ray.search.population import Move, Population, Report, Values

EPOCHS = 9


def change(values: Values, chance: random.Random) -> Values:
    """Other settings that tell whose they were."""
    return {"lr": values["lr"] * chance.choice([2, 4])}


def population(size: int = 4, **changes: Any) -> Population:
    settings = {"every_epochs": 1, "epochs": EPOCHS, "quantile": 0.25, "mode": "max", "seed": 5, **changes}
    return Population(size, change, **settings)


def members(made: Population, size: int = 4) -> list[str]:
    names = [f"t{number:03d}" for number in range(size)]
    for number, name in enumerate(names):
        made.add(name, {"lr": float(10**number)})
    return names


def report(name: str, epoch: int, value: float, generation: int = 0) -> Report:
    return Report(epoch, epoch * 10, value, f"/runs/{name}-{generation}/checkpoint_{epoch * 10}")


def tell(made: Population, epoch: int, values: Sequence[float]) -> list[Move]:
    """Reports of all trials, of those that are there."""
    moves = []
    for name, value in zip(list(made.members), values, strict=True):
        generation = made.members[name].generation
        moves += made.report(name, generation, report(name, epoch, value, generation))
    return moves


def who(moves: Sequence[Move]) -> list[tuple[str, str]]:
    return [(move.receiver, move.donor) for move in moves]


def test_the_worst_goes_on_from_the_best_with_changed_settings() -> None:
    made = population()
    members(made)
    (move,) = tell(made, 1, [0.3, 0.1, 0.4, 0.2])
    assert (move.receiver, move.donor, move.epoch, move.step) == ("t001", "t002", 1, 10)
    assert (move.generation, move.donor_generation) == (1, 0)
    assert move.checkpoint == "/runs/t002-0/checkpoint_10"
    assert (move.receiver_value, move.donor_value) == (0.1, 0.4)
    assert move.old == {"lr": 10.0} and move.new["lr"] in (200.0, 400.0)
    assert made.members["t001"].values == move.new and made.members["t002"].values == {"lr": 100.0}
    assert made.decided_epoch == 1 and made.moves == [move]


def test_a_round_is_decided_once_all_are_there_and_have_reported() -> None:
    made = population(3)
    for name in ("a", "b"):
        made.add(name, {"lr": 1.0})
        assert made.report(name, 0, report(name, 1, 0.5)) == []
    assert made.decided_epoch == 0, "the third one is not there yet"
    made.add("c", {"lr": 1.0})
    assert made.decided_epoch == 0 and made.report("a", 0, report("a", 2, 0.5)) == []
    moves = made.report("c", 0, report("c", 1, 0.1))
    assert made.decided_epoch == 1 and who(moves) == [("c", "a")]


def test_a_population_that_stays_smaller_is_closed() -> None:
    """Without it, trials that have ended would wait for rounds for ever."""
    made = population(8)
    members(made, 3)
    assert tell(made, 1, [0.3, 0.1, 0.2]) == []
    assert made.end("t003", failed=True) == [], "it never began"
    assert who(made.close()) == [("t001", "t000")] and made.decided_epoch == 1
    assert who(tell(made, 2, [0.1, 0.2, 0.3])) == [("t000", "t002")]


def test_adding_a_trial_again_changes_nothing() -> None:
    made = population()
    members(made)
    (move,) = tell(made, 1, [0.3, 0.1, 0.4, 0.2])
    made.add("t001", {"lr": 7.0})
    assert made.members["t001"].values == move.new and made.members["t001"].generation == 1


def curve(trial: str, values: Values, epoch: int) -> float:
    """A metric that follows from the settings and the epoch, as a training's does."""
    return round(random.Random(f"{trial} {values['lr']} {epoch}").random(), 1)  # with equal ones among them


def live(made: Population, size: int, chance: random.Random, again: Callable[[], Population]) -> Population:
    """Trains all trials to their ends, at speeds that differ: a random one takes the next epoch.

    Those that are moved go back to the round. Now and then the search is interrupted, and goes on in another process.
    """
    names = members(made, size)
    at = dict.fromkeys(names, 0)
    while made.decided_epoch < made.last_round or any(epoch < EPOCHS for epoch in at.values()):
        ahead = [name for name in names if at[name] < EPOCHS]
        assert ahead, "all trials wait at their ends for a round"
        name = chance.choice(ahead)
        member = made.members[name]
        at[name] += 1
        value = curve(name, member.values, at[name])
        for move in made.report(name, member.generation, report(name, at[name], value, member.generation)):
            at[move.receiver] = move.epoch
        if chance.random() < 0.1:
            state, made = json.loads(json.dumps(made.state())), again()
            made.restore(state)
    return made


@pytest.mark.parametrize("size", [3, 4, 5, 6])
@pytest.mark.parametrize("every", [1, 2])
def test_moves_do_not_depend_on_the_order_of_reports(size: int, every: int) -> None:
    """Nor on how far ahead of a round some are, nor on interruptions of the search."""

    def begin() -> Population:
        return population(size, every_epochs=every, quantile=0.4)

    ends = [live(begin(), size, random.Random(attempt), begin) for attempt in range(12)]
    outcomes = [(end.moves, {name: end.ancestry(name) for name in end.members}) for end in ends]
    assert len(outcomes[0][0]) >= 3 and all(other == outcomes[0] for other in outcomes)


def test_what_a_moved_trial_did_after_the_round_counts_no_more() -> None:
    made = population(2, quantile=0.5)
    members(made, 2)
    made.report("t001", 0, report("t001", 1, 0.1))
    made.report("t001", 0, report("t001", 2, 0.9))
    (move,) = made.report("t000", 0, report("t000", 1, 0.5))
    assert move.receiver == "t001"
    assert made.report("t000", 0, report("t000", 2, 0.4)) == [], "t001 has to reach epoch 2 again"
    assert made.report("t001", 0, report("t001", 2, 0.9)) == [], "a report from before the move"
    assert made.decided_epoch == 1
    assert who(made.report("t001", 1, report("t001", 2, 0.3, 1))) == [("t001", "t000")]


def test_one_that_failed_takes_part_no_more() -> None:
    made = population(3, quantile=0.5)
    members(made, 3)
    made.report("t000", 0, report("t000", 1, 0.9))
    made.report("t001", 0, report("t001", 1, 0.5))
    assert who(made.end("t002", failed=True)) == [("t001", "t000")], "nobody waits for it"
    made.end("t000", failed=True)
    made.end("t001", failed=True)
    assert made.decided_epoch == 1 and len(made.moves) == 1


def test_one_that_has_ended_is_not_moved_but_others_are_moved_to_it() -> None:
    made = population(4)
    members(made)
    for name in ("t000", "t001"):
        made.report(name, 0, report(name, 1, {"t000": 0.1, "t001": 0.9}[name]))
        made.report(name, 0, report(name, 2, {"t000": 0.9, "t001": 0.1}[name]))
        made.end(name, failed=False)
    made.report("t002", 0, report("t002", 1, 0.5))
    assert made.report("t003", 0, report("t003", 1, 0.4)) == [], "the worst one has ended"
    made.report("t002", 0, report("t002", 2, 0.05))
    assert who(made.report("t003", 0, report("t003", 2, 0.3))) == [("t002", "t000")]


def test_an_epoch_that_was_passed_without_an_evaluation_counts_as_the_worst() -> None:
    """Its scores could not be computed. Without this, the others would wait for it for ever."""
    made = population(3, quantile=0.5)
    members(made, 3)
    made.report("t000", 0, report("t000", 1, 0.3))
    made.report("t001", 0, report("t001", 1, 0.4))
    assert made.decided_epoch == 0, "t002 may still report it"
    (move,) = made.report("t002", 0, report("t002", 2, 0.9))
    assert (move.receiver, move.donor, move.epoch) == ("t002", "t001", 1)
    assert all(one.checkpoint for one in made.to_release()), "a missing one has no checkpoint"
    restored = population(3, quantile=0.5)
    restored.restore(json.loads(json.dumps(made.state())))
    assert restored.members["t000"] == made.members["t000"] and restored.members["t002"].generation == 1


def test_a_trial_at_its_end_is_not_waited_for() -> None:
    made = population(2, quantile=0.5, epochs=3)
    members(made, 2)
    tell(made, 1, [0.3, 0.3])
    made.report("t000", 0, report("t000", 2, 0.3))
    assert made.wait("t001", 7) == [] and made.decided_epoch == 1, "of a generation that is no more"
    (move,) = made.wait("t001", 0)
    assert (move.receiver, move.donor, move.epoch) == ("t001", "t000", 2) and made.decided_epoch == 2
    assert not made.members["t001"].at_end, "it trains again"


def test_equal_values_move_nobody() -> None:
    made = population()
    members(made)
    assert tell(made, 1, [0.0] * 4) == [] and made.decided_epoch == 1
    assert who(tell(made, 2, [0.0, 0.0, 0.0, 0.1])) == [("t002", "t003")], "of equals, the last one is the worst"


def test_a_value_that_is_no_number_is_the_worst() -> None:
    for mode, best in (("max", "t002"), ("min", "t001")):
        made = population(mode=mode)
        members(made)
        assert who(tell(made, 1, [float("nan"), -5.0, 7.0, 1.0])) == [("t000", best)]
    made = population()
    members(made)
    assert tell(made, 1, [float("nan")] * 4) == []


def test_less_is_better_where_it_is_said_so() -> None:
    made = population(mode="min")
    members(made)
    assert who(tell(made, 1, [0.3, 0.1, 0.4, 0.2])) == [("t002", "t001")]


@pytest.mark.parametrize(("size", "quantile", "moved"), [(4, 0.25, 1), (8, 0.25, 2), (5, 0.5, 2), (3, 0.1, 1),
                                                        (6, 0.5, 3), (2, 0.5, 1)])  # fmt: skip
def test_share_of_the_trials_that_is_moved(size: int, quantile: float, moved: int) -> None:
    made = population(size, quantile=quantile)
    names = members(made, size)
    moves = tell(made, 1, [float(number) for number in range(size)])
    assert {move.receiver for move in moves} == set(names[:moved]) and len(moves) == moved
    assert {move.donor for move in moves} <= set(names[-moved:])


@pytest.mark.parametrize(
    ("epochs", "every", "rounds"),
    [(4, 1, [1, 2, 3]), (5, 2, [2, 4]), (4, 2, [2]), (7, 3, [3, 6]), (3, 3, []), (1, 1, [])],
)
def test_there_is_no_round_at_the_end(epochs: int, every: int, rounds: list[int]) -> None:
    made = population(epochs=epochs, every_epochs=every)
    assert [epoch for epoch in range(epochs + 1) if made.is_round(epoch)] == rounds
    assert made.last_round == max(rounds, default=0)
    members(made)
    seen = []
    for epoch in range(1, epochs + 1):
        seen += [move.epoch for move in tell(made, epoch, [0.1, 0.2, 0.3, 0.4 + epoch])]
    assert sorted(set(seen)) == rounds and made.decided_epoch == made.last_round


def test_checkpoints_are_released_once_nobody_begins_at_them() -> None:
    made = population(2, every_epochs=2, quantile=0.5)
    members(made, 2)

    def released() -> set[str]:
        return {one.checkpoint for one in made.to_release()}

    tell(made, 1, [0.1, 0.2])
    assert released() == {"/runs/t000-0/checkpoint_10", "/runs/t001-0/checkpoint_10"}, "no round follows them"
    before = released()
    (move,) = tell(made, 2, [0.1, 0.2])
    assert released() == before and move.checkpoint == "/runs/t001-0/checkpoint_20"
    tell(made, 3, [0.1, 0.2])
    assert "/runs/t001-0/checkpoint_20" not in released() and "/runs/t000-1/checkpoint_30" in released()
    tell(made, 4, [0.1, 0.2])
    assert "/runs/t001-0/checkpoint_20" in released() and "/runs/t001-0/checkpoint_40" not in released()


def test_ancestry_follows_the_weights() -> None:
    """t000 is moved to t003, t003 to t002 later; then t001 goes on from what t000 became."""
    made = population(quantile=0.2)
    members(made)
    first = tell(made, 1, [0.1, 0.2, 0.3, 0.4])
    second = tell(made, 2, [0.3, 0.35, 0.5, 0.1])
    third = tell(made, 3, [0.9, 0.1, 0.5, 0.3])
    fourth = tell(made, 4, [0.2, 0.8, 0.5, 0.1])
    assert [who(moves) for moves in (first, second, third, fourth)] == [
        [("t000", "t003")], [("t003", "t002")], [("t001", "t000")], [("t003", "t001")],
    ]  # fmt: skip
    assert made.ancestry("t002") == [(0, {"lr": 100.0})]
    assert made.ancestry("t000") == [(0, {"lr": 1000.0}), (10, first[0].new)]
    assert made.ancestry("t001") == [(0, {"lr": 1000.0}), (10, first[0].new), (30, third[0].new)]
    assert made.ancestry("t003") == [*made.ancestry("t001"), (40, fourth[0].new)]
    assert fourth[0].generation == 2 and fourth[0].donor_generation == 1
    assert [made.run_of("t003", made.members["t003"].generation, step) for step in (5, 10, 11, 30, 31, 40, 41)] == [
        ("t003", 0), ("t003", 0), ("t000", 1), ("t000", 1), ("t001", 1), ("t001", 1), ("t003", 2),
    ]  # fmt: skip
    assert made.run_of("t002", 0, 40) == ("t002", 0)


def test_the_seed_decides() -> None:
    def moves(seed: int) -> list[Move]:
        made = population(8, quantile=0.5, seed=seed)
        members(made, 8)
        return [move for epoch in range(1, 6) for move in tell(made, epoch, [float(x) for x in range(8)])]

    assert moves(1) == moves(1) != moves(2)
