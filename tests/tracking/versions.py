"""Versions of a registered model for tests: entries in a store, with or without files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from detr_ray.tracking.champion import Turns, undecided_tags
from detr_ray.tracking.logged_model import NewVersion, add_version
from detr_ray.tracking.registry import MEASURED_ON, PACKAGE_SHA256, ModelRegistry, ModelVersion

HERE = {"eval.size": 48, "validation data": "here"}
ELSEWHERE = {"eval.size": 48, "validation data": "elsewhere"}
QUICK = Turns(look_s=0.02, alive_s=0.05, passed_over_s=0.6)

CODE = """
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Names(PythonModel):
    def load_context(self, context):
        self.folder = context.artifacts["package"]

    def predict(self, context, model_input: pd.DataFrame, params=None):
        return [{"names": [image[:4]]} for image in model_input["image"]]


set_model(Names())
"""


def entry(
    registry: ModelRegistry, ap: float | None = None, measured_on: dict[str, Any] = HERE, **tags: str
) -> ModelVersion:
    """A version without files that is being decided."""
    from mlflow.exceptions import MlflowException

    try:
        registry.client.create_registered_model(registry.name)
    except MlflowException as error:
        assert error.error_code == "RESOURCE_ALREADY_EXISTS"
    known = {} if ap is None else {"val/AP": repr(ap), "val/AP50": repr(ap + 0.2), MEASURED_ON: json.dumps(measured_on)}
    made = registry.client.create_model_version(
        registry.name, "file:///nowhere", tags={**undecided_tags(), **known, **tags}
    )
    return registry.version(int(made.version))


def package_in(folder: Path, content: str = "weights") -> Path:
    """A folder that looks like a package: a description with a configuration, and a file."""
    package = folder / "package"
    package.mkdir(parents=True)
    (package / "weights.safetensors").write_text(content)
    (package / "model.json").write_text(json.dumps({"config": {"optim": {"lr": len(content)}, "run": {"seed": 1}}}))
    return package


def stored(
    registry: ModelRegistry, folder: Path, content: str = "weights", ap: float = 0.5, **changes: Any
) -> ModelVersion:
    """A version with files."""
    package = package_in(folder, content)
    (folder / "served.py").write_text(CODE)
    tags = {
        PACKAGE_SHA256: hashlib.sha256((package / "model.json").read_bytes()).hexdigest(),
        MEASURED_ON: json.dumps(HERE),
        "val/AP": repr(ap),
        "checkpoint": "runs/seven",
        **undecided_tags(),
    }
    new = NewVersion(package, folder / "served.py", {"labels": {"1": "disc"}}, tags, "detr", **changes)
    return add_version(registry, new)
