"""The plain training step."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baseline.criterion import PlainCriterion
from detr_ray.structures import Target


class PlainStep:
    """Forward, loss, backward and update, as most scripts write them.

    Args:
        model: the plain model.
        criterion: its loss.
        lr: learning rate of everything but the backbone.
        lr_backbone: the backbone's.
        clip_max_norm: largest norm of the gradient.
        bf16: compute the forward pass under bf16 autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: PlainCriterion,
        lr: float = 1e-4,
        lr_backbone: float = 1e-5,
        clip_max_norm: float = 0.1,
        bf16: bool = False,
    ) -> None:
        self.model, self.criterion = model.train(), criterion.train()
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in trained if "backbone" not in name]},
            {"params": [p for name, p in trained if "backbone" in name], "lr": lr_backbone},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=1e-4)
        self.clip_max_norm, self.bf16 = clip_max_norm, bf16

    def __call__(self, images: Tensor, mask: Tensor, targets: list[Target]) -> dict[str, float]:
        """One step; gives the losses as numbers."""
        with torch.autocast(images.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            outputs = self.model(images, mask)
        if self.bf16:
            layers = [outputs, *outputs["aux_outputs"]]
            floats = [{key: layer[key].float() for key in ("pred_logits", "pred_boxes")} for layer in layers]
            outputs = {**floats[0], "aux_outputs": floats[1:]}
        losses = self.criterion(outputs, targets)
        self.optimizer.zero_grad()
        self.criterion.total(losses).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_max_norm)
        self.optimizer.step()
        return {name: value.item() for name, value in losses.items()}
