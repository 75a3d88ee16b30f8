"""Attention against torch's own module, which has the same parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detr_ray.model.attention import MultiheadAttention


@pytest.fixture
def pair() -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    torch.manual_seed(0)
    ours = MultiheadAttention(32, 4, dropout=0.0)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    nn.init.normal_(ours.in_proj_bias)
    nn.init.normal_(ours.out_proj.bias)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def test_names_and_shapes_are_torchs(pair: tuple[MultiheadAttention, nn.MultiheadAttention]) -> None:
    ours, theirs = pair
    assert {name: value.shape for name, value in ours.named_parameters()} == {
        name: value.shape for name, value in theirs.named_parameters()
    }


@pytest.mark.parametrize("self_attention", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_values_and_gradients_are_torchs(
    pair: tuple[MultiheadAttention, nn.MultiheadAttention], self_attention: bool, padded: bool
) -> None:
    ours, theirs = pair
    key, value = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    query = key if self_attention else torch.randn(2, 5, 32)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = padded
    got = ours(query, key, value, ~padding[:, None, None, :] if padded else None)
    expected, _ = theirs(query, key, value, key_padding_mask=padding if padded else None, need_weights=False)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    got.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, atol=1e-4, rtol=1e-4)


def test_starts_within_xaviers_bounds() -> None:
    module = MultiheadAttention(64, 8, dropout=0.1)
    bound = (6 / (64 + 3 * 64)) ** 0.5
    assert 0.9 * bound < module.in_proj_weight.abs().max() <= bound
    assert not module.in_proj_bias.any()
    assert not module.out_proj.bias.any()


def test_drops_weights_in_training_only() -> None:
    torch.manual_seed(0)
    module, x = MultiheadAttention(32, 4, dropout=0.5), torch.randn(1, 6, 32)
    assert not torch.equal(module(x, x, x), module(x, x, x))
    module.eval()
    assert torch.equal(module(x, x, x), module(x, x, x))


def test_heads_must_divide_the_vectors() -> None:
    with pytest.raises(ValueError, match="multiple of num_heads"):
        MultiheadAttention(30, 4, dropout=0.0)
