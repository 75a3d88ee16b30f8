"""A Ray cluster of several nodes on this machine: real raylets, real job server, real autoscaler.

For trying what a cluster does before paying for one, and for the tests: submitted jobs, nodes that die, nodes that an
autoscaler adds and removes.

    python cluster/local.py up --nodes 3 --cpus-per-node 2    # a head without CPUs, and two nodes
    eval "$(python cluster/local.py submit-env)"              # where it is, and its token, for this shell
    ray job submit --working-dir . -- python -m detr_ray.train --config configs/quickstart.yaml
    python cluster/local.py status
    python cluster/local.py remove-node node-2                # killed, as if its machine had lost power
    python cluster/local.py add-node
    python cluster/local.py down

    python cluster/local.py up --autoscale 0 3                # a head; up to three nodes come when a job asks for them

Everything lies in one folder (``--folder``), one cluster a folder; several can run beside each other and beside any
other Ray, whose processes are never touched. What is started carries the folder's name in its environment and belongs
to a session that is written down: this is how `down` finds every process of the cluster, also after a crash and also
those that the autoscaler started, and no other.

All nodes share this machine's cores and disk, so this shows how a job behaves on a cluster, not how fast it is.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

DEFAULT_FOLDER = Path(f"/tmp/detr_ray-{os.getuid()}")
AUTOSCALED_TYPE = "cpu_worker"

_CLUSTER_MARK = "DETR_RAY_LOCAL_CLUSTER"
_NODE_MARK = "DETR_RAY_LOCAL_NODE"
_HOST = "127.0.0.1"
# The fake provider of Ray's autoscaler knows the head by this id.
_HEAD_NODE_ID = "f" * 51 + "00000"
# Sockets lie below a node's folder, and a socket's path holds 107 characters; Ray appends about 66.
_LONGEST_FOLDER = 107 - 66 - len("/node-00")

_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_JOB_STOP_WAIT_TIME_S": "60",  # time for a checkpoint when a job is stopped; 3 s otherwise
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A dead node is noticed after 5 s. One that is only slow is not taken for dead: each check waits for 10 s.
    "RAY_health_check_period_ms": "1000",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
}
# Of another cluster, or of a job in which this runs.
_FOREIGN = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_NODE_ID")


class ClusterError(Exception):
    """The cluster cannot do what was asked; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class ClusterSpec:
    """What to start.

    Attributes:
        nodes: nodes in all, the head among them.
        cpus_per_node: logical CPUs of every node but the head.
        head_cpus: logical CPUs of the head. None by default, as on a real cluster: jobs' drivers run there, which take
            none, and work goes to the other nodes.
        object_store_mb: size of each node's object store.
        port: of the job server; None for a free one.
        autoscale: fewest and most nodes beside the head; None for a fixed number of them.
        idle_minutes: an autoscaled node that does nothing leaves after this time.
    """

    nodes: int = 3
    cpus_per_node: int = 2
    head_cpus: int = 0
    object_store_mb: int = 200
    port: int | None = None
    autoscale: tuple[int, int] | None = None
    idle_minutes: float = 0.2


@dataclasses.dataclass(frozen=True)
class NodeState:
    """A node as Ray sees it."""

    name: str
    node_id: str
    alive: bool
    is_head: bool
    cpus: int


