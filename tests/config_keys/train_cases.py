"""Keys of the section `train` that mean something in a single process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from config_keys.registry import Place, shows
from scripted_scores import script_scores

from detr_ray.config import ConfigError
from detr_ray.engine import loop
from detr_ray.engine.errors import RunFailed
from detr_ray.model.transformer import EncoderLayer
from detr_ray.runtime.launch import fit


@shows("train.epochs")
def epochs(place: Place) -> None:
    seen = place.train("train.epochs=2")
    assert len(seen.updates) == 8 and seen.metric("train/epoch")[-1] == 2


@shows("train.global_batch_size")
def global_batch_size(place: Place) -> None:
    seen = place.train("train.global_batch_size=8")
    assert [len(forward.images) for forward in seen.training] == [8, 8]


@shows("train.micro_batch_size")
def micro_batch_size(place: Place) -> None:
    seen = place.train("train.micro_batch_size=2", stop_after=2)
    assert [len(forward.images) for forward in seen.training] == [2, 2, 2, 2] and len(seen.updates) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "micro_batch_size", lambda job, context, state: 3)
        seen = place.train("train.micro_batch_size=auto", stop_after=1)
    assert [len(forward.images) for forward in seen.training] == [2, 2]


@shows("train.precision")
def precision(place: Place) -> None:
    """In validation: ``tests/seams/test_what_is_evaluated.py``."""
    kinds = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    for name, dtype in kinds.items():
        seen = place.train(f"train.precision={name}", "train.use_gpu=null", stop_after=1)
        assert [forward.autocast for forward in seen.training] == [dtype]
        assert (seen.checkpoint()[2]["scaler"] != {}) is (name == "fp16")


@shows("train.launcher")
def launcher(place: Place) -> None:
    """`local`: in this process, without a Ray. `ray` is what ``tests/runtime`` does all the time."""
    import ray

    was_there = ray.is_initialized()
    result = fit(place.config("train.max_steps=1", "run.name=a", "train.launcher=local"))
    assert result.step == 1 and ray.is_initialized() == was_there
    assert not (place.folder / "runs" / "a" / "ray").exists(), "where Ray Train keeps what it keeps"


@shows("train.use_gpu")
def use_gpu(place: Place) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match=r"train\.use_gpu: true"):
        fit(place.config("train.use_gpu=true"))
    assert fit(place.config("train.use_gpu=null", "train.max_steps=1")).step == 1


@shows("train.checkpoint_every_steps")
def checkpoint_every_steps(place: Place) -> None:
    every = place.train("train.checkpoint_every_steps=1", "train.keep_last=9")
    assert [info.step for info in every.store.checkpoints()] == [1, 2, 3, 4]
    assert [info.step for info in place.train().store.checkpoints()] == [4]


@shows("train.keep_last")
def keep_last(place: Place) -> None:
    """When a checkpoint is written, and when the numbers of a validation are there."""
    every = "train.checkpoint_every_steps=1"
    assert len(place.train(every, "train.keep_last=1", stop_after=3).store.checkpoints()) == 1
    assert len(place.train_and_validate(every, "train.keep_last=3").store.checkpoints()) == 3


@shows("train.log_every_steps")
def log_every_steps(place: Place) -> None:
    seen = place.train("train.log_every_steps=3")
    assert [step for step, _ in seen.tracker.history("train/loss")] == [1, 3, 4]


@shows("train.compile")
def compile_model(place: Place) -> None:
    """What is compiled is what trains. A real compilation, which takes a minute, is a slow test of the loop."""
    compiled = []

    def note(model: torch.nn.Module, **options: object) -> torch.nn.Module:
        compiled.append((model, options))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", note)
        seen = place.train("train.compile=true", stop_after=1)
        place.train(stop_after=1)
    assert [model for model, _ in compiled] == [seen.models[0]] and compiled[0][1] == {"dynamic": False}


@shows("train.recompute_encoder")
def recompute_encoder(place: Place) -> None:
    """The encoder's layers run a second time in the backward pass."""
    runs: dict[str, int] = {}
    for value in ("false", "true"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EncoderLayer, "forward", counting(EncoderLayer.forward, runs, value))
            place.train(f"train.recompute_encoder={value}", f"run.name={value}", stop_after=1)
    assert runs["true"] == 2 * runs["false"]
    with pytest.raises(ConfigError, match=r"train\.recompute_encoder: must be false with train\.compile"):
        place.config("train.recompute_encoder=true", "train.compile=true")


