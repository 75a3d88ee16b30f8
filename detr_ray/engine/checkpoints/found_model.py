"""Finds the model file for what a user names: the folder of a run, a checkpoint or a package, or the file itself."""

from __future__ import annotations

from dataclasses import dataclass

from pyarrow.fs import FileType

from detr_ray.addresses import join, name_of, parent
from detr_ray.config import ConfigError
from detr_ray.detector.artifact import MODEL_FILE
from detr_ray.detector.package import PACKAGE_FILE
from detr_ray.engine.checkpoints.info import MANIFEST, CheckpointInfo
from detr_ray.engine.checkpoints.store import CheckpointStore, checkpoint_at
from detr_ray.locations import file_info
from detr_ray.retries import reason_of


@dataclass(frozen=True)
class FoundModel:
    """A model that was found.

    Attributes:
        file: path, address or URL of the model file, or of a package's ``model.json``.
        checkpoint: the checkpoint that the file belongs to; None where it belongs to none.
    """

    file: str
    checkpoint: CheckpointInfo | None = None

    @property
    def sha256(self) -> str | None:
        """The recorded hash of the file's content; None where there is none beside it."""
        return None if self.checkpoint is None else self.checkpoint.files[MODEL_FILE]["sha256"]


def find_model(given: str, key: str) -> FoundModel:
    """Finds the model; for a run's folder the model of its best checkpoint, by the recorded AP.

    Args:
        given: path, address or URL of a run's folder, a checkpoint's folder, a package's folder, or a file.
        key: what to call it in messages.

    Raises:
        ConfigError: a folder that is none of these, or has no whole checkpoint; or the storage fails.
    """
    if given.lower().startswith(("http://", "https://")):
        return FoundModel(given)
    try:
        if file_info(given).type != FileType.Directory:
            return _file(given)
        if file_info(join(given, PACKAGE_FILE)).type == FileType.File:
            return FoundModel(join(given, PACKAGE_FILE))
        if file_info(join(given, MODEL_FILE)).type == FileType.File:
            return _file(join(given, MODEL_FILE))
        store = CheckpointStore(join(given, "checkpoints"))
        info = store.best() or store.latest()
    except OSError as error:
        raise ConfigError(f"{key}: {given} cannot be read: {reason_of(error)}") from error
    if info is None:
        raise ConfigError(
            f"{key}: {given} is neither a run nor a checkpoint: it holds no whole checkpoint, and no model package"
        )
    return FoundModel(join(info.path, MODEL_FILE), info)


def _file(file: str) -> FoundModel:
    """A model file, with its checkpoint if it is part of one."""
    if name_of(file) != MODEL_FILE or file_info(join(parent(file), MANIFEST)).type != FileType.File:
        return FoundModel(file)
    info = checkpoint_at(parent(file))
    return FoundModel(file, info if info is not None and MODEL_FILE in info.files else None)
