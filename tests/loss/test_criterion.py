from __future__ import annotations

import pytest
import torch
from cases import NUM_CLASSES, criterion_for_case, leaves, random_case
from plain_criterion import plain_losses, plain_total
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from detr_ray.structures import LayerOutput, ModelOutput, Target

CASES = [[3, 0, 2], [5, 6, 1], [0, 0], [1], [8, 0], [4, 4, 4, 4]]


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            got[key], value, rtol=tolerance, atol=tolerance, msg=lambda text, k=key: f"{k}: {text}"
        )


@pytest.mark.parametrize("counts", CASES, ids=str)
@pytest.mark.parametrize("num_layers", [1, 3])
def test_values_and_gradients_equal_the_plain_criterion(counts: list[int], num_layers: int) -> None:
    outputs, targets = random_case(counts, num_queries=5, num_layers=num_layers, seed=len(counts))
    criterion = criterion_for_case()
    losses = criterion(outputs, targets)
    expected = plain_losses(outputs, targets)
    assert_close(losses, expected)
    total, expected_total = criterion.total(losses), plain_total(expected)
    torch.testing.assert_close(total, expected_total, rtol=1e-5, atol=1e-5)

    found = torch.autograd.grad(total, leaves(outputs))
    wanted = torch.autograd.grad(expected_total, leaves(outputs), materialize_grads=True)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_six_layers_give_25_values_of_which_18_are_weighted() -> None:
    outputs, targets = random_case([3, 2], num_layers=6)
    criterion = criterion_for_case()
    losses = criterion(outputs, targets)
    assert len(losses) == 25
    assert len(criterion.weights) == 18
    assert criterion.weights.keys() < losses.keys()
    assert all(value.ndim == 0 and value.dtype == torch.float32 for value in losses.values())
    assert {key for key in losses if key not in criterion.weights} == {
        "class_error",
        "cardinality_error",
        *(f"cardinality_error_{layer}" for layer in range(5)),
    }
    weighted = torch.stack([criterion.weights[key] * losses[key] for key in criterion.weights]).sum()
    torch.testing.assert_close(criterion.total(losses), weighted)
    assert {key for key, value in losses.items() if value.requires_grad} == criterion.weights.keys()


@pytest.mark.parametrize(("num_layers", "names"), [(1, 3), (2, 6), (8, 24)])
def test_the_weights_name_the_layers_of_the_last_call(num_layers: int, names: int) -> None:
    outputs, targets = random_case([2], num_layers=num_layers)
    criterion = criterion_for_case()
    losses = criterion(outputs, targets)
    assert criterion.weights.keys() == {key for key in losses if key.startswith("loss_")}
    assert len(criterion.weights) == names


@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_with_given_normalisers_add_up_to_the_whole_batch(as_tensor: bool) -> None:
    counts = [3, 0, 7, 1, 0, 2]
    outputs, targets = random_case(counts, num_queries=5)
    criterion = criterion_for_case()
    whole = criterion(outputs, targets)
    whole_gradients = torch.autograd.grad(criterion.total(whole), leaves(outputs))

    parts = [slice(0, 1), slice(1, 2), slice(2, 5), slice(5, 6)]
    norms = [criterion.normalisers(counts[part]) for part in parts]
    num_boxes, weight_sum = (sum(values) for values in zip(*norms, strict=True))
    if as_tensor:
        num_boxes, weight_sum = torch.tensor(num_boxes), torch.tensor(weight_sum)
    added: dict[str, Tensor] = {}
    for part in parts:
        layers = [
            LayerOutput(pred_logits=layer["pred_logits"][part], pred_boxes=layer["pred_boxes"][part])
            for layer in [*outputs["aux_outputs"], outputs]
        ]
        micro = ModelOutput(**layers[-1], aux_outputs=layers[:-1])
        losses = criterion(micro, targets[part], (num_boxes, weight_sum))
        added = {key: added.get(key, 0.0) + losses[key] for key in criterion.weights}
    assert_close(added, {key: whole[key] for key in added})
    for got, want in zip(torch.autograd.grad(criterion.total(added), leaves(outputs)), whole_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_normalisers_count_boxes_and_class_weights() -> None:
    criterion = criterion_for_case(eos_coef=0.25)
    assert criterion.normalisers([2, 0, 9]) == (11.0, 7 + 0.25 * 8)
    assert criterion.normalisers([]) == (0.0, 0.0)


@pytest.mark.parametrize("counts", [[0, 0], [0, 3]], ids=str)
def test_images_without_boxes_send_gradients_to_every_parameter(counts: list[int]) -> None:
    _, targets = random_case(counts)
    heads = nn.ModuleDict({"logits": nn.Linear(6, NUM_CLASSES + 1), "boxes": nn.Linear(6, 4)})
    features = torch.randn(3, len(counts), 5, 6, generator=torch.Generator().manual_seed(3))
    layers = [LayerOutput(pred_logits=heads["logits"](x), pred_boxes=heads["boxes"](x).sigmoid()) for x in features]
    criterion = criterion_for_case()
    losses = criterion(ModelOutput(**layers[-1], aux_outputs=layers[:-1]), targets)
    criterion.total(losses).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in heads.parameters())
    assert heads["logits"].weight.grad.abs().sum() > 0
    assert bool(heads["boxes"].weight.grad.any()) == any(counts)
    if not any(counts):
        assert losses["loss_bbox"] == losses["loss_giou_1"] == 0
        assert losses["class_error"] == 100


