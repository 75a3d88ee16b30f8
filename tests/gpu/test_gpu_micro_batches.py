"""Sizes of micro-batches tried on a GPU: what does not fit is found out, and its memory is free again."""

from __future__ import annotations

import pytest
import torch

from detr_ray.engine.errors import RunFailed
from detr_ray.engine.micro_batches import Shape, largest_on_gpu

IMAGE = 64 << 20
"""Bytes."""


class Allocating:
    """Takes so much memory an image."""

    def __init__(self, device: torch.device, sizes: list[int]) -> None:
        self.device, self.sizes = device, sizes

    def shape(self, size: int) -> Shape:
        return Shape(size, 1, 1)

    def run(self, shape: Shape) -> None:
        torch.zeros(shape.count * IMAGE, dtype=torch.uint8, device=self.device)


def test_the_largest_size_within_the_limit_is_found(gpu: torch.device) -> None:
    free, total = torch.cuda.mem_get_info(gpu)
    before = torch.cuda.memory_reserved(gpu)
    trial = Allocating(gpu, [1, 2, 3, 4, 8, 2 * total // IMAGE])
    assert largest_on_gpu(trial, 9 * IMAGE)[0] == 8, "twice of what there is runs out of memory"  # type: ignore[arg-type]
    assert largest_on_gpu(trial, 3 * IMAGE)[0] == 3  # type: ignore[arg-type]
    with pytest.raises(RunFailed, match="one image of the largest planned size"):
        largest_on_gpu(trial, IMAGE // 2)  # type: ignore[arg-type]
    assert torch.cuda.memory_reserved(gpu) <= before
    assert torch.cuda.mem_get_info(gpu)[0] >= free - IMAGE
