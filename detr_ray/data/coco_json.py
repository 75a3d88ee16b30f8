"""Reads a COCO annotation file into columns and says what is wrong with it.

Holds to the order of the file; grouping by image and everything that later parts need is `index.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detr_ray.data.errors import DataError, few
from detr_ray.data.json_text import parse_json
from detr_ray.data.records import Record, Records
from detr_ray.locations import LocationError, is_remote, read_bytes
from detr_ray.retries import reason_of

MOST_PIXELS_A_SIDE = 2**31 - 1
"""Sizes are kept in 32 bits."""


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
    images = Records(location, "image", content["images"])
    annotations = Records(location, "annotation", content["annotations"])
    categories = read_categories(Records(location, "category", content["categories"]))

    image_ids = images.integers("id")
    _refuse_duplicates(image_ids, f"{location}: image ids used more than once")
    file_names = images.texts("file_name")

    problems: dict[str, int] = {}
    boxes = annotations.boxes("bbox")
    image_of = annotations.integers("image_id")
    category_ids = annotations.integers("category_id")
    areas = annotations.optional_floats("area")
    is_crowd, problems["iscrowd_missing"] = annotations.optional_flags("iscrowd")
    annotation_ids, problems["annotation_ids_renumbered"] = _annotation_ids(annotations)
    _refuse_unknown(annotations, image_of, image_ids, "image_id", "images")
    _refuse_unknown(
        annotations, category_ids, np.array([i for i, _ in categories], np.int64), "category_id", "categories"
    )

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
    # The outlines are nine tenths of a COCO file; dropping each as soon as it is parsed keeps memory low.
    content = parse_json(location, raw, object_hook=_without_outline)
    if not isinstance(content, dict):
        raise DataError(f"{location}: not a COCO file: a {type(content).__name__}, not an object with 'images'")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise DataError(
                f"{location}: not a COCO instance file: no list under {key!r} (its keys: {few(sorted(content), 8)})"
            )
    if not content["images"]:
        raise DataError(f"{location}: no image in it")
    if not content["categories"]:
        raise DataError(f"{location}: no category in it")
    return content


def _without_outline(record: Record) -> Record:
    record.pop("segmentation", None)
    return record


def read_categories(categories: Records) -> tuple[tuple[int, str], ...]:
    """The categories (id, name) by rising id.

    Raises:
        DataError: ids that are not whole or used twice, names that are not text.
    """
    ids = categories.integers("id")
    _refuse_duplicates(ids, f"{categories.location}: category ids used more than once")
    if (ids < 0).any():
        categories.blame("has a negative 'id'", lambda record: record["id"] >= 0, "Number categories from 0 or 1")
    names = categories.texts("name", "Give each category a name, in quotes")
    return tuple(sorted(zip(ids.tolist(), names, strict=True)))


def _read_sides(images: Records, key: str) -> np.ndarray:
    advice = "Batches are planned from these sizes: write the images' real height and width into the file"
    sides = images.integers(key, advice)
    if (sides < 1).any():
        images.blame(f"has a {key!r} below 1 pixel", lambda record: record[key] >= 1, advice, key)
    if (sides > MOST_PIXELS_A_SIDE).any():
        images.blame(
            f"has a {key!r} above {MOST_PIXELS_A_SIDE} pixels", lambda r: r[key] <= MOST_PIXELS_A_SIDE, advice, key
        )
    return sides


def _annotation_ids(annotations: Records) -> tuple[np.ndarray, int]:
    """The file's ids, or a running number where they are missing or repeated; and how many were given anew."""
    ids = annotations.optional_integers("id", "Number the annotations, or leave their ids out: they are numbered then")
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


def _refuse_unknown(annotations: Records, used: np.ndarray, known: np.ndarray, key: str, where: str) -> None:
    if np.isin(used, known).all():
        return
    known_ids = set(known.tolist())
    unknown = sorted(set(used.tolist()) - known_ids)
    annotations.blame(
        f"has a {key!r} that is not among the file's {where} ({few(unknown)})",
        lambda record: record[key] in known_ids,
        f"Add them to {where!r}, or take these annotations out",
    )
