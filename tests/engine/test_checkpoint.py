"""The checkpoint store: whole or not at all, damage found, the best and the last kept, a full disk survived."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detr_ray.engine.checkpoints.store import CheckpointStore, release
from detr_ray.engine.errors import CheckpointError


def save(store: CheckpointStore, step: int, ap: float | None = None) -> None:
    info = store.save(step, {"model.pt": {"w": torch.full((4,), float(step))}, "training.pt": {"step": step}}, {})
    if ap is not None:
        store.annotate(info, {"val/AP": ap})


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    save(store, 7)
    latest = store.latest()
    assert latest is not None and latest.step == 7 and latest.metrics is None
    assert torch.equal(store.load(latest, "model.pt")["w"], torch.full((4,), 7.0))


def test_an_empty_store_has_no_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path / "nothing"))
    assert store.latest() is None and store.best() is None and store.checkpoints() == []


def test_half_written_checkpoints_do_not_exist(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    for step in (1, 2, 3, 4):
        save(store, step)
    (tmp_path / "step_00000004" / "manifest.json").unlink()
    (tmp_path / "step_00000003" / "training.pt").unlink()
    with (tmp_path / "step_00000002" / "model.pt").open("ab") as file:
        file.truncate(10)
    latest = store.latest()
    assert latest is not None and latest.step == 1


def test_a_torn_manifest_is_no_manifest(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    save(store, 1)
    save(store, 2)
    manifest = tmp_path / "step_00000002" / "manifest.json"
    manifest.write_text(manifest.read_text()[:40])
    latest = store.latest()
    assert latest is not None and latest.step == 1


def test_changed_content_of_the_same_size_is_an_error(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    save(store, 1)
    path = tmp_path / "step_00000001" / "model.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    latest = store.latest()
    assert latest is not None
    with pytest.raises(CheckpointError, match=r"step_00000001/model.pt"):
        store.load(latest, "model.pt")


def test_the_best_and_the_last_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    for step, ap in ((1, 0.1), (2, 0.5), (3, 0.5), (4, 0.2), (5, None), (6, 0.3)):
        save(store, step, ap)
    store.prune(keep_last=2)
    assert [info.step for info in store.checkpoints()] == [2, 5, 6]
    best = store.best()
    assert best is not None and best.step == 2


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    save(store, 1, 0.9)
    save(store, 1)
    assert [info.metrics for info in store.checkpoints()] == [None]


def test_nothing_but_data_is_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    info = store.save(1, {"model.pt": {"path": Path("x")}}, {})
    with pytest.raises(Exception, match="weights_only"):
        store.load(info, "model.pt")


FULL_DISK = """
import resource, signal, sys, torch
from detr_ray.engine.checkpoints.store import CheckpointStore
store = CheckpointStore(sys.argv[1])
store.save(1, {"model.pt": {"w": torch.zeros(10)}}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    store.save(2, {"model.pt": {"w": torch.zeros(1_000_000)}}, {})
except OSError as error:
    print("OSError", error)
print([info.step for info in store.checkpoints()])
"""


def test_a_disk_that_takes_no_more_leaves_the_last_good_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert "OSError" in done.stdout, done.stderr
    assert done.stdout.strip().endswith("[1]")
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


KILLED = """
import sys, torch
from detr_ray.engine.checkpoints.store import CheckpointStore
store = CheckpointStore(sys.argv[1])
for step in range(1, 10_000):
    store.save(step, {"model.pt": {"w": torch.full((300_000,), float(step))}}, {})
    store.prune(keep_last=2)
    print(step, flush=True)
"""


def test_a_writer_that_is_killed_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 5:
            break
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    store = CheckpointStore(str(tmp_path))
    latest = store.latest()
    assert latest is not None and latest.step >= 5
    assert torch.equal(store.load(latest, "model.pt")["w"], torch.full((300_000,), float(latest.step)))
    assert json.loads((Path(latest.path) / "manifest.json").read_text())["step"] == latest.step


def test_what_is_to_be_evaluated_is_kept_until_that_is_noted(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    files = {"model.pt": {"w": torch.zeros(4)}}
    for step in (1, 2, 3, 4):
        store.save(step, files, {}, evaluation_due=step < 4)
    store.prune(keep_last=1)
    assert [info.step for info in store.checkpoints() if info.unscored] == [1, 2, 3]
    first, second, third, _ = store.checkpoints()
    store.annotate(first, {"val/AP": 0.3})
    store.annotate(second, None, "the scorer process was ended")
    store.annotate(third, {"val/AP": 0.2})
    found = {info.step: info for info in CheckpointStore(str(tmp_path)).checkpoints()}
    assert not any(info.unscored for info in found.values())
    assert found[2].metrics is None and found[2].evaluation_problem == "the scorer process was ended"
    store.prune(keep_last=1)
    assert [info.step for info in store.checkpoints()] == [1, 4], "the best and the last"


def test_a_held_checkpoint_is_kept_until_it_is_released(tmp_path: Path) -> None:
    """Another run may be about to begin at it. Any process may release it."""
    store = CheckpointStore(str(tmp_path))
    for step in (1, 2, 3):
        store.save(step, {"model.pt": {"x": torch.ones(1)}}, {}, held=step == 1)
    store.prune(1)
    assert [(info.step, info.held) for info in store.checkpoints()] == [(1, True), (3, False)]
    held = store.checkpoints()[0]
    release(held.path)
    other = CheckpointStore(str(tmp_path))
    other.prune(1)
    assert [info.step for info in other.checkpoints()] == [3]


def test_a_manifest_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    save(store, 1)
    manifest = tmp_path / "step_00000001" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["evaluation_due"], content["evaluation_problem"]
    manifest.write_text(json.dumps(content))
    (info,) = CheckpointStore(str(tmp_path)).checkpoints()
    assert info.metrics is None and not info.unscored


def test_scores_are_compared_with_those_that_were_measured_alike(tmp_path: Path) -> None:
    """The best of each way stays; which is best now is that of the way that was used last."""
    store = CheckpointStore(str(tmp_path))
    large, small = {"eval.size": 800}, {"eval.size": 400}
    for step, ap, way in (
        (1, 0.5, large), (2, 0.7, large), (3, 0.6, large), (4, 0.2, small), (5, 0.3, small), (6, 0.1, small)
    ):  # fmt: skip
        info = store.save(step, {"model.pt": {"w": torch.zeros(1)}}, {})
        store.annotate(info, {"val/AP": ap}, measured_on=way)
        store.prune(keep_last=1)
        best = store.best()
        assert best is not None and best.step == {1: 1, 2: 2, 3: 2, 4: 4, 5: 5, 6: 5}[step]
    assert [info.step for info in store.checkpoints()] == [2, 5, 6]
    assert store.checkpoints()[0].measured_on == large
    again = store.save(7, {"model.pt": {"w": torch.zeros(1)}}, {})
    store.annotate(again, {"val/AP": 0.4}, measured_on=large)
    best = store.best()
    assert best is not None and best.step == 2, "the way that was used before"


def test_scores_of_earlier_releases_are_compared_with_all(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    save(store, 1, 0.5)
    info = store.save(2, {"model.pt": {"w": torch.zeros(1)}}, {})
    store.annotate(info, {"val/AP": 0.4}, measured_on={"eval.size": 800})
    store.prune(keep_last=1)
    best = store.best()
    assert best is not None and best.step == 1
    info = store.save(3, {"model.pt": {"w": torch.zeros(1)}}, {})
    store.annotate(info, {"val/AP": 0.45}, measured_on={"eval.size": 800, "train.precision": "fp32"})
    store.prune(keep_last=1)
    best = store.best()
    assert best is not None and best.step == 1, "settings that were not noted before count as equal"
