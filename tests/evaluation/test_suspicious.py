"""What makes an annotation suspicious, one case each, and what does not; and how many planted mistakes are found."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from test_coco_metrics import detections, ground_truth

from detr_ray.evaluation import DetectionTable, GroundTruth
from detr_ray.evaluation.suspicious import find_suspicious

A, B, FAR = [10.0, 10.0, 40.0, 40.0], [200.0, 200.0, 60.0, 60.0], [300.0, 20.0, 30.0, 30.0]
FARTHER = [20.0, 300.0, 30.0, 30.0]
SHIFTED, NEARER = [30.0, 10.0, 40.0, 40.0], [20.0, 10.0, 40.0, 40.0]
RIGHT = [(10, 1, A, 0.95), (10, 2, B, 0.9)]
OTHERS = [(image, label, box, 0.97) for image in range(11, 61) for label, box in ((1, A), (2, B))]
"""Fifty other images, on which the detector is right: it can be relied on."""


def kinds(rows: list, is_crowd: bool = False, others: list = OTHERS) -> list[tuple[str, int | None, int | None, float]]:
    truth = ground_truth([[A, B]] * 51, [[1, 2]] * 51, [[is_crowd, False], *[[False, False]] * 50])
    return [
        (one.kind, one.annotation, one.detection, round(one.strength, 2))
        for one in find_suspicious(truth, detections([*rows, *others]))
    ]


def test_what_is_found_as_it_is_annotated_is_not_suspicious() -> None:
    assert kinds(RIGHT) == []
    assert kinds([*RIGHT, (10, 1, A, 0.9), (10, 2, A, 0.8), (10, 1, FAR, 0.49)]) == [], "duplicates, little confidence"


def test_a_confident_detection_where_nothing_is_annotated() -> None:
    found = [*RIGHT, (10, 1, FAR, 0.8)]
    assert kinds(found) == [("no annotation", None, 2, pytest.approx(0.79, abs=0.02))]
    assert kinds([*found, (10, 2, FAR, 0.7), (10, 1, FAR, 0.6)]) == kinds(found), "a place is named once"
    ((*_, beside),) = kinds([*RIGHT, (10, 2, SHIFTED, 0.8)])
    assert beside == pytest.approx(0.79 * 2 / 3, abs=0.01), "beside something annotated it may be a bad box of that"


def test_another_category_than_the_annotated_one() -> None:
    found = [(10, 2, A, 0.9), (10, 1, A, 0.1), RIGHT[1]]
    assert kinds(found) == [("other category", 0, 0, pytest.approx(0.9 * (8 / 9) ** 2, abs=0.02))]
    assert kinds([*found, (10, 2, A, 0.8)]) == kinds(found), "an annotation is named once"
    assert kinds([(10, 2, A, 0.9), (10, 1, A, 0.5), RIGHT[1]]) == [], "its own category is found, too"
    ((*_, loose),) = kinds([(10, 2, NEARER, 0.9), RIGHT[1]])
    assert loose == pytest.approx(0.9 * 0.6, abs=0.02), "the less the boxes agree, the weaker"


def test_a_box_that_does_not_fit() -> None:
    found = [(10, 1, SHIFTED, 0.9), RIGHT[1]]
    assert kinds(found) == [("box does not fit", 0, 0, pytest.approx(0.89, abs=0.02))]
    assert kinds([*found, (10, 2, SHIFTED, 0.8)]) == kinds(found), "whatever else is found there is explained by it"


def test_an_annotation_that_nothing_finds() -> None:
    assert kinds([RIGHT[1]]) == [("never found", 0, None, 1.0)]
    assert kinds([RIGHT[1], (10, 2, A, 0.1)]) == [("never found", 0, None, 0.75)], "of whatever category"
    assert kinds([RIGHT[1], (10, 1, A, 0.25)]) == [], "seen with some confidence"


def test_evidence_is_worth_what_it_is_worth_on_the_other_images() -> None:
    """Where the detector takes every other cat for a dog, sees things that are not there, and misses most of them."""
    confused = [(image, 2 if image % 2 else label, box, score) for image, label, box, score in OTHERS]
    accused = [(10, 2, A, 0.9), RIGHT[1]]
    assert [kind for kind, *_ in kinds(accused)] == ["other category"] and kinds(accused, others=confused) == []
    seeing = [*OTHERS, *((image, 1, box, 0.97) for image in range(11, 61) for box in (FAR, FARTHER))]
    assert kinds([*RIGHT, (10, 1, FAR, 0.8)], others=seeing) == []
    assert kinds([RIGHT[1]], others=[row for row in OTHERS if row[1] == 2 or row[0] > 45]) == []
    missing = [row for row in OTHERS if row[1] == 1 or row[0] > 45]
    assert kinds([RIGHT[1]], others=missing)[0][:2] == ("never found", 0), "what it misses of others says little"


def test_crowds_are_left_alone() -> None:
    assert kinds([RIGHT[1], (10, 2, [12, 12, 10, 10], 0.9)], is_crowd=True) == []


def test_the_strongest_come_first_over_all_images() -> None:
    truth = ground_truth([[A, B]] * 51, [[1, 2]] * 51)
    found = find_suspicious(truth, detections([(10, 1, FAR, 0.75), (11, 1, FAR, 0.85), *OTHERS]))
    assert [(one.kind, one.image_id) for one in found] == [
        ("never found", 10), ("never found", 10), ("no annotation", 11), ("no annotation", 10),
    ]  # fmt: skip
    strengths = [one.strength for one in found]
    assert strengths == sorted(strengths, reverse=True) and np.allclose(strengths, [1, 1, 0.84, 0.74], atol=0.02)
    assert len(find_suspicious(truth, detections([(10, 1, FAR, 0.75), *OTHERS]), least=0.8)) == 2


# Mistakes that are planted in real detections

FOUND = Path(__file__).parent / "found_shapes.npz"
"""200 drawn images of 32 x 40 pixels with 291 shapes of 6 categories, and what a small DETR of AP50 0.70 found in them.

