"""Values that change over a training run, as pure functions of the epoch.

The learning rate and the loss weights are both made of these curves. An epoch here is a float: ``step /
steps_per_epoch``, so a schedule reads the same whatever the batch size and the number of workers are. Pure Python:
knows nothing of optimizers, losses or configuration.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Interpolation = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True)
class Curve:
    """A value over epochs, given by points.

    Attributes:
        points: ``(epoch, value)`` pairs, epochs ascending; at least one.
        interpolation: what lies between two points: ``constant`` keeps the earlier value (steps), ``linear`` a straight
            line, ``cosine`` half a cosine wave, flat at both ends.
    """

    points: tuple[tuple[float, float], ...]
    interpolation: Interpolation = "linear"

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("a curve needs at least one (epoch, value) point")
        epochs = [epoch for epoch, _ in self.points]
        if any(later <= earlier for earlier, later in pairwise(epochs)):
            raise ValueError(f"the epochs of a curve must ascend, got {epochs}")

    def at(self, epoch: float) -> float:
        """Value at an epoch; the first point's value before it, the last point's after it."""
        right = bisect.bisect_right(self.points, epoch, key=lambda point: point[0])
        if right == 0:
            return self.points[0][1]
        if right == len(self.points) or self.interpolation == "constant":
            return self.points[right - 1][1]
        (start, first), (end, second) = self.points[right - 1], self.points[right]
        share = (epoch - start) / (end - start)
        if self.interpolation == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return first + (second - first) * share


def constant(value: float) -> Curve:
    """A curve that never changes."""
    return Curve(((0.0, value),))


@dataclass(frozen=True, slots=True)
class Product:
    """The product of curves: a warm-up times a decay."""

    curves: tuple[Curve, ...]

    def at(self, epoch: float) -> float:
        """Product of all curves' values at an epoch."""
        return math.prod(curve.at(epoch) for curve in self.curves)
