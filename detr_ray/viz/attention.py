"""Pictures of attention: maps over an image, the points of deformable attention, and the position embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from detr_ray.viz.annotated_image import draw_boxes, figure_of, image_grid, label_colour, show_image
from detr_ray.viz.figure import new_figure, write_title

_POINT_COLOUR = "#ff2fd0"
_FEW_POINTS = 24
_AROUND = 1.4
_SMALL_SHARE = 0.5
"""Points that take a smaller share of the image's width and height than this, with some room around, are enlarged."""
_LEVEL_MARKS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Attended:
    """What one query attends to.

    Attributes:
        title: which query it is.
        weights: ``[h, w]`` of the map's cells, or ``[N]`` of points.
        points_px: ``[N, 2]`` (x, y) of the points; None where ``weights`` are a map's.
        levels: ``[N]`` number of the map that each point is read in.
        at_px: (x, y) of the query itself; None where it has no place.
        box_xyxy_px: ``[4]`` what the query found; None for none.
        name: of what it found.
        label: of what it found; decides the colour.
    """

    title: str
    weights: np.ndarray
    points_px: np.ndarray | None = None
    levels: np.ndarray | None = None
    at_px: tuple[float, float] | None = None
    box_xyxy_px: np.ndarray | None = None
    name: str = ""
    label: int = 0


def attention_figure(pixels: np.ndarray, frame_px: tuple[int, int], attended: Sequence[Attended], title: str) -> Figure:
    """The image with all queries, then one cell a query with what it attends to.

    Args:
        pixels: ``[H, W, 3]`` uint8, without padding.
        frame_px: (height, width) that the maps of weights cover.
        attended: at least one.
        title: above all.
    """
    height, width = pixels.shape[:2]
    scale = 3.2 / max(height, width)
    axes = image_grid(1 + len(attended), 5, max(2.2, width * scale), height * scale + 0.6)
    show_image(axes[0], pixels, "the image")
    for number, one in enumerate(attended, 1):
        _draw_attended(axes[number], pixels, frame_px, one, number)
    _draw_queries(axes[0], attended)
    figure = figure_of(axes[0])
    levels = sorted({int(level) for one in attended if one.levels is not None for level in one.levels})
    if levels:
        handles = [
            Line2D([], [], ls="", marker=_mark(level), color="#606060", label=f"read in map {level + 1}")
            for level in levels
        ]
        handles.append(Line2D([], [], ls="", label="the larger and brighter, the more weight"))
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    write_title(figure, title)
    return figure


def _draw_queries(axes: Axes, attended: Sequence[Attended]) -> None:
    """Where the queries are, with their numbers: in the text of a box, or beside a point without one."""
    boxes, texts, colours = [], [], []
    for number, one in enumerate(attended, 1):
        if one.box_xyxy_px is not None:
            boxes.append(one.box_xyxy_px)
            texts.append(f"{number} {one.name}")
            colours.append(label_colour(one.label))
        elif one.at_px is not None:
            axes.plot(*one.at_px, "o", color=_POINT_COLOUR, ms=6, mec="white")
            # Above the points of others, with an outline that is seen on any ground.
            text = axes.annotate(
                str(number), one.at_px, xytext=(4, 4), textcoords="offset points", color="white", fontsize=9, zorder=5
            )
            text.set_path_effects([withStroke(linewidth=2, foreground="black")])
    if boxes:
        draw_boxes(axes, np.stack(boxes), texts, colours)


def _mark(level: int) -> str:
    return _LEVEL_MARKS[level % len(_LEVEL_MARKS)]


def _draw_attended(axes: Axes, pixels: np.ndarray, frame_px: tuple[int, int], one: Attended, number: int) -> None:
    height, width = pixels.shape[:2]
    grey = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    part = _part_of(one, width, height)
    zoomed = "" if part == (0, 0, width, height) else ", enlarged"
    show_image(axes, (grey * 0.75).astype(np.uint8), f"{number}: {one.title}{zoomed}\n{_scale_of(one, width, height)}")
    if one.points_px is None:
        most = max(float(one.weights.max()), 1e-12)
        axes.imshow(
            one.weights, extent=(0, frame_px[1], frame_px[0], 0), cmap="inferno", vmin=0, vmax=most,
            alpha=0.2 + 0.65 * np.sqrt(one.weights.clip(min=0) / most), interpolation="nearest",
        )  # fmt: skip
    else:
        assert one.levels is not None
        _draw_points(axes, one.points_px, one.weights, one.levels)
    left, top, right, bottom = part
    axes.set(xlim=(left, right), ylim=(bottom, top))
    if one.at_px is not None:  # a ring, since points may lie at this place
        axes.plot(*one.at_px, "o", mfc="none", mec=_POINT_COLOUR, ms=9, mew=1.8)
    if one.box_xyxy_px is not None:
        draw_boxes(axes, one.box_xyxy_px[None], [""], ["#40ff70"])


