"""A Ray cluster of several nodes on this machine, for `cluster/local.py` and the tests.

Each node is started by ``ray start``, as on a cloud machine, and has its own raylet, workers, agents, logs and folder.
On Linux each also has its own loopback address.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from local_machine import (
    LOCALHOST,
    free_ports,
    give_cores,
    is_free,
    is_own_folder,
    kill,
    node_address,
    own_environment,
    ray_command,
    runs,
    terminate,
    until,
)

HEAD_TYPE, WORKER_TYPE = "head", "cpu_worker"

# Every node except the head has one of this resource. With train.worker_resource=worker_slot each node runs one
# training worker, as a machine with one GPU does, and its other CPUs run data tasks.
WORKER_SLOT = "worker_slot"

_CLUSTER_MARK = "DETR_RAY_LOCAL_CLUSTER"
_NODE_MARK = "DETR_RAY_LOCAL_NODE"
# The path of a socket has at most 107 characters. Sockets are below a node's folder; Ray appends about 66 characters.
_LONGEST_FOLDER = 107 - 66 - len("/node-00")
_SETTINGS = {
    "RAY_JOB_STOP_WAIT_TIME_S": "60",  # time to write a checkpoint when a job is stopped; the default is 3 s
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A dead node is noticed after 5 s. A slow node is not taken for dead: each check waits 10 s for an answer.
    "RAY_health_check_period_ms": "1000",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
}


class ClusterError(Exception):
    """An operation on the cluster failed; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class ClusterSpec:
    """Settings of a cluster.

    Attributes:
        nodes: number of nodes, including the head. Not used with an autoscaler.
        cpus_per_node: logical CPUs of every node except the head.
        head_cpus: logical CPUs of the head. 0 by default, as on a real cluster: only drivers of jobs run there.
        object_store_mb: size of each node's object store.
        port: port of dashboard and job server; None for a free one.
        autoscale: smallest and largest number of nodes besides the head; None for a fixed number.
        idle_minutes: the autoscaler removes a node that was idle for this time.
    """

    nodes: int = 3
    cpus_per_node: int = 2
    head_cpus: int = 0
    object_store_mb: int = 200
    port: int | None = None
    autoscale: tuple[int, int] | None = None
    idle_minutes: float = 0.5


@dataclasses.dataclass(frozen=True)
class NodeState:
    """A node, as reported by Ray."""

    name: str
    node_id: str
    address: str
    alive: bool
    cpus: int


