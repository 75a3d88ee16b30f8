"""Checkpoints on a file system: written whole or not at all, the best and the last few kept.

A checkpoint is a folder ``step_00001234/`` with the files it was given and, written last, ``manifest.json`` with their
sizes and hashes: a folder without a manifest that agrees with its files does not exist as far as a reader is concerned.
That holds on a local disk and on an object store alike. Knows nothing of models; the files are what ``torch.save``
makes of plain dictionaries and are read back as data, never as code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import torch

from detr_ray.engine.checkpoints.info import CheckpointInfo, best_of, highest, scored
from detr_ray.engine.errors import CheckpointError
from detr_ray.locations import (
    StoredFile,
    delete_file,
    delete_folder,
    join,
    list_files,
    make_folder,
    read_buffer,
    read_bytes,
    resolve,
    write,
    write_bytes,
)
from detr_ray.retries import NoSuchObject, reason_of

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FILE = re.compile(r"(step_\d{8,})/(.+)")


class _HashingFile:
    """A write-only file that counts and hashes what goes through it; enough of a file for ``torch.save``."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()
        self.bytes = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self._stream.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(data)
        self.bytes += memoryview(data).nbytes
        return memoryview(data).nbytes

    def flush(self) -> None:
        self._stream.flush()


class CheckpointStore:
    """The checkpoints of one run, of which one process at a time may be the writer.

    A look at them is one listing of everything below the root. A manifest is read when it is new or has changed.

    Args:
        root: folder or URI (``s3://``, ``gs://``, any pyarrow file system) that holds the ``step_*`` folders.
        metric: name of the metric that says which checkpoint is best; higher is better.
    """

    def __init__(self, root: str, metric: str = "val/AP") -> None:
        self.root = resolve(root)
        self._manifests: dict[str, tuple[StoredFile, dict[str, Any]]] = {}
        self._passed_over: set[str] = set()
        self._leftovers: set[str] = set()  # of checkpoints whose manifest is removed, and the rest could not be
        self._refused: dict[str, OSError] = {}  # folders that may not be removed
        self.metric = metric

    def save(
        self, step: int, files: Mapping[str, Any], details: Mapping[str, Any], *, evaluation_due: bool = False
    ) -> CheckpointInfo:
        """Writes a checkpoint.

        Args:
            step: optimizer steps taken; an earlier checkpoint of the same step is replaced.
            files: file name -> what ``torch.save`` writes into it.
            details: small JSON values kept in the manifest.
            evaluation_due: these weights are to be evaluated: it is kept until that is noted (`annotate`).

        Raises:
            OSError: it could not be written; nothing of it stays, and earlier checkpoints are as they were.
        """
        folder = join(self.root, f"step_{step:08d}")
        self._clear(folder)
        self._leftovers.discard(folder)
        try:
            make_folder(folder)
            written = {name: _write(join(folder, name), content) for name, content in files.items()}
            info = CheckpointInfo(step, folder, None, dict(details), written, evaluation_due)
            self._write_manifest(info)
        except OSError:
            with contextlib.suppress(OSError):
                self._remove(folder)
            raise
        return info

    def annotate(
        self,
        info: CheckpointInfo,
        metrics: Mapping[str, float] | None,
        problem: str = "",
        measured_on: Mapping[str, Any] | None = None,
    ) -> CheckpointInfo:
        """Notes what an evaluation of a checkpoint's weights gave, or (without ``metrics``) why it failed for good.

        Args:
            info: the checkpoint.
            metrics: the numbers.
            problem: why there are none.
            measured_on: JSON values that say what they were measured with and on; only equal ones are compared.

        Raises:
            OSError: it could not be noted; the manifest is as it was.
        """
        info = info.with_scores(metrics, problem, measured_on)
        self._write_manifest(info)
        return info

    def checkpoints(self) -> list[CheckpointInfo]:
        """Every whole checkpoint, oldest first; half-written ones are passed over with a warning.

        Raises:
            OSError: the storage does not answer now, or refuses.
        """
        folders: dict[str, dict[str, StoredFile]] = {}
        for file in list_files(self.root):
            if found := _FILE.fullmatch(file.name):
                folders.setdefault(found[1], {})[found[2]] = file
        infos = [self._info(join(self.root, name), files) for name, files in folders.items()]
        return sorted((info for info in infos if info is not None), key=lambda info: info.step)

    def latest(self) -> CheckpointInfo | None:
        """The checkpoint to go on from."""
        found = self.checkpoints()
        return found[-1] if found else None

    def best(self) -> CheckpointInfo | None:
        """The checkpoint with the highest metric of those measured as the newest was; the earliest of equals."""
        return self.best_of(self.checkpoints())

    def best_of(self, found: Iterable[CheckpointInfo]) -> CheckpointInfo | None:
        """The one of them with the highest metric, of those that were measured as the newest of them was."""
        return best_of(found, self.metric)

    def load(self, info: CheckpointInfo, name: str, map_location: str | torch.device = "cpu") -> Any:
        """Reads one file of a checkpoint back, with ``weights_only``.

        Raises:
            CheckpointError: its bytes are not those that were written, or are gone.
            OSError: the storage does not give them now.
        """
        path = join(info.path, name)
        try:
            data = read_buffer(path, info.files[name]["bytes"])
        except NoSuchObject as error:
            raise CheckpointError(f"{path}: cannot be read: {reason_of(error)}") from error
        if hashlib.sha256(data).hexdigest() != info.files[name]["sha256"]:
            raise CheckpointError(f"{path}: its content is not what was written (hash differs); remove {info.path}")
        return torch.load(pa.BufferReader(data), map_location=map_location, weights_only=True)

    def prune(
        self, keep_last: int, found: list[CheckpointInfo] | None = None, also: Collection[int] = ()
    ) -> CheckpointInfo | None:
        """Removes whole checkpoints but the best, the last few and those that are to be evaluated; gives the best.

        Where the way of measuring has changed, the best of each way stays.

        Args:
            keep_last: how many of the newest stay.
            found: the checkpoints, oldest first; None to look.
            also: steps of others that stay.

        Raises:
            OSError: some could not be removed; the others are gone. One that may not be removed is not tried again.
        """
        found = self.checkpoints() if found is None else found
        known = scored(found, self.metric)
        bests = [highest((info for info in known if info.compares_with(each)), self.metric) for each in known]
        kept = {*also, *(info.step for info in bests if info is not None)}
        problem: OSError | None = None
        for info in found[: max(len(found) - keep_last, 0)]:
            if info.unscored or info.step in kept:
                continue
            problem = self._try_to_remove(info.path) or problem
        for folder in list(self._leftovers):
            problem = self._try_to_remove(folder) or problem
        if problem is not None:
            raise problem
        return self.best_of(found)

    def _write_manifest(self, info: CheckpointInfo) -> None:
        manifest = {
            "step": info.step,
            "metrics": info.metrics,
            "evaluation_due": info.evaluation_due,
            "evaluation_problem": info.evaluation_problem,
            "measured_on": dict(info.measured_on),
            "details": info.details,
            "files": info.files,
        }
        # A bucket's clock has seconds: another manifest of the same size may look like the one before.
        self._manifests.pop(info.path, None)
        write_bytes(join(info.path, MANIFEST), json.dumps(manifest, indent=1).encode())

    def _try_to_remove(self, folder: str) -> OSError | None:
        if folder not in self._refused:
            try:
                self._remove(folder)
            except PermissionError as error:
                self._refused[folder] = error
            except OSError as error:
                return error
        return self._refused.get(folder)

    def _remove(self, folder: str) -> None:
        # The manifest goes first: what is left after an interruption is no checkpoint any more.
        delete_file(join(folder, MANIFEST))
        self._leftovers.add(folder)
        delete_folder(folder)
        self._leftovers.discard(folder)

    def _clear(self, folder: str) -> None:
        """Makes room for a checkpoint where there may be files of an earlier one, whole or not."""
        files = {file.name for file in list_files(folder)}
        if not files:
            return
        try:
            self._remove(folder)
        except PermissionError:
            # Where writing is allowed and deleting is not: files are replaced, and until then the manifest names none.
            if MANIFEST in files:
                self._manifests.pop(folder, None)
                write_bytes(join(folder, MANIFEST), b"{}")

    def _info(self, folder: str, files: Mapping[str, StoredFile]) -> CheckpointInfo | None:
        """What is known of a checkpoint with these files; None where it is not whole."""
        try:
            manifest = self._manifest(folder, files)
            expected = {name: entry["bytes"] for name, entry in manifest["files"].items()}
            found = {name: files[name].num_bytes if name in files else None for name in expected}
            if found != expected:
                raise ValueError(f"sizes {found}, expected {expected}")
        except (NoSuchObject, ValueError, KeyError) as error:
            if folder not in self._passed_over | self._leftovers:
                logger.warning("%s is no whole checkpoint and is passed over: %s", folder, error)
                self._passed_over.add(folder)
            return None
        return CheckpointInfo(
            manifest["step"],
            folder,
            manifest["metrics"],
            manifest["details"],
            manifest["files"],
            manifest.get("evaluation_due", False),  # these three are not in manifests of earlier releases
            manifest.get("evaluation_problem", ""),
            manifest.get("measured_on", {}),
        )

    def _manifest(self, folder: str, files: Mapping[str, StoredFile]) -> dict[str, Any]:
        if MANIFEST not in files:
            raise ValueError(f"it has no {MANIFEST}")
        known = self._manifests.get(folder)
        if known is None or known[0] != files[MANIFEST]:
            known = self._manifests[folder] = files[MANIFEST], json.loads(read_bytes(join(folder, MANIFEST)))
        return known[1]


def _write(path: str, content: Any) -> dict[str, Any]:
    """Saves one file of a checkpoint; gives its entry in the manifest."""

    def fill(stream: BinaryIO) -> dict[str, Any]:
        file = _HashingFile(stream)
        try:
            torch.save(content, file)  # type: ignore[arg-type]
        except RuntimeError as error:
            # torch's zip writer reports a failed write as a RuntimeError of its own
            raise file.error or OSError(f"{path}: {error}") from error
        return {"bytes": file.bytes, "sha256": file.sha256.hexdigest()}

    return write(path, fill)
