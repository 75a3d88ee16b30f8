"""Pictures of a training: losses and scores, schedules, and how the time of a step was spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from detr_ray.viz.figure import message_figure, new_figure, write_title

PHASES = ("data_wait", "forward", "loss", "backward", "update")
_REST = "rest"
_PHASE_COLOURS = ("#d62728", "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#b0b0b0")
_RUN_STYLES = ("-", "--", ":", "-.")
_MOST_POINTS = 2000
_DASH = 6.0
NOTHING = "no metrics of this run were found: its curves are in MLflow, where it was recorded"


@dataclass(frozen=True)
class RunCurves:
    """The metrics of a run.

    Attributes:
        name: the run's.
        series: metric -> (``[N]`` epochs, ``[N]`` values).
    """

    name: str
    series: Mapping[str, tuple[np.ndarray, np.ndarray]]

    def of(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and values of a metric, of which at most 2,000 are kept; empty where there is none."""
        epochs, values = self.series.get(metric, (np.zeros(0), np.zeros(0)))
        every = max(1, -(-len(epochs) // _MOST_POINTS))
        return epochs[::every], values[::every]


def training_figure(runs: Sequence[RunCurves]) -> Figure:
    """Loss, its parts, scores of the validations, gradient norm; several runs over one another.

    Args:
        runs: at least one.
    """
    if not any(run.series for run in runs):
        return message_figure(NOTHING)
    figure = new_figure(13.0, 7.8)
    write_title(figure, " and ".join(run.name for run in runs))
    total, parts, scores, norms = (figure.add_subplot(2, 2, place) for place in range(1, 5))
    _lines(total, runs, {"train/loss": "loss"}, "Training loss")
    _lines(
        parts,
        runs,
        {f"train/loss_{name}": name for name in ("ce", "bbox", "giou")},
        "Last layer's losses, before they are weighted",
    )
    _lines(scores, runs, {f"val/{name}": name for name in ("AP", "AP50", "AP75")}, "Validation", marker="o")
    _lines(norms, runs, {"train/grad_norm": "gradient norm"}, "Norm of the gradient before clipping")
    for axes in (total, parts, norms):
        _log_where_wide(axes)
    _from_zero(scores, 0.05)
    return figure


def schedules_figure(run: RunCurves) -> Figure:
    """Learning rates and loss weights as they were.

    Args:
        run: with its metrics.
    """
    rates = {name: name.removeprefix("optim/") for name in sorted(run.series) if name.startswith("optim/")}
    weights = {
        name: name.removeprefix("loss/weight/") for name in sorted(run.series) if name.startswith("loss/weight/")
    }
    if not rates and not weights:
        return message_figure(NOTHING)
    figure = new_figure(13.0, 4.2)
    write_title(figure, run.name)
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    _lines(left, [run], rates, "Learning rates")
    _log_where_wide(left)
    _lines(right, [run], weights, "Loss weights")
    _from_zero(right)
    for axes in (left, right):
        _show_equal_lines(axes)
    return figure


def step_times_figure(run: RunCurves) -> Figure:
    """Seconds of a step by phase over the training, the mean shares, images a second and padding.

    The rest of a step's time is what is between steps: checkpoints, validation, records.

    Args:
        run: with its metrics.
    """
    phases = {phase: run.of(f"perf/{phase}_s") for phase in PHASES}
    epochs = phases["forward"][0]
    if not len(epochs):
        return message_figure(NOTHING)
    names = [*(phase.replace("_", " ") for phase in phases), _REST]
    figure = new_figure(13.0, 7.4)
    write_title(figure, run.name)
    over, mean, rate, padding = (figure.add_subplot(2, 2, place) for place in range(1, 5))
    seconds = [np.nan_to_num(values) for _, values in phases.values()]
    whole_steps = np.nan_to_num(run.of("perf/step_s")[1])
    seconds.append((whole_steps - sum(seconds)).clip(min=0) if len(whole_steps) == len(epochs) else 0 * seconds[0])
    if len(epochs) > 1:
        over.stackplot(epochs, seconds, labels=names, colors=_PHASE_COLOURS, alpha=0.8)
        # Beside the curves, in their order: there is no room above them.
        over.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, reverse=True)
    else:
        for number, values in enumerate(seconds):
            over.bar(0, values[0], bottom=sum(part[0] for part in seconds[:number]), color=_PHASE_COLOURS[number])
    over.set(xlabel="epoch", ylabel="s")
    over.set_title("Seconds of a step, by phase (rest: validation, checkpoints, records)", fontsize=10)
    means = [float(np.mean(values)) for values in seconds]
    bars = mean.barh(names, means, color=_PHASE_COLOURS)
    whole = max(sum(means), 1e-12)
    mean.bar_label(bars, [f" {_time_text(value)}, {value / whole:.0%}" for value in means], fontsize=8)
    mean.invert_yaxis()
    mean.set_title("Mean of all steps", fontsize=10)
    mean.set(xlabel="s", xlim=(0, max([*means, 1e-9]) * 1.3))
    _lines(rate, [run], {"perf/images_per_s": "images/s"}, "Images a second")
    _from_zero(rate)
    _lines(
        padding, [run], {"perf/padding_frac": "padding", "perf/data_wait_frac": "waiting for data"},
        "Shares: padding of all pixels, waiting of all time",
    )  # fmt: skip
    _from_zero(padding)
    return figure


def _time_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def _lines(
    axes: Axes, runs: Sequence[RunCurves], metrics: Mapping[str, str], title: str, marker: str | None = None
) -> None:
    drawn = 0
    for place, run in enumerate(runs):
        for number, (metric, label) in enumerate(metrics.items()):
            epochs, values = run.of(metric)
            if not len(epochs):
                continue
            text = label if len(runs) == 1 else f"{label}, {run.name}"
            colour = f"C{number + (place * len(metrics) if len(metrics) == 1 else 0)}"
            style = _RUN_STYLES[place % len(_RUN_STYLES)]
            shown_as = marker or ("o" if len(epochs) == 1 else None)  # a line of one point is not seen
            axes.plot(epochs, values, style, color=colour, lw=1.2, marker=shown_as, ms=3, label=text)
            drawn += 1
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("epoch", fontsize=9)
    axes.grid(alpha=0.3)
    if drawn > 1:
        for entry in axes.legend(fontsize=8).get_texts():
            entry.set_parse_math(False)
    elif not drawn:
        axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes, color="#8c8c8c")


def _show_equal_lines(axes: Axes) -> None:
    """Lines of the same values take turns, so that all of their colours are seen."""
    equal: dict[bytes, list[Line2D]] = {}
    for line in axes.lines:
        equal.setdefault(np.asarray(line.get_xydata()).tobytes(), []).append(line)
    for lines in equal.values():
        for number, line in enumerate(lines if len(lines) > 1 else ()):
            line.set_linestyle((-_DASH * number, (_DASH, _DASH * (len(lines) - 1))))


def _from_zero(axes: Axes, least: float = 1e-9) -> None:
    """An axis from 0 to beyond the largest value, or to the least one that is worth an axis."""
    values = [np.nanmax(np.asarray(line.get_ydata(), float), initial=0.0) for line in axes.lines]
    axes.set_ylim(0, max([*values, least]) * 1.15)


def _log_where_wide(axes: Axes) -> None:
    """A logarithmic axis where positive values span more than a factor of twenty."""
    values = np.concatenate([np.zeros(0), *(np.asarray(line.get_ydata(), float) for line in axes.lines)])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() / values.min() > 20:
        axes.set_yscale("log")
