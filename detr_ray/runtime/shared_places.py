"""The driver's part of checking what all nodes must reach: storage, images and tracking store."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from pathlib import Path

from detr_ray.addresses import is_uri, join
from detr_ray.config import Config, ConfigError
from detr_ray.data.formats import SplitPlaces, first_image
from detr_ray.data.image_places import refuse_link_outside
from detr_ray.engine.preflight.writing import first_missing, within
from detr_ray.locations import delete_file, delete_folder, list_files, make_folder
from detr_ray.printable import printable
from detr_ray.retries import Patience
from detr_ray.runtime.node_probe import read_file, write_file
from detr_ray.tracking.store import sqlite_path

_UPLOADED = "/runtime_resources/working_dir_files/"
_ONCE = Patience(attempts=1)


def refuse_lost_storage(storage: str) -> None:
    """Refuses a storage folder that Ray deletes after the job.

    Raises:
        ConfigError: it is inside the folder that ``ray job submit --working-dir`` created for the job.
    """
    if _UPLOADED in storage:
        raise ConfigError(
            f"run.storage: {storage} is in the copy of the working folder that Ray made for this job, and deletes "
            "after it; set run.storage to a folder that stays and that all nodes share, or to a bucket (s3://..., "
            "gs://...)"
        )


class StorageTrial:
    """A test of the storage: each node reads a file that the driver wrote, and the driver reads one from each node.

    Args:
        storage: absolute folder or URI.
        nodes: ids of the nodes.
    """

    def __init__(self, storage: str, nodes: Sequence[str]) -> None:
        self._storage = storage
        name = f".check-{secrets.token_hex(4)}"
        self._from_driver = join(storage, f"{name}-driver")
        self._from_nodes = {node: join(storage, f"{name}-{node}") for node in nodes}
        self._made: str | None = None
        self._usable = False

    def begin(self) -> None:
        """Writes the driver's file.

        Raises:
            ConfigError: no file system is supported for this address.
            OSError: the file cannot be written or read back.
        """
        self._made = first_missing(self._storage, _ONCE)
        make_folder(self._storage, _ONCE)
        write_file(self._from_driver, b"driver")
        read_file(self._from_driver, 1)
        self._usable = True

    def files_for(self, node: str) -> tuple[str, str] | None:
        """The file for a node to read, and the one for it to write; None if the driver cannot use the storage."""
        return (self._from_driver, self._from_nodes[node]) if self._usable else None

    def unseen(self, seconds: float) -> set[str]:
        """The nodes whose file the driver cannot read; empty if the storage does not answer in time."""
        if not self._usable:
            return set()

        def look() -> set[str]:
            return {node for node, location in self._from_nodes.items() if not _readable(location)}

        try:
            return within(seconds, look)
        except OSError:
            return set()

    def end(self, seconds: float) -> None:
        """Deletes the files and folders of the test."""

        def clean() -> None:
            for location in (self._from_driver, *self._from_nodes.values()):
                delete_file(location, _ONCE)
            if self._made is not None and not list_files(self._made, _ONCE):
                delete_folder(self._made, _ONCE)

        with contextlib.suppress(OSError, ConfigError):
            within(seconds, clean)


def _readable(location: str) -> bool:
    try:
        read_file(location, 1)
    except OSError:
        return False
    return True


def sample_files(config: Config) -> tuple[dict[str, str], dict[str, str]]:
    """One image or shard of each split, because every node must be able to read them for data tasks.

    Returns:
        Configuration key -> file, and configuration key -> why no file could be found. Annotation files are not
        included: only the driver reads them.
    """
    data, files, faults = config.data, {}, {}
    wanted: list[tuple[str, str | None, SplitPlaces | None, str | None, str]] = [
        ("train", source.root, None if source.root else source, source.format, f"data.sources[{number}]")
        for number, source in enumerate(data.sources)
    ]
    wanted += [(split, data.root, data.places(split), data.format, "") for split in ("train", "val")]
    for split, data_root, places, data_format, named in wanted:
        if places is None and data_root is None:
            continue
        key = named or (f"data.root ({split})" if places is None else f"data.{split}.images")
        try:
            root, name, key_of_place = first_image(data_root, places, split, data.follow_links, data_format)
            key = named or key_of_place
            location = join(root, name)
            if not data.follow_links and not is_uri(root):
                refuse_link_outside(root, name, printable(location))
            files[key] = location
        except (ValueError, OSError) as error:
            faults[key] = str(error)
    return files, faults


def tracking_on_disk(uri: str, storage: str) -> Path | None:
    """The SQLite file of a tracking store, if it is outside the storage: other nodes may not reach it. Else None."""
    path = sqlite_path(uri)
    if path is None or (not is_uri(storage) and path.is_relative_to(storage)):
        return None
    return path
