"""Values that change during training, as functions of the epoch: learning rates and loss weights.

An epoch is a float, ``step / steps_per_epoch``, so schedules do not depend on the batch size.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

Interpolation = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True)
class Curve:
    """A value over epochs, given by points.

    Attributes:
        points: ``(epoch, value)`` pairs with ascending epochs; at least one.
        interpolation: values between two points: ``constant`` (the earlier value), ``linear`` or ``cosine`` (half a
            cosine wave, flat at both ends).
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
        """Value at an epoch. Before the first point: its value; after the last point: its value."""
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
    """A curve with the same value at all epochs."""
    return Curve(((0.0, value),))


class Scheduled(Protocol):
    """Has a value at every epoch: a `Curve`, or a schedule of the configuration."""

    def at(self, epoch: float) -> float:
        """Value at an epoch."""
        ...


def value_at(value: float | Scheduled, epoch: float) -> float:
    """Value at an epoch. A plain number is the same at all epochs."""
    return float(value) if isinstance(value, int | float) else value.at(epoch)


@dataclass(frozen=True, slots=True)
class Product:
    """The product of curves, for example warm-up times decay."""

    curves: tuple[Curve, ...]

    def at(self, epoch: float) -> float:
        """Value at an epoch."""
        return math.prod(curve.at(epoch) for curve in self.curves)
