"""COCO's greedy matching of detections and annotated boxes, for all images, categories and IoU thresholds at once.

A group is one category in one image. Within a group, detections are matched in the order of their scores: each takes
the free box with the largest overlap, separately for each IoU threshold. Groups are independent and are processed
together: turn 0 matches the first detection of every group, turn 1 the second, and so on. The number of turns is the
number of detections in the largest group.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_REACHED = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)

MOST_PAIRS = 1_000_000
"""Number of pairs whose overlap is computed at a time; limits the memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Annotations:
    """Annotated boxes, sorted by group.

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
        """``[G]`` bool, the boxes to ignore in a range of areas: boxes outside the range, and crowd regions."""
        return self.is_crowd | (self.areas < low) | (self.areas > high)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Detections, sorted by group, then from the highest score to the lowest.

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
    """Pairs of a detection and a box of its group whose IoU reaches the lowest threshold.

    Attributes:
        found: ``[P]`` row of the detection, ascending.
        annotation: ``[P]`` row of the box.
        iou: ``[P]`` float64; for a crowd region, the share of the detection's area inside it.
        turn: ``[P]`` the turn in which the detection is matched; detections without a pair have no turn.
    """

    found: np.ndarray
    annotation: np.ndarray
    iou: np.ndarray
    turn: np.ndarray


def find_overlaps(found: Found, annotations: Annotations) -> Overlaps:
    """Finds the pairs that can match."""
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
        iou = row_iou(found.boxes_xywh[rows], annotations.boxes_xywh[others], annotations.is_crowd[others])
        near = np.flatnonzero(iou >= _REACHED[0])
        kept.append((rows[near], others[near], iou[near]))
        begin = end
    rows, others, iou = (np.concatenate(columns) for columns in zip(*kept, strict=True))
    return Overlaps(rows, others, iou, _turns(rows, found.groups))


class Matches(NamedTuple):
    """What matched, at each of ``T`` thresholds.

    Attributes:
        right: ``[T, D]`` bool, whether a detection matches a box that counts.
        neutral: ``[T, D]`` bool, whether it matches an ignored box.
        taken: ``[T, G]`` bool, whether a box is matched.
    """

    right: np.ndarray
    neutral: np.ndarray
    taken: np.ndarray


def match(found: Found, annotations: Annotations, overlaps: Overlaps, ignored: np.ndarray) -> Matches:
    """Matches detections and boxes.

    A box that is not ignored is preferred to an ignored box. Of equal overlaps the later box is taken. A crowd region
    can be taken any number of times, every other box once.

    Args:
        found: the detections.
        annotations: the boxes.
        overlaps: the pairs that can match.
        ignored: ``[G]`` bool, boxes that count neither as found nor as missed.
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
    return Matches(hits[0], hits[1], taken.T)


def row_iou(found: np.ndarray, annotated: np.ndarray, is_crowd: np.ndarray) -> np.ndarray:
    """IoU of boxes row by row, by the same operations in the same order as pycocotools: bit-identical.

    Args:
        found: ``[N, 4]`` float64 left, top, width, height.
        annotated: ``[N, 4]`` float64, likewise.
        is_crowd: ``[N]`` bool; for crowd regions, the share of the found box's area inside.
    """
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


def all_iou(found: np.ndarray, annotated: np.ndarray, is_crowd: np.ndarray) -> np.ndarray:
    """``[N, M]`` `row_iou` of all pairs of boxes ``[N, 4]`` and ``[M, 4]``."""
    rows, columns = (part.reshape(-1) for part in np.indices((len(found), len(annotated))))
    return row_iou(found[rows], annotated[columns], is_crowd[columns]).reshape(len(found), len(annotated))


def _turns(rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """For sorted rows with repetitions: how many different rows of the same group come before each row."""
    is_new = np.diff(rows, prepend=-1) != 0
    number = np.cumsum(is_new) - 1
    is_first = np.diff(groups[rows], prepend=-1) != 0
    first_of_group = np.maximum.accumulate(np.where(is_first, number, 0))
    return number - first_of_group
