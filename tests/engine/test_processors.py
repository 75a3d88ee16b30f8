"""bf16 on processors that do not have it: the same job, slower, and a line that says so.

oneDNN takes itself for an older processor's where the environment says so, and torch asks oneDNN. It reads that once,
hence processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny import fit_here, make_dataset, tiny_config

from detr_ray.config import Config
from detr_ray.engine.cpu import slow_precision
from detr_ray.model import build_model
from detr_ray.tracking import MemoryTracker

WITHOUT_AVX512 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
AVX512_WITHOUT_BF16 = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
STEPS = (
    "train.max_steps=2", "train.precision=bf16", "run.name=a", "train.global_batch_size=2",
    "data.augment={scales: [32], max_size: 48}", "eval={size: 32, max_size: 48}",
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes", num_train=8, num_val=2)


def frozen(dataset: Path, folder: Path, *overrides: str) -> Config:
    """A model whose norms are frozen, from weights that it could have been trained to."""
    random = tiny_config(dataset, folder, "model.backbone_norm=frozen")
    torch.manual_seed(0)
    torch.save({"model": build_model(random.model, 6).state_dict()}, folder / "start.pth")
    start = ("model.backbone_norm=frozen", f"model.init_from={folder / 'start.pth'}")
    return tiny_config(dataset, folder, *start, *overrides)


RUN = """
import json, sys
from importlib import import_module
for name, *arguments in json.loads(sys.argv[1]):
    print("-- next --", flush=True)
    if code := import_module(f"detr_ray.{name}").main(arguments):
        sys.exit(code)
"""


def run(environment: dict[str, str], config: Config, folder: Path, *commands: Sequence[str]) -> list[str]:
    """What commands print, one after another on a processor like that; all of them have to succeed."""
    (folder / "config.yaml").write_text(config.to_yaml())
    calls = [[name, "--config", str(folder / "config.yaml"), *more] for name, *more in commands]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(calls)],
        env=os.environ | environment, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("-- next --")[1:]


def first_loss(lines: str) -> float:
    return float(next(line for line in lines.splitlines() if "step 1/" in line).split("loss ")[1].split()[0])


def test_bf16_works_without_avx512_and_is_warned_of(dataset: Path, tmp_path: Path) -> None:
    config = frozen(dataset, tmp_path, *STEPS)
    commands = (["check"], ["train"], ["evaluate", f"eval.checkpoint={tmp_path / 'a'}"])
    checked, trained, evaluated = run(WITHOUT_AVX512, config, tmp_path, *commands)
    tracker = MemoryTracker()
    fit_here(frozen(dataset, tmp_path, *STEPS, "train.max_steps=1", "train.precision=fp32", "run.name=exact"), tracker)
    assert first_loss(trained) == pytest.approx(tracker.history("train/loss")[0][1], rel=0.02)
    assert "AP50" in trained and "AP50" in evaluated
    line = "this processor has no instructions for train.precision=bf16: a step takes 7 to 13 times as long as in fp32"
    assert f"warning  {line}" in checked and "> set train.precision=fp32" in checked
    for lines in (trained, evaluated):
        assert lines.count(f"WARNING: {line}; set train.precision=fp32") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("norm", ["frozen", "batch"])
@pytest.mark.parametrize("environment", [WITHOUT_AVX512, {}], ids=["avx2", "here"])
def test_a_compiled_model_trains_in_bf16_on_older_processors(
    dataset: Path, tmp_path: Path, norm: str, environment: dict[str, str]
) -> None:
    more = (*STEPS, "train.compile=true", "data.pad_multiple=96")
    config = (frozen if norm == "frozen" else tiny_config)(dataset, tmp_path, *more)
    assert "AP50" in run(environment, config, tmp_path, ["train"])[0]


@pytest.mark.parametrize(("precision", "device"), [("fp32", "cpu"), ("bf16", "cuda"), ("fp16", "cuda")])
def test_nothing_is_said_of_other_formats_and_gpus(precision: str, device: str) -> None:
    assert slow_precision(precision, device) is None
