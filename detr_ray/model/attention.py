"""Multi-head attention with the parameter names and the init of ``torch.nn.MultiheadAttention``.

Knows vectors and padding; knows nothing of layers, positions or images. `forward` uses a fused kernel, which need not
store the weights (queries x keys); `MultiheadAttention.weights` computes them for inspection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiheadAttention(nn.Module):
    """Scaled dot-product attention of several heads, batch first.

    Args:
        dim: length of the vectors that come in and go out; a multiple of ``num_heads``.
        num_heads: parallel heads.
        dropout: share of attention weights dropped in training.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"hidden_dim must be a multiple of num_heads: {dim} is none of {num_heads}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Computes for each query the weighted sum of the values.

        Args:
            query: ``[B, L, dim]``. Passing one tensor as query and key saves a matrix product.
            key: ``[B, S, dim]``.
            value: ``[B, S, dim]``.
            allowed: bool, broadcastable to ``[B, num_heads, L, S]``, True where a query may attend; at least one key
                for each query. None: everywhere.

        Returns:
            ``[B, L, dim]``.
        """
        dim = self.out_proj.in_features
        # One `split` instead of slices: each slice would fill a whole gradient with zeros.
        if query is key:
            weight, value_weight = self.in_proj_weight.split((2 * dim, dim))
            bias, value_bias = self.in_proj_bias.split((2 * dim, dim))
            q, k = F.linear(query, weight, bias).chunk(2, dim=-1)
        else:
            query_weight, key_weight, value_weight = self.in_proj_weight.chunk(3)
            query_bias, key_bias, value_bias = self.in_proj_bias.chunk(3)
            q, k = F.linear(query, query_weight, query_bias), F.linear(key, key_weight, key_bias)
        v = F.linear(value, value_weight, value_bias)
        gathered = self._gather(self._split_heads(q), self._split_heads(k), self._split_heads(v), allowed)
        out: Tensor = self.out_proj(gathered.transpose(1, 2).flatten(2))
        return out

    def weights(self, query: Tensor, key: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The attention weights, for inspection; not used by `forward`.

        Args:
            query: as in `forward`.
            key: as in `forward`.
            allowed: as in `forward`.

        Returns:
            ``[B, num_heads, L, S]`` float32; sums to 1 over ``S``, and is 0 where a query may not attend.
        """
        query_weight, key_weight, _ = self.in_proj_weight.chunk(3)
        query_bias, key_bias, _ = self.in_proj_bias.chunk(3)
        q = self._split_heads(F.linear(query, query_weight, query_bias)).float()
        k = self._split_heads(F.linear(key, key_weight, key_bias)).float()
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        return scores.softmax(-1)

    def _gather(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        """The fused kernel, over ``[B, num_heads, L or S, dim / num_heads]``."""
        dropout = self.dropout if self.training else 0.0
        if q.device.type == "cpu" and q.dtype is torch.bfloat16 and torch.is_grad_enabled():
            # The backward kernel of CPUs takes several times as long in bf16 as in fp32.
            with torch.autocast("cpu", enabled=False):
                exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), allowed, dropout)
            return exact.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, allowed, dropout)

    def _split_heads(self, x: Tensor) -> Tensor:
        """``[B, L, dim]`` as ``[B, num_heads, L, dim / num_heads]``, without a copy."""
        return x.view(x.shape[0], -1, self.num_heads, x.shape[-1] // self.num_heads).transpose(1, 2)
