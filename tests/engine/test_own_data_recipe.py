"""``configs/own_data_pretrained.yaml``, made small: trains from weights of a backbone, and from those of a detector."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import fit_here, make_dataset
from torchvision.models import resnet18

from detr_ray.config import Config, load_config
from detr_ray.engine.checkpoints.store import CheckpointStore
from detr_ray.engine.job import prepare_job

ROOT = Path(__file__).parents[2]
SMALL = (
    "model={backbone: resnet18, hidden_dim: 32, num_heads: 2, dim_feedforward: 64, encoder_layers: 1, num_queries: 8}",
    "model.decoder_layers=2",
    "data.augment={scales: [48], max_size: 64}",
    "eval={size: 48, max_size: 64}",
    "optim.warmup_epochs=0",  # at the beginning of a warmup a step moves next to nothing
    "train={global_batch_size: 4, max_steps: 1, use_gpu: false, launcher: local}",
    "tracking={enabled: false, report: false}",
)


def test_it_trains_from_a_backbone_and_then_from_the_detector(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", num_train=8, num_val=2)
    torch.manual_seed(0)
    torch.save(published := resnet18().state_dict(), tmp_path / "resnet18.pt")

    def configured(*overrides: str) -> Config:
        places = (f"data.root={dataset}", f"run.storage={tmp_path}")
        return load_config(ROOT / "configs" / "own_data_pretrained.yaml", [*SMALL, *places, *overrides])

    first = configured("run.name=first", f"model.backbone_weights={tmp_path / 'resnet18.pt'}")
    begun = prepare_job(first, print).build_detector().model.state_dict()
    assert all(torch.equal(begun[f"backbone.0.body.{name}"], published[name]) for name in ("conv1.weight", "bn1.bias"))
    assert fit_here(first).status == "finished"
    weights, rates = content(tmp_path / "first")
    assert rates["class_embed.0.bias"] > 0
    for name, factor in {
        "backbone.0.body.layer2.0.conv1.weight": 0.1,
        "transformer.encoder.layers.0.self_attn.sampling_offsets.weight": 0.1,
        "transformer.encoder.layers.0.linear1.weight": 1.0,
    }.items():
        assert rates[name] / rates["class_embed.0.bias"] == pytest.approx(factor), name
        assert not torch.equal(weights["model"][name], begun[name]), name
    name = "class_embed.0.bias"
    assert not torch.equal(weights["ema"][name], weights["model"][name]), "the average is another model"

    frozen = ("optim.freeze=[backbone.0.body]", "optim.layer_decay=0.5", f"model.init_from={tmp_path / 'first'}")
    second = configured("run.name=second", *frozen)
    begun = prepare_job(second, print).build_detector().model.state_dict()
    assert all(torch.equal(value, weights["ema"][name]) for name, value in begun.items()), "that which was evaluated"
    assert fit_here(second).status == "finished"
    after, rates = content(tmp_path / "second")
    moved = {name for name, value in after["model"].items() if not torch.equal(value, begun[name])}
    assert "class_embed.0.bias" in moved and not [name for name in moved if name.startswith("backbone.0.body")]
    assert not [name for name in rates if name.startswith("backbone.0.body")]


def content(run: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, float]]:
    """A run's last weights, and the learning rate of each parameter that the optimizer has."""
    store = CheckpointStore(str(run / "checkpoints"))
    latest = store.latest()
    assert latest is not None
    groups = store.load(latest, "training.pt")["optimizer"]["param_groups"]
    return store.load(latest, "model.pt"), {name: group["lr"] for group in groups for name in group["names"]}
