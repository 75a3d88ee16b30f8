"""The training stream, addressed by position: what every sample of every step is, before a pixel is read.

Global batch ``step`` is a pure function of (image sizes, seed, global batch size, size policy, windows, step). It is
the same for any number of workers, in any process, and whatever was planned before, so that a run can go on anywhere
with any number of workers.
Knows nothing of boxes, pixels, files or processes; of the augmentation it knows only the `SizePolicy`.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Protocol

import numpy as np

from detr_ray.data.errors import DataError
from detr_ray.data.grouping import order_by_shape
from detr_ray.data.random_numbers import uniform
from detr_ray.data.sample import Partner, SamplePlan, Step

CACHED_WINDOWS = 4

_ONCE = 1 << 20
"""How often an image is taken is counted in multiples of this fraction, so that sums are exact on every machine."""
_REPEATS = 2**32 - 1
"""The stream of random words that says which images are repeated; those of the windows have smaller numbers."""


class PlannedSizes(Protocol):
    """What a size policy decided for the samples of a window."""

    @property
    def size(self) -> np.ndarray:
        """``[n, 2]`` int32, final (height, width) of each sample in pixels."""
        ...

    def steps_before_resize(self, places: np.ndarray) -> list[tuple[Step, ...]]:
        """What is done to the samples at these places of the window before they are brought to their final size.

        That last resize is no step: reading a plan does it, for every sample.
        """
        ...

    def partners(self, places: np.ndarray) -> list[tuple[Partner, ...]]:
        """The other images of the window that the samples at these places are made of, in the order steps get them."""
        ...


class SizePolicy(Protocol):
    """Decides from random numbers what size each sample gets, by which steps, and with which partners."""

    @property
    def draws_per_sample(self) -> int:
        """Random numbers that one sample takes."""
        ...

    def draw(self, sizes: np.ndarray, uniform: np.ndarray, epoch: int) -> PlannedSizes:
        """Decides for the samples of a window.

        It sees the whole window, so it can choose the partners of a sample among the others by their sizes. A window
        has at least one global batch, but no more images than that for certain.

        Args:
            sizes: ``[n, 2]`` (height, width) of the stored images in pixels.
            uniform: ``[n, draws_per_sample]`` in [0, 1).
            epoch: the window's epoch, from 0.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Window:
    """A planned stretch of an epoch: rows of the index, what was drawn for them, and the order they are taken in."""

    rows: np.ndarray
    draws: PlannedSizes
    order: np.ndarray


