"""What records, pictures, the report and the bar cost a training: the quickstart with all of them, and with none.

    python -m benchmarks reporting

Both train the quickstart's model on its data in this process (`train.launcher=local`), in turns. *Everything* records
in MLflow (a SQLite file), keeps what the best weights found, writes the report and its pictures, and draws the bar in a
terminal that a thread reads. *Nothing* has no records, no report and no terminal. `progress.json` is kept by both.

What is paid once (the program that records starts in the first seconds of the loop, the report is written at the end)
is told apart from what each step costs: a short and a long training differ by LONG - SHORT steps and one validation, as
an epoch of the quickstart has them. A whole quickstart of WHOLE steps is the short training and so many steps more.
"""

from __future__ import annotations

import contextlib
import os
import pty
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Row
from detr_ray.config import Config, load_config

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
SHORT, LONG, WHOLE = 150, 900, 6000
ROUNDS = 2
IMAGES, EPOCHS = 1200, 80
"""Of the training set, and epochs that give WHOLE steps: drawing 12,000 images takes longer than what is measured."""

Seconds = tuple[float, float]
"""In the loop, and after it until the command could end."""


def settings(folder: Path, everything: bool, steps: int, name: str, *more: str) -> Config:
    """What is trained."""
    kind = str(everything).lower()
    return load_config(
        QUICKSTART,
        [
            f"data.root={folder}/data", f"data.generate.num_train={IMAGES}", f"run.storage={folder}/runs",
            f"run.name={name}", "train.launcher=local", "train.num_workers=1", f"train.max_steps={steps}",
            f"train.epochs={EPOCHS}", "eval.every_epochs=10", f"tracking.enabled={kind}",
            f"tracking.report={kind}", f"tracking.uri=sqlite:///{folder}/mlflow.db", *more,
        ],
    )  # fmt: skip


def train(config: Config, on_terminal: bool) -> Seconds:
    """Trains as the command does."""
    from detr_ray.engine.hooks import JobHooks
    from detr_ray.engine.job import TrainJob
    from detr_ray.progress_bar import ProgressBar
    from detr_ray.runtime.launch import fit

    with _output(on_terminal), ProgressBar("step") as bar:

        def hooks(job: TrainJob) -> JobHooks:
            bar.begin(job.total_steps)
            return JobHooks(on_step=bar.update)

        began = time.perf_counter()
        result = fit(config, bar.say, hooks)
        whole = time.perf_counter() - began
    return result.train_s, whole - result.train_s


@contextlib.contextmanager
def _output(on_terminal: bool) -> Iterator[None]:
    """Standard output is a terminal whose other end is read, or goes nowhere."""
    if not on_terminal:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
        return
    leader, follower = pty.openpty()

    def read() -> None:
        with contextlib.suppress(OSError):  # at its end
            while os.read(leader, 65536):
                pass

    reader = threading.Thread(target=read)
    reader.start()
    before = os.environ.get("TERM")
    os.environ["TERM"] = "xterm"
    try:
        with open(follower, "w") as stream, contextlib.redirect_stdout(stream):  # noqa: PTH123 - a descriptor
            yield
    finally:
        reader.join(10)
        os.close(leader)
        os.environ.pop("TERM") if before is None else os.environ.update(TERM=before)


Found = dict[tuple[bool, int], list[Seconds]]
"""By everything or nothing, and steps."""


def measure(folder: Path, lengths: tuple[int, int], rounds: int, *more: str) -> Found:
    """Rounds of both in turns, after a short one of each that does not count."""
    short = lengths[0]
    found: Found = {(everything, steps): [] for everything in (True, False) for steps in lengths}
    for everything in (True, False):
        train(settings(folder, everything, short, f"first-{everything}", *more), on_terminal=everything)
    for number in range(rounds):
        for steps in lengths:
            for everything in (True, False) if number % 2 else (False, True):
                config = settings(folder, everything, steps, f"{number}-{everything}-{steps}", *more)
                found[everything, steps].append(train(config, on_terminal=everything))
    return found


def run() -> list[Row]:
    """The steps, what is paid once, and both as a whole quickstart has them."""
    with tempfile.TemporaryDirectory(prefix="reporting-") as scratch:
        found = measure(Path(scratch), (SHORT, LONG), ROUNDS)
    loop, after = (
        {key: statistics.median(seconds[part] for seconds in found[key]) for key in found} for part in (0, 1)
    )
    spread = max(statistics.median(abs(seconds[0] - loop[key]) for seconds in found[key]) / loop[key] for key in found)
    steps = {kind: loop[kind, LONG] - loop[kind, SHORT] for kind in (True, False)}
    whole = {
        kind: loop[kind, SHORT] + steps[kind] * (WHOLE - SHORT) / (LONG - SHORT) + after[kind, LONG] for kind in steps
    }
    return [
        _row(
            f"everything / nothing, first {SHORT} steps and a validation", loop[True, SHORT], loop[False, SHORT], spread
        ),
        _row(f"everything / nothing, {LONG - SHORT} steps and a validation more", steps[True], steps[False], spread),
        _row("everything / nothing, before and after the loop", after[True, LONG], after[False, LONG], None),
        _row(f"everything / nothing, {WHOLE:,} steps, all of it", whole[True], whole[False], spread),
    ]


def _row(name: str, everything: float, nothing: float, spread: float | None) -> Row:
    cost = f"costs {everything - nothing:.2f} s, {everything / nothing - 1:+.2%}"
    return Row(name, everything, nothing, "s", "lower", cost, spread)
