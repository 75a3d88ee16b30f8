"""One worker of a process group takes a few steps with plain SGD and saves its gradients."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import distributed as dist

from detr_ray.config import load_config
from detr_ray.engine.distributed import DistributedContext
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.job import prepare_job
from detr_ray.engine.reporting.meters import Meters
from detr_ray.engine.stream.batches import LocalBatches
from detr_ray.engine.training_step.step import StepTimes, TrainStep


class RecordingSgd(torch.optim.SGD):
    """SGD that keeps every gradient it was given."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, lr=1e-4)
        self.gradients: list[torch.Tensor] = []

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.gradients.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]))
        super().step()


def main(config_path: str, rank: int, world_size: int, port: int, steps: str, out: str, *poisoned: str) -> None:
    """Runs it.

    Args:
        config_path: the configuration.
        rank: of this worker.
        world_size: workers.
        port: where they meet.
        steps: how many.
        out: where rank 0 saves; the others add their rank.
        poisoned: where given, the last worker's model gives NaN at that step. Every worker then saves what it saw.
    """
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    if world_size > 1:
        dist.init_process_group("gloo")
    job = prepare_job(load_config(config_path), lambda line: None)
    model = job.build_detector().model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    context = DistributedContext(rank, world_size)
    optimizer = RecordingSgd([p for p in model.parameters() if p.requires_grad])
    step = TrainStep(
        model, job.build_detector().criterion, optimizer, context,
        seed=job.config.run.seed, skip_nonfinite=job.config.train.on_nonfinite == "skip",
    )  # fmt: skip
    batches = LocalBatches(job.data.plan(world_size, rank), *job.data.loaders())
    norms, losses, skipped = [], [], []
    meters = Meters(context, job.config.train.global_batch_size)
    for number, micro_batches in enumerate(batches.train_batches(0, int(steps))):
        handle = None
        if poisoned and number == int(poisoned[0]) and rank == world_size - 1:
            handle = model.transformer.register_forward_hook(lambda module, inputs, output: output * float("nan"))
        try:
            outcome = step(number, micro_batches)
            step.settle()
        except RunFailed as error:
            Path(f"{out}.{rank}").write_text(f"{error.agreed}\n{error}")
            return
        if handle is not None:
            handle.remove()
        skipped.append(outcome.skipped)
        norms.append(outcome.grad_norm)
        meters.add(outcome)
        if not poisoned:
            losses.append(float(context.all_reduce_sum(step.criterion.total(outcome.losses).double())))
    moved = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    if poisoned:
        torch.save({"moved": moved, "skipped": skipped}, Path(f"{out}.{rank}"))
    else:
        logged = meters.metrics(meters.totals(StepTimes()))
        found = {"gradients": optimizer.gradients, "norms": norms, "losses": losses, "logged": logged}
        torch.save(found, Path(out) if rank == 0 else Path(f"{out}.{rank}"))
    if world_size > 1:
        dist.destroy_process_group()
