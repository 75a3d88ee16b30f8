"""An image with boxes on matplotlib axes: what all pictures of images share."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from colorsys import hsv_to_rgb
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from detr_ray.viz.figure import cut, new_figure
from detr_ray.viz.text_places import Place, text_place

CELL_INCHES = 3.2
_LONGEST_TITLE = 52
_TEXT_POINTS = 7
_LETTER = 0.62
"""Mean width of a letter, in sizes of the font; a text is at most so wide."""
_LINE = 1.45
"""Height of a text with its background, in sizes of the font."""
_DARK = 0.45
"""Brightness of a colour, 0 to 1, up to which text on it is white."""


def image_grid(count: int, columns: int = 4, width: float = CELL_INCHES, height: float = CELL_INCHES) -> list[Axes]:
    """Axes without frames for so many images, row by row; all of them are of one new figure.

    Args:
        count: at least one.
        columns: most images in a row.
        width: of each, in inches.
        height: of each, in inches.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = new_figure(columns * width, rows * height)
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(count)]
    for plot in axes:
        plot.set_axis_off()
    return axes


def figure_of(axes: Axes) -> Figure:
    """The figure that axes belong to."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure


def show_image(axes: Axes, pixels: np.ndarray, title: str = "") -> None:
    """Shows ``[H, W, 3]`` uint8 with pixel coordinates: the middle of the first pixel is at (0.5, 0.5)."""
    height, width = pixels.shape[:2]
    axes.imshow(pixels, extent=(0, width, height, 0))
    if title:
        lines = [part for line in title.split("\n") for part in _on_two_lines(line)]
        axes.set_title("\n".join(lines), fontsize=8, parse_math=False)


def _on_two_lines(text: str) -> list[str]:
    """A long text on two lines, of which the second is cut where it is still too long."""
    first, *rest = textwrap.wrap(text, _LONGEST_TITLE) or [""]
    return [first, *([cut(" ".join(rest), _LONGEST_TITLE)] if rest else [])]


def draw_boxes(axes: Axes, boxes_xyxy_px: np.ndarray, texts: Sequence[str], colours: Sequence[Any]) -> None:
    """Draws boxes with a text at a corner of each; texts cover each other only where there is no room for all.

    Args:
        axes: with an image of `show_image`.
        boxes_xyxy_px: ``[N, 4]``.
        texts: one a box; empty for none.
        colours: one a box.
    """
    taken: list[Place] = []
    letter_px = _pixels_of_a_point(axes) * _TEXT_POINTS
    for box, text, colour in zip(boxes_xyxy_px.tolist(), texts, colours, strict=True):
        left, top, right, bottom = box
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec=colour, lw=1.6))
        if text:
            size = (_LETTER * letter_px * len(text), _LINE * letter_px)
            place = text_place(box, size, taken, _room(axes))
            taken.append(place)
            written = axes.text(
                place[0], place[1], text, fontsize=_TEXT_POINTS, color=_readable_on(colour), va="top", parse_math=False,
                clip_on=False, bbox={"fc": colour, "ec": "none", "pad": 0.8, "alpha": 0.8},
            )  # fmt: skip
            written.set_in_layout(False)  # one that sticks out at a side would move all images


def _room(axes: Axes) -> Place:
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    return left, top, right, bottom


def _pixels_of_a_point(axes: Axes) -> float:
    """How many pixels of the image are a point of the picture, about: what titles take of it is not known yet."""
    figure = figure_of(axes)
    spec = axes.get_subplotspec()
    rows, columns = (1, 1) if spec is None else spec.get_gridspec().get_geometry()
    left, top, right, bottom = _room(axes)
    width, height = figure.get_figwidth() / columns, figure.get_figheight() / rows
    return max((right - left) / width, (bottom - top) / height) / 72


def _readable_on(colour: Any) -> str:
    """Black or white, whichever is read more easily on a colour."""
    red, green, blue = to_rgb(colour)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > _DARK else "white"


def label_colour(label: int) -> tuple[float, float, float]:
    """A bright colour of a class; those of classes near each other differ most."""
    red, green, blue = hsv_to_rgb((label * 0.618) % 1, 0.65 if label % 2 else 0.85, 1.0)
    return red, green, blue