class LocalCluster:
    """A cluster that lives in a folder; any process may open the folder and act on it.

    Args:
        folder: where everything of the cluster lies: state, token, logs, sockets. Short: Ray's sockets lie below it.
    """

    def __init__(self, folder: Path = DEFAULT_FOLDER) -> None:
        self.folder = Path(folder).resolve()
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.down()

    def up(self, spec: ClusterSpec = ClusterSpec()) -> None:
        """Starts the cluster and waits until all nodes are there.

        Raises:
            ClusterError: there is one in this folder already, or a node does not start.
        """
        if len(str(self.folder)) > _LONGEST_FOLDER:
            raise ClusterError(f"{self.folder} is too long a path for Ray's sockets: give a --folder directly in /tmp")
        if self.processes():
            raise ClusterError(f"a cluster runs in {self.folder} already: end it with `down`, or give another --folder")
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "logs").mkdir(parents=True, mode=0o700)
        self._token.touch(mode=0o600)
        self._token.write_text(secrets.token_hex(32))
        try:
            self._start_head(spec)
            names = [f"node-{number}" for number in range(1, 1 if spec.autoscale else spec.nodes)]
            for name in names:
                self._start_node(name, spec.cpus_per_node)
            for name in names:
                self._wait_for_node(name)
            if spec.autoscale:
                first = spec.autoscale[0]
                self._wait(f"{first} nodes from the autoscaler", lambda: len(self._alive()) > first, "head")
        except BaseException:
            self.down(keep_logs=True)
            raise

    def add_node(self, cpus: int | None = None) -> str:
        """Starts one more node, waits until Ray sees it, and gives back its name."""
        with self._state() as state:
            if state["spec"]["autoscale"]:
                raise ClusterError("the autoscaler adds this cluster's nodes")
            name = f"node-{len(state['nodes'])}"
            cpus = state["spec"]["cpus_per_node"] if cpus is None else cpus
        self._start_node(name, cpus)
        self._wait_for_node(name)
        return name

    def remove_node(self, name: str) -> None:
        """Kills a node's raylet and all its workers at once, without a word to Ray; waits until Ray has noticed."""
        with self._state() as state:
            others = sorted(set(state["nodes"]) - {"head"})
        if name not in others:
            raise ClusterError(f"no node {name!r} to remove; there are {', '.join(others) or 'none'}")
        self._kill(lambda: self.processes(name))
        self._wait(f"the death of {name}", lambda: name not in self._alive(), "head")

    def drain_node(self, name: str, deadline_s: float) -> None:
        """Tells Ray that a node will be taken away in ``deadline_s`` seconds, as clouds do with spot machines.

        Ray stops using the node, and ends it as soon as nothing runs there. `remove_node` when the time is over does
        what the cloud does then.
        """
        node = self._alive().get(name)
        if node is None:
            raise ClusterError(f"no node {name!r} is alive; `status` lists them")
        done = subprocess.run(
            [
                *_ray("drain-node"), "--address", self.gcs_address, "--node-id", node.node_id,
                "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken away",
                "--deadline-remaining-seconds", str(round(deadline_s)),
            ],
            env=self.client_environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise ClusterError(f"Ray does not drain {name}: {done.stdout}{done.stderr}")

    def nodes(self) -> list[NodeState]:
        """All nodes that Ray has known, the head first."""
        answer = self._ask("/api/v0/nodes?detail=true&limit=1000")
        nodes = [
            NodeState(
                name="head" if node["is_head_node"] else node["node_name"],
                node_id=node["node_id"],
                alive=node["state"] == "ALIVE",
                is_head=node["is_head_node"],
                cpus=int(node["resources_total"].get("CPU", 0)),
            )
            for node in answer["data"]["result"]["result"]
        ]
        return sorted(nodes, key=lambda node: (not node.is_head, node.name))

    def processes(self, node: str | None = None) -> list[psutil.Process]:
        """Processes of the cluster, or of one node."""
        sessions = self._sessions(node)
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getsid(process.pid) in sessions or self._is_marked(process, node):
                    found.append(process)
        return [process for process in found if _runs(process.pid)]

    def _sessions(self, node: str | None) -> set[int]:
        """Sessions of the nodes, but for numbers that other processes have got since."""
        if not self._state_file.exists():
            return set()
        with self._state() as state:
            leaders = {name: leader for name, leader in state["nodes"].items() if node in (None, name)}
        sessions = set()
        for leader in leaders.values():
            try:
                is_ours = abs(psutil.Process(leader["pid"]).create_time() - leader["created"]) < 1
            except psutil.NoSuchProcess:
                is_ours = leader["created"] > psutil.boot_time()
            if is_ours:
                sessions.add(leader["pid"])
        return sessions

    def _is_marked(self, process: psutil.Process, node: str | None) -> bool:
        """Whether a process got the cluster's environment: jobs have sessions of their own.

        Ray's own processes overwrite theirs when they name themselves, so this alone would not find them.
        """
        environment = process.environ()
        return environment.get(_CLUSTER_MARK) == str(self.folder) and node in (None, environment.get(_NODE_MARK))

    def down(self, keep_logs: bool = False) -> None:
        """Ends every process of the cluster and removes its folder; does nothing where there is none.

        Raises:
            ClusterError: a process does not end.
        """
        # What `ray start` started ends with it, and in good order as long as the head is there.
        head = self._sessions("head")
        self._terminate(self._sessions(None) - head)
        self._terminate(head)
        self._kill(self.processes)
        self._children.clear()
        if not keep_logs:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def gcs_address(self) -> str:
        """Where drivers on this machine join the cluster."""
        with self._state() as state:
            return f"{_ip('head')}:{state['gcs_port']}"

    @property
    def job_server(self) -> str:
        """Address of the job server and dashboard."""
        with self._state() as state:
            return f"http://{_HOST}:{state['port']}"

    def client_environment(self) -> dict[str, str]:
        """This process's environment, with what `ray job submit` and drivers need to find the cluster and be let in."""
        kept = {key: value for key, value in os.environ.items() if key not in _FOREIGN}
        return kept | self.submit_environment() | {"PATH": _path()}

    def submit_environment(self) -> dict[str, str]:
        """Only the variables that lead to the cluster."""
        return {
            "RAY_API_SERVER_ADDRESS": self.job_server,
            "RAY_ADDRESS": self.gcs_address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token),
        }

    def _start_head(self, spec: ClusterSpec) -> None:
        gcs_port, client_port, free_port, *ports = _free_ports(5)
        port = spec.port or free_port
        if spec.port and not _is_free(spec.port):
            raise ClusterError(f"--port {spec.port}: something listens there already")
        state = {"spec": dataclasses.asdict(spec), "gcs_port": gcs_port, "port": port, "nodes": {}}
        self._state_file.write_text(json.dumps(state))
        arguments = [
            "--head", "--port", str(gcs_port), "--ray-client-server-port", str(client_port),
            "--dashboard-host", _HOST, "--dashboard-port", str(port), "--include-dashboard", "true",
        ]  # fmt: skip
        # Of two clusters on one machine, one would not get these ports, which are fixed otherwise.
        environment = {"DASHBOARD_METRIC_PORT": str(ports[0]), "AUTOSCALER_METRIC_PORT": str(ports[1])}
        if spec.autoscale:
            config = self.folder / "autoscaler.json"
            config.write_text(json.dumps(_autoscaler(spec, gcs_port), indent=1))
            arguments += ["--autoscaling-config", str(config)]
            environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        self._start("head", arguments, spec.head_cpus, environment)
        self._wait_for_node("head")

    def _start_node(self, name: str, cpus: int) -> None:
        self._start(name, ["--address", self.gcs_address], cpus, {})

    def _start(self, name: str, arguments: Sequence[str], cpus: int, environment: dict[str, str]) -> None:
        """Starts a node as processes of a session of their own, and writes it down."""
        store = json.loads(self._state_file.read_text())["spec"]["object_store_mb"] * 1_000_000
        kept = {key: value for key, value in os.environ.items() if key not in _FOREIGN}
        marks = {_CLUSTER_MARK: str(self.folder), _NODE_MARK: name}
        token = {"RAY_AUTH_TOKEN_PATH": str(self._token)}
        command = [
            *_ray("start"), *arguments, "--block", "--node-ip-address", _ip(name), "--node-name", name,
            "--dashboard-agent-listen-port", "0", "--num-cpus", str(cpus), "--num-gpus", "0",
            "--object-store-memory", str(store), "--temp-dir", str(self.folder / name),
        ]  # fmt: skip
        with (self.folder / "logs" / f"{name}.log").open("wb") as log:
            child = subprocess.Popen(
                command, env=kept | _SETTINGS | token | marks | {"PATH": _path()} | environment, cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._children.append(child)
        with self._state() as state:
            state["nodes"][name] = {"pid": child.pid, "created": psutil.Process(child.pid).create_time()}

    def _alive(self) -> dict[str, NodeState]:
        try:
            return {node.name: node for node in self.nodes() if node.alive}
        except (OSError, KeyError, TypeError, json.JSONDecodeError):
            return {}  # the job server is not up yet

    def _ask(self, path: str) -> Any:
        request = urllib.request.Request(
            self.job_server + path, headers={"Authorization": f"Bearer {self._token.read_text()}"}
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def _wait_for_node(self, name: str) -> None:
        self._wait(name, lambda: name in self._alive(), name)

    def _wait(self, what: str, there: Callable[[], bool], node: str, seconds: float = 180) -> None:
        """Waits for something that a node shall do, and shows what it printed where that does not come."""
        (leader,) = self._sessions(node) or {0}
        if self._until(lambda: there() or not _runs(leader), seconds) and there():
            return
        printed = (self.folder / "logs" / f"{node}.log").read_text(errors="replace")[-2000:]
        raise ClusterError(
            f"waited in vain for {what}; see {self.folder}/{node}/session_latest/logs. It printed:\n{printed}"
        )

    def _until(self, there: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while True:
            for child in self._children:
                child.poll()  # so that those that ended are gone
            if there():
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.25)

    def _terminate(self, leaders: set[int]) -> None:
        for leader in leaders:
            with contextlib.suppress(ProcessLookupError):
                os.kill(leader, signal.SIGTERM)
        self._until(lambda: not any(_runs(leader) for leader in leaders), seconds=8)

    def _kill(self, processes: Callable[[], list[psutil.Process]]) -> None:
        """Kills until none is left: a process may start another one before its turn comes."""

        def none_left() -> bool:
            left = processes()
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            return not left

        if not self._until(none_left, seconds=20):
            raise ClusterError(f"processes {[process.pid for process in processes()]} do not end")

    @contextlib.contextmanager
    def _state(self) -> Iterator[dict[str, Any]]:
        """The cluster's record, held while it is used; changes are kept."""
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

    @property
    def _state_file(self) -> Path:
        return self.folder / "cluster.json"

    @property
    def _token(self) -> Path:
        return self.folder / "token"


def _autoscaler(spec: ClusterSpec, gcs_port: int) -> dict[str, Any]:
    """Configuration of Ray's autoscaler, whose fake provider starts raylets here where others rent machines."""
    assert spec.autoscale is not None
    fewest, most = spec.autoscale
    return {
        "cluster_name": "local",
        "max_workers": most,
        "idle_timeout_minutes": spec.idle_minutes,
        "upscaling_speed": 100,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"{_ip('head')}:{gcs_port}",
            "head_node_id": _HEAD_NODE_ID,
            "launch_multiple": True,
            # All nodes have one address; without this the autoscaler takes them for one node and never sees it idle.
            "use_node_id_as_ip": True,
        },
        "auth": {"ssh_user": "nobody"},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": spec.head_cpus}, "node_config": {}, "max_workers": 0},
            AUTOSCALED_TYPE: {
                "resources": {"CPU": spec.cpus_per_node, "object_store_memory": spec.object_store_mb * 1_000_000},
                "node_config": {},
                "min_workers": fewest,
                "max_workers": most,
            },
        },
        **{key: [] for key in ("setup_commands", "initialization_commands", "head_start_ray_commands")},
        **{key: [] for key in ("worker_start_ray_commands", "head_setup_commands", "worker_setup_commands")},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }


