"""The names of COCO's twelve numbers, which metrics, tags, pages and messages use."""

from __future__ import annotations

COCO_NUMBERS: dict[str, str] = {
    "AP": "precision, IoU 0.50:0.95, all areas",
    "AP50": "precision, IoU 0.50, all areas",
    "AP75": "precision, IoU 0.75, all areas",
    "APs": "precision, IoU 0.50:0.95, small objects",
    "APm": "precision, IoU 0.50:0.95, medium objects",
    "APl": "precision, IoU 0.50:0.95, large objects",
    "AR1": "recall, IoU 0.50:0.95, 1 detection an image and category",
    "AR10": "recall, IoU 0.50:0.95, 10 detections",
    "AR100": "recall, IoU 0.50:0.95, 100 detections",
    "ARs": "recall, IoU 0.50:0.95, small objects",
    "ARm": "recall, IoU 0.50:0.95, medium objects",
    "ARl": "recall, IoU 0.50:0.95, large objects",
}
"""Name and meaning of the twelve numbers, in pycocotools' order."""

COCO_METRICS = tuple(f"val/{name}" for name in COCO_NUMBERS)
"""Their names among the metrics of a run, beside which there is ``val/AP/<category>``."""
