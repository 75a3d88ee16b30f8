"""Trying MLflow stores: servers that answer, refuse, stay silent or are something else; databases and folders."""

from __future__ import annotations

import base64
import contextlib
import http.server
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_port

from detr_ray.tracking.reachability import UnreachableError, UnusableError, try_store
from detr_ray.tracking.store import sqlite_uri


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


def make_database(path: Path, *statements: str) -> Path:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return path


def test_databases_of_mlflow_are_told_from_others(tmp_path, empty_database):
    assert try_store(f"sqlite:///{empty_database}") == f"{empty_database} can be written"
    shutil.copy(empty_database, tmp_path / "odd %20?#.db")
    assert try_store(sqlite_uri(tmp_path / "odd %20?#.db")).endswith("odd %20?#.db can be written")
    make_database(tmp_path / "new.db")
    assert try_store(f"sqlite:///{tmp_path}/new.db").endswith("can be written"), "MLflow makes its tables in it"

    make_database(tmp_path / "shop.db", "create table customers (id integer)")
    make_database(tmp_path / "diary.db", "create table experiments (id integer)")
    (tmp_path / "text.db").write_text("no database at all, but long enough to have a header of one")
    for name, reason in (("shop", "something else"), ("diary", "something else"), ("text", "not a database")):
        with pytest.raises(UnusableError, match=reason):
            try_store(f"sqlite:///{tmp_path}/{name}.db")
    with pytest.raises(UnusableError, match="is a folder"):
        try_store(f"sqlite:///{tmp_path}")


def test_tables_of_another_mlflow_are_refused_with_what_to_do(tmp_path, empty_database):
    older, newer = (Path(shutil.copy(empty_database, tmp_path / f"{name} it.db")) for name in ("older", "newer"))
    make_database(older, "update alembic_version set version_num = 'c48cb773bb87'")
    make_database(newer, "update alembic_version set version_num = 'f00000000000'")
    with pytest.raises(UnusableError, match=f"older MLflow.*`mlflow db upgrade 'sqlite:///{older}'`"):
        try_store(sqlite_uri(older))
    with pytest.raises(UnusableError, match="newer MLflow"):
        try_store(sqlite_uri(newer))


def test_a_database_that_is_held_is_away_and_not_useless(tmp_path, empty_database):
    path = shutil.copy(empty_database, tmp_path / "held.db")
    with contextlib.closing(sqlite3.connect(path)) as holder:
        holder.execute("begin immediate")
        with pytest.raises(UnreachableError, match="locked") as raised:
            try_store(f"sqlite:///{path}", timeout_s=0.1)
    assert not isinstance(raised.value, UnusableError)


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="needs root, to become somebody else")
def test_a_database_that_cannot_be_written_is_refused(tmp_path_factory, empty_database):
    folder = Path(tempfile.mkdtemp())  # whose parents anybody may enter
    try:
        shutil.copy(empty_database, folder / "mlflow.db")
        folder.chmod(0o755)
        (folder / "mlflow.db").chmod(0o644)
        program = (
            "import os, sys\nfrom detr_ray.tracking.reachability import try_store, UnusableError\n"
            "os.setuid(65534)\n"
            "try:\n    print(try_store('sqlite:///' + sys.argv[1]))\nexcept UnusableError as error:\n    print(error)\n"
        )
        for mode, name in ((0o755, "mlflow.db"), (0o755, "new/other.db")):
            folder.chmod(mode)
            done = subprocess.run(
                [sys.executable, "-c", program, str(folder / name)], capture_output=True, text=True, check=True
            )
            assert "; set tracking.uri" in done.stdout and "cannot be" in done.stdout, done
    finally:
        shutil.rmtree(folder)


NEVER = {
    "./mlruns": "is a folder to MLflow",
    "/data/mlruns": "is a folder to MLflow",
    "file:///data/mlruns": "is a folder to MLflow",
    "mlflow.example.com": "is a folder to MLflow",
    "localhost:5000": "set tracking.uri to http://localhost:5000",
    "127.0.0.1:5000": "set tracking.uri to http://127.0.0.1:5000",
    "me:secret@localhost:5000": "set tracking.uri to http://localhost:5000",
    "http://localhost:99999": "no address of a server",
    "http://localhost:port": "no address of a server",
    "http://": "no address of a server",
    "http://local host:5000": "no address of a server",
    "htp://localhost:5000": "of no kind that MLflow records in",
    "s3://bucket/mlflow": "of no kind that MLflow records in",
    "postgres://me:secret@localhost/mlflow": "set tracking.uri to postgresql://...",
    "mysql+nonsense://localhost/mlflow": "no address of a database",
    "sqlite://": "names no file",
    "sqlite:///:memory:": "names no file",
    "sqlite://relative.db": "names no file",
    "sqlite:relative.db": "names no file",
    "databricks": "needs credentials",
    "databricks://profile": "needs credentials",
    "databricks-uc": "of no kind that MLflow records in",
}


@pytest.mark.parametrize("uri", NEVER)
def test_what_can_never_record_is_refused_in_one_line(uri, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UnusableError) as raised:
        try_store(uri)
    assert NEVER[uri] in str(raised.value)
    assert "secret" not in str(raised.value) and "\n" not in str(raised.value)
    assert "set " in str(raised.value), "says what to do"


def test_folders_are_taken_where_mlflow_takes_them(monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert "MLFLOW_ALLOW_FILE_STORE" in try_store("./mlruns")


def test_a_database_needs_its_client(monkeypatch):
    with pytest.raises(UnusableError, match=r"needs the package psycopg2, which is not installed: pip install"):
        try_store("postgresql+psycopg2://me:secret@127.0.0.1:1/mlflow")
    monkeypatch.setitem(sys.modules, "psycopg2", types.SimpleNamespace(paramstyle="pyformat"))
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:\d+ does not answer"):
        try_store(f"postgresql+psycopg2://me:secret@127.0.0.1:{free_port()}/mlflow")


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
