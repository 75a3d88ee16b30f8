"""Every command in ``cluster/README.md`` and in the job's manifest names modules, files and keys that exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "cluster" / "README.md").read_text()
JOB = (ROOT / "cluster" / "kuberay-job.yaml").read_text()


def commands_in(text: str) -> list[list[str]]:
    """The arguments of every ``python -m detr_ray.X ...`` in a text, its lines joined where they go on."""
    text = re.sub(r"\\\n\s*", " ", text)
    # A folded YAML scalar goes on at the same depth.
    text = re.sub(r"^( +)(python -m detr_ray\..*)((?:\n\1\S.*=.*)+)", lambda m: m[1] + m[2] + m[3].replace("\n", " "),
                  text, flags=re.MULTILINE)  # fmt: skip
    found = re.findall(r"python -m (detr_ray\.[^`\n]*?)(?:`|\n|$)", text)
    return [shlex.split(command, comments=True) for command in found]


def check_command(arguments: list[str]) -> None:
    """The command itself reads its arguments, all of them, and prints the configuration instead of acting on it."""
    module, *rest = arguments
    assert importlib.util.find_spec(module) is not None, module
    rest = [item.replace("/home/ray/detr_ray/configs", "configs") for item in rest]
    if "--config" not in rest:
        return
    assert importlib.import_module(module).main([*rest, "--print-config"]) == 0, arguments
    if module == "detr_ray.train" and "configs/quickstart.yaml" not in rest:
        for key in ("run.storage=s3://", "run.name="):
            assert any(item.startswith(key) for item in rest), f"{key} is missing: nothing would outlive the cluster"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("text", [README, JOB], ids=["README.md", "kuberay-job.yaml"])
def test_every_command_names_keys_that_exist(text: str) -> None:
    commands = commands_in(text)
    assert any(arguments[0] == "detr_ray.train" and len(arguments) > 3 for arguments in commands)
    for arguments in commands:
        check_command(arguments)


def test_the_readme_has_the_commands_of_a_whole_job() -> None:
    modules = {arguments[0] for arguments in commands_in(README)}
    assert {"detr_ray.prepare", "detr_ray.check", "detr_ray.train"} <= modules
    needed = (
        "ray get-auth-token, docker build, ray up, ray dashboard, ray job submit, ray job logs, ray job stop, ray down"
    )
    for command in (*needed.split(", "), "kubectl apply", "make cluster-up", "make cluster-down"):
        assert command in README, command


@pytest.mark.parametrize(
    "command",
    [
        "python -m detr_ray.train --config configs/detr_r50.yaml run.storage=s3://b run.name=a train.workers=8",
        "python -m detr_ray.train --config configs/detr_r51.yaml run.storage=s3://b run.name=a",
        "python -m detr_ray.train --config configs/detr_r50.yaml run.storage=s3://b run.name=a train.num_workers=[4,2]",
        "python -m detr_ray.train --config configs/detr_r50.yaml train.num_workers=4",
        "python -m detr_ray.check --clusters --config configs/detr_r50.yaml",
        "python -m detr_ray.trains --config configs/detr_r50.yaml",
    ],
)
def test_a_wrong_command_is_refused(command: str) -> None:
    (arguments,) = commands_in(f"    ray job submit --working-dir . -- {command}\n")
    with pytest.raises(AssertionError):
        check_command(arguments)


def test_every_file_that_the_readme_names_exists() -> None:
    for name in re.findall(r"\b(?:cluster|configs|docs)/[\w./-]+\.(?:yaml|md|py)\b", README):
        assert (ROOT / name).exists(), name


def test_no_password_is_on_a_command_line() -> None:
    """Command lines are seen by all users of a machine, and an address in one is kept with the run."""
    for file in (ROOT / "README.md", *sorted((ROOT / "cluster").iterdir())):
        if file.suffix in (".md", ".yaml"):
            assert not re.findall(r"://[^/\s@]*:[^/\s@]+@", file.read_text()), file
