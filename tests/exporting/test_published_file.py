"""Weights under the published names: the file loads as a published one does, and gives what the model gives."""

from __future__ import annotations

import io

import pytest
import torch
from exported import DINO, TWO_STAGES, source
from torch import Tensor

from detr_ray.exporting import ExportError, export, published_file
from detr_ray.model import DetectionModel, published_state_dict


@pytest.mark.parametrize("overrides", [TWO_STAGES, DINO])
def test_the_file_has_every_published_name(overrides: tuple[str, ...]) -> None:
    kept: list[bytes] = []
    assert export(source(*overrides), "published", kept.append).difference == 0
    content = torch.load(io.BytesIO(kept[0]), weights_only=True)
    assert content.keys() == {"model"}
    expected = published_state_dict(source(*overrides).model)
    assert content["model"].keys() == expected.keys()
    assert all(torch.equal(content["model"][name], value) for name, value in expected.items())


def test_a_file_of_other_weights_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def otherwise(model: DetectionModel) -> dict[str, Tensor]:
        return {name: value * 1.1 for name, value in published_state_dict(model).items()}

    monkeypatch.setattr(published_file, "published_state_dict", otherwise)
    with pytest.raises(ExportError, match="differs from the model"):
        export(source(), "published", pytest.fail)
