"""Heads for classes and boxes, and the refinement of boxes by their logits.

Knows vectors and boxes in 0..1; knows nothing of layers, queries or feature maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

PRIOR = 0.01
"""Initial probability of every class, for independent classes (Lin et al. 2017)."""


class Perceptron(nn.Module):
    """Linear layers with a ReLU between each two.

    Args:
        widths: of the input, of the hidden layers, and of the output.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(*pair) for pair in pairwise(widths)])

    def forward(self, x: Tensor) -> Tensor:
        """``[..., widths[0]]`` -> ``[..., widths[-1]]``."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        out: Tensor = self.layers[-1](x)
        return out


class BoxHead(Perceptron):
    """A perceptron of three layers: from an object's vector to its box, before the sigmoid.

    Args:
        dim: length of the vectors, and hidden width.
    """

    def __init__(self, dim: int) -> None:
        super().__init__((dim, dim, dim, 4))


def new_class_head(dim: int, num_classes: int) -> nn.Linear:
    """A head of independent classes, with the initial probability `PRIOR` for each."""
    head = nn.Linear(dim, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - PRIOR) / PRIOR))
    return head


def new_box_head(dim: int) -> BoxHead:
    """A box head whose initial output is 0, so that boxes do not move at first."""
    head = BoxHead(dim)
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return head


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """The logit of values in 0..1, kept ``eps`` away from both ends."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def moved(references: Tensor, change: Tensor, eps: float = 1e-5) -> Tensor:
    """Boxes ``[B, Q, 4]`` in 0..1: references (points or boxes) moved by a change of their logits.

    Args:
        references: ``[B, Q, 2]`` (x, y) or ``[B, Q, 4]`` (cx, cy, w, h) in 0..1.
        change: ``[B, Q, 4]``.
        eps: values are clamped to this distance from 0 and 1 before the logit.
    """
    logits = inverse_sigmoid(references, eps)
    if references.shape[-1] == 2:
        return (change + F.pad(logits, (0, 2))).sigmoid()
    return (change + logits).sigmoid()
