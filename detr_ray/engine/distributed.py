"""A worker context on top of a `torch.distributed` process group that is already there."""

from __future__ import annotations

import inspect
import io
import pickle
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from detr_ray.engine.context import LeaveReason, Phase
from detr_ray.engine.hooks import Evaluated

T = TypeVar("T")

# The newer name of the option; the older one warns where both exist.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}


def _without_tensors(item: object, tensors: list[Tensor]) -> bytes:
    """An item, pickled without its tensors; these are appended to a list. See `_with_tensors`."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, part: object) -> int | None:
            if not isinstance(part, Tensor):
                return None
            tensors.append(part.detach())
            return len(tensors) - 1

    stream = io.BytesIO()
    Pickler(stream).dump(item)
    return stream.getvalue()


def _with_tensors(outline: bytes, tensors: list[Tensor]) -> Any:
    """The inverse of `_without_tensors`: the item with these tensors."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> Tensor:
            return tensors[number]

    return Unpickler(io.BytesIO(outline)).load()


class DistributedContext:
    """One worker of a process group; see `WorkerContext`.

    It neither reports nor shows anything; a subclass of the launcher does.

    Args:
        rank: this worker.
        world_size: workers in the group.
        device: where the model lives.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device | str = "cpu") -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model under DistributedDataParallel; itself where there is one worker."""
        if self.world_size == 1:
            return model
        devices = None if self.device.type == "cpu" else [self.device]
        # Buffers are not broadcast: frozen ones never change, and running statistics are averaged when they are saved.
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **_NO_BUFFER_SYNC)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Keeps gradients on this worker."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over workers, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, item: T) -> list[T]:
        """Every worker's item."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items

    def gather_to_first(self, item: T) -> list[T] | None:
        """Every worker's item, on rank 0."""
        if self.world_size == 1:
            return [item]
        items: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(item, items)
        return items

    def broadcast(self, item: T) -> T:
        """Rank 0's item, its tensors one by one, so that no worker holds more than the item and one tensor."""
        if self.world_size == 1:
            return item
        tensors: list[Tensor] = []
        sent: list[Any] = [None]
        if self.rank == 0:
            outline = _without_tensors(item, tensors)
            sent = [(outline, [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors])]
        dist.broadcast_object_list(sent)
        outline, layouts = sent[0]
        received = [
            self._broadcast_tensor(tensors[number] if self.rank == 0 else None, *layout)
            for number, layout in enumerate(layouts)
        ]
        return item if self.rank == 0 else _with_tensors(outline, received)

    def _broadcast_tensor(
        self, tensor: Tensor | None, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """Sends (rank 0) or receives one tensor, as bytes: not every backend knows every type."""
        # A group with only NCCL can send nothing but tensors on GPUs.
        device = "cpu" if "cpu:" in dist.get_backend_config() else self.device
        values = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device).contiguous()
        if values.numel():
            dist.broadcast(values.reshape(-1).view(torch.uint8), src=0)
        return torch.empty_strided(shape, stride, dtype=dtype).copy_(values) if tensor is None else tensor

    def report(self, evaluated: Evaluated) -> None:
        """Does nothing."""

    def say(self, line: str) -> None:
        """Shows nothing."""

    def enter(self, phase: Phase, step: int) -> None:
        """Notes nothing."""

    def leave_reason(self) -> LeaveReason | None:
        """None: workers leave at the end only."""
        return None
