"""What the pictures of a search share: the trials that are drawn, their colours and marks, title and legend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from detr_ray.viz.search_axes import number_text

BEST_COLOUR = "#d62728"
NO_RESULT_COLOUR = "#8c8c8c"
FAILURE_STYLES = {"failed": "--", "refused": ":"}
END_MARKS = {"stopped early": "|", "failed": "x", "stopped": "s", "running": ">"}
FEW_TRIALS = 12
"""Up to so many trials are all named and drawn alike."""
COLOURS = LinearSegmentedColormap.from_list("goodness", colormaps["viridis_r"](np.linspace(0.12, 1.0, 64)))
"""From pale (worst) to dark (best): on white, the good ones stand out."""

Mode = Literal["max", "min"]


class PicturedTrial(Protocol):
    """What is drawn of a trial."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def values(self) -> Mapping[str, Any]:
        """Name -> value of each searched parameter."""

    @property
    def state(self) -> str:
        """``finished``, ``stopped early``, ``failed``, ``refused``, ``running``, ``stopped`` or ``waiting``."""

    @property
    def best(self) -> float | None:
        """The best value of the metric; None: it has no result."""

    @property
    def history(self) -> Sequence[tuple[float, int, float]]:
        """(epoch, step, value of the metric) of each result, in order."""


class Goodness:
    """The colours of trials, by the metric from the worst to the best of them."""

    def __init__(self, scores: Sequence[float], mode: Mode) -> None:
        self._sign = 1.0 if mode == "max" else -1.0
        self._low = min((self._sign * score for score in scores), default=0.0)
        self._high = max((self._sign * score for score in scores), default=0.0)

    def of(self, score: float) -> float:
        """In 0 (worst) .. 1 (best)."""
        spread = self._high - self._low
        return (self._sign * score - self._low) / spread if spread else 1.0

    def colour(self, trial: PicturedTrial, best: PicturedTrial | None) -> Any:
        """Of a trial's line; the best one has a colour of its own."""
        score = score_of(trial)
        if trial is best:
            return BEST_COLOUR
        return NO_RESULT_COLOUR if score is None else COLOURS(self.of(score))

    def opacity(self, trial: PicturedTrial, best: PicturedTrial | None, count: int) -> float:
        """Among many trials, those that are not good are faint, so that the good ones can be followed."""
        if trial is best or count <= FEW_TRIALS:
            return 1.0
        score = score_of(trial)
        faintest = max(0.25, min(0.9, 12 / count))
        return 0.6 if score is None else faintest + (0.9 - faintest) * self.of(score) ** 3

    def order(self, trial: PicturedTrial, best: PicturedTrial | None) -> float:
        """Trials with a larger number are drawn over the others."""
        score = score_of(trial)
        return 2.0 if trial is best else -1.0 if score is None else self.of(score)


def empty_figure(figure: Figure) -> Figure:
    """The figure with a text in place of a picture, for a search without a trial."""
    figure.text(0.5, 0.5, "no trial yet", ha="center", va="center", fontsize=14, color=NO_RESULT_COLOUR)
    return figure


def score_of(trial: PicturedTrial) -> float | None:
    """The trial's best value; None if there is none, or none that is finite."""
    return trial.best if trial.best is not None and math.isfinite(trial.best) else None


def best_of(trials: Sequence[PicturedTrial], mode: Mode) -> PicturedTrial | None:
    """The trial with the best value, the first of equals; None if there is no value."""
    sign = 1.0 if mode == "max" else -1.0
    scored = [(sign * score, -number) for number, trial in enumerate(trials) if (score := score_of(trial)) is not None]
    return trials[-max(scored)[1]] if scored else None


def title_of(trials: Sequence[PicturedTrial], metric: str, best: PicturedTrial | None) -> str:
    """How many trials there are, and which one is the best."""
    count = f"{len(trials)} trial{'s' if len(trials) > 1 else ''}"
    if best is None or best.best is None:
        return f"{count}, no result yet"
    return f"{count}, the best is {best.name} with {metric} {number_text(best.best)}"


def draw_legend(
    figure: Figure, trials: Sequence[PicturedTrial], best: PicturedTrial | None, ends: bool = False
) -> None:
    """Explains lines and marks below the picture.

    Args:
        figure: the picture.
        trials: those that are drawn.
        best: the best of them.
        ends: whether marks show how trials ended; otherwise the styles of lines do.
    """
    states = {trial.state for trial in trials}
    entries: list[Line2D] = []
    if best is not None:
        entries.append(Line2D([], [], color=BEST_COLOUR, lw=3, label=f"best ({best.name})"))
        if sum(score_of(trial) is not None for trial in trials) > 1:
            entries.append(Line2D([], [], color=COLOURS(0.8), lw=1.5, label="the darker, the better"))
    if ends:
        marks = {state: mark for state, mark in END_MARKS.items() if state in states}
        entries += [
            Line2D([], [], ls="", marker=mark, color="black", ms=8, mew=2, mfc="none", label=state)
            for state, mark in marks.items()
        ]
        if "refused" in states:
            entries.append(Line2D([], [], ls="", marker="+", color=NO_RESULT_COLOUR, ms=8, mew=2, label="refused"))
    else:
        entries += [
            Line2D([], [], color=NO_RESULT_COLOUR, ls=style, lw=1.5, label=state)
            for state, style in FAILURE_STYLES.items()
            if state in states
        ]
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries) or 1, frameon=False, fontsize=9)
