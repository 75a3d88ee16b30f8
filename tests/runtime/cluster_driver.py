"""A driver in a process of its own that looks at a cluster, since the tests' own process may be part of another one.

Run as a program, it joins the cluster of RAY_ADDRESS and answers one case after the other. A case is a line of JSON,
``{"call": "check" | "train" | "plan", "config": FILE, "overrides": [...]}``; so is its answer,
``{"findings": [[level, message], ...], "error": ..., "said": [...], "seconds": ...}``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "cluster"))

from local_cluster import ClusterSpec, LocalCluster

__all__ = ["ClusterSpec", "Driver", "LocalCluster", "start_node"]


class Driver:
    """A process that joined the cluster and answers one case after the other."""

    def __init__(self, environment: dict[str, str], folder: Path, config: Path) -> None:
        self._config = config
        self._log = (folder / "driver.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip

    def __call__(self, call: str, *overrides: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"call": call, "config": str(self._config), "overrides": overrides}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, Path(self._log.name).read_text()
        return json.loads(line)

    def errors(self, *overrides: str) -> list[str]:
        result = self("check", *overrides)
        assert result["seconds"] < 30
        return [message for level, message in result["findings"] if level == "error"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self._log.close()


def start_node(
    cluster: LocalCluster,
    name: str,
    *arguments: str,
    before: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
) -> None:
    """Adds a node of another kind to a cluster; it ends with it.

    Args:
        cluster: has at least one node beside the head.
        name: of the node.
        arguments: for ``ray start``.
        before: command line that ``ray start`` is put behind.
        settings: environment variables of the node.
    """
    number = 60 + sum(name.encode()) % 100
    start = [
        *before, sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
        "--address", cluster.submit_environment()["RAY_ADDRESS"], "--node-ip-address", f"127.0.1.{number}",
        "--node-name", name, "--object-store-memory", "100000000", "--temp-dir", str(cluster.folder / name),
        "--dashboard-agent-listen-port", "0", *arguments,
    ]  # fmt: skip
    like = next(process for process in cluster.processes("node-1") if "start" in process.cmdline())
    environment = like.environ() | {"DETR_RAY_LOCAL_NODE": name} | dict(settings or {})
    log = cluster.folder / "logs" / f"{name}.log"
    with log.open("wb") as out:
        subprocess.Popen(
            start, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
        )
    deadline = time.monotonic() + 90
    while name not in [node.name for node in cluster.nodes() if node.alive]:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def answer(call: str, file: str, overrides: list[str]) -> dict[str, Any]:
    """Looks at the cluster as the check command does, as training does, or only for workers."""
    from detr_ray.config import ConfigError, load_config
    from detr_ray.engine.checkpoints.run_directory import absolute_storage
    from detr_ray.engine.preflight.findings import Report
    from detr_ray.runtime.cluster_check import check_cluster, preflight_nodes
    from detr_ray.runtime.resources import plan_workers

    config = load_config([file], overrides)
    report, said, error = Report(), [], ""
    started = time.monotonic()
    try:
        if call == "check":
            check_cluster(config, report, said.append)
        elif call == "train":
            preflight_nodes(config, absolute_storage(config.run.storage), said.append)
        else:
            request = plan_workers(config)
            request.scaling_config(30)
            said += [f"{request.min_workers} to {request.max_workers}", request.missing()]
    except ConfigError as refused:
        error = str(refused)
    findings = [(finding.level, f"{finding.message} > {finding.advice}") for finding in report.findings]
    return {"findings": findings, "said": said, "error": error, "seconds": time.monotonic() - started}


if __name__ == "__main__":
    from detr_ray.runtime.session import ray_session

    with ray_session(2, 2, False):
        for line in sys.stdin:
            case = json.loads(line)
            print(json.dumps(answer(case["call"], case["config"], case["overrides"])), flush=True)
