"""Detections and ground truth to COCO's numbers.

Plain arrays in, numbers out: nothing here knows of models, data sets on disk, workers or tracking.
"""

from __future__ import annotations

from detr_ray.evaluation.coco_metrics import CocoMetrics, evaluate_detections
from detr_ray.evaluation.detections import DetectionTable
from detr_ray.evaluation.ground_truth import GroundTruth
from detr_ray.evaluation.scorer_process import ScorerProcess, ScoringFailed, score_in_process

__all__ = [
    "CocoMetrics",
    "DetectionTable",
    "GroundTruth",
    "ScorerProcess",
    "ScoringFailed",
    "evaluate_detections",
    "score_in_process",
]
