"""The S3 server, for the tests of this folder."""

from __future__ import annotations

import pytest
from s3_server import s3, s3_server  # noqa: F401

from detr_ray.engine.checkpoints import run_lock


@pytest.fixture(autouse=True)
def claims_are_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is on this machine: whoever claims a run in this process need not wait until others see it."""
    monkeypatch.setattr(run_lock, "SETTLE_S", 0.1)
