"""The training stream, addressed by position: what every sample of every step is, before a pixel is read.

Global batch ``step`` is a pure function of (image sizes, seed, global batch size, augmentation, windows, step). How
many workers share it, what was asked for before and which process asks makes no difference, so that a run can go on
anywhere with any number of workers. Random numbers are the raw 64-bit words of PCG64, which numpy keeps the same across
versions. Knows nothing of boxes, pixels, files or processes.
"""

from __future__ import annotations

import bisect
import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np

from detr_ray.data.augmentation import DRAWS_PER_SAMPLE, AugmentValues, Draws, draw, resized_sizes, share_draws
from detr_ray.data.errors import DataError
from detr_ray.data.grouping import order_by_shape, order_part_by_shape
from detr_ray.structures import SamplePlan

CACHED_WINDOWS = 4

LARGE_BATCH = 512
"""Global batches above this are ordered by shape inside when they are asked for: a process that plans for one of many
workers needs few of them, and ordering all of a window takes longer than anything else in planning it."""


@dataclass(frozen=True, slots=True, eq=False)
class _Window:
    """A planned stretch of an epoch: rows of the index, what was drawn for them, and the order they are taken in.

    The order within a large batch is not made yet.
    """

    rows: np.ndarray
    draws: Draws
    order: np.ndarray


