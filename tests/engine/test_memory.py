"""Memory of a process that trains on the CPU: what steps free is given back."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import fit_here, make_dataset, tiny_config

from detr_ray.engine import loop

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")

RESIDENT = """
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024
"""

GAPS = f"""{RESIDENT}
import json
from detr_ray.engine.memory import give_back_freed_memory
blocks = [bytearray(100_000) for _ in range(4000)]
full = resident()
kept = blocks[::50]
del blocks
freed = resident()
give_back_freed_memory()
print(json.dumps([full, freed, resident()]))
"""


def answer(script: str, *arguments: str, limit_s: float) -> list:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=Path(__file__).parents[2], env={"PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parents[2]}"},
        capture_output=True, text=True, timeout=limit_s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_free_between_blocks_in_use_is_given_back() -> None:
    full, freed, given_back = answer(GAPS, limit_s=120)
    assert freed > full - 50, "glibc keeps the 400 MB by itself"
    assert given_back < full - 300


def test_training_gives_back_every_so_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(loop, "STEPS_BETWEEN_GIVING_BACK", 4)
    monkeypatch.setattr(loop, "give_back_freed_memory", lambda: given.append(1))
    dataset = make_dataset(tmp_path / "shapes", num_val=2)
    assert fit_here(tiny_config(dataset, tmp_path)).step == 10
    assert len(given) == 2
