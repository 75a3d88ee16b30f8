"""Axes of the parallel-coordinates picture: where a value is on its parameter's axis, and the axis's labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from detr_ray.viz.figure import cut

_FEWEST_LABELS = 3
_LONGEST_LABEL = 16


@dataclass(frozen=True)
class ParameterAxis:
    """One axis, from 0 (bottom) to 1 (top).

    Attributes:
        name: the parameter's or the metric's.
        ticks: (place, label) from the bottom to the top.
        categories: text of each choice, in the order of the axis; None: the axis is of numbers.
        low: number at the bottom; its logarithm on a logarithmic axis.
        high: number at the top; its logarithm on a logarithmic axis.
        is_log: whether the axis is logarithmic.
    """

    name: str
    ticks: tuple[tuple[float, str], ...]
    categories: tuple[str, ...] | None = None
    low: float = 0.0
    high: float = 1.0
    is_log: bool = False

    def place(self, value: Any) -> float:
        """Where a value is on the axis, in 0..1; NaN: nowhere."""
        if self.categories is not None:
            return _place_of_choice(self.categories.index(str(value)), len(self.categories))
        if not _is_number(value):
            return math.nan
        number = math.log10(value) if self.is_log else float(value)
        return (number - self.low) / (self.high - self.low)


def axis_of(name: str, values: Sequence[Any], is_log: bool = False) -> ParameterAxis:
    """The axis for a parameter's values.

    Args:
        name: the parameter's.
        values: at least one. If all of them are finite numbers, the axis is of numbers, else of choices.
        is_log: whether an axis of numbers is logarithmic; without effect unless all are above 0.
    """
    if not all(_is_number(value) for value in values):
        return _axis_of_choices(name, values)
    numbers = [float(value) for value in values]
    if is_log and min(numbers) > 0:
        return _log_axis(name, min(numbers), max(numbers))
    low, high = min(numbers), max(numbers)
    if low == high:
        pad = abs(low) / 2 or 0.5
        return ParameterAxis(name, ((0.5, number_text(low)),), None, low - pad, high + pad)
    few = sorted(set(numbers))
    if len(few) <= _FEWEST_LABELS:
        marks = few
    else:
        locator = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])
        marks = [float(mark) for mark in locator.tick_values(low, high)]
        low, high = min(low, marks[0]), max(high, marks[-1])
    ticks = tuple(((mark - low) / (high - low), number_text(mark)) for mark in marks)
    return ParameterAxis(name, ticks, None, low, high)


def number_text(value: float) -> str:
    """A number as short as a label needs it."""
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def _log_axis(name: str, lowest: float, highest: float) -> ParameterAxis:
    """Labels at powers of ten, at multiples of these where there would be too few, and at round numbers in between."""
    low, high = math.log10(lowest), math.log10(highest)
    pad = 0.03 * (high - low) or 0.3
    low, high = low - pad, high + pad
    exponents = range(math.floor(low) - 1, math.ceil(high) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7)):
        marks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        marks = [mark for mark in marks if low <= math.log10(mark) <= high]
        if len(marks) >= _FEWEST_LABELS:
            break
    else:
        found = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(lowest, highest)
        marks = [float(mark) for mark in found if mark > 0 and low <= math.log10(mark) <= high]
    step = math.ceil(len(marks) / 7)
    ticks = tuple(((math.log10(mark) - low) / (high - low), number_text(mark)) for mark in marks[::step])
    return ParameterAxis(name, ticks, None, low, high, is_log=True)


def _axis_of_choices(name: str, values: Sequence[Any]) -> ParameterAxis:
    categories = tuple(sorted({str(value) for value in values}))
    ticks = tuple(
        (_place_of_choice(number, len(categories)), cut(category, _LONGEST_LABEL))
        for number, category in enumerate(categories)
    )
    return ParameterAxis(name, ticks, categories)


def _place_of_choice(number: int, count: int) -> float:
    return (number + 0.5) / count


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
