"""What is kept of a job's status, told again after it was lost, and which process is found to hang from it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from detr_ray.runtime.job_status import ControllerStatus, JobStatus, Lines, Member, Snapshot, Task, WorkerStatus
from detr_ray.runtime.stalls import LEAVING_S, STARTING_S, describe, hanging_controller, hanging_workers

NOTHING = Lines("nobody", 0, ())
NODE = "10.0.0.1"


def worker(rank: int = 0, **values: Any) -> WorkerStatus:
    given = {
        "attempt": 1,
        "world_size": 2,
        "node": NODE,
        "process": 100 + rank,
        "phase": "loss",
        "step": 7,
        "seconds": 1,
        "task": 1,
    }
    return WorkerStatus(rank=rank, **(given | values))


def controller(**values: Any) -> ControllerStatus:
    given = {
        "attempt": 1, "process": 50, "state": "RUNNING", "state_s": 5, "workers_s": 5, "idle_s": 0.2, "failures": (),
        "group": 1, "group_s": 5,
    }  # fmt: skip
    return ControllerStatus(**(given | values))


def members(*processes: int) -> dict[int, Member]:
    return {rank: Member(NODE, process, b"") for rank, process in enumerate(processes)}


def task(number: int) -> Task:
    return Task(number, [], [], [], last=False)


def ask(status: JobStatus, attempt: int = 1, seen: tuple[str, int] = ("", 0), **values: Any) -> Snapshot:
    return status.ask(attempt, values.get("task", task(1)), values.get("asked"), seen)


def test_workers_get_one_job_after_another() -> None:
    status = JobStatus()
    assert status.task(0) is None
    ask(status)
    assert status.task(0) == task(1) and status.task(1) is None
    status.worker_beat(worker(outcome=b"done"), NOTHING)
    assert ask(status).outcome == b"done"
    ask(status, task=None)
    assert status.task(0) is None, "workers that are started now would do it again"
    ask(status, task=task(2))
    assert status.task(1) == task(2)
    status.worker_beat(worker(task=2), NOTHING)
    assert (ask(status, task=task(2)).task, ask(status, task=task(2)).outcome) == (2, None)


def test_what_is_asked_of_one_job_is_not_told_at_another() -> None:
    status = JobStatus()
    ask(status, asked="abandoned")
    assert status.worker_beat(worker(), NOTHING) == "abandoned"
    assert status.worker_beat(worker(phase="waiting for a run"), NOTHING) is None, "it has left already"
    ask(status, task=task(2), asked="asked")
    assert status.worker_beat(worker(), NOTHING) is None, "it has not begun with that one"
    assert status.worker_beat(worker(task=2), NOTHING) == "asked"


def test_an_outcome_is_known_after_the_status_was_lost_and_after_workers_were_started_again() -> None:
    status = JobStatus()
    ask(status, task=task(2))
    status.worker_beat(worker(task=2, outcome=b"done"), NOTHING)
    assert ask(status, task=task(2)).outcome == b"done"
    status.worker_beat(worker(task=0, process=300), NOTHING)
    assert ask(status, task=task(2)).outcome == b"done"


def test_a_worker_that_waits_for_a_job_does_not_hang() -> None:
    waiting = {rank: worker(rank, phase="waiting for a run", seconds=1e6) for rank in (0, 1)}
    assert hanging_workers(waiting, 10) == []
    behind = waiting | {0: worker(0, phase="leaving", seconds=1e6)}
    assert [found.rank for found in hanging_workers(behind, 10)] == [0]
    silent = waiting | {1: worker(1, phase="waiting for a run", silent_s=11)}
    assert [found.rank for found in hanging_workers(silent, 10)] == [1]


def test_lines_are_given_out_until_they_were_seen_and_none_twice() -> None:
    status = JobStatus()
    status.worker_beat(worker(), Lines("rank 0", 0, ("one", "two")))
    status.worker_beat(worker(), Lines("rank 0", 0, ("one", "two", "three")))  # the first answer came too late
    first = ask(status)
    assert first.lines.texts == ("one", "two", "three")
    assert ask(status).lines == first.lines, "the first answer was lost"
    status.worker_beat(worker(), Lines("rank 0", 3, ("four",)))
    assert ask(status, seen=(first.lines.source, first.lines.end)).lines.texts == ("four",)


def test_a_status_that_was_lost_knows_all_again_after_the_next_heartbeats() -> None:
    before, after = JobStatus(), JobStatus()
    seen = ask(before).lines
    answers = []
    for status in (before, after):
        ask(status, seen=(seen.source, seen.end), asked="asked")
        answers.append(status.controller_beat(controller(failures=("a failure",)), members(100, 101), NOTHING))
        assert status.worker_beat(worker(0), Lines("rank 0", 20, ("said after the loss",))) == "asked"
        status.worker_beat(worker(1), NOTHING)
    assert answers == [(1, False), (1, False)]
    one, two = ask(before, seen=(seen.source, seen.end)), ask(after, seen=(seen.source, seen.end))
    assert one.lines.texts == two.lines.texts == ("said after the loss",)
    assert before.members() == after.members() and set(one.workers) == set(two.workers) == {0, 1}
    assert two.controller is not None and two.controller.failures == ("a failure",)


def test_the_controller_is_asked_for_its_workers_again_where_they_are_not_known() -> None:
    status = JobStatus()
    assert status.controller_beat(controller(), None, NOTHING) == (-1, False)
    assert ask(status).workers == {}
    assert status.controller_beat(controller(), members(100, 101), NOTHING) == (1, False)
    assert status.controller_beat(controller(), None, NOTHING) == (1, False)
    assert status.controller_beat(controller(group=2), None, NOTHING) == (-1, False)


def test_heartbeats_of_workers_say_that_they_run_where_the_controller_says_nothing() -> None:
    status = JobStatus()
    assert not ask(status).running
    status.worker_beat(worker(1), NOTHING)
    assert ask(status).running and set(ask(status).workers) == {1}
    status.controller_beat(controller(state="RESTARTING"), members(100, 101), NOTHING)
    assert not ask(status).running and ask(status).workers == {}


def test_what_belongs_to_another_group_or_an_earlier_attempt_does_not_count() -> None:
    status = JobStatus()
    status.controller_beat(controller(), members(100, 201), NOTHING)
    for process in (100, 101):
        status.worker_beat(worker(process - 100, process=process), NOTHING)
    found = ask(status).workers
    assert found[0].heard and not found[1].heard, "process 101 is one of an earlier group"
    assert ask(status, attempt=2).controller is None
    status.worker_beat(worker(1, attempt=1), Lines("old", 0, ("late",)))
    status.controller_beat(controller(attempt=1), members(100, 101), NOTHING)
    assert (ask(status, 2).controller, ask(status, 2).workers, ask(status, 2).lines.texts) == (None, {}, ())


def test_all_have_left_only_when_each_is_known_to_have() -> None:
    status = JobStatus()
    leave = controller(leave="resized")
    assert status.controller_beat(leave, members(100, 101), NOTHING) == (1, False)
    assert status.worker_beat(worker(0, phase="leaving"), NOTHING) == "resized"
    scheduling = controller(leave="resized", state="SCHEDULING")
    assert status.controller_beat(scheduling, None, NOTHING) == (1, False)
    assert set(ask(status).workers) == {0, 1}, "they are there until they have left"
    assert status.controller_beat(leave, None, NOTHING) == (1, False)
    status.worker_beat(worker(1, phase="leaving"), NOTHING)
    assert status.controller_beat(leave, None, NOTHING) == (1, True)


def group(*workers: WorkerStatus) -> dict[int, WorkerStatus]:
    return {one.rank: one for one in workers}


@pytest.mark.parametrize(
    ("workers", "found"),
    [
        (group(worker(0, seconds=9), worker(1, seconds=9)), []),
        (group(worker(0, seconds=11), worker(1, phase="backward pass", seconds=30)), [0]),
        (group(worker(0, step=8, seconds=30), worker(1, step=7, seconds=11)), [1]),
        (group(worker(0, seconds=11), worker(1, seconds=11)), [0, 1]),
        # Nothing is heard of one, and the other one waits for it where it is itself furthest behind.
        (group(worker(0, seconds=11), worker(1, step=9, seconds=11, silent_s=11)), [1]),
        # One that was never heard of is not behind before it has had time to start.
        (group(worker(0, seconds=11), worker(1, heard=False, silent_s=11, seconds=11)), []),
        (group(worker(0, seconds=11), worker(1, heard=False, silent_s=STARTING_S + 1, seconds=STARTING_S + 1)), [1]),
        # One that has finished waits for the others, but not for ever, and not in silence.
        (group(worker(0, phase="leaving", seconds=11), worker(1, step=6, seconds=9)), []),
        (group(worker(0, phase="leaving", seconds=11), worker(1, phase="leaving", seconds=11)), []),
        (group(worker(0, phase="leaving", seconds=LEAVING_S + 1)), [0]),
        (group(worker(0, phase="leaving", seconds=11, silent_s=11), worker(1, phase="leaving")), [0]),
        ({}, []),
    ],
)
def test_the_worker_that_the_others_wait_for(workers: dict[int, WorkerStatus], found: list[int]) -> None:
    assert [one.rank for one in hanging_workers(workers, 10.0)] == found


def test_what_is_said_of_a_worker_that_hangs() -> None:
    there, gone = worker(0, seconds=12), worker(1, phase="forward pass", seconds=12, silent_s=12)
    assert describe(there, group(there, gone)) == "loss at step 7 for 12 s"
    assert describe(gone, group(there, gone)) == (
        "nothing heard of it for 12 s, last forward pass at step 7; the others: loss at step 7"
    )
    unheard = dataclasses.replace(gone, heard=False)
    assert describe(unheard, group(unheard)) == "nothing heard of it for 12 s since it was started; the others: none"


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, None),
        ({"silent_s": 11}, "nothing heard of it for 11 s, last RUNNING"),
        ({"silent_s": 9.8, "idle_s": 10.2}, "nothing heard of it for 10 s, last RUNNING"),
        ({"idle_s": 11}, "RUNNING, but standing still for 11 s"),
        ({"state": "SCHEDULING", "idle_s": 100}, None),  # it waits for resources
        ({"state": "SHUTTING_DOWN", "state_s": 100, "idle_s": 100}, None),
        ({"state": "FINISHED", "state_s": 121, "idle_s": 121}, "FINISHED for 2 min 1 s"),
    ],
)
def test_a_controller_that_hangs(values: dict[str, Any], found: str | None) -> None:
    assert hanging_controller(controller(**values), 10.0) == found
