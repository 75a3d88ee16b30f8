"""Two runs side by side: the differences in their settings, and in their results."""

from __future__ import annotations

from detr_ray.coco_numbers import COCO_NUMBERS
from detr_ray.config import flatten
from detr_ray.engine.past_run import PastRun
from detr_ray.engine.pictures.of_evaluation import errors_picture
from detr_ray.engine.pictures.of_run import curves_of
from detr_ray.engine.reporting.progress import duration
from detr_ray.engine.run_report import page
from detr_ray.engine.run_report.report import Reported
from detr_ray.viz.curves import training_figure

_MOST_CATEGORIES = 40


def comparison_report(first: PastRun, second: PastRun) -> str:
    """The report of two runs as one HTML page.

    Args:
        first: the run that the other is compared with.
        second: the other.
    """
    both = (Reported.of(first, None), Reported.of(second, None))
    sections = [
        page.Section("settings", "How they differ", _settings(first, second)),
        page.Section("scores", "Scores", _scores(*both)),
        page.Section("course", "How they went", _course(first, second)),
        page.Section("categories", "Categories", _categories(*both)),
        page.Section("errors", "What they get wrong", _errors(*both)),
    ]
    head = [page.paragraph(line) for line in _comparability(first, second)]
    return page.render(f"Runs {first.name} and {second.name}", head, sections)


def _comparability(first: PastRun, second: PastRun) -> list[str]:
    prints = [run.record["fingerprints"].get("val") for run in (first, second)]
    if prints[0] != prints[1]:
        return ["Their validation sets are not the same, so that their scores say little about each other."]
    sizes = [_validated_at(run) for run in (first, second)]
    if sizes[0] != sizes[1]:
        return [f"They were validated at other image sizes: {sizes[0]} and {sizes[1]}."]
    return ["They were validated on the same images at the same size."]


def _validated_at(run: PastRun) -> tuple[int, int]:
    """The image sizes that the scores of a run's best weights are of; it may have gone on with others since."""
    best, evaluation = run.best_checkpoint, run.config.eval
    measured = {} if best is None else best.measured_on
    return measured.get("eval.size", evaluation.size), measured.get("eval.max_size", evaluation.max_size)


def _settings(first: PastRun, second: PastRun) -> list[str]:
    one, other = flatten(first.config), flatten(second.config)
    skipped = ("run.name", "run.storage")
    rows = [
        [key, str(one.get(key)), str(other.get(key))]
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key) and key not in skipped
    ]
    rows += [
        [f"data, {split}", str(first.record["fingerprints"].get(split))[:16], str(found)[:16]]
        for split, found in second.record["fingerprints"].items()
        if first.record["fingerprints"].get(split) != found
    ]
    if not rows:
        return [page.paragraph("Their configurations and data are the same.")]
    return [page.table(rows, ["key", first.name, second.name], are_long=True)]


def _scores(first: Reported, second: Reported) -> list[str]:
    rows = []
    for name, meaning in COCO_NUMBERS.items():
        one, other = (_score(reported, name) for reported in (first, second))
        rows.append([name, _text(one), _text(other), _difference(one, other), meaning])
    for metric, meaning in (("train/loss", "training loss at the end"), ("perf/images_per_s", "images a second")):
        one, other = first.run.last(metric), second.run.last(metric)
        rows.append([metric, _text(one), _text(other), _difference(one, other), meaning])
    times = [
        "unknown" if reported.run.history is None else duration(reported.run.history.seconds)
        for reported in (first, second)
    ]
    rows.append(["time", *times, "", "at work"])
    return [page.table(rows, ["number", first.run.name, second.run.name, "difference", "meaning"])]


def _score(reported: Reported, name: str) -> float | None:
    if reported.metrics is not None:
        return reported.metrics.summary[name]
    best = reported.run.best_checkpoint
    return None if best is None else (best.metrics or {}).get(f"val/{name}")


def _text(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _difference(one: float | None, other: float | None) -> str:
    return "" if one is None or other is None else f"{other - one:+.3f}"


def _course(first: PastRun, second: PastRun) -> list[str]:
    curves = [curves_of(run) for run in (first, second) if run.history is not None]
    if not curves:
        return [page.paragraph("The metrics of neither are on this machine.")]
    caption = f"Solid: {first.name}; dashed: {second.name}" if len(curves) == 2 else f"{curves[0].name} alone"
    return [page.picture(training_figure(curves), caption)]


def _categories(first: Reported, second: Reported) -> list[str]:
    if first.metrics is None or second.metrics is None:
        return []
    one, other = first.metrics.category_ap, second.metrics.category_ap
    shared = [name for name in one if one[name] is not None and other.get(name) is not None]
    shared.sort(key=lambda name: -abs((other[name] or 0) - (one[name] or 0)))
    rows = [
        [name, _text(one[name]), _text(other[name]), _difference(one[name], other[name])]
        for name in shared[:_MOST_CATEGORIES]
    ]
    head = ["category", f"AP, {first.run.name}", f"AP, {second.run.name}", "difference"]
    return [page.table(rows, head, numbers_from=1)] if rows else []


def _errors(first: Reported, second: Reported) -> list[str]:
    return [
        page.picture(errors_picture(reported.found).figure, f"What AP50 of {reported.run.name} is lost to")
        for reported in (first, second)
        if reported.found is not None
    ]
