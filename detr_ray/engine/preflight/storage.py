"""Preflight of the storage for checkpoints: whether it can be used, and its free space."""

from __future__ import annotations

import shutil
from pathlib import Path

from detr_ray.addresses import LocationError, local_path
from detr_ray.config import Config
from detr_ray.detector import build_skeleton
from detr_ray.engine.checkpoints.run_directory import absolute_storage
from detr_ray.engine.preflight.findings import Report
from detr_ray.engine.preflight.writing import TIMEOUT_S, try_storage, within
from detr_ray.engine.training_step.parameters import freeze, group_rates
from detr_ray.retries import reason_of

STORAGE = "storage"
_BYTES_PER_NUMBER = 4


def check_storage(config: Config, num_classes: int, report: Report) -> None:
    """Checks ``run.storage``, and on a local disk whether there is enough free space for the checkpoints."""
    try:
        storage = absolute_storage(config.run.storage)
    except LocationError as error:  # its message contains no credentials
        report.add("error", STORAGE, f"run.storage: {error}")
        return
    try:
        within(TIMEOUT_S, lambda: try_storage(storage))
    except (LocationError, OSError) as error:
        message = f"run.storage: {storage} cannot be used: {reason_of(error)}"
        report.add("error", STORAGE, message, "choose another run.storage, or mend this one")
        return
    report.add("ok", STORAGE, f"run.storage: {storage} can be written and read")
    if (folder := local_path(storage)) is not None:
        _check_space(config, folder, num_classes, report)


def checkpoint_bytes(config: Config, num_classes: int) -> tuple[int, int]:
    """Size in bytes of a whole checkpoint, and of its model file alone.

    It contains the weights, their moving average (if there is one), and AdamW's two moments of each trained weight.
    """
    model = build_skeleton(config.model, num_classes)
    state = sum(value.numel() for value in model.state_dict().values())
    freeze(model, group_rates(model, config.optim), config.optim.freeze)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    model_file = state * (2 if config.optim.ema_decay else 1) * _BYTES_PER_NUMBER
    return model_file + 2 * trained * _BYTES_PER_NUMBER, model_file


def _check_space(config: Config, storage: Path, num_classes: int, report: Report) -> None:
    whole, model_file = checkpoint_bytes(config, num_classes)
    # The newest and the best checkpoints, one that is being written, and copies of the best and last model in MLflow.
    needed = (config.train.keep_last + 2) * whole + 2 * model_file
    existing = next(folder for folder in (storage, *storage.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    message = (
        f"{free / 1e9:.1f} GB free; checkpoints of {whole / 1e9:.2g} GB take up to {needed / 1e9:.2g} GB "
        f"(train.keep_last={config.train.keep_last}, the best, and one that is being written)"
    )
    if free < needed:
        report.add("error", STORAGE, message, "make room, or set run.storage or train.keep_last")
    elif free < 2 * needed:
        report.add("warning", STORAGE, message, "other files may fill the disk before the run ends")
    else:
        report.add("ok", STORAGE, message)
