"""One worker of a process group runs the whole training loop and saves what it ends with.

python loop_worker.py CONFIG RANK WORLD_SIZE PORT OUT [STOP_AFTER]

Workers other than the first have a storage of their own, in which there is nothing: what they know of checkpoints, rank
0 told them. Where STOP_AFTER is given, the last worker asks to stop at that step.
"""

from __future__ import annotations

import os
import sys
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

ODD = {
    "text": "plain",
    "numbers": [torch.tensor(3), torch.tensor([True, False]), torch.arange(5, dtype=torch.float64)],
    "half": (torch.randn(2, 3).bfloat16(), torch.randn(2, 3).half()),
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "empty": torch.zeros(0, 3),
    "turned": torch.randn(4, 6).t(),
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


def main() -> None:
    config_path, rank, world_size, port, out, *stop_after = sys.argv[1:]
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": world_size}
    dist.init_process_group("gloo")
    own_storage = [] if rank == "0" else [f"run.storage={out}.storage.{rank}"]
    job = prepare_job(load_config(config_path, own_storage), lambda line: None)
    context = Context(int(rank), int(world_size), int(stop_after[0]) if stop_after else None)
    batches = LocalBatches(job.data.plan(int(world_size), int(rank)), *job.data.loaders())
    tracker = MemoryTracker()
    # Each worker's own random numbers, but for what rank 0 says.
    ended: dict[str, object] = {"told": context.broadcast(ODD), "gathered": context.gather_to_first(int(rank))}
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


if __name__ == "__main__":
    main()
