"""Pictures of a search: values and results of its trials, and their course over the epochs."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from detr_ray.viz.figure import new_figure
from detr_ray.viz.search_axes import ParameterAxis, axis_of
from detr_ray.viz.search_figure import (
    BEST_COLOUR,
    COLOURS,
    END_MARKS,
    FAILURE_STYLES,
    FEW_TRIALS,
    NO_RESULT_COLOUR,
    Goodness,
    Mode,
    PicturedTrial,
    best_of,
    draw_legend,
    empty_figure,
    score_of,
    title_of,
)

__all__ = ["PicturedTrial", "history", "parallel_coordinates"]

_SHELVES = {"failed": -0.09, "refused": -0.16, "no result": -0.23}
"""Height below the metric's axis at which lines of trials without a result end."""


def parallel_coordinates(
    trials: Sequence[PicturedTrial], metric: str, *, mode: Mode = "max", log_parameters: Collection[str] = ()
) -> Figure:
    """One line a trial through the values of its parameters to its best value of the metric.

    Args:
        trials: in order of their creation.
        metric: name of the metric.
        mode: whether large or small values of the metric are good.
        log_parameters: names of the parameters with a logarithmic axis. Values that are not numbers are choices.
    """
    names = list(dict.fromkeys(name for trial in trials for name in trial.values))
    figure = new_figure(max(8.0, 1.5 * (len(names) + 1) + 1.6), 5.6 if len(trials) <= 30 else 7.0)
    if not names:
        return empty_figure(figure)
    axes = [
        axis_of(name, [trial.values[name] for trial in trials if name in trial.values], name in log_parameters)
        for name in names
    ]
    scores = [score for trial in trials if (score := score_of(trial)) is not None]
    axes.append(axis_of(metric, scores) if scores else ParameterAxis(metric, ()))
    best = best_of(trials, mode)
    plot = figure.add_subplot()
    plot.set_axis_off()
    plot.set_xlim(-0.45, len(names) + 0.45)
    plot.set_ylim(-0.27 if len(scores) < len(trials) else -0.05, 1.03)
    goodness = Goodness(scores, mode)
    for place, axis in enumerate(axes):
        _draw_axis(plot, place, axis)
    if scores:
        _draw_colours(plot, len(names), axes[-1], goodness)
    _draw_shelves(plot, len(names), trials)
    for trial in sorted(trials, key=lambda trial: goodness.order(trial, best)):
        heights = _heights(trial, trials, axes[: len(names)])
        score = score_of(trial)
        heights.append(_SHELVES[_shelf(trial)] if score is None else axes[-1].place(score))
        style = FAILURE_STYLES.get(trial.state, "-")
        opacity = goodness.opacity(trial, best, len(trials))
        width = 3.0 if trial is best else 1.5
        plot.plot(range(len(heights)), heights, style, color=goodness.colour(trial, best), lw=width, alpha=opacity)
    figure.suptitle(title_of(trials, metric, best), fontsize=12, parse_math=False)
    draw_legend(figure, trials, best)
    return figure


def history(trials: Sequence[PicturedTrial], metric: str, *, mode: Mode = "max") -> Figure:
    """The metric of each trial over its epochs, and the best of all trials so far, in order of their creation.

    Args:
        trials: in order of their creation.
        metric: name of the metric.
        mode: whether large or small values of the metric are good.
    """
    figure = new_figure(12.0, 5.0)
    if not trials:
        return empty_figure(figure)
    best = best_of(trials, mode)
    goodness = Goodness([score for trial in trials if (score := score_of(trial)) is not None], mode)
    over_epochs, over_trials = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_histories(over_epochs, trials, best, goodness)
    _draw_best_so_far(over_trials, trials, mode, best, goodness)
    for plot in (over_epochs, over_trials):
        plot.set_ylabel(metric, parse_math=False)
        plot.grid(alpha=0.25)
        plot.spines[["top", "right"]].set_visible(False)
        if best is None:
            plot.set_yticks([])
            plot.text(0.5, 0.5, "no result yet", ha="center", color=NO_RESULT_COLOUR, transform=plot.transAxes)
    figure.suptitle(title_of(trials, metric, best), fontsize=12, parse_math=False)
    draw_legend(figure, trials, best, ends=True)
    return figure


def _shelf(trial: PicturedTrial) -> str:
    return trial.state if trial.state in FAILURE_STYLES else "no result"


def _heights(trial: PicturedTrial, trials: Sequence[PicturedTrial], axes: Sequence[ParameterAxis]) -> list[float]:
    """Where the trial's line crosses each axis. Lines through the same choice are spread, else they hide each other."""
    spread = 0.0 if len(trials) == 1 else trials.index(trial) / (len(trials) - 1) - 0.5
    heights = []
    for axis in axes:
        height = axis.place(trial.values[axis.name]) if axis.name in trial.values else math.nan
        if axis.categories is not None:
            height += spread * 0.35 / len(axis.categories)
        heights.append(height)
    return heights


def _draw_axis(plot: Axes, place: int, axis: ParameterAxis) -> None:
    plot.plot([place, place], [0, 1], color="black", lw=1.0, zorder=3)
    background = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
    for height, label in axis.ticks:
        plot.plot([place - 0.03, place], [height, height], color="black", lw=1.0, zorder=3)
        plot.text(
            place - 0.05,
            height,
            label,
            ha="right",
            va="center",
            fontsize=8,
            bbox=background,
            zorder=4,
            parse_math=False,
        )
    scale = "\n(log)" if axis.is_log else ""
    plot.text(
        place,
        1.05,
        _broken(axis.name) + scale,
        ha="center",
        va="bottom",
        fontsize=9,
        fontweight="bold",
        parse_math=False,
    )


