"""Matcher and criterion alone, forward and backward: all decoder layers at once against one after the other.

    python -m benchmarks criterion

8 images, 100 queries, 92 logits, 6 decoder layers, 20 boxes an image; and 2 images with 8 boxes. Both give the same
losses and are trained through: the time is that of the losses, their weighted sum and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.baseline.criterion import PlainCriterion
from benchmarks.harness import Row, alternate
from detr_ray.config import LossConfig
from detr_ray.loss import SetCriterion, build_criterion
from detr_ray.structures import LayerOutput, ModelOutput, Target

QUERIES, CLASSES, LAYERS = 100, 91, 6


def draw_case(images: int, boxes: int) -> tuple[Tensor, Tensor, list[Target]]:
    """Logits and boxes of all layers, as leaves, and targets."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LAYERS, images, QUERIES, CLASSES + 1, generator=generator).requires_grad_()
    predicted = torch.rand(LAYERS, images, QUERIES, 4, generator=generator).mul(0.4).add(0.2).requires_grad_()
    targets = [
        Target(
            labels=torch.randint(CLASSES, (boxes,), generator=generator),
            boxes=torch.rand(boxes, 4, generator=generator) * 0.4 + 0.2,
        )
        for _ in range(images)
    ]
    return logits, predicted, targets


def scored(
    criterion: SetCriterion | PlainCriterion, logits: Tensor, boxes: Tensor, targets: list[Target]
) -> Callable[[], float]:
    """One pass: the total, whose gradient is computed too."""

    def once() -> float:
        layers = [LayerOutput(pred_logits=a, pred_boxes=b) for a, b in zip(logits, boxes, strict=True)]
        last = layers[-1]
        output = ModelOutput(pred_logits=last["pred_logits"], pred_boxes=last["pred_boxes"], aux_outputs=layers[:-1])
        losses = criterion(output, targets)
        total = criterion.total(losses)
        torch.autograd.grad(total, (logits, boxes))
        return float(total.detach())

    return once


def run() -> list[Row]:
    """Both sizes."""
    rows = []
    for images, boxes in ((8, 20), (2, 8)):
        case = draw_case(images, boxes)
        ours = scored(build_criterion(LossConfig(), CLASSES), *case)
        plain = scored(PlainCriterion(CLASSES), *case)
        assert abs(ours() - plain()) < 1e-4 * abs(plain()), "both must give the same loss"
        times = alternate({"ours": ours, "plain": plain}, rounds=60, warmup=5)
        rows.append(
            Row(
                f"criterion, {images} images x {boxes} boxes, {LAYERS} layers",
                times["ours"].median * 1e3,
                times["plain"].median * 1e3,
                "ms",
                "lower",
                "forward and backward",
                max(times["ours"].spread, times["plain"].spread),
            )
        )
    return rows
