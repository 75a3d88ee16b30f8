"""A convolution together with what follows it in a residual network: bias, shortcut and ReLU.

On CPUs the whole of it is one call of oneDNN, which does the rest while a piece of the output is in the cache, and
kernels of one pixel become matrix products where those are faster; elsewhere it is the plain sequence of operations.
Knows tensors; knows nothing of norms or networks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_FUSED = getattr(torch.ops.mkldnn, "_convolution_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""torch's own name for it, which torch.compile uses; not promised to stay, hence the way without it."""

WIDE = 512
"""Input channels from which a kernel of one pixel has its gradient faster from two matrix products (measured)."""


def convolve(
    x: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor, shortcut: Tensor | None = None, relu: bool = True
) -> Tensor:
    """``conv`` with other weights, plus a shortcut, rectified.

    Args:
        x: ``[B, C_in, h, w]``.
        conv: says stride, padding, dilation and groups.
        weight: ``[C_out, C_in / groups, k, k]``.
        bias: ``[C_out]``.
        shortcut: of the output's shape, added before the ReLU; None for none.
        relu: whether negative values become zero.
    """
    if relu and _can_fuse(x):
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
            shortcut = None if shortcut is None else shortcut.to(dtype)
        shape = (conv.stride, conv.padding, conv.dilation, conv.groups)
        fused: Tensor = _Fused.apply(x, weight, bias, shortcut, shape)
        return fused
    if x.device.type == "cpu" and conv.stride != (1, 1) and _is_one_pixel(conv):
        # A strided convolution's gradient takes twice as long as that of the pixels that it looks at.
        seen = x[:, :, :: conv.stride[0], :: conv.stride[1]]
        out = F.linear(seen.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    else:
        out = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if shortcut is not None:
        out = out + shortcut
    return F.relu(out) if relu else out


def _is_one_pixel(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


def _can_fuse(x: Tensor) -> bool:
    """Double precision and a compiler's tracing take the plain way."""
    if _FUSED is None or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return x.dtype in (torch.float32, torch.bfloat16) and bool(torch.backends.mkldnn.enabled)


class _Fused(torch.autograd.Function):
    """Forward in one call; backward the ReLU's, then the convolution's, as autograd would have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, shape: tuple) -> Tensor:
        stride, padding, dilation, groups = shape
        numbers = (padding, stride, dilation, groups)
        assert _FUSED is not None
        out: Tensor
        if shortcut is None:
            out = _FUSED(x, weight, bias, *numbers, "relu", [], "")
        else:
            out = _FUSED.binary(x, shortcut, weight, bias, *numbers, "add", 1.0, "relu", [], "")
        ctx.save_for_backward(x, weight, out)
        ctx.shape = shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.shape
        of_x, of_weight, of_bias, of_shortcut, _ = ctx.needs_input_grad
        gradient = torch.ops.aten.threshold_backward(gradient, out, 0)
        of_inputs: tuple[Tensor | None, ...]
        if _by_matrix_products(x, weight, gradient, ctx.shape):
            rows, seen = gradient.permute(0, 2, 3, 1).flatten(0, 2), x.permute(0, 2, 3, 1).flatten(0, 2)
            of_inputs = (
                (rows @ weight.flatten(1)).view(*x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2) if of_x else None,
                (rows.t() @ seen).view_as(weight) if of_weight else None,
                rows.sum(0) if of_bias else None,
            )
        else:
            of_inputs = torch.ops.aten.convolution_backward(
                gradient, x, weight, [len(weight)], stride, padding, dilation, False, [0, 0], groups,
                [of_x, of_weight, of_bias],
            )  # fmt: skip
        return (*of_inputs, gradient if of_shortcut else None, None)


def _by_matrix_products(x: Tensor, weight: Tensor, gradient: Tensor, shape: tuple) -> bool:
    """Whether a convolution's gradient is two matrix products over tensors that lie right, and wide ones."""
    lie_right = all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (x, gradient))
    return lie_right and weight.shape[1] >= WIDE and weight.shape[2:] == (1, 1) and shape == ((1, 1), (0, 0), (1, 1), 1)
