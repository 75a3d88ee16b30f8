"""DINO: names and sizes of the published models, and what it makes of odd input.

Its numbers against the published code: ``test_family_goldens.py``; its denoising queries: ``test_denoising.py``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from given_maps import predicted_from, take_maps_as_they_are

from detr_ray.config import Config, LossConfig, ModelConfig, load_config
from detr_ray.detector import build_skeleton
from detr_ray.loss import SetCriterion, build_criterion
from detr_ray.loss.sigmoid_losses import FocalLoss
from detr_ray.model import build_model, load_published, published_state_dict, weights
from detr_ray.model.checkpoint_file import read_checkpoint
from detr_ray.model.denoising import DenoisingQueries
from detr_ray.model.dino import Dino
from detr_ray.model.state_dicts import WeightsError
from detr_ray.model.weights import find_detector, load_initial_weights, whole_state
from detr_ray.structures import IMAGENET_PIXELS, Batch, PaddedBatch, StepInfo, to_device

CLASSES = 5
TINY: dict[str, Any] = {
    "architecture": "dino", "backbone": "resnet18", "backbone_norm": "batch", "hidden_dim": 32, "num_heads": 4,
    "dim_feedforward": 48, "encoder_layers": 1, "decoder_layers": 3, "num_queries": 12, "denoising_queries": 6,
}  # fmt: skip


def configured(**changes: Any) -> Config:
    return load_config(None, [f"model.{key}={value}" for key, value in {**TINY, **changes}.items()])


def tiny(**changes: Any) -> Dino:
    torch.manual_seed(0)
    model = build_model(configured(**changes).model, CLASSES)
    assert isinstance(model, Dino)
    for head in (model.bbox_embed[0], model.transformer.enc_out_bbox_embed):
        torch.nn.init.normal_(head.layers[-1].weight, std=0.1)  # fresh box heads give the references themselves
    return model


def criterion(**changes: Any) -> SetCriterion:
    return build_criterion(configured(**changes), CLASSES)


def batch_of(*counts: int, size: tuple[int, int] = (64, 96), most: int | None = None) -> Batch:
    """Images with so many boxes each, of a step whose images have ``most`` at most."""
    generator = np.random.default_rng(2)
    total = sum(counts)
    padded = PaddedBatch(
        images=generator.integers(256, size=(len(counts), 3, *size), dtype=np.uint8),
        sizes=np.array([size] * len(counts), np.int32),
        orig_sizes=np.array([size] * len(counts), np.int32),
        image_ids=np.arange(len(counts)),
        positions=np.arange(len(counts)) + 40,
        labels=generator.integers(CLASSES, size=total),
        boxes_cxcywh=generator.uniform(0.3, 0.6, (total, 4)).astype(np.float32),
        counts=np.array(counts, np.int64),
    )
    info = StepInfo(seed=1, step=2, most_boxes=max(counts) if most is None else most)
    return to_device(padded, torch.device("cpu"), IMAGENET_PIXELS, step_info=info)


@pytest.mark.parametrize(
    ("levels", "keys", "parameters", "first"),
    [(4, 626, 46_893_182, [256, 512, 1, 1]), (5, 630, 47_255_806, [256, 256, 1, 1])],
)
def test_the_published_models_have_their_names_and_sizes(
    levels: int, keys: int, parameters: int, first: list[int]
) -> None:
    config = load_config(None, ["model.architecture=dino", f"model.num_feature_levels={levels}"])
    model = build_skeleton(config.model, 91)
    state = published_state_dict(model)
    assert len(state) == keys
    assert sum(value.numel() for value in model.parameters()) == parameters
    assert list(state["input_proj.0.0.weight"].shape) == first
    assert list(state["label_enc.weight"].shape) == [92, 256]
    assert list(state["transformer.decoder.bbox_embed.5.layers.2.weight"].shape) == [4, 256]
    assert model.num_queries == 900


def test_a_published_state_dict_loads_and_comes_back() -> None:
    model = tiny()
    state = {name: value + 1 for name, value in published_state_dict(model).items()}
    load_published(model, {**state, "backbone.total_params": torch.zeros(1)})
    back = published_state_dict(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_a_state_dict_that_is_not_the_models_is_refused() -> None:
    model = tiny()
    state = published_state_dict(model)
    for twin in ("transformer.decoder.class_embed.0.bias", "bbox_embed.2.layers.0.bias"):
        with pytest.raises(WeightsError, match=rf"other values for {re.escape(twin)} than"):
            load_published(model, {**state, twin: state[twin] + 1})
        with pytest.raises(WeightsError, match=rf"lacks {re.escape(twin)}"):
            load_published(model, {name: value for name, value in state.items() if name != twin})


def test_rows_of_same_named_classes_come_from_a_published_file(tmp_path: Path) -> None:
    """Of both class heads, and of the table that denoising describes labels with."""
    old = tiny()
    state = {name: torch.randn_like(value.float()) for name, value in old.state_dict().items()}
    old.load_state_dict(state)
    torch.save({"model": published_state_dict(old)}, tmp_path / "old.pth")
    content = {**read_checkpoint(str(tmp_path / "old.pth")), "class_names": ["a", "b", "c", "d", "e"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "read_checkpoint", lambda source: content)
        new = build_model(configured(num_queries=10).model, 3)
        fresh = {name: value.clone() for name, value in new.state_dict().items()}
        report = load_initial_weights(new, "old.pth", ["c", "x", "a"])
    assert not report.missing and not report.unused
    heads = {"class_embed.0", "transformer.enc_out_class_embed"}
    assert {name.rpartition(".")[0] for name, what in report.rebuilt.items() if "classes" in what} == {
        *heads,
        "label_enc",
    }
    for name, value in new.state_dict().items():
        if name.rpartition(".")[0] in {*heads, "label_enc"}:
            assert torch.equal(value[[0, 2]], state[name][[2, 0]]) and torch.equal(value[1], fresh[name][1])
        elif name == "transformer.tgt_embed.weight":
            assert torch.equal(value, state[name][:10])
        elif "num_batches" not in name:
            assert torch.equal(value, state[name]), name
    assert torch.equal(new.label_enc.weight[3], state["label_enc.weight"][5])


def test_a_published_file_is_evaluated_whole(tmp_path: Path) -> None:
    model = tiny()
    torch.save({"model": published_state_dict(model)}, tmp_path / "whole.pth")
    checkpoint = read_checkpoint(str(tmp_path / "whole.pth"))
    found = whole_state(model, find_detector(checkpoint, model, "whole.pth"), "whole.pth")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_rows_of_the_label_table_that_no_label_has_are_left_out(tmp_path: Path) -> None:
    """The published code gives its table the size of COCO's, whatever the number of classes."""
    model, other = tiny(), build_model(configured().model, CLASSES)
    state = published_state_dict(model)
    state["label_enc.weight"] = torch.cat((state["label_enc.weight"], torch.full((86, 32), torch.nan)))
    load_published(other, state)
    assert torch.equal(other.label_enc.weight, model.label_enc.weight)
    torch.save({"model": state}, tmp_path / "large.pth")
    found = find_detector(read_checkpoint(str(tmp_path / "large.pth")), model, "large.pth")
    assert torch.equal(whole_state(model, found, "large.pth")["label_enc.weight"], model.label_enc.weight)
    report = load_initial_weights(other, str(tmp_path / "large.pth"), ["a", "b", "c", "d", "e"])
    assert "label_enc.weight" in report.loaded
    with pytest.raises(WeightsError, match=r"label_enc\.weight"):
        load_published(other, {**state, "label_enc.weight": torch.zeros(4, 32)})


