"""The loop without Ray: going on exactly, stopping, refusing, and what it does when data or numbers are bad."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import fit_here, make_dataset, tiny_config

from detr_ray.config import ConfigError
from detr_ray.data.errors import DataError
from detr_ray.engine.checkpoints.store import CheckpointStore
from detr_ray.engine.context import LocalContext
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.job import prepare_job
from detr_ray.engine.loop import TrainingLoop
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.engine.training_step.step import compiled
from detr_ray.model.detr import Detr
from detr_ray.tracking import MemoryTracker


@pytest.fixture(scope="module")
def run_once(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage with a finished run, to be copied."""
    storage = tmp_path_factory.mktemp("finished")
    fit_here(tiny_config(dataset, storage, "run.name=a"))
    return storage


@pytest.fixture
def finished(run_once: Path, tmp_path: Path) -> Path:
    """Storage of this test's own with the finished run ``a`` of two epochs, 10 steps."""
    return shutil.copytree(run_once, tmp_path, dirs_exist_ok=True)


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(str(run / "checkpoints"))
    latest = store.latest()
    assert latest is not None
    return store.load(latest, "model.pt")["model"]


def positions(run: Path) -> list[int]:
    lines = (run / "stream" / "rank-00000.jsonl").read_text().splitlines()
    return [position for line in lines for position in json.loads(line)["positions"]]


def assert_same_weights(run_a: Path, run_b: Path) -> None:
    weights_a, weights_b = final_weights(run_a), final_weights(run_b)
    assert weights_a.keys() == weights_b.keys()
    for name, weight in weights_a.items():
        assert torch.allclose(weight, weights_b[name], rtol=0, atol=0, equal_nan=True), name


def test_metrics_have_their_public_names(dataset: Path, tmp_path: Path) -> None:
    tracker = MemoryTracker()
    result = fit_here(tiny_config(dataset, tmp_path, "run.name=a"), tracker)
    assert result.status == "finished" and result.step == 10
    assert result.metrics.keys() >= {"val/AP", "val/AP50", "val/AR100", "val/ARs"}
    assert [step for step, _ in tracker.history("val/AP")] == [5, 10]
    assert [step for step, _ in tracker.history("train/loss")] == list(range(1, 11))
    names = {
        "train/loss_ce", "train/loss_bbox_0", "train/class_error", "train/cardinality_error", "train/grad_norm",
        "optim/lr", "optim/lr_backbone", "loss/weight/ce", "loss/weight/giou",
        "perf/images_per_s", "perf/data_wait_frac", "perf/padding_frac", "perf/forward_s", "perf/backward_s",
        "val/AP/rectangle",
    }  # fmt: skip
    assert [name for name in names if not tracker.history(name)] == []
    latest = CheckpointStore(f"{tmp_path}/a/checkpoints").latest()
    assert latest is not None and latest.metrics is not None
    assert {"val/AP", "val/AP/rectangle"} <= latest.metrics.keys(), "a search may compare either"


