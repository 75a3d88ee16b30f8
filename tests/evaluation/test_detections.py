"""The table of detections: what is kept of a model's outputs, and its files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from detr_ray.evaluation import DetectionTable
from detr_ray.structures import Detections

CATEGORY_OF_LABEL = np.array([5, -1, 90])


def one_image(scores: list[float], labels: list[int]) -> Detections:
    """Detections whose left edge is their index."""
    left = torch.arange(len(scores), dtype=torch.float32)
    return Detections(
        scores=torch.tensor(scores),
        labels=torch.tensor(labels, dtype=torch.int64),
        boxes=torch.stack([left, left + 1, left + 3, left + 5], dim=1),
    )


def assert_equal(a: DetectionTable, b: DetectionTable) -> None:
    for name in a.__slots__:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert getattr(a, name).dtype == getattr(b, name).dtype


def test_rows_hold_category_ids_and_xywh_boxes_best_first() -> None:
    images = [one_image([0.2, 0.9, 0.5], [0, 2, 0]), one_image([], []), one_image([0.7], [2])]
    table = DetectionTable.from_detections(torch.tensor([30, 20, 10]), images, CATEGORY_OF_LABEL)
    assert table.image_ids.tolist() == [30, 30, 30, 10]
    assert table.category_ids.tolist() == [90, 5, 5, 90]
    assert table.scores.tolist() == pytest.approx([0.9, 0.5, 0.2, 0.7])
    assert table.boxes_xywh_px.tolist() == [[1, 2, 3, 4], [2, 3, 3, 4], [0, 1, 3, 4], [0, 1, 3, 4]]
    assert (table.image_ids.dtype, table.category_ids.dtype) == (np.int64, np.int64)
    assert (table.boxes_xywh_px.dtype, table.scores.dtype) == (np.float32, np.float32)


def test_labels_without_category_do_not_take_a_place() -> None:
    images = [one_image([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 2]), one_image([0.1, 0.2, 0.3], [0, 0, 0])]
    table = DetectionTable.from_detections([1, 2], images, CATEGORY_OF_LABEL, max_per_image=2)
    assert table.scores.tolist() == pytest.approx([0.8, 0.6, 0.3, 0.2])
    assert table.image_ids.tolist() == [1, 1, 2, 2]


def test_half_precision_outputs_become_float32() -> None:
    image = one_image([0.5], [0])
    image["scores"], image["boxes"] = image["scores"].bfloat16(), image["boxes"].bfloat16()
    table = DetectionTable.from_detections([1], [image], CATEGORY_OF_LABEL)
    assert (table.boxes_xywh_px.dtype, table.scores.dtype) == (np.float32, np.float32)


def test_wrong_lengths_and_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="2 image ids for 1 images"):
        DetectionTable.from_detections([1, 2], [one_image([0.5], [0])], CATEGORY_OF_LABEL)
    with pytest.raises(ValueError, match=r"labels 3\.\.3 are outside the 3 known labels"):
        DetectionTable.from_detections([1], [one_image([0.5], [3])], CATEGORY_OF_LABEL)
    with pytest.raises(ValueError, match="boxes_xywh_px must be"):
        DetectionTable(np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros((2, 4)), np.zeros(1))
    with pytest.raises(ValueError, match="one length"):
        DetectionTable(np.zeros(2, np.int64), np.zeros(1, np.int64), np.zeros((1, 4)), np.zeros(1))


def test_parts_of_any_number_are_put_together() -> None:
    first = DetectionTable.from_detections([1], [one_image([0.5], [0])], CATEGORY_OF_LABEL)
    second = DetectionTable.from_detections([2], [one_image([0.4, 0.6], [0, 2])], CATEGORY_OF_LABEL)
    both = DetectionTable.concat([first, DetectionTable.empty(), second])
    assert both.image_ids.tolist() == [1, 2, 2]
    assert_equal(DetectionTable.concat([]), DetectionTable.empty())
    assert_equal(DetectionTable.from_detections([], [], CATEGORY_OF_LABEL), DetectionTable.empty())
    assert_equal(DetectionTable.concat([second, first]).sorted(), both.sorted())


def test_coco_results_keep_every_digit() -> None:
    table = DetectionTable.from_detections([7], [one_image([1 / 3], [2])], CATEGORY_OF_LABEL)
    (row,) = json.loads(table.coco_results_json())
    assert row == {"image_id": 7, "category_id": 90, "bbox": [0.0, 1.0, 3.0, 4.0], "score": row["score"]}
    assert np.float32(row["score"]) == table.scores[0]
