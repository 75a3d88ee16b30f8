"""Applies the section `optim` to single parameters: which train, with which learning rates and weight decay."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from detr_ray.config.errors import ConfigError
from detr_ray.detector import build_skeleton
from detr_ray.model.detection_model import DetectionModel
from detr_ray.schedules import Scheduled

if TYPE_CHECKING:
    from detr_ray.config import Config, OptimConfig


Rate = float | Scheduled


def group_rates(model: DetectionModel, optim: OptimConfig) -> dict[str, Rate]:
    """The configured learning rate of each of the model's parameter groups: a number or a schedule."""
    return {group: getattr(optim, group) for group in model.parameter_groups()}


def freeze(model: DetectionModel, rates: Mapping[str, Rate], patterns: Sequence[str] = ()) -> None:
    """Freezes parameters: they have no gradients, and no part in the optimizer, the gradient norm or the backward pass.

    The model keeps modules all of whose parameters are frozen in evaluation mode, so that their statistics stay too.

    Args:
        model: the model; says which groups it has.
        rates: learning rate of each group; a group whose rate is 0 is frozen. A schedule freezes nothing.
        patterns: what else is frozen, see `matched`.
    """
    frozen = {name for group, names in model.parameter_groups().items() if rates[group] == 0 for name in names}
    for pattern in patterns:
        frozen.update(matched(model, pattern))
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)


def matched(model: nn.Module, pattern: str) -> list[str]:
    """Names of the parameters that match a pattern, or are in a module whose name matches it.

    Args:
        model: the model.
        pattern: as for file names (`fnmatch`); ``*`` also stands for dots.
    """
    return [name for name, _ in model.named_parameters() if any(map(_fitting(pattern), _with_modules(name)))]


def _fitting(pattern: str) -> Any:
    return lambda name: fnmatch.fnmatchcase(name, pattern)


def _with_modules(name: str) -> Iterator[str]:
    """The name of a parameter, and those of the modules that it lies in."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def refuse_misnamed(config: Config) -> None:
    """Refuses names in `optim` that match no parameter of the model, and freezing the whole model.

    Raises:
        ConfigError: all faults at once.
    """
    model, optim = build_skeleton(config.model, num_classes=1), config.optim
    names = [name for name, _ in model.named_parameters()]
    faults = []
    unused = [part for part in optim.lr_factors if not any(part in name for name in names)]
    if unused:
        faults.append(f"optim.lr_factors: no parameter of this model has a name with {', '.join(unused)}")
    for pattern in optim.freeze:
        if not matched(model, pattern):
            near = _nearest(names, pattern)
            faults.append(
                f"optim.freeze: no parameter or module of this model has a name that fits {pattern!r}; "
                f"{'nearest: ' if near else 'its parts: '}"
                + ", ".join(near or [name for name, _ in model.named_children()])
            )
    if optim.layer_decay != 1 and not layers_behind(model):
        faults.append("optim.layer_decay: must be 1 for this backbone, which does not say what its layers are")
    if not faults:
        freeze(model, group_rates(model, optim), optim.freeze)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            faults.append("optim.freeze: nothing is left to train; freeze less")
    if faults:
        raise ConfigError(faults)


def _nearest(names: Sequence[str], pattern: str) -> list[str]:
    known = sorted({part for name in names for part in _with_modules(name)}, key=lambda name: (len(name), name))
    return difflib.get_close_matches(pattern.strip("*?."), known, n=3, cutoff=0.5)


def layers_behind(model: DetectionModel) -> dict[str, int]:
    """Name of each parameter of the backbone's network -> number of its layers after the parameter's own."""
    found = {}
    prefix, backbone = model.named_backbone
    for behind, beginnings in enumerate(reversed(backbone.layers)):
        starts = tuple(f"{prefix}.{beginning}" for beginning in beginnings)
        found.update({name: behind for name, _ in backbone.named_parameters(prefix) if name.startswith(starts)})
    return found


def rate_factors(model: DetectionModel, lr_factors: Mapping[str, float], layer_decay: float) -> dict[str, float]:
    """Name of each parameter -> factor of its group's learning rate.

    Args:
        model: the model.
        lr_factors: part of a name -> factor; the first match counts.
        layer_decay: factor for each layer of the backbone after the parameter's own.
    """
    behind = layers_behind(model) if layer_decay != 1 else {}
    return {
        name: next((factor for part, factor in lr_factors.items() if part in name), 1.0)
        * layer_decay ** behind.get(name, 0)
        for name, _ in model.named_parameters()
    }


def is_norm_or_bias(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a bias, or a factor of a norm: those have one dimension, matrices and kernels more."""
    return parameter.ndim <= 1
