"""A real S3 server for tests: moto's, in a process of its own, behind a layer that fails requests and counts them.

    from s3_server import s3, s3_server  # noqa: F401  (fixtures; in a conftest.py)

    def test_something(s3):                            # its address and credentials are in the environment
        bucket = s3.new_bucket()
        uri = s3.upload(folder, f"{bucket}/coco")      # s3://BUCKET/coco
        s3.set_faults(share=0.05, seed=1)
        s3.requests()                                  # what was asked for since the last `forget`

Without pytest: ``with S3Server() as server: os.environ.update(server.environment)``.

Faults are drawn for each request from a seeded generator: ``503 SlowDown``, a connection that is reset before the
answer, and an answer that breaks off in its middle.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

FAULTS = ("slow_down", "reset", "truncated")
_CONTROL = "/-/"
_DENIED = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
_SLOW_DOWN = "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass(frozen=True)
class Request:
    """One request that the server got.

    Attributes:
        kind: GET, HEAD, PUT, POST, DELETE, or LIST for a listing.
        path: bucket and key.
        range: first and last byte asked for; None for the whole object.
        fault: how it was failed on purpose; empty where it was answered.
    """

    kind: str
    path: str
    range: tuple[int, int] | None
    fault: str


class S3Server:
    """The server, seen from the tests. Starts with `start` or ``with``; ends with its process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._num_buckets = 0
        self.endpoint = ""

    def start(self) -> S3Server:
        """Starts the server and waits until it answers."""
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("http://"):
            raise RuntimeError(f"the S3 server did not start: {line!r}")
        self.endpoint = line.strip()
        return self

    def stop(self) -> None:
        """Ends the server; everything in it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=30)
            self._process = None

    def __enter__(self) -> S3Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables by which a process finds this server, and is let in."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def create_bucket(self, name: str) -> None:
        """Makes a bucket; one that is there stays."""
        self._ask("PUT", f"/{name}", b"")

    def new_bucket(self) -> str:
        """Makes a bucket of its own; gives back its name."""
        self._num_buckets += 1
        name = f"bucket-{self._num_buckets}"
        self.create_bucket(name)
        return name

    def put(self, path: str, content: bytes) -> None:
        """Stores an object; the path starts with the bucket."""
        self._ask("PUT", "/" + urllib.parse.quote(path), content)

    def get(self, path: str) -> bytes:
        """Content of an object."""
        return self._ask("GET", "/" + urllib.parse.quote(path))

    def delete(self, path: str) -> None:
        """Deletes an object."""
        self._ask("DELETE", "/" + urllib.parse.quote(path))

    def upload(self, folder: Path, path: str) -> str:
        """Stores a folder's files under a path (bucket first); gives back its URI."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.put(f"{path}/{file.relative_to(folder).as_posix()}", file.read_bytes())
        return f"s3://{path}"

    def keys(self, path: str) -> list[str]:
        """Paths of all objects under a path, bucket first."""
        bucket, _, prefix = path.partition("/")
        return json.loads(self._ask("GET", f"{_CONTROL}keys?bucket={bucket}&prefix={urllib.parse.quote(prefix)}"))

    def set_faults(
        self,
        share: float = 0.0,
        seed: int = 0,
        kinds: Iterable[str] = FAULTS,
        *,
        only: str = "",
        first: int = 0,
        denied: Iterable[str] = (),
        read_only: str | None = None,
        forbidden: str | None = None,
        silent: str | None = None,
        latency_s: float = 0.0,
    ) -> None:
        """Says which requests fail from now on; without arguments, none.

        Args:
            share: of all requests, 0..1.
            seed: of the draws.
            kinds: which of `FAULTS`.
            only: fail requests alone whose "KIND path" contains this.
            first: fail the first so many of these requests, whatever the share.
            denied: refuse requests whose "KIND path" contains any of these; a request to delete several objects is a
                DELETE of their bucket.
            read_only: refuse to write and to delete under this path.
            forbidden: refuse everything under this path.
            silent: never answer anything under this path.
            latency_s: wait before each answer.
        """
        faults = {
            "share": share, "seed": seed, "kinds": list(kinds), "only": only, "first": first, "denied": list(denied),
            "read_only": read_only, "forbidden": forbidden, "silent": silent, "latency_s": latency_s,
        }  # fmt: skip
        self._ask("POST", f"{_CONTROL}faults", json.dumps(faults).encode())

    def requests(self) -> list[Request]:
        """All requests since the last `forget`, in the order they came in."""
        rows = json.loads(self._ask("GET", f"{_CONTROL}requests"))
        return [
            Request(kind, path, None if span is None else (span[0], span[1]), fault) for kind, path, span, fault in rows
        ]

    def counts(self) -> dict[str, int]:
        """Number of requests of each kind since the last `forget`."""
        return dict(collections.Counter(request.kind for request in self.requests()))

    def most_at_once(self) -> int:
        """Most requests that were under way at the same time since the last `forget`."""
        return json.loads(self._ask("GET", f"{_CONTROL}most"))

    def forget(self) -> None:
        """Starts counting anew."""
        self._ask("POST", f"{_CONTROL}forget", b"")

    def _ask(self, method: str, path: str, content: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.endpoint + path, data=content, method=method)
        request.add_header("X-Not-Counted", "1")
        # Signed by anyone: what the server does not check, it wants to see.
        request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request")
        request.add_header("Content-Type", "application/octet-stream")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One server for all tests of a process."""
    with S3Server() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The server, without faults, its requests forgotten; its address and credentials are in the environment."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    s3_server.forget()
    yield s3_server
    s3_server.set_faults()


# What runs in the server's process.


class FaultyLayer:
    """Passes requests on to the S3 application, but for those that are to fail, and writes down what came in."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._lock = threading.Lock()
        self._requests: list[tuple[str, str, tuple[int, int] | None, str]] = []
        self._faults: dict[str, Any] = {"share": 0.0}
        self._draws = random.Random(0)
        self._under_way = self._most = 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path.startswith(_CONTROL):
            return self._control(path.removeprefix(_CONTROL), environ, start_response)
        if environ.get("HTTP_X_NOT_COUNTED"):
            return self._application(environ, start_response)
        with self._lock:
            self._under_way += 1
            self._most = max(self._most, self._under_way)
        try:
            return self._answer(_kind(environ), path.strip("/"), environ, start_response)
        finally:
            with self._lock:
                self._under_way -= 1

    def _answer(
        self, kind: str, path: str, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        with self._lock:
            faults, fault = self._faults, self._fault(kind, path)
            self._requests.append((kind, path, _range(environ), fault))
        if faults.get("latency_s"):
            time.sleep(faults["latency_s"])
        if fault == "silent":
            self._say_nothing(faults)
            return _answer(start_response, "503 Slow Down", _SLOW_DOWN)
        if fault == "denied":
            return _answer(start_response, "403 Forbidden", _DENIED)
        if fault == "slow_down":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return _answer(start_response, "503 Slow Down", _SLOW_DOWN)
        if fault == "reset":
            _reset(environ["werkzeug.socket"])
            raise ConnectionResetError  # which the server takes as the client's doing
        if fault == "truncated":
            return self._truncated(environ, start_response)
        return self._application(environ, start_response)

    def _fault(self, kind: str, path: str) -> str:
        faults = self._faults
        for name, hit in (("silent", "silent"), ("forbidden", "denied")):
            if faults.get(name) is not None and path.startswith(faults[name]):
                return hit
        if any(part in f"{kind} {path}" for part in faults.get("denied", ())):
            return "denied"
        read_only = faults.get("read_only")
        if read_only is not None and path.startswith(read_only) and kind in ("PUT", "POST", "DELETE"):
            return "denied"
        if faults.get("only", "") not in f"{kind} {path}":
            return ""
        if faults.get("first", 0) > 0:
            faults["first"] -= 1
            return self._draws.choice(faults["kinds"])
        return self._draws.choice(faults["kinds"]) if self._draws.random() < faults["share"] else ""

    def _say_nothing(self, faults: dict[str, Any]) -> None:
        """Waits until other faults are set; nobody counts on such a request any more."""
        with self._lock:
            self._under_way -= 1
        while self._faults is faults:
            time.sleep(0.1)
        with self._lock:
            self._under_way += 1

    def _truncated(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        """The right answer, up to its middle."""
        body = b"".join(self._application(environ, start_response))
        yield body[: len(body) // 2]
        _reset(environ["werkzeug.socket"])

    def _control(self, verb: str, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        content = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        answer: Any = None
        with self._lock:
            if verb == "faults":
                self._faults = json.loads(content)
                self._draws = random.Random(self._faults["seed"])
            elif verb == "forget":
                self._requests.clear()
                self._most = 0
            elif verb == "most":
                answer = self._most
            elif verb == "requests":
                answer = self._requests
            elif verb == "keys":
                query = dict(urllib.parse.parse_qsl(environ["QUERY_STRING"]))
                answer = _keys(query["bucket"], query.get("prefix", ""))
        return _answer(start_response, "200 OK", json.dumps(answer))


def _keys(bucket: str, prefix: str) -> list[str]:
    from moto.core.models import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    stored = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[bucket].keys
    return [f"{bucket}/{key}" for key in sorted(stored) if key.startswith(prefix)]


def _kind(environ: dict[str, Any]) -> str:
    query = urllib.parse.parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    is_listing = environ["REQUEST_METHOD"] == "GET" and "/" not in environ["PATH_INFO"].strip("/")
    if "delete" in query:
        return "DELETE"
    return "LIST" if is_listing or "list-type" in query else environ["REQUEST_METHOD"]


def _range(environ: dict[str, Any]) -> tuple[int, int] | None:
    value = environ.get("HTTP_RANGE", "")
    if not value.startswith("bytes="):
        return None
    first, _, last = value.removeprefix("bytes=").partition("-")
    return int(first), int(last or -1)


def _answer(start_response: Callable[..., Any], status: str, body: str) -> list[bytes]:
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body.encode()]


def _reset(connection: socket.socket) -> None:
    """Ends a connection without a word more."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.shutdown(socket.SHUT_RDWR)


def _serve() -> None:
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *arguments: object) -> None:
            """Says nothing."""

    logging.disable(logging.CRITICAL)
    application = FaultyLayer(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    # The tests' process holds the other end of the standard input: the server ends when that process does.
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    _serve()
