"""Memory of a process that trains on the CPU: what steps free is given back."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import fit_here, make_dataset, tiny_config

from detr_ray.engine import cpu
from detr_ray.engine.cpu import HeldMemory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")

RESIDENT = """
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024
"""

GAPS = f"""{RESIDENT}
import json
from detr_ray.engine.cpu import give_back_freed_memory
blocks = [bytearray(100_000) for _ in range(4000)]
full = resident()
kept = blocks[::50]
del blocks
freed = resident()
give_back_freed_memory()
print(json.dumps([full, freed, resident()]))
"""

MANY_SHAPES = f"""{RESIDENT}
import json, sys
from pathlib import Path
from tiny import fit_here, tiny_config
from detr_ray.tracking import MemoryTracker

seen = []

class Resident(MemoryTracker):
    def log_metrics(self, metrics, step):
        super().log_metrics(metrics, step)
        if "train/loss" in metrics:
            seen.append([step, resident()])

fit_here(tiny_config(*map(Path, sys.argv[1:3]), *sys.argv[3:]), Resident())
print(json.dumps(seen))
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


def test_it_gives_back_only_what_is_much_more_than_a_step_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(cpu, "give_back_freed_memory", lambda: given.append(1))
    held, needs = HeldMemory(), [1000, 1100, 1249, 1251, 1150, 1400, 1438, 1500, 1000]
    monkeypatch.setattr(cpu, "resident_bytes", lambda: needs.pop(0))
    # 1,000 bound the first steps; the step after giving back needed 1,150, which bounds those after it.
    assert [held.after_step() for _ in range(9)] == [False, False, False, True, False, False, True, False, False]


def test_training_looks_after_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    monkeypatch.setattr(HeldMemory, "after_step", lambda self: looked.append(1))
    dataset = make_dataset(tmp_path / "shapes", num_val=2)
    assert fit_here(tiny_config(dataset, tmp_path, "train.epochs=1")).step == len(looked) == 5


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_memory_stays_flat_over_batches_of_many_shapes(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "shapes", num_train=96, num_val=2, image_size=(120, 160))
    settings = (
        "train.max_steps=400", "train.epochs=100", "train.log_every_steps=50", "eval.every_epochs=0",
        "data.augment={scales: [96, 112, 128, 144, 160], max_size: 220, crop_scales: [100, 130], crop_min: 70,"
        " crop_max: 100}",
    )  # fmt: skip
    seen = dict(answer(MANY_SHAPES, str(dataset), str(tmp_path), *settings, limit_s=2300))
    assert seen[400] < 1.2 * seen[100]
    assert max(seen.values()) < 1.25 * seen[100]
