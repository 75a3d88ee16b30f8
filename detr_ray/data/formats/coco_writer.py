"""Writes annotations in COCO's layout, as `coco_folder` reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from detr_ray.data.formats import coco_folder
from detr_ray.data.formats.coco_folder import usual_places
from detr_ray.data.index import DatasetIndex

NAME = coco_folder.NAME


def image_folder(split: str) -> str:
    """The folder of a split's images below the data set's."""
    return usual_places(split)[1]


def write_annotations(indexes: Mapping[str, DatasetIndex], folder: Path) -> None:
    """Writes the annotation file of each split.

    Args:
        indexes: split -> its index, with names below the folder of images.
        folder: the data set's.
    """
    for split, index in indexes.items():
        path = folder / usual_places(split)[0]
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(_content(index)), encoding="utf-8")


def _content(index: DatasetIndex) -> dict[str, list[dict[str, object]]]:
    names = index.file_names.to_pylist()
    sizes = zip(names, index.image_ids.tolist(), index.heights.tolist(), index.widths.tolist(), strict=True)
    image_of = [
        i for i, count in enumerate((index.first_box[1:] - index.first_box[:-1]).tolist()) for _ in range(count)
    ]
    columns = (index.annotation_ids, index.image_ids[image_of], index.category_ids, index.boxes_xywh_px, index.areas)
    rows = zip(*(column.tolist() for column in (*columns, index.is_crowd)), strict=True)
    return {
        "images": [{"id": i, "file_name": name, "height": height, "width": width} for name, i, height, width in sizes],
        "annotations": [
            {"id": i, "image_id": image, "category_id": kind, "bbox": box, "area": area, "iscrowd": int(crowd)}
            for i, image, kind, box, area, crowd in rows
        ],
        "categories": [{"id": i, "name": name} for i, name in index.categories],
    }
