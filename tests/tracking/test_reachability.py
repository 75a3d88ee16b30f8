"""Trying MLflow stores: servers that answer, refuse, stay silent or are something else; databases and folders."""

from __future__ import annotations

import base64
import contextlib
import http.server
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from detr_ray.tracking.reachability import UnreachableError, try_store


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


@contextlib.contextmanager
def server(status: int, body: bytes) -> Iterator[tuple[str, list]]:
    """A server that gives one answer to everything, and what it was asked."""
    asked: list[http.server.BaseHTTPRequestHandler] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_is_asked_for_its_experiments_with_the_users_name(monkeypatch):
    with server(200, b'{"experiments": []}') as (uri, asked):
        assert try_store(f"{uri}/below/") == f"{uri}/below/ answers"
        assert try_store(uri.replace("//", "//me:secret@")) == f"{uri} answers"
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abc")
        try_store(uri)
    assert asked[0].path == "/below/api/2.0/mlflow/experiments/search?max_results=1"
    assert asked[0].headers["Authorization"] is None
    assert asked[1].headers["Authorization"] == "Basic " + base64.b64encode(b"me:secret").decode()
    assert asked[2].headers["Authorization"] == "Bearer abc"


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b"<html>welcome</html>", "answers, but not as an MLflow server does"),
        (200, b"[]", "answers, but not as an MLflow server does"),
        (404, b"", "answers 404 Not Found: is it an MLflow server"),
        (401, b"", "refuses this user (401); set MLFLOW_TRACKING_USERNAME"),
    ],
)
def test_servers_that_are_of_no_use(status, body, message):
    with server(status, body) as (uri, _), pytest.raises(UnreachableError) as raised:
        try_store(uri)
    assert message in str(raised.value)


def test_a_dead_port_and_a_silent_server_are_told_soon():
    with pytest.raises(UnreachableError, match=r"does not answer .*refused"):
        try_store(f"http://me:secret@127.0.0.1:{free_port()}")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UnreachableError, match=r"does not answer .*timed out"):
            try_store(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.5)


def test_passwords_are_not_shown():
    with pytest.raises(UnreachableError) as raised:
        try_store(f"http://me:secret@127.0.0.1:{free_port()}")
    assert "secret" not in str(raised.value)


def test_a_database_that_is_not_there_needs_a_folder_that_can_be_written(tmp_path):
    assert try_store(f"sqlite:///{tmp_path}/new/folder/mlflow.db").endswith("is made by the first run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UnreachableError, match="cannot be written"):
        try_store(f"sqlite:///{tmp_path}/file/mlflow.db")


def test_databases_of_mlflow_are_told_from_others(tmp_path):
    for name, table in (("mlflow.db", "experiments"), ("shop.db", "customers")):
        with contextlib.closing(sqlite3.connect(tmp_path / name)) as connection:
            connection.execute(f"create table {table} (id integer)")
    (tmp_path / "text.db").write_text("no database at all, but long enough to have a header of one")
    assert try_store(f"sqlite:///{tmp_path}/mlflow.db") == f"{tmp_path}/mlflow.db can be written"
    with pytest.raises(UnreachableError, match="a database of something else"):
        try_store(f"sqlite:///{tmp_path}/shop.db")
    with pytest.raises(UnreachableError, match="not a database"):
        try_store(f"sqlite:///{tmp_path}/text.db")


def test_folders_and_other_addresses(tmp_path):
    assert try_store(f"file://{tmp_path}/mlruns") == f"{tmp_path}/mlruns can be written"
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:\d+ does not answer"):
        try_store(f"postgresql+psycopg2://me:secret@127.0.0.1:{free_port()}/mlflow")
    assert "of a kind that is not tried" in try_store("databricks://profile")


@pytest.mark.slow
def test_a_real_server_answers(tmp_path: Path):
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--artifacts-destination", str(tmp_path)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while True:
            try:
                assert try_store(f"http://127.0.0.1:{port}") == f"http://127.0.0.1:{port} answers"
                break
            except UnreachableError:
                assert time.monotonic() < until, "the server does not start"
                time.sleep(0.5)
    finally:
        process.terminate()
        process.wait(30)
