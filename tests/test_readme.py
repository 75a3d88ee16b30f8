"""Every command of the README is run, on a data set and a model of a test's size."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from ports import free_port
from tiny import TINY, make_dataset

from detr_ray.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text().replace("\\\n", " ")
BLOCKS = re.findall(r"^ {4}(\S.*)$", README, re.MULTILINE)
OURS = [line for line in BLOCKS if line.startswith("python -m detr_ray.")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the files that the README's commands name, and a finished run ``runs/NAME``."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", folder / "configs")
    dataset = make_dataset(folder / "runs" / "quickstart-data")
    shutil.copytree(dataset / "train2017", folder / "FOLDER" / "train2017")
    (folder / "FOLDER" / "annotations").mkdir()
    name = "instances_train2017.json"
    shutil.copy(dataset / "annotations" / name, folder / "FOLDER" / "annotations" / name)
    shutil.copytree(dataset / "val2017", folder / "photos")
    return folder


def test_the_readme_has_the_commands_that_a_stranger_needs() -> None:
    assert {re.match(r"python -m detr_ray\.(\w+)", line)[1] for line in OURS} == {  # type: ignore[index]
        "train", "check", "evaluate", "predict", "watch", "prepare", "tune", "show", "report", "registry",
    }  # fmt: skip
    assert [line.split()[1] for line in BLOCKS if line.startswith("make ")] == ["quickstart", "test"]


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "training.md"], ids=lambda page: page.name)
def test_trainings_that_need_more_than_a_test_has_are_configured_well(page: Path) -> None:
    lines = re.findall(r"^ {4}(.*detr_ray\.train .*)$", page.read_text().replace("\\\n", " "), re.MULTILINE)
    assert lines
    for line in lines:
        words = shlex.split(line.partition("detr_ray.train ")[2])
        assert words.pop(0) == "--config"
        load_config(ROOT / words[0], words[1:]).check_training()


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)`?", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_command_does_what_it_says(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(folder)
    same_data = ("data.generate=null",)
    assert run("train", ["--config", "configs/quickstart.yaml", "run.name=NAME"], *same_data) == 0
    for line in [line for line in OURS if ".tune" not in line]:
        _, _, module, *arguments = shlex.split(line)
        extra = same_data if "quickstart" in line else ()
        code = run(module.removeprefix("detr_ray."), arguments, *extra)
        printed = capsys.readouterr()
        assert code == 0, f"{line}\n{printed.out}\n{printed.err}"
    assert (folder / "found.png").is_file() and (folder / "suspicious.png").is_file()
    assert (folder / "runs" / "NAME" / "report.html").is_file()
    assert (folder / "found" / "predictions.csv").is_file()
    assert len(list((folder / "found" / "pictures").iterdir())) == 8
    assert (folder / "shards" / "val" / "index.parquet").is_file()
    assert (folder / "runs" / "mine" / "checkpoints").is_dir()


@pytest.mark.slow  # a search starts many processes; a short one is in tests/config_keys/on_ray_cases.py
@pytest.mark.ray
def test_the_search_ends_with_a_command_that_trains_the_best(folder: Path, tmp_path: Path) -> None:
    (line,) = [line for line in OURS if ".tune" in line]
    python, *arguments = shlex.split(line)
    smaller = [*TINY, "data.generate=null", "tracking.enabled=true", "data.max_images=null", "tune.trials=2"]
    storage = f"run.storage={tmp_path}"
    done = subprocess.run(
        [sys.executable, *arguments, *smaller, storage],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert (python, done.returncode) == ("python", 0), f"{done.stdout}\n{done.stderr}"
    assert re.search(r"^best +t00[01]: val/AP ", done.stdout, re.MULTILINE), done.stdout
    assert re.search(
        r"^train it +python -m detr_ray\.train --config configs/tune/asha_lr\.yaml .*optim\.lr=", done.stdout, re.M
    )


def run(command: str, arguments: list[str], *extra: str) -> int:
    module = importlib.import_module(f"detr_ray.{command}")
    settings = [*TINY, "tracking.enabled=true", "model.backbone_weights=none", "train.num_workers=null"]
    return int(module.main([*arguments, *settings, *extra]))


@pytest.mark.slow
def test_the_curves_can_be_looked_at(folder: Path) -> None:
    (command,) = [line for line in BLOCKS if line.startswith("mlflow ui")]
    port = free_port()
    executable = Path(sys.executable).parent / "mlflow"
    process = subprocess.Popen(
        [str(executable), *shlex.split(command)[1:], "--port", str(port)], cwd=folder, start_new_session=True
    )
    try:
        for _ in range(60):
            time.sleep(1)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                    assert answer.status == 200
                    return
            except OSError:
                continue
        pytest.fail("mlflow ui does not answer")
    finally:
        import os
        import signal

        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
