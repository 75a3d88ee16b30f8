"""ONNX files: what they give in onnxruntime, what they say of themselves, and when they are not kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import DEFORMABLE, DINO, NAMES, TWO_STAGES, UNREFINED, source
from torch import Tensor, nn

from detr_ray.config import ConfigError
from detr_ray.exporting import ExportError, export, onnx_file
from detr_ray.exporting.onnx_file import write_batch_onnx, write_image_onnx

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
onnx = pytest.importorskip("onnx", reason="the extra export is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "batches.onnx"
    agreement = write_batch_onnx(source(), path)
    assert 0 < agreement.difference < 1e-5
    assert agreement.tried == "1x64x85, 1x80x64, 3x64x85, 3x80x64"
    return path


def test_sizes_are_open(batches: Path) -> None:
    """Those of the check, and others: a single cell, many images, no padding."""
    session = onnxruntime.InferenceSession(str(batches), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["images", "mask"]
    assert [one.name for one in session.get_outputs()] == ["pred_logits", "pred_boxes"]
    model = source().model
    for shape in [(1, 16, 16), (5, 48, 130), (2, 200, 33)]:
        images, mask = torch.randn(shape[0], 3, *shape[1:]), torch.zeros(shape, dtype=torch.bool)
        with torch.no_grad():
            expected = model(images, mask)
        logits, boxes = session.run(None, {"images": images.numpy(), "mask": mask.numpy()})
        np.testing.assert_allclose(logits, expected["pred_logits"], atol=1e-4)
        np.testing.assert_allclose(boxes, expected["pred_boxes"], atol=1e-5)


def test_the_file_says_what_it_is(batches: Path) -> None:
    session = onnxruntime.InferenceSession(str(batches), providers=["CPUExecutionProvider"])
    said = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert said["names"] == list(NAMES) and said["category_ids"] == [7, 9, None]
    assert (said["size"], said["max_size"], said["scores"]) == (64, 100, "softmax")
    assert np.allclose(said["mean"], [0.485, 0.456, 0.406]) and np.allclose(said["std"], [0.229, 0.224, 0.225])
    assert (said["source"], said["step"], said["weights_sha256"]) == ("a test", 5, "c0ffee")
    assert said["architecture"] == "detr" and said["detr_ray"]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), DEFORMABLE, TWO_STAGES, DINO])
def test_one_plain_image(overrides: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "image.onnx"
    write_image_onnx(source(*overrides), path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[2]) == ("image", "tensor(uint8)", 3)
    image = np.random.default_rng(0).integers(0, 256, (90, 200, 3), np.uint8)
    boxes, scores, labels = session.run(["boxes", "scores", "labels"], {"image": image})
    assert boxes.shape == (len(scores), 4) and labels.dtype == np.int64
    assert (np.diff(scores) <= 0).all() and len(scores) == (10 if overrides else 12)
    assert boxes[:, 2].max() > 100, "in pixels of the image as given"


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [UNREFINED, DEFORMABLE, TWO_STAGES, DINO])
def test_architectures_of_several_maps(overrides: tuple[str, ...], tmp_path: Path) -> None:
    agreement = write_batch_onnx(source(*overrides), tmp_path / "batches.onnx")
    assert agreement.difference < 1e-4


def test_a_file_that_gives_something_else_is_not_kept(monkeypatch: pytest.MonkeyPatch, batches: Path) -> None:
    """Another model's file, as a fault of a converter would leave it."""
    other = onnxruntime.InferenceSession(str(batches), providers=["CPUExecutionProvider"])
    given = source()
    with torch.no_grad():
        given.model.get_parameter("class_embed.bias").add_(torch.tensor([0.0, 0.5, 0.0, 0.0]))
    monkeypatch.setattr(onnx_file, "_converted", lambda *_: onnx.load(str(batches)))
    monkeypatch.setattr(onnx_file, "_session", lambda _: other)
    kept: list[bytes] = []
    with pytest.raises(ExportError, match=r"a test: the exported detr differs from the model by 0\.\d"):
        export(given, "onnx", kept.append)
    assert kept == []


class Undecided(nn.Module):
    """Does what its values say, which no trace can hold."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.pixels = model.pixels

    def forward(self, images: Tensor, mask: Tensor | None = None) -> object:
        return self.model(images if images.sum() > 0 else -images, mask)


def test_what_cannot_be_traced_says_so(tmp_path: Path) -> None:
    given = source()
    with pytest.raises(ExportError, match="detr cannot be traced by torch: "):
        write_batch_onnx(source(model=Undecided(given.model)), tmp_path / "a.onnx")  # type: ignore[arg-type]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(ConfigError, match=r"--to onnx: needs onnxruntime: pip install 'detr_ray\[export\]'"):
        export(source(), "onnx", lambda _: None)
