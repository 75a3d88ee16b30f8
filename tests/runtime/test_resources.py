"""How many workers a run gets, against clusters that run here: one node, nodes of several kinds, an autoscaler."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import yaml
from cluster_driver import ClusterSpec, Driver, LocalCluster, start_node
from tiny import TINY

from detr_ray.check import main
from detr_ray.config import Config, ConfigError, load_config
from detr_ray.runtime.resources import WorkerRequest, plan_workers
from detr_ray.runtime.session import warm_data_workers

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def config(*overrides: str) -> Config:
    return load_config(None, [*TINY, "train.launcher=ray", "train.global_batch_size=16", *overrides])


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        plan_workers(config(*overrides))
    return str(refused.value)


@pytest.fixture
def idle_ray(shared_ray: None) -> None:
    """The Ray of all tests while nothing takes its CPUs: when it starts, the warming of its processes does."""
    ray.get(warm_data_workers(1))  # begins after those that were begun with Ray
    give_up = time.monotonic() + 60
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < give_up, ray.available_resources()
        time.sleep(0.2)


@pytest.mark.usefixtures("idle_ray")
class TestOneNode:
    """The Ray of all tests: four CPUs or more, no GPU."""

    def test_what_fits_is_given(self) -> None:
        request = plan_workers(config("train.num_workers=2"))
        assert (request.min_workers, request.max_workers, request.use_gpu) == (2, 2, False)
        assert request.resources_per_worker == {"CPU": 1} and request.missing() == ""
        assert request.scaling_config(30).num_workers == 2
        assert plan_workers(config()).max_workers == 1, "without GPUs, one worker where none are asked for"

    def test_a_range_needs_room_for_its_least(self) -> None:
        request = plan_workers(config("train.num_workers=[1, 16]"))
        scaling = request.scaling_config(7)
        assert scaling.num_workers == (1, 16) and scaling.elastic_resize_monitor_interval_s == 7
        assert refusal("train.num_workers=[9, 16]").startswith("train.num_workers: 9 workers need 9 CPUs")

    def test_what_never_fits_is_refused_with_what_there_is(self) -> None:
        assert "need 8 CPUs and one more for data tasks; the cluster has " in refusal("train.num_workers=8")
        text = refusal("train.num_workers=2", "train.worker_resource=trainer")
        assert "need 2 CPUs, 2 trainer and one more for data tasks" in text and "0 trainer (1 node: " in text
        assert "the cluster has no GPU" in refusal("train.use_gpu=true")
        assert "the cluster has no GPU" in refusal("train.use_gpu=true", "train.num_workers=2")

    def test_the_check_command_says_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        settings = [*TINY, "train.launcher=ray", f"data.root={tmp_path}/none", f"run.storage={tmp_path}/runs"]
        report = tmp_path / "report.json"
        for workers, level in ((2, "ok"), (8, "error")):
            main(["--cluster", "--json", str(report), *settings, f"train.num_workers={workers}"])
            found = [one for one in json.loads(report.read_text())["findings"] if one["area"] == "cluster"]
            assert found[0]["level"] == level and f"{workers} " in found[0]["message"]
            assert [one for one in found if "is written and read" in one["message"]]
        assert not (tmp_path / "runs").exists()


def test_room_is_counted_node_by_node() -> None:
    request = WorkerRequest(2, 2, True, {"GPU": 1.0, "trainer": 1.0})
    gpus, trainers, both = {"CPU": 4, "GPU": 2}, {"CPU": 4, "trainer": 2}, {"CPU": 4, "GPU": 2, "trainer": 1}
    assert request.room([gpus, trainers]) == 0
    assert request.room([gpus, both, trainers]) == 1
    assert request.room([{"GPU": 2, "trainer": 2}]) == 0, "no CPU for data tasks"
    halves = WorkerRequest(1, 1, False, {"CPU": 1.0})
    assert halves.room([{"CPU": 0.5}, {"CPU": 0.5}]) == 0
    assert halves.room([{"CPU": 2}, {"CPU": 1}]) == 2, "one CPU of the three is for data tasks"


@pytest.fixture
def folder() -> Iterator[Path]:
    folder = Path(f"/tmp/dr-room-{os.getpid()}")
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config(f"data.root={folder}").to_dict()))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_nodes_of_several_kinds_and_one_that_leaves(folder: Path) -> None:
    with LocalCluster(folder / "c") as cluster:
        cluster.up(ClusterSpec(nodes=2, cpus_per_node=2))
        start_node(cluster, "gpus", "--num-cpus", "1", "--num-gpus", "2")
        start_node(cluster, "trainers", "--num-cpus", "2", "--num-gpus", "0", "--resources", '{"trainer": 2}')
        driver = Driver(cluster.client_environment(), folder, folder / "config.yaml")
        try:
            assert driver("plan", "train.use_gpu=null")["said"] == ["2 to 2", ""], "one for each GPU"
            assert driver("plan", "train.num_workers=4")["said"] == ["4 to 4", ""]
            both = driver("plan", "train.use_gpu=true", "train.worker_resource=trainer", "train.num_workers=2")["error"]
            assert "the cluster has 2 GPUs, 2 trainer, 5 CPUs (4 nodes: " in both
            assert "which is room for 0 (each takes 1 GPU, 1 trainer of one node)" in both

            cluster.drain_node("node-1", deadline_s=600)
            left = driver("plan", "train.num_workers=4")["error"]
            assert "the cluster has 3 (3 nodes: gpus 1 CPU, head 0 CPUs, trainers 2 CPUs), which is room for 2" in left
        finally:
            driver.close()


@pytest.mark.slow
def test_a_request_larger_than_the_cluster_waits_for_an_autoscaler(folder: Path) -> None:
    with LocalCluster(folder / "c") as cluster:
        cluster.up(ClusterSpec(autoscale=(0, 3), cpus_per_node=2))
        driver = Driver(cluster.client_environment(), folder, folder / "config.yaml")
        try:
            accepted = driver("plan", "train.num_workers=5")
            assert accepted["said"] == [
                "5 to 5",
                "room for 0 of 5 workers now, which need 5 CPUs and one more for data tasks; free: head 0 CPUs; "
                "the autoscaler may add nodes",
            ]
            gpus = driver("plan", "train.num_workers=2", "train.use_gpu=true")
            assert gpus["said"][0] == "2 to 2", gpus
            assert "no GPU worker has room in the cluster now" in driver("plan", "train.use_gpu=true")["error"]
        finally:
            driver.close()
