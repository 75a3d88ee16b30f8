"""The configuration: layers, overrides, dumping, the reference of keys. Needs no torch."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import yaml
from pydantic import ValidationError

from detr_ray.config import (
    AugmentConfig,
    Config,
    ConfigError,
    DataConfig,
    GenerateConfig,
    ModelConfig,
    Schedule,
    config_from_dict,
    diff,
    flatten,
    load_config,
)
from detr_ray.config.reference import reference_text
from detr_ray.config.schema import all_keys
from detr_ray.data.augmentation import DetrAugmentation
from detr_ray.data.generated import DrawingParameters
from detr_ray.schedules import Curve

# Layers


def test_defaults_are_the_originals_recipe():
    config = load_config()
    assert config == Config()
    assert (config.optim.lr, config.optim.lr_backbone, config.optim.weight_decay) == (1e-4, 1e-5, 1e-4)
    assert (config.train.epochs, config.optim.step_epochs, config.train.global_batch_size) == (300, 200, 16)
    assert config.optim.clip_max_norm == config.model.dropout == config.loss.eos_coef == 0.1
    assert (config.loss.cost_class, config.loss.cost_bbox, config.loss.cost_giou) == (1, 5, 2)
    assert (config.loss.ce, config.loss.bbox, config.loss.giou) == (1, 5, 2)
    assert config.data.augment.scales == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert config.data.augment.crop_scales == (400, 500, 600)
    assert config.run.seed == 42


def test_later_layers_win_key_by_key(write):
    first = write("first.yaml", "optim: {lr: 1e-3, gamma: 0.5}\nmodel: {num_queries: 10}\n")
    second = write("second.yaml", "optim:\n  lr: 2e-3\ndata: {augment: {scales: [256]}}\n")
    config = load_config([first, second], ["optim.lr=3e-3", "--data.augment.flip=0"])
    assert config.optim.lr == 3e-3
    assert config.optim.gamma == 0.5
    assert config.model.num_queries == 10
    assert config.data.augment.scales == (256,)
    assert config.data.augment.flip == 0
    assert config.data.augment.max_size == 1333
    assert load_config(str(first)).optim.lr == 1e-3
    assert load_config([second, first]).optim.lr == 1e-3


def test_an_architecture_has_its_own_number_of_detections(write):
    dino = ["model.architecture=dino"]
    assert (load_config().eval.max_detections, load_config(None, dino).eval.max_detections) == (100, 300)
    assert load_config(None, [*dino, "eval.max_detections=100"]).eval.max_detections == 100
    config = load_config(None, [*dino, "eval.size=64"])
    assert (config.eval.size, config.eval.max_detections) == (64, 300)
    assert load_config(write("whole.yaml", config.to_yaml())) == config


def test_null_for_a_section_says_nothing_about_its_keys(write):
    first = write("first.yaml", "train: {epochs: 7}\ndata: {augment: {flip: 0.25}}\n")
    second = write("second.yaml", "train:\ndata:\n  augment:\nmodel: null\n")
    config = load_config([first, second])
    assert config.train.epochs == 7
    assert config.data.augment.flip == 0.25


def test_null_takes_away_a_section_that_is_null_by_default(write):
    split = "data: {train: {annotations: a.json, images: a}, generate: {num_val: 3}}\n"
    config = load_config(write("a.yaml", split), ["data.train=null", "data.generate=null", "data.root=/coco"])
    assert config.data.train is None
    assert config.data.generate is None
    again = load_config(write("b.yaml", split), ["data.train=null", "data.root=x", "data.generate.num_train=5"])
    assert (again.data.generate.num_train, again.data.generate.num_val) == (5, 3)


def test_relative_paths_stay_as_given(write):
    config = load_config(write("a.yaml", "data: {root: ../coco}\n"))
    assert config.data.root == "../coco"


@pytest.mark.parametrize("empty", ["", "# only a comment\n", "---\n"])
def test_empty_file_is_the_defaults(write, empty):
    assert load_config(write("a.yaml", empty)) == Config()


# Values


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("optim.lr=2", "optim.lr", 2.0),
        ("optim.lr='1e-3'", "optim.lr", 1e-3),
        ("train.compile=yes", "train.compile", True),
        ("train.compile=off", "train.compile", False),
        ("train.use_gpu=null", "train.use_gpu", None),
        ("run.name=2026", "run.name", "2026"),
        ("run.name=2026-01-31", "run.name", "2026-01-31"),
        ("run.name=1e3", "run.name", "1e3"),
        ("run.name=no", "run.name", "no"),
        ("run.name='true'", "run.name", "true"),
        ("run.name=null", "run.name", None),
        ("data.root=s3://bucket/a b: c#d", "data.root", "s3://bucket/a b: c#d"),
        ("data.root=@odd, [path", "data.root", "@odd, [path"),
        ("model.backbone_weights=none", "model.backbone_weights", "none"),
        ("tracking.uri=http://host:5000/?a=b", "tracking.uri", "http://host:5000/?a=b"),
        ("data.augment.scales=[256, 288]", "data.augment.scales", "[256, 288]"),
        ("optim.milestones=[1, 2.5]", "optim.milestones", "[1.0, 2.5]"),
        ("model.backbone_stride=8", "model.backbone_stride", 8),
        ("train={epochs: 3}", "train.epochs", 3),
        (
            "data.augment.transforms=[grayscale, detr]",
            "data.augment.transforms",
            "[{grayscale: {p: 0.1, until_epoch: null}}, detr]",
        ),
    ],
)
def test_override_values(override, key, value):
    assert flatten(load_config(None, [override]))[key] == value


def test_transforms_are_written_as_they_are_read():
    given = ["data.augment.transforms=[mosaic: {until_epoch: 9}, photometric:, {grayscale: {}}, detr, blur: {p: 1}]"]
    config = load_config(None, given)
    values = config.to_dict()["data"]["augment"]["transforms"]
    assert [transform if transform == "detr" else next(iter(transform)) for transform in values] == [
        "mosaic", "photometric", "grayscale", "detr", "blur",
    ]  # fmt: skip
    assert (values[0]["mosaic"]["until_epoch"], values[4]) == (
        9,
        {"blur": {"p": 1.0, "until_epoch": None, "sigma": [0.1, 2.0]}},
    )
    assert config_from_dict(config.to_dict(), "a checkpoint") == config
    key = "data.augment.transforms"
    assert load_config(None, [f"{key}={flatten(config)[key]}"]) == config


# Rules over several keys


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.augment.crop=0", "data.augment.crop_min=9999"],
        ["model.dilation=true", "model.backbone=resnet101"],
        ["train.precision=fp16"],
        ["train.num_workers=16", "train.micro_batch_size=16"],
        ["train.num_workers=[2, 16]"],
        ["model.backbone_weights=none"],
        ["train.max_failures=-1"],
        ["eval.every_epochs=0"],
    ],
)
def test_allowed_combinations(overrides):
    assert load_config(None, overrides)


def test_sections_check_themselves_when_built_in_code():
    with pytest.raises(ValidationError, match=r"hidden_dim must be divisible by model\.num_heads"):
        ModelConfig(num_heads=7)
    with pytest.raises(ValidationError, match="Extra inputs"):
        DataConfig(rot="x")


def test_error_pickles_with_its_lines():
    error = pickle.loads(pickle.dumps(ConfigError(["a", "b"])))
    assert error.errors == ["a", "b"]
    assert str(error) == "a\nb"
    assert ConfigError("one").errors == ["one"]


# Schedules


def test_weights_are_numbers_or_schedules(write):
    path = write("a.yaml", "loss:\n  ce: {points: [[0, 1], [1e1, '2e-1']], interpolation: cosine}\n")
    config = load_config(path, ["loss.bbox={points: [[0, 5]]}", "loss.giou=3"])
    assert config.loss.ce == Schedule(points=((0, 1), (10, 0.2)), interpolation="cosine")
    curve = Curve(((0.0, 1.0), (10.0, 0.2)), "cosine")
    assert [config.loss.ce.at(epoch) for epoch in range(12)] == [curve.at(epoch) for epoch in range(12)]
    assert config.loss.bbox.at(100) == 5
    assert config.loss.giou == 3.0
    changed = load_config(path, ["loss.ce.interpolation=constant"])
    assert changed.loss.ce.at(9) == 1.0
    assert load_config(path, ["loss.ce=2"]).loss.ce == 2.0


def test_rates_are_numbers_or_schedules():
    config = load_config(None, ["optim.lr={points: [[0, 1e-3], [4, 0]]}", "optim.lr_backbone={points: [[0, 1e-5]]}"])
    assert config.optim.lr == Schedule(points=((0, 1e-3), (4, 0)))
    assert config.optim.lr_backbone.at(7) == 1e-5
    assert load_config(None, ["optim.lr_backbone={points: [[0, 0], [3, 0]]}"]).optim.lr_backbone == 0.0, "frozen"


# What a configuration gives


def interesting_config() -> Config:
    return load_config(
        None,
        [
            "run.name=no",
            "data.train.annotations=a: b #c.json",
            "data.train.images=1e-3",
            "data.val.shards='null'",
            "data.augment.scales=[256, 288]",
            "loss.ce={points: [[0, 1], [2.5, 2]], interpolation: constant}",
            "optim.lr=1e-7",
            "optim.milestones=[1, 2.5]",
            "train.use_gpu=false",
            "tracking.experiment=über 'x'",
        ],
    )


@pytest.mark.parametrize("config", [Config(), interesting_config()])
def test_yaml_loads_again_equal(config, write):
    path = write("dumped.yaml", config.to_yaml())
    assert load_config(path) == config
    assert load_config(path).to_yaml() == config.to_yaml()
    assert yaml.safe_load(config.to_yaml()) == config.to_dict()
    assert config_from_dict(config.to_dict(), "a checkpoint") == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_from_dict_names_the_source_in_errors():
    with pytest.raises(ConfigError, match=r"unknown key 'optim\.speed'.*from a checkpoint"):
        config_from_dict({"optim": {"speed": 1}}, "a checkpoint")
    with pytest.raises(ConfigError, match=r"optim\.lr: must be a number .*\(got .*object.*, from a checkpoint\)"):
        config_from_dict({"optim": {"lr": object()}}, "a checkpoint")


def test_config_is_frozen():
    with pytest.raises(ValidationError):
        Config().optim.lr = 1.0


def test_flatten_has_the_same_scalar_keys_for_all_configurations():
    plain, interesting = flatten(Config()), flatten(interesting_config())
    assert list(plain) == list(interesting) == [key.path for key in all_keys() if not key.is_section]
    assert all(value is None or isinstance(value, str | int | float) for value in interesting.values())
    assert plain["data.train.annotations"] is None
    assert interesting["loss.ce"] == "{points: [[0.0, 1.0], [2.5, 2.0]], interpolation: constant}"
    # What flatten gives sets the same value again.
    given = [f"{key}={interesting[key]}" for key in ("loss.ce", "data.augment.scales", "optim.lr", "train.use_gpu")]
    again = load_config(None, [item.replace("False", "false") for item in given])
    assert all(flatten(again)[key] == interesting[key] for key in ("loss.ce", "data.augment.scales", "optim.lr"))


def test_diff_names_keys_and_both_values():
    a = load_config(None, ["optim.lr=1e-3", "data.augment.scales=[256]"])
    assert diff(Config(), Config()) == []
    assert diff(a, load_config(None, ["loss.ce=2", "data.augment.scales=[288]"])) == [
        "data.augment.scales: [256] -> [288]",
        "loss.ce: 1.0 -> 2.0",
        "optim.lr: 0.001 -> 0.0001",
    ]
    assert diff(Config(), load_config(None, ["run.name=x"])) == ["run.name: null -> x"]


def test_check_training():
    load_config(None, ["data.root=/coco"]).check_training()
    load_config(None, ["data.train.shards=/coco", "model.backbone_weights=none", "model.init_from=a"]).check_training()
    load_config(None, ["data.root=x", "model.backbone_weights=none", "model.backbone_norm=batch"]).check_training()
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["model.backbone_weights=none"]).check_training()
    no_data, no_weights = caught.value.errors
    assert no_data.startswith("data.root: no training data is given; set data.root=FOLDER")
    assert "set model.backbone_norm=batch, or model.backbone_weights=imagenet" in no_weights


# The reference


def test_every_key_has_a_meaning_and_is_in_the_reference():
    text = reference_text()
    for key in all_keys():
        assert len(key.meaning) > 10, key.path
        assert key.path in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(("section", "taker"), [(GenerateConfig, DrawingParameters), (AugmentConfig, DetrAugmentation)])
def test_defaults_stand_in_the_sections_alone(section, taker):
    fields = {field.name: field for field in dataclasses.fields(taker)}
    assert fields.keys() == section.model_fields.keys() - {"transforms"}
    assert all(field.default is dataclasses.MISSING for field in fields.values())
