"""The whole model: the original's outputs, names and counts, and the ways in which it is run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from goldens import golden_config, golden_state_dict, load_golden, model_section
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from detr_ray.detector import postprocess
from detr_ray.loss import SoftmaxLoss
from detr_ray.model import build_model
from detr_ray.model.detr import Detr
from detr_ray.structures import ModelOutput


def tiny_section(**changes: object) -> SimpleNamespace:
    tiny = {
        "backbone": "resnet18",
        "hidden_dim": 32,
        "num_heads": 4,
        "dim_feedforward": 64,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "dropout": 0.0,
        "num_queries": 5,
    }
    return model_section(**(tiny | changes))


def tiny(**changes: object) -> Detr:
    torch.manual_seed(0)
    return build_model(tiny_section(**changes), num_classes=3)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask() -> Tensor:
    mask = torch.zeros(2, 96, 64, dtype=torch.bool)
    mask[1, 60:] = True
    return mask


def anything(output: ModelOutput) -> Tensor:
    """A scalar that every value of the output moves."""
    generator = torch.Generator().manual_seed(0)
    layers = [output, *output.get("aux_outputs", [])]
    values = [value for layer in layers for value in (layer["pred_logits"], layer["pred_boxes"])]
    return torch.stack([(v.float() * torch.randn(v.shape, generator=generator)).sum() for v in values]).sum()


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a.detach().float() - b.detach().float()).abs().max().item()


@pytest.mark.parametrize("name", ["small", "r50"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_outputs_are_the_originals(shared_data: Path, name: str, memory_format: torch.memory_format) -> None:
    golden = load_golden(shared_data, name)
    model = build_model(golden_config(golden), golden.num_classes)
    model.load_state_dict(golden_state_dict(model), strict=True)
    model.to(memory_format=memory_format)
    with torch.no_grad():
        output = model(golden.images.contiguous(memory_format=memory_format), golden.mask)
    assert distance(output["pred_logits"], golden.pred_logits) < 1e-4
    assert distance(output["pred_boxes"], golden.pred_boxes) < 1e-4
    assert len(output["aux_outputs"]) == len(golden.aux_pred_boxes)
    for layer, expected in zip(output["aux_outputs"], golden.aux_pred_boxes, strict=True):
        assert distance(layer["pred_boxes"], expected) < 1e-4
    assert {n for n, p in model.named_parameters() if p.requires_grad} == golden.grad_norms.keys()

    detections = postprocess(output, torch.tensor([[480, 640]] * 2), SoftmaxLoss(model.num_classes))
    for found, expected in zip(detections, golden.detections, strict=True):
        assert distance(found["scores"], expected["scores"]) < 1e-4
        assert torch.equal(found["labels"], expected["labels"])
        assert distance(found["boxes"] / 640, expected["boxes"] / 640) < 1e-4


def test_default_model_has_the_published_names_and_counts() -> None:
    model = build_model(model_section())
    assert len(model.state_dict()) == 458
    assert sum(p.numel() for p in model.parameters()) == 41_524_768
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 41_302_368
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["class_embed.weight"] == (92, 256)
    assert shapes["query_embed.weight"] == (100, 256)
    assert shapes["input_proj.weight"] == (256, 2048, 1, 1)
    assert shapes["transformer.decoder.layers.5.multihead_attn.in_proj_weight"] == (768, 256)
    assert shapes["backbone.0.body.layer4.2.bn3.running_var"] == (2048,)
    assert not [name for name in shapes if "num_batches_tracked" in name or ".fc." in name or "backbone.1" in name]


def test_resnet101_has_the_published_names() -> None:
    assert len(build_model(model_section(backbone="resnet101")).state_dict()) == 713


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pre_norm": True},
        {"position_embedding": "learned"},
        {"backbone_norm": "batch"},
        {"backbone_stride": 16},
        {"backbone_stride": 8, "backbone_norm": "batch"},
        {"backbone": "resnet50", "dilation": True},
        {"aux_loss": False},
    ],
)
def test_every_kind_of_model_learns_with_all_its_parameters(images: Tensor, mask: Tensor, changes: dict) -> None:
    model = tiny(**changes)
    output = model(images, mask)
    assert output["pred_logits"].shape == (2, 5, 4)
    assert output["pred_boxes"].shape == (2, 5, 4)
    assert ((output["pred_boxes"] > 0) & (output["pred_boxes"] < 1)).all()
    assert len(output.get("aux_outputs", [])) == (0 if changes.get("aux_loss") is False else 1)
    anything(output).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None]
    assert not [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]


def test_learned_positions_have_the_published_names() -> None:
    shapes = {name: tuple(value.shape) for name, value in tiny(position_embedding="learned").state_dict().items()}
    assert shapes["backbone.1.row_embed.weight"] == shapes["backbone.1.col_embed.weight"] == (50, 16)


def test_no_mask_is_a_mask_of_nothing(images: Tensor) -> None:
    model = tiny().eval()
    with torch.no_grad():
        unmasked, masked = model(images), model(images, torch.zeros(2, 96, 64, dtype=torch.bool))
    assert distance(unmasked["pred_logits"], masked["pred_logits"]) < 1e-5
    assert distance(unmasked["pred_boxes"], masked["pred_boxes"]) < 1e-5


def test_a_wholly_padded_image_gives_finite_numbers(images: Tensor) -> None:
    mask = torch.zeros(2, 96, 64, dtype=torch.bool)
    mask[1] = True
    model = tiny()
    output = model(images, mask)
    anything(output).backward()
    assert torch.isfinite(output["pred_logits"]).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_without_aux_loss_the_last_layer_is_the_same(images: Tensor, mask: Tensor) -> None:
    with_aux, without = tiny(), tiny(aux_loss=False)
    without.load_state_dict(with_aux.state_dict())
    a, b = with_aux(images, mask), without(images, mask)
    assert "aux_outputs" not in b
    torch.testing.assert_close(a["pred_boxes"], b["pred_boxes"])
    torch.testing.assert_close(a["pred_logits"], b["pred_logits"])


@pytest.mark.parametrize("backbone_norm", ["frozen", "batch"])
def test_bf16_autocast_and_channels_last_stay_close(images: Tensor, mask: Tensor, backbone_norm: str) -> None:
    model = tiny(backbone_norm=backbone_norm).to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    exact = model(images, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(images, mask)
    assert rounded["pred_logits"].dtype == rounded["pred_boxes"].dtype == torch.float32
    assert distance(exact["pred_boxes"], rounded["pred_boxes"]) < 0.05
    assert distance(exact["pred_logits"], rounded["pred_logits"]) < 0.2
    anything(rounded).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("changes", [{}, {"backbone_norm": "batch"}, {"aux_loss": False, "pre_norm": True}])
def test_distributed_training_finds_no_unused_parameter(
    images: Tensor, mask: Tensor, changes: dict, tmp_path: Path
) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(tiny(**changes))
        for _ in range(2):  # the second forward pass is where an unused parameter is found
            anything(model(images, mask)).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_it_compiles_into_one_graph(images: Tensor, mask: Tensor) -> None:
    model = tiny(backbone_norm="batch").eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for given in (mask, None):
        assert distance(compiled(images, given)["pred_boxes"], model(images, given)["pred_boxes"]) < 1e-6


def test_building_is_random_but_seeded() -> None:
    first, second = tiny().state_dict(), tiny().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 30}, "hidden_dim"),
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"dilation": True}, "cannot dilate"),
        ({"position_embedding": "fourier"}, "'sine' or 'learned', not 'fourier'"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
