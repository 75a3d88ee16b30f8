"""Parameter groups, and learning rates against torch's own schedulers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from detr_ray.engine.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from detr_ray.model import build_model


def factor(schedule: str, epochs: float = 10, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "step_epochs": 200,
        "milestones": (),
        "gamma": 0.1,
        "warmup_epochs": 0,
        "min_lr_factor": 0,
        **changes,
    }
    return learning_rate_factor(schedule, epochs=epochs, **values)


def torch_rates(scheduler: Any, count: int) -> list[float]:
    rates = []
    for _ in range(count):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def test_step_is_torchs_step_lr() -> None:
    curve = factor("step", epochs=10, step_epochs=3)
    expected = torch_rates(torch.optim.lr_scheduler.StepLR(sgd(), 3), 10)
    assert [curve.at(epoch) for epoch in range(10)] == pytest.approx(expected)


def test_multistep_is_torchs_multi_step_lr() -> None:
    curve = factor("multistep", milestones=(2, 7), gamma=0.5)
    expected = torch_rates(torch.optim.lr_scheduler.MultiStepLR(sgd(), [2, 7], gamma=0.5), 10)
    assert [curve.at(epoch) for epoch in range(10)] == pytest.approx(expected)


def test_cosine_is_torchs_cosine_annealing() -> None:
    curve = factor("cosine")
    expected = torch_rates(torch.optim.lr_scheduler.CosineAnnealingLR(sgd(), 10), 10)
    assert [curve.at(epoch) for epoch in range(10)] == pytest.approx(expected)
    assert curve.at(10) == pytest.approx(0)


def test_warmup_climbs_to_the_full_rate() -> None:
    curve = factor("cosine", warmup_epochs=2, min_lr_factor=0.1)
    rates = [curve.at(epoch / 4) for epoch in range(41)]
    assert rates[0] < 0.01 and rates[4] == pytest.approx(0.5, abs=0.01) and rates[8] == pytest.approx(1)
    assert rates[:9] == sorted(rates[:9]) and rates[8:] == sorted(rates[8:], reverse=True)
    assert rates[40] == pytest.approx(0.1)


def test_the_original_drops_after_200_epochs() -> None:
    curve = factor("step", epochs=300)
    assert [curve.at(epoch) for epoch in (0, 199.99, 200, 299)] == pytest.approx([1, 1, 0.1, 0.1])


def test_the_backbone_has_a_rate_of_its_own() -> None:
    section = SimpleNamespace(
        backbone="resnet18", backbone_norm="frozen", backbone_stride=32, dilation=False, position_embedding="sine",
        hidden_dim=32, num_heads=2, dim_feedforward=32, encoder_layers=1, decoder_layers=1, dropout=0.0, pre_norm=False,
        num_queries=3, aux_loss=True,
    )  # fmt: skip
    model = build_model(section, 5)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, lr=1e-4, lr_backbone=1e-5, weight_decay=1e-4)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    head, backbone = (sorted(names[id(p)] for p in group["params"]) for group in optimizer.param_groups)
    assert all(name.startswith("backbone.") for name in backbone) and backbone
    assert not any(name.startswith("backbone.") for name in head)
    assert len(head) + len(backbone) == sum(p.requires_grad for p in model.parameters())
    assert not any(".conv1." in name and "layer" not in name for name in backbone), "the stem does not train"
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-5, 5e-6]
