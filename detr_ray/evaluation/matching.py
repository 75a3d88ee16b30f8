"""Which detection finds which annotated box: COCO's greedy matching, for all images, categories and IoUs at once.

Within one image and category the detections choose in the order of their scores: each takes the box it overlaps most
among those that are free, at each IoU threshold on its own. That is a loop by nature, but groups (an image and a
category) have nothing to do with each other. So one turn is taken in all groups together: the first detections of all
groups choose, then all second ones, and so on; there are no more turns than detections in the fullest group.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_REACHED = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)

MOST_PAIRS = 1_000_000
"""Pairs whose overlap is computed at a time; it bounds the memory, which a crowded image could fill."""


@dataclass(frozen=True, slots=True, eq=False)
class Annotations:
    """Annotated boxes, the boxes of a group beside each other.

    Attributes:
        groups: ``[G]`` int64, ascending.
        boxes_xywh: ``[G, 4]`` float64.
        areas: ``[G]`` float64.
        is_crowd: ``[G]`` bool.
    """

    groups: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    is_crowd: np.ndarray

    def outside(self, low: float, high: float) -> np.ndarray:
        """``[G]`` bool, the boxes that are neither to be found nor missed in a range of areas: these, and crowds."""
        return self.is_crowd | (self.areas < low) | (self.areas > high)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Detections, those of a group beside each other, the best first.

    Attributes:
        groups: ``[D]`` int64, ascending.
        boxes_xywh: ``[D, 4]`` float64.
        areas: ``[D]`` float64.
    """

    groups: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Overlaps:
    """Pairs of a detection and a box of its group that overlap enough for the lowest threshold.

    Attributes:
        found: ``[P]`` row of the detection, ascending.
        annotation: ``[P]`` row of the box.
        iou: ``[P]`` float64; for a crowd region the share of the detection that lies in it.
        turn: ``[P]`` how many detections of the group with any such pair choose before this one.
    """

    found: np.ndarray
    annotation: np.ndarray
    iou: np.ndarray
    turn: np.ndarray


def find_overlaps(found: Found, annotations: Annotations) -> Overlaps:
    """The pairs that can match; most detections have none, and most others one."""
    first = np.searchsorted(annotations.groups, found.groups, side="left")
    counts = np.searchsorted(annotations.groups, found.groups, side="right") - first
    pairs_before = np.concatenate([[0], np.cumsum(counts)])
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [
        (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    ]
    begin = 0
    while begin < len(counts):
        end = int(np.searchsorted(pairs_before, pairs_before[begin] + MOST_PAIRS, side="right")) - 1
        end = max(end, begin + 1)
        rows = np.repeat(np.arange(begin, end), counts[begin:end])
        within = np.arange(len(rows)) - (pairs_before[rows] - pairs_before[begin])
        others = first[rows] + within
        iou = _iou(found.boxes_xywh[rows], annotations.boxes_xywh[others], annotations.is_crowd[others])
        near = np.flatnonzero(iou >= _REACHED[0])
        kept.append((rows[near], others[near], iou[near]))
        begin = end
    rows, others, iou = (np.concatenate(columns) for columns in zip(*kept, strict=True))
    return Overlaps(rows, others, iou, _turns(rows, found.groups))


def match(found: Found, annotations: Annotations, overlaps: Overlaps, ignored: np.ndarray) -> tuple[np.ndarray, ...]:
    """Lets the detections choose.

    A box that counts is preferred to an ignored one; of equal overlaps the later box is taken. A crowd region can be
    taken any number of times, every other box once.

    Args:
        found: the detections.
        annotations: the boxes.
        overlaps: their pairs.
        ignored: ``[G]`` bool, boxes that are neither to be found nor missed.

    Returns:
        ``[T, D]`` bool, whether a detection found a box that counts at a threshold; likewise one that is ignored.
    """
    thresholds, last_first = len(_REACHED), -overlaps.annotation
    order = np.lexsort((last_first, -overlaps.iou, ignored[overlaps.annotation], overlaps.found, overlaps.turn))
    rows, boxes, iou = overlaps.found[order], overlaps.annotation[order], overlaps.iou[order]
    reaches = iou[:, None] >= _REACHED
    crowd = annotations.is_crowd[boxes][:, None]
    turns = overlaps.turn[order]
    bounds = np.searchsorted(turns, np.arange(turns[-1] + 2)) if len(turns) else np.zeros(1, np.int64)

    taken = np.zeros((len(annotations.groups), thresholds), bool)
    hits = np.zeros((2, thresholds, len(found.groups)), bool)
    columns = np.arange(thresholds)
    for begin, end in pairwise(bounds.tolist()):
        choosing, choices = rows[begin:end], boxes[begin:end]
        possible = reaches[begin:end] & (crowd[begin:end] | ~taken[choices])
        places = np.where(possible, np.arange(end - begin)[:, None], end - begin)
        starts = np.flatnonzero(np.diff(choosing, prepend=-1))
        best = np.minimum.reduceat(places, starts, axis=0)
        chooser, threshold = np.nonzero(best < end - begin)
        chosen = choices[best[chooser, threshold]]
        taken[chosen, columns[threshold]] = True
        hits[ignored[chosen].astype(np.int64), threshold, choosing[starts[chooser]]] = True
    return hits[0], hits[1]


def _iou(found: np.ndarray, annotated: np.ndarray, is_crowd: np.ndarray) -> np.ndarray:
    """Overlap of boxes row by row, by the operations of the reference in their order: equal to the last bit."""
    left, top, width, height = found.T
    other_left, other_top, other_width, other_height = annotated.T
    across = np.minimum(width + left, other_width + other_left) - np.maximum(left, other_left)
    down = np.minimum(height + top, other_height + other_top) - np.maximum(top, other_top)
    touching = (across > 0) & (down > 0)
    both = across * down
    area = width * height
    either = np.where(is_crowd, area, area + other_width * other_height - both)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(touching, both / either, 0.0)


def _turns(rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """For ascending rows, some of them repeated: how many different rows of the same group come before each."""
    is_new = np.diff(rows, prepend=-1) != 0
    number = np.cumsum(is_new) - 1
    is_first = np.diff(groups[rows], prepend=-1) != 0
    first_of_group = np.maximum.accumulate(np.where(is_first, number, 0))
    return number - first_of_group
