"""Runs and checkpoints in a bucket: whole or not at all, whatever dies or fails, and with few requests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from coco_folder import sound_folder
from s3_server import S3Server

from detr_ray.addresses import LocationError
from detr_ray.check import main as check
from detr_ray.config import ConfigError
from detr_ray.engine.checkpoints.found_model import find_model
from detr_ray.engine.checkpoints.run_directory import open_run
from detr_ray.engine.checkpoints.store import CheckpointStore
from detr_ray.engine.errors import CheckpointError
from detr_ray.engine.preflight.writing import try_storage, within
from detr_ray.model.checkpoint_file import read_checkpoint
from detr_ray.model.state_dicts import WeightsError
from detr_ray.retries import AccessDenied, NoSuchObject, StorageError


@pytest.fixture
def root(s3: S3Server) -> str:
    return f"s3://{s3.new_bucket()}/runs/mine/checkpoints"


def bucket_of(root: str) -> str:
    return root.removeprefix("s3://").partition("/")[0]


def save(store: CheckpointStore, step: int, ap: float | None = None, numbers: int = 4) -> None:
    model = {"model": {"w": torch.full((numbers,), float(step))}}
    info = store.save(step, {"model.pt": model, "training.pt": {"step": step}}, {})
    if ap is not None:
        store.annotate(info, {"val/AP": ap})


def steps(store: CheckpointStore) -> list[int]:
    return [info.step for info in store.checkpoints()]


def test_the_best_and_the_last_are_kept_and_loaded(root, s3: S3Server):
    store = CheckpointStore(root)
    assert store.latest() is None
    for step, ap in ((1, 0.1), (2, 0.5), (3, 0.2), (4, None)):
        save(store, step, ap)
    store.prune(keep_last=1)
    assert steps(store) == steps(CheckpointStore(root)) == [2, 4]
    best, latest = store.best(), store.latest()
    assert best is not None and latest is not None
    assert best.path == f"{root}/step_00000002" and best.metrics == {"val/AP": 0.5}
    assert torch.equal(store.load(latest, "model.pt")["model"]["w"], torch.full((4,), 4.0))
    save(store, 4, 0.9)
    assert [info.metrics for info in CheckpointStore(root).checkpoints()] == [{"val/AP": 0.5}, {"val/AP": 0.9}]
    kept = [key for key in s3.keys(bucket_of(root)) if not key.endswith("/")]
    assert len(kept) == 6, "nothing of what was pruned stays"


def test_looking_costs_one_listing(root, s3: S3Server):
    store = CheckpointStore(root)
    for step in range(1, 6):
        save(store, step, step / 10)
    store.checkpoints()
    s3.forget()
    assert (store.best().step, store.latest().step, len(store.checkpoints())) == (5, 5, 5)
    assert s3.counts() == {"LIST": 3}
    store.annotate(store.latest(), {"val/AP": 0.0})
    s3.forget()
    assert store.best().step == 4
    assert s3.counts() == {"LIST": 1, "HEAD": 1, "GET": 1}, "only the manifest that changed is read"


def test_half_written_checkpoints_are_passed_over(root, s3: S3Server):
    store = CheckpointStore(root)
    for step in (1, 2, 3, 4, 5):
        save(store, step)
    place = root.removeprefix("s3://")
    s3.delete(f"{place}/step_00000005/manifest.json")
    s3.delete(f"{place}/step_00000004/training.pt")
    s3.put(f"{place}/step_00000003/model.pt", s3.get(f"{place}/step_00000003/model.pt")[:100])
    s3.put(f"{place}/step_00000002/manifest.json", s3.get(f"{place}/step_00000002/manifest.json")[:40])
    assert steps(CheckpointStore(root)) == steps(store) == [1]
    content = bytearray(s3.get(f"{place}/step_00000001/model.pt"))
    content[len(content) // 2] ^= 1
    s3.put(f"{place}/step_00000001/model.pt", bytes(content))
    with pytest.raises(CheckpointError, match=r"s3://.*step_00000001/model.pt: its content is not what was written"):
        store.load(store.latest(), "model.pt")


KILLED = """
import sys, torch
from detr_ray.engine.checkpoints.store import CheckpointStore
store = CheckpointStore(sys.argv[1])
for step in range(1, 10_000):
    store.save(step, {"model.pt": {"w": torch.full((3_000_000,), float(step))}, "training.pt": {}}, {})
    store.prune(keep_last=2)
    print(step, flush=True)