def test_counters_of_batch_norm_need_not_be_in_a_published_file() -> None:
    model, other = tiny(), build_model(configured().model, CLASSES)
    without = {name: value for name, value in published_state_dict(model).items() if "num_batches" not in name}
    load_published(other, without)
    assert other.state_dict()["backbone.0.body.bn1.num_batches_tracked"] == 0
    frozen = build_model(configured(backbone_norm="frozen").model, CLASSES)
    load_published(frozen, published_state_dict(model))
    assert torch.equal(frozen.label_enc.weight, model.label_enc.weight)


def test_the_decoders_heads_start_as_copies_of_the_encoders() -> None:
    model = build_model(configured().model, CLASSES)
    assert isinstance(model, Dino)
    pairs = ((model.class_embed[0], "enc_out_class_embed"), (model.bbox_embed[0], "enc_out_bbox_embed"))
    for decoders, name in pairs:
        encoders = model.transformer.get_submodule(name).state_dict()
        for key, value in decoders.state_dict().items():
            assert torch.equal(value, encoders[key]) and value.data_ptr() != encoders[key].data_ptr()


def test_sections_alone_make_the_same_criterion() -> None:
    """Without values that were filled in from the whole configuration."""
    config = Config(model=ModelConfig(architecture="dino"))
    given = (build_criterion(config, CLASSES), build_criterion(LossConfig(), CLASSES, cfg_model=config.model))
    for made in given:
        assert isinstance(made.class_loss, FocalLoss) and made.matcher.cost_class == 2
        assert made.normalisers([2, 1]) == (3.0,) * 6
    assert given[0].weights == given[1].weights
    alone = build_criterion(LossConfig(), CLASSES, cfg_model=ModelConfig(num_queries=7))
    assert alone.normalisers([2]) == (2.0, 2 + 0.1 * 5)
    with pytest.raises(ValueError, match="without num_queries"):
        build_criterion(LossConfig(), CLASSES).normalisers([2])


