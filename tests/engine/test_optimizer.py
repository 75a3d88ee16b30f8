"""Parameter groups, and learning rates against torch's own schedulers."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from detr_ray.config import Schedule
from detr_ray.engine.training_step.optimizer import (
    LearningRates,
    build_optimizer,
    clipped_update,
    learning_rate_factor,
    rates_in_use,
    restore_optimizer,
)
from detr_ray.engine.training_step.parameters import Rate, freeze
from detr_ray.model import build_model
from detr_ray.schedules import Curve, constant


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


def test_flat_cosine_is_a_warmup_a_flat_part_and_torchs_cosine() -> None:
    curve = factor("cosine", warmup_epochs=2, flat_epochs=5, epochs=15, min_lr_factor=0.5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd(), 10, eta_min=0.5)
    assert [curve.at(epoch) for epoch in (1, 2, 4.9)] == pytest.approx([0.5, 1, 1], abs=1e-3)
    assert [curve.at(epoch) for epoch in range(5, 15)] == pytest.approx(torch_rates(cosine, 10))
    assert curve.at(15) == pytest.approx(0.5)
    late = factor("cosine", warmup_epochs=4, flat_epochs=1)
    assert late.at(2) == pytest.approx(0.5, abs=1e-3), "the warm-up is whole"


def test_the_original_drops_after_200_epochs() -> None:
    curve = factor("step", epochs=300)
    assert [curve.at(epoch) for epoch in (0, 199.99, 200, 299)] == pytest.approx([1, 1, 0.1, 0.1])


def small_detector(norm: str = "frozen") -> nn.Module:
    section = SimpleNamespace(
        backbone="resnet18", backbone_norm=norm, backbone_stride=32, dilation=False, position_embedding="learned",
        hidden_dim=32, num_heads=2, dim_feedforward=32, encoder_layers=1, decoder_layers=1, dropout=0.0, pre_norm=False,
        num_queries=3, aux_loss=True,
    )  # fmt: skip
    return build_model(section, 5)  # type: ignore[arg-type]


def test_the_backbone_has_a_rate_of_its_own() -> None:
    model = small_detector()
    optimizer = build_optimizer(model, {"lr": 1e-4, "lr_backbone": 1e-5}, weight_decay=1e-4)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    head, backbone = (sorted(names[id(p)] for p in group["params"]) for group in optimizer.param_groups)
    assert all(name.startswith("backbone.") for name in backbone) and backbone
    assert not any(name.startswith("backbone.") for name in head)
    assert len(head) + len(backbone) == sum(p.requires_grad for p in model.parameters())
    assert not any(".conv1." in name and "layer" not in name for name in backbone), "the stem does not train"
    LearningRates({"lr": 1e-4, "lr_backbone": 1e-5}, constant(0.5)).set(optimizer, 3.0)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-5, 5e-6]


def test_a_rate_may_be_a_schedule_which_the_factor_multiplies() -> None:
    model = small_detector()
    rates: dict[str, Rate] = {"lr": Schedule(points=((1, 4e-4), (3, 2e-4))), "lr_backbone": 1e-5}
    freeze(model, rates)
    optimizer = build_optimizer(model, rates, weight_decay=0)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [4e-4, 1e-5]
    torch.save(optimizer.state_dict(), file := io.BytesIO())
    file.seek(0)
    torch.load(file, weights_only=True)  # a checkpoint holds numbers, not schedules
    found = LearningRates(rates, Curve(((0.0, 1.0), (4.0, 0.5))))
    for epoch, expected in ((0.0, [4e-4, 1e-5]), (2.0, [2.25e-4, 0.75e-5]), (4.0, [1e-4, 0.5e-5])):
        found.set(optimizer, epoch)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)


def test_groups_are_split_by_factor_and_decay_and_hold_each_parameter_once() -> None:
    model = small_detector("batch")
    optimizer = build_optimizer(
        model, {"lr": 1e-3, "lr_backbone": 1e-4}, weight_decay=0.1, lr_factors={"layer4.0": 0.5, "class_embed": 2.0},
        layer_decay=0.5, decay_norms_and_biases=False,
    )  # fmt: skip
    found = {name: group for group in optimizer.param_groups for name in group["names"]}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(name for group in optimizer.param_groups for name in group["names"]) == sorted(trained)
    for group in optimizer.param_groups:
        assert [id(model.get_parameter(name)) for name in group["names"]] == list(map(id, group["params"]))
    expected = {
        "backbone.0.body.layer4.1.conv1.weight": (1e-4, 0.1),
        "backbone.0.body.layer4.0.conv1.weight": (0.5e-4, 0.1),
        "backbone.0.body.layer4.1.bn1.weight": (1e-4, 0.0),
        "backbone.0.body.layer2.0.conv1.weight": (0.25e-4, 0.1),
        "backbone.0.body.bn1.bias": (1e-4 / 16, 0.0),
        "backbone.1.row_embed.weight": (1e-4, 0.1),
        "class_embed.weight": (2e-3, 0.1),
        "class_embed.bias": (2e-3, 0.0),
        "transformer.encoder.layers.0.norm1.weight": (1e-3, 0.0),
        "transformer.encoder.layers.0.self_attn.in_proj_weight": (1e-3, 0.1),
    }
    for name, (rate, decay) in expected.items():
        assert (found[name]["lr"], found[name]["weight_decay"]) == (pytest.approx(rate), decay), name
    assert rates_in_use(optimizer) == {"lr": 1e-3, "lr_backbone": 1e-4}
    LearningRates({"lr": 1e-3, "lr_backbone": 1e-4}, constant(0.5)).set(optimizer, 1.0)
    assert rates_in_use(optimizer) == {"lr": 5e-4, "lr_backbone": 5e-5}
    assert found["class_embed.bias"]["lr"] == pytest.approx(1e-3)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def give_gradient(network: nn.Module, seed: int) -> None:
    images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    network.zero_grad()
    network(images.contiguous(memory_format=torch.channels_last)).square().sum().backward()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("max_norm", [0.1, 1e9, 0.0])
def test_a_clipped_update_is_clipping_and_updating(fused: bool, max_norm: float) -> None:
    ours, torchs = small_network(), small_network()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2, fused=fused)
    expected = torch.optim.AdamW(torchs.parameters(), lr=1e-2, foreach=True)
    for step in range(3):
        give_gradient(ours, step)
        give_gradient(torchs, step)
        norm = clipped_update(optimizer, list(ours.parameters()), max_norm)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(torchs.parameters(), max_norm or float("inf")))
        expected.step()
        for parameter, other in zip(ours.parameters(), torchs.parameters(), strict=True):
            torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(fused: bool, bad: float) -> None:
    network, undisturbed = small_network(), small_network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, fused=fused)
    other = torch.optim.AdamW(undisturbed.parameters(), lr=1e-2, fused=fused)
    for step in (0, 1, 2):
        give_gradient(network, step)
        give_gradient(undisturbed, step)
        if step == 1:
            next(network.parameters()).grad[0, 0, 0, 0] = bad  # type: ignore[index]
            assert not clipped_update(optimizer, list(network.parameters()), 0.1).isfinite()
        else:
            clipped_update(optimizer, list(network.parameters()), 0.1)
            clipped_update(other, list(undisturbed.parameters()), 0.1)
    for parameter, expected in zip(network.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(parameter, expected)
        assert torch.equal(torch.as_tensor(optimizer.state[parameter]["step"]), torch.tensor(2.0))


def test_gradients_and_moments_lie_in_memory_as_their_parameters() -> None:
    """The fused update on CPUs walks through memory without a look at strides: another order mixes weights up."""
    network = small_network()
    give_gradient(network, 0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, fused=True)
    optimizer.step()
    for parameter in network.parameters():
        assert parameter.grad is not None and parameter.grad.stride() == parameter.stride()
        assert optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()
        assert optimizer.state[parameter]["exp_avg_sq"].stride() == parameter.stride()


def in_order(network: nn.Module, channels_last: bool) -> nn.Module:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return network.to(memory_format=layout)  # type: ignore[call-overload]


@pytest.mark.parametrize("was_channels_last", [True, False])
@pytest.mark.parametrize("is_channels_last", [True, False])
def test_restored_moments_belong_to_the_same_weights_in_any_memory_order(
    was_channels_last: bool, is_channels_last: bool
) -> None:
    undisturbed, resumed = small_network(), in_order(small_network(), is_channels_last)
    undisturbed = in_order(undisturbed, was_channels_last)
    first = torch.optim.AdamW(undisturbed.parameters(), lr=1e-2, fused=True)
    for step in range(3):
        give_gradient(undisturbed, step)
        clipped_update(first, list(undisturbed.parameters()), 0.1)
    resumed.load_state_dict(undisturbed.state_dict())
    second = torch.optim.AdamW(resumed.parameters(), lr=1e-2, fused=True)
    restore_optimizer(second, copy.deepcopy(first.state_dict()))
    for parameter in resumed.parameters():
        for name in ("exp_avg", "exp_avg_sq"):
            assert second.state[parameter][name].stride() == parameter.stride()
    before = [parameter.detach().clone() for parameter in undisturbed.parameters()]
    for network, optimizer in ((undisturbed, first), (resumed, second)):
        give_gradient(network, 3)
        clipped_update(optimizer, list(network.parameters()), 0.1)
    for old, expected, found in zip(before, undisturbed.parameters(), resumed.parameters(), strict=True):
        assert float((found - expected).detach().norm()) < 1e-3 * float((expected - old).detach().norm())


def test_restoring_keeps_the_options_that_the_optimizer_was_built_with() -> None:
    network = small_network()
    give_gradient(network, 0)
    earlier = torch.optim.AdamW(network.parameters(), lr=1e-2, foreach=True, weight_decay=0.5)
    earlier.step()
    state = earlier.state_dict()
    del state["param_groups"][0]["amsgrad"]  # an option that came later
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    restore_optimizer(optimizer, state)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["fused"], group["foreach"], group["amsgrad"]) == (1e-3, True, None, False)
    with pytest.raises(ValueError, match="size of optimizer's group"):
        restore_optimizer(torch.optim.AdamW(list(network.parameters())[:2]), state)


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_a_backbone_without_a_rate_takes_no_part(norm: str) -> None:
    model = small_detector(norm)
    earlier = build_optimizer(model, {"lr": 1e-4, "lr_backbone": 0}, weight_decay=1e-4)
    freeze(model, {"lr": 1.0, "lr_backbone": 0.0})
    optimizer = build_optimizer(model, {"lr": 1e-4, "lr_backbone": 0}, weight_decay=1e-4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    output = model(torch.randn(2, 3, 64, 64))
    output["pred_logits"].square().sum().backward()
    assert not [name for name, p in model.named_parameters() if name.startswith("backbone.") and p.grad is not None]
    expected = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(clipped_update(optimizer, list(model.parameters()), 0.1), expected)
    assert not optimizer.param_groups[1]["params"]
    after = model.state_dict()
    moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert moved and not [name for name in moved if name.startswith("backbone.")], "statistics and counters stay too"
    # A checkpoint of a version that kept moments for it all the same.
    for group in earlier.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    earlier.step()
    restore_optimizer(optimizer, earlier.state_dict())
    assert len(optimizer.state) == len(optimizer.param_groups[0]["params"])
