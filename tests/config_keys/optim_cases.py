"""Keys of the section `optim`, seen in the updates of a run.

All of them together, against plain AdamW: ``tests/seams/test_what_steps_do.py``.
"""

from __future__ import annotations

import pytest
import torch
from config_keys.registry import Place, same_weights, shows

from detr_ray.config import ConfigError


def rates(place: Place, *overrides: str) -> list[float]:
    """Rates of the head at each of the 4 steps of an epoch, relative to the first full one."""
    seen = place.train("optim.lr=1e-3", *overrides)
    return [update.rates[0] / 1e-3 for update in seen.updates]


@shows("optim.lr", "optim.lr_backbone")
def learning_rates(place: Place) -> None:
    """Adam's first update is of the rate's size, whatever the gradient."""
    seen = place.train("optim.lr=3e-3", "optim.lr_backbone=7e-4", "optim.weight_decay=0", stop_after=1)
    moved = {}
    for name, after in seen.models[0].named_parameters():
        moved[name] = float((after - seen.updates[0].weights[name]).abs().max())
    head = max(value for name, value in moved.items() if not name.startswith("backbone."))
    backbone = max(value for name, value in moved.items() if name.startswith("backbone."))
    assert head == pytest.approx(3e-3, rel=0.01) and backbone == pytest.approx(7e-4, rel=0.01)
    scheduled = place.train("optim.lr={points: [[0, 4e-3], [1, 2e-3]]}", "optim.lr_backbone={points: [[0.5, 1e-3]]}")
    assert [update.rates[0] for update in scheduled.updates] == pytest.approx([4e-3, 3.5e-3, 3e-3, 2.5e-3])
    assert {update.rates[-1] for update in scheduled.updates} == {1e-3}
    assert scheduled.metric("optim/lr") == [update.rates[0] for update in scheduled.updates]


@shows("optim.lr_factors")
def lr_factors(place: Place) -> None:
    """The first step moves each weight by its rate; a text that no name has is refused."""
    keys = ("optim.lr=1e-2", "optim.lr_backbone=1e-3", "optim.weight_decay=0")
    seen = place.train(*keys, "optim.lr_factors={bbox_embed: 0.5, layer2: 0.1}", stop_after=1)
    before = seen.updates[0].weights
    moved = {n: float((after - before[n]).abs().max()) for n, after in seen.models[0].named_parameters()}
    assert moved["bbox_embed.layers.0.weight"] == pytest.approx(5e-3, rel=0.01)
    assert moved["class_embed.weight"] == pytest.approx(1e-2, rel=0.01)
    assert moved["backbone.0.body.layer2.0.conv1.weight"] == pytest.approx(1e-4, rel=0.01)
    assert moved["backbone.0.body.layer1.0.conv1.weight"] == pytest.approx(1e-3, rel=0.01)
    with pytest.raises(ConfigError, match="no parameter of this model has a name with bbox_embet"):
        place.job("optim.lr_factors={bbox_embet: 0.5}")


@shows("optim.freeze")
def freeze(place: Place) -> None:
    """Weights and statistics stay; the rest trains. A pattern of nothing is refused with the nearest name."""
    keys = ("optim.lr=1e-2", "optim.lr_backbone=1e-2")
    seen = place.train(*keys, "optim.freeze=[backbone.0.body.layer1, '*.norm2.*']", stop_after=2)
    assert not [n for n in seen.updates[1].gradients if ".layer1." in n or ".norm2." in n]
    begun, (_, saved, training) = place.job(*keys).build_detector().model.state_dict(), seen.checkpoint()
    same = {name for name, value in saved["model"].items() if torch.equal(value, begun[name])}
    assert same == {name for name in begun if ".layer1." in name or ".norm2." in name}
    kept = [name for group in training["optimizer"]["param_groups"] for name in group["names"]]
    assert not same & set(kept)
    with pytest.raises(
        ConfigError, match=r"optim.freeze: .* fits 'transformer.encodr\*'; nearest: transformer.encoder"
    ):
        place.job("optim.freeze=['transformer.encodr*']")


@shows("optim.layer_decay")
def layer_decay(place: Place) -> None:
    """Adam's first update is of the rate's size, which halves from layer to layer, down to the stem."""
    seen = place.train("optim.lr_backbone=8e-3", "optim.weight_decay=0", "optim.layer_decay=0.5", stop_after=1)
    before = seen.updates[0].weights
    moved = {n: float((after - before[n]).abs().max()) for n, after in seen.models[0].named_parameters()}
    found = [moved[f"backbone.0.body.{name}.weight"] for name in ("layer2.1.conv2", "layer1.0.conv1", "conv1")]
    assert found == pytest.approx([8e-3, 4e-3, 2e-3], rel=0.02)
    assert seen.metric("optim/lr_backbone") == [8e-3], "the rate of the last layer is logged"


