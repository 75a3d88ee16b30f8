"""From a training to a version of a registered model, to boxes; and when the champion changes."""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import pickle
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow_store import empty_store
from observing import observe, small_config
from tiny import make_dataset

import detr_ray
from detr_ray import evaluate as evaluate_command
from detr_ray import registry as registry_command
from detr_ray.addresses import local_path
from detr_ray.cli import refuse_idle_keys
from detr_ray.coco_numbers import COCO_METRICS
from detr_ray.config import Config, ConfigError
from detr_ray.data.formats import open_split
from detr_ray.engine.checkpoints.store import CheckpointStore
from detr_ray.exporting import ExportSource
from detr_ray.model.state_dicts import WeightsError
from detr_ray.runtime.launch import evaluate, fit
from detr_ray.runtime.registration import register, register_or_warn
from detr_ray.runtime.search.results import SearchResult
from detr_ray.runtime.search.search import register_best
from detr_ray.search.trials import Trial
from detr_ray.tracking.registry import WEIGHTS_SHA256, ModelRegistry, ModelVersion, RegistryError

Configured = Callable[..., Config]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set, another one, and a run that registered its best checkpoint."""
    folder = tmp_path_factory.mktemp("registered")
    make_dataset(folder / "data", num_train=16, num_val=4, image_size=(40, 90))
    make_dataset(folder / "other", num_train=16, num_val=3, image_size=(40, 90), seed=9)
    empty_store(folder)
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("c0ffee\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        fit(config_in(folder, "run.name=first", "tracking.register=true", "tracking.enabled=true"))
    return folder


def config_in(folder: Path, *overrides: str, data: str = "data") -> Config:
    keys = ("train.max_steps=2", "model.num_queries=100", f"tracking.uri=sqlite:///{folder}/mlflow.db")
    return small_config(folder / data, folder / "runs", *keys, *overrides)


@pytest.fixture
def store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModelRegistry:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    return ModelRegistry(f"sqlite:///{folder}/mlflow.db", "detr")


def silent(line: str) -> None:
    pass


def package_of(version: ModelVersion) -> Path:
    place = local_path(version.source)
    assert place is not None
    return place / "artifacts" / "package"


def test_a_version_says_what_it_is_and_where_it_is_from(folder: Path, store: ModelRegistry) -> None:
    version = store.version(1)
    (best,) = CheckpointStore(f"{folder}/runs/first/checkpoints").checkpoints()
    assert best.metrics is not None and version.is_champion
    assert version.metrics == {name: value for name, value in best.metrics.items() if name in COCO_METRICS}
    assert "val/AP" in version.metrics and version.measured_on == best.measured_on
    index = {split: open_split(str(folder / "data"), None, split) for split in ("train", "val")}
    for split, data in index.items():
        assert version.tags[f"data.{split}.fingerprint"] == data.fingerprint
    assert version.tags["code.commit"] == "c0ffee" and version.tags["step"] == "2"
    assert version.tags["run.path"] == f"{folder}/runs/first" and version.tags["checkpoint"] == best.path
    run = store.client.get_run(version.run_id)
    assert run.info.run_name == "first"
    model = yaml.safe_load((package_of(version).parents[1] / "MLmodel").read_text())
    assert model["metadata"]["labels"] == {str(number): name for number, name in index["train"].categories}
    record = json.loads((package_of(version) / "model.json").read_text())
    assert record["config"] == config_in(
        folder, "run.name=first", "tracking.register=true", "tracking.enabled=true"
    ).to_dict()  # fmt: skip


def test_an_exported_file_says_which_version_it_is_of(store: ModelRegistry) -> None:
    exported = ExportSource.of(detr_ray.load_model("models:/detr@champion"))
    version = store.version("champion")
    assert (exported.name, exported.step) == (f"models:/detr/{version.version}", int(version.tags["step"]))
    assert exported.weights_sha256 == version.tags[WEIGHTS_SHA256]


def test_there_is_no_pickle_in_a_version(store: ModelRegistry) -> None:
    for path in package_of(store.version(1)).parents[1].rglob("*"):
        if path.is_file():
            head = path.read_bytes()[:2]
            assert head[:1] != b"\x80" and head != b"PK", f"{path} begins like a pickle or a torch file"


def test_the_champion_gives_the_boxes_of_its_checkpoint(folder: Path, store: ModelRegistry) -> None:
    image = next((folder / "data" / "val2017").iterdir())
    wanted = detr_ray.load_model(str(folder / "runs" / "first")).predict(image)
    run = store.version(1).run_id
    for source in ("models:/detr@champion", "models:/detr/1", f"runs:/{run}", f"runs:/{run}/checkpoints/best/model.pt"):
        found = detr_ray.load_model(source).predict(image)
        assert len(found) > 0 and np.array_equal(found.boxes_xyxy_px, wanted.boxes_xyxy_px), source
        assert np.array_equal(found.scores, wanted.scores) and found.names == wanted.names, source


def test_a_configuration_says_in_which_store_a_version_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(folder / "other")
    with pytest.raises(RegistryError, match=r"there is no MLflow store in .*/other/runs/mlflow.db"):
        detr_ray.load_model("models:/detr@champion")
    assert detr_ray.load_model("models:/detr@champion", config_in(folder)).source == "models:/detr/1"
    given = argparse.Namespace(source="models:/detr@champion", config=[], overrides=["tracking.uri=sqlite:///a.db"])
    refuse_idle_keys(given, is_used=False)
    given.overrides.append("model.dilation=true")
    with pytest.raises(ConfigError, match=r"^model.dilation=true: changes nothing: models:/detr@champion says"):
        refuse_idle_keys(given, is_used=False)


def test_evaluate_scores_a_registered_version(folder: Path, store: ModelRegistry, tmp_path: Path) -> None:
    for number, checkpoint in enumerate((f"{folder}/runs/first", "models:/detr@champion")):
        arguments = ["--json", f"{tmp_path}/{number}.json", f"eval.checkpoint={checkpoint}", "train.launcher=local"]
        assert evaluate_command.main([*arguments, "train.use_gpu=false"]) == 0
    numbers = [json.loads((tmp_path / f"{number}.json").read_text())["metrics"] for number in range(2)]
    assert numbers[0] == numbers[1] and numbers[0]["AP"] == store.version(1).metrics["val/AP"]


def test_mlflow_serves_it_from_code_with_the_boxes_of_predict(folder: Path, store: ModelRegistry) -> None:
    import mlflow
    import pandas

    images = sorted((folder / "data" / "val2017").iterdir())[:2]
    texts = [base64.b64encode(image.read_bytes()).decode() for image in images]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        served = mlflow.pyfunc.load_model(store.version(1).source)
    model = detr_ray.load_model("models:/detr/1")
    for params, arguments in (({}, {}), ({"threshold": 0.2, "top_k": 3}, {"threshold": 0.2, "top_k": 3})):
        wanted = [{**one.to_dict(), "image": f"image[{n}]"} for n, one in enumerate(model.predict(images, **arguments))]
        assert served.predict(pandas.DataFrame({"image": texts}), params=params) == wanted
    with pytest.raises(mlflow.MlflowException, match=r"^image\[1\]: is no base64") as caught:
        served.predict(pandas.DataFrame({"image": [texts[0], "?"]}))
    assert caught.value.get_http_status_code() == 400


def test_the_same_weights_are_registered_once(folder: Path, store: ModelRegistry) -> None:
    lines: list[str] = []
    again = register(config_in(folder), str(folder / "runs" / "first"), lines.append)
    assert again.decision is None and again.version.version == 1 and len(store.versions()) == 1
    assert lines[-1].startswith(f"{folder}/runs/first is version 1 of detr already (AP ")


def test_weights_whose_version_has_lost_its_files_are_registered_again(folder: Path, store: ModelRegistry) -> None:
    config = config_in(folder, "tracking.model_name=gone")
    lost = register(config, f"{folder}/runs/first", silent).version
    shutil.rmtree(package_of(lost))
    with pytest.raises(RegistryError, match=r"the files of version 1 of gone are gone: .* register .*/runs/first"):
        detr_ray.load_model("models:/gone/1")
    assert register(config, f"{folder}/runs/first", silent).version.version == 2
    assert detr_ray.load_model("models:/gone/2").source == "models:/gone/2"


def trained(folder: Path, name: str, *overrides: str, data: str = "data") -> str:
    seen = observe(config_in(folder, f"run.name={name}", *overrides, data=data))
    assert seen.result is not None
    return seen.result.run_path


def test_a_champion_of_other_data_is_measured_on_the_new_data(folder: Path, store: ModelRegistry) -> None:
    store.promote(1)
    config = config_in(folder, data="other")
    run = trained(folder, "second", "run.seed=1", data="other")
    lines: list[str] = []
    found = register(config, run, lines.append)
    assert found.decision is not None
    ap = evaluate(config_in(folder, f"eval.checkpoint={folder}/runs/first", data="other")).metrics.ap
    assert store.version(1).ap_on(found.version.measured_on) == ap
    assert f"against {ap:.4f} of the champion, version 1, measured anew" in found.decision.reason
    line = "the champion, version 1 of detr, was measured on other data or with other settings: measuring it anew"
    assert line in lines


@pytest.mark.slow
def test_one_that_cannot_be_compared_is_no_champion(folder: Path, store: ModelRegistry, tmp_path: Path) -> None:
    store.promote(1)
    make_dataset(tmp_path / "data", num_train=16, num_val=2, image_size=(40, 90), seed=4)
    config = small_config(tmp_path / "data", folder / "runs", "train.max_steps=1", f"tracking.uri={store.uri}")
    seen = observe(config)
    assert seen.result is not None
    annotations = tmp_path / "data" / "annotations" / "instances_val2017.json"
    content = json.loads(annotations.read_text())
    content["annotations"] = content["annotations"][1:]
    annotations.write_text(json.dumps(content))
    found = register(config, seen.result.run_path, silent)
    assert found.decision is not None and not found.decision.is_champion
    assert "cannot be measured here: the validation data or settings are others now" in found.decision.reason
    assert store.version(1).is_champion


@pytest.mark.slow
def test_weights_without_numbers_are_measured_first(folder: Path, store: ModelRegistry, tmp_path: Path) -> None:
    run = trained(folder, "third", "run.seed=2", "eval.every_epochs=0")
    (checkpoint,) = CheckpointStore(f"{run}/checkpoints").checkpoints()
    alone = tmp_path / "model.pt"
    alone.write_bytes(Path(checkpoint.path, "model.pt").read_bytes())
    found = register(config_in(folder), str(alone), silent)
    assert checkpoint.metrics is not None
    assert found.version.metrics["val/AP"] == checkpoint.metrics["val/AP"]
    assert found.version.measured_on == store.version(1).measured_on


def test_a_file_in_mlflow_that_was_not_evaluated_is_measured_and_says_what_its_scores_mean(
    folder: Path, store: ModelRegistry
) -> None:
    first = store.version(1)
    store.client.log_artifact(first.run_id, f"{first.tags['checkpoint']}/model.pt", "alone")
    config = config_in(folder, "tracking.model_name=alone")
    source = f"runs:/{first.run_id}/alone/model.pt"
    version = register(config, source, silent).version
    assert version.metrics == first.metrics and version.measured_on == first.measured_on
    assert (version.tags["checkpoint"], version.tags["code.commit"]) == (source, "c0ffee")
    assert version.tags["detr_ray.version"] == detr_ray.__version__, "without an MLflow run that it is from"
    kept = [json.loads((package_of(each) / "model.json").read_text()) for each in (version, first)]
    assert kept[0]["scores"] == kept[1]["scores"] and kept[0]["scores"]["categories"]
    assert kept[0]["code_version"] == detr_ray.__version__


def test_the_best_checkpoint_among_the_artifacts_of_a_run_is_a_checkpoint(
    folder: Path, store: ModelRegistry, tmp_path: Path
) -> None:
    first = store.version(1)
    source = f"runs:/{first.run_id}/checkpoints/best"
    model, same = detr_ray.load_model(source), detr_ray.load_model(first.tags["checkpoint"])
    assert model.facts.evaluation == same.facts.evaluation
    assert model.facts.scores == same.facts.scores and model.facts.scores is not None
    assert model.facts.origin["checkpoint"] == source and model.facts.code_version == detr_ray.__version__
    version = register(config_in(folder, "tracking.model_name=artifact"), source, silent).version
    assert version.run_id == first.run_id and version.tags["run.path"] == f"{folder}/runs/first"
    copied = tmp_path / "best"
    shutil.copytree(str(local_path(store.client.get_run(first.run_id).info.artifact_uri)) + "/checkpoints/best", copied)
    content = bytearray((copied / "model.pt").read_bytes())
    content[-1] ^= 1
    (copied / "model.pt").write_bytes(bytes(content))
    with pytest.raises(WeightsError, match=r"best/model.pt is not what was written"):
        detr_ray.load_model(str(copied))


def test_a_search_registers_its_best_trial(folder: Path, store: ModelRegistry) -> None:
    """Its values are those of the trial, so that a champion of other data is measured as the trial was."""
    trial = Trial("t001", state="finished", best=0.5, run_path=f"{folder}/runs/first")
    result = SearchResult("s", str(folder), "finished", "val/AP", "max", (trial,), {}, 1.0, trial, {"optim.lr": 2e-4})
    config = config_in(folder, "tracking.model_name=searched", "tune.space={optim.lr: {choice: [1e-4, 2e-4]}}")
    lines: list[str] = []
    register_best(config, result, lines.append)
    (version,) = ModelRegistry(store.uri, "searched").versions()
    assert version.is_champion and version.tags["run.path"] == trial.run_path
    assert lines[0] == f"registered {folder}/runs/first as version 1 of searched"


def test_a_registry_that_is_away_is_a_warning_with_the_command_for_later(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    config = config_in(folder, "tracking.uri=http://127.0.0.1:9", "tracking.model_name=away")
    assert register_or_warn(config, f"{folder}/runs/first", lines.append) is None
    (warning,) = lines
    assert "is not registered: http://127.0.0.1:9 does not answer" in warning
    command = shlex.split(warning.partition("To register it later: ")[2])
    assert command[:3] == ["python", "-m", "detr_ray.registry"]
    arguments = [item.replace("http://127.0.0.1:9", f"sqlite:///{folder}/mlflow.db") for item in command[3:]]
    assert registry_command.main(arguments) == 0
    assert "version 1 of away is the champion" in capsys.readouterr().out


class Planted:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self._mark,)


@pytest.fixture
def version(folder: Path, store: ModelRegistry) -> Any:
    """A version whose files may be changed; they are put back."""
    version = store.version(1)
    files = {path: path.read_bytes() for path in package_of(version).iterdir()}
    yield version
    for path, content in files.items():
        path.write_bytes(content)


def test_a_changed_byte_of_the_weights_is_refused(version: ModelVersion) -> None:
    weights = package_of(version) / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(WeightsError, match=r"^models:/detr/1: .*weights.safetensors is not what was written"):
        detr_ray.load_model("models:/detr/1")


def test_a_pickle_in_place_of_the_weights_is_not_opened(version: ModelVersion, tmp_path: Path) -> None:
    mark, package = tmp_path / "opened", package_of(version)
    (package / "weights.safetensors").write_bytes(pickle.dumps(Planted(mark)))
    with pytest.raises(WeightsError, match=r"weights.safetensors is not what was written"):
        detr_ray.load_model("models:/detr/1")
    record = json.loads((package / "model.json").read_text())
    record["files"]["weights.safetensors"] = hashlib.sha256((package / "weights.safetensors").read_bytes()).hexdigest()
    (package / "model.json").write_text(json.dumps(record))
    with pytest.raises(RegistryError, match=r"model.json is not what was registered as version 1 of detr"):
        detr_ray.load_model("models:/detr/1")
    with pytest.raises(WeightsError, match=r"is no safetensors file"):
        detr_ray.load_model(str(package))
    assert not mark.exists()


BAD_INPUT = [
    ((), "what is to be done is missing: give one of list, show, register, promote, compare, rollback"),
    (("remove", "1"), "invalid choice: 'remove'"),
    (("show",), "show takes one VERSION or CHECKPOINT (got nothing)"),
    (("compare", "1"), "compare takes two VERSIONs (got 1)"),
    (("list", "1"), "list takes nothing more (got 1)"),
    (("show", "77"), "there is no version 77 of 'detr'; there "),
    (("promote", "@best"), "there is no version @best of 'detr'"),
    (("show", "models:/other/1"), "there is no version 1 of 'other'; it has no versions"),
    (("compare", "models:/detr/1", "models:/other/1"), "models:/other/1 is of another model than 'detr'"),
    (("register", "no/such/run"), "no/such/run"),
    (("show", "1", "tracking.model_name=a/b"), "tracking.model_name"),
    (("show", "1", "tracking.champion_margin=1"), "tracking.champion_margin"),
    (("rollback", "tracking.model_name=other"), "'other' has no champion to roll back; it has no versions"),
    (("list", "tracking.uri=ftp://x"), "ftp://x is of no kind that MLflow records in"),
    (("list", "tracking.uri=sqlite:////nowhere/mlflow.db"), "there is no MLflow store in /nowhere/mlflow.db"),
]


@pytest.mark.parametrize(("given", "said"), BAD_INPUT, ids=[" ".join(given) for given, _ in BAD_INPUT])
def test_what_the_command_refuses(
    store: ModelRegistry, capsys: pytest.CaptureFixture[str], given: tuple[str, ...], said: str
) -> None:
    assert registry_command.main([f"tracking.uri={store.uri}", *given]) == 2
    assert said in capsys.readouterr().err


def test_registering_without_records_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking.register: needs tracking.enabled=true"):
        config_in(folder, "tracking.register=true", "tracking.enabled=false")
