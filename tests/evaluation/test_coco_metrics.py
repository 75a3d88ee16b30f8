"""COCO's numbers: equal to a plain pycocotools script, and defined where that one is not."""

from __future__ import annotations

import json
import threading
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from plain_coco import assert_equal_to_the_last_bit, plain_pycocotools
from pycocotools.coco import COCO

from detr_ray.coco_numbers import COCO_NUMBERS
from detr_ray.evaluation import CocoMetrics, DetectionTable, GroundTruth, evaluate_detections

THREE_SIZES = [[10.0, 10.0, 20.0, 20.0], [40.0, 40.0, 60.0, 60.0], [100.0, 100.0, 200.0, 200.0]]


def read_columns(path: Path) -> GroundTruth:
    """A COCO file as columns, read without the project's own reader."""
    content = json.loads(path.read_text())
    of_image: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    rows = [annotation for annotations in of_image.values() for annotation in annotations]
    return GroundTruth(
        image_ids=np.array([image["id"] for image in content["images"]]),
        first_box=np.cumsum([0, *(len(annotations) for annotations in of_image.values())]),
        boxes_xywh_px=np.array([row["bbox"] for row in rows], dtype=np.float64),
        category_ids=np.array([row["category_id"] for row in rows]),
        areas=np.array([row["area"] for row in rows], dtype=np.float64),
        is_crowd=np.array([row["iscrowd"] for row in rows], dtype=bool),
        annotation_ids=np.array([row["id"] for row in rows]),
        categories=tuple((category["id"], category["name"]) for category in content["categories"]),
    )


def ground_truth(
    boxes_xywh_px: list[list[list[float]]],
    category_ids: list[list[int]] | None = None,
    is_crowd: list[list[bool]] | None = None,
    first_annotation_id: int = 1,
    categories: tuple[tuple[int, str], ...] = ((1, "cat"), (2, "dog")),
) -> GroundTruth:
    """Images 10, 11, ... of 400 x 400 pixels with these boxes."""
    boxes = np.array([box for image in boxes_xywh_px for box in image], dtype=np.float64).reshape(-1, 4)
    categories_of_box = list(chain(*category_ids)) if category_ids else [1] * len(boxes)
    return GroundTruth(
        image_ids=10 + np.arange(len(boxes_xywh_px)),
        first_box=np.cumsum([0, *(len(image) for image in boxes_xywh_px)]),
        boxes_xywh_px=boxes,
        category_ids=np.array(categories_of_box, dtype=np.int64),
        areas=boxes[:, 2] * boxes[:, 3],
        is_crowd=np.array(list(chain(*is_crowd)) if is_crowd else [False] * len(boxes), dtype=bool),
        annotation_ids=first_annotation_id + np.arange(len(boxes)),
        categories=categories,
    )


def detections(rows: list[tuple[int, int, list[float], float]]) -> DetectionTable:
    """Rows of (image id, category id, xywh, score)."""
    return DetectionTable(
        image_ids=np.array([row[0] for row in rows], dtype=np.int64),
        category_ids=np.array([row[1] for row in rows], dtype=np.int64),
        boxes_xywh_px=np.array([row[2] for row in rows], dtype=np.float32).reshape(-1, 4),
        scores=np.array([row[3] for row in rows], dtype=np.float32),
    )


def noisy_detections(truth: GroundTruth, seed: int) -> DetectionTable:
    """Most boxes shifted and rescaled a little, some missed, some of a wrong category, and false ones."""
    rng = np.random.default_rng(seed)
    image_of_box = np.repeat(truth.image_ids, np.diff(truth.first_box))
    rows = np.flatnonzero(rng.random(len(image_of_box)) < 0.85).repeat(3)
    boxes = truth.boxes_xywh_px[rows]
    boxes = boxes * rng.normal(1, 0.08, boxes.shape) + rng.normal(0, 3, boxes.shape)
    boxes[:, 2:] = np.abs(boxes[:, 2:]) + 1
    known = np.array([category_id for category_id, _ in truth.categories])
    categories = np.where(rng.random(len(rows)) < 0.15, rng.choice(known, len(rows)), truth.category_ids[rows])
    return DetectionTable(
        image_ids=image_of_box[rows].astype(np.int64),
        category_ids=categories.astype(np.int64),
        boxes_xywh_px=boxes.astype(np.float32),
        scores=rng.random(len(rows)).astype(np.float32),
    )


