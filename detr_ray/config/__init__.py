"""Typed configuration: from YAML files and ``dotted.key=value`` overrides to a validated frozen object.

    config = load_config("configs/detr_r50.yaml", ["data.root=/data/coco", "optim.lr=2e-4"])

Imports neither torch nor Ray, so that mistakes in a configuration are reported within a second.
"""

from detr_ray.config.data_sections import AugmentConfig, DataConfig, GenerateConfig, SplitConfig
from detr_ray.config.errors import ConfigError
from detr_ray.config.fields import Schedule
from detr_ray.config.loading import config_from_dict, load_config, with_defaults
from detr_ray.config.model_sections import LossConfig, ModelConfig
from detr_ray.config.schema import diff, flatten
from detr_ray.config.sections import (
    Config,
    EvalConfig,
    OptimConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from detr_ray.config.tune_sections import TuneConfig

__all__ = [
    "AugmentConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "GenerateConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "Schedule",
    "SplitConfig",
    "TrackingConfig",
    "TrainConfig",
    "TuneConfig",
    "config_from_dict",
    "diff",
    "flatten",
    "load_config",
    "with_defaults",
]
