"""What one call may change for a whole process, for tests that it does not."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile


def state_of_this_process() -> dict[str, Any]:
    """All of it, as values that can be compared."""
    loggers = {name: one for name, one in logging.Logger.manager.loggerDict.items() if isinstance(one, logging.Logger)}
    state = {
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "loggers": {
            name: (one.level, one.propagate, one.disabled, list(one.handlers)) for name, one in loggers.items()
        },
        "root logger": (logging.root.level, list(logging.root.handlers)),
        "warnings": [(item[0], item[2]) for item in warnings.filters],
        "excepthook": sys.excepthook,
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch random": torch.get_rng_state().tolist(),
        "torch threads": torch.get_num_threads(),
        "torch threads between operations": torch.get_num_interop_threads(),
        "torch type": torch.get_default_dtype(),
        "torch gradients": torch.is_grad_enabled(),
        "torch deterministic": torch.are_deterministic_algorithms_enabled(),
        "pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
    }
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        state["dynamo"] = (dynamo.config.recompile_limit, dynamo.config.accumulated_recompile_limit)
    return state


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Fails where this process is not afterwards as it was; loggers and modules may have come into being."""
    before = state_of_this_process()
    yield
    after = state_of_this_process()
    for name, value in before.items():
        if name == "loggers":
            assert {one: after[name][one] for one in value} == value
        else:
            assert after[name] == value, f"{name} has changed"
