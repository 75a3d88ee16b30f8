"""A worker context on top of a `torch.distributed` process group that is already there."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from detr_ray.engine.context import LeaveReason, Phase

T = TypeVar("T")

# The newer name of the option; the older one warns where both exist.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}


class DistributedContext:
    """One worker of a process group; see `WorkerContext`.

    It neither reports nor shows anything: who starts the group says how (a subclass).

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
        # Buffers are not broadcast: frozen ones never change, running statistics are averaged when they are kept.
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

    def report(self, metrics: dict[str, float]) -> None:
        """Nobody to report to."""

    def say(self, line: str) -> None:
        """Nobody to show a line to."""

    def enter(self, phase: Phase, step: int) -> None:
        """Nobody looks."""

    def leave_reason(self) -> LeaveReason | None:
        """Nobody asks."""
        return None
