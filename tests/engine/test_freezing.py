"""``optim.freeze``: what is frozen has no part in the backward pass, and stays as it is to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from observing import observe, small_config, without_validation
from recorded import final_weights
from tiny import fit_here, make_dataset
from torch import nn

from detr_ray.config import Config, ConfigError
from detr_ray.engine.job import prepare_job
from detr_ray.engine.training_step.parameters import matched
from detr_ray.model import DetectionModel

ARCHITECTURES = {
    "detr": (),
    "deformable_detr": ("model.architecture=deformable_detr", "model.num_feature_levels=2"),
}
ALL = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes", num_train=8, num_val=2)


def configured(dataset: Path, folder: Path, architecture: str, *overrides: str) -> Config:
    keys = ("optim.lr=1e-2", "optim.lr_backbone=1e-2", "optim.ema_decay=0.5", *without_validation(dataset))
    return small_config(dataset, folder, *keys, *ARCHITECTURES[architecture], *overrides)


def model_of(config: Config) -> DetectionModel:
    return prepare_job(config, lambda line: None).build_detector().model


@ALL
def test_a_frozen_backbone_has_no_backward_pass_and_stays(dataset: Path, tmp_path: Path, architecture: str) -> None:
    """Batch norm with statistics of its own, so that a forward pass in training mode would change them."""
    config = configured(dataset, tmp_path, architecture, 'optim.freeze=["backbone.*"]', "run.name=a")
    model = model_of(config).train()
    maps = model.named_backbone[1].maps(torch.randn(2, 3, 64, 64), None)
    assert not [features for features in maps if features.requires_grad], "no graph is kept of it"
    begun = model_of(config).state_dict()
    seen = observe(config)
    assert [forward.training for forward in seen.training] == [True, True], "the model as a whole trains"
    assert not [name for name in seen.updates[0].gradients if name.startswith("backbone.")]
    _, saved, _ = seen.checkpoint()
    for kind in ("model", "ema"):
        moved = {name for name, value in saved[kind].items() if not torch.equal(value, begun[name])}
        assert moved and not [name for name in moved if name.startswith("backbone.")], kind
    assert any("running_mean" in name for name in begun)


def test_no_rate_for_the_backbone_is_freezing_it(dataset: Path, tmp_path: Path) -> None:
    fit_here(configured(dataset, tmp_path, "detr", "run.name=a", "optim.lr_backbone=0"))
    fit_here(configured(dataset, tmp_path, "detr", "run.name=b", "optim.freeze=[backbone]"))
    first, second = (final_weights(tmp_path / name, 2) for name in "ab")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_going_on_with_frozen_parts_is_never_having_stopped(dataset: Path, tmp_path: Path) -> None:
    architecture = "deformable_detr"
    frozen = "optim.freeze=['*.body.layer1', transformer.encoder]"
    straight, stopped = (
        configured(dataset, tmp_path, architecture, f"run.name={name}", frozen) for name in ("straight", "stopped")
    )
    fit_here(straight)
    fit_here(stopped, stop_after=1)
    fit_here(stopped)
    first, second = (final_weights(tmp_path / name, 2) for name in ("straight", "stopped"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@ALL
def test_what_is_frozen_as_a_whole_is_in_evaluation_mode(dataset: Path, tmp_path: Path, architecture: str) -> None:
    frozen = "optim.freeze=['backbone.0.body.*.bn1', 'transformer.encoder.*', 'class_embed*.bias']"
    model = model_of(configured(dataset, tmp_path, architecture, frozen, "model.dropout=0.5")).train()
    for name, part in model.named_modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.training == (not name.endswith(".bn1") or name == "backbone.0.body.bn1"), name
        if isinstance(part, nn.Dropout | nn.MultiheadAttention) and "transformer" in name:
            assert part.training == ("decoder" in name), name
        if name.startswith("class_embed"):
            assert part.training, "its weights train"
    assert not model.eval().named_backbone[1].training


def test_patterns_are_of_parameters_and_of_modules(dataset: Path, tmp_path: Path) -> None:
    model = model_of(configured(dataset, tmp_path, "detr"))
    inside = [name for name, _ in model.named_parameters() if name.startswith("backbone.0.body.layer1.")]
    assert matched(model, "backbone.0.body.layer1") == matched(model, "*layer1.*") == inside
    assert matched(model, "backbone.0.body.layer[13]") == inside, "stride 8 ends at the second stage"
    assert matched(model, "class_embed.bias") == ["class_embed.bias"]
    assert matched(model, "layer1") == []


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("backbone.0.bodx.*", "no parameter or module of this model has a name that fits 'backbone.0.bodx.*'; "
         "nearest: backbone.0.body"),
        ("zzz", "its parts: transformer, class_embed, bbox_embed, query_embed, input_proj, backbone"),
        ("*", "nothing is left to train"),
    ],
)  # fmt: skip
def test_what_cannot_be_frozen_is_refused(dataset: Path, tmp_path: Path, pattern: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare_job(configured(dataset, tmp_path, "detr", f"optim.freeze=['{pattern}']"), lambda line: None)
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()
