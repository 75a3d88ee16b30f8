"""COCO's twelve numbers, and AP for each category, computed by pycocotools.

Detections come as a table, ground truth as columns. Scores do not depend on the order of the detections: they are put
in one canonical order first, so that it is all the same which worker found what.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import cocoeval

from detr_ray.evaluation.detections import DetectionTable
from detr_ray.evaluation.ground_truth import GroundTruth, annotation_dicts, coco_of

SUMMARY: dict[str, str] = {
    "AP": "precision, IoU 0.50:0.95, all areas",
    "AP50": "precision, IoU 0.50, all areas",
    "AP75": "precision, IoU 0.75, all areas",
    "APs": "precision, IoU 0.50:0.95, small objects",
    "APm": "precision, IoU 0.50:0.95, medium objects",
    "APl": "precision, IoU 0.50:0.95, large objects",
    "AR1": "recall, IoU 0.50:0.95, 1 detection an image and category",
    "AR10": "recall, IoU 0.50:0.95, 10 detections",
    "AR100": "recall, IoU 0.50:0.95, 100 detections",
    "ARs": "recall, IoU 0.50:0.95, small objects",
    "ARm": "recall, IoU 0.50:0.95, medium objects",
    "ARl": "recall, IoU 0.50:0.95, large objects",
}
"""The names of the twelve numbers in pycocotools' order, with what each one is."""

_ALL_AREAS, _AT_100 = 0, 2
_IOU_50 = 0


@dataclass(frozen=True, slots=True)
class CocoMetrics:
    """What a set of detections scores; None stands wherever there is no ground truth to score against.

    Attributes:
        summary: the twelve numbers under the names of ``SUMMARY``, in 0..1.
        category_ap: AP of each category, by name, in the order of the category ids.
        category_ap50: AP at IoU 0.5 of each category, likewise.
        images: images that were scored.
        boxes: annotated boxes in them, crowd regions not counted.
        detections: detections in them.
    """

    summary: dict[str, float | None]
    category_ap: dict[str, float | None]
    category_ap50: dict[str, float | None]
    images: int
    boxes: int
    detections: int

    @property
    def ap(self) -> float | None:
        """Mean average precision over IoU 0.50:0.95, the number that models are ranked by."""
        return self.summary["AP"]

    def as_metrics(self, prefix: str = "val/") -> dict[str, float]:
        """The numbers under the names they are tracked by: ``val/AP`` ... and ``val/AP/<category>``.

        Numbers that do not exist are left out.
        """
        named = self.summary | {f"AP/{name}": value for name, value in self.category_ap.items()}
        return {f"{prefix}{name}": value for name, value in named.items() if value is not None}

    def table(self) -> str:
        """The twelve numbers, one a line, and what was scored."""
        lines = [f"{name:<6}{_number(self.summary[name])}   {meaning}" for name, meaning in SUMMARY.items()]
        scored = f"{self.images:,} images, {self.boxes:,} annotated boxes, {self.detections:,} detections"
        return "\n".join([*lines, scored])

    def category_table(self, limit: int | None = None) -> str:
        """AP and AP50 of the categories that have ground truth, best first.

        Args:
            limit: lines at most; the best and the worst are shown where there are more.
        """
        scored = [(name, ap) for name, ap in self.category_ap.items() if ap is not None]
        scored.sort(key=lambda row: (-row[1], row[0]))
        width = max([len("category"), *(len(name) for name, _ in scored)])
        rows = [f"{name:<{width}}  {_number(ap)}  {_number(self.category_ap50[name])}" for name, ap in scored]
        if limit is not None and len(rows) > limit:
            head, tail = (limit + 1) // 2, limit // 2
            rows = [*rows[:head], f"... {len(rows) - limit} more", *rows[len(rows) - tail :]]
        lines = [f"{'category':<{width}}  {'AP':>6}  {'AP50':>6}", *rows]
        without = len(self.category_ap) - len(scored)
        return "\n".join([*lines, f"{without} categories without annotated boxes"] if without else lines)


