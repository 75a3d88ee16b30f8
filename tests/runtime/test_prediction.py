"""Predictions through Ray Data: what the same job finds in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny import fit_here, make_dataset, tiny_config

from detr_ray import predict as command

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("shared_ray")]


def test_the_cluster_finds_what_this_process_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_dataset(tmp_path / "shapes", num_train=8, num_val=12, image_size=(40, 90))
    trained = fit_here(tiny_config(data, tmp_path, "train.max_steps=1", "run.name=a"))
    images = shutil.copytree(data / "val2017", tmp_path / "images")
    bad = sorted(images.iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:400])
    found = {}
    for launcher in ("local", "ray"):
        arguments = [trained.run_path, "--images", str(images), "--out", str(tmp_path / launcher)]
        arguments += ["--part-images", "4", "train.use_gpu=false", f"train.launcher={launcher}"]
        assert command.main(arguments) == 0, capsys.readouterr().err
        rows = json.loads((tmp_path / launcher / "results.json").read_text())
        found[launcher] = [(row["image_id"], row["category_id"]) for row in rows]
        assert [line.partition(":")[0] for line in (tmp_path / launcher / "bad_images.txt").open()] == [str(bad)]
    assert len(found["ray"]) == 11 * 8
    assert sorted(found["ray"]) == sorted(found["local"])
