"""How results of an exported model are compared with the model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exported import source

from detr_ray.data.sample import Instances, Picture
from detr_ray.exporting import ExportError
from detr_ray.exporting.parity import check_images, largest_difference

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


def test_resizing_is_compared_pixel_by_pixel() -> None:
    """What is detected is not asked for where pixels are others."""

    def resized(image: np.ndarray, more: int, size: tuple[int, int]) -> np.ndarray:
        nothing = Instances(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), image.shape[:2])
        pixels = Picture(torch.from_numpy(image), nothing).resize(size).pixels.numpy().clip(0, 253)
        return pixels.transpose(2, 0, 1)[None] + np.uint8(more)

    def run(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        raise NotImplementedError

    given = source()  # images of 85 x 119 become 64 x 89
    with pytest.raises(ExportError, match=r"a test: resized pixels differ by \d+ of 255, and 1 is the most"):
        check_images(given, run, lambda image: resized(image, 2, (64, 89)))
    with pytest.raises(ExportError, match=r"a test: resizing gives \(64, 88\) pixels instead of \(64, 89\)"):
        check_images(given, run, lambda image: resized(image, 0, (64, 88)))
