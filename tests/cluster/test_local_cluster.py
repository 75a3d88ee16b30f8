"""`cluster/local.py`: nodes that start, die and leave nothing behind; jobs whose exit codes come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from submitting import ROOT, LocalCluster, end_of_job, start_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def local(*arguments: str) -> str:
    """What ``python cluster/local.py ...`` prints; whatever it starts does not hold its output."""
    with tempfile.TemporaryFile("w+") as printed:
        done = subprocess.run(
            [sys.executable, "cluster/local.py", *arguments], cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT,
            check=False,
        )  # fmt: skip
        printed.seek(0)
        text = printed.read()
    assert done.returncode == 0, text
    return text


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A head and a node, started by the command."""
    with tempfile.TemporaryDirectory(prefix="dr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = LocalCluster(Path(folder) / "c")
        try:
            local("up", "--nodes", "2", "--cpus-per-node", "1", "--folder", str(cluster.folder))
            yield cluster
        finally:
            cluster.down()


def test_a_jobs_exit_code_and_output_come_back(cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("import sys; print('this is the job'); sys.exit(int(sys.argv[1]))")
    jobs = [start_job(cluster, "python", "job.py", code, working_dir=tmp_path) for code in ("0", "3")]
    (done_code, done), (failed_code, failed) = (end_of_job(job, timeout=200) for job in jobs)
    assert done_code == 0 and "this is the job" in done, done
    assert failed_code == 1 and "this is the job" in failed and "exit code 3" in failed, failed


def test_nobody_is_let_in_without_the_token(cluster: LocalCluster) -> None:
    assert cluster.get_json("/api/jobs/") is not None
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(cluster.job_server + "/api/jobs/", timeout=20)
    assert refused.value.code == 401
    assert (cluster.folder / "token").stat().st_mode & 0o077 == 0


def test_ray_sees_a_node_die_and_another_one_come(cluster: LocalCluster) -> None:
    assert [(node.name, node.alive) for node in cluster.nodes()] == [("head", True), ("node-1", True)]
    victims = cluster.processes("node-1")
    assert any("raylet" in process.name() for process in victims)
    cluster.remove_node("node-1")
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in victims)
    assert cluster.add_node() == "node-2"
    assert local("status", "--folder", str(cluster.folder)).split()[::5] == ["head", "node-1", "node-2"]
    assert [(node.name, node.alive) for node in cluster.nodes()] == [
        ("head", True), ("node-1", False), ("node-2", True),
    ]  # fmt: skip


def test_down_ends_every_process_also_after_a_crash(cluster: LocalCluster) -> None:
    everything = psutil.process_iter(["cmdline"])
    before = {process.pid for process in everything if str(cluster.folder) in " ".join(process.info["cmdline"] or [])}
    agents = {process.pid for process in cluster.processes()}
    assert before <= agents and len(agents) > len(before), "workers show no folder in their titles"
    (leader,) = [process for process in cluster.processes("head") if "start" in process.cmdline()]
    os.kill(leader.pid, signal.SIGKILL)
    local("down", "--folder", str(cluster.folder))
    left = [pid for pid in agents if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert left == []
    assert not cluster.folder.exists()
    local("down", "--folder", str(cluster.folder))  # there is nothing left to do, and that is no error
