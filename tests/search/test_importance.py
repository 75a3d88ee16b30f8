"""Which settings mattered, against worked examples."""

from __future__ import annotations

import random

import pytest

from detr_ray.search import Trial
from detr_ray.search.distributions import Distribution
from detr_ray.search.importance import ETA_SQUARED, SPEARMAN, importance
from detr_ray.search.tables import importance_table

PARAMETERS = {
    "optim.lr": Distribution("loguniform", 1e-5, 1e-3),
    "loss.giou": Distribution("uniform", 1, 4),
    "optim.schedule": Distribution("choice", values=("step", "cosine")),
    "same": Distribution("choice", values=(1, 2)),
}


def trials(*rows: tuple[float, float, str, float | None]) -> list[Trial]:
    return [
        Trial(f"t{n:03d}", {"optim.lr": lr, "loss.giou": giou, "optim.schedule": schedule, "same": 1}, best=best)
        for n, (lr, giou, schedule, best) in enumerate(rows)
    ]


SIX = trials(
    (1e-5, 4, "step", 0.1), (3e-5, 3, "step", 0.3), (4e-5, 1, "step", 0.2), (1e-4, 2, "cosine", 0.5),
    (5e-4, 3.5, "cosine", 0.6), (9e-4, 1.5, "cosine", 0.4), (9e-4, 1, "cosine", None),
)  # fmt: skip


def test_ranks_are_compared() -> None:
    found = importance(SIX, PARAMETERS)
    assert found.num_trials == 6, "the one without a metric is left out"
    by_name = {one.name: one for one in found.parameters}
    assert set(by_name) == {"optim.lr", "loss.giou", "optim.schedule"}, "one never differed"
    # Ranks of lr 1..6 against those of the metric 1 3 2 5 6 4: 1 - 6 * (1 + 1 + 1 + 1 + 4) / (6 * 35).
    assert by_name["optim.lr"].value == pytest.approx(1 - 6 * 8 / 210)
    assert by_name["optim.lr"].measure == SPEARMAN
    # Ranks of step: 1, 2, 3; of cosine: 4, 5, 6. Between: 6 * 1.5 ** 2; in all: 17.5.
    assert by_name["optim.schedule"].value == pytest.approx(6 * 1.5**2 / 17.5)
    assert by_name["optim.schedule"].measure == ETA_SQUARED
    assert [one.name for one in found.parameters] == ["optim.schedule", "optim.lr", "loss.giou"]


def test_what_it_says_of_few_trials() -> None:
    assert importance(SIX[:3], PARAMETERS).parameters == ()
    assert "too few" in importance(SIX[:3], PARAMETERS).reservation
    # The table of critical values of a correlation of 6 pairs, two-sided 0.05, says 0.811.
    assert "A correlation below 0.81 " in importance(SIX, PARAMETERS).reservation
    assert "A correlation below 0.36 " in importance(SIX[:6] * 5, PARAMETERS).reservation


def test_the_sign_says_which_direction_was_better_and_is_shown() -> None:
    worse = trials(*((10.0**-n, 2, "step", 0.1 * n) for n in range(1, 6)))
    (one,) = importance(worse, PARAMETERS).parameters
    assert one.value == pytest.approx(-1) and one.strength == pytest.approx(1)
    table = importance_table(importance(worse, PARAMETERS)).splitlines()
    assert table[0].split() == ["parameter", "importance", "p", "measure"]
    assert table[1].split()[:2] == ["optim.lr", "-1.00"] and table[1].endswith("Spearman's rank correlation")
    assert table[2].startswith("5 trials were compared.")


def test_metrics_that_are_all_equal_say_nothing() -> None:
    equal = trials(*((10.0**-n, n, "step", 0.5) for n in range(5)))
    assert importance(equal, PARAMETERS).parameters == ()


def test_what_does_not_matter_is_rarely_significant() -> None:
    rng = random.Random(0)
    found = 0
    for _ in range(200):
        rows = trials(*((rng.random(), 1, "step", rng.random()) for _ in range(12)))
        (one,) = importance(rows, PARAMETERS).parameters
        found += one.p_value is not None and one.p_value < 0.05
    assert found <= 20
