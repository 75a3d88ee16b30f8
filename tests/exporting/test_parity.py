"""How results of an exported model are compared with the model's."""

from __future__ import annotations

import numpy as np

from detr_ray.exporting.parity import largest_difference

ROWS = np.array([[0.1, 0.2], [0.5, 0.5], [0.9, 0.3]])


def test_the_order_of_rows_does_not_matter() -> None:
    assert largest_difference(ROWS, ROWS[[2, 0, 1]]) == 0


def test_each_row_needs_one_of_its_own() -> None:
    assert np.isclose(largest_difference(ROWS, ROWS[[1, 1]]), 0.4)
    assert largest_difference(ROWS, ROWS[[1]]) == 0


def test_the_largest_difference_of_any_number_counts() -> None:
    moved = ROWS.copy()
    moved[1, 1] += 0.02
    moved[0, 0] -= 0.01
    assert np.isclose(largest_difference(ROWS, moved), 0.02)


def test_what_is_not_finite_or_too_much_never_agrees() -> None:
    broken = ROWS.copy()
    broken[0, 0] = np.nan
    for expected, found in [(ROWS, broken), (broken, ROWS), (ROWS[:2], ROWS)]:
        assert largest_difference(expected, found) == float("inf")