class LocalCluster:
    """A cluster whose files are in one folder. Several processes may use the same cluster.

    Leaving the context manager ends the cluster.

    Args:
        folder: folder for state, token, logs and sockets. Its path must be short, because of the sockets.

    Raises:
        ClusterError: another user owns the folder, or may write to it.
    """

    def __init__(self, folder: Path) -> None:
        if not is_own_folder(Path(folder)):
            raise ClusterError(f"{folder} is not only this user's: remove it, or give a --folder of your own")
        self.folder = Path(folder).resolve()
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.down()

    def up(self, spec: ClusterSpec | None = None) -> None:
        """Starts the cluster and waits for all nodes.

        Raises:
            ClusterError: the folder is in use, or a node does not start.
        """
        spec = spec or ClusterSpec()
        if len(str(self.folder)) > _LONGEST_FOLDER:
            raise ClusterError(f"{self.folder} is too long a path for Ray's sockets: give a --folder directly in /tmp")
        if self.processes():
            raise ClusterError(f"a cluster runs in {self.folder} already: end it with `down`, or give another --folder")
        self._clear()
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise ClusterError(f"{self.folder} holds something that is no cluster: give another --folder")
        self.folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        (self.folder / "logs").mkdir(mode=0o700)
        self._token.touch(mode=0o600)
        self._token.write_text(secrets.token_hex(32))
        try:
            self._start_head(spec)
            for name in [self.launch_node() for _ in range(0 if spec.autoscale else spec.nodes - 1)]:
                self._wait_for_node(name)
            if spec.autoscale:
                fewest = spec.autoscale[0]
                self._wait(f"{fewest} nodes of the autoscaler", lambda: len(self._alive()) > fewest, "head")
        except BaseException:
            self.down(keep_logs=True)
            raise

    def add_node(self) -> str:
        """Starts one more node, waits until Ray reports it, and returns its name."""
        with self._state() as state:
            if state["spec"]["autoscale"]:
                raise ClusterError("the autoscaler adds this cluster's nodes, when a job asks for more than there are")
        name = self.launch_node()
        self._wait_for_node(name)
        return name

    def launch_node(self) -> str:
        """Starts one more node and returns its name without waiting."""
        with self._state() as state:
            name = f"node-{len(state['nodes'])}"
            self._start(state, name, ["--address", state["gcs"]], state["spec"]["cpus_per_node"], {})
        return name

    def remove_node(self, name: str) -> None:
        """Kills all processes of a node without notice, and waits until Ray has noticed."""
        with self._state() as state:
            others = [other for other in state["nodes"] if other != "head"]
        if name not in others:
            raise ClusterError(f"no node {name!r} to remove; there are {', '.join(others) or 'none'}")
        self._kill(lambda: self.processes(name))
        self._wait(f"the death of {name}", lambda: name not in self._alive(), "head")

    def end_node(self, name: str) -> None:
        """Terminates a node, and kills the processes that do not end in time."""
        terminate(self._sessions(name))
        self._kill(lambda: self.processes(name))

    def drain_node(self, name: str, deadline_s: float) -> None:
        """Announces to Ray that a node will end in ``deadline_s`` seconds, as a cloud announces it for a spot machine.

        Ray places no more work on the node, and ends it as soon as nothing runs there. Call `remove_node` after this
        time, because a cloud ends the machine then.
        """
        node = self._alive().get(name)
        if node is None:
            raise ClusterError(f"no node {name!r} is alive; `status` lists them")
        command = [
            *ray_command("drain-node"), "--address", self.submit_environment()["RAY_ADDRESS"],
            "--node-id", node.node_id,
            "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the machine will be taken away",
            "--deadline-remaining-seconds", str(round(deadline_s)),
        ]  # fmt: skip
        done = subprocess.run(command, env=self.client_environment(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ClusterError(f"Ray does not drain {name}: {done.stdout}{done.stderr}")

    def nodes(self) -> list[NodeState]:
        """All nodes that Ray reports, including dead ones; the head first."""
        answer = self.get_json("/api/v0/nodes?detail=true&limit=1000")
        nodes = [
            NodeState(
                name=node["node_name"],
                node_id=node["node_id"],
                address=node["node_ip"],
                alive=node["state"] == "ALIVE",
                cpus=int(node["resources_total"].get("CPU", 0)),
            )
            for node in answer["data"]["result"]["result"]
        ]
        return sorted(nodes, key=lambda node: (node.name != "head", len(node.name), node.name))

    def get_json(self, path: str) -> Any:
        """Requests a path from the dashboard's server and returns the JSON content."""
        request = urllib.request.Request(
            self.job_server + path, headers={"Authorization": f"Bearer {self._token.read_text()}"}
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def is_running(self, name: str) -> bool:
        """Whether a node's processes run, whatever Ray reports."""
        return any(runs(leader) for leader in self._sessions(name))

    def processes(self, node: str | None = None) -> list[psutil.Process]:
        """Processes of the cluster, or of one node."""
        sessions = self._sessions(node)
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getsid(process.pid) in sessions or self._is_marked(process, node):
                    found.append(process)
        return [process for process in found if runs(process.pid)]

    def down(self, keep_logs: bool = False) -> None:
        """Ends every process of the cluster and removes its folder. Does nothing if there is no cluster.

        Raises:
            ClusterError: a process does not end.
        """
        if self._state_file.exists():
            with self._state() as state:
                state["ending"] = True  # so that the autoscaler does not replace the nodes
            # `ray start` ends its node's processes. They end cleanly only while the head runs, so the head ends last.
            head = self._sessions("head")
            terminate(self._sessions(None) - head)
            terminate(head)
        self._kill(self.processes)
        self._children.clear()
        if not keep_logs:
            self._clear()

    @property
    def job_server(self) -> str:
        """Address of dashboard and job server."""
        return self.submit_environment()["RAY_API_SERVER_ADDRESS"]

    def submit_environment(self) -> dict[str, str]:
        """Environment variables with the addresses of the job server and the head, and with the token."""
        with self._state() as state:
            return {
                "RAY_API_SERVER_ADDRESS": f"http://{LOCALHOST}:{state['port']}",
                "RAY_ADDRESS": state["gcs"],
                **self._authentication(),
            }

    def client_environment(self) -> dict[str, str]:
        """This process's environment together with `submit_environment`."""
        return own_environment() | self.submit_environment()

    def _start_head(self, spec: ClusterSpec) -> None:
        gcs_port, client_port, free_port, *metric_ports = free_ports(5)
        if spec.port and not is_free(spec.port):
            raise ClusterError(f"--port {spec.port}: something listens there already")
        gcs = f"{node_address('head')}:{gcs_port}"
        record = {"spec": dataclasses.asdict(spec), "gcs": gcs, "port": spec.port or free_port, "nodes": {}}
        self._state_file.write_text(json.dumps(record))
        arguments = [
            "--head", "--port", str(gcs_port), "--ray-client-server-port", str(client_port),
            "--dashboard-host", LOCALHOST, "--dashboard-port", str(record["port"]), "--include-dashboard", "true",
        ]  # fmt: skip
        # By default these ports are fixed, so that a second cluster on this machine could not start.
        settings = dict(zip(("DASHBOARD_METRIC_PORT", "AUTOSCALER_METRIC_PORT"), map(str, metric_ports), strict=True))
        if spec.autoscale:
            from local_provider import autoscaler_config  # which imports this module

            config = self.folder / "autoscaler.json"
            config.write_text(json.dumps(autoscaler_config(spec, self.folder), indent=1))
            arguments += [f"--autoscaling-config={config}"]
            # The autoscaler loads `local_provider` from here.
            settings |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "PYTHONPATH": str(Path(__file__).resolve().parent)}
        with self._state() as state:
            self._start(state, "head", arguments, spec.head_cpus, settings)
        self._wait_for_node("head")

    def _start(
        self, state: dict[str, Any], name: str, arguments: Sequence[str], cpus: int, settings: Mapping[str, str]
    ) -> None:
        """Starts a node in a new session and notes the session in the state."""
        if state.get("ending"):
            raise ClusterError("the cluster is being ended")
        command = [
            *ray_command("start"), *arguments, "--block", "--node-ip-address", node_address(name), "--node-name", name,
            "--dashboard-agent-listen-port", "0", "--num-cpus", str(cpus), "--num-gpus", "0",
            "--object-store-memory", str(state["spec"]["object_store_mb"] * 1_000_000),
            "--temp-dir", str(self.folder / name),
            "--resources", json.dumps({} if name == "head" else {WORKER_SLOT: 1}),
        ]  # fmt: skip
        marks = {_CLUSTER_MARK: str(self.folder), _NODE_MARK: name}
        if state["spec"]["autoscale"]:
            marks["RAY_NODE_TYPE_NAME"] = HEAD_TYPE if name == "head" else WORKER_TYPE
        with (self.folder / "logs" / f"{name}.log").open("wb") as log:
            child = subprocess.Popen(
                command, env=own_environment() | self._authentication() | _SETTINGS | marks | settings,
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        spec = state["spec"]
        give_cores(child.pid, name, spec["autoscale"][1] if spec["autoscale"] else spec["nodes"] - 1)
        self._children.append(child)
        state["nodes"][name] = {"pid": child.pid, "created": psutil.Process(child.pid).create_time()}

    def _authentication(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self._token)}

    def _sessions(self, node: str | None) -> set[int]:
        """Session ids of the nodes, without ids that belong to other processes by now."""
        for child in self._children:
            child.poll()  # removes zombies
        if not self._state_file.exists():
            return set()
        with self._state() as state:
            leaders = [leader for name, leader in state["nodes"].items() if node in (None, name)]
        sessions = set()
        for leader in leaders:
            try:
                is_ours = abs(psutil.Process(leader["pid"]).create_time() - leader["created"]) < 1
            except psutil.NoSuchProcess:
                is_ours = leader["created"] > psutil.boot_time()
            if is_ours:
                sessions.add(leader["pid"])
        return sessions

    def _is_marked(self, process: psutil.Process, node: str | None) -> bool:
        """Whether a process has the cluster's environment variables. Needed for jobs, which have their own sessions.

        Ray's workers overwrite their environment; they are found by their session.
        """
        environment = process.environ()
        return environment.get(_CLUSTER_MARK) == str(self.folder) and node in (None, environment.get(_NODE_MARK))

    def _alive(self) -> dict[str, NodeState]:
        try:
            return {node.name: node for node in self.nodes() if node.alive}
        except (OSError, KeyError, TypeError, json.JSONDecodeError):
            return {}  # the job server does not answer yet

    def _wait_for_node(self, name: str) -> None:
        self._wait(name, lambda: name in self._alive(), name)

    def _wait(self, what: str, there: Callable[[], bool], node: str, seconds: float = 180) -> None:
        """Waits for a condition. On failure, the error contains the last output of ``node``."""
        if until(lambda: there() or not self.is_running(node), seconds) and there():
            return
        printed = (self.folder / "logs" / f"{node}.log").read_text(errors="replace")[-2000:]
        raise ClusterError(
            f"waited in vain for {what}; see {self.folder}/{node}/session_latest/logs. {node} printed:\n{printed}"
        )

    def _kill(self, processes: Callable[[], list[psutil.Process]]) -> None:
        if left := kill(processes):
            raise ClusterError(f"processes {[process.pid for process in left]} do not end")

    @contextlib.contextmanager
    def _state(self) -> Iterator[dict[str, Any]]:
        """The cluster's state, locked while it is used; changes are written back."""
        if not self._state_file.exists():
            raise ClusterError(f"no cluster in {self.folder}: start one with `up`, or name its --folder")
        with self._state_file.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            before = file.read()
            state = json.loads(before)
            yield state
            after = json.dumps(state)
            if after != before:
                file.seek(0)
                file.write(after)
                file.truncate()

    def _clear(self) -> None:
        """Removes the folder, if it belongs to a cluster."""
        if self._state_file.exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _state_file(self) -> Path:
        return self.folder / "cluster.json"

    @property
    def _token(self) -> Path:
        return self.folder / "token"
