"""Empty MLflow databases: making one takes seconds, copying one does not."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from detr_ray.tracking import default_tracking_uri
from detr_ray.tracking.mlflow_client import open_client


@functools.cache
def empty_database() -> Path:
    """An MLflow database without experiments and runs, to be copied."""
    folder = tempfile.mkdtemp(prefix="detr_ray-test-store-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    open_client(default_tracking_uri(folder))
    return Path(folder, "mlflow.db")


def empty_store(folder: Path) -> str:
    """The address of a new store in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(empty_database(), folder / "mlflow.db")
    return default_tracking_uri(folder)
