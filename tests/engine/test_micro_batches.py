"""``train.micro_batch_size=auto``: the largest that fits into memory, found before the first step, on all workers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from observing import small_config, without_validation
from recorded import final_weights
from tiny import fit_here, make_dataset

from detr_ray.config import Config, ConfigError
from detr_ray.engine import micro_batches
from detr_ray.engine.checkpoints.training_state import TrainingState
from detr_ray.engine.context import LocalContext
from detr_ray.engine.cpu import PeakMemory, free_bytes
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.job import TrainJob, prepare_job
from detr_ray.engine.micro_batches import (
    MemoryTrial,
    Shape,
    epochs_looked_at,
    largest_fitting,
    largest_on_gpu,
    largest_shape,
    micro_batch_size,
)

AUTO = "train.micro_batch_size=auto"
IMAGE = 1000
"""Bytes that a pixel takes, where memory is made up."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes", num_train=16, num_val=2, image_size=(48, 64))


def configured(dataset: Path, folder: Path, *overrides: str) -> Config:
    keys = ("run.name=a", "train.global_batch_size=8", "data.augment.scales=[48, 64]", *without_validation(dataset))
    return small_config(dataset, folder, *keys, *overrides)


def job_of(config: Config) -> TrainJob:
    return prepare_job(config, lambda line: None)


