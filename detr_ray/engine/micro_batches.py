"""Finds the largest micro-batch that fits into memory by trials: ``train.micro_batch_size=auto``.

Each worker computes forward pass, loss and backward pass of random images with the shapes of the plan's largest
micro-batches. On a GPU it tries the whole share, and then halves the range of sizes. On a CPU, a process that takes too
much memory is killed, so the memory for one to four images is measured and extrapolated. All workers use the smallest
of their results. The result is kept in the run's folder, for a resumed run with the same workers. Neither the model nor
the results of training change: accumulation is exact.
"""

from __future__ import annotations

import functools
import gc
import json
import socket
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from detr_ray.callbacks import Say
from detr_ray.detector.inference import AUTOCAST_DTYPES
from detr_ray.engine.context import WorkerContext
from detr_ray.engine.cpu import PeakMemory, free_bytes, give_back_freed_memory
from detr_ray.engine.errors import RunFailed
from detr_ray.retries import reason_of
from detr_ray.structures import PaddedBatch, StepInfo, to_device

if TYPE_CHECKING:  # see the loop
    from detr_ray.engine.checkpoints.training_state import TrainingState
    from detr_ray.engine.job import TrainJob

FOUND = "micro_batch.json"
SHARE_OF_GPU, SHARE_OF_CPU = 0.9, 0.5
"""Share of the free memory that a step may take: data tasks and other processes need some, too."""
_MOST_PLANNED = 1_000_000


@dataclass(frozen=True)
class Shape:
    """Images, and their padded height and width in pixels."""

    count: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.count} x {self.height}x{self.width}"


def micro_batch_size(job: TrainJob, context: WorkerContext, state: TrainingState) -> int:
    """The number of images for this run and these workers; every worker must call it, before the model is wrapped.

    Args:
        job: the run.
        context: this worker's group.
        state: model, loss and optimizer; afterwards as before.

    Raises:
        RunFailed: not even one image fits, or a CPU's memory cannot be measured.
    """
    free = free_bytes() if context.device.type == "cpu" else torch.cuda.mem_get_info(context.device)[0]
    workers = context.gather((socket.gethostname(), _device_name(context.device), free))
    key: dict[str, Any] = {
        "devices": sorted({device for _, device, _ in workers}),
        "workers": context.world_size,
        "channels_last": job.config.train.channels_last,
        "recompute_encoder": job.config.train.recompute_encoder,
    }
    known = context.broadcast(_read(job.run.path, key) if context.rank == 0 else None)
    if known is not None:
        context.say(f"micro-batches of at most {known} images, as found before (train.micro_batch_size=auto)")
        return known
    host = workers[context.rank][0]
    here = [free for name, _, free in workers if name == host]
    memory = MemoryTrial(job, context, state)
    try:
        if context.device.type == "cpu":
            size, need = _largest_on_cpu(memory, int(SHARE_OF_CPU * min(here) / len(here)))
        else:
            size, need = largest_on_gpu(memory, int(SHARE_OF_GPU * free))
        problem = ""
    except RunFailed as error:
        size, need, problem = 0, "", str(error)
    answers = context.gather((size, need, problem))
    problem = next((problem for _, _, problem in answers if problem), "")
    if problem:
        raise RunFailed(problem, agreed=True)
    size, need, _ = min(answers)
    context.say(f"micro-batches of at most {size} images: {need} (train.micro_batch_size=auto)")
    if context.rank == 0:
        _write(job.run.path, {**key, "size": size}, context.say)
    return size


