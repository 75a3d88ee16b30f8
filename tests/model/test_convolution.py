"""The fused convolution: what the plain sequence of operations gives, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_ray.model import convolution
from detr_ray.model.convolution import convolve

CASES = [
    {"in_channels": 16, "out_channels": 24, "kernel_size": 3, "padding": 1},
    {"in_channels": 16, "out_channels": 24, "kernel_size": 3, "padding": 2, "dilation": 2},
    {"in_channels": 16, "out_channels": 24, "kernel_size": 3, "padding": 1, "stride": 2},
    {"in_channels": 16, "out_channels": 24, "kernel_size": 1},
    {"in_channels": 16, "out_channels": 24, "kernel_size": 1, "stride": 2},
    {"in_channels": convolution.WIDE, "out_channels": 24, "kernel_size": 1},
]


def tensors(case: dict, layout: torch.memory_format) -> tuple[nn.Conv2d, list[Tensor]]:
    """The layer; then input, weight, bias and shortcut as leaves."""
    torch.manual_seed(0)
    layer = nn.Conv2d(**case, bias=False)
    x = torch.randn(2, case["in_channels"], 9, 12)
    shortcut = torch.randn_like(layer(x))
    weight = layer.weight.detach().clone()
    found = [tensor.contiguous(memory_format=layout) for tensor in (x, weight, shortcut)]
    return layer, [t.requires_grad_() for t in (found[0], found[1], torch.randn(len(weight)), found[2])]


def plain(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    out = F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)
    out = out if shortcut is None else out + shortcut
    return F.relu(out) if relu else out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_it_is_the_plain_sequence(case: dict, layout: torch.memory_format, shortcut: bool, relu: bool) -> None:
    layer, leaves = tensors(case, layout)
    used = leaves if shortcut else leaves[:3]
    ours = convolve(leaves[0], layer, *leaves[1:3], leaves[3] if shortcut else None, relu)
    expected = plain(layer, *leaves[:3], leaves[3] if shortcut else None, relu)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(ours.shape)
    for found, wanted in zip(
        torch.autograd.grad(ours, used, upstream), torch.autograd.grad(expected, used, upstream), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_it_rounds_under_autocast_as_convolutions_do(case: dict) -> None:
    layer, leaves = tensors(case, torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = convolve(leaves[0], layer, *leaves[1:])
    assert ours.dtype == torch.bfloat16
    exact = plain(layer, *leaves, relu=True)
    torch.testing.assert_close(ours.float(), exact, rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad(ours.float().sum(), leaves)
    for gradient, leaf, wanted in zip(gradients, leaves, torch.autograd.grad(exact.sum(), leaves), strict=True):
        assert gradient.dtype == leaf.dtype == torch.float32
        assert (gradient - wanted).norm() < 0.1 * wanted.norm()  # near 0, rounding tips a ReLU


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    layer, (x, weight, bias, shortcut) = tensors(CASES[0], torch.channels_last)
    out = convolve(x.detach(), layer, weight, bias.detach(), shortcut.detach())
    assert torch.autograd.grad(out.sum(), weight)[0].shape == weight.shape
    assert not convolve(x.detach(), layer, weight.detach(), bias.detach()).requires_grad
    with torch.no_grad():
        assert not convolve(x, layer, weight, bias, shortcut).requires_grad


def test_it_does_without_the_fused_call(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, leaves = tensors(CASES[0], torch.channels_last)
    fused = convolve(leaves[0], layer, *leaves[1:])
    monkeypatch.setattr(convolution, "_FUSED", None)
    torch.testing.assert_close(convolve(leaves[0], layer, *leaves[1:]), fused)
    assert fused.grad_fn is not None and "Fused" in type(fused.grad_fn).__name__
