"""What the check command says of memory: an estimate from shapes, held against what a real step keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detr_ray.config import Config, load_config
from detr_ray.engine.preflight import memory
from detr_ray.engine.preflight.findings import Report
from detr_ray.engine.preflight.memory import check_memory, step_memory
from detr_ray.model import build_model

CLASSES, BOXES = 6, 3
SMALL = (
    "model={backbone: resnet18, backbone_norm: batch, backbone_weights: none, backbone_stride: 16, hidden_dim: 32}",
    "model={num_heads: 2, dim_feedforward: 32, encoder_layers: 1, decoder_layers: 2, num_queries: 8}",
    "train.use_gpu=false",
)
TWO_STAGE = (
    "model.architecture=deformable_detr", "model.num_feature_levels=3", "model.two_stage=true", "model.dropout=0.1",
    "model.one_to_many_queries=6",
)  # fmt: skip
DINO = ("model.architecture=dino", "model.num_feature_levels=3", "model.denoising_queries=6")


def configured(*overrides: str) -> Config:
    return load_config(None, [*SMALL, *overrides])


def really_kept(config: Config, shape: tuple[int, int, int]) -> int:
    """Bytes that autograd keeps of a real forward pass."""
    model = build_model(config.model, CLASSES).train()
    inputs = memory._inputs(model, shape, BOXES)
    with torch.no_grad():
        inputs[0].normal_()
    kept: dict[int, int] = {}
    alive = []

    def note(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(*inputs)
    for own in (*model.parameters(), *model.buffers(), inputs[0]):
        kept.pop(own.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@pytest.mark.parametrize("overrides", [TWO_STAGE, DINO], ids=["deformable_detr", "dino"])
def test_the_estimate_is_what_a_forward_pass_keeps(overrides: tuple[str, ...]) -> None:
    config, shape = configured(*overrides), (2, 64, 96)
    images = 2 * 3 * 64 * 96 * 4
    found = (step_memory(config, CLASSES, shape, BOXES).batch - images) / memory._BESIDE
    assert found == pytest.approx(really_kept(config, shape), rel=0.03)


def test_weights_gradients_moments_and_the_average_are_counted() -> None:
    weights = 4 * sum(value.numel() for value in build_model(configured().model, CLASSES).state_dict().values())
    plain = step_memory(configured(), CLASSES, (1, 64, 64), 1)
    assert plain.fixed == pytest.approx(4 * weights, rel=0.01)
    averaged = step_memory(configured("optim.ema_decay=0.9", "optim.lr_backbone=0"), CLASSES, (1, 64, 64), 1)
    assert averaged.fixed < 2.5 * weights, "most is the backbone's, which is frozen"
    assert averaged.batch < 0.5 * plain.batch, "and keeps nothing"


@pytest.mark.parametrize("overrides", [(), TWO_STAGE, DINO], ids=["detr", "deformable_detr", "dino"])
def test_an_encoder_that_is_computed_twice_keeps_what_one_layer_does(overrides: tuple[str, ...]) -> None:
    def batch(layers: int, *more: str) -> int:
        config = configured(*overrides, f"model.encoder_layers={layers}", *more)
        return step_memory(config, CLASSES, (2, 64, 96), BOXES).batch

    recompute = "train.recompute_encoder=true"
    assert batch(4, recompute) == pytest.approx(batch(1), rel=0.02) and batch(4, recompute) < 0.97 * batch(4)


def test_a_batch_that_does_not_fit_is_a_warning_with_the_size_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    config, shape = configured(*DINO), (4, 64, 64)
    need = step_memory(config, CLASSES, shape, BOXES)
    monkeypatch.setattr(memory, "step_memory", lambda *arguments: need)

    def said(free: float, *overrides: str) -> tuple[str, str, str]:
        monkeypatch.setattr(memory, "free_bytes", lambda: int(free))
        report = Report()
        check_memory(configured(*DINO, *overrides), CLASSES, shape, BOXES, "training", report)
        (finding,) = report.findings
        return finding.level, finding.message, finding.advice

    level, message, _ = said(need.fixed + need.batch)
    assert level == "ok" and "a step of the largest batch takes about" in message
    level, message, advice = said(need.fixed + 0.6 * need.batch)
    assert level == "warning" and "free" in message
    assert advice == "set train.micro_batch_size to 2 or less, or to auto: results stay the same"
    assert said(need.fixed, "train.micro_batch_size=auto")[0] == "ok"
    assert "train.precision=bf16" in said(need.fixed)[2]
    assert said(0)[0] == "ok", "a system that does not say"
