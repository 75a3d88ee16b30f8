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
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import torch
from pyarrow import fs

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FOLDER = re.compile(r"step_(\d{8,})$")


class CheckpointError(RuntimeError):
    """A checkpoint that should be there is damaged or unreadable; the message names its files."""


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What is known of a whole checkpoint without loading it.

    Attributes:
        step: optimizer steps taken.
        path: folder, on the store's file system.
        metrics: what an evaluation of these weights gave; None where there was none yet.
        details: whatever the writer noted (epoch, world size, ...).
        files: name -> {"bytes", "sha256"}.
    """

    step: int
    path: str
    metrics: dict[str, float] | None
    details: dict[str, Any]
    files: dict[str, dict[str, Any]]


class _HashingFile:
    """A write-only file that counts and hashes what goes through it; enough of a file for ``torch.save``."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self._stream.write(data)
        self.sha256.update(data)
        self.bytes += memoryview(data).nbytes
        return memoryview(data).nbytes

    def flush(self) -> None:
        self._stream.flush()


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        root: folder or URI (``s3://``, ``gs://``, any pyarrow file system) that holds the ``step_*`` folders.
        metric: name of the metric that says which checkpoint is best; higher is better.
    """

    def __init__(self, root: str, metric: str = "val/AP") -> None:
        if "://" in root:
            self._fs, self._root = fs.FileSystem.from_uri(root)
        else:
            self._fs, self._root = fs.LocalFileSystem(), str(Path(root).absolute())
        self._local = isinstance(self._fs, fs.LocalFileSystem)
        self.metric = metric

    def save(self, step: int, files: Mapping[str, Any], details: Mapping[str, Any]) -> CheckpointInfo:
        """Writes a checkpoint.

        Args:
            step: optimizer steps taken; an earlier checkpoint of the same step is replaced.
            files: file name -> what ``torch.save`` writes into it.
            details: small JSON values kept in the manifest.

        Raises:
            OSError: it could not be written; nothing of it stays, and earlier checkpoints are as they were.
        """
        folder = f"{self._root}/step_{step:08d}"
        self._remove(folder)
        self._fs.create_dir(folder, recursive=True)
        try:
            written = {name: self._write(f"{folder}/{name}", content) for name, content in files.items()}
            manifest = {"step": step, "metrics": None, "details": dict(details), "files": written}
            self._write_manifest(folder, manifest)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                self._remove(folder)
            if isinstance(error, OSError):
                raise
            # torch's zip writer reports a failed write as a RuntimeError of its own
            raise OSError(f"{folder}: {error}") from error
        return CheckpointInfo(step, folder, None, dict(details), written)

    def annotate(self, info: CheckpointInfo, metrics: Mapping[str, float]) -> CheckpointInfo:
        """Notes what an evaluation of a checkpoint's weights gave."""
        manifest = {"step": info.step, "metrics": dict(metrics), "details": info.details, "files": info.files}
        self._write_manifest(info.path, manifest)
        return CheckpointInfo(info.step, info.path, dict(metrics), info.details, info.files)

    def checkpoints(self) -> list[CheckpointInfo]:
        """Every whole checkpoint, oldest first; half-written ones are passed over with a warning."""
        found = []
        for entry in self._fs.get_file_info(fs.FileSelector(self._root, allow_not_found=True)):
            if entry.type == fs.FileType.Directory and _FOLDER.search(entry.base_name):
                info = self._read_info(entry.path)
                if info is not None:
                    found.append(info)
        return sorted(found, key=lambda info: info.step)

    def latest(self) -> CheckpointInfo | None:
        """The checkpoint to go on from."""
        found = self.checkpoints()
        return found[-1] if found else None

    def best(self) -> CheckpointInfo | None:
        """The checkpoint with the highest metric; the earliest of equals."""
        return self._best_of(self.checkpoints())

    def _best_of(self, found: list[CheckpointInfo]) -> CheckpointInfo | None:
        scored = [info for info in found if info.metrics and self.metric in info.metrics]
        return max(scored, key=lambda info: (info.metrics[self.metric], -info.step), default=None)  # type: ignore[index]

    def load(self, info: CheckpointInfo, name: str, map_location: str | torch.device = "cpu") -> Any:
        """Reads one file of a checkpoint back, with ``weights_only``.

        Raises:
            CheckpointError: its bytes are not those that were written.
        """
        path = f"{info.path}/{name}"
        try:
            with self._fs.open_input_file(path) as stream:
                data = stream.read_buffer()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        if hashlib.sha256(data).hexdigest() != info.files[name]["sha256"]:
            raise CheckpointError(f"{path}: its content is not what was written (hash differs); remove {info.path}")
        return torch.load(pa.BufferReader(data), map_location=map_location, weights_only=True)

    def prune(self, keep_last: int) -> None:
        """Removes all but the best and the last few whole checkpoints."""
        found = self.checkpoints()
        best = self._best_of(found)
        for info in found[: max(len(found) - keep_last, 0)]:
            if best is None or info.step != best.step:
                self._remove(info.path)

    def _write(self, path: str, content: Any) -> dict[str, Any]:
        with self._fs.open_output_stream(path) as stream:
            file = _HashingFile(stream)
            torch.save(content, file)  # type: ignore[arg-type]
        self._sync(path)
        return {"bytes": file.bytes, "sha256": file.sha256.hexdigest()}

    def _write_manifest(self, folder: str, manifest: Mapping[str, Any]) -> None:
        # Written beside and moved over: a reader sees the old or the new one, never half of one.
        temporary = f"{folder}/{MANIFEST}.tmp"
        with self._fs.open_output_stream(temporary) as stream:
            stream.write(json.dumps(manifest, indent=1).encode())
        self._sync(temporary)
        self._fs.move(temporary, f"{folder}/{MANIFEST}")
        self._sync(folder)

    def _sync(self, path: str) -> None:
        if self._local:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _remove(self, folder: str) -> None:
        if self._fs.get_file_info(folder).type == fs.FileType.NotFound:
            return
        # The manifest goes first: what is left after an interruption is no checkpoint any more.
        manifest = f"{folder}/{MANIFEST}"
        if self._fs.get_file_info(manifest).type != fs.FileType.NotFound:
            self._fs.delete_file(manifest)
        self._fs.delete_dir(folder)

    def _read_info(self, folder: str) -> CheckpointInfo | None:
        try:
            with self._fs.open_input_file(f"{folder}/{MANIFEST}") as stream:
                manifest = json.loads(stream.read())
            sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
            actual = {name: self._fs.get_file_info(f"{folder}/{name}").size for name in sizes}
        except (OSError, ValueError, KeyError) as error:
            logger.warning("%s is no whole checkpoint and is passed over: %s", folder, error)
            return None
        if actual != sizes:
            logger.warning("%s is no whole checkpoint and is passed over: sizes %s, expected %s", folder, actual, sizes)
            return None
        return CheckpointInfo(manifest["step"], folder, manifest["metrics"], manifest["details"], manifest["files"])
