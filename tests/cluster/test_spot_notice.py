"""A cloud's notice is understood, and reaches Ray."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "spot_notice.py"


@pytest.fixture(scope="module")
def spot_notice() -> ModuleType:
    spec = importlib.util.spec_from_file_location("spot_notice", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Metadata(ThreadingHTTPServer):
    """Answers as the metadata servers of the clouds do, and refuses requests that they would refuse."""

    notice: str | None = None
    preempted = "FALSE"
    asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        asks_for_token = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._send(200 if asks_for_token else 404, "the-token")

    def do_GET(self) -> None:
        self.server.asked += 1
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers["X-aws-ec2-metadata-token"] != "the-token":
                self._send(401, "")
            else:
                self._send(404 if self.server.notice is None else 200, self.server.notice or "")
        elif self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            self._send(200, self.server.preempted)
        else:
            self._send(403, "")

    def _send(self, status: int, body: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata(("127.0.0.1", 0), _Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def aws_notice(seconds: float) -> str:
    return json.dumps(
        {"action": "terminate", "time": f"{datetime.now(UTC) + timedelta(seconds=seconds):%Y-%m-%dT%H:%M:%SZ}"}
    )


def test_what_aws_says(spot_notice: ModuleType, metadata: Metadata) -> None:
    assert spot_notice.seconds_left_on_aws(metadata.url) is None
    metadata.notice = aws_notice(120)
    assert 117 < spot_notice.seconds_left_on_aws(metadata.url) <= 120


def test_what_google_cloud_says(spot_notice: ModuleType, metadata: Metadata) -> None:
    assert spot_notice.seconds_left_on_gcp(metadata.url) is None
    metadata.preempted = "TRUE"
    assert spot_notice.seconds_left_on_gcp(metadata.url) == 30


def test_a_refusal_is_no_notice_and_is_said(spot_notice: ModuleType, metadata: Metadata) -> None:
    with pytest.raises(OSError, match="403"):
        spot_notice.seconds_left_on_gcp(f"{metadata.url}/elsewhere")


@pytest.mark.ray
@pytest.mark.slow
def test_the_notice_drains_the_node(metadata: Metadata, tmp_path: Path) -> None:
    """A node of a real cluster, on which a task runs, is drained with the deadline of the notice."""
    script = tmp_path / "cluster.py"
    script.write_text(CLUSTER_WITH_A_BUSY_NODE)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment.pop("RAY_ADDRESS", None)
    cluster = subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert cluster.stdin is not None and cluster.stdout is not None
    try:
        address, node_id = next(line for line in cluster.stdout if line.startswith("ready")).split()[1:]
        watcher = subprocess.Popen(
            [sys.executable, str(SCRIPT), "aws", "--address", address, "--node-id", node_id, "--every", "0.2",
             "--metadata", metadata.url],
            env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        while metadata.asked < 2:
            assert watcher.poll() is None
        metadata.notice = aws_notice(100)
        said, _ = watcher.communicate(timeout=120)
        assert watcher.returncode == 0, said
        cluster.stdin.write("\n")
        cluster.stdin.flush()
        drained = json.loads(next(line for line in cluster.stdout if line.startswith("{")))
        assert list(drained) == [node_id]
        assert 0 < drained[node_id] / 1000 - datetime.now(UTC).timestamp() < 96
    finally:
        cluster.stdin.close()
        cluster.wait(timeout=60)


CLUSTER_WITH_A_BUSY_NODE = """
import json, sys, time
import ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20})
node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
ray.init(address=cluster.address, log_to_driver=False)

@ray.remote(num_cpus=1)
class Busy:
    def here(self):
        return ray.get_runtime_context().get_node_id()

busy = Busy.remote()
assert ray.get(busy.here.remote()) == node.node_id
print("ready", cluster.address, node.node_id, flush=True)
sys.stdin.readline()
print(json.dumps(ray._private.worker.global_worker.gcs_client.get_draining_nodes()), flush=True)
sys.stdin.readline()
ray.shutdown()
cluster.shutdown()
"""


def test_a_head_that_does_not_answer_is_asked_again(
    spot_notice: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = tmp_path / "ray"
    ray.write_text("#!/bin/sh\nexec sleep 60\n")
    ray.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(spot_notice, "ANSWER_WITHIN_S", 0.2)
    assert spot_notice.drain("127.0.0.1:1", None, 30.0) is False
    ray.write_text("#!/bin/sh\nexit 0\n")
    assert spot_notice.drain("127.0.0.1:1", None, 30.0) is True