def evaluate_detections(
    ground_truth: GroundTruth, detections: DetectionTable, image_ids: Sequence[int] | np.ndarray | None = None
) -> CocoMetrics:
    """Scores detections as pycocotools does for boxes.

    Args:
        ground_truth: annotated images; categories outside ``ground_truth.categories`` are not scored, whether annotated
            or detected.
        detections: in any order. Detections of images outside ``image_ids`` are not scored.
        image_ids: images to score; None for every image of the ground truth, images without detections included.

    Raises:
        ValueError: A detection or ``image_ids`` names an image that the ground truth does not have, or a detection is
            not a number.
    """
    wanted = np.unique(ground_truth.image_ids if image_ids is None else np.asarray(image_ids, dtype=np.int64))
    _check_known(wanted, ground_truth, "image_ids")
    _check_known(detections.image_ids, ground_truth, "detections")
    _check_finite(detections)

    scored = detections.sorted()
    boxes_px = scored.boxes_xywh_px.astype(np.float64)
    found = annotation_dicts(
        scored.image_ids,
        scored.category_ids,
        boxes_px,
        boxes_px[:, 2] * boxes_px[:, 3],
        score=scored.scores,
        iscrowd=np.zeros(len(scored), np.int64),
    )
    annotated = ground_truth.to_coco()
    evaluation = cocoeval.COCOeval(
        annotated, coco_of(annotated.dataset["images"], annotated.dataset["categories"], found), iouType="bbox"
    )
    evaluation.params.imgIds = wanted.tolist()
    with _silent_pycocotools():
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()

    names = ground_truth.category_names()
    precision = evaluation.eval["precision"][:, :, :, _ALL_AREAS, _AT_100]
    category_names = [names[category_id] for category_id in evaluation.params.catIds]
    in_wanted = np.isin(np.repeat(ground_truth.image_ids, np.diff(ground_truth.first_box)), wanted)
    return CocoMetrics(
        summary={name: _known(value) for name, value in zip(SUMMARY, evaluation.stats.tolist(), strict=True)},
        category_ap={name: _mean(precision[:, :, k]) for k, name in enumerate(category_names)},
        category_ap50={name: _mean(precision[_IOU_50, :, k]) for k, name in enumerate(category_names)},
        images=len(wanted),
        boxes=int((in_wanted & ~ground_truth.is_crowd.astype(bool)).sum()),
        detections=int(np.isin(scored.image_ids, wanted).sum()),
    )


def _check_known(image_ids: np.ndarray, ground_truth: GroundTruth, where: str) -> None:
    unknown = np.setdiff1d(image_ids, ground_truth.image_ids)
    if unknown.size:
        examples = ", ".join(str(image_id) for image_id in unknown[:5])
        raise ValueError(f"{where}: {unknown.size} images are not in the ground truth, e.g. image id {examples}")


def _check_finite(detections: DetectionTable) -> None:
    bad = ~(np.isfinite(detections.boxes_xywh_px).all(axis=1) & np.isfinite(detections.scores))
    if bad.any():
        examples = ", ".join(str(image_id) for image_id in np.unique(detections.image_ids[bad])[:5])
        raise ValueError(f"{bad.sum()} detections are not finite numbers, e.g. in image id {examples}")


def _known(value: float) -> float | None:
    """The value, or None for the -1 that pycocotools writes where there is nothing to score."""
    return None if value == -1 else value


def _mean(precision: np.ndarray) -> float | None:
    scored = precision[precision > -1]
    return float(scored.mean()) if scored.size else None


def _number(value: float | None) -> str:
    return "   n/a" if value is None else f"{value:6.3f}"


_print_lock = threading.Lock()


@contextmanager
def _silent_pycocotools() -> Iterator[None]:
    """Keeps pycocotools from printing its progress.

    Only its own module is silenced: redirecting ``sys.stdout`` for the minutes that an evaluation may take would
    swallow what other threads print. The lock is for two evaluations at once, of which the first to end would bring
    the printing back.
    """
    with _print_lock:
        module: Any = cocoeval
        module.print = lambda *_args, **_kwargs: None
        try:
            yield
        finally:
            del module.print