class Planner:
    """Plans the training stream.

    An epoch is a permutation of the images, of which the last ``images % global_batch_size`` are left out (others in
    each epoch). Each window of it is grouped into global batches of like shape, which then come in random order.

    Where images are repeated, an epoch takes an image that is to be taken 2.3 times two or three times: by chance, but
    so that an epoch has as many samples as the numbers add up to.

    Where the images lie in shards, an epoch may take a few shards at a time, in random order, and shuffle the images of
    these together. A window then has images of one such group of shards. Those that are too few for a last batch of the
    group come with the next group.
    """

    def __init__(
        self,
        heights: np.ndarray,
        widths: np.ndarray,
        image_ids: np.ndarray,
        *,
        seed: int,
        global_batch_size: int,
        size_policy: SizePolicy,
        window: int = 4096,
        shard_of: np.ndarray | None = None,
        shards_at_a_time: int | None = None,
        repeats: np.ndarray | None = None,
    ) -> None:
        """Plans for one data set; nothing is drawn yet.

        Args:
            heights: ``[I]`` pixels of the stored images.
            widths: ``[I]`` pixels.
            image_ids: ``[I]``.
            seed: not negative.
            global_batch_size: images of one step, over all workers.
            size_policy: decides the final sizes of images.
            window: most samples that are grouped by shape at a time, in whole global batches (at least one). The
                windows of an epoch are about equally long. More batches in a window mean less padding and shorter waits
                of the workers for each other: 64 are enough.
            shard_of: ``[I]`` number of the file that each image lies in; needed with ``shards_at_a_time`` alone.
            shards_at_a_time: number of shards that are shuffled together; None: all images are. Another value gives
                another stream.
            repeats: ``[I]`` how often an epoch takes each image on average; None for once.

        Raises:
            DataError: there are not enough images for one step.
        """
        self._repeats = None if repeats is None else np.round(repeats * _ONCE).astype(np.int64)
        self.epoch_samples = len(image_ids) if self._repeats is None else int(self._repeats.sum()) // _ONCE
        if self.epoch_samples < global_batch_size:
            raise DataError(
                f"{self.epoch_samples} training images are too few for one step of train.global_batch_size="
                f"{global_batch_size}; set train.global_batch_size to {self.epoch_samples} or less"
            )
        self.sizes = np.stack([heights, widths], axis=1).astype(np.int32)
        self.image_ids = np.asarray(image_ids, dtype=np.int64)
        self.seed = seed
        self.global_batch_size = global_batch_size
        self._size_policy = size_policy
        self.steps_per_epoch = self.epoch_samples // global_batch_size
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
        """The samples of one step; neighbours have similar shapes."""
        return self.samples(step, 0, self.global_batch_size)

    def samples(self, step: int, first: int, last: int) -> tuple[SamplePlan, ...]:
        """The samples ``first..last-1`` of one step's global batch."""
        epoch, step_of_epoch = self.place_of(step)
        bounds = self.window_bounds(epoch)
        number = bisect.bisect_right(bounds, step_of_epoch) - 1
        window = self._window(epoch, number)
        start = (step_of_epoch - bounds[number]) * self.global_batch_size
        places = window.order[start + first : start + min(last, self.global_batch_size)]
        rows = window.rows[places]
        positions = step * self.global_batch_size + first + np.arange(len(rows))
        return tuple(
            SamplePlan(
                position, index, image_id, (size[0], size[1]), steps,
                self._plan_partners(window, partners, position) if partners else (),
            )
            for position, index, image_id, size, steps, partners in zip(
                positions.tolist(),
                rows.tolist(),
                self.image_ids[rows].tolist(),
                window.draws.size[places].tolist(),
                window.draws.steps_before_resize(places),
                window.draws.partners(places),
                strict=True,
            )
        )  # fmt: skip

    def _plan_partners(self, window: _Window, partners: tuple[Partner, ...], position: int) -> tuple[SamplePlan, ...]:
        """Plans of one sample's partners."""
        rows = window.rows[[partner.place for partner in partners]]
        columns = zip(partners, rows.tolist(), self.image_ids[rows].tolist(), strict=True)
        return tuple(
            SamplePlan(position, row, image_id, partner.size, partner.steps) for partner, row, image_id in columns
        )

    def epoch_sizes(self, epoch: int) -> np.ndarray:
        """Final sizes of an epoch, ``[steps_per_epoch, global_batch_size, 2]`` int32 (height, width) in pixels."""
        numbers = range(len(self.window_bounds(epoch)) - 1)
        windows = [self._plan_window(epoch, number) for number in numbers]
        sizes = np.concatenate([window.draws.size[window.order] for window in windows])
        return sizes.reshape(self.steps_per_epoch, self.global_batch_size, 2)

    def window_bounds(self, epoch: int) -> tuple[int, ...]:
        """Steps of the epoch that its windows begin with, and the number of its steps at the end."""
        if self._shards_at_a_time is None:
            return self._even_bounds
        bounds = self._bounds.get(epoch)
        if bounds is None:
            images = np.cumsum([sum(map(len, group)) for group in self._shard_groups(epoch)])
            # A batch with samples of two groups is in the window of the second.
            ends = np.unique([0, *images // self.global_batch_size]).tolist()
            pieces = [_cut_evenly(start, end, self._steps_at_most)[:-1] for start, end in pairwise(ends)]
            bounds = self._bounds[epoch] = (*chain.from_iterable(pieces), self.steps_per_epoch)
            if len(self._bounds) > CACHED_WINDOWS:
                self._bounds.popitem(last=False)
        return bounds

    def _shard_groups(self, epoch: int) -> list[list[np.ndarray]]:
        """The rows of the shards that an epoch shuffles together, group by group; repeated ones as often as it does."""
        assert self._shards_at_a_time is not None
        order = _random_order(self._words(epoch, 0), len(self._shards)).tolist()
        shards, times = self._shards, self._times_taken(epoch)
        if times is not None:
            shards = tuple(np.repeat(rows, times[rows]) for rows in shards)
        return [
            [shards[shard] for shard in order[start : start + self._shards_at_a_time]]
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
            times = self._times_taken(epoch)
            rows = np.arange(len(self.image_ids)) if times is None else np.repeat(np.arange(len(times)), times)
            return rows[_random_order(words, len(rows))]
        words.random_raw(len(self._shards))  # those that the order of the shards was drawn from
        parts = [np.concatenate(group) for group in self._shard_groups(epoch)]
        return np.concatenate([part[_random_order(words, len(part))] for part in parts])

    def _times_taken(self, epoch: int) -> np.ndarray | None:
        """How often an epoch takes each image, ``[I]``; None: each once.

        Systematic sampling (Madow 1949): the images' numbers are laid end to end in random order, and marks at distance
        1 say which image is taken. So an epoch has as many samples as the whole numbers in their sum.
        """
        if self._repeats is None:
            return None
        order = _random_order(self._words(epoch, _REPEATS), len(self._repeats))
        ends = self._repeats[order].cumsum()
        times = np.empty(len(order), np.int64)
        times[order] = ends // _ONCE - (ends - self._repeats[order]) // _ONCE
        return times

    def _window(self, epoch: int, number: int) -> _Window:
        key = (epoch, number)
        if key in self._windows:
            self._windows.move_to_end(key)
        else:
            self._windows[key] = self._plan_window(epoch, number)
            if len(self._windows) > CACHED_WINDOWS:
                self._windows.popitem(last=False)
        return self._windows[key]

    def _plan_window(self, epoch: int, number: int) -> _Window:
        size = self.global_batch_size
        first, last = self.window_bounds(epoch)[number : number + 2]
        rows = self._permutation(epoch)[first * size : last * size]

        words = self._words(epoch, 1 + number)
        draws_per_sample = self._size_policy.draws_per_sample
        numbers = uniform(words.random_raw(len(rows) * draws_per_sample)).reshape(len(rows), draws_per_sample)
        draws = self._size_policy.draw(self.sizes[rows], numbers, epoch)

        batches = order_by_shape(draws.size, size).reshape(-1, size)
        return _Window(rows, draws, batches[_random_order(words, len(batches))].ravel())

    def _words(self, epoch: int, stream: int) -> np.random.PCG64:
        """A source of random words for one purpose: stream 0 shuffles the epoch, most others are its windows'."""
        return np.random.PCG64(np.random.SeedSequence([self.seed, epoch, stream]))


def _random_order(words: np.random.PCG64, count: int) -> np.ndarray:
    """Puts so many things in random order."""
    # The last bits are left out so that the order is the one that earlier versions drew.
    return np.argsort(words.random_raw(count) >> np.uint64(count.bit_length()), kind="stable")


def _cut_evenly(start: int, end: int, most: int) -> tuple[int, ...]:
    """Bounds of pieces of about equal length, none longer than ``most``, the last one the shortest."""
    length = -(-(end - start) // -(-(end - start) // most))
    return (*range(start, end, length), end)


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
