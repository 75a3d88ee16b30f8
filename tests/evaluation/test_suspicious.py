"""What makes an annotation suspicious, one case each, and what does not."""

from __future__ import annotations

import numpy as np
import pytest
from test_coco_metrics import detections, ground_truth

from detr_ray.evaluation.suspicious import find_suspicious

A, B, FAR = [10.0, 10.0, 40.0, 40.0], [200.0, 200.0, 60.0, 60.0], [300.0, 20.0, 30.0, 30.0]
SHIFTED = [30.0, 10.0, 40.0, 40.0]
RIGHT = [(10, 1, A, 0.95), (10, 2, B, 0.9)]


def kinds(rows: list, is_crowd: bool = False) -> list[tuple[str, int | None, int | None, float]]:
    truth = ground_truth([[A, B]], [[1, 2]], [[is_crowd, False]])
    return [
        (one.kind, one.annotation, one.detection, round(one.strength, 3))
        for one in find_suspicious(truth, detections(rows))
    ]


def test_what_is_found_as_it_is_annotated_is_not_suspicious() -> None:
    assert kinds(RIGHT) == []
    assert kinds([*RIGHT, (10, 1, A, 0.9), (10, 2, A, 0.8), (10, 1, FAR, 0.6)]) == [], "duplicates, little confidence"


def test_a_confident_detection_where_nothing_is_annotated() -> None:
    assert kinds([*RIGHT, (10, 1, FAR, 0.8)]) == [("no annotation", None, 2, 0.8)]


def test_another_category_than_the_annotated_one() -> None:
    found = [(10, 2, A, 0.9), (10, 1, A, 0.2), RIGHT[1]]
    assert kinds(found) == [("other category", 0, 0, pytest.approx(0.72))]
    assert kinds([*found, (10, 2, A, 0.8)]) == kinds(found), "an annotation is named once"


def test_a_box_that_does_not_fit() -> None:
    assert kinds([(10, 1, SHIFTED, 0.9), RIGHT[1]]) == [("box does not fit", 0, 0, pytest.approx(0.9))]


def test_an_annotation_that_nothing_finds() -> None:
    assert kinds([RIGHT[1]]) == [("never found", 0, None, 1.0)]
    assert kinds([RIGHT[1], (10, 2, A, 0.25)]) == [("never found", 0, None, 0.75)], "of whatever category"
    assert kinds([RIGHT[1], (10, 1, A, 0.35)]) == [], "seen with some confidence"


def test_crowds_are_left_alone() -> None:
    assert kinds([RIGHT[1], (10, 2, [12, 12, 10, 10], 0.9)], is_crowd=True) == []


def test_the_strongest_come_first_over_all_images() -> None:
    truth = ground_truth([[A], [B]], [[1], [1]])
    found = detections([(10, 1, A, 0.9), (10, 1, FAR, 0.75), (11, 1, FAR, 0.85)])
    strengths = [one.strength for one in find_suspicious(truth, found)]
    assert strengths == sorted(strengths, reverse=True)
    assert [(one.kind, one.image_id) for one in find_suspicious(truth, found)] == [
        ("never found", 11), ("no annotation", 11), ("no annotation", 10),
    ]  # fmt: skip
    assert np.isclose(strengths, [1, 0.85, 0.75]).all()


def test_planted_mistakes_are_found_and_nothing_else() -> None:
    """Twenty mistakes in forty images, and detections as a good detector gives them: near, confident, with noise."""
    rng = np.random.default_rng(7)
    boxes = [[[20.0 + 130 * place, 30.0, 60.0, 80.0] for place in range(3)] for _ in range(40)]
    categories = rng.integers(1, 3, (40, 3))
    found = []
    for place, image in enumerate(boxes):
        for box, category in zip(image, categories[place].tolist(), strict=True):
            found.append((10 + place, category, (np.array(box) + rng.normal(0, 2, 4)).tolist(), 0.9))
            found.append((10 + place, 3 - category, (np.array(box) + rng.normal(0, 9, 4)).tolist(), 0.2))
    planted = {}
    for place in range(20):
        image, kind = 10 + 2 * place, ("no annotation", "other category", "box does not fit", "never found")[place % 4]
        planted[image] = kind
        own, labels = boxes[2 * place], categories[2 * place]
        if kind == "no annotation":
            found.append((image, 1, [20.0, 200.0, 60.0, 60.0], 0.8))
        elif kind == "other category":
            labels[1] = 3 - labels[1]
        elif kind == "box does not fit":
            own[1] = [own[1][0] + 35, own[1][1], 60.0, 80.0]
        else:
            own.append([300.0, 300.0, 40.0, 40.0])
    labels = [[*row, 1][: len(image)] for row, image in zip(categories.tolist(), boxes, strict=True)]
    suspicions = find_suspicious(ground_truth(boxes, labels), detections(found))
    assert {one.image_id: one.kind for one in suspicions} == planted and len(suspicions) == 20
