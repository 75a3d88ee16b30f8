"""A cluster of several nodes on this machine, and jobs submitted to it as users submit them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "cluster"))

from local_cluster import ClusterSpec, LocalCluster  # noqa: E402


@contextlib.contextmanager
def running_cluster(spec: ClusterSpec) -> Iterator[LocalCluster]:
    """A cluster in a folder whose path is short enough for sockets; ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="dr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = LocalCluster(Path(folder) / "c")
        try:
            cluster.up(spec)
            yield cluster
        finally:
            cluster.down()


def ray_job(verb: str, *arguments: str) -> list[str]:
    """A command line of ``ray job``, whose own lines are without colours."""
    return [
        str(Path(sys.executable).parent / "ray"),
        "job",
        verb,
        "--log-style=record",
        "--log-color=false",
        *arguments,
    ]


def start_job(cluster: LocalCluster, *command: str, working_dir: Path = ROOT) -> subprocess.Popen[bytes]:
    """``ray job submit`` at work; its output is that of the job, with lines of its own around it."""
    return subprocess.Popen(
        ray_job("submit", "--working-dir", str(working_dir), "--", *command),
        env=cluster.client_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def end_of_job(process: subprocess.Popen[bytes], timeout: float = 600) -> tuple[int, str]:
    """Exit code and output, carriage returns and all, of a job that was started."""
    try:
        output = process.communicate(timeout=timeout)[0].decode()
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"longer than {timeout} s: {process.communicate()[0].decode()}") from None
    return process.returncode, output
