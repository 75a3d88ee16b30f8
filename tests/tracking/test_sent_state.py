"""What was noted of sending: as it was kept, or nothing, whatever stands in the file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from detr_ray.tracking.event_log import EventLog
from detr_ray.tracking.mlflow_run import RunSettings
from detr_ray.tracking.sent_state import STATE_NAME, SentState

GOOD: dict[str, Any] = {
    "destination": "here", "run_id": "abc", "offset": 0, "uploads": {"a.txt": 0}, "left_out": {"files gone": 2},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    log = EventLog(tmp_path)
    log.append("metrics", step=1)
    log.append("metrics", step=2)
    log.close()
    return tmp_path


def line_end(folder: Path) -> int:
    return (folder / "events.jsonl").read_bytes().index(b"\n") + 1


def test_what_was_kept_is_read_again(folder: Path) -> None:
    state = SentState("here", "abc", line_end(folder), {"a.txt": 0}, Counter({"files gone": 2}))
    state.save(folder)
    assert SentState.load(folder, "here") == state
    assert SentState.load(folder, "elsewhere") == SentState("elsewhere")


@pytest.mark.parametrize(
    "change",
    [
        {"offset": "0"}, {"offset": None}, {"offset": 0.0}, {"offset": True}, {"offset": -1}, {"offset": [0]},
        {"offset": 5}, {"offset": 10**6}, {"offset": 2**200}, {"left_out": ["files gone"]}, {"left_out": "none"},
        {"left_out": {"files gone": "2"}}, {"left_out": None}, {"uploads": ["a.txt"]}, {"uploads": {"a.txt": "0"}},
        {"uploads": {"a.txt": None}}, {"uploads": {"a.txt": 3}}, {"run_id": 7}, {"run_id": ["abc"]},
        {"destination": 1}, {"destination": None}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_content_counts_as_none(folder: Path, change: dict[str, Any]) -> None:
    (folder / STATE_NAME).write_text(json.dumps(GOOD | change))
    assert SentState.load(folder, "here") == SentState("here")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"7", b'"x"', b"{}", b"\xff\xfe\x00", b"[" * 100_000, b"\0" * 50], ids=repr
)
def test_a_file_that_is_something_else_counts_as_none(folder: Path, content: bytes) -> None:
    (folder / STATE_NAME).write_bytes(content)
    assert SentState.load(folder, "here") == SentState("here")
    (folder / "run.json").write_bytes(content)
    assert RunSettings.load(folder) is None


def test_a_folder_in_its_place_counts_as_none(folder: Path) -> None:
    (folder / STATE_NAME).mkdir()
    assert SentState.load(folder, "here") == SentState("here")


def test_settings_of_other_types_count_as_none(folder: Path) -> None:
    (folder / "run.json").write_text('{"tracking_uri": 1, "experiment": "e", "run_name": "r", "run_uid": "u"}')
    assert RunSettings.load(folder) is None
