"""Finds the model file for what a user names: the folder of a run, a checkpoint or a package, or the file itself."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from itertools import islice

from pyarrow.fs import FileType

from detr_ray.addresses import LocationError, is_remote, join, name_of, parent
from detr_ray.config import ConfigError
from detr_ray.data.errors import few
from detr_ray.detector.artifact import MODEL_FILE
from detr_ray.detector.package import PACKAGE_FILE
from detr_ray.engine.checkpoints.info import MANIFEST, CheckpointInfo
from detr_ray.engine.checkpoints.run_directory import RECORD
from detr_ray.engine.checkpoints.store import CheckpointStore, checkpoint_at
from detr_ray.locations import file_info, list_names
from detr_ray.retries import reason_of

_MOST_LOOKED_AT = 200
"""Most names of a folder that are looked at to find models among them."""
_USUAL_STORAGE = "runs"
"""The folder that runs lie in where ``run.storage`` says nothing else."""
_OF_A_REGISTRY = re.compile(r"(?:models?:/*)?([\w.-]+)@([\w.-]+)")
"""What is meant as the address of a registered model."""


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
        ConfigError: there is nothing, or a folder that is none of these, or has no whole checkpoint; or the storage
            fails. The message names models that lie near.
    """
    if given.lower().startswith(("http://", "https://")):
        return FoundModel(given)
    try:
        kind = file_info(given).type
        if kind == FileType.NotFound:
            raise ConfigError(f"{key}: there is no file or folder {given}{_meant(given)}")
        if kind != FileType.Directory:
            return _file(given)
        if file_info(join(given, PACKAGE_FILE)).type == FileType.File:
            return FoundModel(join(given, PACKAGE_FILE))
        if file_info(join(given, MODEL_FILE)).type == FileType.File:
            return _file(join(given, MODEL_FILE))
        store = CheckpointStore(join(given, "checkpoints"))
        info = store.best() or store.latest()
        if info is None:
            raise ConfigError(f"{key}: {given} {_lacks(given)}")
    except OSError as error:
        raise ConfigError(f"{key}: {given} cannot be read: {reason_of(error)}") from error
    return FoundModel(join(info.path, MODEL_FILE), info)


def weights_file(given: str, key: str) -> str:
    """The file of the weights that a training is to start from: of a folder, the model file of its best checkpoint.

    Args:
        given: path, address or URL of a file, or of the folder of a run or a checkpoint.
        key: what to call it in messages.

    Raises:
        ConfigError: a folder that is neither.
    """
    if given.lower().startswith(("http://", "https://")):
        return given
    try:
        is_folder = file_info(given).type == FileType.Directory
    except (OSError, LocationError):  # reading the file says why
        return given
    if not is_folder:
        return given
    found = find_model(given, key).file
    if name_of(found) == PACKAGE_FILE:
        raise ConfigError(f"{key}: {given} is a model package; name the run or the checkpoint that it was made of")
    return found


def near(given: str) -> str:
    """What to name instead of a location that is no model, for the end of a message; empty if there is nothing."""
    inside = _models_in(given)
    return f"; name one of those in it: {few(inside)}" if inside else _meant(given)


def _meant(given: str) -> str:
    """What may have been meant by a location where nothing is; empty if nothing is like it."""
    registered = _OF_A_REGISTRY.fullmatch(given)
    if registered is not None:
        return f"; a registered model is models:/{registered[1]}@{registered[2]}"
    for folder in (parent(given), join(parent(given), _USUAL_STORAGE)):
        models = [name for name in _models_in(folder) if join(folder, name) != given]
        like = difflib.get_close_matches(name_of(given), models, n=1)
        if like:
            return f"; did you mean {join(folder, like[0])}?"
        if models:
            return f"; {folder if folder != '.' else 'the present folder'} has {few(models)}"
    return ""


def _lacks(folder: str) -> str:
    """Why a folder is no model, and what to name instead."""
    if file_info(join(folder, RECORD)).type == FileType.File:
        return (
            "is a run without a whole checkpoint: it writes the first one after an epoch, or after as many steps as "
            "train.checkpoint_every_steps says; the train command with its run.name goes on with it"
        )
    return f"is neither a run nor a checkpoint: it holds no whole checkpoint, and no model package{near(folder)}"


def _models_in(folder: str) -> list[str]:
    """Names of the runs, checkpoints and packages in a folder; none in a bucket, where looking takes long."""
    if is_remote(folder):
        return []
    try:
        names = islice(sorted(list_names(folder)), _MOST_LOOKED_AT)
    except OSError:  # no folder, or one that may not be read: then there is nothing to name
        return []
    parts = (RECORD, MODEL_FILE, PACKAGE_FILE)
    return [name for name in names if any(_is_file(join(folder, name, part)) for part in parts)]


def _is_file(location: str) -> bool:
    """Whether there is a file that can be seen; neighbours of a model may be closed to this user."""
    try:
        return bool(file_info(location).type == FileType.File)
    except OSError:
        return False


def _file(file: str) -> FoundModel:
    """A model file, with its checkpoint if it is part of one."""
    if name_of(file) != MODEL_FILE or file_info(join(parent(file), MANIFEST)).type != FileType.File:
        return FoundModel(file)
    info = checkpoint_at(parent(file))
    return FoundModel(file, info if info is not None and MODEL_FILE in info.files else None)
