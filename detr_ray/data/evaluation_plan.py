"""The plan of an evaluation: every image once, in batches of equal shapes, shared among workers."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from detr_ray.data.sample import SamplePlan, resized_sizes


def plan_evaluation(
    heights: np.ndarray, widths: np.ndarray, image_ids: np.ndarray, *, size: int, max_size: int, batch_size: int
) -> list[tuple[SamplePlan, ...]]:
    """Batches for evaluation: every image once, nothing random, no padding.

    The model's input for an image depends neither on the batch size nor on other images.

    Args:
        heights: ``[I]`` pixels of the stored images.
        widths: ``[I]`` pixels.
        image_ids: ``[I]``.
        size: length of the short side, pixels.
        max_size: most that the long side may have, pixels.
        batch_size: most images of a batch; images of different final sizes never share one.

    Returns:
        Batches, those of the largest images first. A sample's position is its place in this order.
    """
    sizes = resized_sizes(np.stack([heights, widths], axis=1), np.array(size), max_size).astype(np.int64)
    order = np.lexsort((np.arange(len(sizes)), -sizes[:, 1], -sizes[:, 0], -sizes.prod(axis=1)))
    plans = [
        SamplePlan(position, index, image_id, (final[0], final[1]))
        for position, (index, image_id, final) in enumerate(
            zip(order.tolist(), np.asarray(image_ids)[order].tolist(), sizes[order].tolist(), strict=True)
        )
    ]
    new_size = np.flatnonzero((np.diff(sizes[order], axis=0) != 0).any(axis=1)) + 1
    bounds = [0, *new_size.tolist(), len(plans)]
    return [
        tuple(plans[first : min(first + batch_size, stop)])
        for start, stop in pairwise(bounds)
        for first in range(start, stop, batch_size)
    ]


def split_evaluation(
    batches: Sequence[tuple[SamplePlan, ...]], world_size: int, rank: int
) -> list[tuple[SamplePlan, ...]]:
    """One worker's part of the evaluation: whole batches, with about as many pixels as any other worker's.

    Each batch goes, in the order given, to the worker that has the fewest pixels so far. Some workers get nothing where
    there are fewer batches than workers.
    """
    loads = [(0, worker) for worker in range(world_size)]
    mine = []
    for batch in batches:
        pixels, worker = loads[0]
        if worker == rank:
            mine.append(batch)
        heapq.heapreplace(loads, (pixels + sum(plan.size[0] * plan.size[1] for plan in batch), worker))
    return mine
