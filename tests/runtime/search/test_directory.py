"""The folder of a search: who may begin one, and what may go on with one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from search.spaces import searching

from detr_ray.config import Config, ConfigError, flatten
from detr_ray.engine.checkpoints.run_directory import open_run
from detr_ray.runtime.search.directory import FREE_KEYS, FREE_SETTINGS, SearchDirectory, open_search
from detr_ray.search import Trial, write_trials

RATE = {"optim.lr": {"loguniform": [1e-5, 1e-3]}}
DATA = {"train": "abc", "val": "def"}


def config(folder: Path, *overrides: str, space: dict[str, Any] = RATE, name: str | None = "mine") -> Config:
    named = () if name is None else (f"tune.name={name}",)
    return searching(space, f"run.storage={folder}", *named, *overrides)


def begin(folder: Path, *overrides: str) -> SearchDirectory:
    with open_search(config(folder, *overrides), DATA, resume=False).locked(print) as made:
        return made


def go_on(folder: Path) -> SearchDirectory:
    with open_search(config(folder), DATA, resume=True).locked(print) as found:
        return found


def refused(wanted: Config, *, resume: bool, data: dict[str, str] = DATA) -> str:
    with pytest.raises(ConfigError) as caught, open_search(wanted, data, resume=resume).locked(print):
        pass
    (error,) = caught.value.errors
    assert error.startswith("tune.name: ")
    return error


def test_a_new_search_has_a_record_of_what_is_searched(tmp_path: Path) -> None:
    wanted = config(tmp_path)
    made = open_search(wanted, DATA, resume=False)
    assert not (tmp_path / "mine").exists(), "the cluster may still refuse it"
    with made.locked(print):
        assert (made.name, made.path) == ("mine", str(tmp_path / "mine")) and (tmp_path / "mine" / "logs").is_dir()
    assert made.trials == () and made.population is None
    record = json.loads((tmp_path / "mine" / "search.json").read_text())
    assert record["search_id"] == made.search_id and record["fingerprints"] == DATA and record["created"]
    assert record["config"] == json.loads(json.dumps(flatten(wanted)))


def test_without_a_name_each_search_is_a_new_one(tmp_path: Path) -> None:
    one, other = (open_search(config(tmp_path, name=None), DATA, resume=False) for _ in range(2))
    assert one.name != other.name and one.path != other.path and one.search_id != other.search_id
    assert re.fullmatch(r"search-[\w-]+", one.name)


def test_one_goes_on_with_its_trials_and_its_population(tmp_path: Path) -> None:
    made = begin(tmp_path)
    trials = [Trial("t000", {"optim.lr": 1e-4}, "finished").measured(1, 4, 0.5, "max"), Trial("t001")]
    write_trials(made.path, trials)
    assert go_on(tmp_path) == SearchDirectory("mine", made.path, made.search_id, tuple(trials), None)
    made.write_population({"decided_epoch": 3, "moves": [], "members": {}})
    again = go_on(tmp_path)
    assert again.population == {"decided_epoch": 3, "moves": [], "members": {}} and again.trials == tuple(trials)


def test_what_its_last_process_wrote_before_it_ended_is_known(tmp_path: Path) -> None:
    made = begin(tmp_path)
    opened = open_search(config(tmp_path), DATA, resume=True)
    write_trials(made.path, [Trial("t000", state="failed")])
    made.write_population({"decided_epoch": 2})
    with opened.locked(print) as found:
        assert [trial.state for trial in found.trials] == ["failed"] and found.population == {"decided_epoch": 2}


def test_one_of_an_earlier_release_goes_on_where_a_key_did_not_exist(tmp_path: Path) -> None:
    begin(tmp_path)
    path = tmp_path / "mine" / "search.json"
    record = json.loads(path.read_text())
    del record["config"]["data.balance.class_weights"]
    path.write_text(json.dumps(record))
    assert open_search(config(tmp_path), DATA, resume=True).name == "mine"
    changed = config(tmp_path, "data.balance.class_weights={cat: 2}")
    assert "data.balance.class_weights: begun with" in refused(changed, resume=True)


def test_an_existing_name_goes_on_by_resume_alone(tmp_path: Path) -> None:
    made = begin(tmp_path)
    said = refused(config(tmp_path), resume=False)
    assert "a search 'mine' exists" in said and made.path in said and "--resume" in said


def test_there_is_nothing_to_resume_without_a_name_or_a_search(tmp_path: Path) -> None:
    assert "--resume needs the name" in refused(config(tmp_path, name=None), resume=True)
    said = refused(config(tmp_path, name="other"), resume=True)
    assert f"no search 'other' in {tmp_path}" in said and not (tmp_path / "other").exists()


def test_another_space_is_refused_with_both_values(tmp_path: Path) -> None:
    begin(tmp_path)
    said = refused(config(tmp_path, space={"optim.lr": {"loguniform": [1e-6, 1e-3]}}), resume=True)
    assert "tune.space: begun with" in said and "[1.0e-05, 0.001]" in said and "[1.0e-06, 0.001]" in said
    said = refused(config(tmp_path, "optim.weight_decay=0.5", "tune.seed=7"), resume=True)
    assert re.search(r"optim\.weight_decay: begun with 0\.0001, now 0\.5\n\s+tune\.seed: begun with 0, now 7", said)


def test_other_data_is_refused(tmp_path: Path) -> None:
    begin(tmp_path)
    assert "other annotations" in refused(config(tmp_path), resume=True, data={"train": "abc", "val": "new"})


def test_what_does_not_change_results_may_change(tmp_path: Path) -> None:
    """Each free setting, changed alone; `tune.name` is the folder."""
    made = begin(tmp_path)
    changes = {
        "tune.trials": "20", "tune.max_concurrent": "1", "tune.time_budget_s": "60", "tune.max_trial_failures": "7",
        "run.name": "x", "tracking.": "elsewhere", "data.tasks_per_worker": "3", "data.prefetch_batches": "5",
        "train.max_failures": "9",
    }  # fmt: skip
    assert changes.keys() | {"tune.name"} == {*FREE_SETTINGS, *FREE_KEYS}
    for name, value in changes.items():
        key = "tracking.experiment" if name == "tracking." else name
        again = open_search(config(tmp_path, f"{key}={value}"), DATA, resume=True)
        assert again.search_id == made.search_id


def test_a_training_run_of_that_name_stays_alone(tmp_path: Path) -> None:
    open_run("mine", str(tmp_path), {}, {}, "")
    for resume in (False, True):
        assert f"{tmp_path / 'mine'} is a training run" in refused(config(tmp_path), resume=resume)
    assert not (tmp_path / "mine" / "search.json").exists()


@pytest.mark.parametrize("name", ["search.json", "trials.json", "population.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\0" * 40])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    made = begin(tmp_path)
    write_trials(made.path, [])
    (tmp_path / "mine" / name).write_text(content)
    said = refused(config(tmp_path), resume=True)
    assert str(tmp_path / "mine" / name) in said


@pytest.mark.parametrize("content", [{}, {"search_id": "a"}, {"config": {}, "fingerprints": {}},
                                     {"search_id": "a", "config": 3, "fingerprints": {}}])  # fmt: skip
def test_a_record_that_lacks_something_is_damaged(tmp_path: Path, content: dict[str, Any]) -> None:
    begin(tmp_path)
    path = tmp_path / "mine" / "search.json"
    path.write_text(json.dumps(content))
    said = refused(config(tmp_path), resume=True)
    assert str(path) in said and "is damaged" in said


def test_one_process_at_a_time(tmp_path: Path) -> None:
    begin(tmp_path)
    lines: list[str] = []
    made, again = (open_search(config(tmp_path), DATA, resume=True) for _ in range(2))
    with (
        made.locked(lines.append),
        pytest.raises(ConfigError, match="is being written by process"),
        again.locked(lines.append),
    ):
        pass
    with again.locked(lines.append):
        pass


def test_of_two_that_begin_at_once_the_second_is_refused(tmp_path: Path) -> None:
    first, second = (open_search(config(tmp_path), DATA, resume=False) for _ in range(2))
    with first.locked(print):
        pass
    with pytest.raises(ConfigError, match="a search 'mine' exists"), second.locked(print):
        pass
    assert open_search(config(tmp_path), DATA, resume=True).search_id == first.search_id


def test_storage_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        open_search(config(tmp_path / "file"), DATA, resume=False)
    assert "run.storage" in str(caught.value)


def test_files_are_written_beside_the_record(tmp_path: Path) -> None:
    made = begin(tmp_path)
    assert made.write("best.yaml", "optim: {lr: 1}") == str(tmp_path / "mine" / "best.yaml")
    assert (tmp_path / "mine" / "best.yaml").read_text() == "optim: {lr: 1}"
    made.write_bytes("a.png", b"\x89")
    assert (tmp_path / "mine" / "a.png").read_bytes() == b"\x89"
