"""Storage that fails or refuses while a run trains: what the run cannot do without is tried again, the rest waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from s3_server import S3Server
from tiny import make_dataset, tiny_config

from detr_ray.config import ConfigError
from detr_ray.engine import loop
from detr_ray.engine.checkpoints.run_checkpoints import Inessential, RunCheckpoints
from detr_ray.engine.checkpoints.store import CheckpointStore
from detr_ray.engine.context import LocalContext, Phase
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.job import TrainJob, prepare_job
from detr_ray.engine.reporting.progress import FitResult
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.tracking import MemoryTracker, Tracker

FEW = ("train.checkpoint_every_steps=1", "train.keep_last=1")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps an epoch."""
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes", num_train=24, num_val=4)


class Disturbed(LocalContext):
    """Notes lines; does something when a phase of a step is entered for the first time."""

    def __init__(self, **at: Callable[[], object]) -> None:
        self.lines: list[str] = []
        super().__init__(say=self.lines.append)
        self._at = at

    def enter(self, phase: Phase, step: int) -> None:
        self._at.pop(f"{phase.replace(' ', '_')}_{step}", lambda: None)()

    def warnings(self) -> list[str]:
        return [line for line in self.lines if "WARNING" in line]


class Bucket:
    """A run's storage in a bucket of its own."""

    def __init__(self, s3: S3Server) -> None:
        self.s3, self.name = s3, s3.new_bucket()
        self.storage = f"s3://{self.name}/runs"
        self.checkpoints = f"{self.name}/runs/mine/checkpoints"
        self.store = CheckpointStore(f"s3://{self.checkpoints}")

    def deny(self, *parts: str) -> Callable[[], None]:
        return lambda: self.s3.set_faults(denied=parts)

    def allow(self) -> None:
        self.s3.set_faults()


@pytest.fixture
def bucket(s3: S3Server) -> Bucket:
    return Bucket(s3)


def prepare(dataset: Path, bucket: Bucket, *overrides: str) -> TrainJob:
    config = tiny_config(dataset, bucket.storage, "run.name=mine", "train.epochs=1", *FEW, *overrides)  # type: ignore[arg-type]
    return prepare_job(config, lambda line: None)


def train(job: TrainJob, context: LocalContext, tracker: Tracker | None = None) -> FitResult:
    batches = LocalBatches(job.data.plan(1, 0), *job.data.loaders())
    return loop.TrainingLoop(job, context, batches, tracker or MemoryTracker()).run()


def test_a_role_that_may_not_delete_trains_and_is_told_once(dataset: Path, bucket: Bucket) -> None:
    context = Disturbed(writing_a_checkpoint_1=bucket.deny("DELETE"))
    result = train(prepare(dataset, bucket), context)
    assert result.status == "finished" and result.best_checkpoint is not None
    assert [info.step for info in bucket.store.checkpoints()] == [1, 2, 3], "they accumulate"
    (warning,) = context.warnings()
    assert "old checkpoints cannot be removed" in warning and "access denied" in warning and "\n" not in warning
    refused = [request for request in bucket.s3.requests() if request.kind == "DELETE" and request.fault]
    assert len(refused) == 2, "each is tried once"


def test_a_half_written_checkpoint_is_replaced_by_a_role_that_may_not_delete(dataset: Path, bucket: Bucket) -> None:
    weights = {"model.pt": {"w": torch.zeros(3)}, "training.pt": {}}
    bucket.store.save(1, weights, {})
    bucket.s3.set_faults(denied=["DELETE"])
    bucket.store.save(1, weights | {"model.pt": {"w": torch.ones(3)}}, {})
    latest = CheckpointStore(bucket.store.root).latest()
    assert latest is not None and torch.equal(bucket.store.load(latest, "model.pt")["w"], torch.ones(3))


def wait_for_scores() -> None:
    """On a busy machine scoring may take longer than the steps after it."""
    for thread in threading.enumerate():
        if thread.name == "scoring":
            thread.join(60)


def test_scores_that_cannot_be_noted_are_noted_later(dataset: Path, bucket: Bucket) -> None:
    """Meanwhile their checkpoint is kept, and known to be the best."""
    manifest = f"PUT {bucket.checkpoints}/step_00000003/manifest"
    context = Disturbed(
        detecting_on_validation_images_3=bucket.deny(manifest), writing_a_checkpoint_4=wait_for_scores,
        writing_a_checkpoint_5=bucket.allow,
        detecting_on_validation_images_6=bucket.deny("PUT", "LIST", "DELETE"),
    )  # fmt: skip
    tracker = MemoryTracker()
    result = train(prepare(dataset, bucket, "train.epochs=2"), context, tracker)
    bucket.allow()
    (_, first), (_, last) = tracker.history("val/AP")
    assert result.status == "finished" and result.metrics["val/AP"] == last
    assert result.best_metrics["val/AP"] == max(first, last)
    infos = {info.step: info for info in bucket.store.checkpoints()}
    assert infos[3].metrics is not None and infos[3].metrics["val/AP"] == first
    assert infos[6].metrics is None and infos[6].unscored, "never noted: evaluated again by who goes on"
    warnings = context.warnings()
    assert sum("scores cannot be noted" in line for line in warnings) == 2, "said again after it had succeeded"
    assert sum("the scores of step 6 could not be noted" in line for line in warnings) == 1
    again = MemoryTracker()
    assert train(prepare(dataset, bucket, "train.epochs=2"), Disturbed(), again).status == "finished"
    assert again.history("val/AP") == [(6, last)] and again.history("train/loss") == []
    assert not any(info.unscored for info in bucket.store.checkpoints())


