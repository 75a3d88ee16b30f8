"""Archives of torch.export: they give what the model gives, and say what it is."""

from __future__ import annotations

import io
import json

import pytest
import torch
from exported import DEFORMABLE, DINO, TWO_STAGES, source

from detr_ray.exporting import export
from detr_ray.exporting.torch_archive import METADATA_FILE


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), DEFORMABLE, TWO_STAGES, DINO])
def test_an_archive_is_the_model(overrides: tuple[str, ...]) -> None:
    kept: list[bytes] = []
    agreement = export(source(*overrides), "torch", kept.append)
    assert agreement.difference < 1e-4
    said = {METADATA_FILE: ""}
    program = torch.export.load(io.BytesIO(kept[0]), extra_files=said)
    content = json.loads(said[METADATA_FILE])
    assert content["names"] == ["cat", "dog", None] and content["size"] == 64
    images, mask = torch.randn(2, 3, 48, 130), torch.zeros(2, 48, 130, dtype=torch.bool)
    logits, boxes = program.module()(images, mask)
    with torch.no_grad():
        expected = source(*overrides).model(images, mask)
    torch.testing.assert_close(logits, expected["pred_logits"], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(boxes, expected["pred_boxes"], atol=1e-4, rtol=1e-4)
