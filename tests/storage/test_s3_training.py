"""Training from and into a bucket is training from and into a folder: same stream, same losses, same weights."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from s3_server import S3Server
from small_shards import write_small_shards
from tiny import fit_here, make_dataset, tiny_config

from detr_ray.data.formats import open_split
from detr_ray.data.packing import write_shards
from detr_ray.detector.artifact import MODEL_FILE
from detr_ray.engine.checkpoints import run_lock
from detr_ray.engine.checkpoints.found_model import find_model
from detr_ray.engine.checkpoints.store import CheckpointStore
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.hooks import JobHooks
from detr_ray.engine.job import prepare_job
from detr_ray.engine.loop import FitResult
from detr_ray.runtime.launch import fit, run_job
from detr_ray.tracking import MemoryTracker

NUM_TRAIN = 24
FEW = ("train.epochs=1", "train.checkpoint_every_steps=1", "train.keep_last=3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes", num_train=NUM_TRAIN, num_val=4)


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run from the local folder into a local folder."""
    return run(folder, tmp_path_factory.mktemp("runs"), *FEW)


def run(root: object, storage: object, *overrides: str, stop_after: int | None = None) -> SimpleNamespace:
    """Trains in this process; what came of it."""
    tracker = MemoryTracker()
    config = tiny_config(root, storage, "run.name=mine", *overrides)  # type: ignore[arg-type]
    result = fit_here(config, tracker, stop_after)
    losses = {step: values["train/loss"] for step, values in tracker.metrics if "train/loss" in values}
    return SimpleNamespace(result=result, losses=losses, weights=weights_of(result), stream=stream_of(result))


def weights_of(result: FitResult) -> dict[str, torch.Tensor]:
    store = CheckpointStore(f"{result.run_path}/checkpoints")
    latest = store.latest()
    assert latest is not None and latest.step == result.step
    return store.load(latest, MODEL_FILE)["model"]


def stream_of(result: FitResult) -> str:
    file = Path(result.run_path) / "stream" / "rank-00000.jsonl"
    return file.read_text() if file.is_file() else ""


def assert_same(got: SimpleNamespace, expected: SimpleNamespace) -> None:
    assert got.losses == expected.losses and len(got.losses) == expected.result.step
    assert got.result.metrics.keys() == expected.result.metrics.keys()
    assert got.result.metrics["val/AP"] == expected.result.metrics["val/AP"]
    assert all(torch.equal(value, expected.weights[name]) for name, value in got.weights.items())


def test_images_in_a_bucket_give_the_same_stream_losses_and_weights(folder, undisturbed, s3: S3Server, tmp_path):
    remote = run(s3.upload(folder, f"{s3.new_bucket()}/shapes"), tmp_path, *FEW)
    assert remote.stream == undisturbed.stream != ""
    assert_same(remote, undisturbed)


def test_a_bucket_that_fails_is_survived_with_the_same_result(folder, undisturbed, s3: S3Server):
    """Images, checkpoints and the run's record, with one request in twenty failing."""
    bucket = s3.new_bucket()
    uri = s3.upload(folder, f"{bucket}/shapes")
    s3.forget()
    s3.set_faults(0.05, seed=7)
    remote = run(uri, f"s3://{bucket}/runs", *FEW)
    assert_same(remote, undisturbed)
    failed = [request for request in s3.requests() if request.fault]
    assert len(failed) >= 3
    s3.set_faults()
    kept = {key.split("/")[4] for key in s3.keys(f"{bucket}/runs/mine/checkpoints/step_")}
    assert kept == {"step_00000001", "step_00000002", "step_00000003"}


