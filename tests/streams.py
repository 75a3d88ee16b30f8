"""What a stream gives, by position: whichever worker gets a sample, it is the same one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from detr_ray.data.sample import SamplePlan
from detr_ray.engine.stream.batches import LocalBatches, WorkerPlan


def plans_by_position(shares: Sequence[WorkerPlan], steps: Sequence[int]) -> dict[int, SamplePlan]:
    """The plans of all samples of some steps, of all workers."""
    samples = chain.from_iterable(chain.from_iterable(share.step(step)) for step in steps for share in shares)
    return {sample.position: sample for sample in samples}


def boxes_and_pixels(sources: Iterable[LocalBatches], step: int) -> dict[int, tuple]:
    """Pixels without padding, and boxes, of all samples of a step; each worker has one micro-batch."""
    found = {}
    for source in sources:
        for (batch,) in source.train_batches(step, step + 1):
            ends = batch.counts.cumsum()
            for i, position in enumerate(batch.positions.tolist()):
                height, width = batch.sizes[i]
                boxes = batch.boxes_cxcywh[ends[i] - batch.counts[i] : ends[i]]
                found[position] = batch.images[i, :, :height, :width].tolist(), boxes.tolist()
    return found
