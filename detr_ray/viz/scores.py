"""Pictures of scores: precision and recall of categories, confusions, AP by object size, and causes of lost AP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detr_ray.viz.figure import message_figure, new_figure, write_title

_MOST_CURVES = 10
_MOST_CATEGORIES = 40
ERROR_COLOURS = ("#d62728", "#ff7f0e", "#9467bd", "#e377c2", "#7f7f7f", "#17becf")


def precision_recall_figure(
    names: Sequence[str], recalls: np.ndarray, precision: np.ndarray, title: str = ""
) -> Figure:
    """A curve a category at IoU 0.5 and 0.75, the categories with the lowest AP50 first among those that are named.

    Args:
        names: one a category.
        recalls: ``[R]``.
        precision: ``[2, R, K]`` at IoU 0.5 and at 0.75; -1 for categories without annotations.
        title: above all.
    """
    scored = np.flatnonzero(precision[0, 0] >= 0)
    if not len(scored):
        return message_figure("no category has annotations: there is no precision and recall")
    figure = new_figure(13.0, 5.2)
    write_title(figure, title)
    worst = scored[np.argsort(precision[0][:, scored].mean(axis=0), kind="stable")][:_MOST_CURVES]
    for place, iou in enumerate((0.5, 0.75)):
        axes = figure.add_subplot(1, 2, place + 1)
        for number, k in enumerate(worst.tolist()):
            ap = precision[place, :, k].mean()
            axes.plot(recalls, precision[place, :, k], lw=1.4, color=f"C{number}", label=f"{names[k]} ({ap:.2f})")
        for number, k in enumerate(np.setdiff1d(scored, worst).tolist()):
            label = "_" if number else "each other category"  # the legend has what does not begin with _
            axes.plot(recalls, precision[place, :, k], lw=0.6, color="#c0c0c0", zorder=0, label=label)
        mean = precision[place][:, scored].mean(axis=1)
        axes.plot(recalls, mean, lw=2.4, color="black", label=f"mean of {len(scored)} ({mean.mean():.2f})")
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.02, 1.02), xlabel="recall", ylabel="precision")
        axes.set_title(f"IoU {iou}", fontsize=10)
        axes.grid(alpha=0.3)
        # Beside the curves, since there are curves everywhere.
        legend = axes.legend(
            fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), title="category (AP at this IoU)",
            title_fontsize=7, frameon=False,
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def confusion_figure(names: Sequence[str], counts: np.ndarray, title: str = "") -> Figure:
    """Shares of each annotated category by detected category; with numbers if there is room for them.

    Args:
        names: one a category.
        counts: ``[K + 1, K + 1]``, as of `confusion_matrix`: last column, missed; last row, without annotation.
        title: above all.
    """
    errors = counts.sum(axis=0) + counts.sum(axis=1) - 2 * counts.diagonal()
    used = np.flatnonzero((counts.sum(axis=0) + counts.sum(axis=1))[:-1])
    shown = np.sort(used[np.argsort(-errors[used], kind="stable")][:_MOST_CATEGORIES])
    rows = np.append(shown, len(names))
    part = counts[np.ix_(rows, rows)]
    share = part / np.maximum(counts[rows].sum(axis=1, keepdims=True), 1)
    side = max(5.0, 0.32 * len(rows) + 2.6)
    figure = new_figure(side + 1.0, side)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    labels = [_short(names[k]) for k in shown.tolist()]
    axes.set_xticks(range(len(rows)), [*labels, "missed"], rotation=90, fontsize=7)
    axes.set_yticks(range(len(rows)), [*labels, "(nothing)"], fontsize=7)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)
    axes.set(xlabel="found as", ylabel="annotated as")
    if len(rows) <= 26:
        for row, column in zip(*np.nonzero(part), strict=True):
            dark = share[row, column] > 0.55
            axes.text(
                column, row, str(part[row, column]), ha="center", va="center", fontsize=8 if len(rows) <= 16 else 6,
                color="white" if dark else "black",
            )  # fmt: skip
    figure.colorbar(image, ax=axes, shrink=0.7, aspect=30, label="share of the row")
    more = f"; the {len(shown)} of {len(used)} categories with the most errors" if len(shown) < len(used) else ""
    axes.set_title(f"{title}{more}".replace("; ", "\n"), fontsize=8, parse_math=False)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


def sizes_figure(scores: Mapping[str, float | None], counts: Mapping[str, int], title: str = "") -> Figure:
    """AP and AR by the size of objects.

    Args:
        scores: COCO's names of numbers -> value; None where there is no object of this size.
        counts: ``small``, ``medium``, ``large`` -> annotated boxes.
        title: above all.
    """
    figure = new_figure(8.0, 4.2)
    axes = figure.add_subplot()
    groups = [("all", "AP", "AR100"), ("small", "APs", "ARs"), ("medium", "APm", "ARm"), ("large", "APl", "ARl")]
    for offset, number, colour, name in ((-0.2, 1, "#1f77b4", "AP"), (0.2, 2, "#aec7e8", "AR (100 detections)")):
        values = [scores.get(group[number]) for group in groups]
        bars = axes.bar(np.arange(4) + offset, [value or 0.0 for value in values], 0.4, color=colour, label=name)
        axes.bar_label(bars, ["n/a" if value is None else f"{value:.3f}" for value in values], fontsize=8)
    total = sum(counts.values())
    labels = [f"all\n{total:,} boxes"]
    limits = {"small": "below 32² px", "medium": "32² to 96² px", "large": "above 96² px"}
    labels += [f"{size}, {limits[size]}\n{counts[size]:,} boxes" for size in limits]
    axes.set_xticks(range(4), labels, fontsize=8)
    axes.set(ylim=(0, 1.08))
    axes.set_title(title or "AP and AR by size of objects", fontsize=10, parse_math=False)
    axes.legend(fontsize=8)
    return figure


def errors_figure(
    ap50: float, in_turn: Mapping[str, float], alone: Mapping[str, float], counts: Mapping[str, int], title: str = ""
) -> Figure:
    """Causes of lost AP50: a bar that adds up to 1, and the gain of correcting each kind alone.

    Args:
        ap50: the AP50.
        in_turn: kind -> AP50 that it costs when kinds are corrected one after another.
        alone: kind -> AP50 that is gained if only this kind is corrected.
        counts: kind -> number of errors.
        title: above all.
    """
    figure = new_figure(12.0, 4.6)
    write_title(figure, title)
    whole, single = figure.add_subplot(2, 1, 1), figure.add_subplot(2, 1, 2)
    left = 0.0
    for name, value, colour in (
        ("AP50", ap50, "#2ca02c"),
        *((kind, in_turn[kind], colour) for kind, colour in zip(in_turn, ERROR_COLOURS, strict=True)),
    ):
        whole.barh([0], [value], left=left, color=colour, label=f"{name} {value:.3f}")
        left += value
    whole.set(xlim=(0, max(1.0, left)), yticks=[])
    whole.set_title("AP50, and what mending one kind after another adds, from left to right", fontsize=9)
    whole.tick_params(labelsize=8)
    whole.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=7, fontsize=8, frameon=False)
    _alone(single, alone, counts)
    return figure


def _alone(axes: Axes, alone: Mapping[str, float], counts: Mapping[str, int]) -> None:
    kinds = list(alone)
    bars = axes.barh(kinds, [alone[kind] for kind in kinds], color=ERROR_COLOURS)
    axes.bar_label(bars, [f" +{alone[kind]:.3f}  ({_errors_text(counts[kind])})" for kind in kinds], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, max([*alone.values(), 0.01]) * 1.25))
    axes.set_title("AP50 that mending one kind alone would add", fontsize=9)
    axes.tick_params(labelsize=8)


def _errors_text(count: int) -> str:
    return "1 error" if count == 1 else f"{count:,} errors"
