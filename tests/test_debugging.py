"""The editor's configurations work: their commands exist, and a breakpoint in the loss is reached from one."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from debug_adapter import DebugAdapter
from observing import SMALLEST
from tiny import TINY

from detr_ray.config import load_config
from detr_ray.config.schema import all_keys
from detr_ray.loss import criterion

ROOT = Path(__file__).parents[1]
LAUNCH = json.loads((ROOT / ".vscode" / "launch.json").read_text())
CONFIGURATIONS = {configuration["name"]: configuration for configuration in LAUNCH["configurations"]}
DEFAULTS = {entry["id"]: entry.get("default", "0") for entry in LAUNCH["inputs"]}


def filled(value: Any, **values: str) -> Any:
    """A configuration with the editor's variables and its questions' default answers in it."""
    if isinstance(value, dict):
        return {key: filled(item, **values) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, **values) for item in value]
    if not isinstance(value, str):
        return value
    known = {"workspaceFolder": str(ROOT), "file": __file__, **{f"input:{k}": v for k, v in DEFAULTS.items()}, **values}
    return re.sub(r"\$\{([^}]+)\}", lambda found: known[found[1]], value)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_each_configuration_is_a_command_with_settings_that_there_are(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    configuration = filled(CONFIGURATIONS[name])
    assert configuration["type"] == "debugpy" and configuration["request"] in ("launch", "attach")
    if configuration.get("module", "").startswith("detr_ray."):
        importlib.import_module(configuration["module"])
        arguments = configuration["args"]
        files = [arguments[place + 1] for place, argument in enumerate(arguments) if argument == "--config"]
        settings = [argument for argument in arguments if "=" in argument]
        assert len(arguments) == 2 * len(files) + len(settings)
        config = load_config(files, settings)
        assert config.train.launcher == "local"
        if "train" in configuration["module"]:
            config.check_training()


def test_the_page_names_what_there_is() -> None:
    page = (ROOT / "docs" / "debugging.md").read_text()
    assert set(re.findall(r"^\| ([A-Z][^|]+) \| .*\|$", page, re.MULTILINE)) >= set(CONFIGURATIONS)
    places = re.findall(r"`(?:(\w+)\.)?(\w+)` \(`([a-z_/]+\.py)`\)", page)
    assert len(places) > 6
    for owner, name, file in places:
        code = (ROOT / "detr_ray" / file.removeprefix("detr_ray/")).read_text()
        assert re.search(rf"^ *def {name}\b", code, re.MULTILINE), (file, name)
        assert not owner or f"class {owner}" in code, (file, owner)
    sections = {key.path.partition(".")[0] for key in all_keys()}
    known = {key.path for key in all_keys()}
    named = {name for name in re.findall(r"\b([a-z]+\.[a-z_.]+[a-z])=", page) if name.partition(".")[0] in sections}
    named |= {name for name in re.findall(r"`([a-z]+\.[a-z_.]+)`", page) if name.partition(".")[0] in sections}
    assert len(named) > 15 and named - known == set()


@pytest.mark.slow  # a process that is debugged trains at a fraction of its speed
def test_a_breakpoint_in_the_loss_is_reached(tmp_path: Path) -> None:
    configuration = filled(CONFIGURATIONS["Train without Ray"])
    # The same, with a model and images of a test's size, and nothing left in the working folder.
    configuration["args"] += [
        *TINY, *SMALLEST, "data.generate={num_train: 8, num_val: 2, image_size: [48, 64]}", "optim.ema_decay=0",
        f"data.root={tmp_path}/shapes", f"run.storage={tmp_path}/runs",
    ]  # fmt: skip
    lines, first = inspect.getsourcelines(criterion.SetCriterion.forward)
    line = first + next(place for place, text in enumerate(lines) if "self.matcher.match(" in text)
    with DebugAdapter(tmp_path) as adapter:
        launched = adapter.ask("launch", **configuration)
        adapter.event("initialized")
        asked = adapter.ask("setBreakpoints", source={"path": criterion.__file__}, breakpoints=[{"line": line}])
        (breakpoint_,) = adapter.answer_to(asked)["breakpoints"]
        assert breakpoint_["verified"], breakpoint_
        adapter.answer_to(adapter.ask("configurationDone"))
        adapter.answer_to(launched)
        stopped = adapter.event("stopped")
        assert stopped["reason"] == "breakpoint"
        frames = adapter.answer_to(adapter.ask("stackTrace", threadId=stopped["threadId"]))["stackFrames"]
        assert (frames[0]["source"]["path"], frames[0]["line"]) == (criterion.__file__, line)
        assert [frame["name"] for frame in frames if "step.py" in frame["source"]["path"]] == [
            "TrainStep._forward_backward", "TrainStep.__call__",
        ] or [frame["name"].rpartition(".")[2] for frame in frames if "step.py" in frame["source"]["path"]] == [
            "_forward_backward", "__call__",
        ]  # fmt: skip
        for expression, value in (("len(targets)", "4"), ("list(outputs['pred_logits'].shape)", "[4, 6, 7]")):
            found = adapter.answer_to(adapter.ask("evaluate", expression=expression, frameId=frames[0]["id"]))
            assert found["result"] == value, (expression, found)
