"""Keys of the section `tracking`, seen in a real MLflow store."""

from __future__ import annotations

import pytest
from config_keys.registry import Place, shows
from mlflow_store import empty_store

from detr_ray.engine.run_report.report import RunReport
from detr_ray.runtime.launch import fit
from detr_ray.tracking.registry import ModelRegistry


@shows("tracking.enabled", "tracking.uri", "tracking.experiment")
def tracking(place: Place) -> None:
    import mlflow

    uri = empty_store(place.folder / "own")
    unused = (place.folder / "own" / "mlflow.db").read_bytes()
    keys = ("train.max_steps=1", "eval.every_epochs=0", f"tracking.uri={uri}")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        fit(place.config(*keys, "tracking.enabled=false"))
        assert (place.folder / "own" / "mlflow.db").read_bytes() == unused
        (place.folder / ".git").mkdir()
        (place.folder / ".git" / "HEAD").write_text("c0ffee\n")
        patch.chdir(place.folder)
        fit(place.config(*keys, "tracking.enabled=true", "tracking.experiment=other", "run.name=a"))
    assert not (place.folder / "runs" / "mlflow.db").exists(), "the default"
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("other")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "a" and run.data.params["tracking.experiment"] == "other"
    assert not [name for name in run.data.params if name.startswith("tune.")], "a training has no search"
    train = place.job().data.train
    assert train is not None and run.data.tags["data.train.fingerprint"] == train.fingerprint
    assert (run.data.tags["data.train.images"], run.data.tags["data.classes"]) == ("16", "6")
    assert run.data.tags["code.commit"] == "c0ffee" and run.data.tags["run.path"] == f"{place.folder}/runs/a"
    assert client.get_metric_history(run.info.run_id, "train/loss")
    assert not client.search_registered_models(), "the default"


@shows("tracking.report")
def report(place: Place) -> None:
    """A report, its pictures and what it is made of in the run's folder, or neither."""
    for value, name in (("true", "a"), ("false", "b")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "detr_ray.engine.run_report.report.run_report",
                lambda run, index, batch: RunReport(f"of {run.name}", {"a.svg": b"a picture"}),
            )
            fit(place.config("train.max_steps=1", f"tracking.report={value}", f"run.name={name}"))
        folder = place.folder / "runs" / name
        written = [(folder / file).is_file() for file in ("report.html", "pictures/a.svg", "evaluation/best.npz")]
        assert written == [value == "true"] * 3


@shows("tracking.register", "tracking.model_name", "tracking.champion_margin")
def registered(place: Place) -> None:
    uri = empty_store(place.folder)
    keys = ("train.max_steps=1", "tracking.enabled=true", f"tracking.uri={uri}", "tracking.register=true")
    keys += ("tracking.model_name=mine-1.0",)
    fit(place.config(*keys, "run.name=a"))
    mine = ModelRegistry(uri, "mine-1.0")
    (first,) = mine.versions()
    assert first.is_champion and ModelRegistry(uri, "detr").versions() == []
    fit(place.config(*keys, "run.name=b", "run.seed=1", "tracking.champion_margin=0.75"))
    assert mine.version(2).tags["champion.reason"].endswith("not better by more than 0.75")
