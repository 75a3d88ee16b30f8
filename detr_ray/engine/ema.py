"""An exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from detr_ray.model import DetectionModel


class ModelEma:
    """A copy of a model whose weights trail the trained ones.

    The decay is warmed up as ``min(decay, (1 + n) / (10 + n))`` after ``n`` updates, so that the average forgets the
    random start. Buffers (running statistics) are copied.

    Args:
        model: the model that trains.
        decay: share of the old average that one update keeps, e.g. 0.9997.
    """

    def __init__(self, model: DetectionModel, decay: float) -> None:
        self.module: DetectionModel = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model's weights as they are now."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        averaged: list[torch.Tensor] = list(self.module.parameters())
        current: list[torch.Tensor] = list(model.parameters())
        torch._foreach_lerp_(averaged, current, 1 - decay)
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