def test_shards_in_a_bucket_give_the_same_run_by_the_launcher(folder, undisturbed, s3: S3Server):
    bucket = s3.new_bucket()
    places = []
    for split in ("train", "val"):
        write_shards(open_split(str(folder), None, split), f"s3://{bucket}/shards/{split}")
        places.append(f"data.{split}.shards=s3://{bucket}/shards/{split}")
    config = tiny_config("null", f"s3://{bucket}/runs", *places, "run.name=mine", *FEW)  # type: ignore[arg-type]
    result = fit(config)
    assert result.status == "finished"
    assert result.run_path == f"s3://{bucket}/runs/mine"
    assert all(torch.equal(value, undisturbed.weights[name]) for name, value in weights_of(result).items())
    assert find_model(result.run_path, "eval.checkpoint").file == f"{result.best_checkpoint}/{MODEL_FILE}"
    assert fit(config).status == "nothing to do"


def test_a_run_in_a_bucket_is_gone_on_with(folder, undisturbed, s3: S3Server):
    storage = f"s3://{s3.new_bucket()}/runs"
    stopped = run(folder, storage, *FEW, stop_after=2)
    assert (stopped.result.status, stopped.result.step) == ("stopped", 2)
    resumed = run(folder, storage, *FEW)
    assert (resumed.result.status, resumed.result.step) == ("finished", 3)
    assert resumed.losses == {step: loss for step, loss in undisturbed.losses.items() if step == 3}
    assert all(torch.equal(value, undisturbed.weights[name]) for name, value in resumed.weights.items())


@pytest.mark.slow
def test_a_half_written_checkpoint_in_a_bucket_is_passed_over(folder, undisturbed, s3: S3Server):
    bucket = s3.new_bucket()
    run(folder, f"s3://{bucket}/runs", *FEW, stop_after=2)
    s3.delete(f"{bucket}/runs/mine/checkpoints/step_00000002/manifest.json")
    resumed = run(folder, f"s3://{bucket}/runs", *FEW)
    assert sorted(resumed.losses) == [2, 3], "gone on from step 1"
    assert_same(SimpleNamespace(**{**vars(resumed), "losses": undisturbed.losses}), undisturbed)


@pytest.mark.slow
def test_shards_a_few_at_a_time_give_the_same_run_after_an_interruption(folder, s3: S3Server, monkeypatch):
    bucket = s3.new_bucket()
    uri = f"s3://{bucket}/shards"
    write_small_shards(open_split(str(folder), None, "train"), uri, 4, monkeypatch)
    keys = (f"data.train.shards={uri}", "data.shard_window=2", *FEW)
    whole = run("null", f"s3://{bucket}/whole", *keys)
    run("null", f"s3://{bucket}/parts", *keys, stop_after=1)
    parts = run("null", f"s3://{bucket}/parts", *keys)
    assert parts.losses == {step: loss for step, loss in whole.losses.items() if step > 1}
    assert all(torch.equal(value, whole.weights[name]) for name, value in parts.weights.items())


def test_a_run_that_another_process_has_taken_over_is_given_up_without_a_checkpoint(
    folder, s3: S3Server, monkeypatch: pytest.MonkeyPatch
):
    """A checkpoint of this process would lie among those of the other one, and removing old ones would remove its."""
    monkeypatch.setattr(run_lock, "BEAT_S", 0.1)
    bucket = s3.new_bucket()
    job = prepare_job(tiny_config(folder, f"s3://{bucket}/runs", "run.name=mine", "train.epochs=1"), lambda line: None)
    claim = {"token": "f" * 16, "holder": "process 7 on far", "machine": "far", "pid": 7, "born": "1",
             "state": "writing", "beat": 3}  # fmt: skip

    def take_over(step: int) -> None:
        beating = [thread for thread in threading.enumerate() if thread.name == "run claim"]
        if step == 1 and beating:
            s3.put(f"{bucket}/runs/mine/claims/{claim['token']}.json", json.dumps(claim).encode())
            beating[0].join(30)

    with pytest.raises(RunFailed, match=r"another process goes on with s3://.*/runs/mine"):
        run_job(job, JobHooks(on_step=take_over))
    assert job.run.checkpoints.latest() is None