@pytest.mark.parametrize("counts", [(0, 0), (2, 0), (3, 1)])
@pytest.mark.parametrize("denoising", [6, 0])
def test_every_parameter_gets_a_gradient_in_every_step(counts: tuple[int, ...], denoising: int) -> None:
    """Workers wait for the gradient of each other's parameters. Which losses there are is known before."""
    model = tiny(denoising_queries=denoising).train()
    measure, batch = criterion(denoising_queries=denoising), batch_of(*counts)
    known = measure.weights
    output = model(*model.inputs_of(batch))
    losses = measure(output, batch.targets)
    assert ("loss_ce_dn" in losses) == (denoising > 0) and measure.weights == known
    measure.total(losses).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert bool(model.label_enc.weight.grad.any()) == (denoising > 0 and sum(counts) > 0)


def test_denoising_has_groups_for_the_fullest_image_of_the_whole_step() -> None:
    model = tiny().train()
    for most, groups, queries in ((2, 3, 12), (3, 2, 12), (9, 1, 18)):
        output = model(*model.inputs_of(batch_of(2, 0, most=most)))
        assert output["dn_outputs"]["groups"] == groups
        assert output["dn_outputs"]["pred_boxes"].shape == (2, queries, 4)
    assert len(model.inputs_of(batch_of(2))) == 3
    assert "dn_outputs" not in model(batch_of(2).images)


def test_denoising_starts_as_far_from_the_border_as_published() -> None:
    """The distance shows in boxes that noise has turned inside out."""
    (_, _, queries) = tiny(denoising_box_noise=9).inputs_of(batch_of(3, 2))
    torch.testing.assert_close(queries.reference_logits.min(), torch.tensor(0.001).log())


def test_denoising_does_not_change_what_is_found() -> None:
    model = tiny().train()
    model.backbone.eval()  # batch norm of training would differ from call to call
    batch = batch_of(3, 1)
    with_it, without = model(*model.inputs_of(batch)), model(batch.images)
    torch.testing.assert_close(with_it["pred_logits"], without["pred_logits"])
    torch.testing.assert_close(with_it["pred_boxes"], without["pred_boxes"])


def test_more_queries_than_cells_are_no_failure() -> None:
    changes = {"num_queries": 50, "num_feature_levels": 2}
    model, batch = tiny(**changes).train(), batch_of(3, 0, size=(32, 40))
    output = model(*model.inputs_of(batch))
    assert output["pred_boxes"].shape == (2, 50, 4)
    assert all(bool(value.isfinite()) for value in criterion(**changes)(output, batch.targets).values())


def test_a_cell_that_serves_several_queries_is_trained_once() -> None:
    """It would be background for all of them but one."""
    model = tiny(num_queries=50, num_feature_levels=2)
    proposals = model(batch_of(0, size=(32, 40)).images)["interm_outputs"]
    logits, boxes = proposals["pred_logits"][0], proposals["pred_boxes"][0]
    cells = 2 * 3 + 1 * 2
    torch.testing.assert_close(boxes, boxes[torch.arange(50) % cells])
    assert torch.pdist(boxes[:cells]).min() > 0.01
    assert (logits[cells:] == -10).all() and (logits[:cells] > -8).all()


