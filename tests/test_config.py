"""The configuration: layers, overrides, validation, messages, dumping, the reference of keys.

Run alone: ``pytest tests/test_config.py``. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

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


def errors_of(*overrides: str, paths: object = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(paths, overrides)
    assert str(caught.value) == "\n".join(caught.value.errors)
    return caught.value.errors


@pytest.fixture
def write(tmp_path: Path):
    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_file


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


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ("[blu, detr]", "[0]: there is no transform 'blu'; did you mean 'blur'? (got blu, from command line)"),
        ("[detr, zzz]", "[1]: there is no transform 'zzz': there are detr, photometric, grayscale, blur, jpeg, "),
        ("[3]", "[0]: must be the name of a transform, or a name with parameters: {photometric: {p: 0.5}} (got 3"),
        ("[{a: 1, b: 2}]", "[0]: must be the name of a transform, or a name with parameters: "),
        ("[detr: {p: 1}]", "[0]: detr has no parameter 'p'; it has none: set the other keys of data.augment (got"),
        ("[detr, blur: {x: 2}]", "[1]: blur has no parameter 'x'; it has p, until_epoch, sigma (got {blur: {x: 2}}"),
        ("[blur: 3, detr]", "[0]: must hold parameters of blur: {blur: {key: value}} (got {blur: 3}"),
        ("[blur: {p: 2}, detr]", "[0].blur.p: must be at most 1 (got 2, from command line)"),
        ("[blur: {sigma: [0, 1]}, detr]", "[0].blur.sigma[0]: must be more than 0 (got 0"),
        ("[blur: {sigma: [2, 1]}, detr]", "[0].blur.sigma: must be the smaller and the larger number (got [2, 1]"),
        ("[jpeg: {quality: [2, 1]}, detr]", "[0].jpeg.quality: must be the smaller and the larger number"),
        ("[iou_crop: {aspect: [2, 1]}, detr]", "[0].iou_crop.aspect: must be the smaller and the larger number"),
        ("[mosaic: {until_epoch: 0}, detr]", "[0].mosaic.until_epoch: must be at least 1 (got 0"),
        ("[rotate90: {turns: [4]}, detr]", "[0].rotate90.turns[0]: must be 1, 2 or 3 (got 4"),
        ("[cutout: {holes: [1, 21]}, detr]", "[0].cutout.holes: must be at most 20 rectangles (got [1, 21]"),
        ("[photometric]", ": must have detr or scale_jitter once: it decides how large images become (got"),
        ("[detr, scale_jitter]", ": must have detr or scale_jitter once: it decides how large images become (got"),
        ("[detr, iou_crop]", ": must have iou_crop before detr, which decides how large images become (got"),
    ],
)
def test_faulty_transforms(transforms, message):
    (error,) = errors_of(f"data.augment.transforms={transforms}")
    assert error.startswith(f"data.augment.transforms{message}")


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=3.0", "train.epochs: must be a whole number (got 3.0, from command line)"),
        ("train.epochs='3'", "train.epochs: must be a whole number (got '3', from command line)"),
        ("train.epochs=true", "train.epochs: must be a whole number (got true, from command line)"),
        ("train.epochs=0", "train.epochs: must be at least 1 (got 0, from command line)"),
        ("train.epochs=null", "train.epochs: must be a whole number (got null, from command line)"),
        ("train.epochs=010", "train.epochs: must be a whole number (got '010', from command line)"),
        ("optim.lr=0", "optim.lr: must be more than 0 (got 0, from command line)"),
        ("optim.clip_max_norm=true", "optim.clip_max_norm: must be a number (got true, from command line)"),
        ("optim.clip_max_norm=fast", "optim.clip_max_norm: must be a number (got fast, from command line)"),
        ("optim.lr=true", "optim.lr: must be a number or a schedule such as {points: [[epoch, value], ...], interpol"),
        ("optim.lr={points: [[0, 0], [9, 0]]}", "optim.lr: must not be 0 at all epochs (got"),
        ("optim.lr_backbone={points: [[0, 0], [9, 1]]}", "optim.lr_backbone: must be 0 at all points, which freezes"),
        ("optim.lr=.nan", "optim.lr: must be a finite number (got .nan, from command line)"),
        ("optim.lr=inf", "optim.lr: must be a finite number (got inf, from command line)"),
        ("optim.lr=-.inf", "optim.lr: must be a finite number (got -.inf, from command line)"),
        ("model.dropout=1", "model.dropout: must be less than 1 (got 1, from command line)"),
        ("data.augment.flip=1.5", "data.augment.flip: must be at most 1 (got 1.5, from command line)"),
        ("train.compile=2", "train.compile: must be true or false (got 2, from command line)"),
        ("optim.schedule=steps", "optim.schedule: must be constant, step, multistep or cosine (got steps, from"),
        ("model.backbone_stride=4", "model.backbone_stride: must be 32, 16 or 8 (got 4, from command line)"),
        ("data.augment.scales=256", "data.augment.scales: must be a list, such as [1, 2] (got 256, from command"),
        ("data.augment.scales=[]", "data.augment.scales: must not be empty (got [], from command line)"),
        ("data.augment.scales=[256,-1]", "data.augment.scales[1]: must be at least 1 (got -1, from command line)"),
        ("run.name=../x", "run.name: must begin with a letter or digit, and hold only letters, digits, '.', '_'"),
        ("train=3", "train: must hold keys, not a value (got 3, from command line)"),
        ("model.hidden_dim=[1", "model.hidden_dim: cannot be read as YAML: line 1, column 3: "),
    ],
)
def test_faulty_values(override, message):
    (error,) = errors_of(override)
    assert error.startswith(message)


def test_text_in_a_file_must_be_text(write):
    path = write("a.yaml", "run:\n  name: 2026\n")
    assert errors_of(paths=path) == [
        f"run.name: must be text; put it in quotes if it is meant to be (got 2026, from {path})"
    ]


# Rules over several keys


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_heads=7"], "model.hidden_dim: must be divisible by model.num_heads (7) (got 256, the default)"),
        (["model.hidden_dim=6", "model.num_heads=2"], "model.hidden_dim: must be divisible by 4: half of it"),
        (["model.dilation=true", "model.backbone=resnet18"], "model.dilation: needs model.backbone=resnet50 or resnet"),
        (["model.dilation=true", "model.backbone_stride=16"], "model.dilation: needs the last stage of the backbone"),
        (["optim.schedule=multistep"], "optim.milestones: must name at least one epoch for optim.schedule=multistep"),
        (["optim.milestones=[2, 2]"], "optim.milestones: must ascend (got [2, 2], from command line)"),
        (["optim.warmup_epochs=5", "train.epochs=5"], "optim.warmup_epochs: must be less than train.epochs (5) (got 5"),
        (
            ["train.compile=true", "model.architecture=deformable_detr"],
            "train.compile: cannot be used with deformable_detr: compiling its backward pass",
        ),
        (["data.root=a", "data.train.shards=b"], "data.train: cannot go together with data.root: set one of them to"),
        (["data.root=a", "data.val.shards=b"], "data.val: cannot go together with data.root: set one of them to null"),
        (["data.val.shards=a", "data.val.images=b"], "data.val.shards: cannot go together with annotations or images"),
        (["data.train.images=b"], "data.train.annotations: is missing: images are given, so it must be too"),
        (["data.train.annotations=b"], "data.train.images: is missing: annotations are given, so it must be too"),
        (["data.train={}"], "data.train.annotations: is missing: give annotations and images, or shards"),
        (["data.generate={}"], "data.root: is missing: it is the folder that data.generate writes into"),
        (["data.root=a", "data.generate.num_train=1000001"], "data.generate.num_train: must be at most 1000000"),
        (["data.root=a", "data.generate.image_size=[64, 16]"], "data.generate.image_size: must be two sizes from 32"),
        (["data.root=a", "data.generate.min_object_size=40"], "data.generate.min_object_size: must be from 4 to half"),
        (["data.augment.max_size=700"], "data.augment.scales: must not exceed data.augment.max_size (700) (got [480,"),
        (["data.augment.crop_min=601"], "data.augment.crop_min: must not exceed data.augment.crop_max (600) (got 601"),
        (["data.augment.crop_scales=[300]"], "data.augment.crop_min: must not exceed the shortest of data.augment.cro"),
        (["train.micro_batch_size=17"], "train.micro_batch_size: must not exceed train.global_batch_size (16) (got 17"),
        (["train.num_workers=[2, 17]"], "train.num_workers: must not exceed train.global_batch_size (16): every"),
        (["train.num_workers=[3, 2]"], "train.num_workers: must name the least workers first, then the most"),
        (["train.num_workers=many"], "train.num_workers: must be a whole number or a range such as [2, 8]"),
        (["train.num_workers=17"], "train.num_workers: must not exceed train.global_batch_size (16): every worker"),
        (["train.launcher=local", "train.num_workers=2"], "train.num_workers: must be 1 or null with train.launcher=l"),
        (["train.precision=fp16", "train.use_gpu=false"], "train.precision: needs a GPU, but train.use_gpu is false"),
        (["eval.size=1400"], "eval.size: must not exceed eval.max_size (1333) (got 1400, from command line)"),
        (["loss.cost_class=0", "loss.cost_bbox=0", "loss.cost_giou=0"], "loss.cost_class: must not be 0 together with"),
    ],
)
def test_rules_over_several_keys(overrides, message):
    (error,) = errors_of(*overrides)
    assert error.startswith(message)


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


# Unknown keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.lr_backbon", "'optim.lr_backbone'"),
        ("optimizer.lr", "'optim.lr'"),
        ("lr", "'optim.lr'"),
        ("train.batch_size", "'train.global_batch_size' or 'train.micro_batch_size'"),
        ("model.backbon", "'model.backbone'"),
        ("mdel.hidden_dim", "'model.hidden_dim'"),
        ("data.augment.scale", "'data.augment.scales'"),
        ("data.val.annotation", "'data.val.annotations'"),
        ("loss.ce.interpolatoin", "'loss.ce.interpolation'"),
        ("training", "'train'"),
    ],
)
def test_unknown_override_names_the_nearest_key(key, nearest):
    assert errors_of(f"{key}=1") == [f"unknown key '{key}'; did you mean {nearest}? (from command line)"]


def test_unknown_key_without_a_near_one():
    assert errors_of("qqq.zzz=1") == ["unknown key 'qqq.zzz'; --help lists all keys (from command line)"]


def test_unknown_key_in_a_file(write):
    path = write("a.yaml", "optim:\n  lr_backbon: 1e-5\noptimizer: {lr: 1}\n")
    assert errors_of(paths=path) == [
        f"unknown key 'optim.lr_backbon'; did you mean 'optim.lr_backbone'? (from {path})",
        f"unknown key 'optimizer'; did you mean 'optim'? (from {path})",
    ]


# All errors at once


def test_every_error_is_collected(write):
    path = write("a.yaml", "optim: {lr: -1, gama: 0.5, milestones: [3, 1]}\nmodel: {num_heads: 7, dropout: 2}\n")
    errors = errors_of("train.epochs=x", "eval.size=9999", "data.rot=a", "junk", "optim.warmup_epochs=", paths=path)
    text = "\n".join(errors)
    for expected in (
        f"unknown key 'optim.gama'; did you mean 'optim.gamma'? (from {path})",
        f"optim.lr: must be more than 0 (got -1, from {path})",
        f"optim.milestones: must ascend (got [3, 1], from {path})",
        f"model.dropout: must be at most 1 (got 2, from {path})",
        "model.hidden_dim: must be divisible by model.num_heads (7) (got 256, the default)",
        "train.epochs: must be a whole number (got x, from command line)",
        "eval.size: must not exceed eval.max_size (1333) (got 9999, from command line)",
        "unknown key 'data.rot'; did you mean 'data.root'? (from command line)",
        "'junk': must be dotted.key=value (from command line)",
        "optim.warmup_epochs: no value is given; write optim.warmup_epochs=VALUE, or optim.warmup_epochs=null for none",
    ):
        assert expected in text
    assert len(errors) == 10


def test_a_rule_does_not_repeat_what_is_wrong_with_its_keys():
    assert errors_of("model.hidden_dim=wide", "model.num_heads=7") == [
        "model.hidden_dim: must be a whole number (got wide, from command line)"
    ]
    assert errors_of("data.val.annotation=a.json", "data.val.images=a") == [
        "unknown key 'data.val.annotation'; did you mean 'data.val.annotations'? (from command line)"
    ]


def test_errors_of_both_levels_are_found_together():
    errors = errors_of("optim.warmup_epochs=400", "model.num_heads=7", "data.generate={}", "train.num_workers=99")
    assert [error.partition(":")[0] for error in sorted(errors)] == [
        "data.root",
        "model.hidden_dim",
        "optim.warmup_epochs",
        "train.num_workers",
    ]


def test_error_pickles_with_its_lines():
    error = pickle.loads(pickle.dumps(ConfigError(["a", "b"])))
    assert error.errors == ["a", "b"]
    assert str(error) == "a\nb"
    assert ConfigError("one").errors == ["one"]


# Files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lr: 1\n  lr: 2\n", "line 3, column 3: key 'lr' is given twice"),
        ("optim: {lr: 1}\noptim: {gamma: 1}\n", "line 2, column 1: key 'optim' is given twice"),
        ("- 1\n- 2\n", "must hold sections with keys, not [1, 2]"),
        ("just text\n", "must hold sections with keys, not just text"),
        ("optim: [1, 2\n", "line 2, column 1: expected ',' or ']'"),
        ("optim:\n\tlr: 1\n", "line 2, column 1: found character '\\t'"),
        ("run: {name: !!python/object/apply:os.system [ls]}\n", "line 1, column 13: could not determine a constructor"),
        ("a: &x 1\nb: *x\n", "line 2, column 4: anchors are not supported, repeat the value"),
        ("~: 1\n", "line 1, column 1: a key must be text"),
        ("[1, 2]: 1\n", "line 1, column 1: a key must be text"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: but found another document"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_files_that_are_no_configuration(write, text, message):
    path = write("a.yaml", text)
    (error,) = errors_of(paths=path)
    assert error.startswith(f"{path}: {message}")
    assert "\n" not in error


def test_files_that_cannot_be_read(tmp_path):
    missing, binary = tmp_path / "missing.yaml", tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01\x80")
    errors = errors_of(paths=[missing, tmp_path, binary])
    assert errors[0] == f"{missing}: there is no such file"
    assert errors[1] == f"{tmp_path}: cannot be read: Is a directory"
    assert errors[2].startswith(f"{binary}: ")


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


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("much", "loss.ce: must be a number or a schedule such as {points: [[epoch, value], ...], interpolation: lin"),
        ("[1, 2]", "loss.ce: must be a number or a schedule such as {points: [[epoch, value], ...], interpolation: li"),
        ("-1", "loss.ce: must be at least 0 (got -1, from command line)"),
        ("{}", "loss.ce.points: is missing (from command line)"),
        ("{interpolation: linear}", "loss.ce.points: is missing (from command line)"),
        ("{points: 3}", "loss.ce.points: must be a list, such as [1, 2] (got 3, from command line)"),
        ("{points: [[0, 1, 2]]}", "loss.ce.points[0]: must have at most 2 entries, not 3 (got [0, 1, 2], from command"),
        ("{points: [[0]]}", "loss.ce.points[0][1]: is missing (from command line)"),
        ("{points: []}", "loss.ce.points: must not be empty (got [], from command line)"),
        ("{points: [[0, x]]}", "loss.ce.points[0][1]: must be a number (got x, from command line)"),
        ("{points: [[5, 1], [5, 2]]}", "loss.ce.points: must have ascending epochs (got [[5, 1], [5, 2]], from comm"),
        ("{points: [[0, 1]], interpolation: wavy}", "loss.ce.interpolation: must be constant, linear or cosine (got"),
        ("{point: [[0, 1]]}", "unknown key 'loss.ce.point'; did you mean 'loss.ce.points'? (from command line)"),
    ],
)
def test_faulty_schedules_give_one_readable_error(value, message):
    (error,) = errors_of(f"loss.ce={value}")
    assert error.startswith(message)


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
