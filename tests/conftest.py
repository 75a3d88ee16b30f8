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