@shows("optim.weight_decay")
def weight_decay(place: Place) -> None:
    """Decoupled: the rate times the decay is taken off each weight, beside what the gradient does."""
    keys = ("optim.lr=1e-2", "optim.lr_backbone=1e-3", "model.dropout=0")
    plain, decayed = (place.train(*keys, f"optim.weight_decay={decay}", stop_after=1) for decay in (0, 2))
    after, before = dict(decayed.models[0].named_parameters()), decayed.updates[0].weights
    for name, without in plain.models[0].named_parameters():
        rate = 1e-3 if name.startswith("backbone.") else 1e-2
        torch.testing.assert_close(after[name], without - rate * 2 * before[name], rtol=1e-4, atol=1e-6)


@shows("optim.decay_norms_and_biases")
def decay_norms_and_biases(place: Place) -> None:
    """Without a gradient to speak of, what decays shrinks by the rate times the decay, and the rest stays."""
    keys = ("optim.lr=1e-2", "optim.lr_backbone=1e-2", "model.dropout=0", "optim.decay_norms_and_biases=false")
    plain, decayed = (place.train(*keys, f"optim.weight_decay={decay}", stop_after=1) for decay in (0, 2))
    after, before = dict(decayed.models[0].named_parameters()), decayed.updates[0].weights
    for name, without in plain.models[0].named_parameters():
        decay = 0 if name.endswith("bias") or "norm" in name or ".bn" in name or "downsample.1" in name else 2
        torch.testing.assert_close(after[name], without - 1e-2 * decay * before[name], rtol=1e-4, atol=1e-6)


@shows("optim.clip_max_norm")
def clip_max_norm(place: Place) -> None:
    """Seen in the first moments, which are a tenth of the gradient that was applied."""
    for clip in (0.05, 0):
        seen = place.train(f"optim.clip_max_norm={clip}", stop_after=1)
        moments = [state["exp_avg"].flatten() for state in seen.checkpoint(1)[2]["optimizer"]["state"].values()]
        norm = float(torch.cat([value.flatten() for value in seen.updates[0].gradients.values()]).norm())
        assert norm > 0.1
        assert 10 * float(torch.cat(moments).norm()) == pytest.approx(clip or norm, rel=1e-3)
        assert seen.metric("train/grad_norm")[0] == pytest.approx(norm, rel=1e-3), "the norm before clipping is logged"


@shows("optim.schedule")
def schedule(place: Place) -> None:
    drops = ("optim.step_epochs=0.25", "optim.milestones=[0.5]", "optim.gamma=0.5")
    found = {
        kind: rates(place, f"optim.schedule={kind}", *drops) for kind in ("constant", "step", "multistep", "cosine")
    }
    assert found["constant"] == pytest.approx([1, 1, 1, 1])
    assert found["step"] == pytest.approx([1, 0.5, 0.25, 0.125])
    assert found["multistep"] == pytest.approx([1, 1, 0.5, 0.5])
    assert found["cosine"] == pytest.approx([1, 0.8536, 0.5, 0.1464], abs=1e-4)


@shows("optim.step_epochs", "optim.gamma", "optim.milestones")
def drops(place: Place) -> None:
    assert rates(place, "optim.step_epochs=0.5", "optim.gamma=0.2") == pytest.approx([1, 1, 0.2, 0.2])
    several = ("optim.schedule=multistep", "optim.milestones=[0.25, 0.75]")
    assert rates(place, *several) == pytest.approx([1, 0.1, 0.1, 0.01])


@shows("optim.warmup_epochs")
def warmup_epochs(place: Place) -> None:
    assert rates(place, "optim.warmup_epochs=0.5") == pytest.approx([0.001, 0.5005, 1, 1])


@shows("optim.min_lr_factor")
def min_lr_factor(place: Place) -> None:
    found = rates(place, "optim.schedule=cosine", "optim.min_lr_factor=0.4")
    assert found[2] == pytest.approx(0.7) and found[0] == pytest.approx(1)


@shows("optim.flat_epochs")
def flat_epochs(place: Place) -> None:
    assert rates(place, "optim.schedule=cosine", "optim.flat_epochs=0.5") == pytest.approx([1, 1, 1, 0.5])
    for wrong, message in (
        ("optim.schedule=step", "optim.flat_epochs: means nothing for optim.schedule=step"),
        ("optim.schedule=cosine", "optim.flat_epochs: must be less than train.epochs"),
    ):
        with pytest.raises(ConfigError, match=message):
            place.config("optim.flat_epochs=1", wrong)


@shows("optim.ema_decay")
def ema_decay(place: Place) -> None:
    """An average that trails; it is what is evaluated and kept beside the weights."""
    keys = ("optim.lr=1e-2", "optim.lr_backbone=1e-2")
    seen = place.train_and_validate(*keys, "optim.ema_decay=0.5")
    _, model_file, _ = seen.checkpoint()
    assert all(same_weights(forward.weights, model_file["ema"]) for forward in seen.evaluating)
    assert not same_weights(model_file["ema"], model_file["model"])
    without = place.train_and_validate(*keys)
    assert "ema" not in without.checkpoint()[1] and same_weights(without.evaluating[0].weights, without.models[0])
    slow = place.train(*keys, "optim.ema_decay=0.1").checkpoint()[1]
    assert not same_weights(slow["ema"], model_file["ema"])
