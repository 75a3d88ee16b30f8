"""Writes checkpoints atomically to a local disk or an object store, and removes old ones.

A checkpoint is a folder ``step_00001234/`` with its files and, written last, ``manifest.json`` with their sizes and
hashes. Folders without a manifest that agrees with the files are ignored. The files are written by ``torch.save`` from
plain dictionaries and read with ``weights_only``, so loading never runs code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa

from detr_ray.addresses import join, parent, resolve
from detr_ray.engine.checkpoints.info import MANIFEST, CheckpointInfo, best_of, highest, manifest_text, scored
from detr_ray.engine.errors import CheckpointError
from detr_ray.locations import (
    StoredFile,
    delete_file,
    delete_folder,
    list_files,
    make_folder,
    read_buffer,
    read_bytes,
    write,
    write_bytes,
)
from detr_ray.retries import NoSuchObject, reason_of

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_BEST_BY = "val/AP"
"""The metric that decides which checkpoint is best; higher is better."""

_HELD = "held"
"""An empty file in the folder of a checkpoint that is not to be removed."""

_FILE = re.compile(r"(step_\d{8,})/(.+)")


class _HashingFile:
    """A write-only file for ``torch.save`` that counts and hashes the bytes."""

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
    """The checkpoints of one run. Only one process at a time may write.

    Finding the checkpoints takes one listing of the root. A manifest is read only if it is new or has changed.

    Args:
        root: folder or URI (``s3://``, ``gs://``, any pyarrow file system) with the ``step_*`` folders.
    """

    def __init__(self, root: str) -> None:
        self.root = resolve(root)
        self._manifests: dict[str, tuple[StoredFile, dict[str, Any]]] = {}
        self._passed_over: set[str] = set()
        self._leftovers: set[str] = set()  # folders whose manifest was removed, but not all other files
        self._refused: dict[str, OSError] = {}  # folders that may not be removed

    def save(
        self,
        step: int,
        files: Mapping[str, Any],
        details: Mapping[str, Any],
        *,
        evaluation_due: bool = False,
        held: bool = False,
    ) -> CheckpointInfo:
        """Writes a checkpoint.

        Args:
            step: optimizer steps taken; an earlier checkpoint of the same step is replaced.
            files: file name -> what ``torch.save`` writes into it.
            details: small JSON values, stored in the manifest.
            evaluation_due: whether these weights are to be evaluated. The checkpoint is not removed before that
                (`annotate`).
            held: whether it is not removed before it is released (`release`).

        Raises:
            OSError: it could not be written. Nothing of it remains; earlier checkpoints are not changed.
        """
        folder = join(self.root, f"step_{step:08d}")
        self._clear(folder)
        self._leftovers.discard(folder)
        try:
            make_folder(folder)
            written = {name: _write(join(folder, name), content) for name, content in files.items()}
            if held:
                write_bytes(join(folder, _HELD), b"")
            info = CheckpointInfo(step, folder, None, dict(details), written, evaluation_due, held=held)
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
        """Notes the metrics of a checkpoint's evaluation, or (without ``metrics``) why it failed and is not repeated.

        Args:
            info: the checkpoint.
            metrics: the numbers.
            problem: why there are none.
            measured_on: data and settings of the evaluation, as JSON values, which decide whether it is compared with
                others (`measured_alike`).

        Raises:
            OSError: it could not be noted; the manifest is as it was.
        """
        info = info.with_scores(metrics, problem, measured_on)
        self._write_manifest(info)
        return info

    def write_beside(self, folder: str, name: str, content: bytes) -> None:
        """Writes a file into a checkpoint's folder, beside those that its manifest lists.

        Raises:
            OSError: it could not be written.
        """
        write_bytes(join(folder, name), content)

    def checkpoints(self) -> list[CheckpointInfo]:
        """All complete checkpoints, oldest first. Incomplete ones are ignored with a warning.

        Raises:
            OSError: the storage does not answer or denies access.
        """
        folders: dict[str, dict[str, StoredFile]] = {}
        for file in list_files(self.root):
            if found := _FILE.fullmatch(file.name):
                folders.setdefault(found[1], {})[found[2]] = file
        infos = [self._info(join(self.root, name), files) for name, files in folders.items()]
        return sorted((info for info in infos if info is not None), key=lambda info: info.step)

    def latest(self) -> CheckpointInfo | None:
        """The newest checkpoint."""
        found = self.checkpoints()
        return found[-1] if found else None

    def best(self) -> CheckpointInfo | None:
        """The checkpoint with the highest metric among those comparable with the newest; the earliest of equals."""
        return self.best_of(self.checkpoints())

    def best_of(self, found: Iterable[CheckpointInfo]) -> CheckpointInfo | None:
        """The best of some checkpoints; see `best`."""
        return best_of(found, _BEST_BY)

    def load(self, info: CheckpointInfo, name: str, map_location: str | torch.device = "cpu") -> Any:
        """Reads one file of a checkpoint, with ``weights_only``.

        Raises:
            CheckpointError: the file is missing or was changed.
            OSError: the storage fails.
        """
        path = join(info.path, name)
        try:
            data = read_buffer(path, info.files[name]["bytes"])
        except NoSuchObject as error:
            raise CheckpointError(f"{path}: cannot be read: {reason_of(error)}") from error
        if hashlib.sha256(data).hexdigest() != info.files[name]["sha256"]:
            raise CheckpointError(f"{path}: its content is not what was written (hash differs); remove {info.path}")
        import torch  # seconds, which commands that only look do without

        return torch.load(pa.BufferReader(data), map_location=map_location, weights_only=True)

    def prune(self, keep_last: int, found: list[CheckpointInfo] | None = None, also: Collection[int] = ()) -> None:
        """Removes old checkpoints. The best, the newest, held ones and those that must still be evaluated stay.

        If the data or settings of evaluations have changed, the best of each group of comparable checkpoints stays.

        Args:
            keep_last: number of newest checkpoints that stay.
            found: the checkpoints, oldest first; None: they are listed.
            also: steps of further checkpoints that stay.

        Raises:
            OSError: some could not be removed; the others were. If removing is not permitted, it is not repeated.
        """
        found = self.checkpoints() if found is None else found
        known = scored(found, _BEST_BY)
        bests = [highest((info for info in known if info.compares_with(each)), _BEST_BY) for each in known]
        kept = {*also, *(info.step for info in bests if info is not None)}
        problem: OSError | None = None
        for info in found[: max(len(found) - keep_last, 0)]:
            if info.unscored or info.held or info.step in kept:
                continue
            problem = self._try_to_remove(info.path) or problem
        for folder in list(self._leftovers):
            problem = self._try_to_remove(folder) or problem
        if problem is not None:
            raise problem

    def _write_manifest(self, info: CheckpointInfo) -> None:
        # Times in a bucket are in seconds, so a new manifest of the same size may look unchanged.
        self._manifests.pop(info.path, None)
        write_bytes(join(info.path, MANIFEST), manifest_text(info).encode())

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
        # The manifest is deleted first: after an interruption, the remaining files are no checkpoint.
        delete_file(join(folder, MANIFEST))
        self._leftovers.add(folder)
        delete_folder(folder)
        self._leftovers.discard(folder)

    def _clear(self, folder: str) -> None:
        """Removes an earlier checkpoint, complete or not, from a folder."""
        files = {file.name for file in list_files(folder)}
        if not files:
            return
        try:
            self._remove(folder)
        except PermissionError:
            # Deleting is not permitted: the files will be overwritten. An empty manifest marks them as no checkpoint.
            if MANIFEST in files:
                self._manifests.pop(folder, None)
                write_bytes(join(folder, MANIFEST), b"{}")

    def _info(self, folder: str, files: Mapping[str, StoredFile]) -> CheckpointInfo | None:
        """The metadata of a checkpoint with these files; None if it is incomplete."""
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
            held=_HELD in files,
        )

    def _manifest(self, folder: str, files: Mapping[str, StoredFile]) -> dict[str, Any]:
        if MANIFEST not in files:
            raise ValueError(f"it has no {MANIFEST}")
        known = self._manifests.get(folder)
        if known is None or known[0] != files[MANIFEST]:
            known = self._manifests[folder] = files[MANIFEST], json.loads(read_bytes(join(folder, MANIFEST)))
        return known[1]


def checkpoint_at(folder: str) -> CheckpointInfo | None:
    """The checkpoint in a folder, wherever the folder was copied to; None if it is not whole.

    Raises:
        OSError: the storage does not answer or denies access.
    """
    files = {file.name: file for file in list_files(folder)}
    return CheckpointStore(parent(folder))._info(resolve(folder), files)


def release(checkpoint: str) -> None:
    """Lets a checkpoint that was held be removed when its run removes old ones. Any process may do this.

    Args:
        checkpoint: its folder.

    Raises:
        OSError: the storage fails.
    """
    delete_file(join(checkpoint, _HELD))


def _write(path: str, content: Any) -> dict[str, Any]:
    """Writes one file of a checkpoint and returns its entry for the manifest."""
    import torch

    def fill(stream: BinaryIO) -> dict[str, Any]:
        file = _HashingFile(stream)
        try:
            torch.save(content, file)  # type: ignore[arg-type]
        except RuntimeError as error:
            # torch's zip writer turns a failed write into a RuntimeError
            raise file.error or OSError(f"{path}: {error}") from error
        return {"bytes": file.bytes, "sha256": file.sha256.hexdigest()}

    return write(path, fill)
