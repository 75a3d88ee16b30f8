"""State dicts with published names: files list tensors that are shared by several modules several times.

A model here has one name for each tensor. `DetectionModel.published_twins` gives the further names in published files;
all other names are the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from detr_ray.model.detection_model import DetectionModel
from detr_ray.model.state_dicts import WeightsError, is_counter, shorten_names

_MEASURED = ("total_params", "total_ops")
"""Suffixes of entries that a profiler left in some published files."""


def load_published(model: DetectionModel, state: Mapping[str, Tensor]) -> None:
    """Loads a state dict with published names, strictly: no name may be missing or unknown.

    Batch norm's counters are an exception: those that are missing become 0, and those of frozen norms are left out.

    Raises:
        WeightsError: names or shapes are not this model's, or two names of one tensor have different values.
    """
    known = model.state_dict()
    missing = sorted(name for name in published_state_dict(model).keys() - state.keys() if not is_counter(name))
    own = under_own_names(model, state, "the state dict")
    strangers = sorted(name for name in own.keys() - known.keys() if not is_counter(name))
    for names, what in ((missing, "lacks"), (strangers, "has more,")):
        if names:
            raise WeightsError(f"the state dict is none of this model: it {what} {shorten_names(names)}")
    try:
        model.load_state_dict({name: own[name] for name in known if name in own} | missing_counters(model, own))
    except RuntimeError as error:
        raise WeightsError(f"the state dict is none of this model: {error}") from error


def published_state_dict(model: DetectionModel) -> dict[str, Tensor]:
    """The model's state dict with every name that a published file has."""
    state = model.state_dict()
    return state | {twin: state[name] for twin, name in model.published_twins.items()}


def missing_counters(model: DetectionModel, state: Collection[str]) -> dict[str, Tensor]:
    """Zeros for the model's batch norm counters that are not in a state dict."""
    return {
        name: torch.zeros_like(value, device="cpu")
        for name, value in model.state_dict().items()
        if is_counter(name) and name not in state
    }


def under_own_names(model: DetectionModel, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """A state dict with one name for each tensor of the model, and without what is never read.

    That is what a profiler left in it, and further rows of a table of labels (DINO's files may have such ones).

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
            f"tensors of this model{model.advice_on_twins}"
        )
    own = {name: value for name, value in state.items() if name not in twins and not name.endswith(_MEASURED)}
    classes = model.weight_names.classes_in(own)
    for name in model.weight_names.class_tables:
        if name in own and classes is not None:
            own[name] = own[name][: classes + 1]
    return own