def _ip(node: str) -> str:
    """A node's own address, as on a real cluster, where this machine has more than one for itself."""
    if not sys.platform.startswith("linux"):
        return "127.0.0.1"
    return f"127.0.1.{1 if node == 'head' else 1 + int(node.partition('-')[2])}"


def _ray(command: str) -> list[str]:
    """Ray's command line of this Python, whatever the PATH holds."""
    return [sys.executable, "-m", "ray.scripts.scripts", command]


def _path() -> str:
    """A PATH on which `python` is this one, so that it is also that of submitted jobs."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def _is_free(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex((_HOST, port)) != 0


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python cluster/local.py``."""
    arguments = _parser().parse_args(argv)
    cluster = LocalCluster(arguments.folder)
    try:
        arguments.run(cluster, arguments)
    except ClusterError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    defaults = ClusterSpec()
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="of the cluster; %(default)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Callable[[LocalCluster, argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, parents=[common])
        sub.set_defaults(run=run)
        return sub

    up = verb("up", _up, "start a cluster")
    up.add_argument("--nodes", type=int, help=f"nodes in all, the head among them; {defaults.nodes}")
    up.add_argument("--cpus-per-node", type=int, default=defaults.cpus_per_node, help="%(default)s")
    up.add_argument("--head-cpus", type=int, default=defaults.head_cpus, help="%(default)s: work goes to the others")
    up.add_argument("--object-store-mb", type=int, default=defaults.object_store_mb, help="of each node; %(default)s")
    up.add_argument("--port", type=int, help="of dashboard and job server; a free one by default")
    up.add_argument("--autoscale", type=int, nargs=2, metavar=("MIN", "MAX"), help="nodes beside the head, by demand")
    up.add_argument("--idle-minutes", type=float, default=defaults.idle_minutes, help="then a node leaves; %(default)s")
    verb("status", _status, "list the nodes")
    verb("submit-env", _submit_env, "print what a shell needs to submit jobs")
    verb("add-node", lambda cluster, _: _say(cluster.add_node()), "start one more node")
    remove = verb("remove-node", lambda cluster, chosen: cluster.remove_node(chosen.name), "kill a node")
    remove.add_argument("name", help="as `status` shows it")
    drain = verb(
        "drain-node", lambda cluster, chosen: cluster.drain_node(chosen.name, chosen.deadline), "announce a node's end"
    )
    drain.add_argument("name", help="as `status` shows it")
    drain.add_argument("--deadline", type=float, default=30, help="seconds until then; %(default)s")
    verb("down", lambda cluster, _: cluster.down(), "end every process of the cluster and remove its folder")
    return parser


