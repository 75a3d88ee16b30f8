"""Whether learned positions reach as far as the images of a run become large, found out before anything starts."""

from __future__ import annotations

import numpy as np

from detr_ray.config import Config, ConfigError, ModelConfig
from detr_ray.data.index import DatasetIndex
from detr_ray.data.planner import plan_evaluation
from detr_ray.engine.stream.planned_data import augmentation_of


def refuse_positions_out_of_reach(
    config: Config, model: ModelConfig, train: DatasetIndex | None, val: DatasetIndex | None
) -> None:
    """Refuses sizes of training and of validation images that learned positions have no vectors for.

    Args:
        config: says how large images become.
        model: the model, which may be a checkpoint's and not the configuration's.
        train: the training set; None where nothing is trained.
        val: the validation set; None where nothing is evaluated.

    Raises:
        ConfigError: an image may become too large; names the keys.
    """
    if model.position_embedding != "learned":
        return
    from detr_ray.model.position_encoding import LEARNED_LIMIT  # takes a second, and is needed for few runs

    stride = model.backbone_stride // (2 if model.dilation else 1)
    reach = (
        f"model.position_embedding=learned has vectors for {LEARNED_LIMIT} rows and columns of {stride} pixels each, "
        f"images of {LEARNED_LIMIT * stride} pixels"
    )
    otherwise = "or set model.position_embedding=sine" + ("" if model.backbone_stride == 32 else ", or a larger stride")
    errors = []
    if train is not None:
        sizes = np.stack([train.heights, train.widths], axis=1)
        longest = augmentation_of(config).largest_side(sizes)
        multiple = config.data.pad_multiple
        longest = -(-longest // multiple) * multiple
        if -(-longest // stride) > LEARNED_LIMIT:
            errors.append(
                f"data.augment: {reach}; training images become up to {longest} pixels long: lower "
                f"data.augment.max_size (and scales) to {LEARNED_LIMIT * stride // multiple * multiple} or less, "
                f"{otherwise}"
            )
    if val is not None:
        plan = plan_evaluation(
            val.heights, val.widths, val.image_ids, size=config.eval.size, max_size=config.eval.max_size, batch_size=1
        )
        longest = max(max(sample.size) for batch in plan for sample in batch)
        if -(-longest // stride) > LEARNED_LIMIT:
            errors.append(
                f"eval.size: {reach}; validation images become up to {longest} pixels long (eval.size="
                f"{config.eval.size}, eval.max_size={config.eval.max_size}): lower eval.max_size, or eval.size, to "
                f"{LEARNED_LIMIT * stride} or less, {otherwise}"
            )
    if errors:
        raise ConfigError(errors)