def test_what_stands_in_the_padding_plays_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the projected maps on, as for Deformable DETR. The encoder proposes the same as for the image alone; the
    decoder describes boxes in units of the padded map, as published.
    """
    model = tiny(num_queries=100).eval()
    generator = torch.Generator().manual_seed(3)
    alone = [torch.randn(1, 32, size, size, generator=generator) for size in (8, 4, 2, 1)]
    padded, otherwise = (
        [torch.nn.functional.pad(level, (0, level.shape[3], 0, 0), value=value) for level in alone]
        for value in (7.0, -3.0)
    )
    mask = torch.zeros(1, 64, 128, dtype=torch.bool)
    mask[:, :, 64:] = True
    take_maps_as_they_are(model, monkeypatch, 4)
    expected = predicted_from(model, alone, None)
    found, same = predicted_from(model, padded, mask), predicted_from(model, otherwise, mask)
    for part, atol in (("pred_logits", 1e-4), ("pred_boxes", 1e-5)):
        torch.testing.assert_close(found[part], same[part], rtol=0, atol=1e-6)
        torch.testing.assert_close(found["interm_outputs"][part], expected["interm_outputs"][part], rtol=0, atol=atol)
    assert (found["pred_boxes"] - expected["pred_boxes"]).abs().max() < 0.05


def test_denoising_losses_are_those_of_queries_with_their_own_boxes() -> None:
    """Query i of each group finds box i: counted by hand, of an image with fewer boxes than there are places."""
    model, batch = tiny().train(), batch_of(1, 2)
    output = model(*model.inputs_of(batch))
    losses = criterion()(output, batch.targets)
    found = output["dn_outputs"]
    assert found["groups"] == 3
    distance = found["pred_boxes"].new_zeros(())
    for image, target in enumerate(batch.targets):
        for group in range(3):
            for box, wanted in enumerate(target["boxes"]):
                distance = distance + (found["pred_boxes"][image, group * 4 + box] - wanted).abs().sum()
    torch.testing.assert_close(losses["loss_bbox_dn"], distance / 9)
    assert {"loss_giou_dn_0", "loss_ce_dn_1", "loss_ce_interm"} <= losses.keys()
    weighted = criterion().weights
    assert (weighted["loss_ce_dn_0"], weighted["loss_bbox_interm"]) == (1.0, 5.0)


def test_the_encoder_learns_from_the_cells_that_it_chose_and_their_labels() -> None:
    model, batch = tiny().train(), batch_of(2, 1)
    output = model(*model.inputs_of(batch))
    losses = criterion()(output, batch.targets)
    alone = build_criterion(configured(), CLASSES)
    alone.sources = alone.sources[:1]
    expected = alone(output["interm_outputs"], batch.targets)
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        torch.testing.assert_close(losses[f"{name}_interm"], expected[name])
    assert "loss_ce_enc" not in losses


def test_levels_come_from_the_backbone_and_then_from_the_level_before() -> None:
    def shapes(**changes: Any) -> list[tuple[int, ...]]:
        return [tuple(project[0].weight.shape) for project in tiny(**changes).input_proj]

    assert shapes() == [(32, 128, 1, 1), (32, 256, 1, 1), (32, 512, 1, 1), (32, 512, 3, 3)]
    assert shapes(num_feature_levels=5)[:2] == [(32, 64, 1, 1), (32, 128, 1, 1)]
    assert shapes(num_feature_levels=6)[4:] == [(32, 512, 3, 3), (32, 32, 3, 3)]
    assert shapes(num_feature_levels=1) == [(32, 512, 1, 1)]
    assert tiny(num_feature_levels=5)(batch_of(0).images)["pred_boxes"].shape == (1, 12, 4)


def test_bf16_keeps_boxes_and_logits_in_full_precision() -> None:
    model, batch = tiny().train(), batch_of(2, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(*model.inputs_of(batch))
    layers = [output, output["interm_outputs"], output["dn_outputs"], *output["aux_outputs"]]
    types = {tensor.dtype for layer in layers for tensor in (layer["pred_logits"], layer["pred_boxes"])}
    assert types == {torch.float32}
    measure = criterion()
    measure.total(measure(output, batch.targets)).backward()


def test_queries_without_a_box_start_in_the_middle_with_nothing() -> None:
    model = tiny().eval()
    nothing = DenoisingQueries(torch.full((1, 2), -1), torch.zeros(1, 2, 4), 1)
    with torch.no_grad():
        model.label_enc.weight.fill_(torch.nan)
        output = model(batch_of(0).images, None, nothing)
    assert bool(output["dn_outputs"]["pred_logits"].isfinite().all())