It was trained on 4,000 others (the quickstart's model; `data.generate={num_train: 4000, num_val: 200, image_size: [32,
40], max_objects: 2, min_object_size: 15}`, 10 epochs)."""
WIDTH, HEIGHT = 40.0, 32.0
KINDS = ("no annotation", "other category", "box does not fit", "never found")


class Planted(NamedTuple):
    """Annotations, and their mistakes: image id -> (kind, id of the annotation; None where it was removed)."""

    truth: GroundTruth
    mistakes: dict[int, tuple[str, int | None]]


def found_shapes() -> tuple[list[list[list[float]]], list[list[int]], DetectionTable]:
    """Boxes and categories of each image, and the detections."""
    with np.load(FOUND) as columns:
        splits = columns["first_box"][1:-1]
        boxes = [part.astype(float).tolist() for part in np.split(columns["boxes_xywh_px"], splits)]
        labels = [part.tolist() for part in np.split(columns["category_ids"], splits)]
        found = DetectionTable(
            10 + columns["found_image"].astype(np.int64), columns["found_category_ids"].astype(np.int64),
            columns["found_boxes_xywh_px"].astype(np.float32), columns["found_scores"].astype(np.float32),
        )  # fmt: skip
    return boxes, labels, found


def plant(boxes: list[list[list[float]]], labels: list[list[int]], seed: int, each: int = 5) -> Planted:
    """Mistakes of each kind, one an image."""
    random = np.random.default_rng(seed)
    boxes, labels = [list(image) for image in boxes], [list(image) for image in labels]
    ids = [[1000 * image + place for place in range(len(of))] for image, of in enumerate(boxes)]
    mistakes: dict[int, tuple[str, int | None]] = {}
    images = iter(random.permutation([image for image, of in enumerate(boxes) if of]).tolist())
    for kind in KINDS:
        while sum(known == kind for known, _ in mistakes.values()) < each:
            image = next(images)
            place = int(random.integers(len(boxes[image])))
            left, top, width, height = boxes[image][place]
            if kind == "no annotation":
                del boxes[image][place], labels[image][place], ids[image][place]
                mistakes[10 + image] = kind, None
                continue
            if kind == "other category":
                labels[image][place] = int(
                    random.choice([label for label in range(1, 7) if label != labels[image][place]])
                )
            elif kind == "box does not fit":
                by = 0.55 * width if left + 1.55 * width < WIDTH else -0.55 * width
                boxes[image][place] = [left + by, top, width, height]
            else:
                side = float(random.uniform(13, 20))
                box = [float(random.uniform(0, WIDTH - side)), float(random.uniform(0, HEIGHT - side)), side, side]
                if any(overlap(box, other) > 0.05 for other in boxes[image]):
                    continue
                place = len(boxes[image])
                boxes[image].append(box)
                labels[image].append(int(random.integers(1, 7)))
                ids[image].append(1000 * image + place)
            mistakes[10 + image] = kind, ids[image][place]
    truth = ground_truth(boxes, labels, categories=tuple((label, str(label)) for label in range(1, 7)))
    truth.annotation_ids[:] = [one for of in ids for one in of]
    return Planted(truth, mistakes)


def overlap(one: list[float], other: list[float]) -> float:
    """Area of the intersection, as a share of the first box."""
    sides = [min(one[k] + one[k + 2], other[k] + other[k + 2]) - max(one[k], other[k]) for k in (0, 1)]
    return max(sides[0], 0.0) * max(sides[1], 0.0) / (one[2] * one[3])


def test_planted_mistakes_are_found_and_few_others() -> None:
    """Twenty mistakes among 291 annotations, eight times; the detector makes mistakes, too."""
    boxes, labels, found = found_shapes()
    of_all = []
    for seed in range(8):
        truth, mistakes = plant(boxes, labels, seed)
        hits: dict[int, str] = {}
        is_right = []
        suspicions = find_suspicious(truth, found)
        for one in suspicions:
            annotation = None if one.annotation is None else int(truth.annotation_ids[one.annotation])
            right = one.image_id in mistakes and mistakes[one.image_id][1] == annotation and one.image_id not in hits
            is_right.append(right)
            if right:
                hits[one.image_id] = one.kind
        same_kind = sum(mistakes[image][0] == kind for image, kind in hits.items())
        of_all.append(
            [
                sum(is_right[:10]) / 10,
                sum(is_right[:20]) / 20,
                len(hits),
                len(suspicions) - len(hits),
                same_kind / len(hits),
            ]
        )
    first_ten, first_twenty, number, false, same_kind = np.mean(of_all, axis=0)
    print(f"right: {first_ten:.0%} of the first 10, {first_twenty:.0%} of the first 20; {number} found, {false} false")
    assert first_ten > 0.95 and first_twenty > 0.75
    assert number > 15 and false < 7, "of twenty; false ones beside them"
    assert same_kind > 0.9


def test_a_detector_that_has_learnt_nothing_accuses_nobody() -> None:
    boxes, labels, found = found_shapes()
    truth, _ = plant(boxes, labels, 0)
    elsewhere = DetectionTable(10 + (found.image_ids + 90) % 200, found.category_ids, found.boxes_xywh_px, found.scores)
    assert find_suspicious(truth, elsewhere) == []
