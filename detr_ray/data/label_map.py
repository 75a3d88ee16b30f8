"""Which row of the classifier stands for which category of the annotation file.

A *label* is a row of the classifier (``0..num_classes-1``, no-object not among them), a *category id* is the number the
annotation file uses. Two spaces exist: ``contiguous`` (labels count the categories in the order of their ids) and
``coco91`` (label == category id, as the published DETR weights have it). Knows nothing of images, boxes or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from detr_ray.data.errors import DataError, few

# fmt: off
COCO_CATEGORIES: dict[int, str] = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}
# fmt: on
COCO_NUM_CLASSES = 91


@dataclass(frozen=True)
class LabelMap:
    """Names and category ids of the labels; stored in every checkpoint.

    Attributes:
        names: one a label; None where no category has the label (the gaps of COCO's ids).
        category_ids: one a label, None in the same places.
    """

    names: tuple[str | None, ...]
    category_ids: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.category_ids):
            raise DataError(f"label map with {len(self.names)} names for {len(self.category_ids)} category ids")
        used = [category_id for category_id in self.category_ids if category_id is not None]
        if not used:
            raise DataError("label map without any category")
        if len(set(used)) != len(used):
            raise DataError(f"label map with a category id used twice: {sorted(used)}")

    @classmethod
    def contiguous(cls, categories: Iterable[tuple[int, str]]) -> LabelMap:
        """Labels 0, 1, 2, ... for the (id, name) categories in the order of their ids."""
        ordered = sorted(categories)
        return cls(tuple(name for _, name in ordered), tuple(category_id for category_id, _ in ordered))

    @classmethod
    def coco91(cls) -> LabelMap:
        """The space of the published weights: 91 labels, equal to the category ids; 11 of them are unused."""
        ids = range(COCO_NUM_CLASSES)
        return cls(tuple(COCO_CATEGORIES.get(i) for i in ids), tuple(i if i in COCO_CATEGORIES else None for i in ids))

    @classmethod
    def for_space(cls, space: str, categories: Sequence[tuple[int, str]], source: str) -> LabelMap:
        """The label map of a data set.

        Args:
            space: ``contiguous`` or ``coco91``.
            categories: (id, name) of the data set.
            source: what to call the data set in messages.

        Raises:
            DataError: ``coco91`` for a data set with categories that are not COCO's; an unknown space.
        """
        if space == "contiguous":
            return cls.contiguous(categories)
        if space != "coco91":
            raise DataError(f"unknown label space {space!r}: contiguous or coco91")
        label_map = cls.coco91()
        differences = label_map._differences(categories)
        if differences:
            raise DataError(
                f"{source}: its categories are not COCO's, so that its labels have no place among the 91 of the "
                f"published weights ({few(differences)}). Set data.label_space=contiguous"
            )
        return label_map

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> LabelMap:
        """Reads what `to_dict` wrote."""
        return cls(tuple(stored["names"]), tuple(stored["category_ids"]))

    def to_dict(self) -> dict[str, list[Any]]:
        """Plain lists, for checkpoints and JSON."""
        return {"names": list(self.names), "category_ids": list(self.category_ids)}

    @property
    def num_classes(self) -> int:
        """Number of labels, unused ones included, no-object not."""
        return len(self.names)

    @property
    def categories(self) -> tuple[tuple[int, str], ...]:
        """(category id, name) of the labels in use."""
        return tuple((i, n) for i, n in zip(self.category_ids, self.names, strict=True) if i is not None)  # type: ignore[misc]

    def labels_of(self, category_ids: np.ndarray) -> np.ndarray:
        """Labels (int64) of category ids, same shape.

        Raises:
            DataError: ids that the map does not have.
        """
        sorted_ids, labels = self._lookup
        places = np.searchsorted(sorted_ids, category_ids).clip(max=len(sorted_ids) - 1)
        unknown = sorted_ids[places] != category_ids
        if unknown.any():
            raise DataError(
                f"category ids {few(sorted({int(i) for i in np.asarray(category_ids)[unknown]}))} are not in the "
                f"label map of {len(sorted_ids)} categories"
            )
        return labels[places]

    def category_ids_of(self, labels: np.ndarray) -> np.ndarray:
        """Category ids (int64) of labels, same shape; -1 for a label that stands for no category."""
        return self._ids[labels]

    def check_covers(self, categories: Sequence[tuple[int, str]], source: str) -> None:
        """Makes sure that a data set (say, the one for validation) has no category that this map does not have.

        Args:
            categories: (id, name) of that data set.
            source: what to call it in messages.

        Raises:
            DataError: a category with an id that is unknown here, or that has another name here.
        """
        differences = self._differences(categories)
        if differences:
            raise DataError(
                f"{source}: its categories do not fit those trained on ({few(differences)}). The ids and names of both "
                "annotation files must agree"
            )

    def _differences(self, categories: Sequence[tuple[int, str]]) -> list[str]:
        known = dict(self.categories)
        found = []
        for category_id, name in sorted(categories):
            if category_id not in known:
                found.append(f"{category_id} {name!r} is not known")
            elif known[category_id].strip().lower() != name.strip().lower():
                found.append(f"{category_id} is {name!r} here and {known[category_id]!r} there")
        return found

    @cached_property
    def _ids(self) -> np.ndarray:
        return np.array([-1 if i is None else i for i in self.category_ids], dtype=np.int64)

    @cached_property
    def _lookup(self) -> tuple[np.ndarray, np.ndarray]:
        """Category ids in use, sorted, and the label of each."""
        labels = np.array([label for label, i in enumerate(self.category_ids) if i is not None], dtype=np.int64)
        order = np.argsort(self._ids[labels], kind="stable")
        return self._ids[labels][order], labels[order]
