"""A picture of several images with annotated and detected boxes."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from detr_ray.box_arrays import xywh_to_xyxy
from detr_ray.config.errors import ConfigError
from detr_ray.viz.text_places import Place, text_place

# Suffix of the file name -> format, and largest side in pixels (JPEG's limit for formats without a limit).
_FORMATS = {
    ".png": ("PNG", 65_500),
    ".jpg": ("JPEG", 65_500),
    ".jpeg": ("JPEG", 65_500),
    ".bmp": ("BMP", 65_500),
    ".tif": ("TIFF", 65_500),
    ".tiff": ("TIFF", 65_500),
    ".webp": ("WEBP", 16_383),
}
_COLUMNS, _CELL_PX = 4, 256
_GAP = 8
_BACKGROUND = (24, 24, 27)
_ANNOTATION = (255, 255, 255)


@dataclass(frozen=True)
class DrawnBoxes:
    """Boxes of one image.

    Attributes:
        boxes_xywh_px: ``[N, 4]`` left, top, width, height in pixels of the image.
        names: ``[N]`` category names.
        scores: ``[N]`` in 0..1; None for annotations.
    """

    boxes_xywh_px: np.ndarray
    names: Sequence[str]
    scores: np.ndarray | None = None


def picture_format(location: str) -> str:
    """Pillow's name of the format, by the suffix of the file name.

    Raises:
        ConfigError: an unknown suffix, or none.
    """
    return _format_of(location)[0]


def check_picture(location: str, count: int) -> None:
    """Checks that the format is known and that a picture of ``count`` images is not too large for it.

    Raises:
        ConfigError: it is not known, or the picture would be too large.
    """
    _, longest_side = _format_of(location)
    most = (longest_side - _GAP) // (_CELL_PX + _GAP) * _COLUMNS
    if count > most:
        raise ConfigError(f"--picture-images: {location} has room for {most} images, not for {count}")


def _format_of(location: str) -> tuple[str, int]:
    ending = PurePosixPath(location.partition("?")[0] if "://" in location else location).suffix
    if ending.lower() not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise ConfigError(f"--picture: {location} names no format that pictures are written in: it must end in {known}")
    return _FORMATS[ending.lower()]


def detection_grid(
    images: Iterable[np.ndarray], annotations: Sequence[DrawnBoxes], detections: Sequence[DrawnBoxes]
) -> Image.Image:
    """Draws images in a grid: annotations as thin white boxes, detections in one colour for each category.

    Args:
        images: ``[H, W, 3]`` uint8 each, of any sizes; read one at a time.
        annotations: of each image.
        detections: of each image.
    """
    columns = max(1, min(_COLUMNS, len(annotations)))
    rows = -(-len(annotations) // columns)
    pitch = _CELL_PX + _GAP
    picture = Image.new("RGB", (columns * pitch + _GAP, rows * pitch + _GAP), _BACKGROUND)
    for place, (image, truth, found) in enumerate(zip(images, annotations, detections, strict=True)):
        cell = _draw_cell(image, truth, found)
        left = _GAP + place % columns * pitch + (_CELL_PX - cell.width) // 2
        top = _GAP + place // columns * pitch + (_CELL_PX - cell.height) // 2
        picture.paste(cell, (left, top))
    return picture


def detection_picture(image: np.ndarray, found: DrawnBoxes) -> Image.Image:
    """Draws what was found on an image, at the image's own size.

    Args:
        image: ``[H, W, 3]`` uint8.
        found: the boxes.
    """
    return _draw(Image.fromarray(image), 1.0, None, found)


def _draw_cell(image: np.ndarray, truth: DrawnBoxes, found: DrawnBoxes) -> Image.Image:
    scale = _CELL_PX / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return _draw(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), scale, truth, found)


def _draw(cell: Image.Image, scale: float, truth: DrawnBoxes | None, found: DrawnBoxes) -> Image.Image:
    """Draws boxes onto a picture that is ``scale`` times as large as the image that they are of."""
    size = cell.size
    draw = ImageDraw.Draw(cell)
    for corners in [] if truth is None else _corners(truth, scale, size):
        draw.rectangle(corners, outline=_ANNOTATION, width=1)
    corners_of = _corners(found, scale, size)
    for corners, name in zip(corners_of, found.names, strict=True):
        draw.rectangle(corners, outline=_colour_of(name), width=2)
    font = ImageFont.load_default(size=12)
    taken: list[Place] = []
    for number, (corners, name) in enumerate(zip(corners_of, found.names, strict=True)):
        text = name if found.scores is None else f"{name} {found.scores[number]:.2f}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        place = text_place(corners, (right - left + 2, bottom - top + 2), taken, (0, 0, *size))
        taken.append(place)
        draw.rectangle(place, fill=_colour_of(name))
        draw.text((place[0] + 1 - left, place[1] + 1 - top), text, fill=(0, 0, 0), font=font)
    return cell


def _corners(boxes: DrawnBoxes, scale: float, size: tuple[int, int]) -> list[tuple[float, float, float, float]]:
    """The boxes' corners in a picture of (width, height), in which all of them lie."""
    corners = xywh_to_xyxy(boxes.boxes_xywh_px.astype(np.float64) * scale)
    ends = np.minimum(corners[:, 2:], np.subtract(size, 1))
    starts = np.minimum(np.maximum(corners[:, :2], 0), ends)
    return [(left, top, right, bottom) for left, top, right, bottom in np.concatenate([starts, ends], axis=1).tolist()]


def _colour_of(name: str) -> tuple[int, int, int]:
    """A bright colour that depends only on the name."""
    hue = sum(ord(letter) * 31**place for place, letter in enumerate(name)) * 0.618 % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.65, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)
