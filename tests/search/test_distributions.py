"""What is drawn from distributions, and which are refused."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from detr_ray.search.distributions import Distribution, parse_distribution


def drawn(value: dict[str, Any], count: int = 2000) -> list[Any]:
    distribution, rng = parse_distribution(value), random.Random(0)
    return [distribution.draw(rng) for _ in range(count)]


def test_numbers_fill_their_range_evenly() -> None:
    values = drawn({"uniform": [2, 6]})
    assert min(values) == pytest.approx(2, abs=0.02) and max(values) == pytest.approx(6, abs=0.02)
    assert all(2 <= value <= 6 for value in values)
    assert sum(value < 3 for value in values) == pytest.approx(500, abs=70)


def test_logarithms_fill_their_range_evenly() -> None:
    values = drawn({"loguniform": [1e-5, 1e-1]})
    assert all(1e-5 <= value <= 1e-1 for value in values)
    assert sum(value < 1e-4 for value in values) == pytest.approx(500, abs=70)
    assert parse_distribution({"loguniform": [1e-5, 1e-1]}).middle() == pytest.approx(1e-3)
    assert parse_distribution({"loguniform": [1e-5, 1e-1]}).log and not parse_distribution({"uniform": [1, 2]}).log


def test_whole_numbers_include_both_ends() -> None:
    values = drawn({"randint": [3, 5]})
    assert set(values) == {3, 4, 5} and all(isinstance(value, int) for value in values)
    assert values.count(5) == pytest.approx(667, abs=80)


def test_steps_are_decimal_and_begin_at_the_low_end() -> None:
    assert set(drawn({"quniform": [0.1, 0.5, 0.1]})) == {0.1, 0.2, 0.3, 0.4, 0.5}
    assert set(drawn({"quniform": [1, 8, 3]})) == {1, 4, 7}, "8 is on no step"
    assert all(isinstance(value, int) for value in drawn({"quniform": [1, 8, 3]}, 9))
    assert parse_distribution({"quniform": [1, 8, 3]}).ends() == (1, 7)


def test_choices_may_be_anything() -> None:
    values = drawn({"choice": ["cosine", [1, 2], None, 3.5]}, 200)
    assert all(value in values for value in ("cosine", [1, 2], None, 3.5))
    assert not parse_distribution({"choice": ["a", 1]}).is_numeric
    assert not parse_distribution({"choice": [True, False]}).is_numeric
    assert parse_distribution({"grid": [1, 2.5]}).is_numeric


@pytest.mark.parametrize(
    ("distribution", "value", "nearest"),
    [
        ({"uniform": [1, 2]}, 3, 2.0),
        ({"uniform": [1, 2]}, 1.25, 1.25),
        ({"loguniform": [1e-5, 1e-3]}, 1e-6, 1e-5),
        ({"randint": [3, 9]}, 4.6, 5),
        ({"randint": [3, 9]}, 99, 9),
        ({"quniform": [0.1, 0.5, 0.1]}, 0.29999, 0.3),
        ({"quniform": [1, 8, 3]}, 8, 7),
        ({"choice": [1, 10, 100]}, 7, 10),
    ],
)
def test_the_nearest_possible_value(distribution: dict[str, Any], value: float, nearest: float) -> None:
    found = parse_distribution(distribution).nearest(value)
    assert found == nearest and type(found) is type(nearest)


def test_there_is_no_nearest_word() -> None:
    with pytest.raises(ValueError, match="not all numbers"):
        Distribution("choice", values=("a", "b")).nearest(1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"uniform": [1, 1]}, "the range of uniform is empty: 1 to 1"),
        ({"uniform": [2, 1]}, "the range of uniform is reversed: 2 to 1"),
        ({"uniform": [1]}, "must be {uniform: [smallest, largest]} of finite numbers (got {uniform: [1]})"),
        ({"uniform": 1}, "must be {uniform: [smallest, largest]} (got {uniform: 1})"),
        ({"uniform": [1, math.inf]}, "of finite numbers"),
        ({"uniform": [False, True]}, "of finite numbers"),
        ({"uniform": [1, 10**400]}, "of finite numbers"),
        ({"uniform": ["a", "b"]}, "of finite numbers"),
        ({"loguniform": [0, 1]}, "loguniform needs a range above 0, and begins at 0"),
        ({"randint": [1.0, 5]}, "randint needs whole numbers"),
        ({"quniform": [1, 5]}, "must be {quniform: [smallest, largest, step]}"),
        ({"quniform": [1, 5, 0]}, "the step of quniform must be more than 0 and at most 4 (got 0)"),
        ({"quniform": [1, 5, 9]}, "at most 4 (got 9)"),
        ({"choice": []}, "choice needs at least one value"),
        ({"grid": [1, 2, 1]}, "grid names 1 twice"),
        ({"choice": 3}, "must be {choice: [value, value, ...]}"),
        ({"uniform": [1, 2], "log": True}, "a distribution has one key"),
    ],
)
def test_what_is_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_distribution(value)
    assert message in str(caught.value)
