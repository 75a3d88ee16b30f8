"""Every key that may change when a run goes on: what comes of it is what an undisturbed run would have given.

A key that becomes free needs a case here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Template

import pytest
import torch
from recorded import final_weights
from tiny import fit_here, make_dataset, tiny_config
from torchvision.models import resnet18

from detr_ray.config import Config, TrackingConfig, TuneConfig
from detr_ray.config.schema import all_keys
from detr_ray.data.formats import open_split
from detr_ray.data.packing import write_shards
from detr_ray.engine.checkpoints.run_directory import is_free
from detr_ray.engine.checkpoints.store import CheckpointStore
from detr_ray.engine.job import prepare_job
from detr_ray.engine.reporting.progress import FitResult
from detr_ray.tracking import MemoryTracker

STOPPED_AT, STEPS = 3, 8
BASE = (
    "run.name=a",
    "model.dropout=0",
    "data.augment.scales=[48]",
    "train.global_batch_size=4",
    "train.log_every_steps=2",
)


@dataclass(frozen=True)
class Runs:
    """Two runs of the same configuration, one of which was stopped in the middle of an epoch."""

    folder: Path
    dataset: Path
    start: dict[str, torch.Tensor]
    straight: dict[str, torch.Tensor]
    metrics: list[tuple[int, dict[str, float]]]


@dataclass(frozen=True)
class Ended:
    """What the stopped run gave when it went on with something changed."""

    result: FitResult
    run: Path
    tracker: MemoryTracker


def same_weights(runs: Runs, ended: Ended) -> None:
    assert ended.result.status == "finished"
    found = final_weights(ended.run, STEPS)
    assert [name for name, value in runs.straight.items() if not torch.equal(value, found[name])] == []


def nearly_same_weights(runs: Runs, ended: Ended) -> None:
    """As far as rounding in another order allows."""
    found = final_weights(ended.run, STEPS)
    names = [name for name, value in runs.straight.items() if value.is_floating_point()]
    moved, expected = (torch.cat([(w[n] - runs.start[n]).flatten() for n in names]) for w in (found, runs.straight))
    assert float((moved - expected).norm() / expected.norm()) < 0.02


def same_metrics(runs: Runs, ended: Ended) -> None:
    """The same means at the steps where both were logged, those of the interval that was cut among them."""
    expected = dict(runs.metrics)
    logged = [(step, values) for step, values in ended.tracker.metrics if "train/loss" in values and step in expected]
    assert [step for step, _ in logged] == [4, 6, 8]
    for step, values in logged:
        for name in ("train/loss", "train/loss_giou_0", "train/class_error", "train/grad_norm", "perf/padding_frac"):
            assert values[name] == pytest.approx(expected[step][name], rel=1e-12), (step, name)


def kept(*steps: int) -> Callable[[Runs, Ended], None]:
    def check(runs: Runs, ended: Ended) -> None:
        store = CheckpointStore(str(ended.run / "checkpoints"))
        assert {info.step for info in store.checkpoints()} - {best.step if (best := store.best()) else 0} <= {*steps}

    return check


def logged_at(*steps: int) -> Callable[[Runs, Ended], None]:
    def check(runs: Runs, ended: Ended) -> None:
        assert [step for step, _ in ended.tracker.history("train/loss")] == [*steps]

    return check


def evaluated_at(*steps: int) -> Callable[[Runs, Ended], None]:
    def check(runs: Runs, ended: Ended) -> None:
        assert [step for step, _ in ended.tracker.history("val/AP")] == [*steps]

    return check


def records_no_stream(runs: Runs, ended: Ended) -> None:
    lines = (ended.run / "stream" / "rank-00000.jsonl").read_text().splitlines()
    assert len(lines) == STOPPED_AT


@dataclass(frozen=True)
class Case:
    """A change.

    Attributes:
        keys: the free keys that it is a case of.
        changed: overrides of the start that goes on; ``$name`` stands for a place in the test's folder.
        checks: what must hold.
        marks: of the test.
        between: overrides of a start in between, which comes to its own end; none for no such start.
    """

    keys: tuple[str, ...]
    changed: tuple[str, ...]
    checks: tuple[Callable[[Runs, Ended], None], ...] = (same_weights, same_metrics)
    marks: tuple[pytest.MarkDecorator, ...] = ()
    between: tuple[str, ...] = ()


def split(name: str, root: str) -> str:
    return f"data.{name}={{annotations: {root}/annotations/instances_{name}2017.json, images: {root}/{name}2017}}"


CASES = {
    "nothing": Case((), ()),
    "moved storage": Case(("run.storage",), ()),  # every case goes on with a copy in another storage
    "moved data": Case(("data.root",), ("data.root=$copy",)),
    "named format": Case(("data.format",), ("data.format=coco",)),
    "data by its parts": Case(
        ("data.train.annotations", "data.train.images", "data.val.annotations", "data.val.images"),
        ("data.root=null", split("train", "$copy"), split("val", "$copy")),
    ),
    "shards": Case(
        ("data.train.shards", "data.val.shards"),
        ("data.root=null", "data.train={shards: $shards/train}", "data.val={shards: $shards/val}"),
    ),
    "drawn again": Case(
        tuple(f"data.generate.{name}" for name in (
            "num_train", "num_val", "seed", "image_size", "max_objects", "min_object_size", "empty_fraction", "clutter"
        )),
        ("data.root=$drawn", "data.generate={num_train: 16, num_val: 4, seed: 3, image_size: [64, 64], "
         "max_objects: 3}"),
    ),
    "where data tasks run": Case(
        ("data.tasks_per_worker", "data.prefetch_batches", "data.follow_links"),
        ("data.tasks_per_worker=3", "data.prefetch_batches=1", "data.follow_links=true"),
    ),
    "bad images": Case(
        ("data.on_bad_image", "data.max_bad_images"), ("data.on_bad_image=skip", "data.max_bad_images=0")
    ),
    "first weights": Case(
        ("model.init_from", "model.backbone_weights", "run.fork_from"),
        ("model.init_from=/gone.pt", "model.backbone_weights=/gone.pt", "run.fork_from=/gone"),
    ),
    "micro-batches": Case(("train.micro_batch_size",), ("train.micro_batch_size=2",), (nearly_same_weights,)),
    "no channels last": Case(("train.channels_last",), ("train.channels_last=false",), (nearly_same_weights,)),
    "encoder computed twice": Case(("train.recompute_encoder",), ("train.recompute_encoder=true",)),
    "compiled": Case(("train.compile",), ("train.compile=true",), (nearly_same_weights,), (pytest.mark.slow,)),
    "checkpoints": Case(
        ("train.checkpoint_every_steps", "train.keep_last"),
        ("train.checkpoint_every_steps=1", "train.keep_last=1"),
        (same_weights, same_metrics, kept(STEPS)),
    ),
    "logging": Case(
        ("train.log_every_steps", "train.record_stream"),
        ("train.log_every_steps=5", "train.record_stream=false"),
        (same_weights, logged_at(5, 8), records_no_stream),
    ),
    "what is not finite": Case(
        ("train.on_nonfinite", "train.max_nonfinite_steps"), ("train.on_nonfinite=skip", "train.max_nonfinite_steps=0")
    ),
    "faults": Case(
        ("train.max_failures", "train.stall_timeout_s", "train.start_timeout_s", "train.resize_check_s"),
        ("train.max_failures=0", "train.stall_timeout_s=500", "train.start_timeout_s=5", "train.resize_check_s=5"),
    ),
    "where workers run": Case(
        ("train.worker_resource", "train.use_gpu", "train.num_workers"),
        ("train.worker_resource=special", "train.use_gpu=null", "train.num_workers=1"),
    ),
    "early stopping": Case(
        tuple(f"train.early_stopping.{name}" for name in ("patience", "min_delta", "metric")),
        ("train.early_stopping={patience: 9, min_delta: 0.5, metric: val/AP50}",),
    ),
    "an end in between": Case(("train.max_steps",), (), between=("train.max_steps=5",)),
    "evaluation": Case(
        tuple(f"eval.{name}" for name in (
            "every_epochs", "size", "max_size", "batch_size", "max_detections", "checkpoint"
        )),
        ("eval={every_epochs: 0, size: 64, max_size: 80, batch_size: 1, max_detections: 7, checkpoint: /gone}",),
        (same_weights, same_metrics, evaluated_at(STEPS)),
    ),
    "records": Case(
        tuple(f"tracking.{name}" for name in TrackingConfig.model_fields),
        (
            "tracking={enabled: true, uri: 'sqlite:///$copy/other.db', experiment: other}",
            "tracking.register=true", "tracking.model_name=other", "tracking.champion_margin=0.1",
        ),
    ),
    "a search": Case(
        tuple(f"tune.{name}" for name in TuneConfig.model_fields),
        ("tune={name: s, space: {optim.lr: {uniform: [0, 1]}}, trials: 3, scheduler: asha, seed: 7}",),
    ),
    "launcher": Case(
        ("train.launcher",), ("train.launcher=ray", "train.num_workers=1"), (same_weights,),
        (pytest.mark.ray, pytest.mark.slow),
    ),
}  # fmt: skip


def test_every_free_key_has_a_case() -> None:
    keys = [key.path for key in all_keys() if not key.is_section]
    free = {key for key in keys if is_free(key)}
    assert free == {key for case in CASES.values() for key in case.keys}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    dataset = make_dataset(folder / "data", num_train=16, num_val=4, image_size=(64, 64))
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), folder / "resnet18.pt")
    tracker = MemoryTracker()
    config = configured(dataset, folder / "straight")
    fit_here(config, tracker)
    fit_here(configured(dataset, folder / "stopped"), stop_after=STOPPED_AT)
    start = prepare_job(configured(dataset, folder / "start"), print).build_detector().model.state_dict()
    metrics = [(step, values) for step, values in tracker.metrics if "train/loss" in values]
    return Runs(folder, dataset, start, final_weights(folder / "straight" / "a", STEPS), metrics)


def configured(dataset: Path, storage: Path, *overrides: str) -> Config:
    """Frozen norms and images of one size: parts of a batch would be normalised, and padded, by themselves."""
    weights = dataset.parent / "resnet18.pt"
    frozen = ("model.backbone_norm=frozen", f"model.backbone_weights={weights}")
    return tiny_config(dataset, storage, *frozen, *BASE, *overrides)


@pytest.fixture(scope="module")
def places(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The data set elsewhere and in another form, and where it is drawn again."""
    folder = tmp_path_factory.mktemp("places")
    copy, shards = folder / "copy", folder / "shards"
    shutil.copytree(runs.dataset, copy)
    for name in ("train", "val"):
        write_shards(open_split(str(copy), None, name), f"{shards}/{name}")
    return {"copy": copy, "shards": shards, "drawn": folder / "drawn"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=case.marks) for name, case in CASES.items()])
