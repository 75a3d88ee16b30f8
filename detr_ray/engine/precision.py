"""Whether a processor is fast in the number format that it is asked to compute in."""

from __future__ import annotations

import torch

from detr_ray.engine.context import WorkerContext

_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "sve_bf16")
"""Names under which torch lists a processor's instructions for bf16; the last two are Arm's."""


def slow_precision(precision: str, device_type: str) -> str | None:
    """A line for the user where ``precision`` makes this processor slower instead of faster; None where it does not.

    Results are right all the same. The factors were measured: steps of ResNet-18 and ResNet-50 models in bf16 over the
    same in fp32.

    Args:
        precision: ``train.precision``.
        device_type: of the device that computes.
    """
    if precision != "bf16" or device_type != "cpu":
        return None
    if not _onednn_computes_bf16():
        times = "7 to 13 times"
    elif not _has_instructions():
        times = "about twice"
    else:
        return None
    return (
        f"this processor has no instructions for train.precision=bf16: a step takes {times} as long as in fp32; "
        "set train.precision=fp32"
    )


def warn_of_slow_precision(precision: str, context: WorkerContext) -> None:
    """Shows the user the line of `slow_precision`, if there is one; for one worker of a group."""
    line = slow_precision(precision, context.device.type)
    if line is not None:
        context.say(f"WARNING: {line}")


def _onednn_computes_bf16() -> bool:
    """What torch itself asks before it hands bf16 to oneDNN; where the question is not to be had, it is taken so."""
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return ask is None or bool(ask())


def _has_instructions() -> bool:
    list_all = getattr(torch.cpu, "get_capabilities", None)  # torch 2.14
    return list_all is None or any(list_all().get(name, False) for name in _INSTRUCTIONS)