class MadeUpMemory:
    """A machine with so many bytes, and a process that takes some for each pixel of a trial."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, fixed: int = 0) -> None:
        self.tried: list[Shape] = []
        self._fixed = fixed
        monkeypatch.setattr(micro_batches, "free_bytes", lambda: free)
        monkeypatch.setattr(micro_batches, "PeakMemory", lambda: self)
        monkeypatch.setattr(MemoryTrial, "run", self._run)
        self._held = 0

    def _run(self, shape: Shape) -> None:
        self.tried.append(shape)
        self._held = self._fixed + IMAGE * shape.count * shape.height * shape.width

    def read(self) -> int:
        held, self._held = self._held, 0
        return held


@pytest.mark.parametrize("sizes", [[1], [1, 2], [1, 2, 3, 4, 6, 11], list(range(1, 33))])
def test_the_largest_that_fits_is_found(sizes: list[int]) -> None:
    for most in range(sizes[-1] + 2):
        tried: list[int] = []

        def fits(size: int, most: int = most, tried: list[int] = tried) -> bool:
            tried.append(size)
            return size <= most

        assert largest_fitting(sizes, fits) == max((size for size in sizes if size <= most), default=0)
        assert len(tried) <= 2 + len(sizes).bit_length() and len(set(tried)) == len(tried)


@pytest.mark.parametrize(("world_size", "size"), [(1, 3), (3, 8)])
def test_the_largest_batch_is_the_largest_of_the_plan(
    dataset: Path, tmp_path: Path, world_size: int, size: int
) -> None:
    job = job_of(configured(dataset, tmp_path, "data.augment.scales=[32, 48, 64]", "train.epochs=3"))
    shapes = set()
    for rank, step in itertools.product(range(world_size), range(job.total_steps)):
        for batch in job.data.plan(world_size, rank, size).step(step):
            height, width = (max(sample.size[side] for sample in batch) for side in (0, 1))
            shapes.add((len(batch) * height * width, Shape(len(batch), height, width)))
    planned = [job.data.planner.epoch_sizes(epoch) for epoch in range(3)]
    found = largest_shape(planned, size, world_size)
    pixels = found.count * found.height * found.width
    assert pixels == max(shapes, key=lambda pair: pair[0])[0] and (pixels, found) in shapes
    padded = largest_shape(planned, size, world_size, pad_multiple=64)
    assert (padded.height % 64, padded.width % 64) == (0, 0) and padded.height >= found.height


def test_epochs_of_the_whole_run_are_looked_at(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert epochs_looked_at(300, epoch_samples=1000, changes=()) == list(range(300))
    monkeypatch.setattr(micro_batches, "_MOST_PLANNED", 5000)
    assert epochs_looked_at(300, 1000, [45, 300, 45]) == [0, 45, 74, 149, 224, 299]
    assert epochs_looked_at(300, 10**6, ()) == [0, 299] and epochs_looked_at(1, 10**6, ()) == [0]
    # Images become larger when an entry of the list ends.
    monkeypatch.setattr(micro_batches, "_MOST_PLANNED", 1)
    ends = "data.augment.transforms=[iou_crop: {p: 1, aspect: [1, 1], until_epoch: 5}, detr]"
    job = job_of(configured(dataset, tmp_path, "data.augment.scales=[48]", ends, "train.epochs=8"))
    shapes = [largest_shape([job.data.planner.epoch_sizes(epoch)], 1, 1) for epoch in range(8)]
    largest = max(shapes, key=lambda shape: shape.height * shape.width)
    assert largest in (shapes[5], shapes[7]) and largest not in shapes[:5], "the test shows something"
    assert MemoryTrial(job, LocalContext(), TrainingState(job, LocalContext())).shape(1) == largest


@pytest.mark.parametrize("largest", [1, 4, 8])
def test_on_cpus_a_share_of_the_free_memory_is_filled_by_what_small_batches_took(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    job = job_of(configured(dataset, tmp_path, AUTO, "data.augment.scales=[64]", "data.augment.max_size=64"))
    shape = largest_shape([job.data.planner.epoch_sizes(0)], largest, 1)
    needed = IMAGE * shape.count * shape.height * shape.width
    memory = MadeUpMemory(monkeypatch, free=int(needed / micro_batches.SHARE_OF_CPU) + 1000)
    context = LocalContext(say=(lines := []).append)
    assert micro_batch_size(job, context, TrainingState(job, context)) == largest
    assert max(shape.count for shape in memory.tried) <= 4, "more could be too much"
    assert lines == [
        f"micro-batches of at most {largest} images: the largest planned batch of that ({shape}) takes "
        f"{needed / 1e9:.1f} of the {needed / 1e9:.1f} GB of memory that can be used (train.micro_batch_size=auto)"
    ]


def test_on_gpus_running_out_of_memory_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the allocator says is made up here; with a real one: ``tests/gpu/test_gpu_micro_batches.py``."""
    device_bytes, held = 20, [0]

    class Trial:
        device, sizes = torch.device("cpu"), [1, 2, 3, 5, 9, 30]

        def shape(self, size: int) -> Shape:
            return Shape(size, 1, 1)

        def run(self, shape: Shape) -> None:
            held[0] = min(shape.count, device_bytes)
            if shape.count > device_bytes:
                raise torch.cuda.OutOfMemoryError("made up")

    for name, answer in {
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_reserved": lambda device: 0,
        "max_memory_reserved": lambda device: held[0],
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    for limit, expected in ((100, 9), (8, 5), (1, 1)):
        assert largest_on_gpu(Trial(), limit)[0] == expected  # type: ignore[arg-type]
    with pytest.raises(RunFailed, match="one image of the largest planned size"):
        largest_on_gpu(Trial(), 0)  # type: ignore[arg-type]


def test_all_workers_take_the_smallest_answer_and_share_their_machine(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Two(LocalContext):
        world_size = 2

        def gather(self, item: Any) -> list[Any]:
            return [item, (item[0], *item[1:]) if isinstance(item[0], str) else (1, "of the other", "")]

    job = job_of(configured(dataset, tmp_path, AUTO))
    memory = MadeUpMemory(monkeypatch, free=10**12)
    lines: list[str] = []
    assert micro_batch_size(job, Two(say=lines.append), TrainingState(job, LocalContext())) == 1
    assert "of the other" in lines[0] and memory.tried
    assert json.loads((tmp_path / "a" / "micro_batch.json").read_text()) == {
        "devices": ["cpu"], "workers": 2, "channels_last": True, "recompute_encoder": False, "size": 1
    }  # fmt: skip
    limits = []
    monkeypatch.setattr(micro_batches, "_largest_on_cpu", lambda trial, limit: limits.append(limit) or (1, ""))
    for context in (Two(), LocalContext()):
        (tmp_path / "a" / "micro_batch.json").unlink(missing_ok=True)
        micro_batch_size(job, context, TrainingState(job, LocalContext()))
    assert limits[1] == 2 * limits[0] == micro_batches.SHARE_OF_CPU * 10**12


@pytest.mark.parametrize(
    "architecture",
    [(), ("model.architecture=dino", "model.num_feature_levels=2", "model.denoising_queries=6")],
    ids=["detr", "dino"],
)
def test_a_trial_leaves_everything_as_it_was(dataset: Path, tmp_path: Path, architecture: tuple[str, ...]) -> None:
    keys = ("model.dropout=0.5", "optim.ema_decay=0.9", *architecture)
    job, context = job_of(configured(dataset, tmp_path, *keys)), LocalContext()
    state = TrainingState(job, context)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    torch.manual_seed(3)
    random = torch.get_rng_state()
    trial = MemoryTrial(job, context, state)
    assert trial.sizes == [1, 2, 3, 4, 8]
    masks = []
    hook = state.model.register_forward_pre_hook(lambda model, inputs: masks.append(inputs[1]))
    trial.run(Shape(3, 48, 64))
    hook.remove()
    assert masks[0] is not None and masks[0].any(), "padding takes memory, too"
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())
    assert not [name for name, parameter in state.model.named_parameters() if parameter.grad is not None]
    assert not state.optimizer.state


def test_results_are_those_of_the_same_number_given_and_a_run_that_goes_on_keeps_it(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = largest_shape([job_of(configured(dataset, tmp_path / "look")).data.planner.epoch_sizes(0)], 2, 1)
    memory = MadeUpMemory(monkeypatch, free=2 * IMAGE * one.count * one.height * one.width)
    config = configured(dataset, tmp_path / "auto", AUTO)
    fit_here(config, stop_after=1)
    assert memory.tried
    memory.tried.clear()
    fit_here(config)
    assert not memory.tried, "the number is known"
    fit_here(configured(dataset, tmp_path / "two", "train.micro_batch_size=2"))
    found, expected = (final_weights(tmp_path / name / "a", 2) for name in ("auto", "two"))
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_what_does_not_fit_is_said(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(dataset, tmp_path, AUTO)
    MadeUpMemory(monkeypatch, free=IMAGE)
    with pytest.raises(RunFailed, match=r"one image of the largest planned size \(1 x \d+x\d+\) takes") as failed:
        fit_here(config)
    assert failed.value.agreed
    MadeUpMemory(monkeypatch, free=0)
    with pytest.raises(RunFailed, match="does not say how much memory is free; give a number"):
        fit_here(config)
    for wrong, message in (
        ("train.micro_batch_size=all", "must be auto or a whole number"),
        ("train.micro_batch_size=0", "must be at least 1"),
        ("train.micro_batch_size=1.5", "must be a whole number or auto"),
    ):
        with pytest.raises(ConfigError, match=message):
            configured(dataset, tmp_path, wrong)
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size: must be a number or null with train\.compile"):
        configured(dataset, tmp_path, AUTO, "train.compile=true")


def test_the_memory_of_this_process_and_machine_is_measured() -> None:
    assert free_bytes() > 1 << 26
    peak = PeakMemory()
    before = peak.read()
    block = torch.ones(1 << 25, dtype=torch.uint8)
    del block
    assert 0.9 * (1 << 25) < peak.read() - before < 1.5 * (1 << 25), "also of what is free again"
