"""A prediction that is killed goes on: no image twice, none missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tiny import fit_here, make_dataset, tiny_config

from detr_ray import predict as command


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_the_same_command_after_a_kill_does_what_is_missing(tmp_path: Path, launcher: str) -> None:
    data = make_dataset(tmp_path / "shapes", num_train=8, num_val=400, image_size=(40, 90))
    trained = fit_here(tiny_config(data, tmp_path, "train.max_steps=1", "run.name=a", "eval.every_epochs=0"))
    arguments = [trained.run_path, "--images", f"{data}/val2017", "--part-images", "8", "--to", "coco,parquet"]
    arguments += [f"train.launcher={launcher}", "train.use_gpu=false", "eval.batch_size=2"]
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-m", "detr_ray.predict", *arguments, "--out", str(out)])
    parts = out / "parts"
    deadline = time.monotonic() + 120
    while not (parts.is_dir() and len(list(parts.glob("*.parquet"))) >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}
    assert 3 <= len(kept) < 50 and json.loads((out / "prediction.json").read_text())["complete"] is False

    assert command.main([*arguments, "--out", str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert command.main([*arguments, "--out", str(tmp_path / "straight")]) == 0
    assert (out / "results.json").read_bytes() == (tmp_path / "straight" / "results.json").read_bytes()
    seen = [set(pq.read_table(path)["image_id"].to_pylist()) for path in parts.glob("*.parquet")]
    assert sum(map(len, seen)) == 400 == len(set().union(*seen))
