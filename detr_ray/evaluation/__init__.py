"""COCO's metrics from detections and ground truth, both given as plain arrays."""

from __future__ import annotations

from detr_ray.evaluation.coco_metrics import CocoMetrics, evaluate_detections
from detr_ray.evaluation.detections import DetectionTable
from detr_ray.evaluation.ground_truth import GroundTruth
from detr_ray.evaluation.score_quality import describe_scores
from detr_ray.evaluation.scorer_process import ScorerProcess, ScoringFailed

__all__ = [
    "CocoMetrics",
    "DetectionTable",
    "GroundTruth",
    "ScorerProcess",
    "ScoringFailed",
    "describe_scores",
    "evaluate_detections",
]
