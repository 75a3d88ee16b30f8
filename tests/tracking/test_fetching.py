"""From an address in MLflow to files on this machine, and what is refused on the way."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from versions import stored

from detr_ray import load_model
from detr_ray.addresses import local_path
from detr_ray.config import load_config
from detr_ray.model.state_dicts import WeightsError
from detr_ray.tracking import MlflowTracker
from detr_ray.tracking.fetching import fetched, pinned, read_record
from detr_ray.tracking.registry import ModelRegistry, ModelVersion, RegistryError


@pytest.fixture
def registry(store_uri: str) -> ModelRegistry:
    return ModelRegistry(store_uri, "detr")


@pytest.fixture
def version(registry: ModelRegistry, tmp_path: Path) -> ModelVersion:
    return stored(registry, tmp_path / "made")


def folder_of(version: ModelVersion) -> Path:
    place = local_path(version.source)
    assert place is not None
    return place


class Planted:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self._mark,)


def test_a_version_is_an_mlflow_model_without_pickle(version: ModelVersion) -> None:
    folder = folder_of(version)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"MLmodel", "served.py", "artifacts/package/model.json", "artifacts/package/weights.safetensors"} < files
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pt", ".pth", ".bin"))]
    model = yaml.safe_load((folder / "MLmodel").read_text())
    assert model["metadata"] == {"labels": {"1": "disc"}}
    assert '"image"' in model["signature"]["inputs"] and '"top_k"' in model["signature"]["params"]
    assert "python_model" not in model["flavors"]["python_function"], "which would be a pickle"
    assert (folder / "input_example.json").is_file() and (folder / "requirements.txt").is_file()


def test_each_address_gives_the_package_in_place(
    registry: ModelRegistry, version: ModelVersion, tmp_path: Path
) -> None:
    stored(registry, tmp_path / "second", "other weights")
    registry.promote(2)
    for source, number in (("models:/detr/1", 1), ("models:/detr@champion", 2), ("models:/detr/2", 2)):
        with fetched(source, registry.uri) as folder:
            assert Path(folder) == folder_of(registry.version(number)) / "artifacts" / "package"
    assert b'"lr": 13' in read_record(registry, registry.version(2))


def test_an_alias_is_pinned_to_the_version_that_it_means_now(
    registry: ModelRegistry, version: ModelVersion, tmp_path: Path
) -> None:
    registry.promote(1)
    assert pinned("models:/detr@champion", registry.uri) == "models:/detr/1"
    stored(registry, tmp_path / "second", "other weights")
    registry.promote(2)
    assert pinned("models:/detr@champion", registry.uri) == "models:/detr/2"
    for source in ("models:/detr/1", f"runs:/{'0' * 32}"):
        assert pinned(source, registry.uri) == source
    with pytest.raises(RegistryError, match=r"models:/detr@absent \(in "):
        pinned("models:/detr@absent", registry.uri)


def test_the_store_is_that_of_the_environment(
    registry: ModelRegistry, version: ModelVersion, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.uri)
    with fetched("models:/detr/1") as folder:
        assert (Path(folder) / "model.json").is_file()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RegistryError, match=rf"no MLflow store in {tmp_path}/runs/mlflow.db; set MLFLOW_TRACKING"):
        enter(fetched("models:/detr/1"))


def enter(fetching: Iterator) -> None:
    with fetching:  # type: ignore[attr-defined]
        pass


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("models:/detr", "models:/detr is no address of a model: give models:/NAME/VERSION"),
        ("models:/detr/latest", "models:/detr/latest is no address of a model"),
        ("runs:/123", "runs:/123 is no address of a model"),
        ("models:/detr/9", r"models:/detr/9 \(in sqlite:.*\): there is no version 9 of 'detr'; there is 1"),
        ("models:/other/1", "there is no version 1 of 'other'; it has no versions"),
        ("models:/detr@champion", r"None is champion yet: `python -m detr_ray.registry promote VERSION`"),
        (f"runs:/{'0' * 32}", f"there is no run {'0' * 32} in sqlite:"),
    ],
)
def test_what_is_not_there_is_said(registry: ModelRegistry, version: ModelVersion, source: str, said: str) -> None:
    with pytest.raises(RegistryError, match=said):
        enter(fetched(source, registry.uri))


def test_files_that_are_gone(registry: ModelRegistry, version: ModelVersion) -> None:
    shutil.rmtree(folder_of(version))
    said = "the files of version 1 of detr are gone: .* register runs/seven again, and delete the version"
    with pytest.raises(RegistryError, match=said):
        enter(fetched("models:/detr/1", registry.uri))


def test_a_description_that_was_changed_is_refused(registry: ModelRegistry, version: ModelVersion) -> None:
    """It has the hashes of the other files, which whoever reads the package compares."""
    record = folder_of(version) / "artifacts" / "package" / "model.json"
    record.write_text(record.read_text().replace("1", "2"))
    with pytest.raises(RegistryError, match=r"model.json is not what was registered as version 1 of detr"):
        enter(fetched("models:/detr/1", registry.uri))


def test_a_version_of_another_program_is_refused(registry: ModelRegistry, version: ModelVersion) -> None:
    registry.client.delete_model_version_tag("detr", "1", "package.sha256")
    with pytest.raises(RegistryError, match="version 1 of detr was not registered by detr_ray"):
        enter(fetched("models:/detr/1", registry.uri))


def test_a_planted_pickle_is_not_opened(registry: ModelRegistry, version: ModelVersion, tmp_path: Path) -> None:
    """Not even if the model's own description names it."""
    folder, mark = folder_of(version), tmp_path / "opened"
    for name in ("python_model.pkl", "artifacts/package/weights.pkl"):
        (folder / name).write_bytes(pickle.dumps(Planted(mark)))
    description = yaml.safe_load((folder / "MLmodel").read_text())
    flavor = description["flavors"]["python_function"]
    del flavor["model_code_path"]
    flavor |= {"python_model": "python_model.pkl", "loader_module": "mlflow.pyfunc.model"}
    (folder / "MLmodel").write_text(yaml.safe_dump(description))
    (folder / "served.py").write_text(f"open({str(mark)!r}, 'w')")
    with fetched("models:/detr/1", registry.uri) as place:
        assert (Path(place) / "weights.safetensors").read_text() == "weights"
    assert not mark.exists()
    pickle.loads((folder / "python_model.pkl").read_bytes())
    assert mark.exists(), "it would have left its mark"


