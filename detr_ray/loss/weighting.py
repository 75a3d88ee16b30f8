"""Weights of costs and losses: a number, or anything that says its value at an epoch.

Knows nothing of the losses themselves, nor of how a schedule is written in a config file.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias


class Scheduled(Protocol):
    """A value over a training run, for example a ``detr_ray.schedules.Curve``."""

    def at(self, epoch: float) -> float:
        """Value at an epoch; 2.5 is the middle of the third epoch."""
        ...


Weight: TypeAlias = float | Scheduled


def weight_at(weight: Weight, epoch: float) -> float:
    """Value of a weight at an epoch; a plain number is the same at all of them."""
    if isinstance(weight, int | float):
        return float(weight)
    return float(weight.at(epoch))


def weight_from_config(value: Any) -> Weight:
    """What a config section holds for a weight (a number, a schedule with ``curve()``, or a curve) as a weight.

    Raises:
        TypeError: the value is none of these.
    """
    if isinstance(value, int | float):
        return float(value)
    if hasattr(value, "curve"):
        value = value.curve()
    if not hasattr(value, "at"):
        raise TypeError(f"a loss weight is a number or a schedule, got {type(value).__name__}")
    scheduled: Scheduled = value
    return scheduled