def test_the_loss_goes_down(dataset: Path, tmp_path: Path) -> None:
    tracker = MemoryTracker()
    rates = ("optim.lr=1e-3", "optim.lr_backbone=1e-3")
    fit_here(tiny_config(dataset, tmp_path, "train.epochs=6", "eval.every_epochs=0", *rates), tracker)
    losses = [value for _, value in tracker.history("train/loss")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


CHANGING = ("model.dropout=0.1", "optim.ema_decay=0.9", "optim.schedule=cosine", "optim.warmup_epochs=1")
"""Settings under which each step differs from the one before."""


@pytest.fixture(scope="module")
def straight(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with these that was never stopped."""
    storage = tmp_path_factory.mktemp("straight")
    fit_here(tiny_config(dataset, storage, "run.name=straight", *CHANGING))
    return storage / "straight"


@pytest.mark.parametrize("stop_after", [3, 5, 7])
def test_stopping_and_going_on_is_never_having_stopped(
    dataset: Path, straight: Path, tmp_path: Path, stop_after: int
) -> None:
    config = tiny_config(dataset, tmp_path, "run.name=stopped", *CHANGING)
    stopped = fit_here(config, stop_after=stop_after)
    assert (stopped.status, stopped.step) == ("stopped", stop_after)
    assert fit_here(config).status == "finished"
    assert_same_weights(straight, tmp_path / "stopped")
    assert positions(tmp_path / "stopped") == list(range(80)) == positions(straight)


KILLED_AT_STEP_8 = """
import os, signal, sys
from detr_ray import train

class Killed(train.ProgressBar):
    def say(self, line):
        super().say(line)
        if "step 8/15" in line:
            os.kill(os.getpid(), signal.SIGKILL)

train.ProgressBar = Killed
sys.exit(train.main(sys.argv[1:]))
"""


def test_killed_and_started_again_is_never_having_stopped(dataset: Path, tmp_path: Path) -> None:
    overrides = ("run.name=killed", "train.checkpoint_every_steps=2", "train.epochs=3", "train.keep_last=2")
    config = tiny_config(dataset, tmp_path, *overrides)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_STEP_8, "--config", str(tmp_path / "config.yaml")],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    latest = CheckpointStore(str(tmp_path / "killed" / "checkpoints")).latest()
    assert latest is not None and latest.step <= 8
    resumed_at = latest.step
    result = fit_here(config)
    assert result.status == "finished" and result.step == 15
    fit_here(tiny_config(dataset, tmp_path, *overrides, "run.name=straight"))
    assert_same_weights(tmp_path / "straight", tmp_path / "killed")
    # What the first process did after its last checkpoint was lost with it and is done again; nothing is left out.
    seen = positions(tmp_path / "killed")
    lost = len(seen) - 120
    assert 0 <= lost <= 2 * 8
    assert seen == list(range(resumed_at * 8 + lost)) + list(range(resumed_at * 8, 120))


def test_a_finished_run_has_nothing_left_to_do(dataset: Path, finished: Path) -> None:
    again = fit_here(tiny_config(dataset, finished, "run.name=a"))
    assert again.status == "nothing to do" and again.step == 10
    assert again.metrics["val/AP"] == again.metrics["val/AP"]


def test_an_evaluation_that_died_is_made_up_for(dataset: Path, finished: Path) -> None:
    manifest = finished / "a" / "checkpoints" / "step_00000010" / "manifest.json"
    content = json.loads(manifest.read_text())
    before, content["metrics"] = content["metrics"], None
    manifest.write_text(json.dumps(content))
    tracker = MemoryTracker()
    fit_here(tiny_config(dataset, finished, "run.name=a"), tracker)
    assert [step for step, _ in tracker.history("val/AP")] == [10]
    after = json.loads(manifest.read_text())["metrics"]
    assert after["val/AP"] == before["val/AP"]


def test_a_damaged_checkpoint_is_passed_over(dataset: Path, finished: Path) -> None:
    path = finished / "a" / "checkpoints" / "step_00000010" / "training.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    tracker = MemoryTracker()
    assert fit_here(tiny_config(dataset, finished, "run.name=a"), tracker).step == 10
    assert [step for step, _ in tracker.history("train/loss")] == list(range(6, 11))


def test_a_run_of_another_configuration_is_refused(dataset: Path, finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr: begun with 0\.0001, now 0\.001"):
        fit_here(tiny_config(dataset, finished, "run.name=a", "optim.lr=1e-3"))


def test_what_may_change_between_starts_may_change(dataset: Path, finished: Path) -> None:
    changes = ("train.micro_batch_size=2", "train.keep_last=1", "eval.batch_size=1", "tracking.experiment=other")
    assert fit_here(tiny_config(dataset, finished, "run.name=a", *changes)).status == "nothing to do"


def test_a_run_of_other_data_is_refused(finished: Path) -> None:
    other = make_dataset(finished / "other", seed=4)
    with pytest.raises(ConfigError, match="the train data"):
        fit_here(tiny_config(other, finished, "run.name=a"))


def test_two_writers_of_one_run_are_refused(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(dataset, tmp_path, "run.name=a")
    job = prepare_job(config, lambda line: None)
    with job.run.locked(), pytest.raises(ConfigError, match=r"being written by process \d+"):
        fit_here(config)


def test_storage_that_cannot_be_written_is_refused(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.storage"):
        fit_here(tiny_config(dataset, tmp_path / "file"))


def test_fewer_images_than_a_batch_are_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^40 training images are too few .* train\.global_batch_size=64"):
        fit_here(tiny_config(dataset, tmp_path, "train.global_batch_size=64"))


def break_image(dataset: Path, number: int = 5, folder: str = "train2017") -> str:
    path = sorted((dataset / folder).iterdir())[number]
    path.write_bytes(path.read_bytes()[:200])
    return path.name


def test_an_unreadable_image_ends_the_run_and_is_named(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data")
    name = break_image(dataset)
    with pytest.raises(RunFailed, match=name) as failure:
        fit_here(tiny_config(dataset, tmp_path))
    assert failure.value.agreed and "data.on_bad_image=skip" in str(failure.value)


def test_an_unreadable_image_can_be_left_out_and_is_counted(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data")
    break_image(dataset)
    tracker = MemoryTracker()
    result = fit_here(tiny_config(dataset, tmp_path, "data.on_bad_image=skip"), tracker)
    assert result.status == "finished"
    assert sum(value for _, value in tracker.history("train/bad_images")) == 2  # once an epoch


def test_an_unreadable_image_counts_once_however_often_it_is_met(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data")
    break_image(dataset)
    settings = ("run.name=a", "data.on_bad_image=skip", "data.max_bad_images=1", "train.epochs=4")
    config = tiny_config(dataset, tmp_path, *settings, "train.log_every_steps=1000")
    assert fit_here(config, stop_after=7).status == "stopped"
    assert fit_here(config).status == "finished"
    break_image(dataset, 6)
    other = tiny_config(dataset, tmp_path, *settings, "train.log_every_steps=1000", "run.name=b")
    with pytest.raises(RunFailed, match=r"2 different images could not be read, more than data\.max_bad_images=1"):
        fit_here(other)


def test_a_gpu_that_is_too_small_is_an_error_that_says_what_to_set(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised here by hand, as torch does on a GPU."""

    def run_out(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

    monkeypatch.setattr(Detr, "forward", run_out)
    with pytest.raises(RunFailed) as failure:
        fit_here(tiny_config(dataset, tmp_path))
    for part in ("step 0: ", " pixels do not fit", "train.micro_batch_size=auto", "train.recompute_encoder=true",
                 "Tried to allocate 2.00 GiB."):  # fmt: skip
        assert part in str(failure.value)
    assert failure.value.agreed, "Ray would start the only worker again, and a search the trial"


def test_images_that_were_unreadable_before_an_interruption_count(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data")
    settings = ("run.name=a", "data.on_bad_image=skip", "data.max_bad_images=1", "train.epochs=3")
    config = tiny_config(dataset, tmp_path, *settings)
    images = sorted((dataset / "train2017").iterdir())
    sound = images[5].read_bytes()
    break_image(dataset)
    assert fit_here(config, stop_after=6).status == "stopped"
    images[5].write_bytes(sound)
    break_image(dataset, 6)
    with pytest.raises(RunFailed, match=r"2 different images could not be read"):
        fit_here(config)


def test_too_many_unreadable_images_end_the_run(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data")
    break_image(dataset)
    with pytest.raises(RunFailed, match=r"data\.max_bad_images"):
        fit_here(tiny_config(dataset, tmp_path, "data.on_bad_image=skip", "data.max_bad_images=0"))


def test_an_unreadable_validation_image_counts_as_without_detections(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data")
    name = break_image(dataset, 3, "val2017")
    config = tiny_config(dataset, tmp_path, "run.name=a", "data.on_bad_image=skip")
    job = prepare_job(config, lambda line: None)
    lines: list[str] = []
    tracker = MemoryTracker()
    batches = LocalBatches(job.data.plan(1, 0), *job.data.loaders())
    result = TrainingLoop(job, LocalContext(say=lines.append), batches, tracker).run()
    assert result.status == "finished" and result.metrics["val/bad_images"] == 1
    assert tracker.history("val/bad_images") == [(5, 1.0), (10, 1.0)]
    assert len([line for line in lines if "WARNING" in line and name in line]) == 1, "said once"
    annotations = json.loads((dataset / "annotations" / "instances_val2017.json").read_text())["annotations"]
    assert f"8 images, {len(annotations)} annotated boxes, {7 * 8} detections" in result.table, "its boxes still count"
    assert fit_here(config).status == "nothing to do"


def test_an_unreadable_validation_image_ends_the_run_in_one_line_where_it_is_not_to_be_left_out(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data")
    job = prepare_job(tiny_config(dataset, tmp_path), lambda line: None)
    name = break_image(dataset, 3, "val2017")
    with pytest.raises(RunFailed, match=rf"a validation image cannot be read: .*{name}.*on_bad_image=skip") as failure:
        TrainingLoop(job, LocalContext(), LocalBatches(job.data.plan(1, 0), *job.data.loaders()), MemoryTracker()).run()
    assert failure.value.agreed and "\n" not in str(failure.value)


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_step_that_is_not_finite_ends_the_run_and_says_where(dataset: Path, tmp_path: Path, log_every: int) -> None:
    """Also where it is found in the step after it, because nobody asked for its numbers before."""
    settings = ("optim.lr=1e18", "optim.lr_backbone=1e18", "optim.clip_max_norm=0")
    with pytest.raises(RunFailed) as failure:
        fit_here(tiny_config(dataset, tmp_path, *settings, f"train.log_every_steps={log_every}"))
    message = str(failure.value)
    assert failure.value.agreed
    for part in ("step 1: not finite", "learning rates 1e+18", "image ids [", "optim.lr"):
        assert part in message
    assert "the weight" in message or "first module" in message


def test_steps_that_are_not_finite_can_be_left_out_up_to_a_limit(dataset: Path, tmp_path: Path) -> None:
    settings = ("optim.lr=1e18", "optim.lr_backbone=1e18", "optim.clip_max_norm=0", "train.on_nonfinite=skip")
    with pytest.raises(RunFailed, match=r"train\.max_nonfinite_steps"):
        fit_here(tiny_config(dataset, tmp_path, *settings, "train.max_nonfinite_steps=2"))
    runs = []
    for log_every in (1, 1000):
        name = f"every-{log_every}"
        config = tiny_config(dataset, tmp_path, *settings, f"run.name={name}", f"train.log_every_steps={log_every}")
        fit_here(config, stop_after=4)
        runs.append(tmp_path / name)
        store = CheckpointStore(str(tmp_path / name / "checkpoints"))
        latest = store.latest()
        assert latest is not None and store.load(latest, "training.pt")["num_skipped"] == 3, "all but the first"
    assert_same_weights(*runs)


def test_checkpoints_that_cannot_be_written_cost_the_run_only_at_its_end(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(dataset, tmp_path, "run.name=a", "train.checkpoint_every_steps=1")
    job = prepare_job(config, lambda line: None)
    lines: list[str] = []
    tracker = MemoryTracker()
    batches = LocalBatches(job.data.plan(1, 0), *job.data.loaders())
    loop = TrainingLoop(job, LocalContext(say=lines.append), batches, tracker)
    (tmp_path / "a" / "checkpoints").mkdir()
    for step in range(1, 11):
        (tmp_path / "a" / "checkpoints" / f"step_{step:08d}").write_text("a file in the way of the folder")
    with pytest.raises(RunFailed, match="the last checkpoint could not be written"):
        loop.run()
    assert len(tracker.history("train/loss")) == 10, "all steps were taken"
    assert sum("WARNING: no checkpoint at step" in line for line in lines) == 10


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_every_precision_trains(dataset: Path, tmp_path: Path, precision: str) -> None:
    tracker = MemoryTracker()
    fit_here(tiny_config(dataset, tmp_path, f"train.precision={precision}", "train.epochs=1"), tracker)
    losses = [value for _, value in tracker.history("train/loss")]
    assert len(losses) == 5 and all(0 < loss < 100 for loss in losses)


@pytest.mark.slow
def test_a_compiled_model_takes_the_same_steps(dataset: Path, tmp_path: Path) -> None:
    losses = {}
    fixed = make_dataset(tmp_path / "fixed", image_size=(64, 64))
    for choice in ("true", "false"):
        tracker = MemoryTracker()
        settings = ("train.epochs=1", "model.dropout=0", "data.augment.scales=[64]", "eval.size=64")
        fit_here(tiny_config(fixed, tmp_path, f"train.compile={choice}", *settings), tracker)
        losses[choice] = [value for _, value in tracker.history("train/loss")]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-3)


@pytest.mark.slow
def test_more_shapes_are_compiled_than_torch_would_do_by_itself() -> None:
    model = compiled(torch.nn.Conv2d(3, 4, 3))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for width in range(8, 20):
        model(torch.zeros(1, 3, 8, width))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 12


@pytest.mark.parametrize(("multiple", "warned"), [(1, True), (64, False)])
def test_compiling_for_many_shapes_is_warned_of(dataset: Path, tmp_path: Path, multiple: int, warned: bool) -> None:
    lines: list[str] = []
    prepare_job(tiny_config(dataset, tmp_path, "train.compile=true", f"data.pad_multiple={multiple}"), lines.append)
    assert any("data.pad_multiple" in line for line in lines) == warned


def test_one_epoch_without_validation_data(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data")
    split = f"data.train={{annotations: {dataset}/annotations/instances_train2017.json, images: {dataset}/train2017}}"
    config = tiny_config(dataset, tmp_path, "data.root=null", split)
    result = fit_here(config)
    assert result.status == "finished" and result.metrics == {} and result.best_checkpoint is None
