"""Loading a model for use, from wherever it lies, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torchvision.ops import FrozenBatchNorm2d

import detr_ray
from detr_ray.config import ConfigError, load_config
from detr_ray.detector.package import ModelFacts, read_package, write_package
from detr_ray.engine.checkpoints.store import CheckpointStore
from detr_ray.engine.reporting.progress import FitResult
from detr_ray.model import build_model
from detr_ray.model.state_dicts import WeightsError
from detr_ray.prediction import LoadedModel


@pytest.fixture(scope="module")
def model(trained: FitResult) -> LoadedModel:
    return detr_ray.load_model(trained.run_path)


@pytest.fixture
def package(model: LoadedModel, tmp_path: Path) -> Path:
    write_package(str(tmp_path / "package"), model.saved, model.facts)
    return tmp_path / "package"


def images_of(shapes: Path) -> list[Path]:
    return sorted((shapes / "val2017").iterdir())


def found_by(model: LoadedModel, shapes: Path) -> list[dict]:
    return [one.to_dict() for one in model.predict(images_of(shapes)[:2], device="cpu")]


def recorded(package: Path, **changes: object) -> None:
    """Changes the record of a package."""
    path = package / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def test_every_source_gives_the_same_boxes(
    trained: FitResult,
    model: LoadedModel,
    package: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    best = Path(str(trained.best_checkpoint))
    copied = shutil.copytree(best, tmp_path / "copied")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(best))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sources = [best, best / "model.pt", f"file://{best}", copied, package]
        sources += [f"http://127.0.0.1:{server.server_port}/model.pt", package / "model.json"]
        expected = found_by(model, shapes)
        for source in map(str, sources):
            assert found_by(detr_ray.load_model(source), shapes) == expected, source
        server.shutdown()


def test_the_best_checkpoint_of_a_run_is_taken_and_its_numbers_are_known(
    trained: FitResult, model: LoadedModel
) -> None:
    best = CheckpointStore(f"{trained.run_path}/checkpoints").best()
    assert best is not None and best.metrics is not None
    assert model.source == f"{best.path}/model.pt" and model.saved.step == best.step
    assert model.facts.evaluation["metrics"] == best.metrics
    assert model.facts.evaluation["measured_on"]["eval.size"] == 48


def test_a_model_remembers_labels_sizes_and_averaged_weights(
    model: LoadedModel, package: Path, trained: FitResult
) -> None:
    again = detr_ray.load_model(str(package))
    stored = torch.load(f"{trained.best_checkpoint}/model.pt", weights_only=True)
    for one in (model, again):
        assert (one.sizes.short_side, one.sizes.long_side) == (48, 60)
        assert (one.sizes.trained_short_sides, one.sizes.trained_long_side) == ((48, 64), 96)
        assert one.label_map.to_dict() == stored["label_map"] and one.saved.is_averaged
        assert not one.model.training and one.config.eval.max_detections == 7
        for kept in (one.saved.checkpoint["model"], one.new_network().state_dict()):
            assert kept.keys() == stored["ema"].keys()
            assert all(torch.equal(value, stored["ema"][name]) for name, value in kept.items())
    assert again.facts.evaluation == model.facts.evaluation
    assert again.facts.code_version == detr_ray.__version__


def test_a_key_that_this_version_does_not_know_is_said_to_a_program(
    package: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = json.loads((package / "model.json").read_text())
    record["config"]["model"]["novelty"] = 3
    (package / "model.json").write_text(json.dumps(record))
    detr_ray.load_model(str(package))
    assert [(one.levelname, one.getMessage()) for one in caplog.records] == [
        ("WARNING", f"{package} was trained with model.novelty, which this version does not know (any more)")
    ]


def test_published_weights_are_loaded_with_the_configuration_that_is_given(shapes: Path, tmp_path: Path) -> None:
    items = ["model={backbone: resnet18, backbone_stride: 16, hidden_dim: 32, num_heads: 2, dim_feedforward: 64}"]
    items += [
        "model.encoder_layers=1",
        "model.decoder_layers=1",
        "model.num_queries=5",
        "eval={size: 48, max_size: 64}",
    ]
    config = load_config(None, items)
    torch.manual_seed(3)
    state = build_model(config.model, 91).state_dict()
    torch.save({"model": state}, tmp_path / "published.pth")
    before = torch.random.get_rng_state()
    model = detr_ray.load_model(str(tmp_path / "published.pth"), config)
    assert torch.equal(torch.random.get_rng_state(), before)
    found = model.predict(images_of(shapes)[0], device="cpu")
    # It predicts with folded norms; the weights that it gives away are those that were read.
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in model.model.modules())
    for kept in (model.saved.checkpoint["model"], model.new_network().state_dict()):
        assert kept.keys() == state.keys() and all(torch.equal(kept[name], state[name]) for name in state)
    other = model.with_config(config)
    other.model = model.new_network()
    assert other.predict(images_of(shapes)[0], device="cpu").to_dict() == found.to_dict()
    known = dict(model.label_map.categories)
    assert model.sizes.long_side == 64 and 0 < len(found) <= 5
    assert known[1] == "person" and [known[i] for i in found.category_ids.tolist()] == found.names
    with pytest.raises(WeightsError, match=r"published\.pth does not fit"):
        detr_ray.load_model(str(tmp_path / "published.pth"))
    few = {name: value[:4] if name.startswith("class_embed") else value for name, value in state.items()}
    safetensors.torch.save_file(few, tmp_path / "three.safetensors")
    assert detr_ray.load_model(str(tmp_path / "three.safetensors"), config).label_map.names[2] == "class 2"


def test_importing_the_package_is_instant() -> None:
    command = "import detr_ray, sys; detr_ray.load_model; print(len({'torch', 'numpy', 'pydantic'} & {*sys.modules}))"
    printed = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert printed == "0\n"


# What is refused


class _Planted:
    """Is noticed when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was opened",))


