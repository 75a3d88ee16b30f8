"""What records, pictures, the report and the bar cost a training: the quickstart with all of them, and with none.

    python -m benchmarks reporting

Both train the quickstart's model on its data in this process (`train.launcher=local`), in pairs of changing order.
*Everything* records in MLflow (a SQLite file), keeps what the best weights found, writes the report and its pictures,
and draws the bar in a terminal that a thread reads. *Nothing* has no records, no report and no terminal.
`progress.json` is kept by both.

Measured are the wall time and the CPU time, of this process and of its children, of which the scorer of validations is
one. All of them share one core, and torch takes one thread: so whatever one of them does is paid in both times, and
what else the machine does falls mostly on the wall time. The bar is drawn once a second, which costs a training more
CPU time a step where other programs slow it down. Each pair gives a ratio; reported are the median of the ratios, and
the lowest and the highest.

What each step costs is told apart from what is paid once (a thread imports MLflow in the first steps, the report is
written at the end): a training is measured from step FIRST to step LAST, with one validation between them,
and the rest of it by itself. A whole quickstart of WHOLE steps is the rest and so many steps more. It has fewer
validations a step than what is measured, so that it costs rather less than is said here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pty
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import torch

from benchmarks.harness import Row
from detr_ray.config import Config, load_config

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
FIRST, LAST, STEPS, WHOLE = 100, 290, 300, 6000
PAIRS = 3
EPOCH, EPOCHS = 150, 40
"""Steps of an epoch, which ends with a validation, and epochs that give WHOLE steps. Drawing the quickstart's 12,000
images takes longer than what is measured."""


@dataclasses.dataclass(frozen=True)
class Spent:
    """Seconds.

    Attributes:
        wall: by the clock.
        cpu: of this process and its children, user and system.
    """

    wall: float
    cpu: float

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.wall - other.wall, self.cpu - other.cpu)


@dataclasses.dataclass(frozen=True)
class Training:
    """What a training took.

    Attributes:
        steps: from step FIRST to step LAST.
        rest: before and after them.
    """

    steps: Spent
    rest: Spent

    def whole(self) -> Spent:
        """What it would take with WHOLE steps."""
        more = (WHOLE - STEPS + LAST - FIRST) / (LAST - FIRST)
        return Spent(self.rest.wall + more * self.steps.wall, self.rest.cpu + more * self.steps.cpu)


def so_far() -> Spent:
    """What was spent up to now, also by children that still run."""
    own = os.times()
    cpu = own.user + own.system + own.children_user + own.children_system
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            cpu += times.user + times.system + times.children_user + times.children_system
    return Spent(time.perf_counter(), cpu)


def settings(folder: Path, everything: bool, name: str, *more: str) -> Config:
    """What is trained."""
    kind = str(everything).lower()
    return load_config(
        QUICKSTART,
        [
            f"data.root={folder}/data", f"data.generate.num_train={16 * EPOCH}", f"run.storage={folder}/runs",
            f"run.name={name}", "train.launcher=local", "train.num_workers=1", f"train.max_steps={STEPS}",
            f"train.epochs={EPOCHS}", f"tracking.enabled={kind}", f"tracking.report={kind}",
            f"tracking.uri=sqlite:///{folder}/mlflow.db", *more,
        ],
    )  # fmt: skip


def train(config: Config, on_terminal: bool) -> Training:
    """Trains as the command does."""
    from detr_ray.engine.hooks import JobHooks
    from detr_ray.engine.job import TrainJob
    from detr_ray.progress_bar import ProgressBar
    from detr_ray.runtime.launch import fit

    marks: dict[int, Spent] = {}
    with _output(on_terminal), ProgressBar("step") as bar:

        def note(step: int) -> None:
            bar.update(step)
            if step in (FIRST, LAST) and step not in marks:
                marks[step] = so_far()

        def hooks(job: TrainJob) -> JobHooks:
            bar.begin(job.total_steps)
            return JobHooks(on_step=note)

        began = so_far()
        fit(config, bar.say, hooks)
        whole = so_far() - began
    steps = marks[LAST] - marks[FIRST]
    return Training(steps, whole - steps)


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


Pair = tuple[Training, Training]
"""With everything, and with nothing."""


def measure(folder: Path, pairs: int, *more: str) -> list[Pair]:
    """Pairs in changing order, after a training of each kind that does not count."""
    for everything in (True, False):
        train(settings(folder, everything, f"first-{everything}", *more), on_terminal=everything)
    found = []
    for number in range(pairs):
        order = (True, False) if number % 2 else (False, True)
        of = {
            everything: train(settings(folder, everything, f"{number}-{everything}", *more), on_terminal=everything)
            for everything in order
        }
        found.append((of[True], of[False]))
    return found


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """This process, and what it starts, on one of its cores; torch with one thread."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    _stay_on({max(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _stay_on(cores)
        torch.set_num_threads(threads)


def _stay_on(cores: set[int]) -> None:
    """Keeps all threads of this process, and those that they start, on some cores."""
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread.name), cores)


def run() -> list[Row]:
    """The steps, what is paid once, and both as a whole quickstart has them."""
    with tempfile.TemporaryDirectory(prefix="reporting-") as scratch, on_one_core():
        pairs = measure(Path(scratch), PAIRS)
    parts: dict[str, Callable[[Training], Spent]] = {
        f"{LAST - FIRST} steps and a validation": lambda training: training.steps,
        "what is paid once": lambda training: training.rest,
        f"{WHOLE:,} steps, all of it": Training.whole,
    }
    return [
        _row(f"everything / nothing, {part}, {time_} time", [
            (getattr(spent(with_), time_), getattr(spent(without), time_)) for with_, without in pairs
        ])
        for part, spent in parts.items()
        for time_ in ("cpu", "wall")
    ]  # fmt: skip


def _row(name: str, pairs: Sequence[tuple[float, float]]) -> Row:
    """Medians, and the ratios of pairs."""
    everything, nothing = (statistics.median(pair[place] for pair in pairs) for place in (0, 1))
    ratios = sorted(one / other - 1 for one, other in pairs)
    middle = statistics.median(ratios)
    note = f"costs {middle:+.1%} ({ratios[0]:+.1%} to {ratios[-1]:+.1%} in {len(pairs)} pairs)"
    spread = statistics.median(abs(ratio - middle) for ratio in ratios)
    return Row(name, everything, nothing, "s", "lower", note, spread)
