"""Where a training step's time goes: by phase, by part of the model, by operator. Not a comparison.

    python -m benchmarks.profiling [R50 | quickstart] [--precision bf16] [--steps 3] [--trace FILE]

The steps are those of the step benchmark: one batch again and again, so that no time goes into waiting for data. Phases
and parts come from clocks in undisturbed steps. The backward pass of a part begins when its output's gradient is there,
and lasts until that of the part before it is. Operators come from torch.profiler, in steps of their own, which it slows
down. On the CPU only: kernels of a GPU run after the calls that these clocks see.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.step import WORKLOADS, draw_batch, train_step
from detr_ray.engine.context import WorkerContext
from detr_ray.engine.training_step.step import StepTimes
from detr_ray.model.detr import Detr

WARMUP = 2
OPERATORS = 20


class PartClocks:
    """Seconds of the model's parts, added up over steps.

    Args:
        model: gets hooks.

    Attributes:
        forward: by part, in the order of the forward pass.
        backward: by part; what never trains has none.
    """

    def __init__(self, model: Detr) -> None:
        self.forward: dict[str, float] = defaultdict(float)
        self.backward: dict[str, float] = defaultdict(float)
        self._started: dict[str, float] = {}
        self._arrivals: list[tuple[str, float]] = []
        body = model.body
        parts = {f"backbone {name}": stage for name, stage in body.named_children() if name.startswith("layer")}
        parts |= {
            "input_proj": model.input_proj,
            "encoder": model.transformer.encoder,
            "decoder": model.transformer.decoder,
            "class_embed": model.class_embed,
            "bbox_embed": model.bbox_embed,
        }
        for name, part in parts.items():
            self._watch(name, part)

    def _watch(self, name: str, part: nn.Module) -> None:
        def begin(module: nn.Module, inputs: object) -> None:
            self._started[name] = time.perf_counter()

        def end(module: nn.Module, inputs: object, output: Tensor) -> None:
            self.forward[name] += time.perf_counter() - self._started[name]
            if output.requires_grad:
                output.register_hook(lambda gradient: self._arrivals.append((name, time.perf_counter())))

        part.register_forward_pre_hook(begin)
        part.register_forward_hook(end)

    def end_step(self, backward_began: float, backward_ended: float) -> None:
        """Shares a step's backward pass out among the parts."""
        arrivals = [("criterion", backward_began), *self._arrivals, ("", backward_ended)]
        for (name, begun), (_, ended) in pairwise(arrivals):
            self.backward[name] += ended - begun
        self._arrivals.clear()

    def restart(self) -> None:
        """Forgets what was measured."""
        self.forward.clear()
        self.backward.clear()


class _BackwardTimes:
    """Notes when a step's backward pass begins and ends, from the phases that it goes through."""

    def __init__(self, context: WorkerContext) -> None:
        self.began = self.ended = 0.0
        self._enter = context.enter
        context.enter = self.enter  # type: ignore[method-assign]

    def enter(self, phase: str, step: int) -> None:
        if phase == "backward pass":
            self.began = time.perf_counter()
        elif phase == "update":
            self.ended = time.perf_counter()


def print_phases(times: StepTimes, wall: float, steps: int) -> None:
    """Seconds a step of each phase."""
    phases = {name: getattr(times, name) for name in ("forward", "loss", "backward", "update")}
    phases["else"] = wall - sum(phases.values())
    print(f"\na step: {1000 * wall / steps:,.0f} ms")
    for name, seconds in phases.items():
        more = "  (bytes to normalised floats)" if name == "else" else ""
        print(f"  {name:20}{1000 * seconds / steps:9.1f} ms {seconds / wall:6.1%}{more}")


def print_parts(clocks: PartClocks, times: StepTimes, steps: int) -> None:
    """Seconds a step of each part, in the order of the forward pass."""
    forward = dict(clocks.forward)
    rest = {"stem, positions, rest": times.forward - sum(forward.values())}
    print("\nparts:                    forward     backward")
    for name, seconds in {**rest, **forward, "criterion": times.loss}.items():
        behind = clocks.backward.get(name)
        shown = "          -" if behind is None else f"{1000 * behind / steps:8.1f} ms"
        print(f"  {name:21}{1000 * seconds / steps:8.1f} ms  {shown}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profiling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = {workload.split()[0]: workload for workload in WORKLOADS}
    parser.add_argument("workload", nargs="?", choices=kinds, default="R50")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=5, help="steps that are measured (default 5)")
    parser.add_argument("--trace", type=Path, help="write the operators' timeline, for chrome://tracing or Perfetto")
    arguments = parser.parse_args()
    workload, steps = kinds[arguments.workload], arguments.steps

    step, batch = train_step(workload, arguments.precision), draw_batch(workload)
    assert isinstance(step.model, Detr)
    clocks, backward = PartClocks(step.model), _BackwardTimes(step.context)
    wall = 0.0
    for number in range(WARMUP + steps):
        if number == WARMUP:
            step.times, wall = StepTimes(), 0.0
            clocks.restart()
        started = time.perf_counter()
        step(number, [batch])
        wall += time.perf_counter() - started
        clocks.end_step(backward.began, backward.ended)
    print(f"{workload}, {arguments.precision}, {steps} steps on {torch.get_num_threads()} threads")
    print_phases(step.times, wall, steps)
    print_parts(clocks, step.times, steps)

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for number in range(2):
            step(number, [batch])
    print("\noperators, two steps:")
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=OPERATORS, max_name_column_width=40))
    if arguments.trace is not None:
        profiler.export_chrome_trace(str(arguments.trace))
        print(arguments.trace)


if __name__ == "__main__":
    main()