def test_a_planted_pickle_is_never_opened(package: Path, shapes: Path, model: LoadedModel) -> None:
    planted = pickle.dumps(_Planted())
    for name in ("weights.pt", "model.pkl", "model.pt", "python_model.pkl"):
        (package / name).write_bytes(planted)
    assert found_by(detr_ray.load_model(str(package)), shapes) == found_by(model, shapes)
    (package / "weights.safetensors").write_bytes(planted)
    with pytest.raises(WeightsError, match=r"weights\.safetensors is not what was written"):
        detr_ray.load_model(str(package))
    recorded(package, files={"weights.safetensors": hashlib.sha256(planted).hexdigest()})
    with pytest.raises(WeightsError, match=r"weights\.safetensors is no safetensors file"):
        detr_ray.load_model(str(package))


def test_a_changed_byte_is_refused(package: Path, trained: FitResult, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(str(trained.best_checkpoint), tmp_path / "checkpoint")
    for folder, name in ((package, "weights.safetensors"), (checkpoint, "model.pt")):
        content = bytearray((folder / name).read_bytes())
        content[-9000] ^= 1
        (folder / name).write_bytes(content)
        for source in {folder, folder / name} if name == "model.pt" else {folder}:
            with pytest.raises(WeightsError, match=rf"{name} is not what was written: its SHA-256"):
                detr_ray.load_model(str(source))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, r"format version 2, and this version of detr_ray \(.*\) reads 1 at most: .* newer"),
        ({"format": "other"}, r"no record of a model package: format: "),
        ({"label_map": None}, r"no record of a model package: label_map: "),
        ({"label_map": {"names": ["a"], "category_ids": []}}, r"damaged: label_map: "),
        ({"files": {}}, r"damaged: files: there is no weights\.safetensors"),
        ({"files": {"../model.pt": "0"}}, r"damaged: files: '\.\./model\.pt' is no plain name"),
        ({"files": {"weights.safetensors": "0", "more.json": "0"}}, r"is not what was written"),
    ],
)
def test_records_that_are_none_are_refused(changes: dict, message: str, package: Path) -> None:
    recorded(package, **changes)
    with pytest.raises(WeightsError, match=rf"{package}/.*{message}"):
        read_package(str(package))


