"""What a driver finds out about a real cluster of three nodes, one of which is odd.

The odd node has its own mounts (an empty folder where the others have the shared one, and a read-only one), another
version of this package, and no way to the bucket.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from cluster_driver import ClusterSpec, Driver, LocalCluster, start_node
from s3_server import S3Server
from tiny import TINY, make_dataset

import detr_ray
from detr_ray.config import load_config

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]

# Mounts for this process and its children alone, as root or as a user who may play root among its own processes.
UNSHARE = ("unshare", "--mount", *(() if os.geteuid() == 0 else ("--map-root-user",)))


def own_mounts_are_allowed() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0


class Place:
    """The cluster, and folders that its nodes see differently."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cluster = LocalCluster(folder / "c")
        self.shared, self.lonely, self.read_only = (folder / name for name in ("shared", "lonely", "read_only"))
        for path in (self.shared, self.lonely, self.read_only):
            path.mkdir(parents=True)
        self.data = make_dataset(folder / "data")
        shutil.copytree(self.data, self.lonely / "data")
        self.config = folder / "config.yaml"
        config = load_config(
            None, [*TINY, "train.launcher=ray", f"data.root={self.data}", f"run.storage={self.shared}/runs"]
        )
        self.config.write_text(yaml.safe_dump(config.to_dict()))

    def add_odd_node(self) -> None:
        """Starts it, marked as one of the cluster's, so that it ends with it."""
        package = self.folder / "other" / "detr_ray"
        shutil.copytree(ROOT / "detr_ray", package, ignore=shutil.ignore_patterns("__pycache__"))
        init = package / "__init__.py"
        init.write_text(init.read_text().replace(detr_ray.__version__, "0.0.9"))
        mounts = f"mount -t tmpfs none {self.lonely} && mount --bind {self.read_only} {self.read_only}"
        mounts += f" && mount -o remount,bind,ro {self.read_only}"
        start_node(
            self.cluster, "odd", "--num-cpus", "1", "--num-gpus", "0",
            before=[*UNSHARE, "sh", "-c", f'{mounts} && exec "$@"', "sh"],
            settings={"PYTHONPATH": str(package.parent), "AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
        )  # fmt: skip


@pytest.fixture(scope="module")
def bucket() -> Iterator[S3Server]:
    with S3Server() as server:
        server.create_bucket("bucket")
        yield server


@pytest.fixture(scope="module")
def place(bucket: S3Server) -> Iterator[Place]:
    if not own_mounts_are_allowed():
        pytest.skip("mounts of one's own are not allowed here")
    folder = Path(f"/tmp/dr-check-{os.getpid()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for key, value in bucket.environment.items():
            patch.setenv(key, value)
        place = Place(folder)
        try:
            with place.cluster:
                place.cluster.up(ClusterSpec(nodes=2, cpus_per_node=2))
                place.add_odd_node()
                yield place
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def driver(place: Place, bucket: S3Server) -> Iterator[Driver]:
    environment = place.cluster.client_environment() | bucket.environment
    driver = Driver(environment, place.folder, place.config)
    yield driver
    driver.close()


def test_a_node_with_another_version_is_named(driver: Driver) -> None:
    (error,) = driver.errors()
    assert error.startswith(f"detr_ray is 0.0.9 on odd, {detr_ray.__version__} here")


def test_training_is_refused_on_it_too_and_nothing_is_left_behind(driver: Driver, place: Place) -> None:
    result = driver("train")
    assert "detr_ray is 0.0.9 on odd" in result["error"]
    assert not (place.shared / "runs").exists()


def test_a_storage_that_one_node_does_not_see_is_named(driver: Driver, place: Place) -> None:
    errors = driver.errors(f"run.storage={place.lonely}/runs")
    expected = f"run.storage: {place.lonely}/runs is not shared: node odd does not see what was written here"
    assert [error for error in errors if error.startswith(expected)], errors


def test_a_storage_that_one_node_may_not_write_is_named(driver: Driver, place: Place) -> None:
    errors = driver.errors(f"run.storage={place.read_only}")
    expected = f"run.storage: {place.read_only} cannot be written on node odd: Read-only file system"
    assert [error for error in errors if error.startswith(expected)], errors
    assert list(place.read_only.iterdir()) == []


def test_images_that_one_node_does_not_see_are_named(driver: Driver, place: Place) -> None:
    errors = driver.errors(f"data.root={place.lonely}/data")
    expected = f"data.root (val): {place.lonely}/data/val2017/000001000001.jpg cannot be read on odd: No such file"
    assert [error for error in errors if error.startswith(expected)], errors


def test_a_bucket_that_one_node_does_not_reach_is_named(driver: Driver, bucket: S3Server) -> None:
    errors = driver.errors("run.storage=s3://bucket/runs")
    expected = "run.storage: s3://bucket/runs cannot be read on node odd: "
    assert [error for error in errors if error.startswith(expected) and "connect" in error], errors
    assert not bucket.keys("bucket/runs")


def test_a_bucket_that_never_answers_is_given_up(place: Place, driver: Driver) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        address = f"s3://bucket/runs?endpoint_override=127.0.0.1:{port}&scheme=http"
        errors = driver.errors(f"run.storage={address}")
    assert [error for error in errors if "cannot be used from here: no answer within" in error], errors


def test_a_tracking_server_that_does_not_answer_is_an_error_of_the_check_and_a_warning_of_training(
    driver: Driver,
) -> None:
    away = ("tracking.enabled=true", "tracking.uri=http://127.0.0.1:9")
    expected = "tracking: from head, node-1, odd: http://127.0.0.1:9 does not answer"
    assert [error for error in driver.errors(*away) if error.startswith(expected)]
    result = driver("train", *away)
    assert [line for line in result["said"] if line.startswith(f"WARNING: {expected}")]
    assert "tracking" not in result["error"]


def test_an_impossible_request_says_what_there_is(driver: Driver) -> None:
    (error, *_) = driver.errors("train.num_workers=8")
    assert error.startswith("train.num_workers: 8 workers need 8 CPUs and one more for data tasks; the cluster has 3 (")
    assert "head 0 CPUs, node-1 2 CPUs, odd 1 CPU" in error


def test_a_folder_that_goes_away_with_the_job_is_refused(driver: Driver, place: Place) -> None:
    folder = place.folder / "s/runtime_resources/working_dir_files/_ray_pkg_0/runs"
    assert "run.storage: " in driver.errors(f"run.storage={folder}")[0]
    assert "deletes after it" in driver("train", f"run.storage={folder}")["error"]


def test_the_command_joins_the_cluster_and_its_exit_code_says_what_was_found(place: Place, bucket: S3Server) -> None:
    command = [sys.executable, "-m", "detr_ray.check", "--config", str(place.config), "--cluster", "--json", "-"]
    environment = place.cluster.client_environment() | bucket.environment
    done = subprocess.run(
        [*command, "train.worker_resource=trainer"], env=environment, cwd=place.folder, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    messages = [found["message"] for found in json.loads(done.stdout)["findings"] if found["area"] == "cluster"]
    assert "the cluster has 3 CPUs, 0 trainer (3 nodes: " in messages[0]


def test_an_address_without_a_cluster_is_told_in_time(place: Place) -> None:
    command = [sys.executable, "-m", "detr_ray.check", "--config", str(place.config), "--cluster"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port, said in ((9, "Connection refused"), (silent.getsockname()[1], "timed out")):
            environment = place.cluster.client_environment() | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
            done = subprocess.run(command, env=environment, cwd=place.folder, capture_output=True, text=True)
            assert done.returncode == 1
            assert f"no cluster answers at 127.0.0.1:{port} (RAY_ADDRESS): {said}" in done.stdout


def test_a_node_that_does_not_answer_is_named_in_time(driver: Driver, place: Place) -> None:
    (raylet,) = [process for process in place.cluster.processes("odd") if process.name() == "raylet"]
    # Its own workers would answer without it.
    stopped = [raylet, *raylet.children(recursive=True)]
    for process in stopped:
        process.send_signal(signal.SIGSTOP)
    try:
        result, trained = driver("check"), driver("train")
    finally:
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
    assert result["seconds"] < 30
    errors = [message for level, message in result["findings"] if level == "error"]
    assert [error for error in errors if error.startswith("node odd ")], errors
    assert trained["error"] == "", "training goes on without it"
