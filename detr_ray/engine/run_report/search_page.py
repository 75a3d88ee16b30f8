"""The report of a search: its trials, the importance of its parameters, and the best configuration."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from matplotlib.figure import Figure

from detr_ray.engine.run_report import page

_CAPTIONS = {
    "parallel_coordinates.png": "The values of each trial and what came of them",
    "history.png": "The metric of each trial over its epochs, and the best so far",
}


def search_report(
    name: str, trials_table: str, importance: str, files: Mapping[str, str], pictures: Mapping[str, Figure]
) -> str:
    """The report of a search as one HTML page.

    Args:
        name: of the search.
        trials_table: all trials, as text.
        importance: how much each parameter mattered, as text.
        files: name -> content of the files that lie beside the page, the best configuration first.
        pictures: file name -> figure.
    """
    drawn = [page.picture(figure, _CAPTIONS.get(file, file)) for file, figure in pictures.items()]
    commands = [
        (f"Train with {file}, which lies beside this page:", f"python -m detr_ray.train --config {file}")
        for file in list(files)[:1]
    ]
    commands.append(
        (
            "Go on with the search, if it was interrupted:",
            f"python -m detr_ray.tune --config ... --resume tune.name={shlex.quote(name)}",
        )
    )
    sections = [
        page.Section("trials", "Trials", [page.text_block(trials_table)]),
        page.Section("pictures", "Pictures", drawn),
        page.Section("importance", "What mattered", [page.text_block(importance)]),
        page.Section("files", "What it leaves", [page.folded(file, text) for file, text in files.items()]),
        page.Section("next", "How to go on", [page.commands(commands)]),
    ]
    return page.render(f"Search {name}", [], sections)
