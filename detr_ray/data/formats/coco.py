"""Reads a COCO annotation file into an index, and says what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import numpy as np
import pyarrow as pa

from detr_ray.addresses import LocationError, is_remote
from detr_ray.data.errors import DataError, few
from detr_ray.data.formats.assembly import Reading, complete_sizes
from detr_ray.data.formats.json_records import Record, Records, parse_json, read_categories
from detr_ray.data.images import StoredNames
from detr_ray.data.index import MOST_PIXELS_A_SIDE, DatasetIndex
from detr_ray.locations import read_bytes
from detr_ray.retries import reason_of


def read_coco_index(
    location: str, images_root: str, follow_links: bool = False, reading: Reading | None = None
) -> DatasetIndex:
    """Reads and checks a COCO instance annotation file. Boxes that are not finite are left out.

    Args:
        location: path or URI of the JSON.
        images_root: folder or URI that the file names are relative to; looked into only for images whose size the file
            does not state.
        follow_links: whether links in that folder may lead out of it.
        reading: what happens with images whose size cannot be read; None: they are an error.

    Raises:
        DataError: the file is missing, not JSON, not COCO, or contradicts itself; says where and what to do. Or the
            size of an image cannot be read, unless such are skipped.
    """
    content = _parse(location)
    images = Records(location, "image", content["images"])
    annotations = Records(location, "annotation", content["annotations"])
    categories = read_categories(Records(location, "category", content["categories"]))

    image_ids = images.ids()
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

    stored = StoredNames(pa.array(file_names, pa.string()), images_root, follow_links)
    sizes, problems["images_without_size"] = _sizes(images, stored, reading or Reading())
    has_size = np.asarray(((sizes > 0) & (sizes <= MOST_PIXELS_A_SIDE)).all(axis=1))
    finite = np.isfinite(boxes).all(axis=1)
    problems["boxes_not_finite"] = int((~finite).sum())
    is_kept = finite & np.isin(image_of, image_ids[has_size])
    boxes, areas = boxes[is_kept], areas[is_kept]
    missing = ~(np.isfinite(areas) & (areas >= 0))
    problems["areas_missing"] = int(missing.sum())
    areas[missing] = boxes[missing, 2].clip(min=0) * boxes[missing, 3].clip(min=0)
    names = [name for _, name in categories]
    problems["category_names_repeated"] = len(names) - len(set(names))
    problems["files_repeated"] = len(file_names) - len(set(file_names))

    return DatasetIndex.of_annotations(
        image_ids=image_ids[has_size],
        heights=sizes[has_size, 0],
        widths=sizes[has_size, 1],
        file_names=list(compress(file_names, has_size)),
        annotated_ids=image_of[is_kept],
        boxes_xywh_px=boxes,
        category_ids=category_ids[is_kept],
        areas=areas,
        is_crowd=is_crowd[is_kept],
        annotation_ids=annotation_ids[is_kept],
        categories=categories,
        source=location,
        images_root=images_root,
        follow_links=follow_links,
        problems=problems,
    )


def read_coco_images(location: str, images_root: str, follow_links: bool = False) -> DatasetIndex:
    """Reads which images a COCO file names, and not what is annotated on them; a list of images alone is enough.

    Args:
        location: see `read_coco_index`.
        images_root: see `read_coco_index`.
        follow_links: see `read_coco_index`.

    Raises:
        DataError: see `read_coco_index`.
    """
    images = Records(location, "image", _parse(location, ("images",))["images"])
    file_names = images.texts("file_name")
    stored = StoredNames(pa.array(file_names, pa.string()), images_root, follow_links)
    sizes, _ = _sizes(images, stored, Reading())
    return DatasetIndex.of_images(
        image_ids=images.ids(),
        heights=sizes[:, 0],
        widths=sizes[:, 1],
        file_names=file_names,
        source=location,
        images_root=images_root,
        follow_links=follow_links,
    )


def _parse(location: str, needed: Sequence[str] = ("images", "annotations", "categories")) -> dict[str, list]:
    """The file's lists, without the outlines of the objects."""
    try:
        raw = read_bytes(location)
    except FileNotFoundError as error:
        missing = f"{reason_of(error)} (the annotation file)" if is_remote(location) else "no such annotation file"
        raise DataError(f"{location}: {missing}") from error
    except OSError as error:
        raise DataError(f"{location}: the annotation file cannot be read: {reason_of(error)}") from error
    except LocationError as error:
        raise DataError(str(error)) from error
    # Outlines are nine tenths of a COCO file: each is dropped as soon as it is parsed, which keeps memory low.
    content = parse_json(location, raw, object_hook=_without_outline)
    if not isinstance(content, dict):
        raise DataError(f"{location}: not a COCO file: a {type(content).__name__}, not an object with 'images'")
    for key in needed:
        if not isinstance(content.get(key), list):
            raise DataError(
                f"{location}: not a COCO instance file: no list under {key!r} (its keys: {few(sorted(content), 8)})"
            )
    for key, what in (("images", "image"), ("categories", "category")):
        if key in needed and not content[key]:
            raise DataError(f"{location}: no {what} in it")
    return content


def _without_outline(record: Record) -> Record:
    record.pop("segmentation", None)
    return record


def _sizes(images: Records, stored: StoredNames, reading: Reading) -> tuple[np.ndarray, int]:
    """``[I, 2]`` height and width, and the number of images that have none; see `complete_sizes`."""
    sides = (_stated_sides(images, key) for key in ("height", "width"))
    stated = [(height, width) if height and width else None for height, width in zip(*sides, strict=True)]
    return complete_sizes(stated, stored, images.location, reading)


def _stated_sides(images: Records, key: str) -> list[int]:
    """A side of each image; 0 where the file has none, null or 0, as some tools write."""
    advice = "Batches are planned from these sizes: write the images' real height and width, or null, into the file"
    given = [record | {key: 0} if record.get(key) is None else record for record in images.records]
    records = Records(images.location, images.noun, given)
    sides = records.integers(key, advice)
    if (sides < 0).any():
        records.blame(f"has a {key!r} below 0", lambda record: record[key] >= 0, advice, key)
    if (sides > MOST_PIXELS_A_SIDE).any():
        records.blame(
            f"has a {key!r} above {MOST_PIXELS_A_SIDE} pixels", lambda r: r[key] <= MOST_PIXELS_A_SIDE, advice, key
        )
    found: list[int] = sides.tolist()
    return found


def _annotation_ids(annotations: Records) -> tuple[np.ndarray, int]:
    """The file's ids, or a running number where they are missing or repeated; and how many were given anew."""
    ids = annotations.optional_integers("id", "Number the annotations, or leave their ids out: they are numbered then")
    if ids is not None and len(np.unique(ids)) == len(ids):
        return ids, 0
    # Only the evaluation uses these ids, to tell annotations apart.
    return np.arange(1, len(annotations) + 1, dtype=np.int64), len(annotations)


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
