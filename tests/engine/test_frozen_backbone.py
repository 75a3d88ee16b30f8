"""``optim.lr_backbone=0`` freezes the backbone in the whole loop: weights, statistics, their average, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import fit_here, make_dataset, tiny_config

from detr_ray.config import ConfigError
from detr_ray.engine.checkpoints.store import CheckpointStore
from detr_ray.engine.job import prepare_job
from detr_ray.engine.preflight.storage import checkpoint_bytes
from detr_ray.tracking import MemoryTracker


def test_a_backbone_without_a_rate_stays_as_it_was_begun(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", num_train=16, num_val=4)
    source = fit_here(tiny_config(dataset, tmp_path, "run.name=source", "train.max_steps=1"))
    settings = ("run.name=a", "optim.ema_decay=0.5", f"model.init_from={source.best_checkpoint}/model.pt")
    config = tiny_config(dataset, tmp_path, *settings, "optim.lr_backbone=0")
    first = prepare_job(config, print).build_detector().model.state_dict()
    tracker = MemoryTracker()
    fit_here(config, tracker, stop_after=1)
    fit_here(config, tracker)
    store = CheckpointStore(str(tmp_path / "a" / "checkpoints"))
    latest = store.latest()
    assert latest is not None and latest.step == 4
    model, training = store.load(latest, "model.pt"), store.load(latest, "training.pt")
    for kind in ("model", "ema"):
        moved = {name for name, value in model[kind].items() if not torch.equal(value, first[name])}
        assert moved and not [name for name in moved if name.startswith("backbone.")], kind
    assert training["optimizer"]["param_groups"][1]["params"] == []
    moments = sum(moment["exp_avg"].numel() for moment in training["optimizer"]["state"].values())
    assert moments == sum(value.numel() for name, value in first.items() if not name.startswith("backbone."))
    assert {value for _, value in tracker.history("optim/lr_backbone")} == {0.0}
    classes = len(model["label_map"]["names"])
    trained, frozen = (
        checkpoint_bytes(tiny_config(dataset, tmp_path, *settings, f"optim.lr_backbone={rate}"), classes)[0]
        for rate in (1e-5, 0)
    )
    assert trained - frozen == 8 * sum(
        p.numel()
        for n, p in prepare_job(config, print).build_detector().model.named_parameters()
        if n.startswith("backbone.")
    )
    with pytest.raises(ConfigError, match=r"optim\.lr_backbone: begun with 0"):
        fit_here(tiny_config(dataset, tmp_path, *settings, "optim.lr_backbone=1e-5"))
