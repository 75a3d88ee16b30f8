"""Reads a COCO annotation file into columns and says what is wrong with it.

Holds to the order of the file; grouping by image and everything that later parts need is `index.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from detr_ray.data.errors import DataError, few
from detr_ray.locations import LocationError, is_remote, read_bytes
from detr_ray.retries import reason_of

Record = dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class CocoColumns:
    """An annotation file as columns, in the order of the file; boxes that are not finite are left out.

    Attributes:
        image_ids, heights, widths: ``[I]`` int64.
        file_names: one a image.
        annotation_ids, box_image_ids, category_ids: ``[A]`` int64.
        boxes_xywh_px: ``[A, 4]`` float64, finite.
        areas: ``[A]`` float64.
        is_crowd: ``[A]`` bool.
        categories: (id, name) by rising id.
        problems: what was put right or left out, counted.
    """

    image_ids: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    file_names: list[str]
    annotation_ids: np.ndarray
    box_image_ids: np.ndarray
    category_ids: np.ndarray
    boxes_xywh_px: np.ndarray
    areas: np.ndarray
    is_crowd: np.ndarray
    categories: tuple[tuple[int, str], ...]
    problems: dict[str, int]


def read_coco_columns(location: str) -> CocoColumns:
    """Reads and checks a COCO instance annotation file.

    Args:
        location: local path or URI.

    Raises:
        DataError: the file is missing, not JSON, not COCO, or contradicts itself; says where and what to do.
    """
    content = _parse(location)
    images = _Records(location, "image", content["images"])
    annotations = _Records(location, "annotation", content["annotations"])
    categories = _read_categories(_Records(location, "category", content["categories"]))

    image_ids = images.integers("id")
    _refuse_duplicates(image_ids, f"{location}: image ids used more than once")
    file_names = images.values("file_name")
    if not all(isinstance(name, str) and name for name in file_names):
        images.blame("has no 'file_name'", lambda record: isinstance(record["file_name"], str) and record["file_name"])

    problems: dict[str, int] = {}
    boxes = annotations.boxes("bbox")
    image_of = annotations.integers("image_id")
    category_ids = annotations.integers("category_id")
    areas = np.array([_number(record.get("area")) for record in annotations.records], dtype=np.float64)
    is_crowd = np.array([bool(record.get("iscrowd") or 0) for record in annotations.records], dtype=bool)
    problems["iscrowd_missing"] = sum(record.get("iscrowd") is None for record in annotations.records)
    annotation_ids, problems["annotation_ids_renumbered"] = _annotation_ids(annotations)
    _refuse_unknown(annotations, image_of, image_ids, "image_id", "images")
    _refuse_unknown(annotations, category_ids, np.array([i for i, _ in categories]), "category_id", "categories")

    finite = np.isfinite(boxes).all(axis=1)
    problems["boxes_not_finite"] = int((~finite).sum())
    boxes, areas = boxes[finite], areas[finite]
    missing = ~(np.isfinite(areas) & (areas >= 0))
    problems["areas_missing"] = int(missing.sum())
    areas[missing] = boxes[missing, 2].clip(min=0) * boxes[missing, 3].clip(min=0)
    names = [name for _, name in categories]
    problems["category_names_repeated"] = len(names) - len(set(names))

    return CocoColumns(
        image_ids=image_ids,
        heights=_read_sides(images, "height"),
        widths=_read_sides(images, "width"),
        file_names=file_names,
        annotation_ids=annotation_ids[finite],
        box_image_ids=image_of[finite],
        category_ids=category_ids[finite],
        boxes_xywh_px=boxes,
        areas=areas,
        is_crowd=is_crowd[finite],
        categories=categories,
        problems=problems,
    )


def _parse(location: str) -> dict[str, list]:
    """The file's three lists, with the outlines of the objects already thrown away."""
    try:
        raw = read_bytes(location)
    except FileNotFoundError as error:
        missing = f"{reason_of(error)} (the annotation file)" if is_remote(location) else "no such annotation file"
        raise DataError(f"{location}: {missing}") from error
    except OSError as error:
        raise DataError(f"{location}: the annotation file cannot be read: {reason_of(error)}") from error
    except LocationError as error:
        raise DataError(str(error)) from error
    try:
        # The outlines are nine tenths of a COCO file; dropping each as soon as it is parsed keeps memory low.
        content = json.loads(raw, object_hook=_without_outline)
    except (ValueError, RecursionError) as error:
        size = f"{len(raw)} bytes"
        raise DataError(f"{location}: broken JSON ({size}): {error}. Was the file copied completely?") from error
    if not isinstance(content, dict):
        raise DataError(f"{location}: not a COCO file: a {type(content).__name__}, not an object with 'images'")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise DataError(
                f"{location}: not a COCO instance file: no list under {key!r} (its keys: {sorted(content)[:8]})"
            )
    if not content["images"]:
        raise DataError(f"{location}: no image in it")
    if not content["categories"]:
        raise DataError(f"{location}: no category in it")
    return content