def test_the_last_checkpoint_is_tried_with_patience(
    dataset: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "PATIENTLY", (0.01, 0.01, 0.01))
    refused = bucket.deny(f"PUT {bucket.checkpoints}/step_00000003")
    attempts: list[int] = []

    class Recovering(Disturbed):
        def say(self, line: str) -> None:
            super().say(line)
            if "no checkpoint at step 3" in line:
                attempts.append(1)
                if len(attempts) == 3:
                    bucket.allow()

    assert train(prepare(dataset, bucket), Recovering(writing_a_checkpoint_3=refused)).status == "finished"
    assert len(attempts) == 3
    latest = bucket.store.latest()
    assert latest is not None and latest.step == 3


def test_a_last_checkpoint_that_cannot_be_written_is_a_clear_failure(
    dataset: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "PATIENTLY", (0.01,))
    refused = bucket.deny(f"PUT {bucket.checkpoints}/step_00000003")
    message = r"run\.storage: the last checkpoint could not be written: s3://.*/step_00000003/model\.pt: access denied"
    with pytest.raises(RunFailed, match=message) as failure:
        train(prepare(dataset, bucket), Disturbed(writing_a_checkpoint_3=refused))
    assert failure.value.agreed and "\n" not in str(failure.value)


def test_storage_that_does_not_list_is_an_error_before_anything_starts(dataset: Path, bucket: Bucket) -> None:
    train(prepare(dataset, bucket), Disturbed())
    bucket.s3.set_faults(denied=["LIST"])
    with pytest.raises(ConfigError, match=r"run\.storage: the checkpoints of s3://.* cannot be listed: access denied"):
        prepare(dataset, bucket)


@pytest.mark.parametrize("part", ["LIST", "GET"])
def test_checkpoints_that_cannot_be_read_now_are_no_reason_to_begin_anew(
    dataset: Path, bucket: Bucket, part: str
) -> None:
    train(prepare(dataset, bucket), Disturbed())
    job = prepare(dataset, bucket)
    bucket.s3.set_faults(denied=[f"{part} {bucket.name}/runs" if part == "GET" else part])
    with pytest.raises(RunFailed, match=r"the checkpoints cannot be read now, .*access denied") as failure:
        train(job, Disturbed())
    assert failure.value.agreed, "no restart would help"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(dataset: Path, tmp_path: Path) -> None:
    job = prepare_job(tiny_config(dataset, tmp_path, "run.name=mine", "train.epochs=1"), lambda line: None)
    train(job, Disturbed())
    (file,) = (tmp_path / "mine" / "checkpoints").glob("*/model.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunFailed, match=r"none of the checkpoints in .* can be read"):
        train(job, Disturbed())


def test_records_that_cannot_be_written_cost_no_run(dataset: Path, tmp_path: Path) -> None:
    class FullDisk(MemoryTracker):
        def log_metrics(self, metrics, step):
            raise OSError(28, "No space left on device")

        log_text = log_file = log_metrics

    job = prepare_job(tiny_config(dataset, tmp_path, "run.name=mine", "train.epochs=1"), lambda line: None)
    stream = tmp_path / "mine" / "stream"

    def block_the_stream() -> None:
        (file,) = stream.iterdir()
        file.unlink()
        file.mkdir()

    context = Disturbed(update_1=block_the_stream)
    assert train(job, context, FullDisk()).status == "finished"
    said = "\n".join(context.warnings())
    for what in ("metrics", "scores", "the stream", "best checkpoint", "last checkpoint"):
        assert sum(what in line and "cannot be recorded" in line for line in context.warnings()) == 1, said


def test_a_damaged_newer_checkpoint_takes_no_place_of_a_sound_one(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    files = {"model.pt": {"w": torch.zeros(3)}}
    for step in (5, 10):
        store.save(step, files, {})
    context = LocalContext()
    checkpoints = RunCheckpoints(store, context, 1, Inessential(context._say), measured_on={})
    sound = store.checkpoints()[0]
    checkpoints.going_on_from(sound, store.checkpoints())
    assert checkpoints.save(7, lambda: files, {}, evaluation_due=False) == ""
    assert [info.step for info in store.checkpoints()] == [7, 10]
