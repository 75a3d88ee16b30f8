"""Boxes in another convention than COCO's: found where all agree, and never in ordinary data."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from defaults import draw_shapes

from detr_ray.data.formats.coco import read_coco_index
from detr_ray.data.index import DatasetIndex
from detr_ray.data.statistics import find_misreadings


@pytest.fixture(scope="module")
def real(request) -> DatasetIndex:
    coco128 = request.getfixturevalue("coco128")
    return read_coco_index(str(coco128 / "annotations/instances_train2017.json"), str(coco128 / "train2017"))


def with_boxes(index: DatasetIndex, boxes_xywh_px: np.ndarray) -> DatasetIndex:
    return replace(index, boxes_xywh_px=boxes_xywh_px)


def sides(index: DatasetIndex) -> np.ndarray:
    counts = np.diff(index.first_box)
    width, height = np.repeat(index.widths, counts), np.repeat(index.heights, counts)
    return np.stack([width, height, width, height], axis=1)


def corners(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def middles(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], axis=1)


def test_real_annotations_are_plausible(real):
    assert find_misreadings(real) == []
    for count in (1, 2, 5, 20):
        assert find_misreadings(real.first(count)) == []


@pytest.mark.parametrize("seed", [0, 1])
def test_generated_data_is_plausible(tmp_path, seed):
    draw_shapes(tmp_path / "data", num_train=60, num_val=10, seed=seed)
    for split in ("train", "val"):
        path = tmp_path / "data" / "annotations" / f"instances_{split}2017.json"
        assert find_misreadings(read_coco_index(str(path), str(tmp_path))) == []


def drawn(rng: np.random.Generator, kind: str) -> np.ndarray:
    """Boxes in images of 200 by 100 pixels, of sets that are unusual and right."""
    start, end = np.sort(rng.uniform(0, 1, (2, 400, 2)), axis=0) * (200, 100)
    match kind:
        case "anywhere":
            return np.concatenate([start, end - start], axis=1)
        case "whole images":
            return np.tile([0.0, 0, 200, 100], (400, 1))
        case "close-ups that reach a little over the border":
            return np.concatenate([start * 0.05, np.full((400, 2), (205.0, 103.0))], axis=1)
        case "tiny objects":
            return np.concatenate([start, rng.uniform(0.3, 2, (400, 2))], axis=1)
        case "in the upper left corner":
            return np.concatenate([start * 0.01, rng.uniform(5, 60, (400, 2))], axis=1)
        case "whole numbers with a margin":
            return np.concatenate([1 + start.round(), (end - start).round().clip(1)], axis=1)
        case _:
            return np.concatenate([start.round(), (end - start).round().clip(1)], axis=1)


@pytest.mark.parametrize(
    "kind",
    ["anywhere", "whole images", "close-ups that reach a little over the border", "tiny objects",
     "in the upper left corner", "whole numbers with a margin", "whole numbers"],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_unusual_sets_that_are_right_are_left_alone(tmp_path, kind, seed):
    boxes = drawn(np.random.default_rng(seed), kind)
    content = {
        "images": [{"id": k, "file_name": f"{k}.jpg", "height": 100, "width": 200} for k in range(40)],
        "annotations": [{"image_id": k % 40, "category_id": 1, "bbox": box} for k, box in enumerate(boxes.tolist())],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert find_misreadings(read_coco_index(str(tmp_path / "a.json"), str(tmp_path))) == []


@pytest.mark.parametrize("convert", [lambda boxes: boxes, corners, middles])
@pytest.mark.parametrize("count", [1, 128])
def test_normalised_boxes_are_found(real, convert, count):
    index = real.first(count)
    (found,) = find_misreadings(with_boxes(index, convert(index.boxes_xywh_px) / sides(index)))
    assert found.ruins and "normalised" in found.message and "multiply them by width and height" in found.advice


@pytest.mark.parametrize("round_to", [0, 2])
@pytest.mark.parametrize("count", [5, 128])
def test_corners_are_found(real, count, round_to):
    index = real.first(count)
    (found,) = find_misreadings(with_boxes(index, corners(index.boxes_xywh_px).round(round_to)))
    assert found.ruins and "corners" in found.message and "take the first number from the third" in found.advice


def test_sizes_where_corners_ought_to_be_are_found(real):
    boxes = real.boxes_xywh_px
    read_as_corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    (found,) = find_misreadings(with_boxes(real, read_as_corners))
    assert (
        found.ruins and "left, top, width, height, and were read as" in found.message and "left + width" in found.advice
    )
    some = np.where(np.arange(len(boxes))[:, None] % 20 == 0, read_as_corners, boxes)
    assert find_misreadings(with_boxes(real, some)) == [], "errors in single boxes, which are counted"


def test_boxes_counted_from_one_are_found(real):
    boxes = np.rint(real.boxes_xywh_px)
    assert find_misreadings(with_boxes(real, boxes)) == []
    boxes[:, :2] += 1
    (found,) = find_misreadings(with_boxes(real, boxes))
    assert not found.ruins and "counted from 1" in found.message and "take 1 from left and top" in found.advice
