"""What the tests share: where the reference data lies, and a path to the helpers in this folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small drawn data set in COCO's layout, which no test changes."""
    from tiny import make_dataset  # tests on a GPU do without most of what it imports

    return make_dataset(tmp_path_factory.mktemp("data") / "shapes")


# Tests that start Ray. Where several tests run at once (`make test`), these share a process, and begin first: they take
# the longest.
WITH_RAY = ("runtime/", "cluster/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Has the tests that start Ray begin first."""
    items.sort(key=lambda item: not _starts_ray(item.nodeid))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which tests on a GPU do without
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Has the tests of a file share a process, and all that start Ray. Its marks of groups do nothing in pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if _starts_ray(nodeid) else nodeid.partition("::")[0]

    return ByFile(config, log)


def _starts_ray(nodeid: str) -> bool:
    return nodeid.removeprefix("tests/").startswith(WITH_RAY)
