"""What is drawn of a search, read from the figures: lines, their places, styles and labels."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from detr_ray.viz.figure import png_bytes
from detr_ray.viz.search_axes import axis_of
from detr_ray.viz.search_pictures import history, parallel_coordinates

BEST = "#d62728"


@dataclass(frozen=True)
class Trial:
    name: str
    values: dict[str, Any]
    state: str = "finished"
    history: list[tuple[int, int, float]] = field(default_factory=list)

    @property
    def best(self) -> float | None:
        return max((value for _, _, value in self.history), default=None)


TRIALS = [
    Trial("t000", {"optim.lr": 1e-4, "backbone": "resnet18"}, "finished", [(1, 10, 0.2), (2, 20, 0.4)]),
    Trial("t001", {"optim.lr": 1e-3, "backbone": "resnet50"}, "stopped early", [(1, 10, 0.1)]),
    Trial("t002", {"optim.lr": 1e-5, "backbone": "resnet18"}, "finished", [(1, 10, 0.3), (2, 20, 0.6)]),
    Trial("t003", {"optim.lr": 1e-2, "backbone": "resnet50"}, "failed"),
    Trial("t004", {"optim.lr": 1e-1, "backbone": "resnet50"}, "refused"),
]


def texts(figure: Figure) -> list[str]:
    figure.canvas.draw()
    found = [text.get_text() for plot in figure.axes for text in plot.texts]
    found += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return [*found, figure.get_suptitle()]


def trial_lines(figure: Figure, points: int) -> list[Any]:
    return [line for line in figure.axes[0].lines if len(line.get_xdata()) == points]


def test_each_trial_is_a_line_through_its_values_to_its_best() -> None:
    figure = parallel_coordinates(TRIALS, "val/AP", log_parameters={"optim.lr"})
    lines = trial_lines(figure, 3)
    assert len(lines) == 5
    best = lines[-1]
    assert to_hex(best.get_color()) == BEST, "the best is drawn last, over the others"
    assert best.get_ydata()[2] == max(line.get_ydata()[2] for line in lines)
    by_rate = sorted(lines, key=lambda line: line.get_ydata()[0])
    steps = np.diff([line.get_ydata()[0] for line in by_rate])
    assert np.allclose(steps, steps[0]), "powers of ten have equal distances on a logarithmic axis"
    assert by_rate[0] is best
    assert [line.get_linestyle() for line in by_rate] == ["-", "-", "-", "--", ":"]
    failed, refused = by_rate[3], by_rate[4]
    assert 0 > failed.get_ydata()[2] > refused.get_ydata()[2], "trials without a result end below the metric's axis"
    shown = texts(figure)
    for expected in ("optim.lr\n(log)", "backbone", "val/AP", "resnet18", "resnet50", "failed (1)", "refused (1)"):
        assert expected in shown
    assert "5 trials, the best is t002 with val/AP 0.6" in shown
    assert "best (t002)" in shown


def test_small_values_are_good_where_the_metric_is_an_error() -> None:
    assert "5 trials, the best is t001 with val/AP 0.1" in texts(parallel_coordinates(TRIALS, "val/AP", mode="min"))
    figure = history(TRIALS, "val/AP", mode="min")
    assert "5 trials, the best is t001 with val/AP 0.1" in texts(figure)
    (steps,) = [line for line in figure.axes[1].lines if line.get_drawstyle() == "steps-post"]
    assert list(steps.get_ydata()) == [0.4, 0.1, 0.1, 0.1, 0.1]


def test_the_history_has_a_line_a_trial_and_the_best_so_far() -> None:
    figure = history(TRIALS, "val/AP")
    over_epochs, over_trials = figure.axes
    best = next(line for line in over_epochs.lines if to_hex(line.get_color()) == BEST)
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([1, 2], [0.3, 0.6])
    assert [line.get_xydata().tolist() for line in over_epochs.lines if line.get_marker() == "|"] == [[[1.0, 0.1]]]
    (steps,) = [line for line in over_trials.lines if line.get_drawstyle() == "steps-post"]
    assert list(steps.get_ydata()) == [0.4, 0.4, 0.6, 0.6, 0.6]
    assert {line.get_marker() for line in over_trials.lines} == {"o", "|", "x", "+", "None"}
    shown = texts(figure)
    assert {" t000", " t001", " t002", "stopped early", "failed", "refused"} <= set(shown)


def test_results_that_are_not_finite_are_left_out() -> None:
    broken = Trial("t005", {"optim.lr": 1e-3, "backbone": "resnet18"}, "failed", [(1, 10, 0.2), (2, 20, math.nan)])
    figure = history([broken], "val/AP")
    assert list(figure.axes[0].lines[0].get_ydata()) == [0.2]
    parallel_coordinates([Trial("t006", broken.values, "failed", [(1, 10, math.nan)])], "val/AP")


@pytest.mark.parametrize("trials", [[], [Trial("t000", {"optim.lr": 1e-4}, "running")]], ids=["none", "no result"])
def test_a_search_that_has_just_begun_has_pictures(trials: list[Trial]) -> None:
    for figure in (parallel_coordinates(trials, "val/AP"), history(trials, "val/AP")):
        picture = Image.open(io.BytesIO(png_bytes(figure)))
        assert picture.format == "PNG"


def test_names_are_drawn_as_they_are() -> None:
    """A dollar sign would begin a formula."""
    trials = [Trial("$t$", {"a.$x": f"$\\frac{number}$"}, "finished", [(1, 1, 0.1 * number)]) for number in range(3)]
    png_bytes(parallel_coordinates(trials, "val/AP/$cat$"))
    png_bytes(history(trials, "val/AP/$cat$"))


def test_a_parameter_that_only_some_trials_have() -> None:
    trials = [Trial("t000", {"a": 1.0}, "finished", [(1, 1, 0.5)]), Trial("t001", {"a": 2.0, "b": 3}, "running")]
    lines = trial_lines(parallel_coordinates(trials, "val/AP"), 3)
    assert [math.isnan(line.get_ydata()[1]) for line in lines] == [False, True]


@pytest.mark.parametrize(
    ("values", "is_log", "labels"),
    [
        ([1e-5, 1e-3], True, ["1e-5", "1e-4", "0.001"]),
        ([1e-4, 2e-4], True, ["1e-4", "1.2e-4", "1.4e-4", "1.6e-4", "1.8e-4", "2e-4"]),
        ([0.0, 1e-3], True, ["0", "0.001"]),
        ([50, 100, 200], False, ["50", "100", "200"]),
        ([0.13, 0.21, 0.48, 0.52], False, ["0.1", "0.2", "0.3", "0.4", "0.5", "0.6"]),
        ([3.0, 3.0], False, ["3"]),
        ([True, False], False, ["False", "True"]),
        (["a" * 20, None, 3], False, ["3", "None", "a" * 15 + "…"]),
    ],
)
def test_labels_of_axes(values: list[Any], is_log: bool, labels: list[str]) -> None:
    axis = axis_of("name", values, is_log)
    assert [label for _, label in axis.ticks] == labels
    assert all(0 <= axis.place(value) <= 1 for value in values)
    assert [place for place, _ in axis.ticks] == sorted(place for place, _ in axis.ticks)


def test_drawing_leaves_matplotlibs_global_state_alone() -> None:
    program = (
        "import sys; from detr_ray.viz.figure import png_bytes;"
        "from detr_ray.viz.search_pictures import history, parallel_coordinates;"
        "png_bytes(history([], 'val/AP')); png_bytes(parallel_coordinates([], 'val/AP'));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("epochs", [1, 3, 40])
def test_the_axis_of_epochs_begins_at_none_and_has_whole_numbers(epochs: int) -> None:
    trial = Trial("t000", {"lr": 1e-4}, "finished", [(epoch, epoch * 10, 0.1) for epoch in range(1, epochs + 1)])
    axes = history([trial], "val/AP").axes[0]
    ticks = [float(tick) for tick in axes.get_xticks()]
    assert ticks[0] == 0 and ticks == [round(tick) for tick in ticks] and 1 < len(ticks) < 15
    assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] > epochs >= ticks[-1]
