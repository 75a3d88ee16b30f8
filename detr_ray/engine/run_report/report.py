"""The report of a run, and of two runs side by side: their content, section by section."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from detr_ray.addresses import join, parent
from detr_ray.coco_numbers import COCO_NUMBERS
from detr_ray.config import Config, flatten
from detr_ray.data.index import DatasetIndex
from detr_ray.engine.checkpoints.run_directory import CONFIG, absolute_storage
from detr_ray.engine.past_run import PastRun
from detr_ray.engine.pictures.of_data import planned_batch
from detr_ray.engine.pictures.of_evaluation import (
    Found,
    confusion_picture,
    errors_picture,
    precision_recall_picture,
    sizes_picture,
    suspicion_lines,
    suspicious_picture,
    worst_picture,
)
from detr_ray.engine.pictures.of_run import curves_of
from detr_ray.engine.pictures.request import PictureRequest
from detr_ray.engine.reporting.progress import duration
from detr_ray.engine.run_report import page
from detr_ray.engine.run_report.problems import find_problems
from detr_ray.engine.stream.planned_data import PlannedData
from detr_ray.evaluation import CocoMetrics, evaluate_detections
from detr_ray.evaluation.error_breakdown import ErrorBreakdown, break_down_errors
from detr_ray.evaluation.suspicious import find_suspicious
from detr_ray.locations import write_bytes
from detr_ray.viz.curves import schedules_figure, step_times_figure, training_figure

REPORT = "report.html"
"""Name of the file in the run's folder."""
PICTURES = "pictures"
"""Name of the folder with its pictures in the run's folder, and among the artifacts of its MLflow run."""

_MAIN_KEYS = (
    "model.architecture", "model.backbone", "model.num_queries", "model.hidden_dim", "model.encoder_layers",
    "model.decoder_layers", "model.init_from", "train.epochs", "train.global_batch_size", "train.num_workers",
    "train.precision", "optim.lr", "optim.lr_backbone", "optim.schedule", "optim.ema_decay", "data.augment.scales",
    "data.augment.max_size", "eval.size", "eval.max_size", "run.seed",
)  # fmt: skip
_PLACES = (
    "data.root", "data.sources", "data.train.annotations", "data.train.images", "data.train.shards",
    "data.val.annotations", "data.val.images", "data.val.shards",
)  # fmt: skip
PICTURED_IMAGES = 6
"""Most images in a picture of images."""
ENDS: dict[str | None, str] = {
    "FINISHED": "finished",
    "FAILED": "failed",
    "KILLED": "was stopped and can go on",
    None: "is at work, or was cut off",
}
"""What became of a run, by the status of its last process."""


@dataclass(frozen=True)
class Reported:
    """A run with what is computed once for its report.

    Attributes:
        run: the run.
        found: the detections of its best weights; None if they were not kept.
        metrics: of these weights.
        errors: what their AP50 is lost to.
        pictures: takes the figures of the page.
    """

    run: PastRun
    found: Found | None
    metrics: CocoMetrics | None
    errors: ErrorBreakdown | None
    pictures: page.Pictures = field(default_factory=page.Pictures)

    @classmethod
    def of(cls, run: PastRun, index: DatasetIndex | None) -> Reported:
        """Computes it.

        Args:
            run: the run.
            index: its validation set, for pictures of images; one that is not the run's is not used. None for none.
        """
        if run.best is None:
            return cls(run, None, None, None)
        is_its = index is not None and index.fingerprint == run.record["fingerprints"].get("val")
        best = run.best
        names = best.truth.category_names()
        others = {int(category_id) for category_id in best.detections.category_ids} - names.keys()
        names |= {category_id: f"category {category_id}" for category_id in others}
        source = f"{run.name}, step {best.step}"
        found = Found(source, best.truth, best.detections, names, index if is_its else None)
        metrics = evaluate_detections(best.truth, best.detections)
        return cls(run, found, metrics, break_down_errors(best.truth, best.detections))


@dataclass(frozen=True)
class RunReport:
    """The report of a run.

    Attributes:
        html: one page with everything in it.
        pictures: file name -> content: those of the page, each as a file.
    """

    html: str
    pictures: dict[str, bytes]

    def save_pictures(self, path: str) -> list[str]:
        """Writes the pictures into a run's folder; gives their locations.

        Raises:
            OSError: one could not be written.
        """
        locations = [join(path, PICTURES, name) for name in self.pictures]
        for location, content in zip(locations, self.pictures.values(), strict=True):
            write_bytes(location, content)
        return locations

    def save(self, path: str) -> list[str]:
        """Writes pictures and page into a run's folder; gives their locations, the page's last.

        Raises:
            OSError: one could not be written.
        """
        locations = [*self.save_pictures(path), join(path, REPORT)]
        write_bytes(locations[-1], self.html.encode())
        return locations