def _part_of(one: Attended, width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what is shown: the image, or the part with all points where that is small."""
    if one.points_px is None:
        return 0, 0, width, height
    places = [one.points_px, *([] if one.box_xyxy_px is None else [one.box_xyxy_px.reshape(2, 2)])]
    inside = np.concatenate(places).clip(0, [width, height])
    first, last = inside.min(axis=0), inside.max(axis=0)
    share = _AROUND * float(((last - first) / [width, height]).max())
    if share > _SMALL_SHARE:
        return 0, 0, width, height
    size = np.array([width, height]) * max(share, 1e-3)
    left, top = ((first + last - size) / 2).clip(0, np.array([width, height]) - size)
    return float(left), float(top), float(left + size[0]), float(top + size[1])


def _scale_of(one: Attended, width: int, height: int) -> str:
    """What the brightest colour stands for; weights that are nearly even look the same as others without it.

    Points may lie outside of the image, where nothing is drawn; it is told how many do, and their share of the weight.
    """
    what = "cell" if one.points_px is None else "head's point"
    text = f"a {what}: at most {one.weights.max():.1%}, mean {one.weights.mean():.1%}"
    if one.points_px is not None:
        x, y = one.points_px.T
        outside: np.ndarray = (x < 0) | (y < 0) | (x > width) | (y > height)
        if outside.any():
            share = one.weights[outside].sum() / max(float(one.weights.sum()), 1e-12)
            text += f"\n{int(outside.sum())} of {len(outside)} outside of the image, with {share:.0%} of the weight"
    return text


def _draw_points(axes: Axes, points_px: np.ndarray, weights: np.ndarray, levels: np.ndarray) -> None:
    """Points with larger weights are larger and brighter; the points of each map have their own marker.

    Many points are drawn smaller, since those of a small object lie close to each other.
    """
    size = min(1.0, _FEW_POINTS / len(weights))
    share = weights / max(float(weights.max()), 1e-12)
    for level in np.unique(levels).tolist():
        here = levels == level
        axes.scatter(
            points_px[here, 0], points_px[here, 1], s=size * (4 + 26 * share[here]), c=share[here], cmap="inferno",
            vmin=0, vmax=1, marker=_mark(level), linewidths=0.3, edgecolors="white",
        )  # fmt: skip


@dataclass(frozen=True)
class Embedding:
    """The position embedding of one map.

    Attributes:
        vectors: ``[h, w, dim]``.
        is_padding: ``[h, w]`` bool.
        halves: what the first half of the channels encodes, and the second.
    """

    vectors: np.ndarray
    is_padding: np.ndarray
    halves: tuple[str, str]


def position_figure(embedding: Embedding, title: str) -> Figure:
    """Channels of the embedding as maps, all channels of one cell, and how alike the vectors of cells are.

    Args:
        embedding: of one map.
        title: above all.
    """
    height, width, dim = embedding.vectors.shape
    figure = new_figure(15.0, 9.0)
    half = dim // 2
    step = max(1, half // 12)
    channels = sorted({0, 1, *(channel for channel in (step, 2 * step, 4 * step, 6 * step) if 1 < channel < half)})[:5]
    grid = figure.add_gridspec(4, 5)
    most = float(np.abs(embedding.vectors[~embedding.is_padding]).max(initial=1e-9))
    parts = (0, f"first half: {embedding.halves[0]}"), (half, f"second half: {embedding.halves[1]}")
    for row, (first, part) in enumerate(parts):
        for place, channel in enumerate(channels):
            axes = figure.add_subplot(grid[row, place])
            values = embedding.vectors[..., first + channel]
            _map(axes, embedding, values, f"channel {first + channel} ({part})", "RdBu", most)
    axes = figure.add_subplot(grid[2, :])
    for cell in ((0, 0), (height // 2, width // 2), (height - 1, width - 1)):
        axes.plot(embedding.vectors[cell], lw=0.8, label=f"row {cell[0]}, column {cell[1]}")
    axes.axvline(half - 0.5, color="black", lw=0.8, ls=":")
    axes.set_title("all channels of three cells", fontsize=9)
    axes.set_xlabel("channel", fontsize=8)
    axes.legend(fontsize=7)
    for place, (y, x) in enumerate(_places(height, width)):
        axes = figure.add_subplot(grid[3, place])
        vectors = embedding.vectors - embedding.vectors.mean(axis=(0, 1))
        lengths = np.linalg.norm(vectors, axis=-1).clip(min=1e-9)
        alike = vectors @ vectors[y, x] / (lengths * lengths[y, x])
        _map(axes, embedding, alike, f"likeness to row {y}, column {x}", "viridis", 1.0)
        axes.plot(x, y, "o", color=_POINT_COLOUR, ms=5, mec="white")
    write_title(figure, title, 11)
    return figure


def _places(height: int, width: int) -> list[tuple[int, int]]:
    """Five cells over a map."""
    low, high = (height // 5, width // 5), (height - 1 - height // 5, width - 1 - width // 5)
    return [low, (low[0], high[1]), (height // 2, width // 2), (high[0], low[1]), high]


def _map(axes: Axes, embedding: Embedding, values: np.ndarray, title: str, colours: str, most: float) -> None:
    """Values of the map's cells, in colours from ``-most`` to ``most``; padding has none."""
    shown = np.where(embedding.is_padding, np.nan, values)
    image = axes.imshow(shown, cmap=colours, vmin=-most, vmax=most)
    axes.set_facecolor("#303040")
    axes.set_title(title, fontsize=8)
    axes.tick_params(labelsize=6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure_of(axes).colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=6)