class Planner:
    """Plans the training stream.

    An epoch is a permutation of the images, of which the last ``images % global_batch_size`` are left out (others in
    each epoch). Each window of it is grouped into global batches of like shape, which then come in random order.

    Where the images lie in shards, the permutation may be one of shards first: an epoch then takes a few shards at a
    time, in random order, and shuffles the images of these together. A window is of one such group of shards, but for
    the images that were too few for a last batch of the group before, which come with it.
    """

    def __init__(
        self,
        heights: np.ndarray,
        widths: np.ndarray,
        image_ids: np.ndarray,
        *,
        seed: int,
        global_batch_size: int,
        augment: AugmentValues,
        window: int = 4096,
        shard_of: np.ndarray | None = None,
        shards_at_a_time: int | None = None,
    ) -> None:
        """Plans for one data set; nothing is drawn yet.

        Args:
            heights: ``[I]`` pixels of the stored images.
            widths: ``[I]`` pixels.
            image_ids: ``[I]``.
            seed: not negative.
            global_batch_size: images of one step, over all workers.
            augment: what the augmentation draws from.
            window: most samples that are grouped by shape at a time, cut to whole global batches (at least one) and
                then such that the windows of an epoch are about equally long. The more batches in a window, the less
                padding, and the less the workers wait for each other: 64 global batches are a good measure.
            shard_of: ``[I]`` number of the file that each image lies in; needed with ``shards_at_a_time`` alone.
            shards_at_a_time: so many shards are shuffled together; None for all images. Part of what the stream is a
                function of.

        Raises:
            DataError: there are not enough images for one step.
        """
        if len(image_ids) < global_batch_size:
            raise DataError(
                f"{len(image_ids)} training images are too few for one step of train.global_batch_size="
                f"{global_batch_size}; set train.global_batch_size to {len(image_ids)} or less"
            )
        self.sizes = np.stack([heights, widths], axis=1).astype(np.int32)
        self.image_ids = np.asarray(image_ids, dtype=np.int64)
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.augment = augment
        self.steps_per_epoch = len(image_ids) // global_batch_size
        self._steps_at_most = max(1, window // global_batch_size)
        self._even_bounds = _cut_evenly(0, self.steps_per_epoch, self._steps_at_most)
        self._shards: tuple[np.ndarray, ...] = ()
        self._shards_at_a_time = shards_at_a_time
        if shards_at_a_time is not None:
            if shard_of is None:
                raise ValueError("shards_at_a_time needs shard_of")
            by_shard = np.argsort(shard_of, kind="stable").astype(np.int32)
            self._shards = tuple(np.split(by_shard, np.flatnonzero(np.diff(shard_of[by_shard])) + 1))
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()
        self._bounds: OrderedDict[int, tuple[int, ...]] = OrderedDict()
        self._shuffled: tuple[int, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        without_caches: dict[str, Any] = {"_windows": OrderedDict(), "_bounds": OrderedDict(), "_shuffled": None}
        return self.__dict__ | without_caches

    def place_of(self, step: int) -> tuple[int, int]:
        """(epoch, step within the epoch), both from 0."""
        return divmod(step, self.steps_per_epoch)

    def global_batch(self, step: int) -> tuple[SamplePlan, ...]:
        """The samples of one step, neighbours being of like shape."""
        return self.samples(step, 0, self.global_batch_size)

    def samples(self, step: int, first: int, last: int) -> tuple[SamplePlan, ...]:
        """The samples ``first..last-1`` of one step's global batch."""
        rows, draws = self._part(step, first, last)
        start = step * self.global_batch_size + first
        columns = zip(
            range(start, start + len(rows)),
            rows.tolist(),
            self.image_ids[rows].tolist(),
            draws.flip.tolist(),
            draws.resize.tolist(),
            draws.crop.tolist(),
            draws.size.tolist(),
            strict=True,
        )
        return tuple(
            SamplePlan(
                position=position,
                index=index,
                image_id=image_id,
                flip=flip,
                resize=(resize[0], resize[1]) if resize[0] else None,
                crop=(crop[0], crop[1], crop[2], crop[3]) if resize[0] else None,
                size=(final[0], final[1]),
            )
            for position, index, image_id, flip, resize, crop, final in columns
        )

    def epoch_sizes(self, epoch: int) -> np.ndarray:
        """Final sizes of a whole epoch, ``[steps_per_epoch, global_batch_size, 2]`` int32 (height, width) in pixels."""
        numbers = range(len(self.window_bounds(epoch)) - 1)
        windows = [self._plan_window(epoch, number, inside=True) for number in numbers]
        sizes = np.concatenate([window.draws.size[window.order] for window in windows])
        return sizes.reshape(self.steps_per_epoch, self.global_batch_size, 2)

    def window_bounds(self, epoch: int) -> tuple[int, ...]:
        """Steps of the epoch that its windows begin with, and the number of its steps at the end."""
        if self._shards_at_a_time is None:
            return self._even_bounds
        bounds = self._bounds.get(epoch)
        if bounds is None:
            images = np.cumsum([sum(map(len, group)) for group in self._shard_groups(epoch)])
            # A batch that two groups share goes with the second.
            ends = np.unique([0, *images // self.global_batch_size]).tolist()
            pieces = [_cut_evenly(start, end, self._steps_at_most)[:-1] for start, end in pairwise(ends)]
            bounds = self._bounds[epoch] = (*chain.from_iterable(pieces), self.steps_per_epoch)
            if len(self._bounds) > CACHED_WINDOWS:
                self._bounds.popitem(last=False)
        return bounds

    def _shard_groups(self, epoch: int) -> list[list[np.ndarray]]:
        """The rows of the shards that an epoch shuffles together, group by group."""
        assert self._shards_at_a_time is not None
        order = _random_order(self._words(epoch, 0), len(self._shards)).tolist()
        return [
            [self._shards[shard] for shard in order[start : start + self._shards_at_a_time]]
            for start in range(0, len(order), self._shards_at_a_time)
        ]

    def _permutation(self, epoch: int) -> np.ndarray:
        """Rows of the index in the order that an epoch takes them in, before they are grouped by shape."""
        if self._shuffled is not None and self._shuffled[0] == epoch:
            return self._shuffled[1]
        self._shuffled = epoch, self._shuffle(epoch)
        return self._shuffled[1]

    def _shuffle(self, epoch: int) -> np.ndarray:
        words = self._words(epoch, 0)
        if self._shards_at_a_time is None:
            return _random_order(words, len(self.image_ids))
        words.random_raw(len(self._shards))  # those that the order of the shards was drawn from
        parts = [np.concatenate(group) for group in self._shard_groups(epoch)]
        return np.concatenate([part[_random_order(words, len(part))] for part in parts])

    def _part(self, step: int, first: int, last: int) -> tuple[np.ndarray, Draws]:
        """Rows and draws of places ``first..last-1`` of one step."""
        epoch, step_of_epoch = self.place_of(step)
        bounds = self.window_bounds(epoch)
        number = bisect.bisect_right(bounds, step_of_epoch) - 1
        window = self._window(epoch, number)
        start = (step_of_epoch - bounds[number]) * self.global_batch_size
        places = window.order[start : start + self.global_batch_size]
        if self.global_batch_size > LARGE_BATCH:
            places = places[order_part_by_shape(window.draws.size[places], first, last)]
        else:
            places = places[first:last]
        return window.rows[places], window.draws.take(places)

    def _window(self, epoch: int, number: int) -> _Window:
        key = (epoch, number)
        if key in self._windows:
            self._windows.move_to_end(key)
        else:
            self._windows[key] = self._plan_window(epoch, number, inside=self.global_batch_size <= LARGE_BATCH)
            if len(self._windows) > CACHED_WINDOWS:
                self._windows.popitem(last=False)
        return self._windows[key]

    def _plan_window(self, epoch: int, number: int, *, inside: bool) -> _Window:
        size = self.global_batch_size
        first, last = self.window_bounds(epoch)[number : number + 2]
        rows = self._permutation(epoch)[first * size : last * size]

        words = self._words(epoch, 1 + number)
        uniform = _uniform(words.random_raw(len(rows) * DRAWS_PER_SAMPLE)).reshape(-1, DRAWS_PER_SAMPLE)
        uniform = share_draws(uniform, self.sizes[rows], self.augment.shared_draws)
        draws = draw(self.sizes[rows], uniform, self.augment)

        batches = order_by_shape(draws.size, size, inside=inside).reshape(-1, size)
        return _Window(rows, draws, batches[_random_order(words, len(batches))].ravel())

    def _words(self, epoch: int, stream: int) -> np.random.PCG64:
        """A source of random words for one purpose: stream 0 shuffles the epoch, the others are its windows'."""
        return np.random.PCG64(np.random.SeedSequence([self.seed, epoch, stream]))


def _random_order(words: np.random.PCG64, count: int) -> np.ndarray:
    """Puts so many things in random order."""
    # The numbers' own sort is several times as fast as one that has to say where they were: their last bits say it.
    bits = np.uint64(count.bit_length())
    keys = words.random_raw(count) >> bits << bits
    keys |= np.arange(count, dtype=np.uint64)
    keys.sort()
    return (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


def _cut_evenly(start: int, end: int, most: int) -> tuple[int, ...]:
    """Bounds of pieces of about equal length, none longer than ``most``, the last one the shortest."""
    length = -(-(end - start) // -(-(end - start) // most))
    return (*range(start, end, length), end)


def _uniform(words: np.ndarray) -> np.ndarray:
    """Random 64-bit words as numbers in [0, 1), of 53 bits each."""
    return (words >> np.uint64(11)) * 2.0**-53


def split_global_batch(
    batch: Sequence[SamplePlan], world_size: int, rank: int, micro_batch_size: int | None = None
) -> list[tuple[SamplePlan, ...]]:
    """One worker's part of a global batch, as micro-batches.

    Args:
        batch: as `Planner.global_batch` gives it.
        world_size: workers that share it; their parts differ by one image at most and need not be equal.
        rank: which of them.
        micro_batch_size: most images of one forward pass; None for no limit. The parts are cut as evenly as can be.

    Raises:
        DataError: there are fewer images than workers.
    """
    bounds = share_bounds(len(batch), world_size, rank, micro_batch_size)
    return [tuple(batch[first:last]) for first, last in bounds]


def share_bounds(
    global_batch_size: int, world_size: int, rank: int, micro_batch_size: int | None = None
) -> list[tuple[int, int]]:
    """The same as places in the global batch: (first, last + 1) of each micro-batch.

    Raises:
        DataError: there are fewer images than workers.
    """
    if global_batch_size < world_size:
        raise DataError(
            f"train.global_batch_size={global_batch_size} is less than the number of workers, {world_size}: some would "
            "have nothing to do. Raise train.global_batch_size or lower train.num_workers"
        )
    first, last = _pieces(0, global_batch_size, world_size)[rank]
    return _pieces(first, last, 1 if micro_batch_size is None else -(-(last - first) // micro_batch_size))


def _pieces(first: int, last: int, count: int) -> list[tuple[int, int]]:
    """A range in ``count`` pieces whose lengths differ by one at most, longer ones first."""
    least, longer = divmod(last - first, count)
    bounds = [first + piece * least + min(piece, longer) for piece in range(count + 1)]
    return list(pairwise(bounds))


def plan_evaluation(
    heights: np.ndarray, widths: np.ndarray, image_ids: np.ndarray, *, size: int, max_size: int, batch_size: int
) -> list[tuple[SamplePlan, ...]]:
    """Batches for evaluation: every image once, nothing random, no padding.

    What the model sees of an image depends neither on the batch size nor on the other images.

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
        SamplePlan(position, index, image_id, False, None, None, (final[0], final[1]))
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


def padding_fraction(batches: Iterable[Sequence[SamplePlan]]) -> float:
    """Share of the pixels of (micro-)batches that is padding, each padded to its largest height and width; 0..1."""
    padded = filled = 0
    for batch in batches:
        padded += len(batch) * max(plan.size[0] for plan in batch) * max(plan.size[1] for plan in batch)
        filled += sum(plan.size[0] * plan.size[1] for plan in batch)
    return 1 - filled / padded if padded else 0.0
