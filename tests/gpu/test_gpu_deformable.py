"""Deformable attention on a device: both ways of reading points give what the other one gives on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detr_ray.model.deformable_attention import Sampler, sample_bag, sample_grid

SIZES = ((12, 17), (6, 9), (3, 5))


def drawn() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    cells = sum(height * width for height, width in SIZES)
    value = torch.randn(2, cells, 4, 8, generator=generator)
    locations = torch.rand(2, 30, 4, len(SIZES), 4, 2, generator=generator) * 1.4 - 0.2
    return value, locations, torch.rand(locations.shape[:-1], generator=generator)


def read(sampler: Sampler, device: torch.device) -> list[Tensor]:
    """Values and gradients, on the CPU."""
    value, locations, weights = (tensor.to(device).requires_grad_() for tensor in drawn())
    found = sampler(value, SIZES, locations, weights)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(device)
    gradients = torch.autograd.grad((found * direction).sum(), (value, locations, weights))
    return [tensor.detach().cpu() for tensor in (found, *gradients)]


@pytest.mark.parametrize("sampler", [sample_bag, sample_grid])
def test_points_are_read_as_on_the_cpu(device: torch.device, sampler: Sampler) -> None:
    for found, expected in zip(read(sampler, device), read(sample_grid, torch.device("cpu")), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
