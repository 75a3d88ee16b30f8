"""Keys of DINO alone, seen in what starts its decoder and in its losses."""

from __future__ import annotations

import pytest
from config_keys.registry import Place, shows
from observing import Observed

from detr_ray.config import ConfigError

QUERIES = 9


def trained(place: Place, name: str, *overrides: str) -> Observed:
    keys = ("model.architecture=dino", f"model.denoising_queries={QUERIES}", f"run.name={name}")
    return place.train(*keys, *overrides, stop_after=1)


@shows("model.denoising_queries")
def denoising_queries(place: Place) -> None:
    seen = trained(place, "with")
    most = max(len(target["labels"]) for target in seen.losses[0].targets)
    found = seen.training[0].output["dn_outputs"]
    assert found["groups"] == QUERIES // most and found["pred_boxes"].shape[1] == QUERIES // most * 2 * most
    assert seen.metric("train/loss_bbox_dn")[0] > 0 and seen.metric("train/loss_ce_dn_0")[0] > 0
    without = trained(place, "without", "model.denoising_queries=0")
    assert "dn_outputs" not in without.training[0].output and not without.metric("train/loss_bbox_dn")


@shows("model.denoising_label_noise", "model.denoising_box_noise")
def noise(place: Place) -> None:
    label_noise, box_noise = "model.denoising_label_noise", "model.denoising_box_noise"
    for labels_move, boxes_move in ((1, 0), (0, 1)):
        values = (f"{label_noise}={labels_move}", f"{box_noise}={boxes_move}")
        seen = trained(place, f"noise{labels_move}", *values)
        (queries,) = seen.training[0].more
        for image, target in enumerate(seen.losses[0].targets):
            count = len(target["labels"])
            labels = queries.labels.unflatten(1, (2 * queries.groups, -1))[image, :, :count]
            logits = queries.reference_logits.unflatten(1, (2 * queries.groups, -1))[image, :, :count]
            moved = (logits.sigmoid() - target["boxes"]).abs().amax(-1) > 2e-3
            assert bool(moved.all() if boxes_move else not moved.any())
            changed = labels != target["labels"]
            assert bool(changed.any() if labels_move else not changed.any()) or count == 0
    for key in (label_noise, box_noise):
        with pytest.raises(ConfigError, match=f"{key}: needs model.denoising_queries above 0"):
            place.config("model.architecture=dino", "model.denoising_queries=0", f"{key}=0.3")
