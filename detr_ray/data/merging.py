"""Several data sets as one: images one after another, classes of the same name as one class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from detr_ray.data.errors import DataError
from detr_ray.data.index import PROBLEMS, DatasetIndex, ShardPlaces, Sources


def merge(indexes: Sequence[DatasetIndex]) -> DatasetIndex:
    """Makes one data set of several.

    Classes are the same where their names are, whatever the case of letters and spaces around them. The first data set
    keeps its category ids; classes that it lacks keep theirs where these are free, and get the next ones otherwise.
    Images and annotations are numbered anew, in the order of the data sets.

    Args:
        indexes: at least one.

    Raises:
        DataError: images lie in folders and in shards.
    """
    if len({index.shards is None for index in indexes}) > 1:
        raise DataError(
            "data.sources: some of the data sets are shards and some are not: pack all of them "
            "(`python -m detr_ray.prepare --shards`), or none"
        )
    categories = merged_categories([index.categories for index in indexes])
    ids = {_key(name): category_id for category_id, name in categories}
    counts = [len(index) for index in indexes]
    return DatasetIndex(
        image_ids=np.arange(1, sum(counts) + 1),
        heights=np.concatenate([index.heights for index in indexes]),
        widths=np.concatenate([index.widths for index in indexes]),
        file_names=pa.concat_arrays([index.file_names for index in indexes]),
        first_box=np.concatenate([[0], np.concatenate([np.diff(index.first_box) for index in indexes]).cumsum()]),
        boxes_xywh_px=np.concatenate([index.boxes_xywh_px for index in indexes]),
        category_ids=np.concatenate([_renumbered(index, ids) for index in indexes]),
        areas=np.concatenate([index.areas for index in indexes]),
        is_crowd=np.concatenate([index.is_crowd for index in indexes]),
        annotation_ids=np.arange(1, sum(len(index.category_ids) for index in indexes) + 1),
        categories=categories,
        source=" + ".join(index.source for index in indexes),
        shards=_merged_shards([index.shards for index in indexes if index.shards is not None]),
        follow_links=any(index.follow_links for index in indexes),
        sources=Sources(
            tuple(index.source for index in indexes),
            tuple(index.images_root for index in indexes if index.images_root is not None),
            np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        ),
        problems={kind: sum(index.problems.get(kind, 0) for index in indexes) for kind in PROBLEMS},
    )


def merged_categories(categories: Sequence[Sequence[tuple[int, str]]]) -> tuple[tuple[int, str], ...]:
    """The classes of several data sets as (id, name); see `merge`."""
    names: dict[str, str] = {}
    ids: dict[str, int] = {}
    for of_one in categories:
        for category_id, name in of_one:
            key = _key(name)
            if key not in ids:
                taken = set(ids.values())
                ids[key] = category_id if category_id not in taken else max(taken) + 1
                names[key] = name
    return tuple(sorted((ids[key], names[key]) for key in ids))


def _key(name: str) -> str:
    return name.strip().lower()


def _renumbered(index: DatasetIndex, ids: dict[str, int]) -> np.ndarray:
    """The category ids of an index's annotations as those of the merged data set."""
    known = np.array([category_id for category_id, _ in index.categories], np.int64)
    new = np.array([ids[_key(name)] for _, name in index.categories], np.int64)
    return new[np.searchsorted(known, index.category_ids)]


def _merged_shards(shards: Sequence[ShardPlaces]) -> ShardPlaces | None:
    if not shards:
        return None
    before = np.cumsum([0, *(len(places.files) for places in shards)])
    return replace(
        shards[0],
        files=tuple(file for places in shards for file in places.files),
        file_of=np.concatenate([places.file_of + first for places, first in zip(shards, before, strict=False)]),
        offsets=np.concatenate([places.offsets for places in shards]),
        lengths=np.concatenate([places.lengths for places in shards]),
    )
