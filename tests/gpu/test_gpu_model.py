"""The model on a device against the model on the CPU in fp32: outputs, gradients, detections, compiled or not.

Tolerances are shares of the length of all tensors together. CPUs were measured against themselves: 4e-6 in fp32 (with
the channels last), 1.2e-2 in bf16 and 1.7e-3 in fp16 for outputs; 4e-5, 0.1 and 3e-2 for gradients. What is allowed
leaves room for kernels that add up in another order. Without its mask, the batch is off by 4e-2.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from drawn import deviation, draw_batch, draw_model, settings
from torch import Tensor, nn

from detr_ray.detector import postprocess
from detr_ray.detector.inference import AUTOCAST_DTYPES
from detr_ray.engine.training_step.step import compiled
from detr_ray.loss import SoftmaxLoss
from detr_ray.structures import IMAGENET_PIXELS, to_device

PRECISIONS = ["fp32", "bf16", "fp16"]
OF_OUTPUTS = {"fp32": 5e-4, "bf16": 5e-2, "fp16": 1e-2}
OF_GRADIENTS = {"fp32": 5e-3, "bf16": 0.25, "fp16": 0.1}


def outputs_and_gradients(
    model: nn.Module, device: torch.device, precision: str = "fp32", channels_last: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All predictions of a batch, and the gradients of a fixed weighted sum of them.

    The loss would not do here: a matching that falls the other way by a rounding gives other gradients.
    """
    batch = to_device(draw_batch(), device, IMAGENET_PIXELS, channels_last)
    dtype = AUTOCAST_DTYPES[precision]
    with torch.autocast(device.type, dtype) if dtype else nullcontext():
        found = model(batch.images, batch.mask)
    layers = [found, *found["aux_outputs"]]
    outputs = {
        f"{key} {number}": layer[key] for number, layer in enumerate(layers) for key in ("pred_logits", "pred_boxes")
    }
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(value.shape, generator=generator).to(device) for value in outputs.values()]
    sum((value * weight).sum() for value, weight in zip(outputs.values(), weights, strict=True)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return outputs, gradients


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Of the CPU in fp32, by the kind of norm."""
    return {
        norm: outputs_and_gradients(draw_model(settings(f"model.backbone_norm={norm}")), torch.device("cpu"))
        for norm in ("frozen", "batch")
    }


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_outputs_and_gradients_are_those_of_the_cpu(
    placed: tuple[torch.device, str], channels_last: bool, norm: str, expected
) -> None:
    device, precision = placed
    model = draw_model(settings(f"model.backbone_norm={norm}"), device, channels_last)
    outputs, gradients = outputs_and_gradients(model, device, precision, channels_last)
    assert all(value.device.type == device.type for value in (*outputs.values(), *gradients.values()))
    assert deviation(outputs, expected[norm][0]) < OF_OUTPUTS[precision]
    assert deviation(gradients, expected[norm][1]) < OF_GRADIENTS[precision]


@pytest.mark.parametrize("channels_last", [False, True])
def test_feature_maps_lie_in_memory_as_they_are_asked_to(device: torch.device, channels_last: bool) -> None:
    model = draw_model(settings(), device, channels_last)
    batch = to_device(draw_batch(), device, IMAGENET_PIXELS, channels_last)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    with torch.no_grad():
        ((features, _, _),) = model.backbone[0](batch.images, batch.mask)
    assert batch.images.is_contiguous(memory_format=wanted)
    assert features.is_contiguous(memory_format=wanted)


def test_detections_are_those_of_the_cpu(device: torch.device) -> None:
    found = []
    for place in (torch.device("cpu"), device):
        model, batch = draw_model(settings(), place).eval(), to_device(draw_batch(), place, IMAGENET_PIXELS)
        with torch.inference_mode():
            detections = postprocess(
                model(batch.images, batch.mask), batch.orig_sizes.to(place), SoftmaxLoss(model.num_classes)
            )
        found.append(
            {f"{key} {i}": one[key].float() for i, one in enumerate(detections) for key in ("scores", "boxes")}
        )
    assert deviation(found[1], found[0]) < OF_OUTPUTS["fp32"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_compiled_model_gives_the_same(gpu: torch.device, precision: str, expected) -> None:
    pytest.importorskip("triton", reason="torch.compile needs triton on GPUs")
    plain = draw_model(settings(), gpu, channels_last=True)
    model = compiled(plain)
    outputs, _ = outputs_and_gradients(model, gpu, precision, channels_last=True)
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.requires_grad}
    assert deviation(outputs, expected["frozen"][0]) < OF_OUTPUTS[precision]
    assert deviation(gradients, expected["frozen"][1]) < OF_GRADIENTS[precision]
