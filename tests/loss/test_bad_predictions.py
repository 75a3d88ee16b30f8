from __future__ import annotations

import math

import pytest
import torch
from cases import NUM_CLASSES, criterion_for_case, random_case

from detr_ray.loss import NonFiniteOutputs, SetCriterion


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["logits", "boxes"])
@pytest.mark.parametrize(("image", "layer"), [(0, 2), (1, 2), (2, 0)])
def test_non_finite_predictions_name_image_layer_and_part(value: float, part: str, image: int, layer: int) -> None:
    outputs, targets = random_case([3, 0, 2])  # image 1 has no box, and no cost that could tell
    layers = [*outputs["aux_outputs"], outputs]
    with torch.no_grad():
        layers[layer][f"pred_{part}"][image, 1, 2] = value
    with pytest.raises(NonFiniteOutputs) as raised:
        criterion_for_case()(outputs, targets)
    assert raised.value.image_indices == (image,)
    assert raised.value.layers == (layer,)
    assert raised.value.parts == (part,)
    assert all(word in str(raised.value) for word in (part, f"[{image}]", f"[{layer}]"))


def test_all_bad_images_layers_and_parts_are_named() -> None:
    outputs, targets = random_case([3, 0, 2, 1])
    with torch.no_grad():
        outputs["aux_outputs"][0]["pred_logits"][3] = math.nan
        outputs["pred_boxes"][1] = math.nan
    with pytest.raises(NonFiniteOutputs) as raised:
        criterion_for_case()(outputs, targets)
    assert (raised.value.image_indices, raised.value.layers) == ((1, 3), (0, 2))
    assert raised.value.parts == ("logits", "boxes")


def test_finite_boxes_with_infinite_areas_do_not_pass() -> None:
    outputs, targets = random_case([3, 2])
    with torch.no_grad():
        outputs["aux_outputs"][1]["pred_boxes"][1, 0] = 1e30
    with pytest.raises(NonFiniteOutputs) as raised:
        criterion_for_case()(outputs, targets)
    assert (raised.value.image_indices, raised.value.layers, raised.value.parts) == ((1,), (1,), ("boxes",))


def test_large_logits_are_not_called_non_finite() -> None:
    outputs, targets = random_case([3, 2])
    with torch.no_grad():
        outputs["pred_logits"].mul_(1e6)
    assert all(value.isfinite() for value in criterion_for_case()(outputs, targets).values())


def test_the_matcher_alone_reports_them_too() -> None:
    outputs, targets = random_case([3, 0], num_layers=1)
    with torch.no_grad():
        outputs["pred_logits"][1] = math.nan
    with pytest.raises(NonFiniteOutputs, match="logits"):
        criterion_for_case().matcher(outputs, targets)


@pytest.fixture
def criterion() -> SetCriterion:
    return criterion_for_case()


@pytest.mark.parametrize("label", [-1, NUM_CLASSES, 90, 2**40])
def test_a_label_out_of_range_names_label_range_and_image(criterion: SetCriterion, label: int) -> None:
    outputs, targets = random_case([3, 2])
    targets[1]["labels"][0] = label
    with pytest.raises(ValueError, match=rf"label {label} of image 1 .*0\.\.{NUM_CLASSES - 1}.*label map"):
        criterion(outputs, targets)


def test_the_data_is_blamed_before_the_model(criterion: SetCriterion) -> None:
    outputs, targets = random_case([3, 2])
    targets[0]["boxes"][1, 2] = math.nan
    with torch.no_grad():
        outputs["pred_logits"][1] = math.nan
    with pytest.raises(ValueError, match=r"target boxes of image\(s\) \[0\]"):
        criterion(outputs, targets)


def test_shapes_that_do_not_fit_are_named(criterion: SetCriterion) -> None:
    outputs, targets = random_case([3, 2])
    with pytest.raises(ValueError, match="predictions for 2 images, but targets for 1"):
        criterion(outputs, targets[:1])
    with pytest.raises(ValueError, match="at least one image"):
        criterion(outputs, [])
    with pytest.raises(ValueError, match=r"image 1 .*\[1\] and \[2, 4\]"):
        criterion(outputs, [targets[0], {"labels": targets[1]["labels"][:1], "boxes": targets[1]["boxes"]}])
    with pytest.raises(ValueError, match=rf"{NUM_CLASSES} logits a query.*{NUM_CLASSES + 1} for {NUM_CLASSES} classes"):
        criterion({key: outputs[key][..., :NUM_CLASSES] for key in ("pred_logits", "pred_boxes")}, targets)
