"""AdamW over the model's parameter groups, and its learning rates as pure functions of the epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from detr_ray.model.detection_model import DetectionModel
from detr_ray.schedules import Curve, Product, Scheduled, constant, value_at

if TYPE_CHECKING:
    from detr_ray.config import OptimConfig


Rate = float | Scheduled


def group_rates(model: DetectionModel, optim: OptimConfig) -> dict[str, Rate]:
    """The configured learning rate of each of the model's parameter groups: a number or a schedule."""
    return {group: getattr(optim, group) for group in model.parameter_groups()}


def freeze_groups(model: DetectionModel, rates: Mapping[str, Rate]) -> None:
    """Keeps groups whose rate is 0 as they are: without gradients, so in no optimizer, no norm and no backward pass.

    The model keeps a backbone without gradients in evaluation mode, so that its statistics stay too.

    Args:
        model: the model; says which groups it has.
        rates: learning rate of each group. A schedule freezes nothing.
    """
    for group, names in model.parameter_groups().items():
        if rates[group] == 0:
            for name in names:
                model.get_parameter(name).requires_grad_(False)


def build_optimizer(model: DetectionModel, rates: Mapping[str, Rate], *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what trains, in the model's parameter groups.

    Each group keeps its name under ``rate``, and its full rate at the start under ``initial_lr``.

    Args:
        model: the model; says which groups it has.
        rates: learning rate of each group.
        weight_decay: of all.
    """
    groups: list[dict[str, object]] = []
    for group, names in model.parameter_groups().items():
        parameters = [parameter for parameter in map(model.get_parameter, names) if parameter.requires_grad]
        rate = value_at(rates[group], 0.0)
        groups.append({"params": parameters, "lr": rate, "initial_lr": rate, "rate": group})
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


@dataclass(frozen=True, slots=True)
class LearningRates:
    """The learning rate of each parameter group at each epoch.

    Attributes:
        full: group -> its rate, a number or a schedule.
        factor: what all of them are multiplied with.
    """

    full: Mapping[str, Rate]
    factor: Scheduled

    @classmethod
    def of(cls, model: DetectionModel, optim: OptimConfig, epochs: float) -> LearningRates:
        """The rates of a run.

        Args:
            model: says which groups it has.
            optim: rates and schedule.
            epochs: length of the run.
        """
        factor = learning_rate_factor(
            optim.schedule,
            epochs=epochs,
            step_epochs=optim.step_epochs,
            milestones=optim.milestones,
            gamma=optim.gamma,
            warmup_epochs=optim.warmup_epochs,
            min_lr_factor=optim.min_lr_factor,
        )
        return cls(group_rates(model, optim), factor)

    def set(self, optimizer: torch.optim.Optimizer, epoch: float) -> None:
        """Gives each group its rate at an epoch."""
        factor = self.factor.at(epoch)
        for group in optimizer.param_groups:
            group["lr"] = value_at(self.full[group["rate"]], epoch) * factor
