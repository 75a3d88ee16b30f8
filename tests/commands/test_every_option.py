"""Every option of every command does something: one case an option, and none without.

The options are read from the commands' own help. Run one: ``pytest tests/commands -k picture-score``.
"""

from __future__ import annotations

from pathlib import Path

import commands.data_cases
import commands.deployment_cases
import commands.model_cases
import commands.run_cases  # noqa: F401
import pytest
import yaml
from commands.registry import CASES, OF_ALL, Place, options_of
from observing import observe, small_config
from tiny import make_dataset

from detr_ray.__main__ import COMMANDS


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set of 16 and 4 images, and a run of two steps on it."""
    folder = tmp_path_factory.mktemp("commands")
    data = make_dataset(folder / "shapes", num_train=16, num_val=4, image_size=(40, 90))
    seen = observe(small_config(data, folder / "runs", "run.name=trained", "train.max_steps=2", "optim.lr=1e-2"))
    assert seen.result is not None
    return data, Path(seen.result.run_path)


@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command in COMMANDS for option in options_of(command)]
)
def test_option_does_what_it_says(
    command: str, option: str, trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place = Place(*trained, tmp_path, monkeypatch)
    if option in OF_ALL:
        OF_ALL[option](place, command)
    else:
        assert (command, option) in CASES, f"{command} {option} has no case: write one that sees what it does"
        CASES[command, option](place)


def test_there_is_no_case_of_an_option_that_is_gone() -> None:
    assert [case for case in CASES if case[1] not in options_of(case[0])] == []


# Options of all commands


def config(place: Place, command: str) -> None:
    """Files are read in their order, and what is on the command line wins."""
    first, second = place.folder / "first.yaml", place.folder / "second.yaml"
    first.write_text("{train: {epochs: 5, keep_last: 6}, optim: {lr: 0.5}}")
    second.write_text("{train: {epochs: 7}, optim: {lr: 0.25}}")
    code, out, _ = place.call(command, "--config", first, "--config", second, "optim.lr=0.125", "--print-config")
    values = yaml.safe_load(out)
    assert code == 0 and (values["train"]["epochs"], values["train"]["keep_last"]) == (7, 6)
    assert values["optim"]["lr"] == 0.125


def print_config(place: Place, command: str) -> None:
    """Prints, and does nothing else."""
    code, out, _ = place.call(command, "--config", place.file(), "--print-config", "run.name=a")
    assert code == 0 and yaml.safe_load(out) == place.config("run.name=a").to_dict()
    assert not (place.folder / "runs").exists()


def help_text(place: Place, command: str) -> None:
    for spelled in ("-h", "--help"):
        code, out, _ = place.call(command, spelled, "--config", "not-there.yaml")
        assert code == 0 and f"python -m detr_ray.{command}" in out and "data.window  (" in out


OF_ALL |= {"--config": config, "--print-config": print_config, "--help": help_text}
