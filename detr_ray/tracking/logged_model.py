"""Creates versions: a detector's package as an MLflow model that is loaded by a code file, without pickles.

The MLflow model is a folder: ``artifacts/package`` (weights as safetensors, description as JSON, both hashed), the file
of code that MLflow runs to serve it (``detr_ray/runtime/mlflow_model.py``, which imports this package), signature,
input example and requirements.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr_ray.tracking.mlflow_client import made_experiment, run_of_uid
from detr_ray.tracking.registry import ModelRegistry, ModelVersion
from detr_ray.tracking.store import sqlite_path

PACKAGE = "artifacts/package"
"""Path of the package in the folder of an MLflow model."""

IMAGE_FIELD = "image"

# What a served model needs beside this package; versions are those that are installed here.
_REQUIRED = ("detr_ray", "mlflow", "torch", "torchvision", "safetensors", "pillow")

_CODE_TAGS = ("code.commit", "detr_ray.version", "torch.version", "python.version")

# A grey PNG of 8 x 8 pixels: a small example of a request.
_EXAMPLE_IMAGE = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAADklEQVR42mNogAIGyhgAgIQgARDoahcAAAAASUVORK5CYII="


@dataclass(frozen=True)
class NewVersion:
    """A version to register.

    Attributes:
        package: local folder of the detector's package, which must be called ``package``.
        code: the file of Python that MLflow runs to load it.
        metadata: JSON values that are shown with the model: labels, sizes, where it is from.
        tags: of the version.
        experiment: MLflow experiment that the model is kept in; made if missing.
        run_uid: of the run that it came from, as `MlflowTracker` has it; None for none.
        top_k: number of detections an image where a request does not say it.
    """

    package: Path
    code: Path
    metadata: Mapping[str, Any]
    tags: Mapping[str, str]
    experiment: str
    run_uid: str | None = None
    top_k: int = 100


def add_version(registry: ModelRegistry, new: NewVersion) -> ModelVersion:
    """Stores a package as an MLflow model and makes it the next version of the registered model.

    Raises:
        RegistryUnavailable: the store refuses it or does not answer. No version was created.
    """
    from mlflow.exceptions import MlflowException

    client = registry.client
    with registry.calls(), tempfile.TemporaryDirectory(prefix="detr_ray-model-") as workplace:
        experiment_id = made_experiment(client, registry.uri, new.experiment)
        run_id = None if new.run_uid is None else run_of_uid(client, experiment_id, new.run_uid)
        name = registry.name.replace(".", "_")  # MLflow takes dots in names of registered models, not of logged ones
        logged = client.create_logged_model(
            experiment_id, name=name, source_run_id=run_id, model_type="object-detection"
        )
        try:
            folder = Path(workplace, "model")
            write_mlflow_model(folder, new, logged, run_id)
            client.log_model_artifacts(logged.model_id, str(folder))
        except BaseException:
            client.finalize_logged_model(logged.model_id, "FAILED")
            raise
        client.finalize_logged_model(logged.model_id, "READY")
        try:
            client.create_registered_model(registry.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # A database is asked for the model's location here: MLflow's store would look for the model in the store that
        # is set for the whole process. A server takes no other source than the model itself.
        if sqlite_path(registry.uri) is None and registry.uri.startswith("http"):
            source: dict[str, Any] = {"source": f"models:/{logged.model_id}", "model_id": logged.model_id}
        else:
            source = {"source": logged.artifact_location}
        tags = {**_of_run(client, run_id), **new.tags}
        entry = client.create_model_version(registry.name, run_id=run_id, tags=tags, **source)
    return registry.version(int(entry.version))


def _of_run(client: Any, run_id: str | None) -> dict[str, str]:
    """What the run that a model came from recorded of the code that trained it."""
    recorded = {} if run_id is None else client.get_run(run_id).data.tags
    return {name: recorded[name] for name in _CODE_TAGS if name in recorded}


def write_mlflow_model(folder: Path, new: NewVersion, logged: Any, run_id: str | None) -> None:
    """Writes the folder of an MLflow model.

    Args:
        folder: is made.
        new: the content.
        logged: MLflow's record of the model.
        run_id: of the run that it came from.
    """
    import mlflow
    from mlflow.models import Model

    model = Model(
        artifact_path=logged.artifact_location, model_uuid=logged.model_id, run_id=run_id, model_id=logged.model_id
    )
    mlflow.pyfunc.save_model(
        str(folder),
        python_model=str(new.code),
        artifacts={"package": str(new.package)},
        signature=_signature(new.top_k),
        input_example={IMAGE_FIELD: [_EXAMPLE_IMAGE]},
        pip_requirements=_requirements(),
        metadata=dict(new.metadata),
        mlflow_model=model,
    )


def _signature(top_k: int) -> Any:
    """One base64 image a row in, one row of arrays an image out; the score and the number are parameters."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    number, text = DataType.double, DataType.string
    return ModelSignature(
        inputs=Schema([ColSpec(text, IMAGE_FIELD)]),
        outputs=Schema(
            [
                ColSpec(Array(Array(number)), "boxes_xyxy_px"),
                ColSpec(Array(number), "scores"),
                ColSpec(Array(DataType.long), "category_ids"),
                ColSpec(Array(text), "names"),
            ]
        ),
        params=ParamSchema([ParamSpec("threshold", number, 0.0), ParamSpec("top_k", DataType.long, top_k)]),
    )


def _requirements() -> list[str]:
    return [f"{name}=={importlib.metadata.version(name)}" for name in _REQUIRED]