@pytest.fixture(scope="module")
def coco128_file(coco128: Path) -> Path:
    return coco128 / "annotations" / "instances_train2017.json"


def test_equals_a_plain_pycocotools_script_on_real_annotations(coco128_file: Path) -> None:
    truth = read_columns(coco128_file)
    assert truth.is_crowd.any(), "the comparison should cover crowd regions"
    found = noisy_detections(truth, seed=3)
    plain = plain_pycocotools(COCO(str(coco128_file)), found)
    metrics = evaluate_detections(truth, found)

    assert list(metrics.summary) == list(COCO_NUMBERS)
    assert_equal_to_the_last_bit(metrics, plain, truth)
    assert 0.05 < metrics.summary["AP"] < 0.95
    assert metrics.images == 128
    assert metrics.boxes == 929
    assert metrics.detections == len(found)


def test_scores_do_not_depend_on_the_order_of_the_detections(coco128_file: Path) -> None:
    truth = read_columns(coco128_file)
    found = noisy_detections(truth, seed=5)
    coarse = DetectionTable(  # many equal scores, which a sort by score alone leaves in the order they came
        found.image_ids, found.category_ids, found.boxes_xywh_px, np.round(found.scores * 4) / 4
    )
    order = np.random.default_rng(0).permutation(len(coarse))
    shuffled = DetectionTable(
        coarse.image_ids[order], coarse.category_ids[order], coarse.boxes_xywh_px[order], coarse.scores[order]
    )
    assert evaluate_detections(truth, shuffled) == evaluate_detections(truth, coarse)


def test_a_box_found_exactly_scores_one_whatever_its_annotation_id() -> None:
    rows = [(10, 1, box, 0.9) for box in THREE_SIZES]
    for first_id in (0, 1):
        metrics = evaluate_detections(ground_truth([THREE_SIZES], first_annotation_id=first_id), detections(rows))
        assert metrics.summary["AP"] == pytest.approx(1.0)
        assert metrics.summary["ARs"] == metrics.summary["ARm"] == metrics.summary["ARl"] == 1.0
        assert metrics.summary["AR1"] == pytest.approx(1 / 3)


def test_no_detections_score_zero_and_not_none() -> None:
    metrics = evaluate_detections(ground_truth([THREE_SIZES, []]), DetectionTable.empty())
    assert set(metrics.summary.values()) == {0.0}
    assert metrics.category_ap == {"cat": 0.0, "dog": None}
    assert metrics.detections == 0


def test_nothing_annotated_gives_no_numbers() -> None:
    metrics = evaluate_detections(ground_truth([[], []]), detections([(10, 1, THREE_SIZES[0], 0.5)]))
    assert set(metrics.summary.values()) == {None}
    assert metrics.as_metrics() == {}
    assert "n/a" in metrics.table()
    assert "2 categories without annotated boxes" in metrics.category_table()


def test_detections_inside_a_crowd_region_are_neither_right_nor_wrong() -> None:
    truth = ground_truth([[THREE_SIZES[2], [0.0, 0.0, 90.0, 90.0]]], is_crowd=[[False, True]])
    inside = [(10, 1, [5.0 + 20 * i, 5.0, 15.0, 40.0], 0.95) for i in range(4)]
    right = (10, 1, THREE_SIZES[2], 0.9)
    outside = (10, 1, [300.0, 300.0, 50.0, 50.0], 0.95)
    assert evaluate_detections(truth, detections([right, *inside])).ap == pytest.approx(1.0)
    assert evaluate_detections(truth, detections([right, outside])).ap == pytest.approx(0.5)
    assert evaluate_detections(truth, detections([right])).boxes == 1


