"""Pictures of a model's detections on a validation set, beside its annotations."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from detr_ray.box_arrays import xywh_to_xyxy
from detr_ray.config import ConfigError
from detr_ray.data.index import DatasetIndex
from detr_ray.engine.pictures.images import StoredPixels
from detr_ray.engine.pictures.of_data import row_of_image
from detr_ray.engine.pictures.request import Drawn, PictureRequest
from detr_ray.evaluation import DetectionTable, GroundTruth, evaluate_detections
from detr_ray.evaluation.coco_metrics import category_curves
from detr_ray.evaluation.error_breakdown import break_down_errors
from detr_ray.evaluation.lost_precision import lost_precision
from detr_ray.evaluation.outcomes import Outcome, Outcomes, confusion_matrix, find_outcomes
from detr_ray.evaluation.precision_recall import AREAS, RECALLS
from detr_ray.evaluation.suspicious import Suspicion, find_suspicious
from detr_ray.printable import counted
from detr_ray.viz.comparison import ComparedImage, JudgedBoxes, comparison_figure
from detr_ray.viz.figure import message_figure
from detr_ray.viz.scores import confusion_figure, errors_figure, precision_recall_figure, sizes_figure

_IOU_50, _IOU_75 = 0, 5


@dataclass(frozen=True)
class Found:
    """What a model found.

    Attributes:
        source: the model, for titles.
        truth: the annotations.
        detections: what was found.
        names: category id -> name.
        index: the validation set, to read its images; None if it is not available.
    """

    source: str
    truth: GroundTruth
    detections: DetectionTable
    names: Mapping[int, str]
    index: DatasetIndex | None


def predictions_picture(found: Found, request: PictureRequest) -> Drawn:
    """Annotations and predictions of one image, or of the first ones."""
    index = _with_images(found)
    rows = range(min(request.images, len(index))) if request.image is None else [row_of_image(index, request.image)]
    outcomes = find_outcomes(found.truth, found.detections, request.score)
    drawn, warnings = _compared(found, rows, outcomes, request.score, {})
    lines = [f"{count} {name.lower()}" for name, count in _counted(outcomes, found, request.score).items()]
    title = f"Predictions with a score of {request.score} or more; {found.source}"
    return Drawn(comparison_figure(drawn, title), lines + warnings)


def worst_picture(found: Found, request: PictureRequest) -> Drawn:
    """The images that cost most AP."""
    index = _with_images(found)
    lost = lost_precision(found.truth, found.detections)
    by_image = lost.by_image(found.truth, found.detections)
    rows = np.argsort(-by_image, kind="stable")[: request.images].tolist()
    outcomes = find_outcomes(found.truth, found.detections, request.score)
    notes = {row: f"costs {by_image[row]:.4f} AP" for row in rows}
    lines = [f"image {index.image_ids[row]}, {index.file_name(row)}: costs {by_image[row]:.5f} of AP" for row in rows]
    lines.append(
        f"these {len(rows)} of {len(index)} images cost {by_image[rows].sum():.3f} of {by_image.sum():.3f} lost"
    )
    title = f"The {len(rows)} images that cost most AP; predictions from {request.score} on; {found.source}"
    drawn, warnings = _compared(found, rows, outcomes, request.score, notes)
    return Drawn(comparison_figure(drawn, title), lines + warnings)


def suspicious_picture(found: Found, request: PictureRequest) -> Drawn:
    """Images with annotations that look wrong, the most suspicious first."""
    index = _with_images(found)
    suspicions = find_suspicious(found.truth, found.detections, request.score)
    if not suspicions:
        ap50 = evaluate_detections(found.truth, found.detections).summary["AP50"]
        line = "no annotation looks wrong to this model"
        if ap50 is not None:
            line += f" (AP50 {ap50:.3f}; one that finds little accuses none)"
        return Drawn(message_figure(line), [line])
    row_of = {image_id: row for row, image_id in enumerate(index.image_ids.tolist())}
    notes: dict[int, str] = {}
    for number, one in enumerate(suspicions, 1):
        row = row_of[one.image_id]
        if row in notes or len(notes) < request.images:
            notes[row] = ", ".join(filter(None, (notes.get(row), f"{number} {one.kind}")))
    outcomes = find_outcomes(found.truth, found.detections, request.score)
    drawn, warnings = _compared(found, list(notes), outcomes, request.score, notes, suspicions)
    title = f"Annotations that look wrong: {len(suspicions)} in {len({one.image_id for one in suspicions})} images"
    return Drawn(comparison_figure(drawn, f"{title}; {found.source}"), suspicion_lines(suspicions, found) + warnings)


def suspicion_lines(suspicions: Sequence[Suspicion], found: Found) -> list[str]:
    """Suspicions in words, with the numbers that they have in the picture."""
    return [f"{number}: {_suspicion_line(one, found)}" for number, one in enumerate(suspicions, 1)]


def _suspicion_line(one: Suspicion, found: Found) -> str:
    name = "" if found.index is None else f", {found.index.file_name(_row_of(found.index, one.image_id))}"
    line = f"image {one.image_id}{name}: {one.kind} ({one.strength:.2f})"
    if one.annotation is not None:
        category = found.names[int(found.truth.category_ids[one.annotation])]
        line += f": annotation {found.truth.annotation_ids[one.annotation]} ({category})"
    if one.detection is not None:
        category = found.names[int(found.detections.category_ids[one.detection])]
        box = ", ".join(f"{value:.0f}" for value in found.detections.boxes_xywh_px[one.detection])
        line += f": found {category} {found.detections.scores[one.detection]:.2f} at [{box}] (left, top, width, height)"
    return line


def precision_recall_picture(found: Found) -> Drawn:
    """Curves of every category."""
    categories, curves = category_curves(found.truth, found.detections)
    names = list(categories.values())
    precision = curves.precision["all"][[_IOU_50, _IOU_75]]
    return Drawn(precision_recall_figure(names, RECALLS, precision, f"Precision and recall; {found.source}"))


def confusion_picture(found: Found, request: PictureRequest) -> Drawn:
    """As which categories the annotations of each category were detected."""
    outcomes = find_outcomes(found.truth, found.detections, request.score)
    counts = confusion_matrix(found.truth, found.detections, outcomes)
    names = [name for _, name in found.truth.categories]
    title = f"Confusions at IoU 0.5, score {request.score} or more; {found.source}"
    lines = []
    for row, column in _largest_confusions(counts)[:10]:
        lines.append(f"{names[row]} found as {names[column]}: {counts[row, column]}")
    return Drawn(confusion_figure(names, counts, title), lines)


def sizes_picture(found: Found) -> Drawn:
    """AP and AR by the size of objects."""
    metrics = evaluate_detections(found.truth, found.detections)
    areas = found.truth.areas[~found.truth.is_crowd.astype(bool)]
    counts = {
        size: int(((areas >= low) & (areas <= high)).sum()) for size, (low, high) in AREAS.items() if size != "all"
    }
    return Drawn(sizes_figure(metrics.summary, counts, f"AP and AR by size of objects; {found.source}"))


def errors_picture(found: Found) -> Drawn:
    """What AP50 is lost to."""
    errors = break_down_errors(found.truth, found.detections)
    lines = [f"AP50 {errors.ap50:.3f}"]
    lines += [
        f"{kind}: {counted(count, 'error')}; alone +{errors.alone[kind]:.3f}, in turn +{errors.in_turn[kind]:.3f}"
        for kind, count in errors.counts.items()
    ]
    title = f"What AP50 is lost to; {found.source}"
    return Drawn(errors_figure(errors.ap50, errors.in_turn, errors.alone, errors.counts, title), lines)


def _largest_confusions(counts: np.ndarray) -> list[tuple[int, int]]:
    """(annotated, found) of different categories, the most frequent first."""
    between = counts[:-1, :-1] * ~np.eye(len(counts) - 1, dtype=bool)
    order = np.argsort(-between, axis=None, kind="stable")
    pairs = [divmod(int(place), len(between)) for place in order[: int((between > 0).sum())]]
    return pairs


def _with_images(found: Found) -> DatasetIndex:
    if found.index is None:
        raise ConfigError(f"data.val: the images that {found.source} was evaluated on are not at hand")
    return found.index


def _row_of(index: DatasetIndex, image_id: int) -> int:
    return int(np.searchsorted(index.image_ids, image_id))


def _counted(outcomes: Outcomes, found: Found, score: float) -> dict[str, int]:
    shown = outcomes.found[found.detections.scores >= score]
    counts = {
        outcome.name: int((shown == outcome).sum()) for outcome in (Outcome.MATCHED, Outcome.CONFUSED, Outcome.FALSE)
    }
    return counts | {"MISSED": int((outcomes.annotated == Outcome.MISSED).sum())}


def _compared(
    found: Found,
    rows: Sequence[int],
    outcomes: Outcomes,
    score: float,
    notes: Mapping[int, str],
    suspicions: Sequence[Suspicion] = (),
) -> tuple[list[ComparedImage], list[str]]:
    """The images with their boxes, and a warning for each that cannot be read."""
    index, truth, detections = _with_images(found), found.truth, found.detections
    numbers = (
        {one.annotation: number for number, one in enumerate(suspicions, 1)},
        {one.detection: number for number, one in enumerate(suspicions, 1)},
    )
    pixels = StoredPixels(index)
    images = []
    for row in rows:
        boxes = np.arange(truth.first_box[row], truth.first_box[row + 1])
        shown = np.flatnonzero((detections.image_ids == index.image_ids[row]) & (detections.scores >= score))
        annotated = [_numbered(found.names[int(truth.category_ids[i])], i, numbers[0]) for i in boxes.tolist()]
        texts = [f"{found.names[int(detections.category_ids[i])]} {detections.scores[i]:.2f}" for i in shown.tolist()]
        texts = [_numbered(text, i, numbers[1]) for text, i in zip(texts, shown.tolist(), strict=True)]
        shown_pixels = pixels.read(row)
        title = f"image {index.image_ids[row]}: " + ("cannot be read" if row in pixels.unreadable else "annotated")
        images.append(
            ComparedImage(
                title + (f"\n{notes[row]}" if row in notes else ""),
                shown_pixels,
                JudgedBoxes(
                    xywh_to_xyxy(truth.boxes_xywh_px[boxes]),
                    annotated,
                    [_outcome(outcomes.annotated, i, numbers[0]) for i in boxes.tolist()],
                ),
                JudgedBoxes(
                    xywh_to_xyxy(detections.boxes_xywh_px[shown]),
                    texts,
                    [_outcome(outcomes.found, i, numbers[1]) for i in shown.tolist()],
                ),
            )
        )
    return images, [f"WARNING: {reason}" for reason in pixels.unreadable.values()]


def _numbered(text: str, row: int, numbers: Mapping[int | None, int]) -> str:
    """The text beside a box, after the number of its suspicion, if there is one."""
    return f"{numbers[row]} {text}" if row in numbers else text


def _outcome(outcomes: np.ndarray, row: int, suspected: Collection[int | None]) -> str:
    return "suspected" if row in suspected else Outcome(outcomes[row]).name.lower()
