"""Writes annotations in YOLO's format, as `yolo` reads them, and in ``ids.json`` what that format cannot express.

Rows are what other programs take: crowds and boxes without area are left out, the others are clipped to their image.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from detr_ray.data.errors import DataError
from detr_ray.data.formats import yolo
from detr_ray.data.formats.folder import is_image, stem
from detr_ray.data.formats.yolo_ids import IDS_NAME, annotation_of, dump_ids, rows_of
from detr_ray.data.index import DatasetIndex
from detr_ray.printable import printable

NAME = yolo.NAME


def image_folder(split: str) -> str:
    """The folder of a split's images below the data set's."""
    return f"images/{split}"


def write_annotations(indexes: Mapping[str, DatasetIndex], folder: Path) -> None:
    """Writes a label file for each image, ``data.yaml`` and ``ids.json``.

    Args:
        indexes: split -> its index, with names below the folder of images; all with the same categories.
        folder: the data set's.

    Raises:
        DataError: file names that are not possible in YOLO: two that differ only in their suffix, or one that is no
            image; or the splits have different categories.
    """
    categories = next(iter(indexes.values())).categories
    if any(index.categories != categories for index in indexes.values()):
        raise DataError("the splits have other categories, which a data.yaml cannot say: give them the same ones")
    splits = {split: _write_split(index, folder, split) for split, index in indexes.items()}
    about = {split: image_folder(split) for split in indexes} | {
        "names": dict(enumerate(name for _, name in categories))
    }
    text = yaml.safe_dump(about, allow_unicode=True, sort_keys=False)
    if yaml.safe_load(text) != about:  # PyYAML reads U+0085 as a line break that it wrote as it is
        text = yaml.safe_dump(about, sort_keys=False)
    (folder / "data.yaml").write_text(text, encoding="utf-8")
    (folder / IDS_NAME).write_bytes(dump_ids([category_id for category_id, _ in categories], splits))


def _write_split(index: DatasetIndex, folder: Path, split: str) -> dict[str, Any]:
    """Writes the label files of a split; gives its part of ``ids.json``."""
    rows, has_row, is_exact = _rows(index)
    numbers = np.searchsorted([category_id for category_id, _ in index.categories], index.category_ids)
    names = index.file_names.to_pylist()
    _refuse_names(names, split)
    images, entries = [], []
    for i, name in enumerate(names):
        here = range(index.first_box[i], index.first_box[i + 1])
        path = folder / yolo.label_names(f"{image_folder(split)}/{name}")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [" ".join([str(numbers[row]), *map(repr, rows[row].tolist())]) for row in here if has_row[row]]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        images.append(
            {
                "id": int(index.image_ids[i]),
                "file_name": name,
                "height": int(index.heights[i]),
                "width": int(index.widths[i]),
                "annotation_ids": index.annotation_ids[here].tolist(),
            }
        )
        entries += [
            annotation_of(index, i, row) | {"in_label_file": bool(has_row[row])} for row in here if not is_exact[row]
        ]
    return {"images": images, "annotations": entries}


def _rows(index: DatasetIndex) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of all boxes.

    Returns:
        ``[A, 4]`` middle and size as fractions; ``[A]`` whether there is a row; ``[A]`` whether the row is complete.
    """
    counts = np.diff(index.first_box)
    sizes = np.stack([np.repeat(index.widths, counts), np.repeat(index.heights, counts)], axis=1).astype(np.float64)
    rows, boxes = rows_of(index.boxes_xywh_px, sizes)
    has_row = ~index.is_crowd & (rows[:, 2:] > 0).all(axis=1)
    is_exact = has_row & (boxes == index.boxes_xywh_px).all(axis=1) & (boxes[:, 2] * boxes[:, 3] == index.areas)
    return rows, has_row, is_exact


def _refuse_names(names: list[str], split: str) -> None:
    stems: dict[str, str] = {}
    for name in names:
        if not is_image(name):
            raise DataError(f"{split}: {printable(name)}: YOLO finds images by suffixes such as .jpg: rename the image")
        if stem(name) in stems:
            raise DataError(
                f"{split}: {printable(stems[stem(name)])} and {printable(name)} would have one label file: rename one "
                "of the images; if both are one file that is listed twice, take one entry out"
            )
        stems[stem(name)] = name
