"""The command line: help, printing the configuration, overrides, exit codes, and what is imported for them.

Run alone: ``pytest tests/test_cli.py``. A few tests start a Python process each; none starts Ray.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

import detr_ray.__main__ as entry
from detr_ray.cli import run_command
from detr_ray.config import Config, ConfigError, load_config
from detr_ray.config.reference import reference_markdown
from detr_ray.config.schema import all_keys
from detr_ray.data.errors import DataError
from detr_ray.engine.errors import RunFailed

ROOT = Path(__file__).parents[1]


class Command:
    """A command that notes what it was called with."""

    def __init__(self, outcome: int | BaseException = 0):
        self.outcome = outcome
        self.config: Config | None = None
        self.arguments: argparse.Namespace | None = None

    def __call__(self, config: Config, arguments: argparse.Namespace) -> int:
        self.config, self.arguments = config, arguments
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


def run_python(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", code] if code else []), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


# Reading the command line


def test_configuration_reaches_the_command(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("train: {epochs: 5, max_steps: 9}\n")
    second.write_text("train: {epochs: 6}\n")
    command = Command(outcome=7)
    argv = ["optim.lr=1", "--config", str(first), "--train.keep_last=4", f"--config={second}", "data.root=a=b"]
    assert run_command("train", "Trains.", command, argv) == 7
    config = command.config
    assert config is not None
    assert (config.train.epochs, config.train.max_steps, config.train.keep_last) == (6, 9, 4)
    assert (config.optim.lr, config.data.root) == (1, "a=b")


def test_commands_have_arguments_of_their_own():
    command = Command()

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--out")
        parser.add_argument("--decode", action="store_true")
        parser.add_argument("action", choices=["generate", "shards"])

    argv = ["optim.lr=1", "shards", "--out=here=there", "--decode", "train.epochs=2"]
    assert run_command("prepare", "Prepares.", command, argv, add_arguments) == 0
    assert command.arguments is not None
    assert (command.arguments.out, command.arguments.decode, command.arguments.action) == ("here=there", True, "shards")
    assert command.config == load_config(None, ["optim.lr=1", "train.epochs=2"])


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (
            ["optim.lr_backbon=1"],
            "unknown key 'optim.lr_backbon'; did you mean 'optim.lr_backbone'? (from command line)",
        ),
        (["--optim.lr_backbon=1"], "unknown key 'optim.lr_backbon'; did you mean 'optim.lr_backbone'? (from command"),
        (["lr=1"], "unknown key 'lr'; did you mean 'optim.lr'? (from command line)"),
        (["--lr=1"], "unknown key 'lr'; did you mean 'optim.lr'? (from command line)"),
        (["optim.lr="], "optim.lr: no value is given; write optim.lr=VALUE, or optim.lr=null for none"),
        (["--optim.lr", "1"], "'--optim.lr' is neither an option nor key=value; write optim.lr=1\n"),
        (["optim.lr"], "'optim.lr' is neither an option nor key=value; write optim.lr=VALUE\n"),
        (
            ["--confg", "a.yaml", "b"],
            "'--confg' is neither an option nor key=value; did you mean --config?\nerror: 'b' is",
        ),
        (["--verbose"], "'--verbose' is neither an option nor key=value; see --help"),
        (["a.yaml"], "'a.yaml' is neither an option nor key=value; write --config a.yaml\n"),
        (["photo.jpg"], "'photo.jpg' is neither an option nor key=value; see --help\n"),
        (
            ["--bogus", "--print-config", "stray"],
            "'--bogus' is neither an option nor key=value; see --help\nerror: 'stray'",
        ),
        (
            ["optim.lr=1", "data.split={val:", "0.1,", "seed:", "1}", "train.epochs=1"],
            "data.split={val: is cut off at a blank, where the shell divides it: put it in quotes: "
            "'data.split={val: 0.1, seed: 1}'\n",
        ),
        (
            ["model.num_classes=5"],
            "unknown key 'model.num_classes': the classes, and how many there are, are taken from",
        ),
        (["--config"], "argument --config: expected one argument"),
        (["--config", "missing.yaml"], "missing.yaml: there is no such file"),
        (["optim.lr=-1"], "optim.lr: must be more than 0 (got -1, from command line)"),
    ],
)
def test_mistakes_are_errors_of_one_line_and_exit_code_2(argv, error, capsys):
    command = Command()
    assert run_command("train", "Trains.", command, argv) == 2
    assert command.config is None
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"error: {error}")


def test_many_arguments_are_read_at_once():
    command = Command()
    photos = [f"photos/of_last_summer_{number}.jpg" for number in range(5000)]
    given = ["--images", *photos, "optim.lr=1"]
    take = lambda parser: parser.add_argument("--images", nargs="+")  # noqa: E731
    assert run_command("predict", "Predicts.", command, given, take) == 0
    assert command.config.optim.lr == 1


def test_all_mistakes_are_told_at_once(capsys):
    assert run_command("train", "Trains.", Command(), ["--verbose", "lr=1", "train.epochs=0", "eval.sizes=3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("error: ") for line in lines)


# How a command ends


@pytest.mark.parametrize(
    ("outcome", "code", "error"),
    [
        (ConfigError(["a: wrong", "b: wrong"]), 2, "error: a: wrong\nerror: b: wrong\n"),
        (DataError("instances.json: no images"), 2, "error: instances.json: no images\n"),
        (RunFailed("step 3: the loss is not finite"), 1, "error: step 3: the loss is not finite\n"),
        (KeyboardInterrupt(), 130, "error: stopped\n"),
    ],
)
def test_errors_for_users_have_exit_codes_and_no_traceback(outcome, code, error, capsys):
    assert run_command("train", "Trains.", Command(outcome), []) == code
    assert capsys.readouterr().err == error


def test_errors_of_weights_and_checkpoints_are_for_users(capsys):
    from detr_ray.engine.errors import CheckpointError
    from detr_ray.model.state_dicts import WeightsError

    assert run_command("train", "Trains.", Command(WeightsError("a.pth is damaged")), []) == 2
    assert run_command("train", "Trains.", Command(CheckpointError("step_1 is damaged")), []) == 1
    assert capsys.readouterr().err == "error: a.pth is damaged\nerror: step_1 is damaged\n"


def test_faults_of_the_program_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command("train", "Trains.", Command(ZeroDivisionError()), [])


def test_check_runs_before_the_command_but_not_before_printing(capsys):
    command = Command()
    assert run_command("train", "Trains.", command, [], check=Config.check_training) == 2
    assert command.config is None
    assert "error: data.root: no training data is given" in capsys.readouterr().err
    assert run_command("train", "Trains.", command, ["--print-config"], check=Config.check_training) == 0
    assert run_command("train", "Trains.", command, ["data.root=x"], check=Config.check_training) == 0
    assert command.config is not None


# Help and printing


def test_help_lists_every_key_with_its_meaning(capsys):
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("checkpoint", help="what to look at")

    command = Command()
    assert run_command("train", "Trains a detector.", command, ["--help"], add_arguments) == 0
    assert command.config is None
    text = capsys.readouterr().out
    squeezed = " ".join(text.split())
    assert "Trains a detector." in text
    assert "what to look at" in text
    for key in all_keys():
        assert key.path in text
        assert key.meaning in squeezed
    assert "optim.lr (number more than 0 or schedule; default 0.0001)" in squeezed
    assert "model.backbone_stride (32 or 16 or 8; default 32)" in squeezed
    assert max(map(len, text.splitlines())) <= 100


def test_later_overrides_win_whatever_their_form(capsys):
    argv = ["--print-config", "train={epochs: 3, keep_last: 5}", "train.epochs=7"]
    assert run_command("train", "", lambda config, arguments: 0, argv) == 0
    printed = capsys.readouterr().out
    assert "epochs: 7" in printed and "keep_last: 5" in printed
    assert run_command("train", "", lambda config, arguments: 0, [argv[0], argv[2], argv[1]]) == 0
    assert "epochs: 3" in capsys.readouterr().out


def test_printed_configuration_loads_again(tmp_path, capsys):
    argv = ["optim.lr=1e-7", "data.val.images=b", "data.val.annotations=a", "loss.ce={points: [[0, 1], [5, 2]]}"]
    command = Command()
    assert run_command("train", "Trains.", command, ["--print-config", *argv]) == 0
    assert command.config is None
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_config(path) == load_config(None, argv)


def test_documentation_is_the_reference():
    documented = (ROOT / "docs" / "configuration.md").read_text()
    assert documented == reference_markdown(), "write docs/configuration.md anew; its head says how"


# Real processes


SCRIPT = """
import sys
from detr_ray.cli import run_command
from detr_ray.config.reference import reference_markdown
def main(config, arguments):
    raise AssertionError("must not be reached")
