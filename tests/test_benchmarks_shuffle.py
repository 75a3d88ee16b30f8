"""The figures by which the padding benchmark tells a shuffled order from one that is not do tell."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.padding import area_correlation, met_again, order_of, place_correlation, planner_of

EPOCHS, STEPS, BATCH, SHAPES = 12, 64, 8, 4
IMAGES = STEPS * BATCH
SHAPE_OF = np.arange(IMAGES) % SHAPES
ONE_SHAPE = np.zeros(IMAGES, np.int64)


def shuffled(rng: np.random.Generator) -> np.ndarray:
    return np.stack([rng.permutation(IMAGES) for _ in range(EPOCHS)]).reshape(EPOCHS, STEPS, BATCH)


def shuffled_within_shapes(rng: np.random.Generator) -> np.ndarray:
    """Batches of one shape each, anew in each epoch."""
    epochs = []
    for _ in range(EPOCHS):
        images = np.concatenate([rng.permutation(np.flatnonzero(shape == SHAPE_OF)) for shape in range(SHAPES)])
        epochs.append(rng.permutation(images.reshape(STEPS, BATCH)))
    return np.stack(epochs)


def same_batches(rng: np.random.Generator) -> np.ndarray:
    """The batches of the first epoch again and again, in random order."""
    batches = rng.permutation(IMAGES).reshape(STEPS, BATCH)
    return np.stack([rng.permutation(batches) for _ in range(EPOCHS)])


@pytest.mark.parametrize(
    ("order", "by_chance", "beyond_shape"),
    [(shuffled, 1.0, 1.0), (shuffled_within_shapes, SHAPES, 1.0), (same_batches, (IMAGES - 1) / (BATCH - 1), 73.0)],
)
def test_images_that_meet_again_tell_memory_from_sorting(order, by_chance: float, beyond_shape: float) -> None:
    chance, beyond = met_again(order(np.random.default_rng(0)), SHAPE_OF)
    assert chance == pytest.approx(by_chance, rel=0.15)
    assert beyond == pytest.approx(beyond_shape, rel=0.15)


def test_where_all_shapes_are_alike_shape_explains_chance_alone() -> None:
    chance, beyond = met_again(shuffled(np.random.default_rng(1)), ONE_SHAPE)
    assert beyond == pytest.approx(chance)


def test_an_order_kept_over_epochs_shows_in_the_places() -> None:
    fresh = shuffled(np.random.default_rng(0))
    assert abs(place_correlation(fresh)) < 0.05
    assert place_correlation(np.repeat(fresh[:1], EPOCHS, axis=0)) == pytest.approx(1)


def test_sorted_sizes_show_in_successive_steps() -> None:
    areas = np.random.default_rng(0).random((EPOCHS, STEPS))
    assert abs(area_correlation(areas)) < 0.1
    assert area_correlation(np.sort(areas, axis=1)) > 0.9


def test_the_planner_shuffles() -> None:
    rng = np.random.default_rng(0)
    shapes = rng.integers(200, 641, IMAGES), rng.integers(200, 641, IMAGES)
    images, areas = order_of(planner_of(shapes, BATCH), EPOCHS)
    assert (np.sort(images.reshape(EPOCHS, -1)) == np.arange(IMAGES)).all()
    again, _ = met_again(images, ONE_SHAPE)
    assert again < 10, "images share their batches with the same few"
    assert abs(place_correlation(images)) < 0.05
    assert abs(area_correlation(areas)) < 0.15
