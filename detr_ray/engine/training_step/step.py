"""One optimizer step: forward, loss, backward and update over a worker's micro-batches.

Before the forward pass all workers add up a few numbers in one small all-reduce. These are the normalisers of the loss
over the global batch, and each worker's largest number of boxes of an image, so that neither the number of workers nor
accumulation changes the gradient; and whether a worker failed or was asked to stop, so that all workers stop after the
same step. The random numbers of a step (dropout) depend on seed, step and rank alone, so that a resumed run draws the
same numbers as an uninterrupted one.

On a GPU, the CPU waits for the device once a step: for the costs of the matching, which the CPU solves. At that point
it also reads whether the previous update was finite, which needs no further wait.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from detr_ray.detector.inference import AUTOCAST_DTYPES
from detr_ray.engine.context import LeaveReason, WorkerContext, most_urgent
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.training_step.nonfinite import describe_nonfinite, float_tensors
from detr_ray.engine.training_step.optimizer import clipped_update
from detr_ray.loss import NonFiniteOutputs, SetCriterion
from detr_ray.model.detection_model import DetectionModel
from detr_ray.structures import Batch, HostCopy, ModelOutput, PaddedBatch, StepInfo, to_device

MOST_COMPILED = 512
"""Most versions of a compiled model, one for each input shape; further shapes run uncompiled."""


@dataclass
class StepTimes:
    """Seconds that a worker spent in each phase, summed over steps."""

    data_wait: float = 0.0
    forward: float = 0.0
    loss: float = 0.0
    backward: float = 0.0
    update: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all phases."""
        return self.data_wait + self.forward + self.loss + self.backward + self.update


@dataclass
class StepOutcome:
    """The result of one step on this worker.

    Attributes:
        losses: this worker's part of each loss and of ``loss``, the weighted total (the sum over workers is the loss of
            the step), and the criterion's errors, summed over micro-batches; detached, on the device.
        grad_norm: norm of the whole gradient before clipping, the same on all workers; set by `TrainStep.settle`.
        skipped: whether the update was not applied because something was not finite; set by `TrainStep.settle`.
        leave: why all workers have to leave after this step; None if they go on. The same on all workers.
        positions: stream positions of this worker's samples.
        image_ids: their image ids.
        padded_pixels: pixels of the padded micro-batches.
        image_pixels: those of them that are not padding.
        bad_images: a line for each image that could not be read; its sample was replaced by a black one.
        bad_image_ids: ids of these images.
        num_micro_batches: forward passes of this worker.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    grad_norm: float = 0.0
    skipped: bool = False
    leave: LeaveReason | None = None
    positions: list[int] = field(default_factory=list)
    image_ids: list[int] = field(default_factory=list)
    padded_pixels: int = 0
    image_pixels: int = 0
    bad_images: list[str] = field(default_factory=list)
    bad_image_ids: list[int] = field(default_factory=list)
    num_micro_batches: int = 0


@dataclass(frozen=True)
class _Update:
    """An update whose numbers have not been read from the device yet, and what to report if they are not finite."""

    step: int
    outcome: StepOutcome
    numbers: HostCopy  # norm of the gradient, and the loss scale that it was computed with
    nonfinite: str | None
    rates: list[float]


@contextmanager
def _advice_on_memory(step: int, batch: Batch, world_size: int) -> Iterator[None]:
    """Fails the run where a GPU's memory is too small for a micro-batch: the same would happen at every start.

    Several workers are started again all the same (`train.max_failures`), since the others know nothing of it: only one
    alone can tell that the run cannot go on.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        count, _, height, width = batch.images.shape
        raise RunFailed(
            f"step {step}: {count} images of {width} x {height} pixels do not fit into the GPU's memory. Set "
            "train.micro_batch_size=auto, or a number: results stay the same. Less memory is also needed with "
            f"train.recompute_encoder=true or train.precision=bf16.\n  {str(error).splitlines()[0]}",
            agreed=world_size == 1,
        ) from error


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch for one step of one worker."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(2, np.uint32)
    torch.manual_seed(int(state[0]) << 32 | int(state[1]))


def compiled(model: nn.Module) -> nn.Module:
    """The model under ``torch.compile``, with a version for each shape of its input.

    By default, torch stops compiling after eight versions and runs the rest uncompiled. One version for all shapes is
    not possible: the kernels for gradients of convolutions are made for one size of a feature map.
    """
    import torch._dynamo  # takes a second

    found: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    # The limits are settings of the whole process; they are changed only while this model is called.
    limits = {"recompile_limit": MOST_COMPILED, "accumulated_recompile_limit": 2 * MOST_COMPILED}
    found.forward = torch._dynamo.config.patch(limits)(found.forward)
    return found


