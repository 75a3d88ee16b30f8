"""Images with annotated and detected boxes on them, side by side in one picture."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GAP = 8
_BACKGROUND = (24, 24, 27)
_ANNOTATION = (255, 255, 255)


@dataclass(frozen=True)
class DrawnBoxes:
    """Boxes of one image.

    Attributes:
        boxes_xywh_px: ``[N, 4]`` left, top, width, height in pixels of the image.
        names: ``[N]`` what each box holds.
        scores: ``[N]`` in 0..1; None for annotations.
    """

    boxes_xywh_px: np.ndarray
    names: Sequence[str]
    scores: np.ndarray | None = None


def detection_grid(
    images: Sequence[np.ndarray],
    annotations: Sequence[DrawnBoxes],
    detections: Sequence[DrawnBoxes],
    columns: int = 4,
    cell_px: int = 256,
) -> Image.Image:
    """Draws images in a grid: annotations as thin white boxes, detections in a colour for each name.

    Args:
        images: ``[H, W, 3]`` uint8 each, of any sizes.
        annotations: one an image.
        detections: one an image.
        columns: images in a row.
        cell_px: each image is scaled to fit a square of this side.
    """
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    pitch = cell_px + _GAP
    picture = Image.new("RGB", (columns * pitch + _GAP, rows * pitch + _GAP), _BACKGROUND)
    for place, (image, truth, found) in enumerate(zip(images, annotations, detections, strict=True)):
        cell = _draw_cell(image, truth, found, cell_px)
        left = _GAP + place % columns * pitch + (cell_px - cell.width) // 2
        top = _GAP + place // columns * pitch + (cell_px - cell.height) // 2
        picture.paste(cell, (left, top))
    return picture


def _draw_cell(image: np.ndarray, truth: DrawnBoxes, found: DrawnBoxes, cell_px: int) -> Image.Image:
    scale = cell_px / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    cell = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(cell)
    for box in truth.boxes_xywh_px:
        draw.rectangle(_corners(box, scale, size), outline=_ANNOTATION, width=1)
    font = ImageFont.load_default(size=max(10, cell_px // 20))
    for number, (box, name) in enumerate(zip(found.boxes_xywh_px, found.names, strict=True)):
        colour = _colour_of(name)
        corners = _corners(box, scale, size)
        draw.rectangle(corners, outline=colour, width=max(2, cell_px // 100))
        text = name if found.scores is None else f"{name} {found.scores[number]:.2f}"
        place = (corners[0] + 2, max(0.0, corners[1]))
        draw.rectangle(draw.textbbox(place, text, font=font), fill=colour)
        draw.text(place, text, fill=(0, 0, 0), font=font)
    return cell


def _corners(box_xywh_px: np.ndarray, scale: float, size: tuple[int, int]) -> tuple[float, float, float, float]:
    left, top, width, height = (float(value) * scale for value in box_xywh_px)
    right, bottom = min(left + width, size[0] - 1), min(top + height, size[1] - 1)
    return (min(max(left, 0), right), min(max(top, 0), bottom), right, bottom)


def _colour_of(name: str) -> tuple[int, int, int]:
    """A bright colour, always the same for a name."""
    hue = sum(ord(letter) * 31**place for place, letter in enumerate(name)) * 0.618 % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.65, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)
