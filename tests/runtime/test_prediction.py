"""Predictions through Ray Data: what the same job finds in this process."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image
from ray.util.annotations import RayDeprecationWarning
from tiny import fit_here, make_dataset, tiny_config

from detr_ray import predict as command
from detr_ray.config import load_config
from detr_ray.data.formats import open_split
from detr_ray.engine.prediction_job import Wanted, prepare_prediction
from detr_ray.evaluation import DetectionTable, GroundTruth, evaluate_detections
from detr_ray.model_sources import load_model
from detr_ray.runtime import prediction
from detr_ray.runtime.launch import evaluate
from detr_ray.runtime.prediction import StoredJob, predictions
from detr_ray.runtime.prediction_actors import Actors, plan_actors

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("shared_ray")]


def store_in_many_ways(folder: Path) -> None:
    """Stores each image of a folder anew, in the kinds of files and under the names that people have."""
    turned = Image.Exif()
    turned[0x0112] = 6
    for number, path in enumerate(sorted(folder.iterdir())[:10]):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        path.unlink()
        name, stored, options = [
            ("print.jpg", image.convert("CMYK"), {}),
            ("few colours.png", image.quantize(16), {}),
            ("shot #12.png", image.convert("RGBA"), {}),
            ("deep.png", Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257), {}),
            ("Straße_ä.webp", image, {}),
            ("scan.tif", image, {"compression": "tiff_lzw"}),
            ("turned.JPG", image, {"exif": turned}),
            ("100%_sure.gif", image.quantize(64), {}),
            ("a+b=c.bmp", image, {}),
            ("progressive.jpeg", image, {"progressive": True}),
        ][number]
        stored.save(folder / name, **options)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "png in truth.jpg").write_bytes((folder / "shot #12.png").read_bytes())


def test_the_cluster_finds_what_this_process_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_dataset(tmp_path / "shapes", num_train=8, num_val=12, image_size=(40, 90))
    trained = fit_here(tiny_config(data, tmp_path, "train.max_steps=1", "run.name=a"))
    images = shutil.copytree(data / "val2017", tmp_path / "images")
    store_in_many_ways(images)
    bad = max(images.glob("0*.jpg"))
    bad.write_bytes(bad.read_bytes()[:400])
    found = {}
    for launcher in ("local", "ray"):
        arguments = [trained.run_path, "--images", str(images), "--out", str(tmp_path / launcher)]
        arguments += ["--part-images", "4", "train.use_gpu=false", f"train.launcher={launcher}"]
        assert command.main(arguments) == 0, capsys.readouterr().err
        rows = json.loads((tmp_path / launcher / "results.json").read_text())
        found[launcher] = [(row["image_id"], row["category_id"], row["score"], *row["bbox"]) for row in rows]
        listed = {line.partition(":")[0] for line in (tmp_path / launcher / "bad_images.txt").open()}
        assert listed == {str(bad), f"{images}/empty.jpg", f"{images}/IMG_1.HEIC"}
    assert len(found["ray"]) == 12 * 8
    assert np.allclose(sorted(found["ray"]), sorted(found["local"]), rtol=0, atol=1e-3)

    config = load_config(None, ["train.use_gpu=false"])
    wanted = Wanted([str(images)], None, None, None, 4)
    job = prepare_prediction(load_model(trained.run_path), config, wanted, lambda line: None)
    actors = dataclasses.replace(plan_actors(config, job, len(job.batches)), num_cpus=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RayDeprecationWarning)
        dataset = predictions(StoredJob.of(job), range(len(job.batches)), actors)
    assert sum(1 for _ in dataset.iter_batches(batch_size=1)) == len(job.batches)
    assert "_MadeBatches)->MapBatches" not in dataset.stats(), "batches are made beside the model"
    assert "_PredictingActor" in dataset.stats()


def test_the_ap_is_that_of_evaluate_to_the_last_digit_in_several_executions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_dataset(tmp_path / "shapes", num_train=8, num_val=24, image_size=(40, 90))
    trained = fit_here(tiny_config(data, tmp_path, "train.max_steps=4", "run.name=a", "optim.lr=1e-3"))
    expected = evaluate(tiny_config(data, tmp_path, f"eval.checkpoint={trained.run_path}"))
    made = []

    def counted(stored: StoredJob, numbers: Sequence[int], actors: Actors) -> ray.data.Dataset:
        made.append(len(numbers))
        return predictions(stored, numbers, actors)

    monkeypatch.setattr(prediction, "SEGMENT_TASKS", 2)
    monkeypatch.setattr(prediction, "predictions", counted)
    arguments = ["--images", f"{data}/annotations/instances_val2017.json", "--root", f"{data}/val2017"]
    arguments += ["--out", str(tmp_path / "out"), "train.use_gpu=false", "train.num_workers=1", "eval.batch_size=1"]
    assert command.main([trained.run_path, *arguments]) == 0, capsys.readouterr().err
    assert len(made) > 1 and sum(made) == 24
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    found = DetectionTable(
        np.array([row["image_id"] for row in rows], np.int64),
        np.array([row["category_id"] for row in rows], np.int64),
        np.array([row["bbox"] for row in rows], np.float32),
        np.array([row["score"] for row in rows], np.float32),
    )
    truth = GroundTruth.from_columns(open_split(str(data), None, "val"))
    assert evaluate_detections(truth, found).summary == expected.metrics.summary
