"""The log on disk: what was appended is read again, whatever happened to the writer or the disk."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from detr_ray.tracking.event_log import LOG_NAME, EventLog, read_events
from detr_ray.tracking.mlflow_run import RunSettings
from detr_ray.tracking.sent_state import SentState

WRITES_UNTIL_KILLED = """
import sys
from detr_ray.tracking.event_log import EventLog
log = EventLog(sys.argv[1])
for step in range(10**9):
    log.append("metrics", step=step, metrics={"loss": 0.5})
    if step == 200:
        print("ready", flush=True)
"""

DISK_FULL = """
import logging, resource, sys
from detr_ray.tracking.event_log import EventLog
logging.basicConfig(format="%(message)s")
log = EventLog(sys.argv[1])
log.append("metrics", step=0, metrics={})
size = log.path.stat().st_size
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))  # a part of the next line fits
for step in range(1, 6):
    log.append("metrics", step=step, metrics={})
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
log.append("metrics", step=6, metrics={})
log.close()
"""


def steps(path: Path, offset: int = 0) -> list[int]:
    return [line.event["step"] for line in read_events(path, offset) if line.event]


def test_events_are_read_in_order_and_from_any_line_on(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "new" / "folder")
    for step in range(5):
        log.append("metrics", step=step, metrics={"a": step})
    lines = list(read_events(log.path))
    assert [line.event["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[0].event["kind"] == "metrics"
    assert lines[0].event["t"] > 1_600_000_000_000
    assert steps(log.path, lines[2].end) == [3, 4]
    assert lines[-1].end == log.path.stat().st_size
    log.close()
    log.close()


def test_no_log_has_no_events(tmp_path: Path) -> None:
    assert list(read_events(tmp_path / LOG_NAME)) == []


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append("metrics", step=0)
    log.close()
    with log.path.open("ab") as file:
        file.write(b'{"t":1,"kind":"metr')
    assert steps(log.path) == [0], "a line that is being written is not read yet"
    again = EventLog(tmp_path)
    again.append("metrics", step=1)
    assert steps(log.path) == [0, 1]
    assert [line.event is None for line in read_events(log.path)] == [False, True, False]


def test_lines_of_several_writers_stay_whole(tmp_path: Path) -> None:
    logs = [EventLog(tmp_path) for _ in range(2)]
    threads = [
        threading.Thread(target=lambda log=log: [log.append("metrics", step=i, text="x" * 500) for i in range(300)])
        for log in logs * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(steps(logs[0].path)) == sorted(list(range(300)) * 4)


@pytest.mark.timeout(60)
def test_a_killed_writer_loses_nothing_that_it_appended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITES_UNTIL_KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout.readline() == b"ready\n"
        finally:
            writer.kill()
    assert writer.returncode == -signal.SIGKILL
    survived = steps(tmp_path / LOG_NAME)
    assert len(survived) > 200
    assert survived == list(range(len(survived)))


@pytest.mark.timeout(60)
def test_a_full_disk_delays_events_and_says_so_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DISK_FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    assert steps(tmp_path / LOG_NAME) == list(range(7))
    told = done.stderr.splitlines()
    assert len(told) == 2, done.stderr
    assert "cannot be written" in told[0]
    assert "can be written again (0 events were dropped)" in told[1]


def test_what_can_never_be_written_is_reported_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / LOG_NAME).symlink_to("/dev/full")
    log = EventLog(tmp_path)
    for step in range(3):
        log.append("metrics", step=step)
    with caplog.at_level(logging.WARNING):
        log.close()
    assert "3 tracking events could not be written" in caplog.text


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are named by the system on Linux only")
def test_what_matters_is_synced_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name.split(".")[0])
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    folder = tmp_path / "tracking"
    log = EventLog(folder)
    assert synced == ["tracking"], "the log's name"
    log.append("metrics", step=1)
    assert synced == ["tracking"], "steps wait for no disk"
    log.sync()
    log.append("metrics", step=2)
    log.close()
    assert synced == ["tracking", "events", "events"]
    log.sync()

    synced.clear()
    SentState("here").save(folder)
    assert synced == ["sent", "tracking"], "the content before its name"
    RunSettings("sqlite:///x", "e", "r", "u").save(folder)
    assert synced == ["sent", "tracking", "run", "tracking"]
