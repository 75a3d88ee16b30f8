"""Contrastive denoising (Zhang et al. 2022, DINO): queries that start from noised boxes, in training alone.

A group has two queries for each box of an image. One starts near the box, and its target is the box; the other starts
further away, and its target is no object. The noise of an image is a function of seed, step and the image's place in
the stream, so it depends neither on workers nor on micro-batches.

Letters: ``B`` images, ``G`` groups, ``N`` boxes of the image of the global batch that has the most, ``P = G * 2 * N``
denoising queries: group by group; in each group, the positive queries (whose target is a box) come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_ray.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detr_ray.model.heads import inverse_sigmoid
from detr_ray.structures import StepInfo, Target, copied

NONE = -1
"""Label of a query without a box, and of one whose label is not replaced."""
_STREAM = 1
"""Makes these random numbers independent of those for other purposes with the same seed."""


class Noise(NamedTuple):
    """The noise for the boxes of a batch; on the host.

    Attributes:
        new_labels: ``[B, G, 2, N]`` int64, the label that replaces a box's own one; `NONE` if that stays.
        shifts: ``[B, G, 2, N, 4]`` float32, how far left, top, right and bottom move, in halves of the box's width and
            height and before ``box_noise``.
    """

    new_labels: np.ndarray
    shifts: np.ndarray


class DenoisingQueries(NamedTuple):
    """The decoder's input.

    Attributes:
        labels: ``[B, P]`` int64, noised; `NONE` where an image has fewer boxes than ``N``.
        reference_logits: ``[B, P, 4]`` logits of (cx, cy, w, h), noised; 0 where an image has fewer boxes.
        groups: how many groups there are.
    """

    labels: Tensor
    reference_logits: Tensor
    groups: int


def groups_for(num_queries: int, most_boxes: int) -> int:
    """The number of groups, at least 1, that gives about this number of positive queries."""
    return max(1, num_queries // most_boxes) if most_boxes else 1


def draw_noise(
    positions: Sequence[int], counts: Sequence[int], info: StepInfo, groups: int, num_classes: int, label_noise: float
) -> Noise:
    """Draws the noise of a batch, on the host.

    Args:
        positions: the images' places in the stream.
        counts: their boxes.
        info: the step's.
        groups: how many groups there are.
        num_classes: classes that a label may be replaced by.
        label_noise: half of this share of the labels is replaced.
    """
    shape = (len(counts), groups, 2, info.most_boxes)
    new_labels, shifts = np.full(shape, NONE, np.int64), np.zeros((*shape, 4), np.float32)
    for image, (position, count) in enumerate(zip(positions, counts, strict=True)):
        seed = np.random.SeedSequence([info.seed, info.step, position], spawn_key=(_STREAM,))
        generator = np.random.default_rng(seed)
        of_image = (groups, 2, count)
        is_replaced = generator.random(of_image) < label_noise / 2
        drawn = generator.integers(num_classes, size=of_image)
        new_labels[image, ..., :count] = np.where(is_replaced, drawn, NONE)
        distance = generator.random((*of_image, 4), np.float32)
        distance[:, 1] += 1  # at least half a side away; the positive ones stay closer
        is_positive = generator.integers(2, size=distance.shape) > 0
        shifts[image, ..., :count, :] = np.where(is_positive, distance, -distance)
    return Noise(new_labels, shifts)


def noised(targets: Sequence[Target], noise: Noise, box_noise: float, eps: float) -> DenoisingQueries:
    """Applies noise to labels and boxes, on their device.

    Args:
        targets: of B images, each with at most N boxes.
        noise: for them.
        box_noise: scale of the shifts. At 1, the corners of positive boxes move by at most half of width and height.
        eps: smallest distance of coordinates from 0 and 1.
    """
    most = noise.new_labels.shape[-1]
    free = [most - len(target["labels"]) for target in targets]
    pairs = list(zip(targets, free, strict=True))
    labels = torch.stack([F.pad(target["labels"], (0, more), value=NONE) for target, more in pairs])[:, None, None]
    boxes = torch.stack([F.pad(target["boxes"], (0, 0, 0, more)) for target, more in pairs])[:, None, None]
    new_labels, shifts = (copied(part, labels.device) for part in noise)
    half = boxes[..., 2:].repeat(1, 1, 1, 1, 2) / 2
    corners = (cxcywh_to_xyxy(boxes) + shifts * half * box_noise).clamp(0, 1)
    logits = inverse_sigmoid(xyxy_to_cxcywh(corners), eps).masked_fill((labels < 0)[..., None], 0.0)
    return DenoisingQueries(
        labels=torch.where(new_labels < 0, labels, new_labels).flatten(1),
        reference_logits=logits.flatten(1, 3),
        groups=new_labels.shape[1],
    )


def no_denoising(batch: int, device: torch.device) -> DenoisingQueries:
    """Zero denoising queries."""
    labels = torch.zeros(batch, 0, dtype=torch.int64, device=device)
    return DenoisingQueries(labels, torch.zeros(batch, 0, 4, device=device), groups=1)


def allowed_pairs(denoising: int, groups: int, others: int, device: torch.device) -> Tensor | None:
    """The self-attention mask: denoising queries attend to their own group and to the others, the others to each other.

    Args:
        denoising: denoising queries, which come first.
        groups: how many groups these are divided into.
        others: the other queries.
        device: of the result.

    Returns:
        ``[denoising + others] * 2`` bool, True where a query (first) may attend to another one; None: everywhere.
    """
    if not denoising:
        return None
    group = (torch.arange(denoising + others, device=device) // (denoising // groups)).clamp(max=groups)
    return (group[:, None] == group) | (group == groups)