def first_batch(data: PlannedData) -> Figure:
    """What a model is trained on first.

    Args:
        data: with a training set.
    """
    return planned_batch(data, PictureRequest(images=PICTURED_IMAGES)).figure


def run_report(run: PastRun, index: DatasetIndex | None = None, first_batch: Figure | None = None) -> RunReport:
    """The report of a run.

    Args:
        run: the run.
        index: its validation set, for pictures of images; None where it is not at hand.
        first_batch: what the model was trained on first; None where the training set is not at hand.
    """
    reported = Reported.of(run, index)
    sections = [
        page.Section(
            "wrong", "What looks wrong", [page.problems(find_problems(run, reported.metrics, reported.errors))]
        ),
        page.Section("run", "What was run", _what(run)),
        page.Section("data", "On what", _data(reported, first_batch)),
        page.Section("course", "How it went", _course(reported)),
        page.Section("scores", "How good it is", _scores(reported)),
        page.Section("errors", "What it gets wrong", _errors(reported)),
        page.Section("next", "How to go on", [page.commands(_next(run))]),
    ]
    html = page.render(f"Run {run.name}", [page.paragraph(_state(run)), page.cards(_numbers(reported))], sections)
    return RunReport(html, reported.pictures.files)


def _state(run: PastRun) -> str:
    """One sentence: how it ended, after how many steps, and how long it took."""
    latest = run.checkpoints[-1] if run.checkpoints else None
    sessions = run.history.sessions if run.history is not None else []
    text = f"It {ENDS[sessions[-1].status]}" if sessions else "It was not recorded, so that its course is not known"
    if latest is not None:
        text += f"; {latest.step:,} steps, {latest.details.get('epoch', 0):.2f} of {run.config.train.epochs} epochs"
    if run.history is not None:
        text += f"; {duration(run.history.seconds)} at work"
        if len(sessions) > 1:
            text += f" in {len(sessions)} starts"
        began = datetime.datetime.fromtimestamp(sessions[0].began_ms / 1000, datetime.UTC)
        text += f"; begun {began:%Y-%m-%d %H:%M} UTC"
        if "run.ended_early" in run.history.tags and (run.last("train/epoch") or 0) < run.config.train.epochs:
            text += f"; it ended early: {run.history.tags['run.ended_early']}"
    return f"{text}."


def _numbers(reported: Reported) -> list[tuple[str, str]]:
    run, metrics = reported.run, reported.metrics
    summary: Mapping[str, float | None] = metrics.summary if metrics is not None else {}
    best = run.best_checkpoint
    if metrics is None and best is not None:
        summary = {name.removeprefix("val/"): value for name, value in (best.metrics or {}).items()}
    cards = [(number, name) for name in ("AP", "AP50", "AP75", "AR100") if (number := _number(summary.get(name)))]
    if best is not None:
        cards.append((f"{best.details.get('epoch', 0):.4g}", "epoch of the best weights"))
    for metric, form, meaning in (
        ("train/loss", ".3f", "training loss at the end"),
        ("perf/images_per_s", ".1f", "images a second at the end"),
    ):
        value = run.last(metric)
        if value is not None:
            cards.append((f"{value:{form}}", meaning))
    return cards


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _what(run: PastRun) -> list[str]:
    flat = flatten(run.config)
    rows = [[key, str(flat[key])] for key in _MAIN_KEYS if flat.get(key) is not None]
    tags = {} if run.history is None else run.history.tags
    rows.append(["folder", run.directory.path])
    if run.record.get("forked_from"):
        rows.append(["begun from", str(run.record["forked_from"])])
    for tag, meaning in (("code.commit", "code"), ("detr_ray.version", "detr_ray"), ("torch.version", "torch")):
        if tag in tags:
            rows.append([meaning, tags[tag]])
    return [page.table(rows), page.folded("the whole configuration", run.config.to_yaml())]


def data_places(config: Config) -> list[list[str]]:
    """(key, value) of where a configuration says that its data lies."""
    flat = flatten(config)
    return [[key, str(flat[key])] for key in _PLACES if flat[key] not in (None, "[]")]


def _data(reported: Reported, first_batch: Figure | None) -> list[str]:
    run, tags = reported.run, {} if reported.run.history is None else reported.run.history.tags
    rows = data_places(run.config)
    for tag, meaning in (("data.train.images", "training images"), ("data.classes", "classes")):
        if tag in tags:
            rows.append([meaning, tags[tag]])
    metrics = reported.metrics
    if metrics is not None:
        rows.append(["validation images", f"{metrics.images:,}, with {metrics.boxes:,} annotated boxes"])
    rows += [[f"fingerprint, {split}", print_[:16]] for split, print_ in run.record["fingerprints"].items()]
    parts = [page.table(rows)]
    if first_batch is not None:
        caption = "The first images that it was trained on, as the model gets them"
        parts.append(reported.pictures.add("batch", first_batch, caption, "jpg"))
    return parts


