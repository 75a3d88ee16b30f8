"""Starting from weights: ImageNet backbones, official files, own checkpoints, other classes and queries."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import safetensors.torch
import torch
from goldens import model_section
from torch import Tensor
from torchvision.models import get_model, get_model_weights

from detr_ray.model import build_model, weights
from detr_ray.model.detr import Detr
from detr_ray.model.state_dicts import WeightsError
from detr_ray.model.weights import load_backbone_weights, load_initial_weights

COCO91 = [None, "person", "bicycle", "car", *[None] * 13, "cat", "dog", *[None] * 72]


def tiny(num_classes: int, seed: int = 0, **changes: object) -> Detr:
    torch.manual_seed(seed)
    section = {
        "backbone": "resnet18",
        "hidden_dim": 32,
        "num_heads": 4,
        "dim_feedforward": 64,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "num_queries": 5,
    }
    return build_model(model_section(**(section | changes)), num_classes)


def save(tmp_path: Path, state: dict[str, Tensor], **beside: object) -> str:
    path = tmp_path / "start.pth"
    torch.save({"model": state, **beside}, path)
    return str(path)


def own_checkpoint(tmp_path: Path, model: Detr, names: list[str | None], **beside: object) -> str:
    label_map = {"names": names, "category_ids": [None if name is None else i for i, name in enumerate(names)]}
    return save(tmp_path, model.state_dict(), format="detr_ray", label_map=label_map, config={}, **beside)


def assert_equal(model: Detr, state: dict[str, Tensor], names: set[str] | None = None) -> None:
    own = model.state_dict()
    differing = {name for name in own if name in state and not torch.equal(own[name], state[name])}
    assert differing == (names or set())


def test_same_classes_load_whole(tmp_path: Path) -> None:
    source, model = tiny(91), tiny(91, seed=1)
    file = save(tmp_path, source.state_dict(), args=argparse.Namespace(lr=1e-4), optimizer={"state": {}}, epoch=299)
    report = load_initial_weights(model, file, COCO91, coco91_names=COCO91)
    assert_equal(model, source.state_dict())
    assert set(report.loaded) == source.state_dict().keys()
    assert not (report.rebuilt or report.missing or report.unused)
    assert report.weights == "model"


@pytest.mark.parametrize("num_rows", [91, 250])
def test_official_rows_are_found_by_class_name(tmp_path: Path, num_rows: int) -> None:
    source, model = tiny(num_rows), tiny(4, seed=1)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    file = save(tmp_path, source.state_dict())
    report = load_initial_weights(model, file, ["Dog", "unicorn", "person", None], coco91_names=COCO91)
    for name in ("class_embed.weight", "class_embed.bias"):
        old, new = source.state_dict()[name], model.state_dict()[name]
        assert torch.equal(new[0], old[18])
        assert torch.equal(new[2], old[1])
        assert torch.equal(new[4], old[num_rows])
        assert torch.equal(new[1], fresh[name][1])
        assert torch.equal(new[3], fresh[name][3])
    assert report.rebuilt.keys() == {"class_embed.weight", "class_embed.bias"}
    assert report.rebuilt["class_embed.bias"] == "the no-object row and 2 of 3 classes copied by name; fresh: unicorn"


def test_own_checkpoint_in_another_order(tmp_path: Path) -> None:
    source, model = tiny(3), tiny(3, seed=1)
    report = load_initial_weights(model, own_checkpoint(tmp_path, source, ["a", "b", "c"]), ["c", "a", "b"])
    assert torch.equal(model.class_embed.weight, source.class_embed.weight[[2, 0, 1, 3]])
    assert "class_embed.weight" in report.loaded


def test_same_count_of_other_classes_is_not_mistaken_for_the_same(tmp_path: Path) -> None:
    source, model = tiny(2), tiny(2, seed=1)
    fresh = model.class_embed.weight.clone()
    report = load_initial_weights(model, own_checkpoint(tmp_path, source, ["a", "b"]), ["b", "z"])
    assert torch.equal(model.class_embed.weight[0], source.class_embed.weight[1])
    assert torch.equal(model.class_embed.weight[1], fresh[1])
    assert torch.equal(model.class_embed.weight[2], source.class_embed.weight[2])
    assert "fresh: z" in report.rebuilt["class_embed.weight"]


def test_unnamed_rows_count_by_position_or_not_at_all(tmp_path: Path) -> None:
    source, same, other = tiny(3), tiny(3, seed=1), tiny(2, seed=1)
    fresh = other.class_embed.weight.clone()
    file = save(tmp_path, source.state_dict())
    assert "class_embed.weight" in load_initial_weights(same, file, ["a", "b", "c"]).loaded
    assert torch.equal(same.class_embed.weight, source.class_embed.weight)
    report = load_initial_weights(other, file, ["a", "b"])
    assert torch.equal(other.class_embed.weight, torch.cat((fresh[:2], source.class_embed.weight[3:])))
    assert "does not name its classes" in report.rebuilt["class_embed.weight"]


def test_more_and_fewer_queries(tmp_path: Path) -> None:
    source, more, fewer = tiny(3), tiny(3, seed=1, num_queries=8), tiny(3, seed=1, num_queries=2)
    fresh = more.query_embed.weight.clone()
    file = own_checkpoint(tmp_path, source, ["a", "b", "c"])
    report = load_initial_weights(more, file, ["a", "b", "c"])
    assert torch.equal(more.query_embed.weight, torch.cat((source.query_embed.weight, fresh[5:])))
    assert report.rebuilt == {"query_embed.weight": "5 of the file's 5 queries copied, 3 fresh"}
    load_initial_weights(fewer, file, ["a", "b", "c"])
    assert torch.equal(fewer.query_embed.weight, source.query_embed.weight[:2])


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    averaged, last, model = tiny(2), tiny(2, seed=1), tiny(2, seed=2)
    file = own_checkpoint(tmp_path, last, ["a", "b"], ema=averaged.state_dict())
    report = load_initial_weights(model, file, ["a", "b"])
    assert_equal(model, averaged.state_dict())
    assert report.weights == "ema"
    assert "averaged weights" in report.table()


def test_panoptic_file_gives_its_detector(tmp_path: Path) -> None:
    source, model = tiny(3), tiny(3, seed=1)
    state = {f"detr.{name}": value for name, value in source.state_dict().items()}
    mask_head = {"bbox_attention.q_linear.weight": torch.ones(2, 2), "mask_head.lay1.bias": torch.ones(2)}
    report = load_initial_weights(model, save(tmp_path, state | mask_head), ["a", "b", "c"])
    assert_equal(model, source.state_dict())
    assert set(report.unused) == mask_head.keys()


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


WRAPPED = {
    "DDP": lambda state: {"model": prefixed(state, "module.")},
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "arch": "detr", "epoch": 3},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}},
    "Lightning": lambda state: {
        "state_dict": prefixed(state, "model.") | {"criterion.empty_weight": torch.ones(4)},
        "pytorch-lightning_version": "2.5",
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.ones(())}},
    },
    "compiled in DDP": lambda state: {"net": prefixed(state, "module._orig_mod.")},
    "a model's configuration beside": lambda state: {"model": {"name": "detr"}, "state_dict": state},
    "two dictionaries": lambda state: {"model": {"state_dict": state}},
    "averaged alone": lambda state: {"ema": {"module": state, "updates": 5, "decay": 0.999}},
    "averaged, other weights beside": lambda state: {
        "model": {name: torch.zeros_like(value) for name, value in state.items()},
        "ema": {"module": prefixed(state, "module.")},
    },
    "averaged by torch": lambda state: {
        "model_ema": prefixed(state, "module.") | {"n_averaged": torch.tensor(3)},
        "model": {name: torch.zeros_like(value) for name, value in state.items()},
    },
}


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """States of a detector and of a classifier."""
    return tiny(3).state_dict(), get_model("resnet18").state_dict()


@pytest.fixture(scope="module")
def blank() -> Detr:
    return tiny(3, seed=1)


def assert_both_load(path: Path, model: Detr, detector: dict[str, Tensor], network: dict[str, Tensor], write) -> None:
    """A detector's file starts a model, and a classifier's file its backbone."""
    for parameter in model.parameters():
        parameter.data.zero_()
    write(detector, path)
    report = load_initial_weights(model, str(path), ["a", "b", "c"])
    assert_equal(model, {name: value.float() for name, value in detector.items()})
    assert not report.missing
    assert set(report.unused) <= {"criterion.empty_weight", "n_averaged"}
    write(network, path)
    load_backbone_weights(model, str(path), "resnet18")
    assert all(torch.equal(value, network[name].float()) for name, value in model.body.state_dict().items())


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_what_other_trainers_put_around_weights_is_taken_off(tmp_path: Path, trained, blank: Detr, wrap) -> None:
    assert_both_load(tmp_path / "start.pth", blank, *trained, lambda state, path: torch.save(wrap(state), path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_are_taken(tmp_path: Path, trained, blank: Detr, dtype: torch.dtype) -> None:
    converted = [{name: value.to(dtype) for name, value in state.items()} for state in trained]

    def write(state: dict[str, Tensor], path: Path) -> None:
        safetensors.torch.save_file(prefixed(state, "model."), path)

    assert_both_load(tmp_path / "model.safetensors", blank, *converted, write)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool])
def test_weights_that_are_no_plain_numbers_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    state = tiny(1).state_dict()
    state["transformer.decoder.norm.bias"] = state["transformer.decoder.norm.bias"].to(dtype)
    file = save(tmp_path, state)
    with pytest.raises(WeightsError, match=rf"holds transformer.decoder.norm.bias as {str(dtype)[6:]}: weights have"):
        load_initial_weights(tiny(1), file, ["a"])
    network = get_model("resnet18").state_dict()
    torch.save({**network, "conv1.weight": network["conv1.weight"].to(dtype)}, tmp_path / "net.pth")
    with pytest.raises(WeightsError, match=rf"holds conv1.weight as {str(dtype)[6:]}: weights have"):
        load_backbone_weights(tiny(1), str(tmp_path / "net.pth"), "resnet18")


def test_a_model_that_is_there_twice_is_not_guessed(tmp_path: Path) -> None:
    state = prefixed(tiny(1).state_dict(), "student.") | prefixed(tiny(1).state_dict(), "teacher.")
    with pytest.raises(WeightsError, match=r"holds the model 2 times, under student\., teacher\.: save the one"):
        load_initial_weights(tiny(1), save(tmp_path, state), ["a"])


@pytest.mark.parametrize(
    ("norm", "there", "here", "message"),
    [
        ("frozen", ("resnet50", 32), ("resnet101", 32), r"lacks layer3\.\* .*set model\.backbone=resnet50 "),
        ("batch", ("resnet18", 32), ("resnet34", 32), r"it lacks layer1.*set model\.backbone=resnet18 "),
        ("frozen", ("resnet101", 32), ("resnet50", 32), r"has more, layer3\.\* .*set model\.backbone=resnet101 "),
        ("batch", ("resnet18", 16), ("resnet18", 32), r"resnet18 and model\.backbone_stride=16 \(or less\)"),
    ],
)
def test_another_depth_of_the_backbone_is_an_error(
    tmp_path: Path, norm: str, there: tuple[str, int], here: tuple[str, int], message: str
) -> None:
    source, model = (
        tiny(1, backbone=name, backbone_stride=stride, backbone_norm=norm, seed=seed)
        for seed, (name, stride) in enumerate((there, here))
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("input_proj")}
    with pytest.raises(WeightsError, match=message):
        load_initial_weights(model, save(tmp_path, state), ["a"])
    assert_equal(model, before)


def test_a_file_without_backbone_is_an_error(tmp_path: Path) -> None:
    state = {name: value for name, value in tiny(1).state_dict().items() if not name.startswith("backbone.")}
    with pytest.raises(WeightsError, match=r"its backbone is another one, it lacks .*take a file that holds the whole"):
        load_initial_weights(tiny(1), save(tmp_path, state), ["a"])


@pytest.mark.parametrize("bias", [torch.ones(()), torch.ones(1), torch.ones(5)])
def test_a_damaged_head_is_an_error(tmp_path: Path, bias: Tensor) -> None:
    state = tiny(2).state_dict() | {"class_embed.bias": bias}
    with pytest.raises(WeightsError, match=r"is damaged: class_embed\.bias"):
        load_initial_weights(tiny(2), save(tmp_path, state), ["a", "b"])


def test_layers_that_one_side_lacks_are_listed(tmp_path: Path) -> None:
    source, model = tiny(3, encoder_layers=2), tiny(3, seed=1, decoder_layers=2)
    report = load_initial_weights(model, save(tmp_path, source.state_dict()), ["a", "b", "c"])
    assert report.missing
    assert all(name.startswith("transformer.decoder.layers.1.") for name in report.missing)
    assert report.unused
    assert all(name.startswith("transformer.encoder.layers.1.") for name in report.unused)
    assert len(report.loaded) + len(report.missing) == len(model.state_dict())


@pytest.mark.parametrize(("norm_there", "norm_here"), [("frozen", "batch"), ("batch", "frozen")])
def test_norm_counters_are_neither_missing_nor_unused(tmp_path: Path, norm_there: str, norm_here: str) -> None:
    source, model = tiny(3, backbone_norm=norm_there), tiny(3, seed=1, backbone_norm=norm_here)
    report = load_initial_weights(model, save(tmp_path, source.state_dict()), ["a", "b", "c"])
    assert_equal(model, source.state_dict())
    assert not (report.missing or report.unused or report.rebuilt)


def test_projection_behind_another_cut_is_built_anew(tmp_path: Path) -> None:
    source, model = tiny(3), tiny(3, seed=1, backbone_stride=16)
    fresh = model.input_proj.weight.clone()
    report = load_initial_weights(model, save(tmp_path, source.state_dict()), ["a", "b", "c"])
    assert torch.equal(model.input_proj.weight, fresh)
    assert report.rebuilt == {"input_proj.weight": "fresh: the file's backbone gives 512 channels, this one 256"}
    assert all(name.startswith("backbone.0.body.layer4.") for name in report.unused)


@pytest.mark.parametrize("changes", [{"hidden_dim": 64}, {"dim_feedforward": 128}, {"backbone": "resnet50"}])
def test_other_shapes_are_an_error_and_change_nothing(tmp_path: Path, changes: dict) -> None:
    source, model = tiny(3), tiny(3, seed=1, **changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"start.pth does not fit \(are model.hidden_dim.*there.*here"):
        load_initial_weights(model, save(tmp_path, source.state_dict()), ["a", "b", "c"])
    assert_equal(model, before)


def test_a_backbone_alone_is_no_detr(tmp_path: Path) -> None:
    file = save(tmp_path, get_model("resnet18").state_dict())
    with pytest.raises(WeightsError, match=r"holds no DETR weights.*model.backbone_weights"):
        load_initial_weights(tiny(1), file, ["a"])


def test_nan_in_the_file_is_found_before_training(tmp_path: Path) -> None:
    state = tiny(1).state_dict()
    state["transformer.decoder.norm.bias"][3] = torch.nan
    with pytest.raises(WeightsError, match=r"NaN or infinity in transformer.decoder.norm.bias"):
        load_initial_weights(tiny(1), save(tmp_path, state), ["a"])


def test_label_map_that_contradicts_the_head(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="names 2 classes, its head has 3"):
        load_initial_weights(tiny(3), own_checkpoint(tmp_path, tiny(3), ["a", "b"]), ["a", "b", "c"])


def test_report_reads_as_a_table(tmp_path: Path) -> None:
    source = tiny(91).state_dict() | {"mask_head.lay1.bias": torch.ones(2)}
    model = tiny(2, seed=1, num_queries=6, decoder_layers=2)
    table = load_initial_weights(model, save(tmp_path, source), ["cat", "yeti"], coco91_names=COCO91).table()
    lines = table.splitlines()
    assert lines[0].startswith("weights from ")
    assert lines[1].split()[:2] == ["loaded", str(len(model.state_dict()) - 18 - 3)]
    assert "backbone.0.body.* (100)" in lines[1]
    assert lines[2].split() == ["rebuilt", "3"]
    assert "class_embed.weight: the no-object row and 1 of 2 classes copied by name; fresh: yeti" in table
    assert "query_embed.weight: 5 of the file's 5 queries copied, 1 fresh" in table
    assert lines[-2].split(maxsplit=2) == ["missing", "18", "transformer.decoder.layers.1.* (18)"]
    assert lines[-1].split() == ["unused", "1", "mask_head.lay1.bias"]


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_backbone_file_fills_the_resnet(tmp_path: Path, backbone: str, norm: str) -> None:
    state = get_model(backbone).state_dict()
    model = tiny(1, seed=1, backbone=backbone, backbone_norm=norm, backbone_stride=16)
    torch.save(state, tmp_path / "net.pth")
    load_backbone_weights(model, str(tmp_path / "net.pth"), backbone)
    for name, value in model.body.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_no_backbone_weights_change_nothing() -> None:
    model, same = tiny(1), tiny(1)
    load_backbone_weights(model, "none", "resnet18")
    assert_equal(model, same.state_dict())


def test_imagenet_means_torchvisions_first_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def recorded(source: str) -> dict:
        asked.append(source)
        return {"model": get_model("resnet18").state_dict()}

    monkeypatch.setattr(weights, "read_checkpoint", recorded)
    load_backbone_weights(tiny(1), "imagenet", "resnet18")
    assert asked == [get_model_weights("resnet18")["IMAGENET1K_V1"].url]
    assert asked[0].startswith("https://download.pytorch.org/models/resnet18-")


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ("resnet101", "resnet50", r"is no resnet50: it has more, layer3\.\*"),
        ("resnet34", "resnet50", "is no resnet50; it lacks"),
        ("resnet50", "resnet18", "is no resnet18: it has more"),
    ],
)
def test_another_resnet_is_refused(tmp_path: Path, there: str, here: str, message: str) -> None:
    torch.save(get_model(there).state_dict(), tmp_path / "net.pth")
    with pytest.raises(WeightsError, match=message):
        load_backbone_weights(tiny(1, backbone=here), str(tmp_path / "net.pth"), here)


def test_detr_weights_are_no_backbone(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"DETR weights, which model.init_from takes"):
        load_backbone_weights(tiny(1), save(tmp_path, tiny(1).state_dict()), "resnet18")
