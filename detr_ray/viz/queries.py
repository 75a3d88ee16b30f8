"""Where queries predict: the box centres of each query over many images."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from detr_ray.viz.figure import new_figure, write_title

_COLUMNS = 5
_KINDS = (("small, below 5 % of the image", "#2ca02c"), ("large and wide", "#d62728"), ("large and high", "#1f77b4"))
_SMALL_SHARE = 0.05


def queries_figure(boxes_cxcywh: np.ndarray, queries: np.ndarray, title: str) -> Figure:
    """A square for each query with a point for each image, where the centre of its box is.

    The colours tell small boxes (below 5 % of the image) from large ones that are wider than high, or higher than wide,
    as in figure 7 of Carion et al. 2020.

    Args:
        boxes_cxcywh: ``[N, Q, 4]`` in 0..1, of ``N`` images.
        queries: numbers of the queries to draw, at least one.
        title: above all.
    """
    rows = -(-len(queries) // _COLUMNS)
    figure = new_figure(2.4 * min(_COLUMNS, len(queries)), 2.5 * rows + 0.6)
    size = max(2.0, min(30.0, 2000 / max(len(boxes_cxcywh), 1)))
    for place, query in enumerate(queries.tolist()):
        axes = figure.add_subplot(rows, min(_COLUMNS, len(queries)), place + 1)
        boxes = boxes_cxcywh[:, query]
        kinds = box_kinds(boxes)
        for number, (name, colour) in enumerate(_KINDS):
            here = kinds == number
            axes.scatter(boxes[here, 0], boxes[here, 1], s=size, color=colour, linewidths=0, alpha=0.7, label=name)
        axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect="equal")
        axes.set_title(f"query {query}", fontsize=8)
    handles, names = figure.axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, names, loc="outside lower center", ncols=len(_KINDS), frameon=False, fontsize=9)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
            handle.set(sizes=[30])
    write_title(figure, title)
    return figure


def box_kinds(boxes_cxcywh: np.ndarray) -> np.ndarray:
    """``[N]`` 0 for small boxes, 1 for large ones that are wider than high, 2 for the other large ones."""
    is_small = boxes_cxcywh[:, 2] * boxes_cxcywh[:, 3] < _SMALL_SHARE
    is_wide = boxes_cxcywh[:, 2] > boxes_cxcywh[:, 3]
    return np.where(is_small, 0, np.where(is_wide, 1, 2))
