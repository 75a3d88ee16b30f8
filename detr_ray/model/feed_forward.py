"""The feed-forward network of transformer layers. Knows vectors; knows nothing of cells, queries or attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Base of transformer layers, which make these parts themselves: checkpoints keep the order of parameters."""

    linear1: nn.Linear
    linear2: nn.Linear
    dropout: nn.Dropout

    def feed_forward(self, x: Tensor) -> Tensor:
        """``[..., dim]`` -> ``[..., dim]``, without the residual connection."""
        out: Tensor = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return out
