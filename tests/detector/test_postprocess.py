"""From logits and relative boxes to scores, labels and pixels."""

from __future__ import annotations

import torch

from detr_ray.detector import postprocess
from detr_ray.loss import SoftmaxLoss
from detr_ray.structures import LayerOutput


def test_best_class_that_is_not_no_object() -> None:
    logits = torch.tensor([[[0.0, 2.0, 9.0], [3.0, 1.0, 0.0]]])
    outputs = LayerOutput(pred_logits=logits, pred_boxes=torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.1, 0.2]]]))
    (detections,) = postprocess(outputs, torch.tensor([[480, 640]]), SoftmaxLoss(2))
    assert detections["labels"].tolist() == [1, 0]
    torch.testing.assert_close(
        detections["scores"], torch.stack((logits.softmax(-1)[0, 0, 1], logits.softmax(-1)[0, 1, 0]))
    )
    torch.testing.assert_close(detections["boxes"], torch.tensor([[0.0, 0, 640, 480], [128, 192, 192, 288]]))


def test_each_image_has_its_own_size_and_precision_is_float32() -> None:
    outputs = LayerOutput(
        pred_logits=torch.randn(2, 3, 4, dtype=torch.bfloat16),
        pred_boxes=torch.tensor([0.5, 0.5, 1.0, 1.0], dtype=torch.bfloat16).expand(2, 3, 4),
    )
    first, second = postprocess(outputs, torch.tensor([[10, 20], [30, 40]]), SoftmaxLoss(3))
    assert first["boxes"].tolist() == [[0, 0, 20, 10]] * 3
    assert second["boxes"].tolist() == [[0, 0, 40, 30]] * 3
    assert first["scores"].dtype == first["boxes"].dtype == torch.float32
    assert first["labels"].dtype == torch.int64
