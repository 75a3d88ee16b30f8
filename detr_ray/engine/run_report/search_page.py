"""The report of a search: what was searched, its trials, the importance of its parameters, the best configuration."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from detr_ray.addresses import join
from detr_ray.config import Config
from detr_ray.config.yaml_format import format_inline
from detr_ray.engine.opened_data import OpenedData
from detr_ray.engine.reporting.progress import duration
from detr_ray.engine.run_report import page
from detr_ray.engine.run_report.problems import Problem
from detr_ray.engine.run_report.report import data_places
from detr_ray.printable import counted, shortened
from detr_ray.search.confirmation import Confirmation, fewest_seeds
from detr_ray.search.confirmed import DEFAULT, FIRST_SEED, confirmation_run
from detr_ray.search.tables import ENDED, Ending, state_counts
from detr_ray.search.trials import Trial

_CAPTIONS = {
    "parallel_coordinates.png": "The values of each trial and what came of them",
    "history.png": "The metric of each trial over its epochs, and the best so far",
}
_SETTINGS = ("searcher", "scheduler", "metric", "mode", "trials", "max_concurrent", "time_budget_s", "seed")
_LONGEST_REASON = 160


@dataclass(frozen=True)
class Searched:
    """A search that has ended.

    Attributes:
        name: of the search.
        path: its folder.
        config: the configuration that its trials' are made from, with the section ``tune``.
        opened: its data; None where settings of the data are searched.
        ending: how it ended.
        seconds: that its last process took.
        trials: all of them, those of earlier processes among them.
        best: the best trial; None if nothing was measured.
        confirmation: what several trainings of the best configuration and the default one gave; None without them.
    """

    name: str
    path: str
    config: Config
    opened: OpenedData | None
    ending: Ending
    seconds: float
    trials: Sequence[Trial]
    best: Trial | None
    confirmation: Confirmation | None = None


def search_report(
    searched: Searched, trials_table: str, importance: str, files: Mapping[str, str], pictures: Mapping[str, Figure]
) -> str:
    """The report of a search as one HTML page.

    Args:
        searched: the search.
        trials_table: all trials, as text.
        importance: how much each parameter mattered, as text.
        files: name -> content of the files that lie beside the page, the best configuration first.
        pictures: file name -> figure.
    """
    drawn = [page.picture(figure, _CAPTIONS.get(file, file)) for file, figure in pictures.items()]
    sections = [
        page.Section("wrong", "What looks wrong", [page.problems(_problems(searched))]),
        page.Section("search", "What was searched", _what(searched)),
        page.Section("data", "On what", [page.table(_data(searched))]),
        page.Section("trials", "Trials", [page.text_block(trials_table)]),
        page.Section("confirmed", "Better, or lucky?", _confirmed(searched)),
        page.Section("pictures", "Pictures", drawn),
        page.Section("importance", "What mattered", [page.text_block(importance)]),
        page.Section("files", "What it leaves", [page.folded(file, text) for file, text in files.items()]),
        page.Section("next", "How to go on", [page.commands(_next(searched, files))]),
    ]
    head = [page.paragraph(line) for line in _state(searched)]
    return page.render(f"Search {searched.name}", head, sections)


def _state(searched: Searched) -> list[str]:
    """How it ended, what the best trial is, and how long it took; then whether the best is more than luck."""
    trained = sum(trial.seconds for trial in searched.trials)
    trials = f"{counted(len(searched.trials), 'trial')} ({state_counts(searched.trials)})"
    text = f"It {ENDED[searched.ending]} after {duration(searched.seconds)}"
    text += f"; {trials}, {duration(trained)} of training in all"
    if searched.best is not None and searched.best.best is not None:
        text += f"; the best is {searched.best.name}: {searched.config.tune.metric} {searched.best.best:.4f}"
    verdict = [] if searched.confirmation is None else [searched.confirmation.verdict]
    return [f"{text}.", *verdict]


def _problems(searched: Searched) -> list[Problem]:
    """What looks wrong, the most serious first."""
    found: list[Problem] = []
    if searched.confirmation is not None and not searched.confirmation.is_better:
        found.append(
            (
                "The best configuration is not shown to be better than the default one",
                "more seeds (--confirm) show smaller differences, more or longer trials find larger ones",
            )
        )
    count = len(searched.trials)
    if searched.best is None:
        found.append(
            (f"No trial gave a value of {searched.config.tune.metric}", "look at the reasons below the trials")
        )
    for state, verb, advice in (
        ("failed", "failed", "the reason of each is below the trials; --resume does not start them again"),
        ("refused", "were refused", "they cost nothing; narrow tune.space if they are many"),
    ):
        those = [trial for trial in searched.trials if trial.state == state]
        if those:
            reason = shortened(" ".join(those[0].problem.split()), _LONGEST_REASON)
            found.append((f"{len(those)} of {count} trials {verb} ({those[0].name}: {reason})", advice))
    cut = [trial.name for trial in searched.trials if not trial.is_over]
    if cut:
        found.append((f"{len(cut)} of {count} trials did not come to their end", "--resume goes on with them"))
    return found


def _confirmed(searched: Searched) -> list[str]:
    """What the best and the default configuration gave with several seeds each."""
    found = searched.confirmation
    if found is None or searched.best is None:
        return []
    first = searched.config.run.seed + FIRST_SEED
    both = [found.best, found.default]
    rows = [
        [f"seed {seed}", f"{best:.4f}", f"{default:.4f}"]
        for seed, (best, default) in enumerate(zip(*both, strict=True), first)
    ]
    rows.append(["mean", *(f"{statistics.fmean(sample):.4f}" for sample in both)])
    rows.append(["standard deviation", *(f"{statistics.stdev(sample):.4f}" for sample in both)])
    metric = searched.config.tune.metric
    runs = [confirmation_run(name, first) for name in (searched.best.run_name, DEFAULT)]
    return [
        page.paragraph(found.verdict),
        page.table(rows, [metric, f"best ({searched.best.run_name})", "default"], numbers_from=1),
        page.paragraph(found.comparison),
        page.paragraph(f"Each is a whole training with a report of its own, as in {runs[0]} and {runs[1]}.", pale=True),
    ]


def _what(searched: Searched) -> list[str]:
    tune = searched.config.tune.model_dump(mode="json")
    rows = [[f"tune.{key}", str(tune[key])] for key in _SETTINGS if tune[key] is not None]
    rows += [["train.epochs", str(searched.config.train.epochs)], ["folder", searched.path]]
    space = [[key, format_inline(distribution)] for key, distribution in tune["space"].items()]
    space += [["constraint", constraint] for constraint in tune["constraints"]]
    return [
        page.table(rows),
        page.heading("The space"),
        page.table(space),
        page.folded("the whole configuration", searched.config.to_yaml()),
    ]


def _data(searched: Searched) -> list[list[str]]:
    rows = data_places(searched.config)
    if searched.opened is None:
        return [*rows, ["images", "other ones from trial to trial, since settings of the data are searched"]]
    for split, index in zip(("training", "validation"), searched.opened, strict=True):
        if index is not None:
            rows.append([f"{split} images", f"{len(index):,}, with {len(index.category_ids):,} annotated boxes"])
            rows.append([f"fingerprint, {split}", index.fingerprint[:16]])
    return rows


def _next(searched: Searched, files: Mapping[str, str]) -> list[tuple[str, str]]:
    commands = [
        (
            "Train with the best configuration:",
            f"python -m detr_ray.train --config {shlex.quote(join(searched.path, file))}",
        )
        for file in list(files)[:1]
    ]
    resume = f"python -m detr_ray.tune --config ... --resume tune.name={shlex.quote(searched.name)}"
    if searched.ending != "finished" or not all(trial.is_over for trial in searched.trials):
        commands.append(("Go on with the search, with the configuration that it was begun with:", resume))
    if searched.best is not None and searched.confirmation is None:
        commands.append(
            ("See whether the best configuration is better, or only lucky:", f"{resume} --confirm {fewest_seeds()}")
        )
    return commands
