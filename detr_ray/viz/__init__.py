"""Pictures of what goes in and what comes out."""

from detr_ray.viz.detections import DrawnBoxes, check_picture, detection_grid, picture_format

__all__ = ["DrawnBoxes", "check_picture", "detection_grid", "picture_format"]
