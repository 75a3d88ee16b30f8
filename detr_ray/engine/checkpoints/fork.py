"""Beginning a run as a fork: at a checkpoint of another run, with other learning rates and loss weights.

The fork starts with the other run's weights, averages, moments, step and place in the stream. It has its own directory
and records, and once it has a checkpoint, it resumes from its own ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from detr_ray.addresses import join, parent, resolve
from detr_ray.config import Config, ConfigError, flatten
from detr_ray.engine.checkpoints.info import CheckpointInfo
from detr_ray.engine.checkpoints.run_directory import (
    RECORD,
    RunDirectory,
    begun_with,
    is_free,
    may_differ_in_fork,
    record_at,
    storage_errors,
)
from detr_ray.engine.checkpoints.store import CheckpointStore


@dataclass(frozen=True)
class Fork:
    """Where a run begins.

    Attributes:
        checkpoint: of the other run.
        record: what the other run was begun with.
    """

    checkpoint: CheckpointInfo
    record: Mapping[str, Any]

    def refuse_misfit(self, config: Config, fingerprints: Mapping[str, str], total_steps: int) -> None:
        """Refuses a fork that could not go on from the checkpoint.

        Args:
            config: of the fork.
            fingerprints: split -> fingerprint of its data.
            total_steps: where it ends.

        Raises:
            ConfigError: it differs in more than a fork may; every such key is named with both values.
        """
        now = flatten(config)
        before = begun_with(self.record, now)
        faults = [
            f"{key}: the other run has {before[key]!r}, this one {now[key]!r}"
            for key in sorted(now)
            if before[key] != now[key] and not _may_differ(key, before[key], now[key])
        ]
        if self.record["fingerprints"].get("train") != fingerprints.get("train"):
            faults.append("the train data: other annotations than the other run has")
        if self.checkpoint.step >= total_steps:
            faults.append(
                f"train.epochs: this run ends after step {total_steps}, and the checkpoint is of step "
                f"{self.checkpoint.step}"
            )
        if faults:
            raise ConfigError(
                f"run.fork_from: a run cannot begin at {self.checkpoint.path}; give the same values, or start from its "
                "weights alone with model.init_from:\n  " + "\n  ".join(faults)
            )


def _may_differ(key: str, before: Any, now: Any) -> bool:
    return key == "run.name" or is_free(key) or may_differ_in_fork(key, before, now)


def find_fork(config: Config, record: Mapping[str, Any] | None) -> Fork | None:
    """The checkpoint of another run that a run begins at; None without ``run.fork_from``, or if it has its own one.

    Args:
        config: of the run.
        record: what the run was begun with; None for a new run.

    Raises:
        ConfigError: ``run.fork_from`` names no run and no checkpoint, or a storage cannot be read.
    """
    if config.run.fork_from is None:
        return None
    if record is not None and config.run.name is not None:
        run = RunDirectory.at(config.run.name, config.run.storage, record)
        with storage_errors(run.path):
            if run.checkpoints.latest() is not None:
                return None
    # A fork that has no checkpoint yet begins at the recorded one: the other run may have newer ones now.
    place = resolve((record or {}).get("forked_from") or config.run.fork_from)
    with storage_errors(place, "run.fork_from"):
        root = place
        other = record_at(join(root, RECORD))
        if other is None:
            root = parent(parent(place))
            other = record_at(join(root, RECORD))
        if other is None:
            raise ConfigError(f"run.fork_from: {place} is neither a run nor a checkpoint in one")
        found = CheckpointStore(join(root, "checkpoints")).checkpoints()
    if root != place:
        found = [info for info in found if info.path == place]
    if not found:
        raise ConfigError(f"run.fork_from: {place} holds no whole checkpoint")
    return Fork(found[-1], other)
