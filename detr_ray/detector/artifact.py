"""A saved model: weights, labels, and the configuration that it was trained with, which has sizes and architecture.

Training writes it (`saved_model`); everything that uses a model reads it (`read_saved_model`). It consists of tensors
and plain values; no code is run when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from detr_ray import __version__
from detr_ray.callbacks import Say
from detr_ray.config import Config, config_from_dict
from detr_ray.data.label_map import LabelMap
from detr_ray.model import DetectionModel
from detr_ray.model.state_dicts import OWN_FORMAT, StateDict

if TYPE_CHECKING:
    from torch import nn

MODEL_FILE = "model.pt"
"""Name of the file in a checkpoint."""

SCORES_FILE = "scores.json"
"""Name of the file beside it with the measured quality of the model's scores."""


def saved_model(
    model: nn.Module,
    averaged: nn.Module | None,
    label_map: LabelMap,
    config: Config,
    step: int,
    code_commit: str | None = None,
) -> dict[str, Any]:
    """The content of a model file.

    Args:
        model: the model as it trains.
        averaged: the moving average of its weights, which users of the file prefer; None without one.
        label_map: what its classes are.
        config: what it was trained with; configurations hold no credentials.
        step: optimizer steps taken.
        code_commit: git commit of the code that trains it, if it is known.
    """
    content = {
        "format": OWN_FORMAT,
        "model": model.state_dict(),
        "label_map": label_map.to_dict(),
        "config": config.to_dict(),
        "step": step,
        "code_version": __version__,
        "code_commit": code_commit or "",
    }
    return content if averaged is None else content | {"ema": averaged.state_dict()}


@dataclass(frozen=True)
class SavedModel:
    """A model file that was read: of this project, or of another program, with weights only.

    Attributes:
        source: where it was read from.
        label_map: its classes; None if the file does not have them.
        config: the configuration of its training; None if the file does not have it.
        is_averaged: whether the weights are an average over training.
        step: optimizer steps taken; None if the file does not have it.
        checkpoint: the file's whole content, as `read_checkpoint` gives it.
    """

    source: str
    label_map: LabelMap | None
    config: Config | None
    is_averaged: bool
    step: int | None
    checkpoint: Mapping[str, Any]

    def weights_for(self, model: DetectionModel) -> StateDict:
        """The weights under the model's names, the averaged ones where there are any.

        Raises:
            WeightsError: they are not weights of this architecture, or of several models.
        """
        from detr_ray.model.weights import find_detector

        return find_detector(self.checkpoint, model, self.source)


def read_saved_model(source: str, say: Say, sha256: str | None = None) -> SavedModel:
    """Reads a model file.

    Args:
        source: path, address or URL.
        say: shows a line about keys of the configuration that this version does not know.
        sha256: of the file's content, where it was recorded.

    Raises:
        WeightsError: the file cannot be fetched, is damaged, or was changed.
        ConfigError: its configuration is not valid in this version.
    """
    from detr_ray.model.checkpoint_file import read_checkpoint  # imports pyarrow, which training does not need

    checkpoint = read_checkpoint(source, sha256)
    is_own = "config" in checkpoint
    return SavedModel(
        source=source,
        label_map=LabelMap.from_dict(checkpoint["label_map"]) if is_own else None,
        config=stored_config(checkpoint["config"], source, say) if is_own else None,
        is_averaged=checkpoint["ema"] is not None,
        step=checkpoint.get("step") if is_own else None,
        checkpoint=checkpoint,
    )


def stored_config(values: Mapping[str, Any], source: str, say: Say) -> Config:
    """The configuration that is stored with a model.

    Args:
        values: section -> key -> value.
        source: the model, for messages.
        say: shows a line about keys that this version does not know; they are left out.

    Raises:
        ConfigError: it is not valid in this version.
    """

    def warn(key: str) -> None:
        say(f"WARNING: {source} was trained with {key}, which this version does not know (any more)")

    return config_from_dict(values, source, warn)


def labels_in(model_file: Mapping[str, Any]) -> LabelMap:
    """The labels in the content of a model file of this project."""
    return LabelMap.from_dict(model_file["label_map"])