def _course(reported: Reported) -> list[str]:
    run, pictures = reported.run, reported.pictures
    if run.history is None:
        return [page.paragraph("Its metrics are not on this machine, or were not recorded (tracking.enabled=false).")]
    curves = curves_of(run)
    training = "Training loss, its parts, validation scores, and gradient norm"
    return [
        pictures.add("training", training_figure([curves]), training),
        pictures.add("schedules", schedules_figure(curves), "Learning rates and loss weights as they were"),
        pictures.add("times", step_times_figure(curves), "Where the time of a step went"),
    ]


def _scores(reported: Reported) -> list[str]:
    if reported.found is None or reported.metrics is None:
        return [page.paragraph("What its best weights found was not kept (tracking.report=false, or no validation).")]
    metrics = reported.metrics
    rows = [[name, _number(metrics.summary[name]) or "n/a", COCO_NUMBERS[name]] for name in COCO_NUMBERS]
    return [
        page.paragraph(f"The best weights, on {metrics.images:,} validation images.", pale=True),
        page.table(rows, ["number", "value", "meaning"]),
        page.heading("Categories"),
        *_categories(metrics),
        reported.pictures.add(
            "precision-recall", precision_recall_picture(reported.found).figure,
            "Precision and recall of the worst categories",
        ),
        reported.pictures.add("sizes", sizes_picture(reported.found).figure, "AP and AR by the size of objects"),
    ]  # fmt: skip


def _categories(metrics: CocoMetrics) -> list[str]:
    """The categories with annotations, the best first; a number of those without."""
    scored = {name: ap for name, ap in metrics.category_ap.items() if ap is not None}
    rows = [
        [name, _number(ap), _number(metrics.category_ap50[name])]
        for name, ap in sorted(scored.items(), key=lambda item: -item[1])
    ]
    parts = [page.table(rows, ["category", "AP", "AP50"], numbers_from=1)]
    if absent := len(metrics.category_ap) - len(scored):
        categories = "1 category" if absent == 1 else f"{absent} categories"
        parts.append(page.paragraph(f"No box in the validation set, and so no AP: {categories}.", pale=True))
    return parts


def _errors(reported: Reported) -> list[str]:
    found, pictures = reported.found, reported.pictures
    if found is None:
        return []
    request = PictureRequest(images=PICTURED_IMAGES)
    confusion, errors = confusion_picture(found, request), errors_picture(found)
    parts = [
        pictures.add("errors", errors.figure, "What AP50 is lost to"),
        pictures.add("confusion", confusion.figure, "What annotations of each category were found as"),
        page.listing(confusion.lines),
    ]
    if found.index is not None:
        worst = worst_picture(found, request)
        parts += [pictures.add("worst", worst.figure, "The images that cost most AP", "jpg"), page.listing(worst.lines)]
    suspicions = find_suspicious(found.truth, found.detections)
    parts.append(page.heading(f"Annotations that look wrong: {len(suspicions)}"))
    if suspicions and found.index is not None:
        figure = suspicious_picture(found, request).figure
        parts.append(pictures.add("suspicious", figure, "Annotations that look wrong", "jpg"))
    return [*parts, page.listing(suspicion_lines(suspicions, found))]


def _next(run: PastRun) -> list[tuple[str, str]]:
    checkpoint = f"eval.checkpoint={shlex.quote(run.directory.path)}"
    config = shlex.quote(join(run.directory.path, CONFIG))
    best = run.best_checkpoint or (run.checkpoints[-1] if run.checkpoints else None)
    go_on = f"python -m detr_ray.train --config {config} run.name={shlex.quote(run.name)}"
    storage = parent(run.directory.path)
    if absolute_storage(run.config.run.storage) != storage:  # it was moved, or begun in another working folder
        go_on += f" run.storage={shlex.quote(storage)}"
    lines = [
        ("Go on with this run, if it was interrupted:", go_on),
        ("Score it on other images, or at other sizes:", f"python -m detr_ray.evaluate {checkpoint}"),
        (
            "Look at what it does:",
            f"python -m detr_ray.show decoder {checkpoint} --out decoder.png\n"
            f"python -m detr_ray.show suspicious {checkpoint} --out suspicious.png",
        ),
    ]
    if best is not None:
        weights = shlex.quote(join(best.path, "model.pt"))
        lines.append(
            ("Begin another run with its weights:", f"python -m detr_ray.train --config ... model.init_from={weights}")
        )
    return lines
