"""The transformer: padding has no say, layers come out as asked, every parameter learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detr_ray.model.transformer import Transformer


def build(pre_norm: bool = False, encoder_layers: int = 2, dropout: float = 0.0) -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        dim=32,
        num_heads=4,
        dim_feedforward=64,
        encoder_layers=encoder_layers,
        decoder_layers=3,
        dropout=dropout,
        pre_norm=pre_norm,
    )


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 12, 32), torch.randn(2, 12, 32), torch.randn(5, 32)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_without_positions_layers_are_torchs(inputs: tuple[torch.Tensor, ...], pre_norm: bool) -> None:
    cells, objects, _ = inputs
    nowhere, padding = torch.zeros(1, 1, 32), torch.zeros(2, 12, dtype=torch.bool)
    padding[1, 8:] = True
    arguments = {"dropout": 0.0, "batch_first": True, "norm_first": pre_norm}
    transformer = build(pre_norm)
    for name, parameter in transformer.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.1)

    encoder_layer = nn.TransformerEncoderLayer(32, 4, 64, **arguments)
    encoder_layer.load_state_dict(transformer.encoder.layers[0].state_dict(), strict=True)
    got = transformer.encoder.layers[0](cells, nowhere, ~padding[:, None, None, :])
    expected = encoder_layer(cells, src_key_padding_mask=padding)
    torch.testing.assert_close(got[~padding], expected[~padding], atol=1e-5, rtol=1e-5)

    decoder_layer = nn.TransformerDecoderLayer(32, 4, 64, **arguments)
    decoder_layer.load_state_dict(transformer.decoder.layers[0].state_dict(), strict=True)
    got = transformer.decoder.layers[0](objects, nowhere[0], cells, cells, ~padding[:, None, None, :])
    expected = decoder_layer(objects, cells, memory_key_padding_mask=padding)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_padding_has_no_say(inputs: tuple[torch.Tensor, ...], pre_norm: bool) -> None:
    cells, positions, queries = inputs
    transformer = build(pre_norm)
    alone = transformer(cells, positions, None, queries)
    rubbish = torch.full((2, 7, 32), 1e3)
    padding = torch.zeros(2, 19, dtype=torch.bool)
    padding[:, 12:] = True
    padded = transformer(torch.cat((cells, rubbish), 1), torch.cat((positions, rubbish), 1), padding, queries)
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_images_do_not_see_each_other(inputs: tuple[torch.Tensor, ...], pre_norm: bool) -> None:
    cells, positions, queries = inputs
    transformer = build(pre_norm)
    together = transformer(cells, positions, None, queries)
    for image in range(2):
        alone = transformer(cells[image : image + 1], positions[image : image + 1], None, queries)
        torch.testing.assert_close(together[:, image : image + 1], alone, atol=1e-5, rtol=1e-5)


def test_one_set_of_positions_serves_the_whole_batch(inputs: tuple[torch.Tensor, ...]) -> None:
    cells, positions, queries = inputs
    transformer = build()
    shared = transformer(cells, positions[:1], None, queries)
    torch.testing.assert_close(shared, transformer(cells, positions[:1].expand(2, -1, -1), None, queries))


def test_last_layer_alone_is_the_last_of_all(inputs: tuple[torch.Tensor, ...]) -> None:
    transformer = build()
    every = transformer(inputs[0], inputs[1], None, inputs[2])
    last = transformer(inputs[0], inputs[1], None, inputs[2], every_layer=False)
    assert every.shape == (3, 2, 5, 32)
    torch.testing.assert_close(last, every[-1:])


def test_pre_norm_ends_the_encoder_with_a_norm() -> None:
    extra = {name for name, _ in build(pre_norm=True).named_parameters()} - {
        name for name, _ in build(pre_norm=False).named_parameters()
    }
    assert extra == {"encoder.norm.weight", "encoder.norm.bias"}


def test_order_of_cells_matters_only_through_positions(inputs: tuple[torch.Tensor, ...]) -> None:
    cells, positions, queries = inputs
    transformer, order = build(), torch.randperm(12)
    straight = transformer(cells, positions, None, queries)
    torch.testing.assert_close(
        transformer(cells[:, order], positions[:, order], None, queries), straight, atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(transformer(cells[:, order], positions, None, queries), straight, atol=1e-3)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("every_layer", [False, True])
def test_gradient_reaches_everything(inputs: tuple[torch.Tensor, ...], pre_norm: bool, every_layer: bool) -> None:
    transformer = build(pre_norm)
    for name, parameter in transformer.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    out = transformer(inputs[0], inputs[1], None, inputs[2], every_layer=every_layer)
    (out * torch.randn_like(out)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in transformer.named_parameters()}
    assert not [name for name, gradient in gradients.items() if gradient is None]
    # The decoder starts from zeros: what only scales them is reached, by a gradient of zero.
    scales_zeros = "decoder.layers.0.norm1.weight" if pre_norm else "decoder.layers.0.self_attn.in_proj_weight"
    assert [name for name, gradient in gradients.items() if gradient.abs().max() < 1e-6] == [scales_zeros]


def test_matrices_start_by_xaviers_rule() -> None:
    linear1 = build().encoder.layers[0].linear1
    bound = (6 / (32 + 64)) ** 0.5
    assert 0.9 * bound < linear1.weight.abs().max() <= bound


def test_no_encoder_layers_pass_the_cells_through(inputs: tuple[torch.Tensor, ...]) -> None:
    transformer = build(encoder_layers=0)
    assert torch.equal(transformer.encoder(inputs[0], inputs[1], None), inputs[0])


def test_a_decoder_is_needed() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        Transformer(32, 4, 64, encoder_layers=1, decoder_layers=0, dropout=0.0, pre_norm=False)
