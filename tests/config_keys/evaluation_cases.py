"""Keys of the section `eval`, seen in the images that a model is evaluated on and in what is kept of it."""

from __future__ import annotations

import pytest
from config_keys.registry import Place, shows
from tiny import make_dataset

from detr_ray.config import ConfigError
from detr_ray.runtime.launch import evaluate


@shows("eval.every_epochs")
def every_epochs(place: Place) -> None:
    steps = {}
    for every in (0, 1, 2):
        seen = place.train_and_validate("train.epochs=3", "train.max_steps=12", f"eval.every_epochs={every}")
        steps[every] = [step for step, _ in seen.tracker.history("val/seconds")]
    assert steps == {0: [12], 1: [4, 8, 12], 2: [8, 12]}


@shows("eval.size", "eval.max_size")
def sizes(place: Place) -> None:
    """In a run, and by the command."""
    seen = place.train_and_validate("run.name=a", "eval={size: 52, max_size: 61}", "train.max_steps=1")
    shapes = [forward.images.shape[2:] for forward in seen.evaluating]
    assert shapes and all(min(shape) == 52 or 60 <= max(shape) <= 61 for shape in shapes)
    assert any(min(shape) == 52 for shape in shapes) and any(max(shape) >= 60 for shape in shapes)
    planned = place.job("eval={size: 44, max_size: 300}").data.plan(1, 0).evaluation
    assert {min(sample.size) for batch in planned for sample in batch} == {44}


@shows("eval.batch_size")
def batch_size(place: Place) -> None:
    """Images of one size share a batch, up to so many."""
    data = make_dataset(place.folder / "equal", num_train=4, num_val=6, image_size=(48, 48))
    for most, expected in {1: [1] * 6, 4: [4, 2]}.items():
        seen = place.train_and_validate(f"data.root={data}", f"eval.batch_size={most}", "train.max_steps=1")
        assert [len(forward.images) for forward in seen.evaluating] == expected


@shows("eval.checkpoint")
def checkpoint(place: Place) -> None:
    seen = place.train("run.name=a", "optim.lr=1e-2", "train.checkpoint_every_steps=2")
    for given in ("a", "a/checkpoints/step_00000002", "a/checkpoints/step_00000002/model.pt"):
        result = evaluate(place.config(f"eval.checkpoint={place.folder}/runs/{given}"))
        steps = 4 if given == "a" else 2
        assert result.checkpoint == f"{seen.store.checkpoints()[steps // 2 - 1].path}/model.pt"
    with pytest.raises(ConfigError, match=r"eval\.checkpoint"):
        evaluate(place.config())


@shows("eval.max_detections")
def max_detections(place: Place) -> None:
    place.train("run.name=a", "train.max_steps=1")
    found = evaluate(place.config(f"eval.checkpoint={place.folder}/runs/a", "eval.max_detections=3"))
    assert len(found.detections.scores) == 4 * 3
