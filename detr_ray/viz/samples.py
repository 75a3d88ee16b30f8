"""Pictures of training samples: each step of the augmentation, and batches as the model gets them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from detr_ray.box_arrays import cxcywh_to_xyxy
from detr_ray.structures import PaddedBatch
from detr_ray.viz.annotated_image import CELL_INCHES, draw_boxes, figure_of, image_grid, label_colour, show_image
from detr_ray.viz.figure import write_title


@dataclass(frozen=True)
class PicturedImage:
    """An image with its boxes.

    Attributes:
        title: text above the image.
        pixels: ``[H, W, 3]`` uint8.
        boxes_xyxy_px: ``[N, 4]``, in pixels of the image.
        names: ``[N]`` category names.
        labels: ``[N]`` their labels, which decide the colours.
    """

    title: str
    pixels: np.ndarray
    boxes_xyxy_px: np.ndarray
    names: Sequence[str]
    labels: Sequence[int]


def sample_steps(samples: Sequence[Sequence[PicturedImage]]) -> Figure:
    """A row for each sample: the image as stored, and after each step of its augmentation.

    Args:
        samples: at least one, each with at least one picture.
    """
    columns = max(map(len, samples))
    heights = [step.pixels.shape[0] / step.pixels.shape[1] for steps in samples for step in steps]
    axes = image_grid(len(samples) * columns, columns, height=CELL_INCHES * float(np.median(heights)) + 0.5)
    for row, steps in enumerate(samples):
        for place, step in enumerate(steps):
            plot = axes[row * columns + place]
            show_image(plot, step.pixels, step.title)
            draw_boxes(plot, step.boxes_xyxy_px, step.names, [label_colour(label) for label in step.labels])
    return figure_of(axes[0])


def padded_batch(batch: PaddedBatch, names: Sequence[str | None], title: str) -> Figure:
    """A batch as the model gets it: every image in the frame of the batch, with hatched padding and named boxes.

    Args:
        batch: the batch.
        names: one a label.
        title: above all images.
    """
    height, width = batch.images.shape[2:]
    scale = 3.4 / max(height, width)
    axes = image_grid(len(batch.images), 4, max(width * scale, 2.4), height * scale + 0.6)
    ends = np.cumsum(batch.counts)
    for place, (plot, end) in enumerate(zip(axes, ends.tolist(), strict=True)):
        rows = slice(end - int(batch.counts[place]), end)
        own_height, own_width = (int(side) for side in batch.sizes[place])
        stored_height, stored_width = (int(side) for side in batch.orig_sizes[place])
        show_image(
            plot, batch.images[place].transpose(1, 2, 0),
            f"image {batch.image_ids[place]}\n{stored_width} x {stored_height} as stored, "
            f"here {own_width} x {own_height}",
        )  # fmt: skip
        _hatch(plot, (own_width, 0, width - own_width, height))
        _hatch(plot, (0, own_height, own_width, height - own_height))
        own_size = np.array([own_width, own_height, own_width, own_height])
        corners = cxcywh_to_xyxy(batch.boxes_cxcywh[rows]) * own_size
        labels = batch.labels[rows].tolist()
        texts = [names[label] or f"label {label}" for label in labels]
        draw_boxes(plot, corners, texts, [label_colour(label) for label in labels])
    figure = figure_of(axes[0])
    image_pixels = int(batch.sizes.astype(np.int64).prod(axis=1).sum())
    padding = 1 - image_pixels / (len(batch.images) * height * width)
    write_title(figure, f"{title}: {width} x {height} pixels, {padding:.1%} of them padding")
    return figure


def _hatch(axes: Axes, place: tuple[int, int, int, int]) -> None:
    """Marks a region of padding, if there is one."""
    left, top, width, height = place
    if width > 0 and height > 0:
        axes.add_patch(Rectangle((left, top), width, height, fc="#303040", ec="#9090b0", hatch="///", lw=0))
