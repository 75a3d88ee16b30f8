"""What training on a CPU needs in addition: returning memory to the system, and a warning of slow number formats."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

import torch

from detr_ray.engine.context import WorkerContext

MOST_OVER_NEED = 1.25
"""How much memory a process may hold, as a multiple of what a step needed that began without gaps in the heap."""

_STATM = Path("/proc/self/statm")

_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "sve_bf16")
"""Names under which torch lists a processor's instructions for bf16; the last two are Arm's."""


class HeldMemory:
    """Keeps the memory of a process near what its largest step needs.

    Batches have different shapes, so each step leaves gaps of different sizes in the heap. The allocator keeps free
    memory between two used blocks, and later blocks may not fit into it. Over hundreds of steps, the process grows to
    several times what a step needs. Returning the gaps to the system costs the next step a fraction of its time,
    because the kernel clears the pages when they are used again. So it is done only when much memory is free. No
    setting of the process changes. Does nothing if the allocator is not glibc's.
    """

    def __init__(self) -> None:
        self._need = 0
        self._without_gaps = True

    def after_step(self) -> bool:
        """Gives free memory back if the process holds too much; returns whether it did."""
        held = resident_bytes()
        if self._without_gaps:
            self._need, self._without_gaps = max(self._need, held), False
        if held <= MOST_OVER_NEED * self._need:
            return False
        give_back_freed_memory()
        self._without_gaps = True
        return True


def resident_bytes() -> int:
    """Memory that this process holds; 0 where the system does not say."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def free_bytes() -> int:
    """Memory that processes may still take: of the machine, or of the container where that is less; 0 if unknown."""
    found = [_in_meminfo("MemAvailable:")]
    for folder, most, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such limit: "max"
            limit, taken = (int(Path(folder, name).read_text()) for name in (most, used))
            found.append(max(limit - taken, 1))
    return min(found)


def _in_meminfo(name: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)


class PeakMemory:
    """The most memory that this process held since it was made.

    Raises:
        OSError: the system does not say; Linux does.
    """

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now

    def read(self) -> int:
        """In bytes."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def give_back_freed_memory() -> None:
    """Has glibc's allocator return free memory between used blocks to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


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
    """Whether torch computes bf16 with oneDNN, by torch's own check; true if torch has no such check."""
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return ask is None or bool(ask())


def _has_instructions() -> bool:
    list_all = getattr(torch.cpu, "get_capabilities", None)  # torch 2.14
    return list_all is None or any(list_all().get(name, False) for name in _INSTRUCTIONS)
