"""Reading the points of deformable attention: `sample_bag` and `sample_grid` against the usual fallback.

    python -m benchmarks deformable_attention

8 heads of 32 channels, 4 points in each of 4 maps. Encoder: every cell of an image of 400 x 544 pixels is a query
(4,534); decoder: 900 queries. Two images; fp32, and values in bf16. Time of the forward pass alone, and with the
backward pass; and the memory that autograd keeps between them. On a GPU if there is one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.baseline.deformable_attention import sample_stacked
from benchmarks.harness import Row, alternate
from detr_ray.model.deformable_attention import sample_bag, sample_grid

SIZES = [(50, 68), (25, 34), (13, 17), (7, 9)]
IMAGES, HEADS, CHANNELS, POINTS = 2, 8, 32, 4
SAMPLERS = {"bag": sample_bag, "grid": sample_grid, "fallback": sample_stacked}


def draw_case(queries: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Values, places near the cells that ask, and weights."""
    generator = torch.Generator().manual_seed(0)
    cells = sum(height * width for height, width in SIZES)
    value = torch.randn(IMAGES, cells, HEADS, CHANNELS, generator=generator)
    shape = (IMAGES, queries, HEADS, len(SIZES), POINTS)
    centres = torch.rand(IMAGES, queries, 1, 1, 1, 2, generator=generator)
    extent = torch.tensor([(width, height) for height, width in SIZES]).view(len(SIZES), 1, 2)
    locations = centres + 2 * torch.randn(*shape, 2, generator=generator) / extent
    weights = torch.rand(shape, generator=generator).flatten(-2).softmax(-1).view(shape)
    leaves = (value.to(dtype), locations, weights)
    first, second, third = (tensor.to(device).requires_grad_() for tensor in leaves)
    return first, second, third


def kept_megabytes(sampler: Callable[..., Tensor], case: tuple[Tensor, Tensor, Tensor]) -> float:
    """Memory of the tensors that autograd keeps, each once, the inputs left out."""
    inputs = {tensor.untyped_storage().data_ptr() for tensor in case}
    kept: dict[int, int] = {}
    alive = []

    def note(tensor: Tensor) -> Tensor:
        alive.append(tensor)  # so that no storage is used twice
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        sampler(case[0], SIZES, *case[1:])
    return sum(kept.values()) / 1e6


def _measured(name: str, queries: int, dtype: torch.dtype, device: torch.device) -> list[Row]:
    case = draw_case(queries, dtype, device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def forward(sampler: Callable[..., Tensor]) -> Callable[[], None]:
        def once() -> None:
            with torch.no_grad():
                sampler(case[0], SIZES, *case[1:])
            wait()

        return once

    def both(sampler: Callable[..., Tensor]) -> Callable[[], None]:
        def once() -> None:
            torch.autograd.grad(sampler(case[0], SIZES, *case[1:]).float().sum(), case)
            wait()

        return once

    rows = []
    for passes, timed in (("forward", forward), ("forward and backward", both)):
        times = alternate({name: timed(sampler) for name, sampler in SAMPLERS.items()}, rounds=3)
        for sampler in ("bag", "grid"):
            ours, plain = times[sampler], times["fallback"]
            spread = max(ours.spread, plain.spread)
            row = Row(f"{sampler}, {name}", ours.median * 1e3, plain.median * 1e3, "ms", "lower", passes, spread)
            rows.append(row)
    kept = {sampler: kept_megabytes(function, case) for sampler, function in SAMPLERS.items()}
    for sampler in ("bag", "grid"):
        rows.append(Row(f"{sampler}, {name}", kept[sampler], kept["fallback"], "MB", "lower", "kept for backward"))
    return rows


def run() -> list[Row]:
    """All cases."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cells = sum(height * width for height, width in SIZES)
    rows = []
    for part, queries in (("encoder", cells), ("decoder", 900)):
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            rows += _measured(f"{part}, {precision}", queries, dtype, device)
    return rows
