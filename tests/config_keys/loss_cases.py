"""Keys of the section `loss`, seen in the gradient and in the numbers of a step.

Schedules of all of them, at each step: ``tests/seams/test_what_steps_do.py``.
"""

from __future__ import annotations

import pytest
import torch
from config_keys.registry import Place, shows
from observing import Observed
from plain_loss import plain_losses

NAMES = ("cost_class", "cost_bbox", "cost_giou", "ce", "bbox", "giou", "eos_coef")


def first_step(place: Place, **changes: float) -> Observed:
    """Without clipping, so that gradients keep their size."""
    keys = [f"loss.{name}={value}" for name, value in changes.items()]
    return place.train(*keys, "model.dropout=0", "optim.clip_max_norm=0", stop_after=1)


def gradient(seen: Observed, part: str) -> torch.Tensor:
    found = [value.flatten() for name, value in seen.updates[0].gradients.items() if name.startswith(part)]
    return torch.cat(found)


@shows("loss.ce")
def ce(place: Place) -> None:
    """The classifier's gradient is of the class loss alone."""
    one, three = (gradient(first_step(place, ce=weight), "class_embed") for weight in (1, 3))
    torch.testing.assert_close(three, 3 * one)


@shows("loss.bbox", "loss.giou")
def box_losses(place: Place) -> None:
    """The box head's gradient is the sum of both, each times its weight."""
    bbox, giou, both = (
        gradient(first_step(place, bbox=bbox, giou=giou), "bbox_embed") for bbox, giou in ((1, 0), (0, 1), (2, 3))
    )
    assert float(bbox.norm()) and float(giou.norm())
    torch.testing.assert_close(both, 2 * bbox + 3 * giou, rtol=1e-3, atol=1e-5)


@shows("loss.eos_coef", "loss.cost_class", "loss.cost_bbox", "loss.cost_giou")
def values(place: Place) -> None:
    """Each alone gives another loss, the one that the plain loss gives with it."""
    standard = {"cost_class": 1.0, "cost_bbox": 5.0, "cost_giou": 2.0, "eos_coef": 0.1}
    for name, value in {"cost_class": 500.0, "cost_bbox": 0.0, "cost_giou": 500.0, "eos_coef": 0.7}.items():
        seen = first_step(place, **{name: value})
        now = standard | {name: value}
        loss = seen.losses[0]
        costs = (now["cost_class"], now["cost_bbox"], now["cost_giou"])
        plain = plain_losses(loss.outputs, loss.targets, now["eos_coef"], costs)
        other = plain_losses(loss.outputs, loss.targets, 0.1, (1.0, 5.0, 2.0))
        for key, expected in plain.items():
            assert seen.metric(f"train/{key}")[0] == pytest.approx(float(expected), rel=1e-4), (name, key)
        assert any(abs(float(plain[key] - other[key])) > 1e-3 * float(other[key]) for key in plain), name
