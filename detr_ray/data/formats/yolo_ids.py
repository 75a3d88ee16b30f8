"""A file beside ``data.yaml`` with what YOLO's format cannot express.

``ids.json`` is written when a data set is converted. It holds the ids of images, boxes and categories, and, in COCO's
format, the boxes that rows cannot express: crowds, boxes without area, boxes that end outside of their image, areas of
outlines. Other programs ignore it. An entry is used only if the row of its box is unchanged. Changed rows keep
their values and get new ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from detr_ray.box_arrays import cxcywh_to_xyxy
from detr_ray.data.errors import DataError
from detr_ray.data.formats.assembly import fractions_to_xywh_px
from detr_ray.data.formats.folder import Folder
from detr_ray.data.formats.json_records import Records, parse_json
from detr_ray.data.index import MOST_PIXELS_A_SIDE, DatasetIndex
from detr_ray.printable import printable

IDS_NAME = "ids.json"
FORMAT = 1

_SAME = 1e-6
"""Fraction of a side, and pixels, by which a box may differ from its row: other programs write rows with six digits."""


@dataclass(frozen=True)
class IdTable:
    """Ids of one split.

    Attributes:
        category_ids: id of each class by number.
        image_ids: file name -> id.
        sizes: file name -> (height, width) that the boxes were made on.
        annotation_ids: file name -> ids of its boxes, in their order.
        entries: annotation id -> the whole annotation, if a row cannot express it; ``in_label_file`` says whether there
            is a row as well.
    """

    category_ids: tuple[int, ...]
    image_ids: Mapping[str, int]
    sizes: Mapping[str, tuple[int, int]]
    annotation_ids: Mapping[str, list[int]]
    entries: Mapping[int, dict[str, Any]]

    def restore(self, index: DatasetIndex) -> DatasetIndex:
        """The index with the original ids of its images and boxes, and with the boxes that rows cannot express."""
        names = index.file_names.to_pylist()
        next_image = max(self.image_ids.values(), default=0) + 1
        new = iter(range(next_image, next_image + len(names)))
        image_ids = [self.image_ids[name] if name in self.image_ids else next(new) for name in names]
        rows = _Rows(self, index, image_ids)
        for i, name in enumerate(names):
            rows.add(i, name)
        columns = rows.columns()
        ids = np.array(self.category_ids, np.int64)
        return DatasetIndex.of_annotations(
            image_ids=np.array(image_ids, np.int64),
            heights=index.heights,
            widths=index.widths,
            file_names=names,
            categories=tuple((int(ids[number]), name) for number, name in index.categories),
            source=index.source,
            images_root=index.images_root,
            follow_links=index.follow_links,
            problems=index.problems | {"annotation_ids_renumbered": rows.num_renumbered},
            **columns,
        )


class _Rows:
    """The annotations of an index while their ids are put back."""

    def __init__(self, table: IdTable, index: DatasetIndex, image_ids: list[int]) -> None:
        self._table, self._index, self._image_ids = table, index, image_ids
        known = [*table.entries, *(i for ids in table.annotation_ids.values() for i in ids)]
        self._next_id = max(known, default=0) + 1
        self._found: list[dict[str, Any]] = []
        self._stored: list[tuple[int, int]] = []
        """Place in ``_found`` of each stored entry that has a row, and this row."""
        self.num_renumbered = 0

    def add(self, i: int, name: str) -> None:
        """Adds the annotations of image ``i``."""
        rows = range(self._index.first_box[i], self._index.first_box[i + 1])
        ids, entries = self._table.annotation_ids.get(name, []), self._table.entries
        with_row = [number for number in ids if number not in entries or entries[number]["in_label_file"]]
        if len(with_row) == len(rows):
            row_of = dict(zip(with_row, rows, strict=True))
            self._stored += [
                (place, row_of[number])
                for place, number in enumerate(ids, len(self._found))
                if number in entries and number in row_of
            ]
            self._found += [entries.get(number) or self._of_row(i, row_of[number], number) for number in ids]
            return
        # The label file was changed: its rows replace the stored entries.
        self.num_renumbered += len(rows)
        self._found += [entries[number] for number in ids if number not in with_row]
        self._found += [self._of_row(i, row, self._next_id + place) for place, row in enumerate(rows)]
        self._next_id += len(rows)

    def _of_row(self, i: int, row: int, number: int) -> dict[str, Any]:
        index = self._index
        return annotation_of(index, i, row) | {
            "id": number,
            "image_id": self._image_ids[i],
            "category_id": self._table.category_ids[index.category_ids[row]],
        }

    def columns(self) -> dict[str, np.ndarray]:
        """The annotations as columns."""
        found = self._found
        columns = {
            "annotation_ids": np.array([entry["id"] for entry in found], np.int64),
            "annotated_ids": np.array([entry["image_id"] for entry in found], np.int64),
            "category_ids": np.array([entry["category_id"] for entry in found], np.int64),
            "boxes_xywh_px": np.array([entry["bbox"] for entry in found], np.float64).reshape(-1, 4),
            "areas": np.array([entry["area"] for entry in found], np.float64),
            "is_crowd": np.array([entry["iscrowd"] for entry in found], bool),
        }
        self._replace_changed(columns)
        return columns

    def _replace_changed(self, columns: dict[str, np.ndarray]) -> None:
        """Puts rows in the place of the stored entries that were written otherwise."""
        index, (places, rows) = self._index, np.array(self._stored, np.int64).reshape(-1, 2).T
        image_of = np.searchsorted(index.first_box, rows, side="right") - 1
        sides = np.stack([index.widths, index.heights], axis=1)[image_of].astype(np.float64)
        categories = np.array(self._table.category_ids, np.int64)[index.category_ids[rows]]
        _, written = rows_of(columns["boxes_xywh_px"][places], sides)
        nearness = _SAME * (np.concatenate([sides, sides], axis=1) + 1)
        differs = (np.abs(written - index.boxes_xywh_px[rows]) > nearness).any(axis=1)
        is_changed = differs | (categories != columns["category_ids"][places])
        places, rows = places[is_changed], rows[is_changed]
        columns["annotation_ids"][places] = self._next_id + np.arange(len(places))
        columns["category_ids"][places] = categories[is_changed]
        columns["boxes_xywh_px"][places] = index.boxes_xywh_px[rows]
        columns["areas"][places] = index.areas[rows]
        columns["is_crowd"][places] = index.is_crowd[rows]
        self.num_renumbered += len(places)


def rows_of(boxes_xywh_px: np.ndarray, widths_heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What label files say of boxes, which are clipped to their images.

    Args:
        boxes_xywh_px: ``[A, 4]`` left, top, width, height in pixels.
        widths_heights: ``[A, 2]`` float64, width and height of each box's image.

    Returns:
        ``[A, 4]`` centre and size as fractions of the image's sides; ``[A, 4]`` the box in pixels that is read from it.
    """
    left_top, ends = boxes_xywh_px[:, :2], boxes_xywh_px[:, :2] + boxes_xywh_px[:, 2:]
    start, end = left_top.clip(0, widths_heights), ends.clip(0, widths_heights)
    extent = np.where((start == left_top) & (end == ends), boxes_xywh_px[:, 2:], end - start)
    rows = np.concatenate([(start + extent / 2) / widths_heights, extent / widths_heights], axis=1)
    return rows, fractions_to_xywh_px(cxcywh_to_xyxy(rows), widths_heights)


