"""What a user's own pycocotools script does: the reference of the scores."""

from __future__ import annotations

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_ray.evaluation import CocoMetrics, DetectionTable, GroundTruth


def as_coco(truth: GroundTruth) -> COCO:
    """Ground truth as pycocotools takes it from a file."""
    image_of_box = np.repeat(truth.image_ids, np.diff(truth.first_box)).tolist()
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image_id} for image_id in truth.image_ids.tolist()],
        "categories": [{"id": category_id, "name": name} for category_id, name in truth.categories],
        "annotations": [
            {
                "id": row + 1,
                "image_id": image_of_box[row],
                "category_id": int(truth.category_ids[row]),
                "bbox": truth.boxes_xywh_px[row].tolist(),
                "area": float(truth.areas[row]),
                "iscrowd": int(truth.is_crowd[row]),
            }
            for row in range(len(image_of_box))
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def plain_pycocotools(annotated: COCO, found: DetectionTable) -> COCOeval:
    """Scores detections; of equal scores pycocotools prefers those that come first."""
    with contextlib.redirect_stdout(io.StringIO()):
        results = annotated.loadRes(found.to_coco_results()) if len(found) else COCO()
        evaluation = COCOeval(annotated, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def assert_equal_to_the_last_bit(metrics: CocoMetrics, plain: COCOeval, truth: GroundTruth) -> None:
    """The twelve numbers, and AP and AP50 of each category; -1 is pycocotools' None."""
    summary = [-1.0 if value is None else value for value in metrics.summary.values()]
    assert summary == plain.stats.tolist()
    names = truth.category_names()
    assert list(metrics.category_ap) == [names[category_id] for category_id in plain.params.catIds]
    precision = plain.eval["precision"][:, :, :, 0, 2]
    for k, name in enumerate(metrics.category_ap):
        for value, curves in ((metrics.category_ap[name], precision), (metrics.category_ap50[name], precision[:1])):
            of_category = curves[:, :, k]
            assert value == (None if (of_category == -1).all() else of_category.mean()), name
