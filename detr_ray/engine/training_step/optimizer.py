"""AdamW over the model's parameters, and its learning rates as pure functions of the epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from detr_ray.engine.training_step.parameters import Rate, group_rates, is_norm_or_bias, rate_factors
from detr_ray.model.detection_model import DetectionModel
from detr_ray.schedules import Curve, Product, Scheduled, constant, value_at

if TYPE_CHECKING:
    from detr_ray.config import OptimConfig


def build_optimizer(
    model: DetectionModel,
    rates: Mapping[str, Rate],
    *,
    weight_decay: float,
    lr_factors: Mapping[str, float] | None = None,
    layer_decay: float = 1.0,
    decay_norms_and_biases: bool = True,
) -> torch.optim.AdamW:
    """AdamW over the trained parameters. The model's groups are split by learning rate factor and weight decay.

    Each group keeps its name under ``rate``, its factor under ``factor``, the names of its parameters under ``names``,
    and its full rate at the start under ``initial_lr``. The first group of each rate has the factor 1; it may be empty.

    Args:
        model: the model; says which groups it has.
        rates: learning rate of each group.
        weight_decay: of all, or of all but norms and biases.
        lr_factors: part of a parameter's name -> factor of its learning rate; the first match counts.
        layer_decay: factor of the learning rate for each layer of the backbone after the parameter's own.
        decay_norms_and_biases: whether norms and biases decay too.
    """
    factors = rate_factors(model, lr_factors or {}, layer_decay)
    groups: list[dict[str, object]] = []
    for group, names in model.parameter_groups().items():
        rate = value_at(rates[group], 0.0)
        split: dict[tuple[float, float], list[str]] = {(1.0, weight_decay): []}
        for name in names:
            decays = decay_norms_and_biases or not is_norm_or_bias(model.get_parameter(name))
            split.setdefault((factors[name], weight_decay if decays else 0.0), []).append(name)
        for (factor, decay), members in split.items():
            trained = [name for name in members if model.get_parameter(name).requires_grad]
            groups.append(
                {
                    "params": [model.get_parameter(name) for name in trained],
                    "lr": rate * factor,
                    "initial_lr": rate * factor,
                    "weight_decay": decay,
                    "rate": group,
                    "factor": factor,
                    "names": trained,
                }
            )
    return torch.optim.AdamW(groups, fused=True)


def rates_in_use(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Name of each rate -> its value now, without the factors of single parameters."""
    return {group["rate"]: group["lr"] for group in reversed(optimizer.param_groups) if group["factor"] == 1}


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Gives an optimizer the moments that an earlier one of the same model had.

    They get the memory order of the parameters: the fused update on CPUs ignores strides, and a run may be resumed with
    another memory order (``train.channels_last``). Learning rates and options are not restored.

    Args:
        optimizer: the present optimizer.
        state: ``state_dict()`` of the earlier one. Moments of groups that no longer train are left out.

    Raises:
        ValueError: it has other groups, or groups of other sizes.
    """
    saved = _ids_by_group(optimizer, state)
    kept = [ids if group["params"] else [] for ids, group in zip(saved, optimizer.param_groups, strict=True)]
    groups = [{**group, "params": ids} for group, ids in zip(optimizer.param_groups, kept, strict=True)]
    moments = {key: state["state"][key] for ids in kept for key in ids if key in state["state"]}
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    for parameter, own in optimizer.state.items():
        for name, value in own.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                own[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _ids_by_group(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> list[list[int]]:
    """The ids that the parameters of each of the optimizer's groups have in ``state``.

    Found by name if the state has names, because groups may be split differently now (``optim.lr_factors``).

    Raises:
        ValueError: the state lacks a parameter.
    """
    groups: list[dict[str, Any]] = state["param_groups"]
    if any("names" not in group for group in groups) or any("names" not in g for g in optimizer.param_groups):
        return [group["params"] for group in groups]
    ids = {name: number for group in groups for name, number in zip(group["names"], group["params"], strict=True)}
    missing = [name for group in optimizer.param_groups for name in group["names"] if name not in ids]
    if missing:
        raise ValueError(f"the optimizer's state lacks {missing[0]}")
    return [[ids[name] for name in group["names"]] for group in optimizer.param_groups]


def clipped_update(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Clips the gradient to a norm and applies it; parameters and moments do not change if it is not finite.

    The fused optimizer scales the gradient or skips the update within its single pass, as tensors on the device tell
    it. Nothing waits for the device until the norm is read.

    Args:
        optimizer: updates ``parameters``, whose gradients are not scaled (any more).
        parameters: those without a gradient are ignored.
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
    # Torch's own gradient scaler passes values to a fused optimizer by these attributes.
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
    flat_epochs: float = 0.0,
) -> Product:
    """The factor of all learning rates over the epochs: a warm-up times a decay.

    Args:
        schedule: ``constant``; ``step`` (times ``gamma`` every ``step_epochs``); ``multistep`` (times ``gamma`` at each
            of ``milestones``); ``cosine`` (from 1 after the warm-up and ``flat_epochs`` to ``min_lr_factor`` at
            ``epochs``).
        epochs: length of the run.
        step_epochs: period of ``step``.
        milestones: epochs of ``multistep``, ascending.
        gamma: factor at each drop.
        warmup_epochs: the factor climbs in a straight line from (nearly) 0 to 1 over so many epochs.
        min_lr_factor: where ``cosine`` ends.
        flat_epochs: ``cosine`` does not fall before this epoch.
    """
    if schedule == "constant":
        decay = constant(1.0)
    elif schedule in ("step", "multistep"):
        drops = list(milestones)
        if schedule == "step":
            drops = [step_epochs * k for k in range(1, int(epochs / step_epochs) + 1)]
        decay = Curve(((0.0, 1.0), *((drop, gamma ** (k + 1)) for k, drop in enumerate(drops))), "constant")
    elif schedule == "cosine":
        decay = Curve(((max(warmup_epochs, flat_epochs), 1.0), (epochs, min_lr_factor)), "cosine")
    else:
        raise ValueError(f"unknown schedule {schedule!r}: constant, step, multistep or cosine")
    warmup = Curve(((0.0, 1e-3), (warmup_epochs, 1.0))) if warmup_epochs > 0 else constant(1.0)
    return Product((warmup, decay))


@dataclass(frozen=True, slots=True)
class LearningRates:
    """The learning rate of each parameter group at each epoch.

    Attributes:
        full: group -> its rate, a number or a schedule.
        factor: of all of them.
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
            flat_epochs=optim.flat_epochs,
        )
        return cls(group_rates(model, optim), factor)

    def set(self, optimizer: torch.optim.Optimizer, epoch: float) -> None:
        """Gives each group its rate at an epoch."""
        factor = self.factor.at(epoch)
        for group in optimizer.param_groups:
            group["lr"] = value_at(self.full[group["rate"]], epoch) * factor * group["factor"]
