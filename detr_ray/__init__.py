"""detr_ray trains DETR object detectors with Ray, from a laptop to a cluster."""

__version__ = "0.1.0"