class TrainStep:
    """Takes optimizer steps of one model.

    Args:
        model: the model, not wrapped. Its ``pixels`` are used to normalise images.
        criterion: its loss.
        optimizer: updates the model's parameters.
        context: this worker's group; wraps the model for it.
        seed: ``run.seed``.
        precision: ``fp32``, ``bf16`` or ``fp16`` autocast.
        clip_max_norm: largest norm of the gradient; 0: no clipping.
        channels_last: lay images out with the channels last.
        compile_model: run the forward pass through ``torch.compile``.
        skip_bad_images: go on if an image cannot be read (its sample is black), instead of failing the run.
        skip_nonfinite: leave an update out if predictions or gradients are not finite, instead of failing the run.

    Attributes:
        times: seconds of this worker in each phase. The caller replaces it to begin a new interval.
        nonfinite_in_a_row: settled updates that were left out since the last one that was applied. Updates that the
            fp16 scaler leaves out while it adjusts its scale do not count. Restored when a run is resumed.
    """

    def __init__(
        self,
        model: DetectionModel,
        criterion: SetCriterion,
        optimizer: torch.optim.Optimizer,
        context: WorkerContext,
        *,
        seed: int,
        precision: str = "fp32",
        clip_max_norm: float = 0.0,
        channels_last: bool = False,
        compile_model: bool = False,
        skip_bad_images: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        self.model = model
        self.criterion = criterion
        self.optimizer = optimizer
        self.context = context
        self.scaler = torch.amp.GradScaler(context.device.type, enabled=precision == "fp16")
        self.times = StepTimes()
        self.nonfinite_in_a_row = 0
        self._unsettled: _Update | None = None
        self._seed = seed
        self._dtype = AUTOCAST_DTYPES[precision]
        self._clip_max_norm = clip_max_norm
        self._channels_last = channels_last
        self._skip_bad_images = skip_bad_images
        self._skip_nonfinite = skip_nonfinite
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._wrapped = context.wrap(compiled(model) if compile_model else model)

    def __call__(self, step: int, micro_batches: Sequence[PaddedBatch]) -> StepOutcome:
        """Takes one step on this worker's share of global batch ``step``, and settles the previous step.

        Raises:
            RunFailed: an image cannot be read, or something was not finite in the previous step (`settle`), and the
                settings do not allow that; or the GPU's memory is too small.
        """
        outcome = StepOutcome(num_micro_batches=len(micro_batches))
        normalisers, info = self._agree(step, micro_batches, outcome)
        seed_step(self._seed, step, self.context.rank)
        self._wrapped.train()
        nonfinite: str | None = None
        for number, padded in enumerate(micro_batches):
            batch = to_device(padded, self.context.device, self.model.pixels, self._channels_last, info)
            is_last = number == len(micro_batches) - 1
            advice = _advice_on_memory(step, batch, self.context.world_size)
            with nullcontext() if is_last else self.context.no_sync(self._wrapped), advice:
                report = self._forward_backward(step, batch, normalisers, outcome)
            nonfinite = nonfinite or report
            outcome.padded_pixels += batch.padded_pixels
            outcome.image_pixels += batch.image_pixels
            outcome.positions += padded.positions.tolist()
            outcome.image_ids += padded.image_ids.tolist()
        self._update(step, outcome, nonfinite)
        return outcome

    def _agree(
        self, step: int, micro_batches: Sequence[PaddedBatch], outcome: StepOutcome
    ) -> tuple[list[float], StepInfo]:
        """Sums the normalisers over all workers; also finds out whether a worker failed or was asked to stop."""
        started = time.perf_counter()
        self.context.enter("summing over workers", step)
        outcome.bad_images = [line for padded in micro_batches for line in padded.bad_images]
        outcome.bad_image_ids = [image_id for padded in micro_batches for image_id in padded.bad_image_ids.tolist()]
        failed = bool(outcome.bad_images) and not self._skip_bad_images
        reason = self.context.leave_reason()
        own = np.sum([self.criterion.normalisers(padded.counts.tolist()) for padded in micro_batches], axis=0)
        # One element for each worker, so that a single sum gives all workers' values.
        most_here = np.zeros(self.context.world_size)
        most_here[self.context.rank] = max(int(padded.counts.max(initial=0)) for padded in micro_batches)
        # On the CPU, so that this does not wait for the device.
        numbers = torch.tensor([*own.tolist(), *most_here.tolist(), failed, reason is not None], dtype=torch.float64)
        *summed, failures, leaving = self.context.all_reduce_sum(numbers).tolist()
        normalisers, most_boxes = summed[: len(own)], summed[len(own) :]
        if failures:
            lines = [line for lines in self.context.gather(outcome.bad_images) for line in lines]
            shown = "\n  ".join(lines[:20])
            raise RunFailed(
                f"step {step}: {len(lines)} image(s) cannot be used:\n  {shown}\n"
                "Mend or remove them (`python -m detr_ray.check ... --decode` finds all), or set "
                "data.on_bad_image=skip",
                agreed=True,
            )
        if leaving:
            outcome.leave = most_urgent(self.context.gather(reason))
        self.times.forward += time.perf_counter() - started
        return normalisers, StepInfo(self._seed, step, int(max(most_boxes)))

    def _forward_backward(
        self, step: int, batch: Batch, normalisers: Sequence[float], outcome: StepOutcome
    ) -> str | None:
        """Computes the gradient of one micro-batch. Returns a message if something was not finite, else None."""
        started = time.perf_counter()
        self.context.enter("forward pass", step)
        with self._autocast():
            outputs: ModelOutput = self._wrapped(*self.model.inputs_of(batch))
        forward_done = time.perf_counter()
        self.context.enter("loss", step)
        report = None
        try:
            losses = self.criterion(outputs, batch.targets, normalisers)
            own_total = self.criterion.total(losses)
            # Gradients are averaged over workers. The normalisers are those of all workers already, so undo the mean.
            total = own_total * self.context.world_size
            for name, value in {**losses, "loss": own_total}.items():
                value = value.detach()
                outcome.losses[name] = outcome.losses[name] + value if name in outcome.losses else value
        except NonFiniteOutputs as error:
            # This worker has no loss, but the others wait for its gradient. A gradient of NaN tells all of them.
            total = torch.stack([tensor.float().sum() for tensor in float_tensors(outputs)]).sum() * float("nan")
            image_ids = [int(batch.image_ids[i]) for i in error.image_indices]
            report = f"image ids {image_ids}: {error}"
            if not self._skip_nonfinite:
                seed_step(self._seed, step, self.context.rank)
                report += "; " + describe_nonfinite(self.model, batch, self._autocast())
        self.settle()  # the matching has waited for the device
        loss_done = time.perf_counter()
        self.context.enter("backward pass", step)
        self.scaler.scale(total).backward()
        self.times.forward += forward_done - started
        self.times.loss += loss_done - forward_done
        self.times.backward += time.perf_counter() - loss_done
        return report

    def _update(self, step: int, outcome: StepOutcome, nonfinite: str | None) -> None:
        """Clips and applies the gradient, which is the same on all workers, unless it is not finite."""
        started = time.perf_counter()
        self.context.enter("update", step)
        self.scaler.unscale_(self.optimizer)
        norm = clipped_update(self.optimizer, self._parameters, self._clip_max_norm)
        numbers = HostCopy(torch.stack([norm, self.scaler.scale(torch.ones_like(norm))]))
        self.scaler.update()  # lowers the scale if `unscale_` found values that are not finite
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._unsettled = _Update(step, outcome, numbers, nonfinite, rates)
        self.optimizer.zero_grad(set_to_none=True)
        self.times.update += time.perf_counter() - started

    def settle(self) -> None:
        """Waits for the last update and reads whether it was finite; sets ``grad_norm`` and ``skipped`` of its outcome.

        Raises:
            RunFailed: it was not finite, and the settings do not allow that. The update was not applied.
        """
        if self._unsettled is None:
            return
        update, self._unsettled = self._unsettled, None
        update.outcome.grad_norm, loss_scale = update.numbers.read().tolist()
        if np.isfinite(update.outcome.grad_norm):
            self.nonfinite_in_a_row = 0
            return
        update.outcome.skipped = True
        self._agree_on_nonfinite(update, loss_scale)

    def _agree_on_nonfinite(self, update: _Update, loss_scale: float) -> None:
        """Counts an update that was not finite, or fails the run; called by all workers, which see the same gradient.

        fp16 multiplies the loss by a scale, which is raised until a gradient overflows and then halved. So a gradient
        that is not finite is normal with fp16 as long as the scale is above 1.
        """
        reports = [report for report in self.context.gather(update.nonfinite) if report]
        if not reports and loss_scale > 1:
            return
        self.nonfinite_in_a_row += 1
        if self._skip_nonfinite:
            return
        rates = ", ".join(f"{rate:.3g}" for rate in update.rates)
        unscaled = ", whatever the loss is scaled by" if self.scaler.is_enabled() else ""
        found = "\n  ".join(reports) or f"the predictions are finite, the gradient is not{unscaled}"
        raise RunFailed(
            f"step {update.step}: not finite (learning rates {rates}):\n  {found}\n"
            "Lower optim.lr, add optim.warmup_epochs, use train.precision=bf16 or fp32, or set train.on_nonfinite=skip",
            agreed=True,
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.context.device.type, dtype=self._dtype, enabled=self._dtype is not None)
