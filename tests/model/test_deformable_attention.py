"""Deformable attention against a loop over points, and the two ways of reading points against each other."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from detr_ray.model.deformable_attention import DeformableAttention, Sampler, sample_bag, sample_grid

SIZES = ((5, 7), (3, 3), (1, 1), (2, 1))
HEADS, CHANNELS, POINTS = 2, 3, 2
BOTH = pytest.mark.parametrize("sampler", [sample_bag, sample_grid])


def random_points(queries: int = 3, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Cells, places within the maps and far outside of them, and weights."""
    generator = torch.Generator().manual_seed(0)
    cells = sum(height * width for height, width in SIZES)
    value = torch.randn(batch, cells, HEADS, CHANNELS, generator=generator, dtype=dtype)
    shape = (batch, queries, HEADS, len(SIZES), POINTS)
    locations = torch.rand(*shape, 2, generator=generator, dtype=dtype) * 1.8 - 0.4
    locations.flatten(0, -2)[::7] = torch.tensor([-3.0, 0.5], dtype=dtype)
    weights = torch.rand(shape, generator=generator, dtype=dtype)
    return value.requires_grad_(), locations.requires_grad_(), weights.requires_grad_()


def cell(value: Tensor, y: int, x: int, height: int, width: int, start: int) -> Tensor:
    inside = 0 <= y < height and 0 <= x < width
    return value[start + y * width + x] if inside else value[0] * 0