code = run_command("train", "Trains.", main)
heavy = {"torch", "ray", "mlflow", "numpy", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("argument", "code"), [("--help", 0), ("--print-config", 0), ("optim.lr_backbon=1", 2), ("--nonsense", 2)]
)
def test_help_printing_and_mistakes_import_nothing_heavy(argument, code):
    done = run_python(argument, code=SCRIPT)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert bool(done.stdout) is (code == 0)


def test_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -c '{SCRIPT}' --help | head -c 10"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.stdout == "usage: pyt"
    assert done.stderr == ""


def test_no_command_lists_all_commands():
    done = run_python("-m", "detr_ray")
    assert done.returncode == 0
    for name in ("train", "tune", "evaluate", "predict", "check", "prepare", "watch", "export", "serve", "send"):
        assert f"\n  {name} " in done.stdout


def test_unknown_command_names_the_nearest(capsys):
    assert entry.main(["traim", "optim.lr=1"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'traim'; did you mean 'train'?\n"
    assert entry.main(["qqqq"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown command 'qqqq'; there are train, tune, evaluate, ")


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_command_is_dispatched_with_its_arguments(name, capsys):
    assert entry.main([name, "train.epochs=0", "optim.lr=x"]) == 2
    assert capsys.readouterr().err == (
        "error: optim.lr: must be a number or a schedule such as {points: [[epoch, value], ...], "
        "interpolation: linear} (got x, from command line)\n"
        "error: train.epochs: must be at least 1 (got 0, from command line)\n"
    )


@pytest.mark.parametrize(
    ("module", "needless"),
    [
        ("detr_ray.engine.past_run", {"torch", "torchvision", "mlflow", "ray", "detr_ray.model"}),
        ("detr_ray.runtime.launch", {"torchvision", "torch._dynamo", "scipy", "mlflow", "detr_ray.model"}),
    ],
    ids=["a run that is read back", "the driver of a run"],
)
def test_what_others_need_is_not_imported(module, needless):
    done = run_python(code=f"import sys, {module}; print(*({needless!r} & sys.modules.keys()))")
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr
