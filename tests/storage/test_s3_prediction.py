"""Predicting from and into a bucket is predicting from and into a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from s3_server import S3Server
from tiny import fit_here, make_dataset, tiny_config

import detr_ray
from detr_ray import predict as command
from detr_ray.locations import delete_file, list_names, read_bytes


@pytest.mark.slow
def test_images_model_and_results_lie_in_a_bucket(
    s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_dataset(tmp_path / "shapes", num_train=8, num_val=4, image_size=(40, 90))
    trained = fit_here(tiny_config(data, tmp_path, "train.max_steps=1", "run.name=a"))
    bucket = f"s3://{s3.new_bucket()}"
    s3.upload(data / "val2017", f"{bucket.removeprefix('s3://')}/day one")
    s3.upload(Path(trained.run_path), f"{bucket.removeprefix('s3://')}/runs/a")
    settings = ["--part-images", "1", "--to", "coco,pictures", "train.launcher=local", "train.use_gpu=false"]

    def rows(model: str, images: str, out: str) -> list[dict]:
        assert command.main([model, "--images", images, "--out", out, *settings]) == 0, capsys.readouterr().err
        assert json.loads(read_bytes(f"{out}/prediction.json"))["complete"] is True
        return json.loads(read_bytes(f"{out}/results.json"))

    expected = rows(trained.run_path, str(data / "val2017"), str(tmp_path / "out"))
    there = f"{bucket}/found"
    assert rows(f"{bucket}/runs/a", f"{bucket}/day one/*.jpg", there) == expected
    assert len(list_names(f"{there}/pictures")) == 4
    delete_file(f"{there}/parts/part-000001.parquet")
    assert rows(f"{bucket}/runs/a", f"{bucket}/day one", there) == expected
    assert "of which 3 are done" in capsys.readouterr().out

    name = sorted(path.name for path in (data / "val2017").iterdir())[0]
    model = detr_ray.load_model(f"{bucket}/runs/a")
    found = model.predict(f"{bucket}/day one/{name}", device="cpu")
    assert found.scores.tolist() == model.predict(data / "val2017" / name, device="cpu").scores.tolist()
