"""A run in a bucket leaves in MLflow what a run in a folder leaves, its models included, and can be watched there."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest
from s3_server import S3Server
from tiny import make_dataset, tiny_config

from detr_ray import watch
from detr_ray.addresses import join
from detr_ray.detector.artifact import MODEL_FILE
from detr_ray.engine.reporting.tracking_store import local_storage
from detr_ray.locations import read_bytes
from detr_ray.runtime.launch import fit
from detr_ray.tracking import MlflowTracker


def stored_bytes(uri: str, run_id: str, path: str, folder: Path) -> bytes:
    from mlflow.artifacts import download_artifacts

    return Path(
        download_artifacts(run_id=run_id, artifact_path=path, tracking_uri=uri, dst_path=str(folder))
    ).read_bytes()


@pytest.mark.timeout(240)
def test_a_run_in_a_bucket_sends_its_models(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = make_dataset(tmp_path / "data", num_train=16, num_val=4)
    storage = f"s3://{s3.new_bucket()}/runs with 100%25"
    config = tiny_config(data, storage, "run.name=mine", "train.epochs=1", "tracking.enabled=true")  # type: ignore[arg-type]
    result = fit(config)
    assert result.best_checkpoint is not None
    written = read_bytes(join(result.best_checkpoint, MODEL_FILE))

    mine = local_storage(config)
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700 and mine.stat().st_uid == os.getuid()
    uri = f"sqlite:///{mine}/mlflow.db"
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("detr_ray").experiment_id])
    for kind in ("best", "last"):
        (tmp_path / kind).mkdir()
        assert stored_bytes(uri, run.info.run_id, f"checkpoints/{kind}/{MODEL_FILE}", tmp_path / kind) == written
    assert not list(tmp_path.glob("upload-*")), "no copy stays"

    assert watch.main([join(storage, "mine")]) == 0
    seen = capsys.readouterr().out
    assert "  step 2/2  loss" in seen and f"AP {result.metrics['val/AP']:.3f}" in seen
    assert "run mine: finished, step 2/2 (100%), epoch 1.00 of 1" in seen

    # What is gone from the bucket until it is sent is left out and counted.
    tracker = MlflowTracker(tmp_path / "late", uri=uri, experiment="late", run_name="late")
    tracker.log_file(join(storage, "pruned.pt"), "checkpoints/best")
    tracker.finish("FINISHED")
    assert tracker.pending().left_out == {"files gone": 1} and not tracker.pending()
