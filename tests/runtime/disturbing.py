"""Training by the command in a process of its own, disturbed at some moment, and what has to be true afterwards."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from recorded import assert_same_stream, assert_same_weights
from tiny import tiny_config

STEPS, BATCH = 100, 8

Disturb = Callable[[subprocess.Popen[str]], object]


def config_file(dataset: Path, folder: Path, name: str, *settings: str) -> Path:
    """Two workers, a checkpoint every tenth step, five steps an epoch, dropout on."""
    config = tiny_config(
        dataset, folder, f"run.name={name}", "train.launcher=ray", "train.num_workers=2",
        f"train.epochs={STEPS // 5}", "train.checkpoint_every_steps=10", "eval.every_epochs=0", "model.dropout=0.1",
        *settings,
    )  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(config.to_yaml())
    return path


def train(path: Path, disturb: Disturb | None = None, at: str = "step 20/") -> tuple[int, str]:
    """Runs the command to its end, disturbed when its output holds some text; its exit code and output."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "detr_ray.train", "--config", str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if disturb is not None and at in line:
                disturb(process)
                disturb = None
        code = process.wait(timeout=60)
    finally:
        text = "".join(lines)
        print(f"\n{text}exit code {process.poll()}")
        if process.poll() is None:  # the test has failed: nothing of it is left behind
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
    assert disturb is None, "what was to be disturbed ended before"
    return code, text


def processes(driver: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    """Processes below a driver that Ray has named after what they do, the newest last."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
            if name in " ".join(process.cmdline()[:1]):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def at_work(driver: subprocess.Popen[str], name: bytes, within_s: float = 90) -> Iterator[psutil.Process]:
    """Processes below a driver as they are seen doing something; a data task takes a fraction of a second."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        candidates = [Path(f"/proc/{process.pid}/cmdline") for process in processes(driver, "ray::")]
        looked_until = time.monotonic() + 1
        while time.monotonic() < looked_until:
            for cmdline in candidates:
                with contextlib.suppress(OSError, psutil.NoSuchProcess):
                    if name in cmdline.read_bytes():
                        yield psutil.Process(int(cmdline.parent.name))


def continued_after(seconds: float) -> Disturb:
    """Stops the driver for a while."""

    def disturb(driver: subprocess.Popen[str]) -> None:
        os.kill(driver.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(driver.pid, signal.SIGCONT)

    return disturb


def restarts(text: str) -> int:
    """How often the workers were started again, as it was said."""
    return max(map(int, re.findall(r"\(restart (\d+) of at most \d+\)", text)), default=0)


def assert_as_if_nothing_had_happened(run: Path, undisturbed: Path) -> None:
    """A run used the samples of an undisturbed one at each step, and has its weights."""
    assert_same_stream(run, undisturbed, STEPS, BATCH)
    assert_same_weights(run, undisturbed, STEPS)
