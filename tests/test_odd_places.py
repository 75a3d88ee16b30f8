"""Whole runs in folders with odd names: all that is written lies there and is found again, by MLflow's client too."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from tiny import TINY

from detr_ray import evaluate, train
from detr_ray.tracking.store import sqlite_path

DATA = "data.generate={num_train: 16, num_val: 4, image_size: [48, 72], max_objects: 2, min_object_size: 12}"
KEYS = [*(key for key in TINY if not key.startswith("tracking=")), "tracking.report=false"]


def ran(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What training in this process shows."""
    assert train.main([*KEYS, DATA, "run.name=odd", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


ODD = [
    "a b", "a%20b", "a?b=c&d", "a#b", "größe", "it's \"so\"", "-lead", "a%3Fb", "a:b", "~x", "a\\b", "x" * 200,
    "file:x", "a;b$HOME`c`", "a\nb",
]  # fmt: skip


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("ä %20?#'x", id="several"),
        *(pytest.param(name, id=name[:20], marks=pytest.mark.slow) for name in ODD),
    ],
)
def test_a_run_and_its_data_in_a_folder_of_an_odd_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    place = f"./{name}" if name.startswith("~") else name  # a path that is relative, with a slash at its end
    places = [f"data.root={place}/data/", f"run.storage={place}/runs/"]
    first = ran(capsys, *places, "train.max_steps=2")
    again = ran(capsys, *places, "train.max_steps=4")
    assert "going on from step 2" in again
    folder = work / name
    assert names_in(work) == [name], "nothing lies beside it"
    assert names_in(folder) == ["data", "runs"]
    assert names_in(folder / "runs") == ["mlartifacts", "mlflow.db", "odd"]

    assert evaluate.main([*KEYS, *places, f"eval.checkpoint={place}/runs/odd"]) == 0, capsys.readouterr().err

    (hint,) = [line for line in first.splitlines() if "mlflow ui" in line] if "\n" not in name else [None]
    uri = shlex.split(hint.partition("mlflow")[2])[-1] if hint else f"sqlite:///{folder}/runs/mlflow.db"
    assert sqlite_path(uri) == folder / "runs" / "mlflow.db"
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("detr_ray").experiment_id])
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3, 4]
    text = Path(download_artifacts(run_id=run.info.run_id, artifact_path="config.yaml", tracking_uri=uri)).read_text()
    assert "storage:" in text
    stored = {file.path for file in client.list_artifacts(run.info.run_id, "checkpoints/best")}
    assert stored == {f"checkpoints/best/{name}" for name in ("manifest.json", "model.pt", "scores.json")}


def test_a_home_folder_is_found_in_all_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    keys = ["data.root=~/data", "run.storage=~/runs", "tracking.enabled=false", "train.max_steps=1"]
    ran(capsys, *keys)
    assert evaluate.main([*KEYS, *keys, "eval.checkpoint=~/runs/odd"]) == 0
    assert names_in(tmp_path / "home") == ["data", "runs"]
    assert not names_in(tmp_path / "work"), "and no folder is called ~"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file:///tmp/runs?mode=fast", "no options behind file://"),
        ("file:///tmp/runs#1", "no options behind file://"),
        ("file://elsewhere/runs", "names a machine"),
        ("x" * 300, "run.storage: {place}/mlflow.db cannot be used (File name too long)"),
        ("/dev/null/runs", "run.storage: /dev/null/runs cannot be written"),
    ],
)
def test_places_that_cannot_be_are_refused_in_one_line(
    place: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    keys = [*KEYS, DATA, f"data.root={tmp_path}/data"]
    assert train.main([*keys, f"run.storage={place}"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said.replace("{place}", f"{tmp_path}/{place}") in errors[0], errors
    assert names_in(tmp_path) == ["data"]


def test_a_home_folder_of_nobody_is_a_name_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = [*KEYS, DATA, "data.root=data", "tracking.enabled=false"]
    for key in ("model.init_from", "eval.checkpoint"):
        command = evaluate if key == "eval.checkpoint" else train
        assert command.main([*keys, f"{key}=~nobody-of-that-name/model.pt"]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "~nobody-of-that-name/model.pt" in line
