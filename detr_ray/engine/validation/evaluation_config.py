"""Which settings a checkpoint is scored with: those that the user gave, then those of the run that it is from.

A run validated its weights at sizes of its own; at others the same weights score differently, down to nothing. So what
decides the result comes with the checkpoint, unless it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from detr_ray.config import Config, ConfigError, flatten, with_defaults

DECISIVE = (
    "eval.size",
    "eval.max_size",
    "eval.max_detections",
    "train.precision",
    "data.reduced_decoding",
    "data.on_bad_image",
    "data.max_bad_images",
)
"""Keys that decide what an evaluation gives, beside the weights, the model and the images."""

_SHOWN = DECISIVE[:4]
_IMAGES = ("root", "val", "generate", "max_images")
"""Keys of ``data`` that say which images there are; they are taken together or not at all."""


def evaluation_config(given: Config, stored: Config | None, source: str) -> tuple[Config, list[str]]:
    """The configuration to evaluate with.

    Args:
        given: the user's configuration. Keys that it was not made with, and have their defaults, may be others here.
        stored: the configuration that the checkpoint was trained with; None where it has none.
        source: the checkpoint, for messages.

    Returns:
        The configuration, and lines that tell the user which settings are used and where they are from.

    Raises:
        ConfigError: given and stored values do not go together.
    """
    if stored is None:
        return given, [_described(given, given, {})]
    defaults, lines = _defaults(given, stored)
    try:
        config = with_defaults(given, defaults, f"the configuration in {source}")
    except ConfigError as error:
        raise ConfigError([f"eval.checkpoint: {line}" for line in error.errors]) from error
    line = _described(config, given, defaults)
    theirs, ours = flatten(stored), flatten(config)
    if other := [f"{key}={theirs[key]}" for key in _SHOWN if theirs[key] != ours[key]]:
        line += f"; the run itself was validated with {', '.join(other)}"
    return config, [line, *lines]


def _described(config: Config, given: Config, from_run: Mapping[str, Mapping[str, Any]]) -> str:
    """The settings that decide the result, by where they are from."""
    values = flatten(config)
    origins: dict[str, list[str]] = {}
    for key in _SHOWN:
        section, name = key.split(".")
        origin = "by default"
        if name in from_run.get(section, ()):
            origin = "from the run"
        elif name in getattr(given, section).model_fields_set:
            origin = "as given"
        origins.setdefault(origin, []).append(f"{key}={values[key]}")
    return "scored with " + "; ".join(f"{', '.join(keys)} ({origin})" for origin, keys in origins.items())


def _defaults(given: Config, stored: Config) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Values of the run for keys that were not given, by section; and what else to say of them."""
    values, lines = stored.to_dict(), []
    taken: dict[str, dict[str, Any]] = {"eval": {}, "train": {}, "data": {}}
    for key in DECISIVE:
        section, name = key.split(".")
        if name not in getattr(given, section).model_fields_set:
            taken[section][name] = values[section][name]
    if taken["train"].get("precision") == "fp16" and (given.train.use_gpu is False or not torch.cuda.is_available()):
        del taken["train"]["precision"]
        lines.append("the run was trained with train.precision=fp16, which needs a GPU: it is scored in fp32 here")
    if not {"root", "train", "val"} & given.data.model_fields_set:
        for name in _IMAGES:
            if name not in given.data.model_fields_set:
                taken["data"][name] = values["data"][name]
        lines.append("the validation data is the run's own, since none is given")
    return taken, lines
