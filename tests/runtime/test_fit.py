"""The job on Ray: real workers, real data tasks, against the same loop in this process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow_store import empty_store
from tiny import fit_here, make_dataset, tiny_config

from detr_ray.config import ConfigError
from detr_ray.engine.checkpoints.store import CheckpointStore
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.job import prepare_job
from detr_ray.runtime.launch import evaluate, fit

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("shared_ray")]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes", empty_fraction=0.2)


def stream(run: Path) -> list[tuple[int, int]]:
    """(position, image id) of everything that all workers of a run saw, by position."""
    seen = []
    for path in (run / "stream").glob("rank-*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            seen += zip(record["positions"], record["image_ids"], strict=True)
    return sorted(seen)


def weights(run: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(str(run / "checkpoints"))
    latest = store.latest()
    assert latest is not None
    return store.load(latest, "model.pt")["model"]


def test_two_workers_see_the_stream_of_one_and_everything_is_recorded(dataset: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    uri = empty_store(tmp_path)
    config = tiny_config(
        dataset, tmp_path, "train.launcher=ray", "train.num_workers=2", "run.name=two", "tracking.enabled=true"
    )
    result = fit(config, lines.append)
    assert (result.status, result.step) == ("finished", 10)
    assert result.table.startswith("AP ") and result.metrics["val/AP"] >= 0
    assert any("step 10/10" in line for line in lines), "progress reaches whoever called"

    fit_here(tiny_config(dataset, tmp_path, "run.name=one"))
    assert stream(tmp_path / "two") == stream(tmp_path / "one")
    planner_steps = prepare_job(config, lambda line: None).data.plan(1, 0)
    planned = [(s.position, s.image_id) for step in range(10) for batch in planner_steps.step(step) for s in batch]
    assert stream(tmp_path / "two") == sorted(planned)

    import mlflow

    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("detr_ray")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "two"
    assert run.data.params["optim.lr"] == "0.0001"
    assert run.data.tags["data.train.fingerprint"] == prepare_job(config, lambda line: None).data.train.fingerprint
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")] == list(range(1, 11))
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "val/AP")] == [5, 10]
    artifacts = {item.path for folder in ("", "checkpoints") for item in client.list_artifacts(run.info.run_id, folder)}
    assert artifacts >= {"config.yaml", "checkpoints/best", "checkpoints/last"}

    again = fit(config, lines.append)
    assert again.status == "nothing to do"


def test_one_ray_worker_gives_the_weights_of_the_plain_loop_also_without_mlflow(dataset: Path, tmp_path: Path) -> None:
    settings = ("train.epochs=1", "model.dropout=0.1", "optim.ema_decay=0.9")
    threads = int(os.environ["OMP_NUM_THREADS"])  # the worker takes no more: sums in another order are other sums
    torch.set_num_threads(threads)
    by_ray = ("train.launcher=ray", "train.num_workers=1", "run.name=ray")
    server_away = ("tracking.enabled=true", "tracking.uri=http://127.0.0.1:9")
    lines: list[str] = []
    fit(tiny_config(dataset, tmp_path, *settings, *by_ray, *server_away), lines.append)
    assert any(line.startswith("WARNING: MLflow at http://127.0.0.1:9") for line in lines), lines
    fit_here(tiny_config(dataset, tmp_path, *settings, "run.name=here"))
    there, here = weights(tmp_path / "ray"), weights(tmp_path / "here")
    largest = max(float((there[name].double() - here[name].double()).abs().max()) for name in here)
    assert largest < 1e-6


def test_the_ap_depends_neither_on_workers_nor_on_the_batch_size(dataset: Path, tmp_path: Path) -> None:
    trained = fit_here(tiny_config(dataset, tmp_path, "train.epochs=4", "optim.lr=1e-3", "optim.lr_backbone=1e-3"))
    checkpoint = f"eval.checkpoint={trained.run_path}"
    found = [
        evaluate(tiny_config(dataset, tmp_path, checkpoint, *settings))
        for settings in (
            ("train.launcher=ray", "train.num_workers=2", "eval.batch_size=4"),
            ("eval.batch_size=4",),
            ("eval.batch_size=1",),
        )
    ]
    numbers = [result.metrics.as_metrics("") for result in found]
    assert numbers[0] == numbers[1] == numbers[2]
    assert all(len(np.unique(result.detections.image_ids)) == 8 for result in found)


def test_an_unreadable_image_is_named_and_nothing_is_tried_again(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data")
    path = sorted((dataset / "train2017").iterdir())[5]
    path.write_bytes(path.read_bytes()[:200])
    config = tiny_config(dataset, tmp_path, "train.launcher=ray", "run.name=bad")
    with pytest.raises(RunFailed, match=path.name) as failure:
        fit(config)
    assert failure.value.agreed, "a search starts the trial again otherwise"


def test_more_workers_than_the_cluster_has_are_refused_at_once(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(dataset, tmp_path, "train.launcher=ray", "train.num_workers=8")
    with pytest.raises(ConfigError, match=r"train\.num_workers: 8 workers need 8 CPUs"):
        fit(config)


def test_gpus_that_are_not_there_are_refused_at_once(dataset: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there are GPUs here")
    config = tiny_config(dataset, tmp_path, "train.launcher=ray", "train.use_gpu=true")
    with pytest.raises(ConfigError, match=r"train\.use_gpu"):
        fit(config)
