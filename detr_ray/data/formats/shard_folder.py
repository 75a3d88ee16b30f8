"""A folder with the shards of each split in a folder of its name, as the prepare command writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from detr_ray.data.formats.assembly import Reading
from detr_ray.data.formats.folder import Folder
from detr_ray.data.formats.shards import INDEX_NAME, read_shard_index
from detr_ray.data.index import DatasetIndex
from detr_ray.data.known_folders import SPLIT_NAMES

NAME = "shards"
NEEDS = "shards: train/index.parquet and val/index.parquet, as the prepare command writes them"


@dataclass(frozen=True)
class ShardFolder:
    """A data set in shards.

    Attributes:
        folder: its folder.
        splits: which of ``train`` and ``val`` there are.
    """

    folder: Folder
    splits: Sequence[str]

    def first_image(self, split: str) -> str | None:
        """Name of the first shard below the folder."""
        return f"{split}/shard-00000.parquet"

    def read(self, split: str, reading: Reading) -> DatasetIndex:
        """Reads a split; see `read_shard_index`."""
        return read_shard_index(self.folder.location(split))


def find(folder: Folder) -> ShardFolder | None:
    """The data set that lies in a folder in this format; None if it does not look like it."""
    splits = [split for split in SPLIT_NAMES if folder.has(f"{split}/{INDEX_NAME}")]
    return ShardFolder(folder, splits) if splits else None
