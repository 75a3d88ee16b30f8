"""Deformable DETR: names and sizes of the published models, its options, and what it makes of odd input.

Its numbers against the published code: ``test_family_goldens.py``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from given_maps import predicted_from, take_maps_as_they_are
from torch import Tensor

from detr_ray.config import Config, load_config
from detr_ray.detector import build_skeleton
from detr_ray.loss import SetCriterion, build_criterion
from detr_ray.model import build_model, load_published, published_state_dict, weights
from detr_ray.model.checkpoint_file import read_checkpoint
from detr_ray.model.deformable_detr import DeformableDetr
from detr_ray.model.pyramid import input_projections
from detr_ray.model.state_dicts import WeightsError
from detr_ray.model.weights import find_detector, load_initial_weights, whole_state
from detr_ray.structures import Target

CLASSES = 5
TINY: dict[str, Any] = {
    "architecture": "deformable_detr", "backbone": "resnet18", "backbone_norm": "batch", "hidden_dim": 32,
    "num_heads": 4, "dim_feedforward": 48, "encoder_layers": 1, "decoder_layers": 3, "num_queries": 12, "dropout": 0,
}  # fmt: skip
REFINE = {"box_refine": "true"}
TWO_STAGE = {"two_stage": "true"}
ALL = {**TWO_STAGE, "mixed_query_selection": "true", "look_forward_twice": "true", "one_to_many_queries": 6}
VARIANTS = pytest.mark.parametrize("changes", [{}, REFINE, TWO_STAGE, ALL], ids=["base", "refine", "two_stage", "all"])


def configured(**changes: Any) -> Config:
    return load_config(None, [f"model.{key}={value}" for key, value in {**TINY, **changes}.items()])


def tiny(**changes: Any) -> DeformableDetr:
    torch.manual_seed(0)
    model = build_model(configured(**changes).model, CLASSES)
    assert isinstance(model, DeformableDetr)
    for head in model.bbox_embed:  # fresh box heads give the references themselves
        torch.nn.init.normal_(head.layers[-1].weight, std=0.1)
    return model


def criterion(**changes: Any) -> SetCriterion:
    return build_criterion(configured(**changes), CLASSES)


def images(*size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def targets(*counts: int) -> list[Target]:
    generator = torch.Generator().manual_seed(2)
    return [
        Target(
            labels=torch.randint(CLASSES, (count,), generator=generator),
            boxes=torch.rand(count, 4, generator=generator) * 0.3 + 0.3,
        )
        for count in counts
    ]


@pytest.mark.parametrize(
    ("overrides", "keys", "parameters", "trained"),
    [
        ([], 561, 40_069_665, 39_847_265),
        (["model.box_refine=true"], 597, 40_849_660, 40_627_260),
        (["model.two_stage=true"], 630, 41_181_529, 40_959_129),
        (["model.num_feature_levels=1"], 549, 34_066_593, 33_844_193),
    ],
)
def test_the_published_models_have_their_names_and_sizes(
    overrides: list[str], keys: int, parameters: int, trained: int
) -> None:
    model = build_skeleton(load_config(None, ["model.architecture=deformable_detr", *overrides]).model, 91)
    assert len(published_state_dict(model)) == keys
    assert sum(value.numel() for value in model.parameters()) == parameters
    assert sum(value.numel() for value in model.parameters() if value.requires_grad) == trained
    assert (model.num_queries, len(model.transformer.decoder.layers)) == (300, 6)


@VARIANTS
def test_a_published_state_dict_loads_and_comes_back(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    state = {name: value + 1 for name, value in published_state_dict(model).items()}
    load_published(model, {**state, "backbone.total_params": torch.zeros(1)})
    back = published_state_dict(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_a_state_dict_that_is_not_the_models_is_refused() -> None:
    model = tiny(**TWO_STAGE)
    state = published_state_dict(model)
    twin = "transformer.decoder.bbox_embed.1.layers.0.bias"
    with pytest.raises(WeightsError, match=rf"other values for {re.escape(twin)} than"):
        load_published(model, {**state, twin: state[twin] + 1})
    with pytest.raises(WeightsError, match=rf"lacks {re.escape(twin)}"):
        load_published(model, {name: value for name, value in state.items() if name != twin})
    with pytest.raises(WeightsError, match=r"has more, query_embed\.weight"):
        load_published(model, {**state, "query_embed.weight": torch.zeros(3)})
    refined = published_state_dict(tiny(box_refine=True))
    with pytest.raises(WeightsError, match=r"needs model\.box_refine=true"):
        load_published(tiny(), refined)


@VARIANTS
def test_rows_of_same_named_classes_come_from_a_published_file(changes: dict[str, Any], tmp_path: Path) -> None:
    """The file lists heads several times; the encoder's head of two stages has one row that means something."""
    old = tiny(**changes)
    state = {name: torch.randn_like(value.float()) for name, value in old.state_dict().items()}
    old.load_state_dict(state)
    torch.save({"model": {**published_state_dict(old), "backbone.total_params": torch.zeros(1)}}, tmp_path / "old.pth")
    content = {**read_checkpoint(str(tmp_path / "old.pth")), "class_names": ["a", "b", "c", "d", "e"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "read_checkpoint", lambda source: content)
        new = build_model(configured(**changes).model, 3)
        fresh = {name: value.clone() for name, value in new.state_dict().items()}
        report = load_initial_weights(new, "old.pth", ["c", "x", "a"])
    assert not report.missing and not report.unused
    found = new.state_dict()
    objects = [f"class_embed.{len(new.class_embed) - 1}"] if "two_stage" in changes else []
    for name, value in found.items():
        head = name.rpartition(".")[0]
        if head in objects:
            assert torch.equal(value[0], state[name][0]) and torch.equal(value[1:], fresh[name][1:])
        elif head.startswith("class_embed"):
            assert torch.equal(value[[0, 2]], state[name][[2, 0]]) and torch.equal(value[1], fresh[name][1])
        elif "num_batches" not in name:
            assert torch.equal(value, state[name]), name


@VARIANTS
def test_a_published_file_is_evaluated_whole(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(**changes)
    torch.save({"model": published_state_dict(model)}, tmp_path / "whole.pth")
    checkpoint = read_checkpoint(str(tmp_path / "whole.pth"))
    found = whole_state(model, find_detector(checkpoint, model, "whole.pth"), "whole.pth")
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


@VARIANTS
def test_every_parameter_gets_a_gradient_from_images_without_boxes(changes: dict[str, Any]) -> None:
    """Workers wait for the gradient of each other's parameters. Which losses there are is known before."""
    model = tiny(**changes).train()
    measure = criterion(**changes)
    known = measure.weights
    for wanted in (targets(0, 0), targets(2, 0)):
        model.zero_grad()
        measure.total(measure(model(images(64, 96)), wanted)).backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing and measure.weights == known


@VARIANTS
def test_more_queries_than_cells_are_no_failure(changes: dict[str, Any]) -> None:
    model = tiny(**{**changes, "num_queries": 50, "num_feature_levels": 2}).train()
    output = model(images(32, 40))
    assert output["pred_boxes"].shape == (2, 50, 4)
    losses = criterion(**changes)(output, targets(3, 0))
    assert all(bool(value.isfinite()) for value in losses.values())


def test_queries_that_are_the_same_find_an_object_once() -> None:
    """Of a small image's cells; learned contents make queries of one cell differ."""
    cells = 4 * 5 + 2 * 3  # in the maps of strides 8 and 16, none of them at the very border
    few = {**TWO_STAGE, "num_queries": 70, "num_feature_levels": 2, "backbone_stride": 16, "one_to_many_queries": 40}
    output = tiny(**few).train()(images(32, 40))
    for found in (output, output["one_to_many_outputs"]):
        for layer in (*found["aux_outputs"], found):
            says = layer["pred_logits"].amax(-1) > -8
            assert says[:, :cells].all() and not says[:, cells:].any()
            assert len(layer["pred_boxes"][0][says[0]].unique(dim=0)) == cells
    output = tiny(**few, mixed_query_selection="true").eval()(images(32, 40))
    assert len(output["pred_logits"][0].unique(dim=0)) == 70


@pytest.mark.parametrize("dim", [16, 32, 48, 96, 256])
def test_maps_of_one_cell_are_no_failure(dim: int) -> None:
    """Of one image alone, and of models so narrow that a group of the norm had one channel."""
    (project,) = input_projections((8,), 1, dim)
    assert project(torch.randn(1, 8, 1, 1)).any()
    assert project[1].num_groups == (dim // 2 if dim < 64 else 32), "published models are at least as wide"


def levels_of(sizes: list[tuple[int, int]], channels: tuple[int, ...], count: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(count, c, *size, generator=generator) for c, size in zip(channels, sizes, strict=True)]


@VARIANTS
def test_an_image_alone_is_the_same_image_padded(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the projected maps on: the backbone sees the padding's border, and group norm its cells, as in the original.

    What stands in the padding must play no part. There are more queries than cells, so that no cell of the padding may
    be chosen in two stages, however good it looks.
    """
    model = tiny(**{**changes, "num_queries": 100}).eval()
    alone = levels_of([(8, 8), (4, 4), (2, 2), (1, 1)], (32,) * 4)
    padded = [torch.nn.functional.pad(level, (0, level.shape[3], 0, 0), value=7.0) for level in alone]
    mask = torch.zeros(1, 64, 128, dtype=torch.bool)
    mask[:, :, 64:] = True
    take_maps_as_they_are(model, monkeypatch, 4)
    expected, found = predicted_from(model, alone, None), predicted_from(model, padded, mask)
    torch.testing.assert_close(found["pred_logits"], expected["pred_logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(found["pred_boxes"], expected["pred_boxes"], rtol=0, atol=1e-5)


def test_looking_forward_twice_changes_gradients_and_no_output() -> None:
    """The second layer's boxes train the first layer's head through its reference."""
    outputs, reached = {}, {}
    for twice in ("false", "true"):
        model = tiny(**REFINE, look_forward_twice=twice).eval()
        output = model(images(64, 64))
        outputs[twice] = output["pred_boxes"]
        heads = [head.layers[-1].bias for head in model.bbox_embed]
        layers = (*output["aux_outputs"], output)
        gradients = [torch.autograd.grad(layer["pred_boxes"].sum(), heads, retain_graph=True) for layer in layers]
        reached[twice] = [[bool(gradient.any()) for gradient in of_layer] for of_layer in gradients]
    torch.testing.assert_close(outputs["true"], outputs["false"])
    assert reached["false"] == [[True, False, False], [False, True, False], [False, False, True]]
    assert reached["true"] == [[True, False, False], [True, True, False], [False, True, True]]


def test_one_to_many_queries_train_apart_from_the_others_and_are_gone_afterwards() -> None:
    with_them, without = tiny(**TWO_STAGE, one_to_many_queries=6), tiny(**TWO_STAGE)
    without.load_state_dict(with_them.state_dict())
    with_them.backbone.eval(), without.backbone.eval()  # batch norm of training would differ from call to call
    batch = images(64, 96)
    trained, plain = with_them.train()(batch), without.train()(batch)
    assert trained["one_to_many_outputs"]["pred_boxes"].shape == (2, 6, 4)
    torch.testing.assert_close(trained["pred_logits"], plain["pred_logits"])
    torch.testing.assert_close(trained["pred_boxes"], plain["pred_boxes"])
    assert "one_to_many_outputs" not in with_them.eval()(batch)


def test_one_to_many_losses_are_those_of_repeated_targets() -> None:
    changes = {**TWO_STAGE, "one_to_many_queries": 6, "one_to_many_copies": 2}
    output = tiny(**changes).train()(images(64, 96))
    wanted = targets(2, 1)
    losses = criterion(**changes)(output, wanted)
    repeated = [Target(labels=t["labels"].repeat(2), boxes=t["boxes"].repeat(2, 1)) for t in wanted]
    alone = criterion()(output["one_to_many_outputs"], repeated)
    for name in ("loss_ce", "loss_bbox", "loss_giou", "loss_ce_1"):
        torch.testing.assert_close(losses[f"{name}_one2many"], alone[name])
    assert criterion(**changes).weights["loss_ce_0_one2many"] == 2.0


def test_mixed_selection_learns_contents_and_takes_places_from_the_encoder() -> None:
    mixed, pure = tiny(**TWO_STAGE, mixed_query_selection="true"), tiny(**TWO_STAGE)
    assert mixed.query_embed.weight.shape == (12, 32) and not hasattr(pure, "query_embed")
    state = {name: value for name, value in mixed.state_dict().items() if name != "query_embed.weight"}
    pure.load_state_dict(state)
    batch = images(64, 64)
    a, b = mixed.eval()(batch), pure.eval()(batch)
    torch.testing.assert_close(a["enc_outputs"]["pred_boxes"], b["enc_outputs"]["pred_boxes"])
    assert not torch.allclose(a["pred_logits"], b["pred_logits"])


def test_levels_come_from_the_backbone_and_then_from_the_level_before() -> None:
    def shapes(**changes: Any) -> list[tuple[int, ...]]:
        model = tiny(**changes)
        return [tuple(project[0].weight.shape) for project in model.input_proj]

    assert shapes() == [(32, 128, 1, 1), (32, 256, 1, 1), (32, 512, 1, 1), (32, 512, 3, 3)]
    assert shapes(num_feature_levels=5)[3:] == [(32, 512, 3, 3), (32, 32, 3, 3)]
    assert shapes(num_feature_levels=1) == [(32, 512, 1, 1)]
    assert shapes(num_feature_levels=3, backbone_stride=16) == [(32, 128, 1, 1), (32, 256, 1, 1), (32, 256, 3, 3)]
    model = tiny(num_feature_levels=5)
    assert model(images(64, 64))["pred_boxes"].shape == (2, 12, 4)


def test_first_weights_are_the_published_ones() -> None:
    torch.manual_seed(0)
    for changes, sizes in (({}, [-2.0]), (REFINE, [-2.0, 0.0, 0.0]), (TWO_STAGE, [0.0] * 4)):
        model = build_model(configured(**changes).model, CLASSES)
        assert [head.layers[-1].bias[3].item() for head in model.bbox_embed] == sizes
        assert all(not head.layers[-1].weight.any() for head in model.bbox_embed)
        for head in model.class_embed:
            torch.testing.assert_close(head.bias.sigmoid(), torch.full((CLASSES,), 0.01))


def test_bf16_keeps_boxes_and_logits_in_full_precision() -> None:
    model = tiny(**ALL).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images(64, 96))
    layers = [output, output["enc_outputs"], output["one_to_many_outputs"]]
    assert {tensor.dtype for layer in layers for tensor in (layer["pred_logits"], layer["pred_boxes"])} == {
        torch.float32
    }
    measure = criterion(**ALL)
    measure.total(measure(output, targets(2, 1))).backward()


@pytest.mark.parametrize("size", [(3, 1), (3, 2), (4, 2), (6, 2), (2, 3)])
def test_maps_of_one_or_two_columns_are_projected_in_bf16(size: tuple[int, int]) -> None:
    """With AMX, torch's own convolution gives NaN or something else there."""
    torch.manual_seed(0)
    project = input_projections([64], 2, 64)[1]
    source = torch.randn(2, 64, *size).contiguous(memory_format=torch.channels_last)
    exact = project(source)
    exact.square().sum().backward()
    gradient = project[0].weight.grad.clone()
    project.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = project(source)
    found.float().square().sum().backward()
    torch.testing.assert_close(found.float(), exact, atol=0.05, rtol=0.05)
    torch.testing.assert_close(project[0].weight.grad, gradient, atol=1.0, rtol=0.1)
