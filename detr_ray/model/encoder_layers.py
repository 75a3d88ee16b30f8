"""Encoder layers one after the other, with or without their inner values kept for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class EncoderLayers(nn.Module):
    """Base of encoders.

    Args:
        layers: the layers.

    Attributes:
        recompute: keep only the input of each layer for the backward pass, which then runs the layer again (activation
            checkpointing; Chen et al. 2016). Gradients stay the same to the last bit, also with dropout.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.recompute = False

    def encoded(self, cells: Tensor, *others: Any) -> Tensor:
        """Cells ``[B, S, dim]`` after all layers; ``others`` are further arguments of each layer."""
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                cells = checkpoint(layer, cells, *others, use_reentrant=False)
            else:
                cells = layer(cells, *others)
        return cells
