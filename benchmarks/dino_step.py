"""A training step of DINO: forward, loss and backward, against the usual fallback.

    python -m benchmarks dino_step

ResNet-50, 4 levels, 900 queries and 192 denoising ones; otherwise as `deformable_step`.
"""

from __future__ import annotations

from benchmarks.deformable_step import compare
from benchmarks.harness import Row

MODEL = ["model.architecture=dino"]
"""As published."""


def run() -> list[Row]:
    """In both precisions, in turns."""
    return [row for precision in ("fp32", "bf16") for row in compare("DINO R50 4-scale", MODEL, precision)]
