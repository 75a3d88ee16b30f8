"""State dicts with published names: files list tensors that are shared by several modules several times.

A model here has one name for each tensor. `DetectionModel.published_twins` gives the further names in published files;
all other names are the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from detr_ray.model.detection_model import DetectionModel
from detr_ray.model.state_dicts import WeightsError, shorten_names

_MEASURED = ("total_params", "total_ops")
"""Suffixes of entries that a profiler left in some published files."""


def load_published(model: DetectionModel, state: Mapping[str, Tensor]) -> None:
    """Loads a state dict with published names, strictly: no name may be missing or unknown.

    Raises:
        WeightsError: names or shapes are not this model's, or two names of one tensor have different values.
    """
    missing = sorted(published_state_dict(model).keys() - state.keys())
    own = under_own_names(model, state, "the state dict")
    strangers = sorted(own.keys() - model.state_dict().keys())
    for names, what in ((missing, "lacks"), (strangers, "has more,")):
        if names:
            raise WeightsError(f"the state dict is none of this model: it {what} {shorten_names(names)}")
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        raise WeightsError(f"the state dict is none of this model: {error}") from error


def published_state_dict(model: DetectionModel) -> dict[str, Tensor]:
    """The model's state dict with every name that a published file has."""
    state = model.state_dict()
    return state | {twin: state[name] for twin, name in model.published_twins.items()}


def under_own_names(model: DetectionModel, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """A state dict with one name for each tensor of the model, and without what a profiler left in it.

    Args:
        model: the model; only its names count.
        state: under published names or the model's own.
        source: where it is from, for messages.

    Raises:
        WeightsError: two names of one tensor have different values.
    """
    twins = {twin: name for twin, name in model.published_twins.items() if twin in state}
    differing = [
        twin
        for twin, name in twins.items()
        if name in state and not torch.equal(state[twin], state[name].to(state[twin]))
    ]
    if differing:
        others = shorten_names([twins[twin] for twin in differing])
        raise WeightsError(
            f"{source} has other values for {shorten_names(differing)} than for {others}, which are the same "
            "tensors of this model"
        )
    return {name: value for name, value in state.items() if name not in twins and not name.endswith(_MEASURED)}
