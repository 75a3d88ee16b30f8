"""Predictions through Ray Data: what the same job finds in this process."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from tiny import fit_here, make_dataset, tiny_config

from detr_ray import predict as command
from detr_ray.config import load_config
from detr_ray.engine.prediction_job import Wanted, prepare_prediction
from detr_ray.model_sources import load_model
from detr_ray.runtime.prediction import predictions
from detr_ray.runtime.prediction_actors import plan_actors

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

    config = load_config(None, ["train.use_gpu=false"])
    wanted = Wanted([str(images)], None, None, None, 4)
    job = prepare_prediction(load_model(trained.run_path), config, wanted, lambda line: None)
    actors = dataclasses.replace(plan_actors(config, job, len(job.batches)), num_cpus=1)
    dataset = predictions(job, range(len(job.batches)), actors)
    assert sum(1 for _ in dataset.iter_batches(batch_size=1)) == len(job.batches)
    assert "_MadeBatches)->MapBatches" not in dataset.stats(), "batches are made beside the model"
    assert "_PredictingActor" in dataset.stats()
