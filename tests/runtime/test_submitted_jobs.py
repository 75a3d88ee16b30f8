"""Training submitted to a cluster by ``ray job submit``: on nodes that are there, and on nodes that the job brings."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from submitting import ClusterSpec, LocalCluster, end_of_job, ray_job, running_cluster, start_job

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

    collect(cluster.get_json("/api/train/v2/runs/v1"))
    return set(workers)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with running_cluster(ClusterSpec(nodes=3, cpus_per_node=2)) as cluster:
        yield cluster


def test_the_quickstart_runs_on_a_cluster_of_three_nodes(cluster: LocalCluster, tmp_path: Path) -> None:
    code, text = end_of_job(start_job(cluster, *quickstart(tmp_path, "run.name=submitted")))
    assert code == 0, text
    assert f"finished {STEPS} steps" in text and f"step {STEPS}/{STEPS}" in text and "AP50" in text
    job = text[text.index("Running entrypoint") :]
    print("\n" + job)
    assert "\r" not in job and "\x1b" not in job, "a log is no terminal"
    trained_on = training_addresses(cluster)
    assert trained_on and trained_on <= {node.address for node in cluster.nodes() if node.name != "head"}
    assert (tmp_path / "runs" / "submitted" / "checkpoints").is_dir()


def test_a_wrong_key_fails_the_job_and_is_shown(cluster: LocalCluster, tmp_path: Path) -> None:
    code, text = end_of_job(start_job(cluster, *quickstart(tmp_path, "train.num_wrokers=2")))
    assert code == 1 and "unknown key 'train.num_wrokers'" in text and "exit code 2" in text, text


def test_a_stopped_job_leaves_a_checkpoint_that_the_next_one_goes_on_from(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    # Long enough to be stopped in the middle, and without a checkpoint of its own before.
    settings = ("run.name=stopped", "train.epochs=40", "train.checkpoint_every_steps=10000", "eval.every_epochs=40")
    first = start_job(cluster, *quickstart(tmp_path, *settings))
    before = read_until(first, r"step (20)/")
    stop_job(cluster, before)
    assert "stopped after step" in before + end_of_job(first)[1]

    second = start_job(cluster, *quickstart(tmp_path, *settings))
    after = read_until(second, r"going on from step (\d+)")
    stop_job(cluster, after)
    end_of_job(second)
    (step,) = re.findall(r"going on from step (\d+)", after)
    assert int(step) >= 20


def read_until(job: subprocess.Popen[bytes], pattern: str) -> str:
    """What a job prints, up to a line with a pattern."""
    assert job.stdout is not None
    text = ""
    for line in iter(job.stdout.readline, b""):
        text += line.decode()
        if re.search(pattern, line.decode()):
            return text
    raise AssertionError(f"no {pattern!r} in\n{text}")


def stop_job(cluster: LocalCluster, text: str) -> None:
    """Stops the job whose submission printed a text."""
    (job_id,) = set(re.findall(r"Job '(\S+)' submitted successfully", text))
    subprocess.run(ray_job("stop", job_id), env=cluster.client_environment(), check=True, capture_output=True)


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
    with running_cluster(ClusterSpec(autoscale=(0, 2), cpus_per_node=2, idle_minutes=0.5)) as cluster:
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
        trained_on = training_addresses(cluster)
        assert trained_on and trained_on <= {node.address for node in cluster.nodes() if node.name != "head"}
