"""Problems of a run, found in its metrics and in the detections of its best weights; and what to do about each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from detr_ray.architectures import published_values
from detr_ray.data.errors import few
from detr_ray.engine.past_run import PastRun
from detr_ray.engine.reporting.records import FAILURE_TAG
from detr_ray.evaluation import CocoMetrics
from detr_ray.evaluation.error_breakdown import ErrorBreakdown
from detr_ray.printable import counted

Problem = tuple[str, str]
"""What is wrong, and what to do about it."""

_WAITS = 0.10
_PADS = 0.25
_FELL = 0.01
_STILL_RISES = 0.005
_NO_AP = 0.01
_LOW_AP = 0.05
_ENOUGH_BOXES = 10
_COSTLY = 0.05
_MOST_NAMED = 8

_ADVICE = {
    "classification": "look at the confusions below; more examples of these categories, or a higher loss.ce, help to "
    "tell them apart",
    "localisation": "boxes are found but do not fit: larger images (data.augment.scales, eval.size), more training, or "
    "higher loss.bbox and loss.giou; and look whether the annotated boxes are tight",
    "both": "neither place nor category is right: mostly a sign of too little training",
    "duplicate": "several queries find one object: more training or more decoder layers, which suppress duplicates",
    "background": "detections where nothing is annotated: look at `show suspicious` first, the annotations may be "
    "missing; images without objects in the training set help, too",
    "missed": "objects are not found at all: more training, larger images for small objects, or more examples",
}


def find_problems(run: PastRun, metrics: CocoMetrics | None, errors: ErrorBreakdown | None) -> list[Problem]:
    """All problems, the most serious first.

    Args:
        run: the run.
        metrics: of its best weights; None where they are not known.
        errors: what their AP50 is lost to; None where it is not known.
    """
    found = [*_ended_badly(run), *_of_training(run), *_of_scores(run), *_of_data(run, metrics)]
    return [*found, *([] if errors is None else _of_errors(errors))]


def _ended_badly(run: PastRun) -> Iterator[Problem]:
    history = run.history
    if history is not None and history.sessions and history.sessions[-1].status == "FAILED":
        reason = f": {history.tags[FAILURE_TAG]}" if FAILURE_TAG in history.tags else ""
        again = "goes on from the last checkpoint" if run.checkpoints else "begins it again"
        yield f"The run failed{reason}", f"the same command with its run.name {again}"
    if not run.checkpoints:
        yield "There is no checkpoint", "train on, or look into the log why none could be written"


def _of_training(run: PastRun) -> Iterator[Problem]:
    series = {} if run.history is None else {name: values for name, (_, values) in run.history.metrics.items()}
    losses = series.get("train/loss", np.zeros(0))
    if not np.isfinite(losses).all():
        yield (
            f"The loss was not finite in {int((~np.isfinite(losses)).sum())} records",
            "lower optim.lr, lengthen optim.warmup_epochs, or use train.precision=fp32",
        )
    skipped = int(series.get("train/skipped_steps", np.zeros(1)).sum())
    if skipped:
        yield f"{skipped} steps were left out since something was not finite", "lower optim.lr or use another precision"
    bad = int(series.get("train/bad_images", np.zeros(1)).sum())
    if bad:
        yield f"{bad} times an image could not be read", "`python -m detr_ray.check ... --decode` names the images"
    waits = series.get("perf/data_wait_frac", np.zeros(0))[1:]  # the first step waits for the pipeline to fill
    if len(waits) and waits.mean() > _WAITS:
        yield (
            f"{waits.mean():.0%} of the time was spent waiting for data",
            "give the data tasks more CPUs (data.tasks_per_worker), or pack the images into shards (`python -m "
            "detr_ray.prepare --shards`)",
        )
    padding = series.get("perf/padding_frac", np.zeros(0))
    if len(padding) and padding.mean() > _PADS:
        yield (
            f"{padding.mean():.0%} of all pixels were padding",
            "a larger data.window or data.augment.shared_draws puts images of like shape together",
        )


def _of_scores(run: PastRun) -> Iterator[Problem]:
    scores = run.history.metrics.get("val/AP") if run.history is not None else None
    if scores is None:
        if run.history is not None and "val/seconds" in run.history.metrics:
            yield "There were no scores", "the validation images have no boxes: give data.val some that have"
        elif run.history is not None:
            yield _unvalidated(run)
        return
    values = scores[1]
    best = float(values.max())
    if best < _NO_AP:
        yield (
            f"AP is {best:.3f}" if best >= 0.0005 else "AP is 0",
            "train longer (DETR takes hundreds of epochs from random weights), begin with model.init_from, and look "
            "whether the loss falls; configs/overfit.yaml tells whether data and settings can be learnt at all",
        )
    elif values[-1] < best - _FELL:
        yield (
            f"AP fell from {best:.3f} to {values[-1]:.3f} at the end",
            "the best checkpoint is kept; fewer epochs, an earlier drop of the learning rate or more augmentation help",
        )
    elif len(values) >= 4 and best - float(values[: -max(1, len(values) // 4)].max()) > _STILL_RISES:
        yield "AP was still rising at the end", "a run with more train.epochs gets further"


def _unvalidated(run: PastRun) -> Problem:
    every = run.config.eval.every_epochs
    if "val" not in run.record["fingerprints"]:
        return "There was no validation", "give data.val, or data.split={val: 0.1}: without it no checkpoint is best"
    due = f"after {counted(every, 'epoch')}" if every else "at the end"
    advice = f"it is due {due} (eval.every_epochs={every}); the same command with its run.name goes on"
    return "It ended before its first validation", advice


def _of_data(run: PastRun, metrics: CocoMetrics | None) -> Iterator[Problem]:
    if run.best is None or metrics is None:
        return
    truth = run.best.truth
    queries = published_values(run.config.model).get("num_queries", run.config.model.num_queries)
    most = int(np.diff(truth.first_box).max(initial=0))
    if queries is not None and most > queries:
        yield (
            f"An image has {most} boxes, more than the {queries} queries can find", "raise model.num_queries"
        )  # fmt: skip
    names = truth.category_names()
    ids, counts = np.unique(truth.category_ids[~truth.is_crowd.astype(bool)], return_counts=True)
    boxes = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    absent = [name for category_id, name in names.items() if not boxes.get(category_id)]
    if absent:
        yield (
            f"{len(absent)} of {len(names)} categories have no box in the validation set: {few(absent, _MOST_NAMED)}",
            "nothing is known of them; add images",
        )  # fmt: skip
    low = [
        name
        for category_id, name in names.items()
        if boxes.get(category_id, 0) >= _ENOUGH_BOXES and (metrics.category_ap[name] or 0) < _LOW_AP
    ]
    if low and (metrics.ap or 0) > _LOW_AP:
        yield (
            f"{len(low)} categories have an AP below {_LOW_AP}: {few(low, _MOST_NAMED)}",
            "look at their images and annotations",
        )


def _of_errors(errors: ErrorBreakdown) -> Iterator[Problem]:
    kind = max(errors.alone, key=lambda name: errors.alone[name])
    if errors.alone[kind] > _COSTLY:
        yield f"The costliest kind of error is {kind}: AP50 would be {errors.alone[kind]:.3f} higher", _ADVICE[kind]
