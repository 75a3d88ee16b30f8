"""What records, pictures, the report and the bar cost a training: the quickstart with all of them, and with none.

    python -m benchmarks reporting

Both train the quickstart's model on its data in this process (`train.launcher=local`), in turns: STEPS steps, with the
validation at their end. *Everything* records in MLflow (a SQLite file), keeps what the best weights found, writes the
report and its pictures, and draws the bar in a terminal that a thread reads. *Nothing* has no records, no report and no
terminal. `progress.json` is kept by both. The time of the loop and that of the rest are told apart, since a whole
quickstart has the first WHOLE / STEPS times, and the second once.
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
STEPS, WHOLE = 150, 6000
ROUNDS = 4
IMAGES, EPOCHS = 1200, 80
"""Of the training set, and epochs that give WHOLE steps: drawing 12,000 images takes longer than what is measured."""

Seconds = tuple[float, float]
"""In the loop, and after it until the command could end."""


def settings(folder: Path, everything: bool, name: str, *more: str) -> Config:
    """What is trained."""
    kind = str(everything).lower()
    return load_config(
        QUICKSTART,
        [
            f"data.root={folder}/data", f"data.generate.num_train={IMAGES}", f"run.storage={folder}/runs",
            f"run.name={name}", "train.launcher=local", "train.num_workers=1", f"train.max_steps={STEPS}",
            f"train.epochs={EPOCHS}", f"eval.every_epochs={EPOCHS}", f"tracking.enabled={kind}",
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


def measure(folder: Path, rounds: int, *more: str) -> dict[bool, list[Seconds]]:
    """Rounds of both in turns, after one of each that does not count."""
    found: dict[bool, list[Seconds]] = {True: [], False: []}
    for number in range(-1, rounds):
        for everything in (True, False) if number % 2 else (False, True):
            config = settings(folder, everything, f"{'everything' if everything else 'nothing'}-{number + 1}", *more)
            seconds = train(config, on_terminal=everything)
            if number >= 0:
                found[everything].append(seconds)
    return found


def run() -> list[Row]:
    """The loop, what comes after it, and both as a whole quickstart has them."""
    with tempfile.TemporaryDirectory(prefix="reporting-") as scratch:
        found = measure(Path(scratch), ROUNDS)
    loop, after = (
        {kind: statistics.median(seconds[part] for seconds in found[kind]) for kind in found} for part in (0, 1)
    )
    spread = max(
        statistics.median(abs(seconds[0] - loop[kind]) for seconds in found[kind]) / loop[kind] for kind in found
    )
    whole = {kind: loop[kind] * WHOLE / STEPS + after[kind] for kind in found}
    cost = f"costs {whole[True] / whole[False] - 1:+.2%}"
    return [
        Row(f"everything / nothing, {STEPS} steps and a validation", loop[True], loop[False], "s", "lower",
            f"costs {loop[True] / loop[False] - 1:+.2%}", spread),
        Row("everything / nothing, before and after the loop", after[True], after[False], "s", "lower"),
        Row(f"everything / nothing, {WHOLE:,} steps", whole[True], whole[False], "s", "lower", cost, spread),
    ]  # fmt: skip
