"""Pictures of what goes in and what comes out."""

from detr_ray.viz.detections import DrawnBoxes, detection_grid

__all__ = ["DrawnBoxes", "detection_grid"]
