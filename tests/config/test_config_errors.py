"""What a configuration refuses, and in which words. Needs no torch."""

from __future__ import annotations

import pytest

from detr_ray.config import (
    ConfigError,
    load_config,
)


def errors_of(*overrides: str, paths: object = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(paths, overrides)
    assert str(caught.value) == "\n".join(caught.value.errors)
    return caught.value.errors


# Values


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