def _up(cluster: LocalCluster, arguments: argparse.Namespace) -> None:
    if arguments.autoscale and arguments.nodes:
        raise ClusterError("--nodes: with --autoscale the autoscaler decides how many there are")
    cluster.up(
        ClusterSpec(
            nodes=arguments.nodes or ClusterSpec.nodes,
            cpus_per_node=arguments.cpus_per_node,
            head_cpus=arguments.head_cpus,
            object_store_mb=arguments.object_store_mb,
            port=arguments.port,
            autoscale=arguments.autoscale and tuple(arguments.autoscale),
            idle_minutes=arguments.idle_minutes,
        )
    )
    _status(cluster, arguments)
    script = f"{shlex.quote(sys.executable)} {shlex.quote(__file__)}"
    folder = "" if cluster.folder == DEFAULT_FOLDER else f" --folder {shlex.quote(str(cluster.folder))}"
    _say(f"dashboard  {cluster.job_server}  (token in {cluster.folder}/token)")
    _say(f'use it     eval "$({script} submit-env{folder})"')
    _say("           ray job submit --working-dir . -- python -m detr_ray.train --config configs/quickstart.yaml")
    _say(f"end it     {script} down{folder}")


def _status(cluster: LocalCluster, arguments: argparse.Namespace) -> None:
    for node in cluster.nodes():
        _say(f"{node.name:<10} {'alive' if node.alive else 'dead':<6} {node.cpus} CPUs  {node.node_id}")


def _submit_env(cluster: LocalCluster, arguments: argparse.Namespace) -> None:
    for key, value in cluster.submit_environment().items():
        _say(f"export {key}={shlex.quote(value)}")
    _say(f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
