"""Dropout: in each place of the transformer where the original has it, in training alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from observing import observe, small_config
from tiny import make_dataset, tiny_config
from torch.overrides import TorchFunctionMode

from detr_ray.engine.job import prepare_job
from detr_ray.model import build_model


class Draws(TorchFunctionMode):
    """Notes each place where something is dropped: what kind, the last two sides of what it is dropped from, share."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, int, int, float]] = Counter()

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        if function is F.dropout:
            share = named.get("p", arguments[1] if len(arguments) > 1 else 0.5)
            training = named.get("training", arguments[2] if len(arguments) > 2 else True)
            if training and share:
                self.found["values", *arguments[0].shape[-2:], share] += 1
        if function is F.scaled_dot_product_attention:
            share = named.get("dropout_p", arguments[4] if len(arguments) > 4 else 0.0)
            if share:
                self.found["attention", arguments[0].shape[-2], arguments[1].shape[-2], share] += 1
        return function(*arguments, **named)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes", num_train=8, num_val=2, image_size=(48, 48))


@pytest.mark.parametrize("pre_norm", [False, True])
def test_dropout_is_where_the_original_has_it(tmp_path: Path, pre_norm: bool) -> None:
    """A layer drops from attention weights, hidden units, and each branch before it is added to what goes on."""
    overrides = (
        "model.backbone_stride=16",
        "model.encoder_layers=3",
        f"model.pre_norm={pre_norm}",
        "model.dropout=0.25",
    )
    model = build_model(tiny_config(tmp_path, tmp_path, *overrides).model, 5)
    images = torch.zeros(2, 3, 64, 96)
    cells, queries = 4 * 6, 8
    with Draws() as draws:
        model.train()(images)
    assert draws.found == {
        ("attention", cells, cells, 0.25): 3,
        ("values", cells, 64, 0.25): 3,  # hidden units
        ("values", cells, 32, 0.25): 3 * 2,
        ("attention", queries, queries, 0.25): 2,
        ("attention", queries, cells, 0.25): 2,
        ("values", queries, 64, 0.25): 2,
        ("values", queries, 32, 0.25): 2 * 3,
    }
    with Draws() as draws:
        model.eval()(images)
    assert not draws.found


def test_a_run_drops_in_training_and_not_in_validation(dataset: Path, tmp_path: Path) -> None:
    settings = ("model.dropout=0.25", "data.augment.scales=[48]", "data.augment.flip=0", "optim.ema_decay=0.5")
    with Draws() as draws:
        seen = observe(small_config(dataset, tmp_path, *settings, "eval={size: 48, max_size: 48}"))
    assert len(seen.training) == 2 and seen.evaluating
    attention = {key: count for key, count in draws.found.items() if key[0] == "attention"}
    cells = 6 * 6
    assert attention == {
        ("attention", cells, cells, 0.25): 2, ("attention", 6, 6, 0.25): 4, ("attention", 6, cells, 0.25): 4,
    }  # fmt: skip
    assert sum(count for key, count in draws.found.items() if key[0] == "values") == 2 * (3 + 2 * 4)


def test_what_is_dropped_is_drawn_anew_at_each_step(dataset: Path, tmp_path: Path) -> None:
    job = prepare_job(small_config(dataset, tmp_path, "model.dropout=0.5"), lambda line: None)
    model = job.build_detector().model.train()
    images = torch.randn(1, 3, 48, 48)
    outputs = [model(images)["pred_logits"] for _ in range(2)]
    assert not torch.equal(*outputs)
    outputs = [model.eval()(images)["pred_logits"] for _ in range(2)]
    assert torch.equal(*outputs)


def test_frozen_norms_stay_as_loaded_and_batch_norms_follow_the_images(dataset: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    from torchvision.models import resnet18

    weights = resnet18().state_dict()
    for name, value in weights.items():
        if "running_mean" in name:
            value.normal_(std=0.01)
    torch.save(weights, tmp_path / "resnet18.pt")
    for norm in ("frozen", "batch"):
        settings = (f"model.backbone_norm={norm}", f"model.backbone_weights={tmp_path / 'resnet18.pt'}")
        seen = observe(small_config(dataset, tmp_path, *settings, "optim.lr_backbone=1e-3"))
        after = seen.models[0].state_dict()
        prefix = "backbone.0.body."
        names = [name for name in after if ".bn1.running_mean" in name]
        moved = [name for name in names if not torch.equal(after[name], weights[name.removeprefix(prefix)])]
        assert names and (moved == names if norm == "batch" else moved == [])
        stem = not torch.equal(after[f"{prefix}conv1.weight"], weights["conv1.weight"])
        later = not torch.equal(after[f"{prefix}layer2.0.conv1.weight"], weights["layer2.0.conv1.weight"])
        assert later and stem is (norm == "batch"), "with frozen norms the stem does not train"
