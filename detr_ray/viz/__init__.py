"""Pictures of images with annotated and detected boxes."""

from detr_ray.viz.detections import DrawnBoxes, check_picture, detection_grid, detection_picture, picture_format

__all__ = ["DrawnBoxes", "check_picture", "detection_grid", "detection_picture", "picture_format"]
