"""What the loop knows of the other workers: its rank, the sums over ranks, and why to leave.

``LocalContext`` is a single process: for debugging, and as the reference in tests and benchmarks. Contexts of several
processes implement the same protocol (`engine/distributed.py`, `runtime/worker.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor, nn

from detr_ray.callbacks import Say
from detr_ray.config import ConfigError
from detr_ray.engine.hooks import Evaluated

T = TypeVar("T")


def uses_gpu(use_gpu: bool | None) -> bool:
    """Whether work on this machine uses a GPU: as ``train.use_gpu`` says, or where it is null, if there is one."""
    return torch.cuda.is_available() if use_gpu is None else use_gpu


def local_device(use_gpu: bool | None) -> str:
    """The device of work in this process.

    Args:
        use_gpu: ``train.use_gpu``; None for the GPU, if there is one.

    Raises:
        ConfigError: there is no GPU.
    """
    if use_gpu and not torch.cuda.is_available():
        raise ConfigError("train.use_gpu: true, but torch finds no GPU on this machine")
    return "cuda" if uses_gpu(use_gpu) else "cpu"


LeaveReason = Literal["abandoned", "asked", "preempted", "resized"]
"""Why a worker is to leave after a step, the most urgent reason first. ``abandoned``: the run is given up, and no
checkpoint is written. The others write one: someone asked to stop, the node is taken away, or the group is started
again with another number of workers."""


def most_urgent(reasons: Iterable[LeaveReason | None]) -> LeaveReason | None:
    """The most urgent of the workers' reasons; None if no worker has one."""
    given = set(reasons)
    return next((known for known in get_args(LeaveReason) if known in given), None)


Phase = Literal[
    "starting",
    "adding up metrics",
    "writing a checkpoint",
    "waiting for the checkpoint",
    "detecting on validation images",
    "scoring",
    "waiting for the scores",
    "waiting for data",
    "summing over workers",
    "forward pass",
    "loss",
    "backward pass",
    "update",
    "leaving",
    "waiting for a run",
]
"""What a worker may be doing, in the order within one step. Of several workers at the same step, the others wait for
the worker whose phase comes first in this order."""


class WorkerContext(Protocol):
    """One worker's view of its group.

    Attributes:
        rank: 0..world_size-1; rank 0 writes checkpoints, metrics and progress.
        world_size: number of training workers.
        device: where the model lives.
    """

    rank: int
    world_size: int
    device: torch.device

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is trained: gradients are averaged over workers in its backward pass."""
        ...

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context in which the wrapped model's backward pass does not average gradients: for accumulation."""
        ...

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all workers, in place; every worker must call it."""
        ...

    def gather(self, item: T) -> list[T]:
        """Every worker's item, by rank, on every worker; small Python objects."""
        ...

    def gather_to_first(self, item: T) -> list[T] | None:
        """Every worker's item, by rank, on rank 0; None on other ranks. For items that are large together."""
        ...

    def broadcast(self, item: T) -> T:
        """Rank 0's item on every worker; what the others give is ignored.

        Plain data, with tensors anywhere in it, which travel one by one and arrive on the CPU with the same strides.
        """
        ...

    def report(self, evaluated: Evaluated) -> None:
        """Tells the program that started the workers what an evaluation gave; every worker must call it."""
        ...

    def say(self, line: str) -> None:
        """Shows the user a line of progress (rank 0 only does)."""
        ...

    def enter(self, phase: Phase, step: int) -> None:
        """Notes what this worker does from now on, for the supervision of hanging workers; takes no time."""
        ...

    def leave_reason(self) -> LeaveReason | None:
        """Why this worker is to leave after the next step; None while it is to go on."""
        ...


class LocalContext:
    """A group of one, in this process.

    Args:
        device: where the model lives; the CPU by default.
        say: shows a line of progress.
        should_stop: asked once a step.
        on_report: called with each evaluation.
        should_abandon: asked once a step whether to stop without a checkpoint.
        on_step: called with the number of steps taken, whenever a phase of a step begins.
    """

    rank = 0
    world_size = 1

    def __init__(
        self,
        device: torch.device | str = "cpu",
        say: Say = lambda line: None,
        should_stop: Callable[[], bool] = lambda: False,
        on_report: Callable[[Evaluated], Any] = lambda evaluated: None,
        should_abandon: Callable[[], bool] = lambda: False,
        on_step: Callable[[int], Any] = lambda step: None,
    ) -> None:
        self.device = torch.device(device)
        self._say = say
        self._should_stop = should_stop
        self._should_abandon = should_abandon
        self._on_step = on_step
        self._on_report = on_report

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Does nothing: there are no other workers."""
        return nullcontext()

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values

    def gather(self, item: T) -> list[T]:
        """The item alone."""
        return [item]

    def gather_to_first(self, item: T) -> list[T] | None:
        """The item alone."""
        return [item]

    def broadcast(self, item: T) -> T:
        """The item itself."""
        return item

    def report(self, evaluated: Evaluated) -> None:
        """Calls ``on_report``."""
        self._on_report(evaluated)

    def say(self, line: str) -> None:
        """Calls ``say``."""
        self._say(line)

    def enter(self, phase: Phase, step: int) -> None:
        """Calls ``on_step``."""
        self._on_step(step)

    def leave_reason(self) -> LeaveReason | None:
        """Asks the functions given."""
        if self._should_abandon():
            return "abandoned"
        return "asked" if self._should_stop() else None