def _broken(name: str) -> str:
    """A dotted name on several lines of about 16 letters."""
    lines = [""]
    for number, part in enumerate(name.split(".")):
        joined = part if number == 0 else f"{lines[-1]}.{part}"
        if number and len(joined) > 16:
            lines[-1] += "."
            lines.append(part)
        else:
            lines[-1] = joined
    return "\n".join(lines)


def _draw_colours(plot: Axes, place: int, axis: ParameterAxis, goodness: Goodness) -> None:
    """A strip beside the metric's axis with the colour of each value."""
    heights = np.linspace(0, 1, 100)
    strip = [COLOURS(np.clip(goodness.of(axis.low + height * (axis.high - axis.low)), 0, 1)) for height in heights]
    image = np.array(strip)[:, None, :]
    plot.imshow(image, extent=(place + 0.02, place + 0.07, 0, 1), origin="lower", aspect="auto", zorder=2)


def _draw_shelves(plot: Axes, place: int, trials: Sequence[PicturedTrial]) -> None:
    without = [_shelf(trial) for trial in trials if score_of(trial) is None]
    for name in dict.fromkeys(without):
        label = f"{name} ({without.count(name)})"
        plot.text(place + 0.04, _SHELVES[name], label, ha="left", va="center", fontsize=8, color=NO_RESULT_COLOUR)


def _draw_histories(
    plot: Axes, trials: Sequence[PicturedTrial], best: PicturedTrial | None, goodness: Goodness
) -> None:
    ends: list[tuple[float, float, PicturedTrial]] = []
    for trial in sorted(trials, key=lambda trial: goodness.order(trial, best)):
        points = [(epoch, value) for epoch, _, value in trial.history if math.isfinite(value)]
        if not points:
            continue
        epochs, values = zip(*points, strict=True)
        colour = goodness.colour(trial, best)
        width, front = (3.0, 4) if trial is best else (1.5, 2)
        alpha = goodness.opacity(trial, best, len(trials))
        marker = "o" if len(points) == 1 else ""
        plot.plot(epochs, values, marker=marker, ms=3, color=colour, lw=width, alpha=alpha, zorder=front)
        mark = END_MARKS.get(trial.state)
        if mark is not None:
            plot.plot(epochs[-1], values[-1], ls="", marker=mark, color=colour, ms=9, mew=2, mfc="none", zorder=front)
        ends.append((epochs[-1], values[-1], trial))
    plot.set_xlabel("epoch")
    plot.set_title("each trial over its epochs", fontsize=10)
    plot.set_xlim(0, max([1.0, *(epoch for epoch, _, _ in ends)]) * 1.02)
    plot.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _name_ends(plot, ends if len(ends) <= FEW_TRIALS else [end for end in ends if end[2] is best], best, goodness)


def _name_ends(
    plot: Axes, ends: Sequence[tuple[float, float, PicturedTrial]], best: PicturedTrial | None, goodness: Goodness
) -> None:
    """Writes the trials' names at the right, one below the other, each with a thin line to its trial's end."""
    if not ends:
        return
    low, high = plot.get_ylim()
    left, right = plot.get_xlim()
    gap = (high - low) * 0.045
    column = right + (right - left) * 0.03
    heights: list[float] = []
    ordered = sorted(ends, key=lambda end: end[1])
    for number, (_, value, _) in enumerate(ordered):
        room_above = high - gap * (len(ordered) - 1 - number)
        heights.append(max(min(value, room_above), heights[-1] + gap if heights else low))
    for (epoch, value, trial), height in zip(ordered, heights, strict=True):
        colour = goodness.colour(trial, best)
        plot.plot([epoch, column], [value, height], color=colour, lw=0.6, alpha=0.5, zorder=1)
        weight = "bold" if trial is best else "normal"
        plot.text(
            column, height, f" {trial.name}", va="center", color=colour, fontsize=8, fontweight=weight, parse_math=False
        )
    plot.set_xticks([tick for tick in plot.get_xticks() if left <= tick <= right])
    plot.set_xlim(left, column + (right - left) * 0.12)
    plot.set_ylim(low, high)


def _draw_best_so_far(
    plot: Axes, trials: Sequence[PicturedTrial], mode: Mode, best: PicturedTrial | None, goodness: Goodness
) -> None:
    better = max if mode == "max" else min
    so_far: float | None = None
    steps: list[float] = []
    for number, trial in enumerate(trials):
        score = score_of(trial)
        if score is not None:
            so_far = score if so_far is None else better(so_far, score)
        steps.append(math.nan if so_far is None else so_far)
        colour = goodness.colour(trial, best)
        mark = END_MARKS.get(trial.state, "+" if trial.state == "refused" else "o")
        if score is not None:
            plot.plot(
                number, score, ls="", marker=mark, color=colour, ms=8, mew=2, mfc=colour if mark == "o" else "none"
            )
        elif trial.state in FAILURE_STYLES:
            plot.plot(
                number,
                0.02,
                ls="",
                marker=mark,
                color=NO_RESULT_COLOUR,
                ms=7,
                mew=2,
                transform=plot.get_xaxis_transform(),
            )
    plot.step(range(len(steps)), steps, where="post", color=BEST_COLOUR, lw=1.2, alpha=0.7, zorder=1)
    plot.set_title("best of each trial, and best so far", fontsize=10)
    plot.set_xlabel("trial, in order of creation")
    if len(trials) <= FEW_TRIALS:
        plot.set_xticks(range(len(trials)), [trial.name for trial in trials], rotation=45, fontsize=8)
    else:
        plot.xaxis.set_major_locator(MaxNLocator(integer=True))
