"""A list of transforms, one after the other: the size policy of a training stream.

Each has a probability and may end with an epoch. Knows none of them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from detr_ray.data.sample import Partner, Picture, Resize, Step


class Drawn(Protocol):
    """What a transform drew for the samples of a window."""

    @property
    def size(self) -> np.ndarray:
        """``[n, 2]`` int, (height, width) in pixels of each sample after its steps."""
        ...

    def steps(self, places: np.ndarray) -> list[tuple[Step, ...]]:
        """What is done to the samples at these places of the window; it brings them to their size.

        A resize at the end belongs to it, since another transform may follow.
        """
        ...

    def partners(self, places: np.ndarray) -> list[tuple[Partner, ...]]:
        """The other images that these samples' steps get."""
        ...


class Transform(Protocol):
    """Decides what is done to each sample of a window."""

    @property
    def draws_per_sample(self) -> int:
        """Numbers that one sample takes."""
        ...

    def draw(self, sizes: np.ndarray, uniform: np.ndarray, stored: np.ndarray) -> Drawn:
        """Decides for all samples of a window, also for those that it is not applied to in the end.

        Args:
            sizes: ``[n, 2]`` (height, width) in pixels, after the transforms before.
            uniform: ``[n, draws_per_sample]`` in [0, 1).
            stored: ``[n, 2]`` (height, width) of the stored images; partners have these sizes.
        """
        ...

    def shapes(self, sizes: np.ndarray) -> np.ndarray:
        """Sizes ``[m, 2]`` that include the longest side and the most oblong shape that images can get."""
        ...


def no_partners(place: int) -> tuple[Partner, ...]:
    """No partners: the sample is one image."""
    return ()


@dataclass(frozen=True, slots=True, eq=False)
class DrawnOneByOne:
    """What was drawn, with functions that give the steps and the partners of one place of the window."""

    size: np.ndarray
    steps_at: Callable[[int], tuple[Step, ...]]
    partners_at: Callable[[int], tuple[Partner, ...]] = no_partners

    def steps(self, places: np.ndarray) -> list[tuple[Step, ...]]:
        """See `Drawn`."""
        return [self.steps_at(place) for place in places.tolist()]

    def partners(self, places: np.ndarray) -> list[tuple[Partner, ...]]:
        """See `Drawn`."""
        return [self.partners_at(place) for place in places.tolist()]


@dataclass(frozen=True, slots=True)
class Entry:
    """One of the list.

    Attributes:
        transform: what is done.
        p: probability that it is done to a sample.
        until_epoch: the first epoch, counted from 0, without it; None: it is never switched off.
    """

    transform: Transform
    p: float = 1.0
    until_epoch: int | None = None

    @property
    def draws_per_sample(self) -> int:
        """Numbers that one sample takes, in every epoch; with p below 1, one of them decides whether it is done."""
        return self.transform.draws_per_sample + (self.p < 1)


@dataclass(frozen=True, slots=True)
class TransformSequence:
    """A `SizePolicy` of the planner.

    Attributes:
        entries: in the order in which they are done.
    """

    entries: tuple[Entry, ...]

    @property
    def draws_per_sample(self) -> int:
        """Numbers that one sample takes."""
        return sum(entry.draws_per_sample for entry in self.entries)

    def draw(self, sizes: np.ndarray, uniform: np.ndarray, epoch: int) -> PlannedSequence:
        """See `SizePolicy`."""
        current = sizes
        parts = []
        last = 0
        for entry in self.entries:
            first, last = last, last + entry.draws_per_sample
            if entry.until_epoch is not None and epoch >= entry.until_epoch:
                continue
            numbers = uniform[:, first:last]
            is_done = np.ones(len(sizes), bool)
            if entry.p < 1:
                is_done, numbers = numbers[:, 0] < entry.p, numbers[:, 1:]
            drawn = entry.transform.draw(current, numbers, sizes)
            current = np.where(is_done[:, None], drawn.size, current).astype(np.int32)
            parts.append((is_done, drawn))
        return PlannedSequence(current, tuple(parts))

    def largest_side(self, sizes: np.ndarray) -> int:
        """Length in pixels that no side of an augmented image exceeds, whatever is drawn.

        Args:
            sizes: ``[n, 2]`` (height, width) of the stored images in pixels, at least one.
        """
        oblong = 1.0
        for entry in self.entries:
            after = entry.transform.shapes(sizes)
            sizes = after if entry.p == 1 and entry.until_epoch is None else np.concatenate([sizes, after])
            oblong = max(oblong, float((sizes.max(axis=1) / sizes.min(axis=1)).max()))
        # Images between the most oblong ones may become a little longer, because their short side is rounded.
        return int(sizes.max()) + (0 if len(self.entries) == 1 else 1 + int(oblong / 2))


@dataclass(frozen=True, slots=True, eq=False)
class PlannedSequence:
    """What a sequence drew for a window; these are the `PlannedSizes` of the planner.

    Attributes:
        size: ``[n, 2]`` int32 (height, width) in pixels, final.
        parts: which samples each transform is done to, ``[n]`` bool, and what it drew.
    """

    size: np.ndarray
    parts: tuple[tuple[np.ndarray, Drawn], ...]

    def steps_before_resize(self, places: np.ndarray) -> list[tuple[Step, ...]]:
        """See `PlannedSizes`."""
        samples: list[list[Step]] = [[] for _ in range(len(places))]
        partners = [0] * len(places)
        for is_done, drawn in self.parts:
            chosen = np.flatnonzero(is_done[places])
            own = drawn.partners(places[chosen])
            for i, steps, others in zip(chosen.tolist(), drawn.steps(places[chosen]), own, strict=True):
                for step in steps:
                    samples[i].append(Combine(step, partners[i], len(others)) if others else step)
                partners[i] += len(others)
        for own_steps, (height, width) in zip(samples, self.size[places].tolist(), strict=True):
            if own_steps and own_steps[-1] == Resize((height, width)):
                own_steps.pop()
        return [tuple(own_steps) for own_steps in samples]

    def partners(self, places: np.ndarray) -> list[tuple[Partner, ...]]:
        """The other images of these samples, transform by transform."""
        samples: list[tuple[Partner, ...]] = [()] * len(places)
        for is_done, drawn in self.parts:
            chosen = np.flatnonzero(is_done[places])
            for i, partners in zip(chosen.tolist(), drawn.partners(places[chosen]), strict=True):
                samples[i] += partners
        return samples


@dataclass(frozen=True, slots=True)
class Combine:
    """A step that gets some of the sample's partners: those of the transform that it comes from."""

    step: Step
    first: int
    count: int

    def apply(self, picture: Picture, partners: Sequence[Picture]) -> Picture:
        """See `Step`."""
        return self.step.apply(picture, partners[self.first : self.first + self.count])


def always(entry: Entry) -> Entry:
    """An entry for a transform that is done to every sample in all epochs."""
    return replace(entry, p=1.0, until_epoch=None)
