"""Records of a run (parameters, metrics, texts, files) in MLflow or in memory.

Other packages use the ``Tracker`` protocol. Only this package imports MLflow, and only when it is needed.
"""

from __future__ import annotations

from detr_ray.tracking.mlflow_run import PARENT_TAG
from detr_ray.tracking.mlflow_tracker import MlflowTracker, holds_records, recorded_uri, send_pending
from detr_ray.tracking.search_children import ChildState
from detr_ray.tracking.search_run import SearchRun
from detr_ray.tracking.sender import Timing
from detr_ray.tracking.store import default_tracking_uri, public_uri, tracking_uri, viewing_hint
from detr_ray.tracking.tracker import MemoryTracker, NullTracker, Status, Tracker

__all__ = [
    "PARENT_TAG",
    "ChildState",
    "MemoryTracker",
    "MlflowTracker",
    "NullTracker",
    "SearchRun",
    "Status",
    "Timing",
    "Tracker",
    "default_tracking_uri",
    "holds_records",
    "public_uri",
    "recorded_uri",
    "send_pending",
    "tracking_uri",
    "viewing_hint",
]
