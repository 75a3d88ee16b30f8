"""Shards of a few images each, which the real writer would put into one."""

from __future__ import annotations

import pytest

from detr_ray.data import packing
from detr_ray.data.index import DatasetIndex


def write_small_shards(index: DatasetIndex, uri: str, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes shards that are closed after so many images."""
    read_groups = packing._read_groups
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_GROUP_IMAGES", images)
        patch.setattr(
            packing, "_read_groups", lambda reader, start, end, most, note: read_groups(reader, start, end, 1, note)
        )
        packing.write_shards(index, uri)
