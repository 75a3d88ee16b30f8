"""Who writes a run in a bucket, where there are no locks: one at a time, and never nobody for long."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import yaml
from s3_server import S3Server
from starts import start_at_once

from detr_ray import train
from detr_ray.config import ConfigError
from detr_ray.engine.checkpoints import run_lock
from detr_ray.engine.checkpoints.run_directory import RunDirectory, open_run
from detr_ray.retries import AccessDenied


@pytest.fixture
def storage(s3: S3Server) -> str:
    return f"s3://{s3.new_bucket()}/runs"


def begin(storage: str) -> RunDirectory:
    return open_run("mine", storage, {"optim.lr": 1.0}, {"train": "abc"}, "optim: {lr: 1}")


def test_of_many_starts_of_one_new_run_one_goes_on(storage, s3: S3Server):
    held, refused = start_at_once(storage, "mine", 4)
    assert len(held) == 1
    run_id, holder = held[0]
    for line in refused:
        assert f"is being written by process {holder} on" in line and "\n" not in line
    place = storage.removeprefix("s3://")
    assert json.loads(s3.get(f"{place}/mine/run.json"))["run_id"] == run_id
    again = begin(storage)
    assert (again.is_new, again.run_id) == (False, run_id)
    with again.locked():
        assert claims(s3, storage), "held while it is written"
    assert not claims(s3, storage), "and nothing is left of it"


def test_a_command_takes_the_configuration_that_lies_in_the_bucket(storage, capsys: pytest.CaptureFixture[str]):
    """As the report of a run in a bucket prints it, to go on with the run."""
    begin(storage)
    assert train.main(["--config", f"{storage}/mine/config.yaml", "--print-config", "optim.weight_decay=0.5"]) == 0
    optim = yaml.safe_load(capsys.readouterr().out)["optim"]
    assert (optim["lr"], optim["weight_decay"]) == (1.0, 0.5)
    absent = f"{storage}/absent.yaml"
    for address, said in ((absent, f"{absent}: there is no such file"), ("s3://KEY:hidden@a/b.yaml", "credentials")):
        assert train.main(["--config", address, "--print-config"]) == 2
        err = capsys.readouterr().err
        assert said in err and "hidden" not in err and err.count("error:") == 1


def claims(s3: S3Server, storage: str) -> list[str]:
    place = f"{storage.removeprefix('s3://')}/mine/claims/"
    return [key for key in s3.keys(place.partition("/")[0]) if key.startswith(place) and key.endswith(".json")]


HOLD = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN if "ignoring" in sys.argv else signal.default_int_handler)
from detr_ray.engine.checkpoints import run_lock
from detr_ray.engine.checkpoints.run_directory import open_run
run_lock.BEAT_S = 0.2
with open_run("mine", sys.argv[1], {"optim.lr": 1.0}, {"train": "abc"}, "").locked():
    print("held", flush=True)
    try:
        sys.stdin.read()
    except KeyboardInterrupt:
        print("told to stop", flush=True)
"""


@pytest.fixture
def hold(storage: str, s3: S3Server) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(*more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, storage, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **s3.environment},
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(timeout=30)


def test_a_run_is_held_while_its_process_lives_and_no_longer(storage, hold):
    process = hold()
    run = begin(storage)
    with pytest.raises(ConfigError, match=f"is being written by process {process.pid} on"), run.locked():
        pass
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    with run.locked():
        pass


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "STALE_S", 3.0)
    monkeypatch.setattr(run_lock, "BEAT_S", 0.3)


def put_claim_of_another_machine(s3: S3Server, storage: str, beat: int = 0) -> None:
    claim = {
        "token": "f" * 16,
        "holder": "process 7 on far",
        "machine": "another",
        "pid": 7,
        "born": "1",
        "state": "writing",
        "beat": beat,
    }
    s3.put(f"{storage.removeprefix('s3://')}/mine/claims/{claim['token']}.json", json.dumps(claim).encode())


def test_a_claim_of_another_machine_that_stands_still_is_passed_over(storage, s3: S3Server, quick):
    run = begin(storage)
    put_claim_of_another_machine(s3, storage)
    said: list[str] = []
    with run.locked(said.append):
        assert len(claims(s3, storage)) == 1
    assert "is claimed by process 7 on far; looking for up to 3 s" in said[0]
    assert said[1] == "process 7 on far has not moved for 3 s: going on without it"


def test_a_claim_of_another_machine_that_beats_is_respected(storage, s3: S3Server, monkeypatch):
    """Refused at the first beat that is seen, however late on a busy machine: standing still would take a minute."""
    monkeypatch.setattr(run_lock, "STALE_S", 60.0)
    run = begin(storage)
    ended = threading.Event()

    def beat() -> None:
        number = 0
        while not ended.wait(0.3):
            number += 1
            put_claim_of_another_machine(s3, storage, number)

    put_claim_of_another_machine(s3, storage)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="is being written by process 7 on far"), run.locked():
            pass
    finally:
        ended.set()
        thread.join()
    assert [name.rpartition("/")[2] for name in claims(s3, storage)] == [f"{'f' * 16}.json"], "the own one is gone"


def until_told_to_stop(process: subprocess.Popen[str], again: Callable[[], None] = lambda: None) -> str:
    """What the process says; ``again`` is done over and over until it does."""
    assert process.stdout is not None
    give_up = time.monotonic() + 60
    while not select.select([process.stdout], [], [], 0.05)[0]:
        assert time.monotonic() < give_up, "it goes on"
        again()
    return process.stdout.readline()


def test_a_process_whose_claim_was_removed_while_it_was_frozen_stops(storage, s3: S3Server, hold):
    process = hold()
    (name,) = claims(s3, storage)
    # A claim that is removed between a look and the next beat is written once more.
    assert until_told_to_stop(process, lambda: s3.delete(name)) == "told to stop\n"


def test_a_process_that_wrote_its_claim_once_more_stops_since_another_one_has_the_run(storage, s3: S3Server, hold):
    process = hold()
    put_claim_of_another_machine(s3, storage)
    assert until_told_to_stop(process) == "told to stop\n"


def test_a_process_that_ignores_sigint_as_a_shells_background_processes_do_is_stopped_too(storage, s3: S3Server, hold):
    process = hold("ignoring")
    put_claim_of_another_machine(s3, storage)
    assert process.wait(timeout=60) == -signal.SIGTERM


def test_a_role_that_may_not_delete_can_start_again(storage, s3: S3Server, monkeypatch, quick):
    def refuse(location: str) -> None:
        raise AccessDenied(13, "access denied", location)

    monkeypatch.setattr(run_lock, "delete_file", refuse)
    run = begin(storage)
    for _ in range(2):
        with run.locked():
            pass
    started = time.monotonic()
    put_claim_of_another_machine(s3, storage)
    with run.locked():
        assert time.monotonic() - started < 60
    assert len(claims(s3, storage)) >= 3