def test_a_listed_file_that_is_gone_is_named(package: Path) -> None:
    (package / "weights.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"weights\.safetensors is missing: the model package is not whole"):
        detr_ray.load_model(str(package))
    (package / "model.json").write_text("{")
    with pytest.raises(WeightsError, match=r"model\.json is damaged: no JSON"):
        detr_ray.load_model(str(package))


def test_places_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model: .* is neither a run nor a checkpoint: .* no model package"):
        detr_ray.load_model(str(tmp_path))
    with pytest.raises(ConfigError, match=r"model: there is no file or folder .*absent.pth$"):
        detr_ray.load_model(str(tmp_path / "absent.pth"))
    with pytest.raises(ConfigError, match=r"; a registered model is models:/detr@champion$"):
        detr_ray.load_model("detr@champion")


def test_models_that_lie_near_are_named(trained: FitResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, run = Path(trained.best_checkpoint), Path(trained.run_path)
    storage = tmp_path / "runs"
    for name in ("first", "second"):
        (storage / name).mkdir(parents=True)
        shutil.copy(run / "run.json", storage / name)
    (storage / "no_run").mkdir()
    monkeypatch.chdir(tmp_path)
    for given, said in [
        ("runs/fist", r"there is no file or folder runs/fist; did you mean runs/first\?$"),
        ("runs/mine", "there is no file or folder runs/mine; runs has first, second$"),
        ("first", r"there is no file or folder first; did you mean runs/first\?$"),
        ("runs", "neither a run nor a checkpoint: .*; name one of those in it: first, second$"),
        (str(run / "checkpoints"), f"name one of those in it: .*{checkpoint.name}"),
        ("runs/first", "runs/first is a run without a whole checkpoint: it writes the first one after an epoch"),
    ]:
        with pytest.raises(ConfigError, match=said):
            detr_ray.load_model(given)


def test_what_a_package_lacks_is_said_before_it_is_written(model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not say its labels and its configuration"):
        write_package(str(tmp_path / "a"), dataclasses.replace(model.saved, label_map=None), ModelFacts())
    secret = model.config.model_copy(
        update={"tracking": model.config.tracking.model_copy(update={"uri": "https://me:hidden@host"})}
    )
    with pytest.raises(ConfigError, match="credentials") as refused:
        write_package(str(tmp_path / "a"), dataclasses.replace(model.saved, config=secret))
    assert "hidden" not in str(refused.value) and not (tmp_path / "a").exists()


# What scores mean


def test_a_model_keeps_what_its_scores_mean(trained: FitResult, model: LoadedModel, package: Path) -> None:
    kept = json.loads(Path(f"{trained.best_checkpoint}/scores.json").read_text())
    assert model.facts.scores == kept and detr_ray.load_model(str(package)).facts.scores == kept
    assert kept["measured_on"] == model.facts.evaluation["measured_on"]
    assert {int(i) for i in kept["categories"]} == {i for i, _ in model.label_map.categories}


def test_scores_that_are_not_beside_a_model_are_given(trained: FitResult, tmp_path: Path, shapes: Path) -> None:
    alone = shutil.copy(f"{trained.best_checkpoint}/model.pt", tmp_path / "alone.pt")
    with pytest.raises(ValueError, match=r"'best_f1' is not known of .*alone\.pt: .*evaluate --scores FILE"):
        detr_ray.load_model(str(alone)).predict(images_of(shapes)[0], threshold="best_f1")
    (tmp_path / "scores.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"scores\.json does not say what scores mean"):
        detr_ray.load_model(str(alone), scores=str(tmp_path / "scores.json"))
    shutil.copy(f"{trained.best_checkpoint}/scores.json", tmp_path / "scores.json")
    with_scores = detr_ray.load_model(str(alone), scores=str(tmp_path / "scores.json"))
    assert with_scores.facts.scores is not None and with_scores.facts.scores["iou"] == 0.5
