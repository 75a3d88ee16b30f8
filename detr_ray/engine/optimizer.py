"""AdamW over the model's parameter groups, and its learning rate as a pure function of the epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from detr_ray.model.detection_model import DetectionModel
from detr_ray.schedules import Curve, Product, constant

if TYPE_CHECKING:
    from detr_ray.config import OptimConfig


def group_rates(model: DetectionModel, optim: OptimConfig) -> dict[str, float]:
    """The configured learning rate of each of the model's parameter groups."""
    return {group: getattr(optim, group) for group in model.parameter_groups()}


def freeze_groups(model: DetectionModel, rates: Mapping[str, float]) -> None:
    """Keeps groups whose rate is 0 as they are: without gradients, so in no optimizer, no norm and no backward pass.

    The model keeps a backbone without gradients in evaluation mode, so that its statistics stay too.

    Args:
        model: the model; says which groups it has.
        rates: learning rate of each group.
    """
    for group, names in model.parameter_groups().items():
        if rates[group] == 0:
            for name in names:
                model.get_parameter(name).requires_grad_(False)


def build_optimizer(model: DetectionModel, rates: Mapping[str, float], *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what trains, in the model's parameter groups.

    Each group keeps its full rate under ``initial_lr`` (``set_learning_rate`` scales it) and its name under ``rate``.

    Args:
        model: the model; says which groups it has.
        rates: learning rate of each group.
        weight_decay: of all.
    """
    groups: list[dict[str, object]] = []
    for group, names in model.parameter_groups().items():
        parameters = [parameter for parameter in map(model.get_parameter, names) if parameter.requires_grad]
        groups.append({"params": parameters, "lr": rates[group], "initial_lr": rates[group], "rate": group})
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Gives an optimizer the moments that an earlier one of the same model had.

    They come to lie in memory as the parameters do: the fused update on CPUs walks through memory without a look at
    strides, and a run may go on in another memory order (``train.channels_last``). Rates and options stay this
    optimizer's own.

    Args:
        optimizer: of the model as it is now.
        state: ``state_dict()`` of the earlier one. Moments of a group that trains no more are left out.

    Raises:
        ValueError: it has other groups, or groups of other sizes.
    """
    saved = [group["params"] for group in state["param_groups"]]
    kept = [ids if group["params"] else [] for ids, group in zip(saved, optimizer.param_groups, strict=True)]
    groups = [{**group, "params": ids} for group, ids in zip(optimizer.param_groups, kept, strict=True)]
    moments = {key: state["state"][key] for ids in kept for key in ids if key in state["state"]}
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    for parameter, own in optimizer.state.items():
        for name, value in own.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                own[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def clipped_update(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Clips the gradient to a norm and applies it; leaves parameters and moments alone where it is not finite.

    The fused optimizer divides the gradient, and leaves the update out, within its one pass, and is told to by tensors:
    nothing waits for the device until the norm is read.

    Args:
        optimizer: updates ``parameters``, whose gradients are no multiple of the real ones (any more).
        parameters: those with a gradient count.
        max_norm: a gradient with a larger norm is scaled down to it; 0 leaves all as they are.

    Returns:
        The norm before clipping, 0-d.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        norm = nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"), foreach=True)
        if torch.isfinite(norm):
            optimizer.step()
        return norm
    norm = nn.utils.get_total_norm(gradients, foreach=True)
    scale = ((norm + 1e-6) / max_norm).clamp(min=1.0) if max_norm else None
    # These attributes are how torch's own gradient scaler speaks to a fused optimizer.
    told = {"found_inf": (~norm.isfinite()).to(torch.float32), "grad_scale": scale}
    vars(optimizer).update(told)
    try:
        optimizer.step()
    finally:
        for name in told:
            delattr(optimizer, name)
    return norm


def learning_rate_factor(
    schedule: str,
    *,
    epochs: float,
    step_epochs: float,
    milestones: Sequence[float],
    gamma: float,
    warmup_epochs: float,
    min_lr_factor: float,
) -> Product:
    """What the learning rates are multiplied with over the epochs: a warm-up times a decay.

    Args:
        schedule: ``constant``; ``step`` (times ``gamma`` every ``step_epochs``); ``multistep`` (times ``gamma`` at each
            of ``milestones``); ``cosine`` (from 1 after the warm-up to ``min_lr_factor`` at ``epochs``).
        epochs: length of the run.
        step_epochs: period of ``step``.
        milestones: epochs of ``multistep``, ascending.
        gamma: factor at each drop.
        warmup_epochs: the factor climbs in a straight line from (nearly) 0 to 1 over so many epochs.
        min_lr_factor: where ``cosine`` ends.
    """
    if schedule == "constant":
        decay = constant(1.0)
    elif schedule in ("step", "multistep"):
        drops = list(milestones)
        if schedule == "step":
            drops = [step_epochs * k for k in range(1, int(epochs / step_epochs) + 1)]
        decay = Curve(((0.0, 1.0), *((drop, gamma ** (k + 1)) for k, drop in enumerate(drops))), "constant")
    elif schedule == "cosine":
        decay = Curve(((warmup_epochs, 1.0), (epochs, min_lr_factor)), "cosine")
    else:
        raise ValueError(f"unknown schedule {schedule!r}: constant, step, multistep or cosine")
    warmup = Curve(((0.0, 1e-3), (warmup_epochs, 1.0))) if warmup_epochs > 0 else constant(1.0)
    return Product((warmup, decay))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets each group's rate to its full rate times a factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
