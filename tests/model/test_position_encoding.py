"""Position vectors: the original's numbers, and what padding does to them."""

from __future__ import annotations

import math

import pytest
import torch

from detr_ray.model.position_encoding import LEARNED_LIMIT, LearnedPositionEncoding, SinePositionEncoding


def features(height: int, width: int, batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, 3, height, width)


def test_rows_are_scaled_to_one_turn() -> None:
    encoded = SinePositionEncoding(256)(features(34, 25), None)
    first_channel = encoded[0, :, 0, 0]
    angles = torch.atan2(first_channel, encoded[0, :, 0, 1]) % (2 * math.pi)
    assert [round(angle.item(), 4) for angle in (angles[0], angles[16])] == [0.1848, 3.1416]
    assert [round(value.item(), 4) for value in first_channel[:4]] == [0.1837, 0.3612, 0.5264, 0.6737]
    assert first_channel[-1].item() == pytest.approx(math.sin(6.2832), abs=1e-4)


def test_wavelengths_grow_from_one_to_8660() -> None:
    encoded = SinePositionEncoding(256)(features(34, 25), None)[0, 0, 0]
    row_angle = 2 * math.pi / 34
    wavelengths = row_angle / torch.asin(encoded[0:128:2].double())
    assert wavelengths[0].item() == pytest.approx(1.0, rel=1e-5)
    assert wavelengths[1].item() == pytest.approx(1.1548, abs=1e-4)
    assert wavelengths[-1].item() == pytest.approx(8659.64, rel=1e-4)


def test_first_half_speaks_of_the_row_and_second_of_the_column() -> None:
    encoded = SinePositionEncoding(64)(features(5, 7), None)[0]
    assert (encoded[:, 0, :32] == encoded[:, 6, :32]).all()
    assert (encoded[0, :, 32:] == encoded[4, :, 32:]).all()
    assert not torch.equal(encoded[0, 0, :32], encoded[1, 0, :32])
    assert not torch.equal(encoded[0, 0, 32:], encoded[0, 1, 32:])


def test_no_mask_is_a_mask_of_nothing() -> None:
    encoding = SinePositionEncoding(64)
    unmasked = encoding(features(5, 7, batch=2), None)
    masked = encoding(features(5, 7, batch=2), torch.zeros(2, 5, 7, dtype=torch.bool))
    assert unmasked.shape == (1, 5, 7, 64)
    assert torch.equal(unmasked.expand(2, -1, -1, -1), masked)


def test_padding_does_not_move_the_image() -> None:
    encoding = SinePositionEncoding(64)
    mask = torch.ones(1, 8, 9, dtype=torch.bool)
    mask[:, :5, :7] = False
    assert torch.equal(encoding(features(8, 9), mask)[:, :5, :7], encoding(features(5, 7), None))


def test_learned_vectors_are_looked_up_column_first() -> None:
    encoding = LearnedPositionEncoding(8)
    encoded = encoding(features(3, 50), None)
    assert encoded.shape == (1, 3, 50, 8)
    assert torch.equal(encoded[0, 2, 49], torch.cat((encoding.col_embed.weight[49], encoding.row_embed.weight[2])))


@pytest.mark.parametrize("size", [(LEARNED_LIMIT + 1, 4), (4, LEARNED_LIMIT + 1)])
def test_learned_vectors_run_out_with_a_clear_error(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}.*position_embedding=sine"):
        LearnedPositionEncoding(8)(features(*size), None)


def test_odd_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden_dim that 4 divides"):
        SinePositionEncoding(30)
    with pytest.raises(ValueError, match="even hidden_dim"):
        LearnedPositionEncoding(31)
