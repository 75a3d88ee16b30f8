"""Puts images of like shape next to each other, so that batches cut from the order need little padding.

Knows sizes only: not what the images are, nor how many workers will share a batch.
"""

from __future__ import annotations

import numpy as np

_WHOLE = 256
"""Segments that are ordered whole where a part is wanted: it takes no longer than finding the part."""

_PLACE_BITS, _SIDE_BITS = 21, 15


def order_by_shape(sizes: np.ndarray, group: int, *, inside: bool = True) -> np.ndarray:
    """Orders images such that groups of like shape follow one another.

    The images are halved again and again: down to groups of ``group``, then inside of each group down to single images,
    so that any run of neighbours within a group is of like shape too. Each cut is made along the measure (height,
    width, aspect, area) that leaves the least area when both halves are padded to their largest height and width. All
    cuts of one depth are made together: ``log2(n)`` rounds, no loop over images.

    Cuts do not depend on each other. So a group may be ordered inside later and on its own, by its images' sizes alone,
    with the same result.

    Args:
        sizes: ``[n, 2]`` (height, width) in pixels; ``n`` is a multiple of ``group``.
        group: images of one group.
        inside: whether to order the images of a group too; they keep the order they come in otherwise.

    Returns:
        ``[n]`` int64, a permutation; rows ``k * group`` to ``(k + 1) * group`` of it are one group.
    """
    heights, widths = np.ascontiguousarray(sizes.T, dtype=np.int32)
    order = _halve(measure_orders(heights, widths), group, inside, heights, widths)
    return order if inside else np.sort(order.reshape(-1, group), axis=1).ravel()


def _halve(orders: np.ndarray, group: int, inside: bool, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """All cuts of the images of some orders."""
    count = orders.shape[1]
    # Two images lie in each order by that order's measure, and no cut between them needs less area than another.
    least = 2 if inside else group
    starts = np.zeros(min(1, count), dtype=np.int64)
    lengths = np.full(len(starts), count)
    while count and lengths.max() > least:
        groups = lengths // group
        left = np.where(groups > 1, groups // 2 * group, lengths // 2 if inside else 0)
        orders = _cut(orders, starts, lengths, left, heights, widths)
        is_start = np.stack([left > 0, np.ones(len(left), bool)], axis=1)
        starts = np.stack([starts, starts + left], axis=1)[is_start]
        lengths = np.diff(starts, append=count)
    return orders[0]


def order_part_by_shape(sizes: np.ndarray, first: int, last: int) -> np.ndarray:
    """Places ``first..last-1`` of what `order_by_shape` makes of one group, without ordering the rest of it.

    Args:
        sizes: ``[n, 2]`` (height, width) in pixels of the group.
        first: first place that is wanted.
        last: the place after the last one that is wanted.
    """
    heights, widths = np.ascontiguousarray(sizes.T, dtype=np.int32)
    orders, start = measure_orders(heights, widths), 0
    while (count := orders.shape[1]) > _WHOLE:
        left = count // 2
        if first < start + left < last:
            break
        orders = _cut(orders, np.array([0]), np.array([count]), np.array([left]), heights, widths)
        is_left = last <= start + left
        orders = np.ascontiguousarray(orders[:, :left] if is_left else orders[:, left:])
        start += 0 if is_left else left
    return _halve(orders, orders.shape[1], True, heights, widths)[first - start : last - start]


def measure_orders(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The images by each measure; cutting keeps them sorted within every segment, so that they are sorted once."""
    count = len(heights)
    tall, wide = heights.astype(np.int64), widths.astype(np.int64)
    aspects = heights / widths
    if count > 1 << _PLACE_BITS or max(heights.max(initial=0), widths.max(initial=0)) >= 1 << _SIDE_BITS:
        return np.stack([np.argsort(measure, kind="stable") for measure in (tall, wide, aspects, tall * wide)])
    # Keys that hold the place in their last bits sort as a stable argsort does, at a multiple of its speed. Aspects of
    # such sides differ in the first half of their digits or not at all, so that they do without the last ones.
    last = (1 << _PLACE_BITS) - 1
    keys = np.stack(
        [tall << _PLACE_BITS, wide << _PLACE_BITS, aspects.view(np.int64) & ~last, tall * wide << _PLACE_BITS]
    )
    keys |= np.arange(count)
    keys.sort(axis=1)
    return keys & last


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
    best = _places_of_least(padded[:, 0::2] + padded[:, 1::2])

    is_left_place = np.repeat(np.tile([True, False], len(starts)), counts)
    is_left = np.empty(len(heights), dtype=bool)
    is_left[orders.take(np.repeat(best * count, lengths) + np.arange(count))] = is_left_place
    goes_left = is_left.take(orders).ravel()
    places = np.tile(is_left_place, len(orders))
    cut = np.empty_like(orders)
    # Of every measure as many go left: what is taken out in order is put in in order.
    cut.ravel()[np.flatnonzero(places)] = orders.ravel().compress(goes_left)
    cut.ravel()[np.flatnonzero(~places)] = orders.ravel().compress(~goes_left)
    return cut


def _places_of_least(rows: np.ndarray) -> np.ndarray:
    """Like ``argmin(rows, axis=0)`` of a few long rows, several times as fast."""
    best, least = np.zeros(rows.shape[1], np.int64), rows[0]
    for place in range(1, len(rows)):
        better = rows[place] < least
        best[better] = place
        least = np.minimum(least, rows[place])
    return best
