"""Puts images of like shape next to each other, so that batches cut from the order need little padding.

Knows sizes only: not what the images are, nor how many workers will share a batch.
"""

from __future__ import annotations

import numpy as np


def order_by_shape(sizes: np.ndarray, group: int) -> np.ndarray:
    """Orders images so that each group has images of similar shape.

    The images are halved repeatedly: down to groups of ``group``, then inside each group down to single images, so that
    neighbours within a group have similar shapes, too. Each cut is made along the measure (height, width, aspect, area)
    that leaves the least area when both halves are padded to their largest height and width. All cuts of one depth are
    made together: ``log2(n)`` rounds, no loop over images.

    Args:
        sizes: ``[n, 2]`` (height, width) in pixels; ``n`` is a multiple of ``group``.
        group: images of one group.

    Returns:
        ``[n]`` int64, a permutation; rows ``k * group`` to ``(k + 1) * group`` of it are one group.
    """
    heights, widths = np.ascontiguousarray(sizes.T, dtype=np.int32)
    measures = (heights, widths, heights / widths, heights.astype(np.int64) * widths)
    # Sorted once: a cut keeps each of these orders sorted within every segment.
    orders = np.stack([np.argsort(measure, kind="stable") for measure in measures])
    count = len(sizes)
    starts = np.zeros(min(1, count), dtype=np.int64)
    lengths = np.full(len(starts), count)
    # A segment of two is done: either cut leaves one image on each side.
    while count and lengths.max() > 2:
        groups = lengths // group
        left = np.where(groups > 1, groups // 2 * group, lengths // 2)
        orders = _cut(orders, starts, lengths, left, heights, widths)
        is_start = np.stack([left > 0, np.ones(len(left), bool)], axis=1)
        starts = np.stack([starts, starts + left], axis=1)[is_start]
        lengths = np.diff(starts, append=count)
    return orders[0]


def _cut(
    orders: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    left: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
) -> np.ndarray:
    """Cuts each segment along the measure by which the two parts need the least padded area.

    Returns:
        The orders, ``[measures, n]``, of the parts.
    """
    count = orders.shape[1]
    # A segment of one image has no left part: reduceat then reads that image twice, the same for every measure.
    bounds = np.stack([starts, starts + left], axis=1).ravel()
    counts = np.stack([left, lengths - left], axis=1).ravel()
    padded = np.maximum.reduceat(heights.take(orders), bounds, axis=1).astype(np.int64)
    padded *= np.maximum.reduceat(widths.take(orders), bounds, axis=1)
    padded *= counts
    best = (padded[:, 0::2] + padded[:, 1::2]).argmin(axis=0)

    is_left_place = np.repeat(np.tile([True, False], len(starts)), counts)
    is_left = np.empty(len(heights), dtype=bool)
    is_left[orders.take(np.repeat(best * count, lengths) + np.arange(count))] = is_left_place
    goes_left = is_left.take(orders).ravel()
    places = np.tile(is_left_place, len(orders))
    cut = np.empty_like(orders)
    # For every measure the same number of images goes left, so the sorted orders can be filled in place.
    cut.ravel()[np.flatnonzero(places)] = orders.ravel().compress(goes_left)
    cut.ravel()[np.flatnonzero(~places)] = orders.ravel().compress(~goes_left)
    return cut
