"""Processes killed, stopped and hung for real on one machine. Each run ends with the weights of an undisturbed one."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from recorded import assert_same_stream, assert_same_weights, jumps
from tiny import make_dataset, tiny_config

from detr_ray.engine.checkpoint import CheckpointStore

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, BATCH = 100, 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes")


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


def train(
    path: Path, disturb: Callable[[subprocess.Popen[str]], object] | None = None, at: str = "step 20/"
) -> tuple[int, str]:
    """Runs the command to its end, disturbed when its output holds some text; its exit code and output."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "detr_ray.train", "--config", str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if disturb is not None and at in line:
            disturb(process)
            disturb = None
    code = process.wait(timeout=60)
    text = "".join(lines)
    print(f"\n{text}exit code {code}")
    assert disturb is None, "what was to be disturbed ended before"
    return code, text


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    code, text = train(config_file(dataset, folder, "undisturbed"))
    assert code == 0 and f"finished {STEPS} steps" in text
    return folder / "undisturbed"


def assert_as_if_nothing_had_happened(run: Path, undisturbed: Path) -> None:
    assert_same_stream(run, undisturbed, STEPS, BATCH)
    assert_same_weights(run, undisturbed, STEPS)


def processes(driver: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    """Processes below a driver that Ray has named after what they do, the newest last."""
    children = psutil.Process(driver.pid).children(recursive=True)
    return sorted((p for p in children if name in " ".join(p.cmdline()[:1])), key=lambda p: p.pid)


def test_a_killed_driver_is_started_again(dataset: Path, undisturbed: Path, tmp_path: Path) -> None:
    path = config_file(dataset, tmp_path, "killed")
    code, first = train(path, lambda process: os.kill(process.pid, signal.SIGKILL))
    assert code == -signal.SIGKILL and "finished" not in first
    code, second = train(path)
    assert code == 0 and "going on from step" in second and f"finished {STEPS} steps" in second
    assert_as_if_nothing_had_happened(tmp_path / "killed", undisturbed)
    assert "nothing left to do" in train(path)[1]


def test_a_killed_training_worker_is_replaced(dataset: Path, undisturbed: Path, tmp_path: Path) -> None:
    path = config_file(dataset, tmp_path, "worker")
    code, text = train(path, lambda process: processes(process, "RayTrainWorker")[-1].kill())
    assert code == 0 and "its process died" in text and "restart 1 of at most 3" in text
    assert len(jumps(tmp_path / "worker")) == 1
    assert_as_if_nothing_had_happened(tmp_path / "worker", undisturbed)


def test_killed_data_tasks_are_done_again(dataset: Path, undisturbed: Path, tmp_path: Path) -> None:
    killed: list[str] = []

    def kill_data_tasks(process: subprocess.Popen[str]) -> None:
        """Kills the first processes that are seen making batches; a task takes a fraction of a second."""
        deadline = time.monotonic() + 90
        while len(killed) < 2 and time.monotonic() < deadline:
            candidates = [Path(f"/proc/{task.pid}/cmdline") for task in processes(process, "ray::")]
            looked_until = time.monotonic() + 1
            while len(killed) < 2 and time.monotonic() < looked_until:
                for cmdline in candidates:
                    with contextlib.suppress(OSError):
                        title = cmdline.read_bytes()
                        if b"PlannedBatches" in title:
                            os.kill(int(cmdline.parent.name), signal.SIGKILL)
                            killed.append(title.rstrip(b"\0").decode())

    path = config_file(dataset, tmp_path, "task")
    code, text = train(path, kill_data_tasks, at="starting 2 CPU workers")
    print("killed:", killed)
    assert killed, "no data task was seen at work"
    assert code == 0 and f"finished {STEPS} steps" in text and "restart" not in text
    assert jumps(tmp_path / "task") == []
    assert_as_if_nothing_had_happened(tmp_path / "task", undisturbed)


def test_a_worker_that_hangs_is_named_and_replaced(dataset: Path, undisturbed: Path, tmp_path: Path) -> None:
    path = config_file(dataset, tmp_path, "hangs", "train.stall_timeout_s=15")

    def freeze(process: subprocess.Popen[str]) -> None:
        processes(process, "RayTrainWorker")[-1].send_signal(signal.SIGSTOP)

    code, text = train(path, freeze)
    assert re.search(r"rank \d hangs: nothing heard of it for \d+ s, last .* at step \d+; the others: .* at step", text)
    assert code == 0 and f"finished {STEPS} steps" in text
    assert_as_if_nothing_had_happened(tmp_path / "hangs", undisturbed)


def test_an_error_of_one_worker_keeps_no_other_waiting(dataset: Path, tmp_path: Path) -> None:
    path = config_file(dataset, tmp_path, "alone", "train.max_failures=1", "train.stall_timeout_s=600")
    stream = tmp_path / "alone" / "stream"
    (stream / "rank-00001.jsonl").mkdir(parents=True)  # what rank 1 wants to write into is a folder
    started = time.monotonic()
    code, text = train(path)
    assert code == 1 and "rank 1: IsADirectoryError" in text and "max_failures" in text
    assert time.monotonic() - started < 300


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_it_leaves_a_checkpoint(dataset: Path, undisturbed: Path, tmp_path: Path, number: int) -> None:
    path = config_file(dataset, tmp_path, "stopped")
    code, text = train(path, lambda process: os.kill(process.pid, number))
    stopped = re.search(r"stopped after step (\d+); the same command with run.name=stopped goes on from there", text)
    assert code == 130 and stopped
    latest = CheckpointStore(str(tmp_path / "stopped" / "checkpoints")).latest()
    assert latest is not None and latest.step == int(stopped.group(1))
    code, text = train(path)
    assert code == 0 and f"going on from step {latest.step} " in text
    assert jumps(tmp_path / "stopped") == []
    assert_as_if_nothing_had_happened(tmp_path / "stopped", undisturbed)


def test_ctrl_c_twice_ends_at_once(dataset: Path, tmp_path: Path) -> None:
    path = config_file(dataset, tmp_path, "interrupted")

    def interrupt(process: subprocess.Popen[str]) -> None:
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGINT)

    code, text = train(path, interrupt)
    assert code == 130 and "goes on from the last checkpoint" in text
