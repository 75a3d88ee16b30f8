r"""A Ray cluster of several nodes on this machine: real raylets, real job server, real autoscaler.

For trying jobs on a cluster before paying for one, and for tests: submitted jobs, nodes that die, and nodes that an
autoscaler adds and removes.

    python cluster/local.py up --nodes 3 --cpus-per-node 2    # a head without CPUs, and two nodes
    eval "$(python cluster/local.py submit-env)"              # where it is, and its token, for this shell
    ray job submit --working-dir . -- python -m detr_ray.train --config configs/quickstart.yaml \
        "run.storage=$PWD/runs" "data.root=$PWD/runs/quickstart-data"
    python cluster/local.py status
    python cluster/local.py remove-node node-2                # kills it, like a power failure
    python cluster/local.py add-node
    python cluster/local.py down

    python cluster/local.py up --autoscale 0 3                # a head; up to three nodes come when a job asks for them

All files of a cluster are in one folder (``--folder``). Several clusters with different folders can run at the same
time, also beside another Ray. Every process of a cluster has the folder's name in its environment, and its session id
is stored in the folder. So `down` finds all processes of the cluster and no others, also after a crash, and also those
that the autoscaler started.

All nodes share this machine's cores and disk, so speed cannot be measured.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from local_cluster import ClusterError, ClusterSpec, LocalCluster

DEFAULT_FOLDER = Path(f"/tmp/detr_ray-{os.getuid()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python cluster/local.py``."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(LocalCluster(arguments.folder), arguments)
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
    _say("           ray job submit --working-dir . -- python -m detr_ray.train --config configs/quickstart.yaml \\")
    _say('               "run.storage=$PWD/runs" "data.root=$PWD/runs/quickstart-data"')
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
