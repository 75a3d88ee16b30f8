"""Preflight of memory: estimates the memory of a training step from shapes alone.

The model runs on tensors without content, so nothing is computed, and almost no memory is needed. The tensors that
autograd keeps for the backward pass are summed. Memory for kernels and the loss is estimated as a share of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from detr_ray.config import Config
from detr_ray.detector import build_skeleton
from detr_ray.detector.inference import AUTOCAST_DTYPES
from detr_ray.engine.cpu import free_bytes
from detr_ray.engine.preflight.findings import Report
from detr_ray.engine.training_step.parameters import freeze, group_rates
from detr_ray.model import DetectionModel
from detr_ray.structures import Batch, StepInfo, Target

_BESIDE = 1.35
"""Peak memory of a step, divided by what its forward pass keeps. The rest is for the loss, gradients of activations,
workspaces of kernels, and memory that the allocator does not give back. Measured on a CPU: 1.3 to 1.5
(docs/decisions.md)."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a worker needs for a step, without the memory of its process itself.

    Attributes:
        fixed: weights, their gradients and AdamW's two moments, and their average.
        batch: the part that grows with the images: the images, and what the forward pass keeps for the backward pass.
    """

    fixed: int
    batch: int


def step_memory(config: Config, num_classes: int, shape: tuple[int, int, int], boxes: int) -> StepMemory:
    """Estimates a step on a batch.

    Args:
        config: the configuration.
        num_classes: classes without no-object.
        shape: images, and their padded height and width in pixels.
        boxes: most boxes of an image.
    """
    model = build_skeleton(config.model, num_classes).train()
    freeze(model, group_rates(model, config.optim), config.optim.freeze)
    own = [*model.parameters(), *model.buffers()]
    kept, images = _kept_by_forward(model, config, shape, boxes)
    if config.train.recompute_encoder and config.model.encoder_layers:
        everything = kept
        model.recompute_encoder()
        kept, _ = _kept_by_forward(model, config, shape, boxes)
        # The backward pass has the inner values of one layer at a time.
        kept += (everything - kept) // config.model.encoder_layers
    weights = sum(map(_bytes, own))
    trained = sum(_bytes(value) for value in own if value.requires_grad)
    return StepMemory(
        fixed=weights * (2 if config.optim.ema_decay else 1) + 3 * trained, batch=int(_BESIDE * kept) + images
    )


def _kept_by_forward(model: DetectionModel, config: Config, shape: tuple[int, int, int], boxes: int) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward pass, and bytes of the images."""
    mode = FakeTensorMode()
    inputs = tree_map_only(Tensor, mode.from_tensor, _inputs(model, shape, boxes))
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept: dict[int, int] = {}
    alive = []  # so that no new storage gets the identity of a deleted one

    def note(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    dtype = AUTOCAST_DTYPES[config.train.precision]
    with mode, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        values = {name: torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad) for name, t in own.items()}
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            torch.func.functional_call(model, values, inputs)
    for tensor in (*values.values(), inputs[0]):
        kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(kept.values()), _bytes(inputs[0])


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _inputs(model: DetectionModel, shape: tuple[int, int, int], boxes: int) -> tuple[Any, ...]:
    """The model's inputs for a batch of this shape in training. The memory pages of the images are never touched."""
    count, height, width = shape
    images = torch.empty(count, 3, height, width)
    target = Target(labels=torch.zeros(boxes, dtype=torch.int64), boxes=torch.full((boxes, 4), 0.5))
    numbers = torch.arange(count)
    return model.inputs_of(
        Batch(
            images=images,
            mask=torch.zeros(count, height, width, dtype=torch.bool),
            targets=[target] * count,
            image_ids=numbers,
            positions=numbers,
            orig_sizes=torch.tensor([[height, width]] * count),
            padded_pixels=count * height * width,
            image_pixels=count * height * width,
            step_info=StepInfo(seed=0, step=0, most_boxes=boxes),
        )
    )


def check_memory(
    config: Config, num_classes: int, shape: tuple[int, int, int], boxes: int, area: str, report: Report
) -> None:
    """Reports the memory for a step on the largest batch, and warns if this machine has less.

    Args:
        config: the configuration.
        num_classes: classes without no-object.
        shape: of the largest batch: images, and their padded height and width.
        boxes: most boxes of an image.
        area: that the finding belongs to.
        report: findings are added to it.
    """
    need = step_memory(config, num_classes, shape, boxes)
    each = need.batch / shape[0]
    message = (
        f"a step of the largest batch takes about {_gigabytes(need.fixed + need.batch)} GB of a worker's memory, "
        f"{_gigabytes(need.fixed)} of it for weights, gradients and optimizer, {_gigabytes(each)} for each image"
    )
    free = _free(config)
    if not free or need.fixed + need.batch <= free or config.train.micro_batch_size == "auto":
        report.add("ok", area, message)
        return
    fitting = max(0, int((free - need.fixed) / each))
    advice = (
        f"set train.micro_batch_size to {fitting} or less, or to auto: results stay the same"
        if fitting
        else "lower data.augment.scales and max_size, take a smaller model, train.precision=bf16 or "
        "train.recompute_encoder=true"
    )
    report.add("warning", area, f"{message}; this machine has {_gigabytes(free)} free", advice)


def _free(config: Config) -> int:
    """Free memory of the device that would be used here; 0 if unknown."""
    if config.train.use_gpu is not False and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return 0 if config.train.use_gpu else free_bytes()


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.2g}"