def test_of_a_run_the_registered_version_or_else_its_best_checkpoint(registry: ModelRegistry, tmp_path: Path) -> None:
    tracker = MlflowTracker(tmp_path / "run", uri=registry.uri, experiment="detr", run_name="seven", run_uid="uid-7")
    (tmp_path / "model.pt").write_bytes(b"best")
    tracker.log_file(tmp_path / "model.pt", "checkpoints/best")
    tracker.log_text("{}", "checkpoints/best/manifest.json")
    torch.save({"model": {}}, tmp_path / "empty.pt")
    tracker.log_file(tmp_path / "empty.pt", "alone")
    tracker.finish("FINISHED")
    run = tracker.run_id
    with fetched(f"runs:/{run}", registry.uri) as place:
        assert {path.name: path.read_text() for path in Path(place).iterdir()} == {
            "manifest.json": "{}", "model.pt": "best",
        }  # fmt: skip
    with pytest.raises(WeightsError, match=rf"^runs:/{run}: .*; if its training still runs, .* try again"):
        load_model(f"runs:/{run}", load_config(None, [f"tracking.uri={registry.uri}"]))
    with pytest.raises(WeightsError, match=rf"^runs:/{run}/alone/empty.pt: .*its state dict is empty$"):
        load_model(f"runs:/{run}/alone/empty.pt", load_config(None, [f"tracking.uri={registry.uri}"]))
    with fetched(f"runs:/{run}/checkpoints/best/model.pt", registry.uri) as place:
        assert Path(place).read_bytes() == b"best"
    with pytest.raises(RegistryError, match=f"run {run} has no checkpoints/other among its artifacts"):
        enter(fetched(f"runs:/{run}/checkpoints/other", registry.uri))
    made = stored(registry, tmp_path / "made", run_uid="uid-7")
    assert made.run_id == run
    with fetched(f"runs:/{run}", registry.uri) as place:
        assert Path(place) == folder_of(made) / "artifacts" / "package"


def test_a_run_that_has_stored_no_checkpoint_yet_still_runs(registry: ModelRegistry, tmp_path: Path) -> None:
    experiment = registry.client.create_experiment("new", (tmp_path / "artifacts").as_uri())
    run = registry.client.create_run(experiment).info.run_id
    said = "no checkpoints/best among its artifacts in .*: it still runs, .* try again later"
    with pytest.raises(RegistryError, match=said):
        enter(fetched(f"runs:/{run}", registry.uri))
    registry.client.set_terminated(run)
    with pytest.raises(RegistryError, match=r"no checkpoints/best among its artifacts in [^:]*:[^:]*$"):
        enter(fetched(f"runs:/{run}", registry.uri))
