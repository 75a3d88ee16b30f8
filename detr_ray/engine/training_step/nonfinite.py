"""Finds the module that made the first NaN or infinity of a forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from detr_ray.model.detection_model import DetectionModel
from detr_ray.structures import Batch


def describe_nonfinite(model: DetectionModel, batch: Batch, autocast: AbstractContextManager[Any]) -> str:
    """Runs the forward pass again, watching every module.

    Args:
        model: the model that gave a non-finite output, in the state it was in.
        batch: the micro-batch it was given.
        autocast: the precision it ran in.

    Returns:
        A sentence with the first bad weight, input or module by name.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not torch.isfinite(tensor).all():
            return f"the weight {name} is already not finite"
    if not torch.isfinite(batch.images).all():
        return "the images themselves are not finite"
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and any(not torch.isfinite(t).all() for t in float_tensors(output)):
                found.append(f"the first module with a non-finite output is {name} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad(), autocast:
            model(*model.inputs_of(batch))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "a second forward pass was finite"


def float_tensors(value: Any) -> list[Tensor]:
    """All floating-point tensors in nested dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in float_tensors(item)]
    return []
