"""What a trial lived through is replayed by a training alone: the same values at the same steps, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from observing import observe, small_config, without_validation
from recorded import final_weights
from tiny import make_dataset

from detr_ray.config import ConfigError, Schedule, load_config
from detr_ray.config.yaml_format import format_inline, parse_yaml
from detr_ray.search.lived_schedule import Lived, lived_values, schedule_file

VALUES = (
    (0, {"optim.lr": 1e-3, "optim.lr_backbone": 3e-4, "loss.giou": 2, "loss.bbox": 5.0}),
    (3, {"optim.lr": 1e-3 * 1.25, "optim.lr_backbone": 3e-4, "loss.giou": 2.5}),
    (7, {"optim.lr": 1e-3 * 1.25 * 0.8, "loss.giou": 2.5, "loss.bbox": 5.0}),
)


def lived_schedule(lived: Lived, steps_per_epoch: int, header: str = "") -> str:
    return schedule_file(lived_values(lived, steps_per_epoch), header)


def write(folder: Path, text: str) -> Path:
    path = folder / "schedule.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("steps_per_epoch", [3, 7, 49, 750, 7393])
def test_each_value_holds_from_its_step_on(tmp_path: Path, steps_per_epoch: int) -> None:
    lived = [(step * 11, {"optim.lr": value}) for step, value in enumerate((1e-4, 1.25e-4, 0.1 * 3, 1e-5))]
    config = load_config(write(tmp_path, lived_schedule(lived, steps_per_epoch)))
    assert not isinstance(config.optim.lr, float)
    for step in range(60):
        (expected,) = [values["optim.lr"] for first, values in lived if first <= step][-1:]
        assert config.optim.lr.at(step / steps_per_epoch) == expected, step


def test_a_value_that_stayed_is_a_number_and_the_header_a_comment(tmp_path: Path) -> None:
    text = lived_schedule(VALUES, 4, "Lived by t003\n\nsecond line")
    assert text.startswith("# Lived by t003\n#\n# second line\n")
    config = load_config(write(tmp_path, text), ["train.epochs=3"])
    assert config.loss.bbox == 5.0 and config.optim.lr_backbone == 3e-4
    assert not isinstance(config.loss.giou, float)
    assert config.loss.giou.points == ((0, 2), (0.75, 2.5)) and config.loss.giou.interpolation == "constant"


def test_the_file_replaces_what_the_base_says(tmp_path: Path) -> None:
    """A schedule of the base is replaced as a whole, also by one whose interpolation is the default."""
    base = tmp_path / "base.yaml"
    base.write_text("loss: {giou: {points: [[0, 1], [9, 2]], interpolation: cosine}}\noptim: {lr_factors: {a: 0.5}}\n")
    values = {"loss.giou": {"points": [[0, 2], [9, 3]]}, "data.augment.crop": 0.25, "optim.lr_factors": {"b": 0.1}}
    config = load_config([base, write(tmp_path, schedule_file(values))])
    assert config.loss.giou == Schedule(points=((0, 2), (9, 3)))
    assert config.data.augment.crop == 0.25 and config.optim.lr_factors == {"b": 0.1}


@pytest.mark.parametrize(
    ("lived", "message"),
    [
        ([], "begins at step 0"),
        ([(2, {"optim.lr": 1})], "begins at step 0"),
        ([(0, {"optim.lr": 1}), (0, {"optim.lr": 2})], "must ascend"),
        ([(0, {"model.num_queries": 10})], r"model\.num_queries=10 cannot change"),
        ([(0, {"loss.ce": {"points": [[0, 1]]}})], "cannot change"),
        ([(0, {"loss.ce": 1}), (4, {"loss.giou": 1})], r"loss\.giou has no value before step 4"),
    ],
)
def test_what_is_no_life_is_refused(lived: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lived_schedule(lived, 4)


def test_the_replay_has_the_values_of_the_chain_of_runs_also_when_it_is_interrupted(tmp_path: Path) -> None:
    """Three forked runs, each with values of its own, and one run with the schedule, which stops and goes on."""
    data = make_dataset(tmp_path / "data", num_train=16, num_val=4, image_size=(40, 60))
    common = ("train.epochs=3", "optim.schedule=cosine", "train.log_every_steps=1", *without_validation(data))
    chain = []
    values: dict[str, float] = {}
    for number, (start, changed) in enumerate(VALUES):
        values |= changed
        end = (*[step for step, _ in VALUES], 12)[number + 1]
        keys = [f"{key}={value!r}" for key, value in values.items()]
        place = [f"run.fork_from={tmp_path}/runs/g{number - 1}"] if number else []
        config = small_config(data, tmp_path / "runs", *common, *keys, *place, f"run.name=g{number}")
        chain.append(observe(config, stop_after=None if end == 12 else end - start))
    schedule = parse_yaml(lived_schedule(VALUES, 4))
    keys = [f"{name}.{key}={format_inline(value)}" for name, part in schedule.items() for key, value in part.items()]
    config = small_config(data, tmp_path / "runs", *common, *keys, "run.name=replay")
    replay = [observe(config, stop_after=5), observe(config)]
    for metric in ("optim/lr", "optim/lr_backbone", "loss/weight/giou", "loss/weight/bbox", "train/loss"):
        lived, replayed = ([entry for run in runs for entry in run.tracker.history(metric)] for runs in (chain, replay))
        assert [step for step, _ in lived] == list(range(1, 13)), metric
        assert replayed == lived, metric
    ours, theirs = (final_weights(tmp_path / "runs" / name, 12) for name in ("replay", "g2"))
    assert [name for name, value in theirs.items() if not torch.equal(value, ours[name])] == []
    with pytest.raises(ConfigError, match=r"optim\.lr: begun with '\{points"):
        observe(small_config(data, tmp_path / "runs", *common, *keys, "run.name=replay", "optim.lr=1e-3"))
