"""What holds for DETR's training holds for the other architectures: workers, accumulation, stops, precision, weights.

Images of one size: group norm looks at padding, as published, so that an image's neighbours in a
batch would matter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import assert_same_weights
from test_workers import run_workers
from tiny import fit_here, make_dataset, tiny_config
from torchvision.models import resnet18

from detr_ray.config import Config
from detr_ray.engine.job import prepare_job
from detr_ray.tracking import MemoryTracker

ARCHITECTURES = {
    "deformable_detr": ("model.architecture=deformable_detr",),
    "deformable_detr with all options": (
        "model.architecture=deformable_detr",
        "model.two_stage=true",
        "model.mixed_query_selection=true",
        "model.look_forward_twice=true",
        "model.one_to_many_queries=6",
        "model.one_to_many_copies=2",
    ),
    "dino": ("model.architecture=dino", "model.denoising_queries=6"),
}
ALL = pytest.mark.parametrize("architecture", ARCHITECTURES)
WITH_ALL_OPTIONS = pytest.mark.parametrize("architecture", ["deformable_detr with all options", "dino"])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one size; some have no box."""
    return make_dataset(
        tmp_path_factory.mktemp("data") / "shapes", num_train=24, image_size=(64, 64), empty_fraction=0.3
    )


def configured(dataset: Path, folder: Path, architecture: str, *overrides: str) -> Config:
    keys = ("data.augment.scales=[64]", "eval.size=64", "model.dropout=0", "model.num_feature_levels=3",
            "model.backbone_stride=16")  # fmt: skip
    return tiny_config(dataset, folder, *keys, *ARCHITECTURES[architecture], *overrides)


@WITH_ALL_OPTIONS
def test_neither_workers_nor_accumulation_change_the_gradient(dataset: Path, tmp_path: Path, architecture: str) -> None:
    """Frozen batch norm, so that an image's features do not depend on the others'."""
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pt")
    frozen = ("model.backbone_norm=frozen", f"model.backbone_weights={tmp_path / 'resnet18.pt'}")
    path = tmp_path / "config.yaml"
    path.write_text(configured(dataset, tmp_path, architecture, *frozen).to_yaml())

    def found(world_size: int, *overrides: str) -> dict[str, Any]:
        return run_workers(path, world_size, tmp_path / f"{world_size}.pt", *overrides, steps=1)

    alone, together = found(1), found(2, "train.micro_batch_size=2")
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert together["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    for gradient, expected in zip(together["gradients"], alone["gradients"], strict=True):
        assert float((gradient - expected).norm() / expected.norm()) < 1e-4


@WITH_ALL_OPTIONS
def test_stopping_and_going_on_is_never_having_stopped(dataset: Path, tmp_path: Path, architecture: str) -> None:
    settings = ("model.dropout=0.1", "optim.ema_decay=0.9", "optim.lr_factors={sampling_offsets: 0.1}")
    fit_here(configured(dataset, tmp_path, architecture, "run.name=straight", *settings))
    config = configured(dataset, tmp_path, architecture, "run.name=stopped", *settings)
    stopped = fit_here(config, stop_after=4)
    assert (stopped.status, stopped.step) == ("stopped", 4)
    assert fit_here(config).status == "finished"
    assert_same_weights(tmp_path / "stopped", tmp_path / "straight", steps=6)


@pytest.mark.parametrize(
    "architecture", ["deformable_detr with all options", pytest.param("dino", marks=pytest.mark.slow)]
)
def test_it_trains_in_bf16_and_is_evaluated(dataset: Path, tmp_path: Path, architecture: str) -> None:
    tracker = MemoryTracker()
    rates = ("optim.lr=1e-3", "optim.lr_backbone=1e-3", "train.epochs=5", "eval.every_epochs=0")
    result = fit_here(configured(dataset, tmp_path, architecture, *rates, "train.precision=bf16"), tracker)
    losses = [value for _, value in tracker.history("train/loss")]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert result.status == "finished" and len(tracker.history("val/AP")) == 1


@ALL
def test_a_run_starts_from_the_weights_of_another_with_other_queries(
    dataset: Path, tmp_path: Path, architecture: str
) -> None:
    fit_here(configured(dataset, tmp_path, architecture, "run.name=first", "train.epochs=1", "eval.every_epochs=0"))
    saved = next((tmp_path / "first" / "checkpoints").glob("*/model.pt"))
    config = configured(dataset, tmp_path, architecture, f"model.init_from={saved}", "model.num_queries=10")
    model = prepare_job(config, lambda line: None).build_detector().model
    weights = torch.load(saved, weights_only=True)["model"]
    for name, value in model.state_dict().items():
        if name not in ("query_embed.weight", "transformer.tgt_embed.weight") and "num_batches" not in name:
            assert torch.equal(value, weights[name]), name
