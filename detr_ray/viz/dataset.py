"""A data set at a glance: boxes, classes, and image sizes as stored and as planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from detr_ray.viz.figure import new_figure

COLOURS = ("#1f77b4", "#ff7f0e")
PLANNED_COLOURS = ("#2ca02c", "#9467bd")
_MOST_CLASSES = 30
_MOST_POINTS = 4000
_COCO_SIDES = (32, 96)
_NARROW = 5
"""Up to this ratio of the largest to the smallest box, its axis has ticks at even distances."""
_SIDE_TICKS = (2, 5, 10, 20, 32, 50, 96, 200, 400, 800, 1600)


@dataclass(frozen=True)
class SplitColumns:
    """One split, as columns.

    Attributes:
        name: ``train`` or ``val``.
        sizes_px: ``[I, 2]`` (height, width) of the images as stored.
        planned_sizes_px: ``[P, 2]`` (height, width) that images are planned at.
        boxes_wh_px: ``[A, 2]`` width and height of the boxes that can be learnt, as stored.
        boxes_per_image: ``[I]``.
        class_counts: name -> boxes, for every category.
    """

    name: str
    sizes_px: np.ndarray
    planned_sizes_px: np.ndarray
    boxes_wh_px: np.ndarray
    boxes_per_image: np.ndarray
    class_counts: Mapping[str, int]

    def numbers(self) -> list[tuple[str, str]]:
        """(what, value) of what the picture shows."""
        sides = np.sqrt(self.boxes_wh_px.prod(axis=1))
        aspects = self.boxes_wh_px[:, 0] / self.boxes_wh_px[:, 1].clip(min=1e-9)
        used = [count for count in self.class_counts.values() if count]
        small, large = ((sides < side).mean() if len(sides) else 0.0 for side in _COCO_SIDES)
        return [
            ("images", f"{len(self.sizes_px):,}"),
            ("boxes", f"{len(self.boxes_wh_px):,}"),
            ("boxes an image: 50, 99, 100 %", _three(self.boxes_per_image, 50, 99, 100)),
            ("images without a box", f"{int((self.boxes_per_image == 0).sum()):,}"),
            ("box side, px: 5, 50, 95 %", _three(sides, 5, 50, 95)),
            ("small / medium / large (COCO)", f"{small:.0%} / {large - small:.0%} / {1 - large:.0%}"),
            ("box width : height: 5, 50, 95 %", _three(aspects, 5, 50, 95, ".1f")),
            ("classes with boxes", f"{len(used)} of {len(self.class_counts)}"),
            ("boxes of rarest / commonest class", f"{min(used):,} / {max(used):,}" if used else "none"),
            ("image side px, as stored, median", _sides(self.sizes_px)),
            ("image side px, as planned, median", _sides(self.planned_sizes_px)),
        ]


def _three(values: np.ndarray, first: float, second: float, third: float, form: str = ".0f") -> str:
    if not len(values):
        return "none"
    return " / ".join(f"{value:{form}}" for value in np.percentile(values, [first, second, third]))


def _sides(sizes_px: np.ndarray) -> str:
    return "none" if not len(sizes_px) else " x ".join(f"{side:.0f}" for side in np.median(sizes_px, axis=0)[::-1])


def dataset_figure(splits: Sequence[SplitColumns]) -> Figure:
    """Both splits in one picture.

    Args:
        splits: one or two, at least one with images.
    """
    figure = new_figure(15.0, 9.5)
    axes = [figure.add_subplot(2, 3, place) for place in range(1, 7)]
    _box_sides(axes[0], splits)
    _aspects(axes[1], splits)
    _boxes_per_image(axes[2], splits)
    _classes(axes[3], splits)
    _image_sizes(axes[4], splits)
    _table(axes[5], splits)
    return figure


def _shares(axes: Axes, values: np.ndarray, bins: np.ndarray, split: SplitColumns, colour: str) -> None:
    """A histogram in per cent, so that splits of any size can be compared."""
    weights = np.full(len(values), 100 / max(len(values), 1))
    axes.hist(
        values.clip(bins[0], bins[-1]), bins=bins.tolist(), weights=weights, color=colour, alpha=0.35, label=split.name
    )
    axes.hist(
        values.clip(bins[0], bins[-1]), bins=bins.tolist(), weights=weights, color=colour, histtype="step", lw=1.3
    )


def _box_sides(axes: Axes, splits: Sequence[SplitColumns]) -> None:
    sides = [np.sqrt(split.boxes_wh_px.prod(axis=1)).clip(min=1.0) for split in splits]
    most = max([side.max(initial=2.0) for side in sides])
    bins = np.geomspace(min([side.min(initial=most) for side in sides]) * 0.98, most * 1.02, 41)
    for split, side, colour in zip(splits, sides, COLOURS, strict=False):
        _shares(axes, side, bins, split, colour)
    for limit in _COCO_SIDES:
        if bins[0] < limit < bins[-1]:
            axes.axvline(limit, color="black", lw=0.8, ls=":")
    axes.set_xscale("log")
    few = MaxNLocator(6, integer=True).tick_values(bins[0], bins[-1])
    ticks = few if bins[-1] < _NARROW * bins[0] else _SIDE_TICKS
    axes.set_xticks([tick for tick in ticks if bins[0] <= tick <= bins[-1]], minor=False)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(
        title="Size of boxes", xlabel="square root of width x height, pixels (dotted: 32 and 96)", ylabel="% of boxes"
    )
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.legend()


def _aspects(axes: Axes, splits: Sequence[SplitColumns]) -> None:
    bins = np.geomspace(1 / 8, 8, 49)
    for split, colour in zip(splits, COLOURS, strict=False):
        _shares(axes, split.boxes_wh_px[:, 0] / split.boxes_wh_px[:, 1].clip(min=1e-9), bins, split, colour)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], ["1:8", "1:4", "1:2", "1", "2:1", "4:1", "8:1"])
    axes.set(title="Aspect of boxes", xlabel="width : height (the ends hold what is beyond)", ylabel="% of boxes")


def _boxes_per_image(axes: Axes, splits: Sequence[SplitColumns]) -> None:
    most = max(int(split.boxes_per_image.max(initial=0)) for split in splits)
    bins = np.arange(most + 2) - 0.5 if most < 40 else np.linspace(-0.5, most + 0.5, 41)
    for split, colour in zip(splits, COLOURS, strict=False):
        _shares(axes, split.boxes_per_image, bins, split, colour)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title="Boxes an image", xlabel="boxes", ylabel="% of images")


def _classes(axes: Axes, splits: Sequence[SplitColumns]) -> None:
    names = sorted(splits[0].class_counts, key=lambda name: (-splits[0].class_counts[name], name))
    shown = names[:_MOST_CLASSES]
    height = 0.8 / len(splits)
    for number, (split, colour) in enumerate(zip(splits, COLOURS, strict=False)):
        total = max(sum(split.class_counts.values()), 1)
        shares = [100 * split.class_counts.get(name, 0) / total for name in shown]
        places = np.arange(len(shown)) + (number - (len(splits) - 1) / 2) * height
        axes.barh(places, shares, height, color=colour)
    axes.set_yticks(np.arange(len(shown)), [name if len(name) <= 18 else f"{name[:17]}…" for name in shown], fontsize=7)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.invert_yaxis()
    rest = f"the {_MOST_CLASSES} commonest of {len(names)}" if len(names) > _MOST_CLASSES else f"{len(names)}"
    axes.set(title=f"Classes: {rest}", xlabel="% of boxes")


def _image_sizes(axes: Axes, splits: Sequence[SplitColumns]) -> None:
    for split, colour, planned_colour in zip(splits, COLOURS, PLANNED_COLOURS, strict=False):
        for sizes, shade, kind, mark in (
            (split.sizes_px, colour, "stored", "o"),
            (split.planned_sizes_px, planned_colour, "planned", "+"),
        ):
            every = -(-len(sizes) // _MOST_POINTS) or 1
            some = sizes[::every]
            # Random shifts below half a pixel, so that many equal sizes are visible.
            spread = np.random.default_rng(0).uniform(-0.4, 0.4, some.shape)
            axes.scatter(
                some[:, 1] + spread[:, 1], some[:, 0] + spread[:, 0], s=14, marker=mark, color=shade, alpha=0.4,
                linewidths=0.8, label=f"{split.name}, {kind}",
            )  # fmt: skip
    low, high = axes.get_xlim()[0], max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot([low, high], [low, high], color="black", lw=0.6, ls=":")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title="Size of images, as stored and as planned", xlabel="width, pixels", ylabel="height, pixels")
    # Below, since there are points everywhere.
    legend = axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4, columnspacing=1)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)


def _table(axes: Axes, splits: Sequence[SplitColumns]) -> None:
    axes.set_axis_off()
    columns = [dict(split.numbers()) for split in splits]
    rows = [[what, *(column[what] for column in columns)] for what in columns[0]]
    widths = [0.46, *([0.54 / len(splits)] * len(splits))]
    table = axes.table(
        rows, colLabels=["", *(split.name for split in splits)], colWidths=widths, cellLoc="left", bbox=Bbox.unit()
    )
    table.auto_set_font_size(False)
    table.set_fontsize(7)
    for cell in table.get_celld().values():
        cell.set_linewidth(0.3)
