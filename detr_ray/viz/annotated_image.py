"""An image with boxes on matplotlib axes: what all pictures of images share."""

from __future__ import annotations

from collections.abc import Sequence
from colorsys import hsv_to_rgb
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from detr_ray.viz.figure import new_figure

CELL_INCHES = 3.2
_LONGEST_TITLE = 46
_TEXT_SHARE = 0.05  # of the image's height: nearer to the top, texts would cover the title


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
        axes.set_title("\n".join(map(_cut, title.split("\n"))), fontsize=8, parse_math=False)


def _cut(line: str) -> str:
    return line if len(line) <= _LONGEST_TITLE else f"{line[: _LONGEST_TITLE - 1]}…"


def draw_boxes(
    axes: Axes,
    boxes_xyxy_px: np.ndarray,
    texts: Sequence[str],
    colours: Sequence[Any],
    *,
    dashed: bool = False,
    width: float = 1.6,
) -> None:
    """Draws boxes with a text at the upper left corner of each.

    Args:
        axes: with an image of `show_image`.
        boxes_xyxy_px: ``[N, 4]``.
        texts: one a box; empty for none.
        colours: one a box.
        dashed: with dashed lines.
        width: of the lines, in points.
    """
    below = _TEXT_SHARE * abs(axes.get_ylim()[0] - axes.get_ylim()[1])
    for (left, top, right, bottom), text, colour in zip(boxes_xyxy_px.tolist(), texts, colours, strict=True):
        style = "--" if dashed else "-"
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec=colour, lw=width, ls=style))
        if text:
            written = axes.text(
                left, top, text, fontsize=7, color="black", va="bottom" if top > below else "top", parse_math=False,
                clip_on=False, bbox={"fc": colour, "ec": "none", "pad": 0.8, "alpha": 0.8},
            )  # fmt: skip
            written.set_in_layout(False)  # one that sticks out at a side would move all images


def label_colour(label: int) -> tuple[float, float, float]:
    """A bright colour of a class; those of classes near each other differ most."""
    red, green, blue = hsv_to_rgb((label * 0.618) % 1, 0.65 if label % 2 else 0.85, 1.0)
    return red, green, blue
