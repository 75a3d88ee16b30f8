"""The resizing that an exported detector does by itself, against that of training and evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detr_ray.data.sample import Instances, Picture, resized_sizes

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
pytest.importorskip("onnx", reason="the extra export is not installed")

from detr_ray.exporting.onnx_resizing import resizing_graph  # noqa: E402


def session(short: int, long: int) -> onnxruntime.InferenceSession:
    model = resizing_graph(short, long, opset=18, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_sizes_are_those_of_the_evaluation_to_the_pixel() -> None:
    random = np.random.default_rng(0)
    for short, long in [(48, 96), (32, 32), (37, 61)]:
        resize = session(short, long)
        shapes = random.integers(1, 130, (60, 2))
        shapes = np.concatenate([shapes, [[48, 48], [48, 50], [1, 1], [1, 129], [129, 1], [96, 48], [61, 37]]])
        for height, width in shapes.tolist():
            resized, size = resize.run(None, {"image": np.zeros((height, width, 3), np.uint8)})
            (expected,) = resized_sizes(np.array([[height, width]]), np.array(short), long)
            assert resized.shape == (1, 3, *expected.tolist()), (height, width, short, long)
            assert size.tolist() == [height, width]


@pytest.mark.parametrize("shape", [(480, 640), (61, 43), (1333, 800), (48, 64)])
def test_pixels_are_those_of_the_evaluation_but_for_rounding(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    resized, _ = session(48, 96).run(None, {"image": image})
    nothing = Instances(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), shape)
    expected = Picture(torch.from_numpy(image), nothing).resize(resized.shape[2:]).pixels.permute(2, 0, 1).numpy()
    assert np.abs(resized[0].astype(int) - expected).max() <= 1
