"""Texts beside boxes can be read, equal lines are seen both, and titles have room."""

from __future__ import annotations

import numpy as np

from detr_ray.viz.annotated_image import draw_boxes, figure_of, image_grid, show_image
from detr_ray.viz.curves import RunCurves, schedules_figure
from detr_ray.viz.figure import end_of, new_figure, write_title
from detr_ray.viz.text_places import text_place

ROOM = (0.0, 0.0, 100.0, 80.0)


def test_a_text_stands_above_its_box_where_there_is_room() -> None:
    assert text_place((20, 30, 60, 70), (30, 10), [], ROOM) == (20, 20, 50, 30)
    assert text_place((20, 4, 60, 70), (30, 10), [], ROOM) == (20, 0, 50, 10), "inside of the image"
    assert text_place((90, 30, 99, 70), (30, 10), [], ROOM) == (70, 20, 100, 30)
    assert text_place((20, 30, 60, 70), (130, 10), [], ROOM)[0] == 0, "too long: from the left end on"


def test_texts_of_boxes_at_one_place_take_different_corners() -> None:
    box, places = (20.0, 30.0, 60.0, 70.0), []
    for _ in range(5):
        places.append(text_place(box, (18, 10), places, ROOM))
    corners = [(20, 20), (20, 30), (20, 70), (42, 70), (42, 30)]
    assert [place[:2] for place in places] == corners
    places.append(text_place(box, (18, 10), places, ROOM))
    assert places[-1][:2] == (20, 40), "further down"
    full = [(0.0, 0.0, 100.0, 80.0)]
    assert text_place(box, (18, 10), full, ROOM)[:2] == (20, 20), "no room is left"


def test_no_drawn_text_covers_another_one() -> None:
    """Measured in the finished picture: eight boxes at nearly one place, as a poor detector finds them."""
    axes = image_grid(2)
    boxes = np.array([[60.0 + 3 * number, 50.0 + 2 * number, 150, 140] for number in range(8)])
    for plot in axes:
        show_image(plot, np.zeros((200, 260, 3), np.uint8), "a title")
        draw_boxes(plot, boxes, [f"category {number} 0.50" for number in range(8)], ["red"] * 8)
    figure = figure_of(axes[0])
    figure.canvas.draw()
    for plot in axes:
        extents = [text.get_window_extent() for text in plot.texts]
        assert len(extents) == 8
        assert not any(one.overlaps(other) for place, one in enumerate(extents) for other in extents[:place])


def test_lines_of_equal_values_take_turns() -> None:
    epochs = np.arange(3.0)
    series = {f"loss/weight/{name}": (epochs, np.full(3, value)) for name, value in (("a", 2), ("b", 5), ("c", 2))}
    lines = schedules_figure(RunCurves("a run", series)).axes[1].lines
    assert [line.is_dashed() for line in lines] == [True, False, True]
    assert [line.get_label() for line in lines] == ["a", "b", "c"]


def test_a_run_of_one_record_has_points_that_are_seen() -> None:
    for count in (1, 2):
        series = {"optim/lr": (np.arange(count), np.full(count, 1e-4))}
        (line,) = schedules_figure(RunCurves("a run", series)).axes[0].lines
        assert (line.get_marker() == "o") == (count == 1)


def test_a_long_location_ends_with_what_says_most() -> None:
    assert end_of("runs/a/checkpoints/step_00000010") == "runs/a/checkpoints/step_00000010"
    assert end_of("/a/long/path/to/runs/a/model.pt", 16) == "…runs/a/model.pt"


def test_a_title_takes_as_many_lines_as_it_needs() -> None:
    figure = new_figure(4.0, 3.0)
    write_title(figure, "Decoder attention, layer 2 of 2; image 9, /a/long/path/to/checkpoints/step_00000064/model.pt")
    figure.canvas.draw()
    (title,) = figure.texts
    extent = title.get_window_extent()
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.width and title.get_text().count("\n") >= 1