def read_one_by_one(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The same as the samplers, a point after the other."""
    batch, queries = locations.shape[:2]
    out = []
    for image, query, head in itertools.product(range(batch), range(queries), range(HEADS)):
        total = value[0, 0, 0] * 0
        start = 0
        for level, (height, width) in enumerate(SIZES):
            for point in range(POINTS):
                x = locations[image, query, head, level, point, 0] * width - 0.5
                y = locations[image, query, head, level, point, 1] * height - 0.5
                left, top = int(x.floor()), int(y.floor())
                cells = value[image, :, head]
                for row, column in itertools.product((top, top + 1), (left, left + 1)):
                    share = (1 - (x - column).abs()) * (1 - (y - row).abs())
                    found = cell(cells, row, column, height, width, start)
                    total = total + weights[image, query, head, level, point] * share * found
            start += height * width
        out.append(total)
    return torch.stack(out).view(batch, queries, HEADS * CHANNELS)


@BOTH
def test_values_and_gradients_are_those_of_a_loop_over_points(sampler: Sampler) -> None:
    inputs = random_points()
    expected = read_one_by_one(*inputs)
    found = sampler(inputs[0], SIZES, *inputs[1:])
    torch.testing.assert_close(found, expected)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    for gradient, wanted in zip(
        torch.autograd.grad((found * direction).sum(), inputs),
        torch.autograd.grad((expected * direction).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(gradient, wanted)


def test_gradients_are_those_of_small_changes() -> None:
    inputs = random_points(queries=1, batch=1)
    assert torch.autograd.gradcheck(lambda *given: sample_bag(given[0], SIZES, *given[1:]), inputs)


@BOTH
def test_half_precision_reads_at_the_same_places(sampler: Sampler) -> None:
    """Values are rounded, places are not: next to each other in bf16, cells of a large map differ by 1."""
    size = (1, 1000)
    value = torch.arange(1000.0).view(1, 1000, 1, 1) % 100
    locations = ((torch.arange(1000) + 0.5) / 1000).view(1, 1000, 1, 1, 1, 1)
    locations = torch.cat((locations, torch.full_like(locations, 0.5)), dim=-1)
    read = sampler(value.bfloat16(), [size], locations, torch.ones(1, 1000, 1, 1, 1))
    assert (read.float()[0, :, 0] - value[0, :, 0, 0]).abs().max() < 0.6


def test_nothing_of_the_size_of_the_samples_is_kept_for_the_backward_pass() -> None:
    value, locations, weights = random_points(queries=50)
    kept = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        sample_bag(value, SIZES, locations, weights)
    samples = weights.numel() * CHANNELS
    assert sum(kept) < 3.5 * weights.numel() + 2 * value.numel()
    assert max(kept) < samples


@pytest.fixture
def attention() -> DeformableAttention:
    torch.manual_seed(0)
    attention = DeformableAttention(HEADS * CHANNELS, HEADS, len(SIZES), POINTS)
    for layer in (attention.sampling_offsets, attention.attention_weights):
        torch.nn.init.normal_(layer.weight)
    return attention


@pytest.mark.parametrize("coordinates", [2, 4])
def test_the_module_reads_where_and_with_which_weights_the_query_says(
    attention: DeformableAttention, coordinates: int
) -> None:
    generator = torch.Generator().manual_seed(2)
    cells = sum(height * width for height, width in SIZES)
    query = torch.randn(1, 4, 6, generator=generator)
    memory = torch.randn(1, cells, 6, generator=generator)
    references = torch.rand(1, 4, len(SIZES), coordinates, generator=generator)
    padding = torch.rand(1, cells, generator=generator) < 0.3

    offsets = attention.sampling_offsets(query).view(1, 4, HEADS, len(SIZES), POINTS, 2)
    units = torch.tensor([(1 / width, 1 / height) for height, width in SIZES])[:, None]
    if coordinates == 4:
        units = references[:, :, None, :, None, 2:] * 0.5 / POINTS
    locations = references[:, :, None, :, None, :2] + offsets * units
    weights = attention.attention_weights(query).view(1, 4, HEADS, -1).softmax(-1).view(offsets.shape[:-1])
    value = attention.value_proj(memory)
    value[padding] = 0
    read = read_one_by_one(value.view(1, cells, HEADS, CHANNELS), locations, weights)
    torch.testing.assert_close(
        attention(query, references, memory, SIZES, padding), attention.output_proj(read), rtol=1e-4, atol=1e-5
    )


def test_places_stay_exact_under_autocast(attention: DeformableAttention) -> None:
    seen: list[Tensor] = []

    def look(value: Tensor, sizes: object, locations: Tensor, weights: Tensor) -> Tensor:
        seen.extend((value, locations, weights))
        return sample_bag(value, SIZES, locations, weights)

    attention.sampler = look
    cells = sum(height * width for height, width in SIZES)
    query, memory = torch.randn(1, 3, 6), torch.randn(1, cells, 6)
    references = torch.rand(1, 3, len(SIZES), 2)
    attention(query, references, memory, SIZES, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention(query, references, memory, SIZES, None).float().sum().backward()
    assert seen[3].dtype is torch.bfloat16
    assert torch.equal(seen[1], seen[4]) and torch.equal(seen[2], seen[5])


def test_at_first_each_head_looks_along_a_ray_with_equal_weights() -> None:
    attention = DeformableAttention(256, 8, 2, 4)
    offsets = attention.sampling_offsets.bias.view(8, 2, 4, 2)
    assert torch.equal(offsets[:, 0], offsets[:, 1])
    torch.testing.assert_close(offsets[0, 0], torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]))
    torch.testing.assert_close(offsets[1, 0, 2], torch.tensor([3.0, 3.0]))
    torch.testing.assert_close(offsets[6, 0, 3], torch.tensor([0.0, -4.0]), atol=1e-5, rtol=0)
    for layer in (attention.attention_weights, attention.sampling_offsets):
        assert not layer.weight.any()
    assert not attention.attention_weights.bias.any()


def test_maps_seen_in_inference_can_be_trained_on_afterwards(attention: DeformableAttention) -> None:
    sizes = ((4, 4), (2, 3), (1, 2), (1, 3))
    arguments = (torch.randn(1, 3, 6), torch.rand(1, 3, 4, 2), torch.randn(1, 27, 6), sizes, None)
    with torch.inference_mode():
        attention(*arguments)
    attention(*arguments).sum().backward()


@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_places_that_are_no_numbers_are_not_read_from_foreign_memory(heads: int, value: float) -> None:
    """They reach the loss as NaN, or count as outside of the maps."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(1, sum(height * width for height, width in SIZES), heads, 8, generator=generator)
    locations = torch.rand(1, 2, heads, len(SIZES), POINTS, 2, generator=generator)
    weights = torch.rand(1, 2, heads, len(SIZES), POINTS, generator=generator)
    locations[0, 0] = value
    inputs = [part.requires_grad_() for part in (cells, locations, weights)]
    read = sample_bag(inputs[0], SIZES, inputs[1], inputs[2])
    read.sum().backward()
    assert bool(read[0, 0].isnan().all() if value != value else not read[0, 0].any())
    assert bool(read[0, 1].isfinite().all() and read[0, 1].any())
