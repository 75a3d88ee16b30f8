"""What the tests share: where the reference data lies, and a path to the helpers in this folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# The models of the tests are tiny: more threads only wait for each other. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

sys.path.insert(0, str(Path(__file__).parent))

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real COCO images (``coco128/``) and golden numbers (``golden/``), beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the reference data is not here: no folder {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def coco128(shared_data: Path) -> Path:
    """The first 128 images of COCO train2017 with their annotations."""
    return shared_data / "coco128"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Says which tests share a process where several run at once: those of a file, and all that start Ray.

    Those with Ray share one, and take longest: they begin first.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    items.sort(key=lambda item: not _starts_ray(item))
    for item in items:
        group = "ray" if _starts_ray(item) else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))


def _starts_ray(item: pytest.Item) -> bool:
    folders = {parent.name for parent in item.path.relative_to(Path(__file__).parent).parents}
    return item.get_closest_marker("ray") is not None or not folders.isdisjoint({"runtime", "cluster"})
