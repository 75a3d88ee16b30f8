"""Jobs that are stopped, interrupted, or whose workers fail, for real on one machine; see also ``test_kill_table``."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from disturbing import assert_as_if_nothing_had_happened, config_file, train
from recorded import jumps

from detr_ray.engine.checkpoints.store import CheckpointStore

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def test_an_error_of_one_worker_keeps_no_other_waiting(dataset: Path, tmp_path: Path) -> None:
    path = config_file(dataset, tmp_path, "alone", "train.max_failures=1", "train.stall_timeout_s=600")
    stream = tmp_path / "alone" / "stream"
    (stream / "rank-00001.jsonl").mkdir(parents=True)  # what rank 1 wants to write into is a folder
    started = time.monotonic()
    code, text = train(path)
    assert code == 1 and "rank 1: IsADirectoryError" in text and "max_failures" in text
    assert time.monotonic() - started < 300


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_it_leaves_a_checkpoint(dataset: Path, undisturbed_run: Path, tmp_path: Path, number: int) -> None:
    path = config_file(dataset, tmp_path, "stopped")
    code, text = train(path, lambda process: os.kill(process.pid, number))
    stopped = re.search(r"stopped after step (\d+); the same command with run.name=stopped goes on from there", text)
    assert code == 130 and stopped
    latest = CheckpointStore(str(tmp_path / "stopped" / "checkpoints")).latest()
    assert latest is not None and latest.step == int(stopped.group(1))
    code, text = train(path)
    assert code == 0 and f"going on from step {latest.step} " in text
    assert jumps(tmp_path / "stopped") == []
    assert_as_if_nothing_had_happened(tmp_path / "stopped", undisturbed_run)


def test_ctrl_c_twice_ends_at_once(dataset: Path, tmp_path: Path) -> None:
    path = config_file(dataset, tmp_path, "interrupted")

    def interrupt(process: subprocess.Popen[str]) -> None:
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGINT)

    code, text = train(path, interrupt)
    assert code == 130 and "goes on from the last checkpoint" in text
