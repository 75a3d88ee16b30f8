"""What is recorded of attention is what the model computed, and recording changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from detr_ray.config import load_config
from detr_ray.model import DetectionModel, build_model
from detr_ray.model.attention import MultiheadAttention
from detr_ray.model.attention_maps import AttentionMap, SamplingPoints, record_attention

SMALL = (
    "model={backbone: resnet18, backbone_norm: batch, hidden_dim: 32, num_heads: 4, dim_feedforward: 48}",
    "model={encoder_layers: 2, decoder_layers: 2, num_queries: 7, dropout: 0.5}",
)


def model_of(*changes: str) -> DetectionModel:
    torch.manual_seed(0)
    return build_model(load_config(None, [*SMALL, *changes]).model, 5)


@pytest.fixture(scope="module")
def padded() -> tuple[Tensor, Tensor]:
    """Two images; the second is padded at the right and at the bottom."""
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 40:] = True
    mask[1, :, 60:] = True
    return images, mask


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    parts = zip(one.values(), other.values(), strict=True) if isinstance(one, dict) else zip(one, other, strict=True)
    return all(equal(a, b) for a, b in parts)


def test_weights_are_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = MultiheadAttention(32, 4, 0.0), torch.nn.MultiheadAttention(32, 4, batch_first=True)
    torch.nn.init.normal_(ours.in_proj_bias)
    theirs.load_state_dict(ours.state_dict())
    query, key = torch.randn(2, 5, 32), torch.randn(2, 9, 32)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    expected = theirs(query, key, key, padding, need_weights=True, average_attn_weights=False)[1]
    torch.testing.assert_close(ours.weights(query, key, ~padding[:, None, None, :]), expected)


@pytest.mark.parametrize("stride", [16, 32])
def test_weights_sum_to_one_over_the_image_and_are_zero_on_padding(padded: tuple[Tensor, Tensor], stride: int) -> None:
    seen = record_attention(model_of(f"model.backbone_stride={stride}"), *padded)
    height, width = 64 // stride, 96 // stride
    rows, columns = -(-40 // stride), -(-60 // stride)
    for layer in (0, 1):
        for one in (seen.of_encoder(layer, 1, [0, width + 1]), seen.of_decoder(layer, 1, [0, 3])):
            assert isinstance(one, AttentionMap) and one.weights.shape == (4, 2, height, width)
            torch.testing.assert_close(one.weights.sum((-1, -2)), torch.ones(4, 2))
            assert one.weights[..., rows:, :].sum() == 0 and one.weights[..., columns:].sum() == 0
            assert one.weights[..., :rows, :columns].min() > 0
    whole = seen.of_encoder(0, 0, [0])
    assert isinstance(whole, AttentionMap) and whole.weights.min() > 0, "the first image has no padding"


def test_weights_are_those_that_the_layer_applied(padded: tuple[Tensor, Tensor]) -> None:
    """With them, the values give what the layer gave."""
    model = model_of("model.backbone_stride=32")
    layer = model.get_submodule("transformer.decoder.layers.1.multihead_attn")
    assert isinstance(layer, MultiheadAttention)
    given: list[tuple[Any, Tensor]] = []
    layer.register_forward_hook(lambda module, inputs, output: given.append((inputs, output)))
    seen = record_attention(model, *padded)
    (query, _, value, _), output = given[0]
    for image in (0, 1):
        one = seen.of_decoder(1, image, range(query.shape[1]))
        assert isinstance(one, AttentionMap)
        values = torch.nn.functional.linear(
            value[image], layer.in_proj_weight.chunk(3)[2], layer.in_proj_bias.chunk(3)[2]
        )
        by_head = values.view(len(values), 4, 8).transpose(0, 1)
        gathered = (one.weights.flatten(2) @ by_head).transpose(0, 1).flatten(1)
        torch.testing.assert_close(layer.out_proj(gathered), output[image])


@pytest.mark.parametrize(
    "changes",
    [(), ("model.architecture=deformable_detr", "model.two_stage=true"), ("model.architecture=dino",)],
    ids=["detr", "deformable_detr", "dino"],
)
def test_recording_changes_neither_the_output_nor_the_model(
    padded: tuple[Tensor, Tensor], changes: tuple[str, ...]
) -> None:
    model = model_of(*changes)
    seen = record_attention(model, *padded)
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert equal(model.eval()(*padded), seen.output)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model_of(*changes).state_dict().items())


def test_points_of_deformable_attention_are_those_that_are_read(padded: tuple[Tensor, Tensor]) -> None:
    model = model_of("model.architecture=deformable_detr", "model.num_feature_levels=2", "model.decoder_points=3")
    read: list[tuple[Tensor, Tensor]] = []
    attention: Any = model.get_submodule("transformer.decoder.layers.0.cross_attn")
    plain = attention.sampler
    attention.sampler = lambda value, sizes, locations, weights: (
        read.append((locations, weights)),
        plain(value, sizes, locations, weights),
    )[1]
    seen = record_attention(model, *padded)
    one = seen.of_decoder(0, 1, [2, 5])
    assert isinstance(one, SamplingPoints) and one.locations.shape == (2, 4, 2, 3, 2)
    torch.testing.assert_close(one.locations, read[0][0][1, [2, 5]])
    torch.testing.assert_close(one.weights, read[0][1][1, [2, 5]])
    torch.testing.assert_close(one.weights.sum((-1, -2)), torch.ones(2, 4))
    assert len(seen.map_sizes) == 2 and (one.references >= 0).all() and (one.references <= 1).all()
