"""One worker of a process group runs the whole training loop and saves what it ends with.

Workers other than the first have a storage of their own, in which there is nothing: what they know of checkpoints, rank
0 told them.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import distributed as dist

from detr_ray.config import load_config
from detr_ray.engine.context import LeaveReason
from detr_ray.engine.distributed import DistributedContext
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.job import prepare_job
from detr_ray.engine.loop import TrainingLoop
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.tracking import MemoryTracker


def odd(rank: int) -> dict[str, object]:
    """Tensors of any type and layout, other ones in each worker."""
    chance = torch.Generator().manual_seed(rank)
    return {
        "text": f"of {rank}",
        "numbers": [torch.tensor(3), torch.tensor([True, False]), torch.arange(5, dtype=torch.float64)],
        "half": (torch.randn(2, 3, generator=chance).bfloat16(), torch.randn(2, 3, generator=chance).half()),
        "channels_last": torch.randn(2, 3, 4, 5, generator=chance).to(memory_format=torch.channels_last),
        "empty": torch.zeros(0, 3),
        "turned": torch.randn(4, 6, generator=chance).t(),
    }


class Context(DistributedContext):
    """Notes what is said; the last worker may ask to stop."""

    def __init__(self, rank: int, world_size: int, stop_after: int | None) -> None:
        super().__init__(rank, world_size)
        self.lines: list[str] = []
        self._stop_after = stop_after
        self._step = 0

    def say(self, line: str) -> None:
        self.lines.append(line)

    def enter(self, phase: str, step: int) -> None:  # type: ignore[override]
        self._step = step

    def leave_reason(self) -> LeaveReason | None:
        last = self.rank == self.world_size - 1
        return "asked" if last and self._stop_after is not None and self._step + 1 >= self._stop_after else None


def main(config_path: str, rank: int, world_size: int, port: int, out: str, *stop_after: str) -> None:
    """Runs it.

    Args:
        config_path: the configuration.
        rank: of this worker.
        world_size: workers.
        port: where they meet.
        out: where each saves, with its rank added.
        stop_after: where given, the last worker asks to stop at that step.
    """
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo")
    own_storage = [] if rank == 0 else [f"run.storage={out}.storage.{rank}"]
    job = prepare_job(load_config(config_path, own_storage), lambda line: None)
    context = Context(rank, world_size, int(stop_after[0]) if stop_after else None)
    batches = LocalBatches(job.data.plan(world_size, rank), *job.data.loaders())
    tracker = MemoryTracker()
    ended: dict[str, object] = {"told": context.broadcast(odd(rank)), "gathered": context.gather_to_first(rank)}
    try:
        loop = TrainingLoop(job, context, batches, tracker)
        result = loop.run()
        ended |= {
            "status": result.status, "step": result.step, "model": loop.model.state_dict(),
            "optimizer": loop.optimizer.state_dict(), "bad_image_ids": sorted(loop.state.bad_image_ids),
            "ema": {} if loop.state.ema is None else loop.state.ema.module.state_dict(),
        }  # fmt: skip
    except RunFailed as error:
        ended |= {"failed": str(error), "agreed": error.agreed}
    torch.save(ended | {"lines": context.lines, "metrics": tracker.metrics}, Path(f"{out}.{rank}"))
    dist.destroy_process_group()