def epochs_looked_at(epochs: int, epoch_samples: int, changes: Collection[int]) -> list[int]:
    """The epochs whose batches are searched for the largest one: all, or some from all parts of the run.

    The first and the last are among them, and those in which the augmentation changes (an entry of
    ``data.augment.transforms`` ends), because batches differ from then on.

    Args:
        epochs: of the run.
        epoch_samples: samples of one.
        changes: epochs in which the augmentation changes.
    """
    most = max(1, _MOST_PLANNED // epoch_samples)
    spread = np.linspace(0, epochs - 1, min(epochs, most)).astype(int).tolist()
    return sorted({0, *spread, epochs - 1, *(epoch for epoch in changes if epoch < epochs)})


def largest_shape(epoch_sizes: Iterable[np.ndarray], size: int, world_size: int, pad_multiple: int = 1) -> Shape:
    """The micro-batch with the most pixels.

    Args:
        epoch_sizes: for each epoch the planned sizes of its samples, ``[steps, global batch size, 2]``; see
            `Planner.epoch_sizes`.
        size: most images of a micro-batch.
        world_size: number of workers.
        pad_multiple: heights and widths are multiples of it.
    """
    from detr_ray.data.planner import share_bounds

    found = Shape(0, 0, 0)
    ranks = range(world_size)
    for of_epoch in epoch_sizes:
        sizes = -(-of_epoch.astype(np.int64) // pad_multiple) * pad_multiple
        for first, last in (b for rank in ranks for b in share_bounds(sizes.shape[1], world_size, rank, size)):
            height, width = sizes[:, first:last].max(axis=1).T
            step = int((height * width).argmax())
            shape = Shape(last - first, int(height[step]), int(width[step]))
            found = max(found, shape, key=lambda shape: shape.count * shape.height * shape.width)
    return found


class MemoryTrial:
    """Computes forward and backward passes on random batches, without an update.

    Args:
        job: the run.
        context: this worker's group; says the device and the number of workers.
        state: model, loss and optimizer.

    Attributes:
        device: where the steps are computed.
    """

    def __init__(self, job: TrainJob, context: WorkerContext, state: TrainingState) -> None:
        self._job, self._state, self.device = job, state, context.device
        self._shapes: dict[int, Shape] = {}
        self._world_size = context.world_size
        assert job.data.train is not None
        from detr_ray.data.statistics import count_boxes

        # A mosaic has the boxes of four images.
        self._boxes = max(1, min(4 * count_boxes(job.data.train).most, state.model.num_queries))
        # AdamW makes its moments at the first update, and a run that goes on has them already.
        pending = [] if state.optimizer.state else [p for p in state.model.parameters() if p.requires_grad]
        self._moments = [2 * parameter.numel() for parameter in pending]

    @property
    def sizes(self) -> list[int]:
        """All sizes that give different micro-batches of a worker's largest share, ascending."""
        share = -(-self._job.config.train.global_batch_size // self._world_size)
        return sorted({-(-share // passes) for passes in range(1, share + 1)})

    def shape(self, size: int) -> Shape:
        """The largest micro-batch of at most so many images."""
        if size not in self._shapes:
            self._shapes[size] = largest_shape(
                self._planned, size, self._world_size, self._job.config.data.pad_multiple
            )
        return self._shapes[size]

    @functools.cached_property
    def _planned(self) -> list[np.ndarray]:
        """The planned sizes of the samples of some epochs; each takes as long as planning an epoch."""
        planner, config = self._job.data.planner, self._job.config
        ends = [getattr(transform, "until_epoch", None) for transform in config.data.augment.transforms]
        samples = planner.steps_per_epoch * planner.global_batch_size
        epochs = min(config.train.epochs, -(-self._job.total_steps // planner.steps_per_epoch))
        return [
            planner.epoch_sizes(epoch)
            for epoch in epochs_looked_at(epochs, samples, [end for end in ends if end is not None])
        ]

    def run(self, shape: Shape) -> None:
        """Takes forward pass, loss and backward pass of one batch; weights, gradients and statistics stay.

        Raises:
            torch.cuda.OutOfMemoryError: it does not fit.
        """
        model = self._state.model
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        moments = [torch.zeros(count, device=self.device) for count in self._moments]
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                self._step(shape)
        finally:
            del moments
            self._state.optimizer.zero_grad(set_to_none=True)
            for name, value in model.named_buffers():
                value.copy_(buffers[name])

    def _step(self, shape: Shape) -> None:
        model, criterion, config = self._state.model, self._state.criterion, self._job.config
        dtype = AUTOCAST_DTYPES[config.train.precision]
        info = StepInfo(config.run.seed, 0, self._boxes)
        batch = to_device(self._made_up(shape), self.device, model.pixels, config.train.channels_last, info)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            outputs = model.train()(*model.inputs_of(batch))
        losses = criterion(outputs, batch.targets, criterion.normalisers([self._boxes] * shape.count))
        criterion.total(losses).backward()

    def _made_up(self, shape: Shape) -> PaddedBatch:
        """A batch of noise; all images but the first are padded, and each has four times the most boxes of an image."""
        count, boxes = shape.count, shape.count * self._boxes
        rng = np.random.default_rng(0)
        sizes = np.full((count, 2), (shape.height, shape.width), np.int32)
        sizes[1:, 0] -= 1
        return PaddedBatch(
            images=rng.integers(0, 256, (count, shape.height, shape.width, 3), np.uint8).transpose(0, 3, 1, 2),
            sizes=sizes,
            orig_sizes=sizes,
            image_ids=np.arange(count),
            positions=np.arange(count),
            labels=np.zeros(boxes, np.int64),
            boxes_cxcywh=rng.uniform(0.2, 0.4, (boxes, 4)).astype(np.float32),
            counts=np.full(count, self._boxes, np.int64),
        )


def largest_on_gpu(trial: MemoryTrial, limit: int) -> tuple[int, str]:
    """The largest size that takes at most ``limit`` bytes of a GPU, and a description of the result."""
    device = trial.device

    def fits(size: int) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        ran_out = False
        try:
            trial.run(trial.shape(size))
        except torch.cuda.OutOfMemoryError:
            ran_out = True
        # Not within the handler, where the error still holds the memory of the failed step.
        gc.collect()
        needed[size] = torch.cuda.max_memory_reserved(device) - before
        torch.cuda.empty_cache()
        return not ran_out and needed[size] <= limit

    needed: dict[int, int] = {}
    return _worded(trial, largest_fitting(trial.sizes, fits), needed, limit, "GPU memory")


def _largest_on_cpu(trial: MemoryTrial, limit: int) -> tuple[int, str]:
    """The same for the memory of a machine; only small sizes are tried."""
    tried = [size for size in trial.sizes if size <= 4]
    needed: dict[int, int] = {}
    try:
        for size in tried:
            give_back_freed_memory()
            peak = PeakMemory()
            before = peak.read()
            trial.run(trial.shape(size))
            needed[size] = peak.read() - before
            if needed[size] > limit:
                break
    except OSError as error:
        raise RunFailed(
            f"train.micro_batch_size: the memory of this process cannot be measured ({reason_of(error)}); give a number"
        ) from error
    if limit <= 0:
        raise RunFailed("train.micro_batch_size: this system does not say how much memory is free; give a number")

    def fits(size: int) -> bool:
        if size not in needed:
            needed[size] = _extrapolated(needed, size, lambda size: _pixels(trial.shape(size)))
        return needed[size] <= limit

    return _worded(trial, largest_fitting(trial.sizes, fits), needed, limit, "memory")


def _extrapolated(needed: dict[int, int], size: int, pixels: Callable[[int], int]) -> int:
    """Memory for a size: that of the largest tried one, and for further pixels the largest memory per pixel."""
    tried = sorted(needed)
    largest = tried[-1]
    per_pixel = max(needed[size] / pixels(size) for size in tried)
    return int(needed[largest] + per_pixel * (pixels(size) - pixels(largest)))


def _pixels(shape: Shape) -> int:
    return shape.count * shape.height * shape.width


def largest_fitting(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The largest of ascending sizes that fits, by bisection; 0 if none does."""
    first, last = 0, len(sizes)
    if sizes and fits(sizes[-1]):
        return sizes[-1]
    last -= 1
    while first < last:
        middle = (first + last) // 2
        if fits(sizes[middle]):
            first = middle + 1
        else:
            last = middle
    return sizes[first - 1] if first else 0


def _worded(trial: MemoryTrial, size: int, needed: dict[int, int], limit: int, what: str) -> tuple[int, str]:
    if not size:
        least = min(needed)
        raise RunFailed(
            f"train.micro_batch_size: one image of the largest planned size ({trial.shape(least)}) takes "
            f"{needed[least] / 1e9:.1f} GB, and {limit / 1e9:.1f} GB of {what} can be used; lower "
            "data.augment.max_size and scales, take a smaller model, train.precision=bf16 or "
            "train.recompute_encoder=true"
        )
    return size, (
        f"the largest planned batch of that ({trial.shape(size)}) takes {needed[size] / 1e9:.1f} of the "
        f"{limit / 1e9:.1f} GB of {what} that can be used"
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory >> 30} GiB"


def _read(run_path: str, key: dict[str, Any]) -> int | None:
    """The result of an earlier trial on the same devices; None if there is none, or it cannot be read."""
    from detr_ray.addresses import join
    from detr_ray.locations import read_bytes

    try:
        content = json.loads(read_bytes(join(run_path, FOUND)))
        return int(content["size"]) if all(content.get(name) == value for name, value in key.items()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(run_path: str, content: dict[str, Any], say: Say) -> None:
    from detr_ray.addresses import join
    from detr_ray.locations import write_bytes

    try:
        write_bytes(join(run_path, FOUND), json.dumps(content, indent=1).encode())
    except OSError as error:
        say(f"WARNING: run.storage: {FOUND} cannot be written: {reason_of(error)}; the next start tries sizes again")
