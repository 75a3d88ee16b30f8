"""Training submitted to a cluster by ``ray job submit``: on nodes that are there, and on nodes that the job brings."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest
from submitting import ClusterSpec, LocalCluster, end_of_job, running_cluster, start_job

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 30


def quickstart(folder: Path, *settings: str) -> list[str]:
    """The quickstart with fewer images, into a folder that all nodes have."""
    return [
        "python", "-m", "detr_ray.train", "--config", "configs/quickstart.yaml", f"data.root={folder}/data",
        f"run.storage={folder}/runs", "train.epochs=1", f"data.generate.num_train={16 * STEPS}",
        "data.generate.num_val=50", "train.log_every_steps=5", "train.num_workers=2", *settings,
    ]  # fmt: skip


def training_addresses(cluster: LocalCluster) -> set[str]:
    """Addresses of the nodes on which training workers ran, from the dashboard's Train page."""
    workers: list[str] = []

    def collect(part: object, inside_workers: bool = False) -> None:
        if isinstance(part, dict):
            if "world_rank" in part:
                workers.append(part["node_ip"])
            for value in part.values():
                collect(value)
        elif isinstance(part, list):
            for value in part:
                collect(value)

    collect(cluster.ask("/api/train/v2/runs/v1"))
    return set(workers)


def test_the_quickstart_runs_on_a_cluster_of_three_nodes(tmp_path: Path) -> None:
    with running_cluster(ClusterSpec(nodes=3, cpus_per_node=2)) as cluster:
        wrong = end_of_job(start_job(cluster, *quickstart(tmp_path, "train.num_wrokers=2")))
        code, text = end_of_job(start_job(cluster, *quickstart(tmp_path, "run.name=submitted")))
        assert code == 0, text
        assert f"finished {STEPS} steps" in text and f"step {STEPS}/{STEPS}" in text and "AP50" in text
        job = text[text.index("Running entrypoint") :]
        assert "\r" not in job and "\x1b" not in job, "a log is no terminal"
        others = {node.address for node in cluster.nodes() if node.name != "head"}
        assert training_addresses(cluster) <= others, "the head trains nothing"
        assert training_addresses(cluster)
        assert (tmp_path / "runs" / "submitted" / "checkpoints").is_dir()

    code, text = wrong
    assert code == 1 and "unknown key 'train.num_wrokers'" in text and "exit code 2" in text, text


class Timeline:
    """Notes when the number of a cluster's nodes changes."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.entries: list[tuple[float, int, str]] = []
        self._start = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def nodes(self) -> int:
        """Nodes beside the head that Ray has now."""
        return sum(node.alive and node.name != "head" for node in self.cluster.nodes())

    def note(self, event: str, nodes: int | None = None) -> None:
        """Notes an event."""
        self.entries.append((time.monotonic() - self._start, self.nodes() if nodes is None else nodes, event))

    def wait_for(self, nodes: int, seconds: float) -> bool:
        """Waits until there are so many nodes."""
        deadline = time.monotonic() + seconds
        while self.nodes() != nodes and time.monotonic() < deadline:
            time.sleep(0.5)
        return self.nodes() == nodes

    def end(self) -> str:
        """Stops watching; a line for each event."""
        self._done.set()
        self._thread.join(timeout=30)
        return "\n".join(f"{seconds:6.1f} s  {nodes} nodes  {event}" for seconds, nodes, event in sorted(self.entries))

    def _watch(self) -> None:
        before = self.nodes()
        while not self._done.wait(0.5):
            now = self.nodes()
            if now != before:
                self.note(f"{abs(now - before)} {'came' if now > before else 'left'}", now)
            before = now


def test_the_autoscaler_brings_nodes_for_a_job_and_takes_them_away(tmp_path: Path) -> None:
    with running_cluster(ClusterSpec(autoscale=(0, 2), cpus_per_node=2, idle_minutes=0.2)) as cluster:
        timeline = Timeline(cluster)
        timeline.note("the head alone")
        job = start_job(cluster, *quickstart(tmp_path, "run.name=scaled"))
        timeline.note("job submitted")
        assert job.stdout is not None
        text = ""
        for line in iter(job.stdout.readline, b""):
            text += line.decode()
            if re.search(rf"step (1|{STEPS})/{STEPS}", line.decode()):
                timeline.note(line.decode().split("  loss")[0].split("  ")[-1])
        code, _ = end_of_job(job)
        timeline.note(f"job ended with exit code {code}")
        assert code == 0 and f"finished {STEPS} steps" in text, text
        alone = timeline.wait_for(nodes=0, seconds=120)
        shown = timeline.end()
        print("\n" + shown)
        assert alone, shown
        assert timeline.entries[0][1] == 0 and max(nodes for _, nodes, _ in timeline.entries) >= 1, shown
        assert training_addresses(cluster) <= {node.address for node in cluster.nodes() if node.name != "head"}
        assert cluster.ask("/api/train/v2/runs/v1")