def _without_outline(record: Record) -> Record:
    record.pop("segmentation", None)
    return record


class _Records:
    """The objects of one list of the file, and the way to name the wrong ones among them."""

    def __init__(self, location: str, noun: str, records: list[Record]) -> None:
        self.location = location
        self.noun = noun
        self.records = records
        strays = [place for place, record in enumerate(records) if not isinstance(record, dict)]
        if strays:
            raise DataError(f"{location}: not a COCO file: {noun} no. {few(strays)} is not an object with keys")

    def __len__(self) -> int:
        return len(self.records)

    def values(self, key: str, advice: str = "") -> list[Any]:
        try:
            return [record[key] for record in self.records]
        except KeyError:
            self.blame(f"has no {key!r}", lambda record: key in record, advice)

    def integers(self, key: str, advice: str = "") -> np.ndarray:
        """A required key as int64; whole floats are taken, text and null are not."""
        column = _whole_numbers(self.values(key, advice))
        if column is None:
            self.blame(
                f"has a {key!r} that is not a whole number",
                lambda record: type(record[key]) is not bool and _whole_numbers([record[key]]) is not None,
                advice,
            )
        return column

    def boxes(self, key: str) -> np.ndarray:
        """A required key as ``[A, 4]`` float64; null counts as NaN."""
        values = self.values(key, "Is this an instance file (not panoptic, not captions)?")
        try:
            column = np.array(values, dtype=np.float64).reshape(len(values), -1)
        except (ValueError, TypeError):
            column = np.zeros((0, 0))
        if len(values) and column.shape != (len(values), 4):
            self.blame(f"has a {key!r} that is not 4 numbers (left, top, width, height)", lambda r: _is_box(r[key]))
        return column.reshape(-1, 4)

    def blame(self, what: str, fine: Callable[[Record], Any], advice: str = "") -> NoReturn:
        """Raises a DataError that names the records which are not fine."""
        wrong = [record.get("id", f"no. {place}") for place, record in enumerate(self.records) if not fine(record)]
        raise DataError(f"{self.location}: {self.noun} {few(wrong)} {what}. {advice}".rstrip(" "))


def _read_categories(categories: _Records) -> tuple[tuple[int, str], ...]:
    ids = categories.integers("id")
    _refuse_duplicates(ids, f"{categories.location}: category ids used more than once")
    return tuple(sorted(zip(ids.tolist(), map(str, categories.values("name")), strict=True)))


def _read_sides(images: _Records, key: str) -> np.ndarray:
    advice = "Batches are planned from these sizes: write the images' real height and width into the file"
    sides = images.integers(key, advice)
    if (sides < 1).any():
        images.blame(f"has a {key!r} below 1 pixel", lambda record: record[key] >= 1, advice)
    return sides


def _annotation_ids(annotations: _Records) -> tuple[np.ndarray, int]:
    """The file's ids, or a running number where they are missing or repeated; and how many were given anew."""
    ids = _whole_numbers([record.get("id") for record in annotations.records])
    if ids is not None and len(np.unique(ids)) == len(ids):
        return ids, 0
    # Nothing but the book-keeping of the evaluation depends on these ids.
    return np.arange(1, len(annotations) + 1, dtype=np.int64), len(annotations)


def _refuse_duplicates(ids: np.ndarray, what: str) -> None:
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        raise DataError(
            f"{what}: {few(unique[counts > 1].tolist())}. Were two files put together? Renumber one of them"
        )


def _refuse_unknown(annotations: _Records, used: np.ndarray, known: np.ndarray, key: str, where: str) -> None:
    if np.isin(used, known).all():
        return
    known_ids = set(known.tolist())
    unknown = sorted(set(used.tolist()) - known_ids)
    annotations.blame(
        f"has a {key!r} that is not among the file's {where} ({few(unknown)})",
        lambda record: record[key] in known_ids,
        f"Add them to {where!r}, or take these annotations out",
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _whole_numbers(values: list[Any]) -> np.ndarray | None:
    """Values as int64; None if one of them is no whole number."""
    if not values:
        return np.zeros(0, dtype=np.int64)
    try:
        column = np.array(values)
    except ValueError:  # lists of unlike length among them
        return None
    if column.ndim != 1 or column.dtype.kind not in "iuf":
        return None
    if column.dtype.kind == "f" and not (np.isfinite(column) & (column == np.floor(column))).all():
        return None
    return column.astype(np.int64)


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(v is None or isinstance(v, int | float) for v in value)