@pytest.mark.parametrize("given", [None, (0.0, 0.0), (torch.tensor(0.0), torch.tensor(0.0))])
def test_no_boxes_and_no_weight_for_no_object_is_a_loss_of_zero(given: tuple[float, float] | None) -> None:
    outputs, targets = random_case([0, 0])
    criterion = criterion_for_case(eos_coef=0)
    total = criterion.total(criterion(outputs, targets, given))
    assert total == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(total, leaves(outputs)))


def test_more_boxes_than_queries_match_as_many_as_there_are_queries() -> None:
    outputs, targets = random_case([9], num_queries=4)
    criterion = criterion_for_case()
    losses = criterion(outputs, targets)
    (queries, boxes), *_ = criterion.matcher(outputs, targets)
    assert queries.tolist() == [0, 1, 2, 3]
    distance = (outputs["pred_boxes"][0, queries] - targets[0]["boxes"][boxes]).abs().sum() / 9
    torch.testing.assert_close(losses["loss_bbox"], distance)


def test_the_order_of_the_queries_does_not_matter() -> None:
    outputs, targets = random_case([3, 0, 5], num_queries=6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    layers = [
        LayerOutput(pred_logits=layer["pred_logits"][:, order], pred_boxes=layer["pred_boxes"][:, order])
        for layer in [*outputs["aux_outputs"], outputs]
    ]
    criterion = criterion_for_case()
    shuffled = criterion(ModelOutput(**layers[-1], aux_outputs=layers[:-1]), targets)
    assert_close(shuffled, criterion(outputs, targets))


def test_class_and_cardinality_errors_count_by_hand() -> None:
    boxes = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1], [0.5, 0.5, 0.1, 0.1], [0.2, 0.8, 0.1, 0.1]])
    logits = torch.zeros(2, 4, NUM_CLASSES + 1)
    for image, said in enumerate([[1, 6, NUM_CLASSES, NUM_CLASSES], [0, 1, 2, 3]]):
        logits[image, range(4), said] = 4.0
    targets = [
        Target(labels=torch.tensor([1, 2, 3]), boxes=boxes[:3]),  # the 1st is right, the 2nd wrong, the 3rd missed
        Target(labels=torch.tensor([], dtype=torch.int64), boxes=torch.zeros(0, 4)),
    ]
    losses = criterion_for_case()(ModelOutput(pred_logits=logits, pred_boxes=boxes.expand(2, 4, 4)), targets)
    assert losses["class_error"] == pytest.approx(100 * 2 / 3)
    assert losses["cardinality_error"] == pytest.approx((1 + 4) / 2)


def test_autocast_and_half_precision_outputs_give_float32_losses() -> None:
    outputs, targets = random_case([3, 2])
    half = [
        LayerOutput(pred_logits=layer["pred_logits"].bfloat16(), pred_boxes=layer["pred_boxes"].bfloat16())
        for layer in [*outputs["aux_outputs"], outputs]
    ]
    widened = [LayerOutput(**{key: value.float() for key, value in layer.items()}) for layer in half]
    criterion = criterion_for_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = criterion(ModelOutput(**half[-1], aux_outputs=half[:-1]), targets)
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert_close(losses, criterion(ModelOutput(**widened[-1], aux_outputs=widened[:-1]), targets), tolerance=0)


class _Transfers(TorchFunctionMode):
    """Counts the calls that bring numbers to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = getattr(func, "__name__", "")
        if name in ("cpu", "item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "equal"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class _WaitingKernels(TorchDispatchMode):
    """Collects the kernels that make a device wait for the host, wherever they are called from."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        bool_index = "index" in func.__name__ and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for arg in args
            if isinstance(arg, list | tuple)
            for index in arg
        )
        if bool_index or any(name in func.__name__ for name in ("_local_scalar_dense", "nonzero", "masked_select")):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_the_host_is_waited_for_once_whatever_the_number_of_layers_and_images() -> None:
    outputs, targets = random_case([3, 0, 5, 1], num_layers=6)
    criterion = criterion_for_case()
    norms = torch.tensor(9.0), torch.tensor(12.0)
    with _Transfers() as transfers, _WaitingKernels() as kernels:
        criterion.total(criterion(outputs, targets, norms)).backward()
    assert transfers.seen == ["cpu"]
    assert kernels.seen == []