def test_going_on_with_another_value_is_never_having_stopped(
    runs: Runs, places: dict[str, Path], tmp_path: Path, name: str
) -> None:
    case, storage = CASES[name], tmp_path / "storage"
    shutil.copytree(runs.folder / "stopped", storage)
    changed = [Template(item).substitute(places) for item in case.changed]
    config = configured(runs.dataset, storage, *changed)
    tracker = MemoryTracker()
    if case.between:
        fit_here(configured(runs.dataset, storage, *case.between), tracker)
    if config.train.launcher == "ray":
        from detr_ray.runtime.launch import fit

        result = fit(config)
    else:
        result = fit_here(config, tracker)
    for check in case.checks:
        check(runs, Ended(result, storage / "a", tracker))


@pytest.mark.parametrize(
    "changed", ["eval.size=64", "eval.max_size=70", "eval.max_detections=1", "other validation data"]
)
def test_the_best_is_one_of_those_that_were_measured_alike(runs: Runs, tmp_path: Path, changed: str) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(runs.folder / "stopped", storage)
    fit_here(configured(runs.dataset, storage, "train.max_steps=4"))
    manifest = storage / "a" / "checkpoints" / "step_00000004" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["metrics"]["val/AP"] = 2.0
    manifest.write_text(json.dumps(content))
    unchanged = tmp_path / "unchanged"
    shutil.copytree(storage, unchanged)
    same = fit_here(configured(runs.dataset, unchanged, "train.keep_last=1"))
    assert same.best_checkpoint == str(unchanged / "a" / "checkpoints" / "step_00000004")
    overrides = (changed,)
    if changed == "other validation data":
        other = make_dataset(tmp_path / "other", num_train=16, num_val=4, max_objects=1)
        overrides = ("data.root=null", split("train", str(runs.dataset)), split("val", str(other)))
    result = fit_here(configured(runs.dataset, storage, *overrides, "train.keep_last=1"))
    assert result.best_checkpoint == str(storage / "a" / "checkpoints" / f"step_{STEPS:08d}")
    store = CheckpointStore(str(storage / "a" / "checkpoints"))
    assert [info.step for info in store.checkpoints()] == [4, STEPS], "what was best before is kept"
