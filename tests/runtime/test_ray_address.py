"""What RAY_ADDRESS may say, and where a Ray of our own keeps its files; no Ray is started here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_port

from detr_ray.config import ConfigError
from detr_ray.runtime.cluster_address import cluster_address
from detr_ray.runtime.session import own_temporary_folder, unreachable_address

TINY_RUN = ["data.root=nowhere", "model.backbone_weights=none", "model.backbone_norm=batch", "tracking.enabled=false"]


@pytest.mark.parametrize("address", ["", "local", " "])
def test_a_ray_of_our_own(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster_address() is None and unreachable_address() is None


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "head.example:6379", "[::1]:6379"])
def test_clusters(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster_address() == address


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nonsense", "is no address of a Ray cluster"),
        ("10.0.0.1", "is no address of a Ray cluster"),
        ("10.0.0.1:", "is no address of a Ray cluster"),
        (":6379", "is no address of a Ray cluster"),
        ("10.0.0.1:port", "is no address of a Ray cluster"),
        ("10.0.0.1:99999", "is no address of a Ray cluster"),
        ("10.0.0.1:0", "is no address of a Ray cluster"),
        ("::1:6379", "is no address of a Ray cluster"),
        ("10.0.0.1:6379/x", "is no address of a Ray cluster"),
        ("AUTO", "is no address of a Ray cluster"),
        ("me:hidden@10.0.0.1:6379", "is no address of a Ray cluster"),
        ("ray://10.0.0.1:10001", "a Ray client server, through which training cannot run"),
        ("http://10.0.0.1:8265", "a job server, through which training cannot run"),
        ("http://me:hidden@10.0.0.1:8265", "RAY_API_SERVER_ADDRESS"),
    ],
)
def test_other_addresses_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, address: str, said: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError) as refused:
        cluster_address()
    (line,) = refused.value.errors
    assert line.startswith("RAY_ADDRESS: ") and said in line and "HOST:PORT" in line
    assert "\n" not in line and "hidden" not in line


def test_hosts_that_are_not_there_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    for host in ("127.0.0.1", "[::1]", "x" * 70, "a..b"):
        monkeypatch.setenv("RAY_ADDRESS", f"{host}:{port}")
        assert f"no cluster answers at {host}:{port}" in str(unreachable_address())


@pytest.mark.parametrize("command", ["train", "check"])
def test_commands_end_with_one_line(tmp_path: Path, command: str) -> None:
    (tmp_path / "nowhere").mkdir()
    arguments = [sys.executable, "-m", f"detr_ray.{command}", *TINY_RUN, *(["--cluster"] if command == "check" else [])]
    environment = os.environ | {"RAY_ADDRESS": "nonsense"}
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    said = done.stderr if command == "train" else done.stdout
    assert "RAY_ADDRESS: 'nonsense' is no address of a Ray cluster; name a running cluster" in said, done
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == (2 if command == "train" else 1)


def test_sockets_have_short_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp/short")
    assert own_temporary_folder() is None
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 100)))
    assert own_temporary_folder() == "/tmp/ray"
    monkeypatch.setenv("TMPDIR", "/tmp/" + "ä" * 20)  # 45 bytes, of which sockets' limit counts each
    assert own_temporary_folder() == "/tmp/ray"
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("y" * 100)))
    with pytest.raises(ConfigError, match=r"RAY_TMPDIR: .*yyy is too long a path for Ray's sockets; set RAY_TMPDIR to"):
        own_temporary_folder()
