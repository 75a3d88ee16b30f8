"""Checks data, weights, storage and tracking before a training run.

All checks are made, also after errors. Nothing is stored, downloaded or generated. Training makes checks of its own and
stops at the first error; these checks go further and take longer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from detr_ray.callbacks import Progress, Say
from detr_ray.config import Config
from detr_ray.data.label_map import COCO_NUM_CLASSES
from detr_ray.engine.preflight.data import (
    DATA,
    IMAGES,
    LABELS,
    check_boxes,
    check_generated,
    check_images,
    check_labels,
    open_splits,
)
from detr_ray.engine.preflight.findings import Report
from detr_ray.engine.preflight.storage import STORAGE, check_storage
from detr_ray.engine.preflight.training import (
    TRAINING,
    WEIGHTS,
    check_plan,
    check_weights,
    starts_from_official_weights,
)
from detr_ray.engine.reporting.progress import Pace
from detr_ray.engine.reporting.tracking_store import run_tracking_uri
from detr_ray.tracking.reachability import UnreachableError, UnusableError, try_store


def run_preflight(
    config: Config,
    say: Say,
    decode: bool = False,
    report: Report | None = None,
    pace: Callable[[str], Progress] | None = None,
) -> Report:
    """Checks everything that a training run needs.

    Args:
        config: the configuration; `Config.check_training` has passed.
        say: shows the user a line. The findings of an area are shown when the area is done.
        decode: decode every image, instead of reading only its header.
        report: earlier findings, to which the new ones are added.
        pace: for a piece of work, what is told of the images that are done, and of all; None: lines of `say`.

    Returns:
        All findings.
    """
    report = Report() if report is None else report
    pace = pace or (lambda what: Pace(f"  {what}", say))
    with section(DATA, report, say):
        opened = open_splits(config, report, pace) if check_generated(config, report) else {}
    label_map = None
    if opened:
        with section(LABELS, report, say):
            label_map = check_labels(config, opened, lambda: starts_from_official_weights(config), report)
            check_boxes(config, opened, report)
        with section(TRAINING, report, say):
            check_plan(config, opened, label_map, report)
    with section(WEIGHTS, report, say):
        check_weights(config, label_map, report)
    with section(STORAGE, report, say):
        check_storage(config, label_map.num_classes if label_map else COCO_NUM_CLASSES, report)
    with section("tracking", report, say):
        _check_tracking(config, report)
    if opened:
        with section(IMAGES, report, say):
            for split, index in opened.items():
                check_images(config, split, index, decode, report, pace)
    return report


@contextlib.contextmanager
def section(area: str, report: Report, say: Say) -> Iterator[None]:
    """Shows the name of an area before its checks, and the findings after them."""
    say(area)
    before = len(report.findings)
    yield
    for finding in report.findings[before:]:
        for line in finding.lines():
            say(line)


def _check_tracking(config: Config, report: Report) -> None:
    if not config.tracking.enabled:
        report.add("ok", "tracking", "off (tracking.enabled=false)")
        return
    try:
        report.add("ok", "tracking", try_store(run_tracking_uri(config)))
    except UnusableError as error:
        report.add("error", "tracking", str(error), "training refuses to start")
    except UnreachableError as error:
        report.add(
            "error", "tracking", str(error),
            "training would run without it, and send its records when it answers",
        )  # fmt: skip