def test_annotations_that_are_not_numbers_match_nothing(caplog: pytest.LogCaptureFixture) -> None:
    truth = ground_truth([[[np.nan, 0.0, 10.0, 10.0], THREE_SIZES[1]]])
    rows = [(10, 1, THREE_SIZES[1], 0.5), (10, 1, [300.0, 300.0, 50.0, 50.0], 0.9)]
    assert evaluate_detections(truth, detections(rows)).ap == pytest.approx(0.5)
    assert "annotation 1 of image 10" in caplog.text


def test_unknown_images_are_refused() -> None:
    truth = ground_truth([THREE_SIZES])
    with pytest.raises(ValueError, match=r"detections: 1 images are not in the ground truth, e\.g\. image id 77"):
        evaluate_detections(truth, detections([(77, 1, THREE_SIZES[0], 0.5)]))


@pytest.mark.parametrize(("box", "score"), [([1.0, np.nan, 5.0, 5.0], 0.5), ([1.0, 1.0, 5.0, 5.0], np.inf)])
def test_detections_that_are_not_numbers_are_refused(box: list[float], score: float) -> None:
    with pytest.raises(ValueError, match=r"1 detections are not finite numbers, e\.g\. in image id 10"):
        evaluate_detections(ground_truth([THREE_SIZES]), detections([(10, 1, box, score)]))


def test_malformed_columns_are_refused() -> None:
    truth = ground_truth([THREE_SIZES, []])
    columns = {name: getattr(truth, name) for name in truth.__slots__}
    with pytest.raises(ValueError, match="image id 10 is there 2 times"):
        GroundTruth(**columns | {"image_ids": np.array([10, 10])})
    with pytest.raises(ValueError, match="first_box"):
        GroundTruth(**columns | {"first_box": np.array([0, 1])})
    with pytest.raises(ValueError, match=r"areas must be \[3\]"):
        GroundTruth(**columns | {"areas": np.zeros(2)})


def test_columns_can_be_taken_from_another_object() -> None:
    class Index:
        pass

    truth = ground_truth([THREE_SIZES])
    index = Index()
    for name in truth.__slots__:
        setattr(index, name, getattr(truth, name))
    assert GroundTruth.from_columns(index).boxes_xywh_px is truth.boxes_xywh_px


def test_metric_names_and_tables() -> None:
    truth = ground_truth(
        [[*THREE_SIZES]],
        category_ids=[[1, 3, 4]],
        categories=((1, "cat"), (2, "dog"), (3, "cat"), (4, "traffic light")),
    )
    found = detections([(10, 1, THREE_SIZES[0], 0.9), (10, 3, THREE_SIZES[1], 0.8)])
    metrics = evaluate_detections(truth, found)
    named = metrics.as_metrics()
    assert named["val/AP"] == metrics.ap == pytest.approx(2 / 3)
    assert {name for name in named if name.startswith("val/AP/")} == {
        "val/AP/cat 1",
        "val/AP/cat 3",
        "val/AP/traffic light",
    }
    assert set(metrics.as_metrics("test/")) == {name.replace("val/", "test/") for name in named}
    table = metrics.table()
    assert [line.split()[0] for line in table.splitlines()[:12]] == list(COCO_NUMBERS)
    assert " 0.667 " in table.splitlines()[0]
    assert table.splitlines()[-1] == "1 images, 3 annotated boxes, 2 detections"
    best_first = metrics.category_table().splitlines()
    assert [line[:13].strip() for line in best_first[:-1]] == ["category", "cat 1", "cat 3", "traffic light"]
    assert best_first[-1] == "1 category without annotated boxes"


def test_two_threads_score_at_once_and_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    truth = ground_truth([THREE_SIZES] * 100)
    found = detections([(10 + i, 1, box, 0.5) for i in range(100) for box in THREE_SIZES])
    results: list[CocoMetrics] = []
    threads = [threading.Thread(target=lambda: results.append(evaluate_detections(truth, found))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert capsys.readouterr().out == ""