def annotation_of(index: DatasetIndex, i: int, row: int) -> dict[str, Any]:
    """The annotation at a row, which is of image ``i``, in COCO's form."""
    return {
        "id": int(index.annotation_ids[row]),
        "image_id": int(index.image_ids[i]),
        "category_id": int(index.category_ids[row]),
        "bbox": index.boxes_xywh_px[row].tolist(),
        "area": float(index.areas[row]),
        "iscrowd": int(index.is_crowd[row]),
    }


def read_ids(folder: Folder, split: str) -> IdTable | None:
    """The ids of a split; None where there is no such file, or nothing of this split in it.

    Raises:
        DataError: the file is not what it should be.
    """
    if IDS_NAME not in folder.names():
        return None
    location = folder.location(IDS_NAME)
    content = parse_json(location, folder.content(IDS_NAME))
    broken = DataError(f"{printable(location)}: not what prepare wrote: delete it, and everything is numbered anew")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise broken
    try:
        part = content["splits"].get(split)
        return None if part is None else _table(location, content["category_ids"], part)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise broken from error


def _table(location: str, category_ids: list[Any], part: dict[str, Any]) -> IdTable:
    """The ids of a split from its part of the file.

    Raises:
        ValueError: ids that are no numbers, or used twice; an annotation of an image that does not list it; a box or an
            area that is not finite; a size that no image has. So do the other errors that wrong types lead to.
    """
    categories = Records(location, "category", [{"id": number} for number in category_ids]).ids().tolist()
    images = Records(location, "image", part["images"])
    names, image_ids = images.texts("file_name"), images.ids().tolist()
    sizes = np.stack([images.integers("height"), images.integers("width")], axis=1)
    listed = [list(numbers) for numbers in images.values("annotation_ids")]
    Records(location, "annotation", [{"id": number} for numbers in listed for number in numbers]).ids()
    image_of = {number: image_id for image_id, numbers in zip(image_ids, listed, strict=True) for number in numbers}
    entries = Records(location, "annotation", part["annotations"])
    numbers, (_, num_unflagged) = entries.ids().tolist(), entries.optional_flags("iscrowd")
    entries.optional_floats("area")  # refuses what is no number
    is_sound = (
        len(set(names)) == len(names)
        and ((sizes > 0) & (sizes <= MOST_PIXELS_A_SIDE)).all()
        and [image_of[number] for number in numbers] == entries.integers("image_id").tolist()
        and set(entries.integers("category_id").tolist()) <= set(categories)
        and np.isfinite(entries.boxes("bbox")).all()
        and np.isfinite(np.array(entries.values("area"), np.float64)).all()
        and num_unflagged == 0
        and set(map(type, entries.values("in_label_file"))) <= {bool}
    )
    if not is_sound:
        raise ValueError("contradicts itself")
    return IdTable(
        tuple(categories),
        dict(zip(names, image_ids, strict=True)),
        dict(zip(names, ((height, width) for height, width in sizes.tolist()), strict=True)),
        dict(zip(names, listed, strict=True)),
        dict(zip(numbers, entries.records, strict=True)),
    )


def dump_ids(category_ids: list[int], splits: Mapping[str, dict[str, Any]]) -> bytes:
    """The content of the file."""
    return json.dumps({"format": FORMAT, "category_ids": category_ids, "splits": splits}).encode()
