"""Which cells of a pyramid become queries, and the boxes that they start from (two-stage Deformable DETR, DINO)."""

from __future__ import annotations

import torch
from torch import Tensor

from detr_ray.model.heads import inverse_sigmoid
from detr_ray.model.pyramid import Pyramid

SILENT = -10.0
"""Logit of masked predictions, whose loss is then almost 0."""
_SMALLEST, _LARGEST = 0.01, 0.99
"""Proposals whose centre or size is outside of these limits are left out."""


def cell_anchors(memory: Pyramid) -> tuple[Tensor, Tensor]:
    """The box that each cell's proposal starts from, and which cells propose.

    Returns:
        ``[B or 1, S, 4]`` logits of (cx, cy, w, h): the cell's middle, a twentieth of the image in the first map, and
        twice as much in each further one; and ``[B, S]`` bool, False in the padding and at the very border.
    """
    sizes = torch.cat(
        [
            torch.full((height * width, 2), 0.05 * 2.0**level, device=memory.cells.device)
            for level, (height, width) in enumerate(memory.sizes)
        ]
    )
    centres = memory.centres()
    boxes_cxcywh = torch.cat((centres, sizes.expand(centres.shape[0], -1, -1)), dim=-1)
    is_usable = ((boxes_cxcywh > _SMALLEST) & (boxes_cxcywh < _LARGEST)).all(-1).expand(memory.cells.shape[0], -1)
    if memory.padding is not None:
        is_usable = is_usable & ~memory.padding
    return inverse_sigmoid(boxes_cxcywh), is_usable


def best_cells(scores: Tensor, is_usable: Tensor, count: int) -> Tensor:
    """The cells with the highest scores, the best one first. If there are too few, the best ones are repeated.

    Args:
        scores: ``[B, S]``.
        is_usable: ``[B, S]`` bool, which cells may be chosen.
        count: cells to choose, of each image.

    Returns:
        ``[B, count]`` int64.
    """
    ranking = scores.detach().masked_fill(~is_usable, -torch.inf)
    best = ranking.topk(torch.sym_min(count, ranking.shape[1]), dim=1).indices
    rank = torch.arange(count, device=best.device) % is_usable.sum(1, keepdim=True).clamp(min=1)
    return best.gather(1, rank)


def repetitions(is_usable: Tensor, count: int) -> Tensor:
    """Which of the cells that `best_cells` chooses were chosen before, ``[B, count]`` bool."""
    return torch.arange(count, device=is_usable.device) >= is_usable.sum(1, keepdim=True)


def at_cells(values: Tensor, chosen: Tensor) -> Tensor:
    """Values ``[B or 1, S, D]`` of the chosen cells ``[B, Q]``, ``[B, Q, D]``.

    By ``gather``: tracing ``take_along_dim`` would turn sizes into constants.
    """
    batch, _ = chosen.shape
    return values.expand(batch, -1, -1).gather(1, chosen[..., None].expand(-1, -1, values.shape[-1]))
