"""The trials of a search: what is kept of them, and how they are shown."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from detr_ray.cli import run_command
from detr_ray.config import load_config
from detr_ray.search import Trial, read_trials, write_trials
from detr_ray.search.importance import Importance
from detr_ray.search.tables import final_table, importance_table, short_names, train_command, trial_table
from detr_ray.search.trials import best_trial, trial_name

TRIALS = [
    Trial("t000", {"optim.lr": 1.23456e-4, "optim.schedule": "step"}, "stopped early", "", 2, 8, 0.2, 0.25, 1.0),
    Trial("t001", {"optim.lr": 5e-4, "optim.schedule": "cosine"}, "finished", "", 8, 32, 0.61, 0.61, 8, generation=2),
    Trial("t002", {"optim.lr": 9.0, "optim.schedule": "step"}, "failed", "step 3:\n not finite", 0.5, 2),
    Trial("t003", {"optim.lr": -1.0}, "refused", "optim.lr: must be more than 0"),
]


def test_trials_are_read_as_they_were_written(tmp_path: Path) -> None:
    trials = [*TRIALS, Trial(trial_name(4), {"a.b": [1, None, "x"]}).measured(1.5, 6, 0.25, "max")]
    assert read_trials(str(tmp_path)) == []
    write_trials(str(tmp_path / "search"), trials)
    assert read_trials(str(tmp_path / "search")) == trials
    write_trials(str(tmp_path / "search"), trials[:1])
    assert read_trials(str(tmp_path / "search")) == trials[:1]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 1}', '{"version": 9, "trials": []}',
                                     '{"version": 1, "trials": [{"name": "t000", "state": "odd"}]}'])  # fmt: skip
def test_a_damaged_record_names_its_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "trials.json").write_text(content)
    with pytest.raises(ValueError, match=r"trials\.json: cannot be read as trials"):
        read_trials(str(tmp_path))


def test_measurements_add_up_and_going_back_drops_later_ones() -> None:
    trial = Trial("t000").measured(1, 4, 0.2, "max").measured(2, 8, 0.5, "max").measured(3, 12, 0.4, "max")
    assert (trial.epoch, trial.step, trial.value, trial.best, trial.best_epoch) == (3, 12, 0.4, 0.5, 2)
    back = trial.measured(2, 8, 0.3, "max")
    assert back.history == ((1, 4, 0.2), (2, 8, 0.3)) and (back.best, back.best_epoch) == (0.3, 2)
    assert trial.measured(4, 16, 0.1, "min").best == 0.1


def test_the_best_is_the_first_of_equal_ones() -> None:
    trials = [Trial("a", best=0.2), Trial("b", best=0.4), Trial("c", best=0.4), Trial("d")]
    found = [best_trial(trials, mode) for mode in ("max", "min")]
    assert [trial and trial.name for trial in found] == ["b", "a"]
    assert best_trial([Trial("a")], "max") is None
    assert Trial("a", state="stopped").is_over is False and Trial("a", state="stopped early").is_over is True


def test_the_table_is_sorted_and_names_what_was_searched() -> None:
    assert trial_table(TRIALS, ["optim.lr", "optim.schedule"], "val/AP", "max").splitlines() == [
        "trial    state          epoch  AP      best AP           lr         schedule",
        "t001-g2  finished       8      0.6100  0.6100            0.0005     cosine",
        "t000     stopped early  2      0.2000  0.2500 (epoch 1)  0.0001235  step",
        "t002     failed         0.5                              9          step",
        "t003     refused        0                                -1",
        "4 trials: 1 finished, 1 stopped early, 1 failed, 1 refused",
    ]
    smaller = trial_table(TRIALS, [], "val/AP", "min").splitlines()
    assert [line.split()[0] for line in smaller[1:5]] == ["t000", "t001-g2", "t002", "t003"]
    assert trial_table([], ["optim.lr"], "val/AP", "max").splitlines()[-1] == "no trials yet"
    assert trial_table(TRIALS[:1], [], "val/AP", "max").splitlines()[-1] == f"1 trial: 1 {TRIALS[0].state}"


def test_a_long_table_is_cut_while_the_search_runs_and_whole_at_its_end() -> None:
    trials = [Trial(trial_name(number), state="finished", best=number / 100) for number in range(50)]
    lines = trial_table(trials, [], "val/AP", "max").splitlines()
    assert len(lines) == 23 and lines[1].startswith("t049") and lines[-2] == "... and 30 more"
    assert lines[-1] == "50 trials: 50 finished"
    assert len(final_table(trials, [], "val/AP", "max").splitlines()) == 52
    ended = final_table(TRIALS, ["optim.lr"], "val/AP", "max").splitlines()
    assert ended[-2:] == ["t002 failed: step 3: not finite", "t003 refused: optim.lr: must be more than 0"]


def test_columns_are_short_and_different() -> None:
    assert short_names(["optim.lr", "loss.ce", "factor"]) == ["lr", "ce", "factor"]
    assert short_names(["eval.size", "data.size"]) == ["eval.size", "data.size"]
    assert short_names(["loss.giou.points.1.1", "loss.giou.points.0.1"]) == ["points.1.1", "points.0.1"]
    assert short_names(["a.lr", "b.lr", "lr"]) == ["a.lr", "b.lr", "lr"]


def test_the_command_trains_the_trial_and_nothing_of_the_search(tmp_path: Path) -> None:
    file = tmp_path / "a file.yaml"
    file.write_text("optim: {lr: {points: [[0, 1], [5, 2]], interpolation: cosine}}\ndata: {root: /d}\n")
    values = {"optim.lr": {"points": [[0, 1e-3], [9, 1e-4]]}, "loss.giou": 2.5, "optim.milestones": [5, 7.5]}
    given = ["train.epochs=20", "tune.trials=3", "--tune.space={loss.giou: {uniform: [1, 3]}}", "tune={seed: 4}"]
    command = train_command([str(file)], given, values)
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "detr_ray.train", "--config"] and words[4] == str(file)
    assert not any("tune" in word for word in words[5:])
    configs = []
    assert run_command("train", "", lambda config, arguments: configs.append(config) or 0, words[3:]) == 0
    expected = load_config(None, ["data.root=/d", "train.epochs=20", "loss.giou=2.5", "optim.milestones=[5, 7.5]",
                                  "optim.lr={points: [[0, 1e-3], [9, 1e-4]], interpolation: linear}"])  # fmt: skip
    assert configs == [expected]


def test_importance_that_cannot_be_said_is_not_said() -> None:
    assert importance_table(Importance((), 2)) == "2 trials were compared: too few to say which settings matter."
