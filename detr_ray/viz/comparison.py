"""Predictions beside the ground truth, with matched, missed, false and confused ones told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from detr_ray.viz.annotated_image import draw_boxes, figure_of, image_grid, show_image
from detr_ray.viz.figure import write_title

COLOURS = {
    "suspected": "#ff30e0", "matched": "#36d060", "confused": "#ffa020", "false": "#ff4040", "missed": "#40c8ff",
    "ignored": "#909090",
}  # fmt: skip
"""Colour of each outcome, of annotations and of predictions."""
_MEANINGS = {
    "suspected": "looks wrong, and what says so (numbers: which suspicion)",
    "matched": "matched",
    "confused": "confused with another category",
    "false": "false: no annotation is left for it",
    "missed": "missed",
    "ignored": "crowd, or inside of one",
}


@dataclass(frozen=True)
class JudgedBoxes:
    """Boxes of one image, with what became of each.

    Attributes:
        boxes_xyxy_px: ``[N, 4]``.
        texts: ``[N]`` beside each box.
        outcomes: ``[N]`` keys of `COLOURS`.
    """

    boxes_xyxy_px: np.ndarray
    texts: Sequence[str]
    outcomes: Sequence[str]


@dataclass(frozen=True)
class ComparedImage:
    """One image with annotations and predictions.

    Attributes:
        title: which image it is.
        pixels: ``[H, W, 3]`` uint8.
        annotated: its annotations.
        found: its predictions.
    """

    title: str
    pixels: np.ndarray
    annotated: JudgedBoxes
    found: JudgedBoxes


def comparison_figure(images: Sequence[ComparedImage], title: str) -> Figure:
    """Two cells an image: the annotations at the left, the predictions at the right.

    Args:
        images: at least one.
        title: above all.
    """
    heights = [image.pixels.shape[0] / image.pixels.shape[1] for image in images]
    axes = image_grid(2 * len(images), 4 if len(images) > 1 else 2, 3.4, 3.4 * float(np.median(heights)) + 0.4)
    for place, image in enumerate(images):
        left, right = axes[2 * place : 2 * place + 2]
        show_image(left, image.pixels, image.title)
        show_image(right, image.pixels, "predictions")
        for plot, boxes in ((left, image.annotated), (right, image.found)):
            colours = [COLOURS[outcome] for outcome in boxes.outcomes]
            draw_boxes(plot, boxes.boxes_xyxy_px, boxes.texts, colours)
    figure = figure_of(axes[0])
    used = {outcome for image in images for boxes in (image.annotated, image.found) for outcome in boxes.outcomes}
    handles = [Line2D([], [], color=COLOURS[name], lw=3, label=_MEANINGS[name]) for name in COLOURS if name in used]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    write_title(figure, title)
    return figure
