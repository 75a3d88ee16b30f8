"""Points of attention can be told apart: those that lie close to each other are enlarged."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes

from detr_ray.viz.attention import Attended, attention_figure

WIDTH, HEIGHT = 200, 100


def drawn(points_px: list[list[float]], box_xyxy_px: list[float]) -> Axes:
    points, box = np.array(points_px), np.array(box_xyxy_px)
    levels = np.zeros(len(points), int)
    one = Attended("cat", np.full(len(points), 0.5), points, levels, (20.0, 20.0), box, "cat")
    return attention_figure(np.zeros((HEIGHT, WIDTH, 3), np.uint8), (HEIGHT, WIDTH), [one], "a title").axes[1]


def test_points_of_a_small_object_are_enlarged() -> None:
    axes = drawn([[10, 8], [30, 12], [-4, 14]], [5, 5, 30, 30])
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert (left, top, right, bottom) == pytest.approx((0, 0, 70, 35)), "with the image's ratio of width and height"
    assert axes.get_title().split("\n") == [
        "1: cat, enlarged",
        "a head's point: at most 50.0%, mean 50.0%",
        "1 of 3 outside of the image, with 33% of the weight",
    ]


def test_points_all_over_the_image_are_shown_in_the_whole_of_it() -> None:
    axes = drawn([[10, 8], [120, 12]], [5, 5, 30, 30])
    assert (*axes.get_xlim(), *axes.get_ylim()) == (0, WIDTH, HEIGHT, 0)
    assert "enlarged" not in axes.get_title() and "outside" not in axes.get_title()
    high = drawn([[10, 8]], [5, 5, 30, 50])
    assert high.get_ylim() == (HEIGHT, 0), "one that is as high as half of the image"


def test_one_place_has_the_image_around_it_too() -> None:
    axes = drawn([[199, 99]], [198, 98, 200, 100])
    assert (axes.get_xlim()[1], axes.get_ylim()[0]) == pytest.approx((WIDTH, HEIGHT)) and axes.get_xlim()[0] < 198
