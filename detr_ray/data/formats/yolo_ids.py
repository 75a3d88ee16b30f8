"""A file beside ``data.yaml`` with what YOLO's format cannot express.

``ids.json`` is written when a data set is converted. It holds the ids of images, boxes and categories, and, in COCO's
format, the boxes that rows cannot express: crowds, boxes without area, boxes that end outside of their image, areas of
outlines. Other programs ignore it. Rows that were changed since then keep their new values and get new ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from detr_ray.data.errors import DataError
from detr_ray.data.formats.folder import Folder
from detr_ray.data.formats.json_records import Records, parse_json
from detr_ray.data.index import DatasetIndex
from detr_ray.printable import printable

IDS_NAME = "ids.json"
FORMAT = 1


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
        self.num_renumbered = 0

    def add(self, i: int, name: str) -> None:
        """Adds the annotations of image ``i``."""
        rows = range(self._index.first_box[i], self._index.first_box[i + 1])
        ids, entries = self._table.annotation_ids.get(name, []), self._table.entries
        with_row = [number for number in ids if number not in entries or entries[number]["in_label_file"]]
        if len(with_row) == len(rows):
            row_of = dict(zip(with_row, rows, strict=True))
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
        return {
            "annotation_ids": np.array([entry["id"] for entry in found], np.int64),
            "annotated_ids": np.array([entry["image_id"] for entry in found], np.int64),
            "category_ids": np.array([entry["category_id"] for entry in found], np.int64),
            "boxes_xywh_px": np.array([entry["bbox"] for entry in found], np.float64).reshape(-1, 4),
            "areas": np.array([entry["area"] for entry in found], np.float64),
            "is_crowd": np.array([entry["iscrowd"] for entry in found], bool),
        }


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
        if part is None:
            return None
        images = Records(location, "image", part["images"])
        names, ids = images.texts("file_name"), images.ids().tolist()
        entries = Records(location, "annotation", part["annotations"])
        entries.boxes("bbox")
        entries.optional_floats("area")
        entries.optional_flags("iscrowd")
        entries.integers("image_id")
        entries.values("in_label_file")
        if not set(entries.integers("category_id").tolist()) <= set(content["category_ids"]):
            raise broken
        sizes = zip(images.integers("height").tolist(), images.integers("width").tolist(), strict=True)
        return IdTable(
            tuple(int(i) for i in content["category_ids"]),
            dict(zip(names, ids, strict=True)),
            dict(zip(names, sizes, strict=True)),
            {record["file_name"]: list(map(int, record["annotation_ids"])) for record in images.records},
            dict(zip(entries.ids().tolist(), entries.records, strict=True)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise broken from error


def dump_ids(category_ids: list[int], splits: Mapping[str, dict[str, Any]]) -> bytes:
    """The content of the file."""
    return json.dumps({"format": FORMAT, "category_ids": category_ids, "splits": splits}).encode()