"""


def test_a_writer_that_is_killed_in_an_upload_leaves_whole_checkpoints(root, s3: S3Server):
    command = [sys.executable, "-c", KILLED, root]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **s3.environment})
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 2:
            break
    s3.forget()
    deadline = time.monotonic() + 60
    while not any(r.kind == "PUT" and r.path.endswith("model.pt") for r in s3.requests()):
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    store = CheckpointStore(root)
    latest = store.latest()
    assert latest is not None and latest.step >= 2
    assert (store.load(latest, "model.pt")["w"] == latest.step).all()
    save(store, latest.step + 1)
    assert steps(store)[-1] == latest.step + 1


def test_a_bucket_that_fails_now_and_then_is_survived(root, s3: S3Server):
    store = CheckpointStore(root)
    s3.set_faults(0.1, seed=5)
    s3.forget()
    for step in (1, 2):
        save(store, step, step / 10, numbers=3_000_000)
        store.prune(keep_last=1)
    latest = store.latest()
    assert latest is not None and latest.metrics == {"val/AP": 0.2}
    assert (store.load(latest, "model.pt")["model"]["w"] == 2).all()
    assert sum(bool(request.fault) for request in s3.requests()) >= 2
    s3.set_faults()
    assert steps(CheckpointStore(root)) == [2]


def test_a_bucket_that_takes_no_more_leaves_the_last_good_one(root, s3: S3Server):
    store = CheckpointStore(root)
    save(store, 1)
    s3.set_faults(read_only=bucket_of(root))
    with pytest.raises(PermissionError, match=r"step_00000002/model.pt: access denied"):
        save(store, 2)
    s3.set_faults()
    assert steps(store) == [1]


# The run's record


def test_a_run_in_a_bucket_is_begun_once(s3: S3Server):
    storage = f"s3://{s3.new_bucket()}/runs/"
    begun = open_run("mine", storage, {"optim.lr": 1.0}, {"train": "abc"}, "optim: {lr: 1}")
    s3.forget()
    again = open_run("mine", storage, {"optim.lr": 1.0}, {"train": "abc"}, "")
    assert (begun.is_new, again.is_new, again.run_id) == (True, False, begun.run_id)
    assert s3.counts() == {"HEAD": 1, "GET": 1}
    assert again.path == f"{storage}mine" and again.local_path is None
    with pytest.raises(ConfigError, match=r"optim.lr: begun with 1.0, now 2.0"):
        open_run("mine", storage, {"optim.lr": 2.0}, {"train": "abc"}, "")
    assert json.loads(s3.get(f"{storage.removeprefix('s3://')}mine/run.json"))["config"] == {"optim.lr": 1.0}


def test_a_bucket_that_cannot_hold_the_run_is_told(s3: S3Server):
    with pytest.raises(ConfigError, match=r"run.storage: s3://not-made/mine cannot be used: no such bucket"):
        open_run("mine", "s3://not-made", {}, {}, "")
    bucket = s3.new_bucket()
    s3.set_faults(read_only=bucket)
    with pytest.raises(ConfigError, match=r"cannot be used: access denied"):
        open_run("mine", f"s3://{bucket}", {}, {}, "")
    with pytest.raises(ConfigError, match="holds credentials") as refused:
        open_run("mine", "s3://AKIAKEY:hidden@bucket", {}, {}, "")
    assert "hidden" not in str(refused.value)


# Weights from a bucket


def test_checkpoints_in_a_bucket_are_found_and_read(root, s3: S3Server):
    run = root.removesuffix("/checkpoints")
    store = CheckpointStore(root)
    save(store, 1, 0.5)
    save(store, 2, 0.1)
    file = f"{root}/step_00000001/model.pt"
    for given in (run, f"{root}/step_00000001", file):
        assert find_model(given, "eval.checkpoint").file == file
    assert torch.equal(read_checkpoint(file)["model"]["w"], torch.ones(4))
    with pytest.raises(WeightsError, match=r"s3://.*/absent.pt: no such object"):
        read_checkpoint(f"{root}/absent.pt")
    s3.put(f"{root.removeprefix('s3://')}/junk.pt", b"junk")
    with pytest.raises(WeightsError, match=r"junk.pt is damaged or no torch file \(4 bytes\)"):
        read_checkpoint(f"{root}/junk.pt")
    with pytest.raises(ConfigError, match="holds no whole checkpoint"):
        find_model(run.removesuffix("/mine"), "eval.checkpoint")


# Trying a storage


def test_a_bucket_is_tried_and_left_as_it_was(s3: S3Server):
    bucket = s3.new_bucket()
    try_storage(f"s3://{bucket}/new/deep")
    try_storage(f"s3://{bucket}")
    assert s3.keys(bucket) == []
    s3.put(f"{bucket}/new/x", b"")
    try_storage(f"s3://{bucket}/new")
    assert [key for key in s3.keys(bucket) if not key.endswith("/")] == [f"{bucket}/new/x"]
    assert {request.kind for request in s3.requests()} >= {"PUT", "GET", "DELETE"}


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("no bucket", NoSuchObject, "no such bucket"),
        ("read only", AccessDenied, "access denied"),
        ("forbidden", AccessDenied, "access denied"),
        ("failing", StorageError, "gave up after .* AWS Error"),
        ("no server", StorageError, "gave up after .* connect to server"),
        ("silent", TimeoutError, "no answer within"),
        ("credentials", LocationError, "holds credentials"),
    ],
)
def test_a_storage_that_cannot_be_used_is_found_out_within_seconds(s3: S3Server, monkeypatch, case, kind, message):
    bucket = "not-made" if case == "no bucket" else s3.new_bucket()
    faults = {
        "read only": {"read_only": bucket}, "forbidden": {"forbidden": bucket}, "silent": {"silent": bucket},
        "failing": {"share": 1.0, "kinds": ["slow_down"]},
    }.get(case, {})  # fmt: skip
    s3.set_faults(**faults)
    storage = f"s3://me:hidden@{bucket}" if case == "credentials" else f"s3://{bucket}/runs"
    if case == "no server":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(kind, match=message):
        within(3 if case == "silent" else 10, lambda: try_storage(storage))
    assert time.monotonic() - started < 12


def test_check_says_what_is_wrong_with_the_storage_and_the_data(s3: S3Server, tmp_path, capsys):
    root = sound_folder(tmp_path / "set")
    keys = ["tracking.enabled=false", "model.backbone_weights=none", "model.backbone_norm=batch"]
    keys += ["train.global_batch_size=4"]
    assert check([f"data.root={root}", "run.storage=s3://not-made/runs", *keys]) == 1
    assert "run.storage: s3://not-made/runs cannot be used: no such bucket" in capsys.readouterr().out
    assert check([f"data.root={root}", "run.storage=s3://AKIAKEY:hidden@bucket/runs", *keys]) == 2
    captured = capsys.readouterr()
    assert "run.storage: the address holds credentials" in captured.err
    assert "hidden" not in captured.out + captured.err
    uri = s3.upload(root, f"{s3.new_bucket()}/set")
    assert check([f"data.root={uri}", f"run.storage={uri}/runs", *keys]) == 0
    said = capsys.readouterr().out
    assert f"run.storage: {uri}/runs can be written and read" in said
    assert check([f"data.root={uri}x", f"run.storage={tmp_path}", *keys]) == 1
    assert f"{uri}x: there is no such folder; data.root is the folder of a data set" in capsys.readouterr().out
