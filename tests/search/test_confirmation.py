"""Whether a difference is more than noise: the exact permutation test against worked examples and scipy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from scipy import stats

from detr_ray.search.confirmation import MOST_SEEDS, MOST_SPLITS, compare, fewest_seeds, reservation
from detr_ray.search.confirmed import CONFIRMATION_FILE, read_confirmation, write_confirmation


def test_three_seeds_can_never_be_enough_and_it_is_said() -> None:
    found = compare([0.9, 0.91, 0.92], [0.1, 0.11, 0.12])
    assert found.p_value == found.smallest_p_value == pytest.approx(0.1)
    assert not found.is_better
    assert "p is at least 0.1" in found.verdict and "at least 4 seeds each (--confirm 4)" in found.verdict
    assert fewest_seeds() == 4


def test_numbers_of_seeds_that_say_nothing_are_known_before() -> None:
    assert [bool(reservation(seeds)) for seeds in (2, 3, 4, MOST_SEEDS)] == [True, True, False, False]
    assert reservation(3).startswith("with so few seeds p is at least 0.1, whatever") and "--confirm 4" in reservation(
        3
    )
    assert math.comb(2 * MOST_SEEDS, MOST_SEEDS) <= MOST_SPLITS < math.comb(2 * MOST_SEEDS + 2, MOST_SEEDS + 1)


def test_four_seeds_that_do_not_overlap_are() -> None:
    found = compare([0.62, 0.63, 0.61, 0.64], [0.58, 0.59, 0.6, 0.57])
    assert found.p_value == pytest.approx(2 / 70)
    assert found.is_better and "is better than the default one by more than noise" in found.verdict
    back = compare([0.58, 0.59, 0.6, 0.57], [0.62, 0.63, 0.61, 0.64])
    assert not back.is_better and "is worse" in back.verdict
    lower = compare([0.58, 0.59, 0.6, 0.57], [0.62, 0.63, 0.61, 0.64], "min")
    assert lower.is_better and "is better" in lower.verdict


def test_samples_that_overlap_are_not() -> None:
    found = compare([0.62, 0.59, 0.61, 0.6], [0.58, 0.61, 0.6, 0.59])
    assert found.p_value > 0.3 and "cannot be told from noise (p is not below 0.05)" in found.verdict
    assert compare([0.5] * 4, [0.5] * 4).p_value == 1


@pytest.mark.parametrize(("first", "second"), [(4, 4), (5, 3), (2, 6)])
def test_p_is_that_of_scipy(first: int, second: int) -> None:
    rng = np.random.default_rng(first)
    for _ in range(5):
        a, b = rng.normal(0.6, 0.02, first), rng.normal(0.58, 0.02, second)

        def distance(x, y, axis):
            return abs(np.mean(x, axis=axis) - np.mean(y, axis=axis))

        expected = stats.permutation_test(
            (a, b), distance, permutation_type="independent", alternative="greater", n_resamples=np.inf, vectorized=True
        ).pvalue
        found = compare(a.tolist(), b.tolist())
        assert found.p_value == pytest.approx(expected)
        assert found.p_value >= found.smallest_p_value


def test_the_smallest_p_can_be_reached_with_other_numbers_of_seeds() -> None:
    apart = compare([1.0, 1.1], [0.1, 0.2, 0.15, 0.12, 0.11, 0.16])
    assert apart.p_value == apart.smallest_p_value == pytest.approx(1 / 28)


def test_the_lines_name_means_and_spreads() -> None:
    lines = compare([0.6, 0.62, 0.64], [0.5, 0.5, 0.53]).lines("val/AP")
    assert lines[0] == "val/AP of the best configuration     0.6200 ± 0.0200 (0.6000, 0.6200, 0.6400)"
    assert lines[1].startswith("val/AP of the default configuration  0.5100 ± 0.0173")
    assert lines[2] == "difference +0.1100, p = 0.1 (exact permutation test, two-sided)"
    assert compare([0.6], [0.5]).lines()[0].endswith("0.6000 (0.6000)")


@pytest.mark.parametrize(
    ("best", "default", "message"),
    [
        ([], [1], "at least one"),
        ([1], [], "at least one"),
        ([float("nan")], [1], "finite"),
        ([1] * 15, [1] * 15, "many"),
    ],
)
def test_what_cannot_be_compared(best: list[float], default: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(best, default)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_what_was_found_is_kept_for_the_configuration_that_it_is_about(
    mode: Literal["max", "min"], tmp_path: Path
) -> None:
    folder = str(tmp_path)
    assert read_confirmation(folder, "t003") is None
    found = compare([0.62, 0.63], [0.58, 0.59], mode)
    write_confirmation(folder, "t003", found)
    assert read_confirmation(folder, "t003") == found and read_confirmation(folder, "t003-g1") is None
    (tmp_path / CONFIRMATION_FILE).write_text('{"run": "t003", "best": []}')
    with pytest.raises(ValueError, match=r"confirmation\.json: damaged"):
        read_confirmation(folder, "t003")
