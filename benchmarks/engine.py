"""What Ray costs: steps a second of a Ray job against the loop fed from memory, and the time to the first step.

    python -m benchmarks engine

Steady state, one worker: the Ray job (its data tasks beside it), the loop without Ray (``train.launcher=local``, data
loaded by a thread) and, as the baseline, the loop with batches that lie in memory. Each is what a user runs, `fit` or
`TrainingLoop`, in processes of its own and in turns; the rate is that of the logging intervals after the first ones.
Ray's workers run at a low priority otherwise; here at that of the other side. Two workloads:

- the quickstart's, small images and short steps, torch on all cores. On two cores data tasks then take from the steps
  what they need, so the figure holds their work too, and not only the engine's.
- ResNet-50 on small images with one torch thread on all sides (``OMP_NUM_THREADS=1``), so that on two cores there is
  one for the data: what is lost here is the engine's.

Start-up: from the command to the first optimizer step of the quickstart (two workers, fewer images), against
``train.launcher=local``. Its parts are told apart by the lines that the command prints.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Row, Timing, in_fresh_process
from detr_ray.config import load_config

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
IMAGES = 3200
STARTS = 2
SETTLING = 3
"""Logging intervals before those that count: memory is mapped, kernels are made for new shapes."""
PREMADE = 24
"""Steps whose batches lie in memory."""

SMALL_R50 = (
    "data.augment={scales: [160], max_size: 224, crop: 0}",
    "model={backbone: resnet50, backbone_norm: batch, backbone_weights: none, dropout: 0}",
    "optim={lr: 1e-4, lr_backbone: 1e-5}",
    "train.global_batch_size=4",
)
WORKLOADS = {"quickstart": ((), 30, 5, 0, 1), "R50 4x160x213, 1 torch thread": (SMALL_R50, 4, 8, 1, 1)}
"""Overrides of the quickstart, steps of a logging interval, intervals that count, torch threads (0: all cores),
rounds."""


def overrides(workload: str, scratch: str, name: str) -> list[str]:
    """What a run of a workload changes in the quickstart."""
    settings, steps, intervals, *_ = WORKLOADS[workload]
    return [
        *settings, *common(scratch), f"run.name={name}", "train.num_workers=1",
        f"train.log_every_steps={steps}", f"train.max_steps={(intervals + SETTLING) * steps}",
    ]  # fmt: skip


def common(scratch: str) -> list[str]:
    """Where everything is kept, and fewer images than the quickstart has."""
    return [
        f"data.root={scratch}/data", f"data.generate.num_train={IMAGES}", "data.generate.num_val=25",
        f"run.storage={scratch}/runs", "tracking.enabled=false",
    ]  # fmt: skip


def rates(lines: list[str]) -> list[float]:
    """Images/s of the logging intervals that count; the first line is that of the first step."""
    found = [re.search(r" step .* ([\d.]+) images/s", line) for line in lines]
    return [float(match[1]) for match in found if match][1 + SETTLING :]


def with_ray(workload: str, scratch: str, name: str) -> list[float]:
    """The Ray job."""
    from detr_ray.runtime.launch import fit

    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's name; what else runs here shall cost both the same
    lines: list[str] = []
    fit(load_config(QUICKSTART, overrides(workload, scratch, name)), lines.append)
    return rates(lines)


def without_ray(workload: str, scratch: str, name: str) -> dict[str, list[float]]:
    """The loop in this process, loading its data and fed from memory."""
    import torch

    from detr_ray.engine.context import LocalContext
    from detr_ray.engine.job import prepare_job
    from detr_ray.engine.loop import TrainingLoop
    from detr_ray.engine.stream.batches import LocalBatches
    from detr_ray.structures import PaddedBatch
    from detr_ray.tracking import NullTracker

    if not WORKLOADS[workload][3]:
        torch.set_num_threads(os.cpu_count() or 1)

    class Premade(LocalBatches):
        """The first batches of the plan, over and over."""

        def train_batches(self, first_step: int, last_step: int) -> Iterator[list[PaddedBatch]]:
            ready = list(super().train_batches(0, PREMADE))
            return (ready[step % PREMADE] for step in range(first_step, last_step))

    found = {}
    for kind in (LocalBatches, Premade):
        lines: list[str] = []
        job = prepare_job(
            load_config(QUICKSTART, overrides(workload, scratch, f"{name}-{kind.__name__}")), lines.append
        )
        source = kind(job.data.plan(1, 0), *job.data.loaders())
        TrainingLoop(job, LocalContext(say=lines.append), source, NullTracker()).run()
        found["memory" if kind is Premade else "local"] = rates(lines)
    return found


def steady_state(scratch: str) -> list[Row]:
    """Images/s of each, in turns."""
    rows = []
    for workload, (_, _, _, threads, rounds) in WORKLOADS.items():
        found: dict[str, list[float]] = {"ray": [], "local": [], "memory": []}
        before = os.environ.get("OMP_NUM_THREADS")
        if threads:
            os.environ["OMP_NUM_THREADS"] = str(threads)
        for number in range(rounds):
            name = f"{workload.split()[0]}-{number}".lower()
            found["ray"] += in_fresh_process(with_ray, workload, scratch, f"{name}-ray")["result"]
            for kind, values in in_fresh_process(without_ray, workload, scratch, name)["result"].items():
                found[kind] += values
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = before
        memory = Timing(tuple(found["memory"]))
        for kind, what in (("ray", "Ray job"), ("local", "without Ray")):
            side = Timing(tuple(found[kind]))
            slower = 1 - side.median / memory.median
            rows.append(
                Row(
                    f"{workload}, {what} / from memory", side.median, memory.median, "images/s",
                    note=f"{slower:.1%} slower" if slower > 0 else "", spread=max(side.spread, memory.spread),
                )
            )  # fmt: skip
    return rows


MARKS = ("starting ", "at work:", "step 1/")


def start(scratch: str, launcher: str, name: str) -> dict[str, float]:
    """Seconds from the command to each of the lines that mark a part, and CPU seconds until the first step."""
    import psutil

    command = [sys.executable, "-m", "detr_ray.train", "--config", str(QUICKSTART), *common(scratch)]
    options = [f"run.name={name}", f"train.launcher={launcher}", "train.max_steps=1", "tracking.enabled=true"]
    options += ["train.num_workers=1"] if launcher == "local" else []
    seen: dict[str, float] = {}
    started = time.perf_counter()
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            for mark in ("run ", *MARKS):
                if mark in line and mark not in seen:
                    seen[mark] = time.perf_counter() - started
            if "step 1/" in line:
                this = psutil.Process(process.pid)
                times = [each.cpu_times() for each in (this, *this.children(recursive=True))]
                seen["cpu"] = sum(each.user + each.system for each in times)
    if process.returncode:
        raise RuntimeError(f"the command failed with {process.returncode}")
    return seen


def start_up(scratch: str) -> list[Row]:
    """Seconds to the first step, and its parts."""
    found: dict[str, list[dict[str, float]]] = {"ray": [], "local": []}
    for number in range(STARTS):
        for launcher, times in found.items():
            times.append(start(scratch, launcher, f"start-{launcher}-{number}"))

    def seconds(launcher: str, after: str, until: str) -> float:
        return statistics.median(one[until] - one.get(after, 0.0) for one in found[launcher])

    def row(name: str, part: tuple[str, str], local: tuple[str, str] | None, note: str = "") -> Row:
        baseline = None if local is None else seconds("local", *local)
        return Row(name, seconds("ray", *part), baseline, "s", "lower", note)

    first, beginning, at_work = "step 1/", "starting ", "at work:"
    return [
        row("command to first step", ("", first), ("", first), "quickstart, 2 workers; baseline: train.launcher=local"),
        row("  imports, data; Ray beside them", ("", beginning), ("", "run ")),
        row("  controller, workers and their imports", (beginning, at_work), None),
        row("  model, first batch, first step", (at_work, first), ("run ", first)),
        row("  CPU seconds of all processes", ("", "cpu"), ("", "cpu"), f"{os.cpu_count()} cores"),
    ]  # fmt: skip


def run() -> list[Row]:
    """The table."""
    from detr_ray.engine.opened_data import generate_data

    with tempfile.TemporaryDirectory(prefix="engine-") as scratch:
        generate_data(load_config(QUICKSTART, common(scratch)).data, lambda line: None)
        return start_up(scratch) + steady_state(scratch)
