"""Puts images of like shape next to each other, so that batches cut from the order need little padding.

Knows sizes only: not what the images are, nor how many workers will share a batch.
"""

from __future__ import annotations

import numpy as np


def order_by_shape(sizes: np.ndarray, group: int) -> np.ndarray:
    """Orders images such that groups of like shape follow one another.

    The images are halved again and again: down to groups of ``group``, then inside of each group down to single images,
    so that any run of neighbours within a group is of like shape too. Each cut is made along the measure (height,
    width, aspect, area) that leaves the least area when both halves are padded to their largest height and width. All
    cuts of one depth are made together: ``log2(n)`` rounds of sorting, no loop over images.

    Args:
        sizes: ``[n, 2]`` (height, width) in pixels; ``n`` is a multiple of ``group``.
        group: images of one group.

    Returns:
        ``[n]`` int64, a permutation; rows ``k * group`` to ``(k + 1) * group`` of it are one group.
    """
    heights, widths = sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)
    ranks = [_ranks(measure) for measure in (heights, widths, heights / widths, heights * widths)]
    order = np.arange(len(sizes))
    starts = np.zeros(min(1, len(sizes)), dtype=np.int64)
    while len(starts) < len(sizes):
        lengths = np.diff(starts, append=len(sizes))
        groups = lengths // group
        left = np.where(groups > 1, groups // 2 * group, lengths // 2)
        order = _cut(order, starts, lengths, left, ranks, heights, widths)
        starts = np.unique(np.concatenate([starts, starts + left]))
    return order


def _cut(
    order: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    left: np.ndarray,
    ranks: list[np.ndarray],
    heights: np.ndarray,
    widths: np.ndarray,
) -> np.ndarray:
    """Sorts each segment of the order by the measure of which the two parts need the least padded area."""
    segment_of = np.repeat(np.arange(len(starts)), lengths)
    # A segment of one image has no left part: reduceat then reads that image twice, the same for every measure.
    bounds = np.stack([starts, starts + left], axis=1).ravel()
    counts = np.stack([left, lengths - left], axis=1).ravel()
    orders, areas = [], []
    for rank in ranks:
        candidate = order[np.argsort(segment_of * len(order) + rank[order])]
        padded = np.maximum.reduceat(heights[candidate], bounds) * np.maximum.reduceat(widths[candidate], bounds)
        orders.append(candidate)
        areas.append((padded * counts).reshape(-1, 2).sum(axis=1))
    best = np.argmin(areas, axis=0)
    return np.choose(best[segment_of], orders)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Place of each value in sorted order; equal ones in the order they come in."""
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks
