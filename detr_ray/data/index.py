"""A data set as columns: its images, their sizes, and their boxes.

An index holds no Python object per image or annotation: a million boxes are a few arrays, which are sent to other
processes without being copied. Knows no file format (see `formats/`) and reads no pixels (see `images.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from detr_ray.data.label_map import LabelMap
from detr_ray.data.sample import Instances

MOST_PIXELS_A_SIDE = 2**31 - 1
"""Sizes are kept in 32 bits."""

# A box may end this far outside of its image before it is counted: numbers are rounded in files.
ROUNDING_PX = 0.5

PROBLEMS = {
    "areas_missing": "annotations without a usable area (width x height is taken)",
    "iscrowd_missing": "annotations without 'iscrowd' (0 is taken)",
    "annotation_ids_renumbered": "annotations numbered anew: ids missing or repeated",
    "category_names_repeated": "categories with the name of another one",
    "boxes_not_finite": "boxes with NaN or infinity (left out everywhere)",
    "boxes_clipped": "boxes partly outside of their image (clipped in training)",
    "boxes_outside": "boxes wholly outside of their image (left out in training)",
    "boxes_without_area": "boxes without area (left out in training)",
    "boxes_difficult": "boxes marked difficult (not learnt, and ignored in evaluation)",
    "rows_repeated": "boxes that an image has twice (taken once)",
    "labels_without_image": "annotated images, or label files, that lack their image (left out)",
    "images_without_labels": "images without a label file (taken for images without objects)",
    "images_not_annotated": "images without annotations of their own (left out)",
    "images_without_size": "images whose size cannot be read (left out)",
    "files_repeated": "images whose file is that of another image (each is learnt with its own boxes alone)",
    "images_without_boxes": "images without annotations (kept: all no-object)",
}

COLUMN_TYPES = {
    "image_ids": np.int64,
    "heights": np.int32,
    "widths": np.int32,
    "first_box": np.int64,
    "boxes_xywh_px": np.float64,
    "category_ids": np.int64,
    "areas": np.float64,
    "is_crowd": np.bool_,
    "annotation_ids": np.int64,
}


@dataclass(frozen=True, slots=True, eq=False)
class ShardPlaces:
    """Where the stored bytes of each image lie inside larger files.

    Attributes:
        files: paths or URIs of the shards.
        file_of: ``[I]`` int32, index into ``files``.
        offsets: ``[I]`` int64, first byte of the image in its file.
        lengths: ``[I]`` int64, bytes of the image.
    """

    files: tuple[str, ...]
    file_of: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """The data sets that a merged one is made of.

    Attributes:
        names: what to call each in messages.
        folders: folder or URI of each one's images; empty where the images lie in shards.
        of: ``[I]`` int32, number of the data set that each image is of.
    """

    names: tuple[str, ...]
    folders: tuple[str, ...]
    of: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class DatasetIndex:
    """Images and annotations of one split; ``I`` images by rising id, ``A`` annotations grouped by image.

    Attributes:
        image_ids: ``[I]`` int64, rising.
        heights: ``[I]`` int32, pixels.
        widths: ``[I]`` int32, pixels.
        file_names: ``[I]`` strings, as the annotations have them.
        first_box: ``[I+1]`` int64; the annotations of image ``i`` are the rows ``first_box[i]:first_box[i+1]``.
        boxes_xywh_px: ``[A, 4]`` float64 (left, top, width, height), as in the file (finite; else unchecked).
        category_ids: ``[A]`` int64.
        areas: ``[A]`` float64, square pixels.
        is_crowd: ``[A]`` bool.
        annotation_ids: ``[A]`` int64, unique.
        categories: (id, name) by rising id.
        source: what to call the data set in messages.
        images_root: folder or URI that the file names are relative to; None where the images lie in shards, or in the
            folders of several ``sources``.
        shards: where the images lie in shards; None where they are files in a folder.
        follow_links: whether links in that folder may lead out of it.
        sources: the data sets that this one is merged from (`merging.py`); None where it is one.
        problems: numbers of things that were corrected or left out; the keys are those of `PROBLEMS`. The reader counts
            some; those that the columns show are added when the index is made.
        fingerprint: sha256 of the content: the same wherever it lies, and in each format that gives images these names.
    """

    image_ids: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    file_names: pa.StringArray
    first_box: np.ndarray
    boxes_xywh_px: np.ndarray
    category_ids: np.ndarray
    areas: np.ndarray
    is_crowd: np.ndarray
    annotation_ids: np.ndarray
    categories: tuple[tuple[int, str], ...]
    source: str
    images_root: str | None = None
    shards: ShardPlaces | None = None
    follow_links: bool = False
    sources: Sources | None = None
    problems: dict[str, int] = field(default_factory=dict)
    fingerprint: str = field(init=False)

    @classmethod
    def of_images(
        cls,
        *,
        image_ids: np.ndarray,
        heights: np.ndarray,
        widths: np.ndarray,
        file_names: Sequence[str],
        **others: Any,
    ) -> DatasetIndex:
        """Makes an index of images that have neither annotations nor categories; see `of_annotations`."""
        none = np.zeros(0, np.int64)
        return cls.of_annotations(
            image_ids=image_ids,
            heights=heights,
            widths=widths,
            file_names=file_names,
            annotated_ids=none,
            boxes_xywh_px=np.zeros((0, 4)),
            category_ids=none,
            areas=np.zeros(0),
            is_crowd=np.zeros(0, bool),
            annotation_ids=none,
            categories=(),
            **others,
        )

    @classmethod
    def of_annotations(
        cls,
        *,
        image_ids: np.ndarray,
        heights: np.ndarray,
        widths: np.ndarray,
        file_names: Sequence[str],
        annotated_ids: np.ndarray,
        boxes_xywh_px: np.ndarray,
        category_ids: np.ndarray,
        areas: np.ndarray,
        is_crowd: np.ndarray,
        annotation_ids: np.ndarray,
        **others: Any,
    ) -> DatasetIndex:
        """Makes an index of images and annotations that come in any order.

        Args:
            image_ids: ``[I]``, each once.
            heights: ``[I]`` pixels.
            widths: ``[I]`` pixels.
            file_names: one for each image.
            annotated_ids: ``[A]`` id of the image that each annotation belongs to.
            boxes_xywh_px: ``[A, 4]``, finite.
            category_ids: ``[A]``.
            areas: ``[A]`` square pixels.
            is_crowd: ``[A]``.
            annotation_ids: ``[A]``, unique.
            others: the other attributes of the index.
        """
        image_order = np.argsort(image_ids, kind="stable")
        image_of = np.searchsorted(image_ids, annotated_ids, sorter=image_order)
        box_order = np.argsort(image_of, kind="stable")
        return cls(
            image_ids=image_ids[image_order],
            heights=heights[image_order],
            widths=widths[image_order],
            file_names=pa.array(file_names, pa.string()).take(image_order),
            first_box=np.concatenate([[0], np.bincount(image_of, minlength=len(image_ids)).cumsum()]),
            boxes_xywh_px=boxes_xywh_px[box_order],
            category_ids=category_ids[box_order],
            areas=areas[box_order],
            is_crowd=is_crowd[box_order],
            annotation_ids=annotation_ids[box_order],
            **others,
        )

    def __post_init__(self) -> None:
        for name, dtype in COLUMN_TYPES.items():
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=dtype))
        object.__setattr__(self, "categories", tuple(sorted(self.categories)))
        problems = self.problems | _box_problems(self)
        object.__setattr__(self, "problems", {key: problems[key] for key in PROBLEMS if problems.get(key)})
        object.__setattr__(self, "fingerprint", _fingerprint(self))

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def images_left_out(self) -> int:
        """Number of images that were left out because their size cannot be read; a part has the whole set's number."""
        return self.problems.get("images_without_size", 0)

    def file_name(self, i: int) -> str:
        """File name of image ``i``, as the annotations have it."""
        return self.file_names[i].as_py()

    def first(self, count: int) -> DatasetIndex:
        """The first ``count`` images with their annotations, as a data set of its own.

        Of several sources the first of each are taken: the same share of each, and at least one where ``count`` allows.
        """
        if self.sources is None:
            return self.take(np.arange(min(count, len(self))))
        sizes = np.bincount(self.sources.of, minlength=len(self.sources.names))
        starts = np.concatenate([[0], sizes.cumsum()])
        by_source = np.argsort(self.sources.of, kind="stable")
        place_within = np.empty(len(self))
        of = self.sources.of[by_source]
        place_within[by_source] = (np.arange(len(self)) - starts[of]) / sizes[of]
        return self.take(np.sort(np.argsort(place_within, kind="stable")[:count]))

    def take(self, rows: np.ndarray) -> DatasetIndex:
        """Some of the images with their annotations, as a data set of its own.

        What the reader counted in ``problems`` stays the whole set's number.

        Args:
            rows: ``[n]`` rows of the index, rising.
        """
        counts = np.diff(self.first_box)[rows]
        first_box = np.concatenate([[0], counts.cumsum()])
        starts = np.repeat(self.first_box[rows] - first_box[:-1], counts)
        boxes = starts + np.arange(first_box[-1])
        shards = self.shards
        if shards is not None:
            shards = replace(
                shards,
                file_of=shards.file_of[rows],
                offsets=shards.offsets[rows],
                lengths=shards.lengths[rows],
            )
        sources = self.sources
        if sources is not None:
            sources = replace(sources, of=sources.of[rows])
        return replace(
            self,
            **{name: getattr(self, name)[rows] for name in ("image_ids", "heights", "widths")},
            **{name: getattr(self, name)[boxes] for name in ("boxes_xywh_px", "category_ids", "areas", "is_crowd")},
            file_names=self.file_names.take(pa.array(rows)),
            annotation_ids=self.annotation_ids[boxes],
            first_box=first_box,
            shards=shards,
            sources=sources,
        )

    def without_annotations(self) -> DatasetIndex:
        """The images alone."""
        none = np.zeros(0, np.int64)
        return replace(
            self,
            first_box=np.zeros(len(self) + 1, np.int64),
            boxes_xywh_px=np.zeros((0, 4)),
            category_ids=none,
            areas=np.zeros(0),
            is_crowd=np.zeros(0, bool),
            annotation_ids=none,
            problems={},
        )

    def training_instances(self, i: int, label_map: LabelMap) -> Instances:
        """What is to be learnt from image ``i``: no crowds, boxes clipped to the image, none without area.

        Raises:
            DataError: a category that the label map does not have.
        """
        rows = slice(self.first_box[i], self.first_box[i + 1])
        height, width = int(self.heights[i]), int(self.widths[i])
        boxes = self.boxes_xywh_px[rows].astype(np.float32)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2] = boxes[:, 0::2].clip(0, width)
        boxes[:, 1::2] = boxes[:, 1::2].clip(0, height)
        keep = ~self.is_crowd[rows] & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return Instances(boxes[keep], label_map.labels_of(self.category_ids[rows][keep]), (height, width))


def _box_problems(index: DatasetIndex) -> dict[str, int]:
    counts = np.diff(index.first_box)
    left, top, width, height = index.boxes_xywh_px.T
    image_width, image_height = np.repeat(index.widths, counts), np.repeat(index.heights, counts)
    flat = (width <= 0) | (height <= 0)
    outside = ~flat & ((left >= image_width) | (top >= image_height) | (left + width <= 0) | (top + height <= 0))
    beyond = np.maximum.reduce([-left, -top, left + width - image_width, top + height - image_height])
    return {
        "boxes_without_area": int(flat.sum()),
        "boxes_outside": int(outside.sum()),
        "boxes_clipped": int((~flat & ~outside & (beyond > ROUNDING_PX)).sum()),
        "images_without_boxes": int((counts == 0).sum()),
    }


def _fingerprint(index: DatasetIndex) -> str:
    digest = hashlib.sha256()
    for name in COLUMN_TYPES:
        column = getattr(index, name)
        digest.update(f"{name} {column.dtype.str} {column.shape}\n".encode())
        digest.update(column.tobytes())
    digest.update(json.dumps([index.file_names.to_pylist(), index.categories]).encode())
    return digest.hexdigest()