def counting(forward: Callable[..., Any], runs: dict[str, int], name: str) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        runs[name] = runs.get(name, 0) + 1
        return forward(*arguments)

    return counted


@shows("train.channels_last")
def channels_last(place: Place) -> None:
    """Strides of the images and of the convolutions' weights, in training and in validation."""
    for value in (True, False):
        seen = place.train_and_validate(f"train.channels_last={str(value).lower()}", "train.max_steps=1")
        forwards = [*seen.training, *seen.evaluating]
        formats = {forward.images.is_contiguous(memory_format=torch.channels_last) for forward in forwards}
        assert len(forwards) > 1 and formats == {value}
        weight = seen.models[0].body.get_parameter("layer1.0.conv1.weight")
        assert weight.is_contiguous(memory_format=torch.channels_last) is value


EXPLODING = ("optim.lr=1e18", "optim.lr_backbone=1e18", "optim.clip_max_norm=0", "train.epochs=2")


@shows("train.on_nonfinite")
def on_nonfinite(place: Place) -> None:
    with pytest.raises(RunFailed, match="not finite"):
        place.train(*EXPLODING)
    seen = place.train(*EXPLODING, "train.on_nonfinite=skip")
    assert sum(seen.metric("train/skipped_steps")) == 7, "all but the first"


@shows("train.max_nonfinite_steps")
def max_nonfinite_steps(place: Place) -> None:
    keys = (*EXPLODING, "train.on_nonfinite=skip")
    assert len(place.train(*keys, "train.max_nonfinite_steps=7").training) == 8
    with pytest.raises(RunFailed, match=r"train\.max_nonfinite_steps"):
        place.train(*keys, "train.max_nonfinite_steps=3")


@shows("train.max_steps")
def max_steps(place: Place) -> None:
    """It ends early, and schedules follow the epochs all the same."""
    seen = place.train("train.max_steps=3", "optim.schedule=cosine")
    whole = place.train("optim.schedule=cosine")
    assert len(seen.updates) == 3 and seen.result is not None and seen.result.status == "finished"
    assert [update.rates for update in seen.updates] == [update.rates for update in whole.updates[:3]]


@shows("train.early_stopping.patience", "train.early_stopping.min_delta", "train.early_stopping.metric")
def early_stopping(place: Place) -> None:
    """After so many validations without a better score, the run is finished."""
    for number, (keys, steps) in enumerate(
        [("patience: 1", 8), ("patience: 1, min_delta: 0.05", 4), ("patience: 2, metric: val/AP50", 6)]
    ):
        with pytest.MonkeyPatch.context() as patch:
            script_scores(patch, {"AP": [0.1, 0.12, 0.14, 0.13], "AP50": [0.5, 0.4, 0.5, 0.7]})
            config = (
                f"run.name={number}",
                "train.epochs=5",
                "train.global_batch_size=8",
                f"train.early_stopping={{{keys}}}",
            )
            seen = place.train_and_validate(*config)
        assert seen.result is not None and (seen.result.status, seen.result.step) == ("finished", steps), keys


@shows("train.record_stream")
def record_stream(place: Place) -> None:
    seen = place.train("run.name=a", "train.record_stream=true")
    lines = (place.folder / "runs" / "a" / "stream" / "rank-00000.jsonl").read_text().splitlines()
    for step, line in enumerate(lines):
        samples = seen.samples(step)
        assert json.loads(line) == {
            "step": step, "world_size": 1, "positions": [sample.position for sample in samples],
            "image_ids": [sample.image_id for sample in samples],
        }  # fmt: skip
    assert len(lines) == 4
    place.train("run.name=b", "train.record_stream=false", stop_after=1)
    assert not (place.folder / "runs" / "b" / "stream").exists()
