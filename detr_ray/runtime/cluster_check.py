"""Checks whether a run can use a cluster: enough room, equal versions, and files that every node can reach.

`check_cluster` is for the check command, `preflight_nodes` a shorter check at the start of training. Both end within
half a minute, whatever hangs.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from detr_ray.callbacks import Say
from detr_ray.config import Config, ConfigError
from detr_ray.data.errors import few
from detr_ray.engine.checkpoints.run_directory import absolute_storage
from detr_ray.engine.preflight.findings import Level, Report
from detr_ray.engine.preflight.writing import within
from detr_ray.engine.reporting.tracking_store import run_tracking_uri
from detr_ray.printable import counted
from detr_ray.runtime import node_probe
from detr_ray.runtime.node_probe import Answer, Questions, code_facts, probe_node, reason_of
from detr_ray.runtime.ray_internals import autoscaler_adds_nodes
from detr_ray.runtime.resources import Node, plan_workers, usable_nodes
from detr_ray.runtime.session import session_of, unreachable_address
from detr_ray.runtime.shared_places import StorageTrial, refuse_lost_storage, sample_files, tracking_on_disk
from detr_ray.tracking.store import sqlite_path

AREA = "cluster"
ALL_WITHIN_S = 20.0
"""Seconds after the start of the check at which nodes without an answer are given up."""
_TRIAL_S = 7.0
_CLEANING_S = 2.0
_NODES_NAMED = 8
_SAME_CODE = "install the same on all nodes, or submit the job with --working-dir, which brings its own code along"
_SAME_PACKAGES = "install the same on all nodes"
_SHARED = "use a folder that all nodes share, or a bucket (s3://..., gs://...)"


def check_cluster(config: Config, report: Report, say: Say) -> None:
    """Checks the cluster that a run would use: the one named by ``RAY_ADDRESS``, otherwise one on this machine.

    Args:
        config: the configuration.
        report: gets the findings.
        say: shows the user a line.

    Raises:
        ConfigError: the configuration does not use a cluster.
    """
    if config.train.launcher == "local":
        raise ConfigError("--cluster: with train.launcher=local a run uses no cluster")
    started = time.monotonic()
    try:
        fault = None if ray.is_initialized() else unreachable_address()
    except ConfigError as error:
        report.add("error", AREA, str(error))
        return
    if fault:
        report.add("error", AREA, fault, "name a running cluster in RAY_ADDRESS, or unset it to train on this machine")
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(session_of(config))
        except (ConfigError, ConnectionError, TimeoutError, ray.exceptions.RayError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            report.add("error", AREA, f"the cluster at {os.environ.get('RAY_ADDRESS')} cannot be joined: {reason}")
            return
        _check_workers(config, report)
        try:
            storage = absolute_storage(config.run.storage)
            refuse_lost_storage(storage)
        except ConfigError as error:
            report.add("error", AREA, str(error))
            return
        _check_nodes(config, storage, report, started, lenient="error")


def preflight_nodes(config: Config, storage_path: str, say: Say) -> None:
    """Checks the nodes of the cluster that this process is connected to, before training starts.

    Args:
        config: the configuration of the run, whose data is there.
        storage_path: absolute folder or URI of the run.
        say: shows the user warnings.

    Raises:
        ConfigError: training would fail on some node; one line for each fault.
    """
    refuse_lost_storage(storage_path)
    nodes = usable_nodes()
    if [node.node_id for node in nodes] == [ray.get_runtime_context().get_node_id()]:
        return
    report = Report()
    _check_nodes(config, storage_path, report, time.monotonic(), lenient="warning")
    for finding in report.findings:
        if finding.level == "warning":
            say(f"WARNING: {finding.message}" + (f"; {finding.advice}" if finding.advice else ""))
    errors = [
        finding.message + (f"; {finding.advice}" if finding.advice else "")
        for finding in report.findings
        if finding.level == "error"
    ]
    if errors:
        raise ConfigError(errors)


def _check_workers(config: Config, report: Report) -> None:
    try:
        request = plan_workers(config)
    except ConfigError as error:
        report.add("error", AREA, str(error))
        return
    missing = request.missing()
    kind = "GPU" if request.use_gpu else "CPU"
    least, most = request.min_workers, request.max_workers
    asked = ("" if least == most else f"{least} to ") + counted(most, f"{kind} worker")
    if not missing:
        report.add("ok", AREA, f"there is room for {asked}")
    elif autoscaler_adds_nodes():
        report.add("ok", AREA, missing)
    else:
        advice = f"training waits up to train.start_timeout_s={config.train.start_timeout_s} for it"
        report.add("warning", AREA, missing, advice)


@dataclass(frozen=True)
class _Silence:
    """A node that did not answer, and why."""

    reason: str


def _check_nodes(config: Config, storage: str, report: Report, started: float, lenient: Level) -> None:
    """Runs a probe on all nodes at the same time, and reports differences and failures with their nodes.

    Args:
        config: the configuration.
        storage: absolute folder or URI.
        report: gets the findings.
        started: when the whole check began.
        lenient: the level of findings that training survives: a node without an answer, an unreachable tracking store.
    """
    nodes = usable_nodes()
    trial = StorageTrial(storage, [node.node_id for node in nodes])
    try:
        fault, samples = _begin(config, trial, report)
        if fault:
            report.add("error", AREA, f"run.storage: {storage} cannot be used from here: {fault}", "choose another one")
        uri = run_tracking_uri(config) if config.tracking.enabled else None
        # A database inside the storage is checked with the storage.
        asked = uri if uri is not None and (sqlite_path(uri) is None or tracking_on_disk(uri, storage)) else None
        answers = _ask(nodes, trial, samples, asked, ALL_WITHIN_S - (time.monotonic() - started))
        unseen = trial.unseen(_CLEANING_S)
    finally:
        trial.end(_CLEANING_S)
    heard = {node: answer for node, answer in answers.items() if not isinstance(answer, _Silence)}
    for node, answer in answers.items():
        if isinstance(answer, _Silence):
            report.add(lenient, AREA, f"node {node} {answer.reason}", "look at the node's Ray logs, or take it away")
    if heard:
        verb = "answers" if len(heard) == 1 else "answer"
        report.add("ok", AREA, f"{counted(len(heard), 'node')} {verb}: {_where(list(heard))}")
        _compare_code(nodes, heard, report)
        if not fault:
            _report_storage(storage, heard, [node.name for node in nodes if node.node_id in unseen], report)
        _report_samples(samples, heard, report)
        if uri is not None:
            _report_tracking(config, uri, storage, heard, report, lenient)


def _begin(config: Config, trial: StorageTrial, report: Report) -> tuple[str | None, dict[str, str]]:
    """Writes the driver's file and, in parallel, finds images that the nodes will read.

    Returns:
        Why the storage cannot be used, or None; configuration key -> image.
    """

    def begin() -> str | None:
        try:
            within(_TRIAL_S, trial.begin)
        except (OSError, ConfigError) as error:
            return reason_of(error)
        return None

    with ThreadPoolExecutor(1) as pool:
        fault = pool.submit(begin)
        try:
            samples, not_tried = within(_TRIAL_S, lambda: sample_files(config))
        except TimeoutError as error:
            samples, not_tried = {}, {"data": str(error)}
    for key, reason in not_tried.items():
        report.add("warning", AREA, f"{key}: not tried on the nodes: {reason}")
    return fault.result(), samples


def _ask(
    nodes: Sequence[Node], trial: StorageTrial, samples: dict[str, str], uri: str | None, seconds: float
) -> dict[str, Answer | _Silence]:
    """The answer of every node, by its name."""
    # A node may have another version of this package, so the functions are sent with their code.
    ray.cloudpickle.register_pickle_by_value(node_probe)
    probe = ray.remote(num_cpus=0, max_retries=0)(probe_node)
    refs = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        questions = Questions(
            storage=trial.files_for(node.node_id), samples=samples, tracking_uri=uri, seconds=_TRIAL_S
        )
        refs[node.name] = probe.options(scheduling_strategy=there).remote(questions)
    seconds = max(seconds, _TRIAL_S + 1)
    ready, late = ray.wait(list(refs.values()), num_returns=len(refs), timeout=seconds, fetch_local=True)
    for ref in late:
        ray.cancel(ref, force=True)
    return {name: _answer(ref, ref in ready, seconds) for name, ref in refs.items()}


def _answer(ref: ray.ObjectRef, ready: bool, seconds: float) -> Answer | _Silence:
    if not ready:
        return _Silence(f"does not answer within {seconds:.0f} s")
    try:
        return ray.get(ref, timeout=5)
    except ray.exceptions.RayError as error:
        lines = [line for line in str(error).strip().split("\n") if line.strip()]
        return _Silence(f"cannot run a task: {lines[-1].strip() if lines else type(error).__name__}")


def _compare_code(nodes: Sequence[Node], heard: dict[str, Answer], report: Report) -> None:
    """Reports the nodes whose versions differ from this process's."""
    here, before = code_facts(), report.count("error") + report.count("warning")
    without = [node for node, answer in heard.items() if "detr_ray" not in answer["facts"]]
    if without:
        report.add("error", AREA, f"detr_ray is not installed on {_where(without)}", _SAME_CODE)
    for package in ("ray", "Python", "torch", "torchvision", "detr_ray"):
        there = {node: _public(answer["facts"].get(package, "none")) for node, answer in heard.items()}
        if package == "detr_ray":
            there = {node: version for node, version in there.items() if node not in without}
        for version, names in _by_value(there).items():
            if version != _public(here[package]):
                level: Level = "warning" if package == "Python" else "error"
                message = f"{package} is {version} on {_where(names)}, {_public(here[package])} here"
                report.add(level, AREA, message, _SAME_CODE if package == "detr_ray" else _SAME_PACKAGES)
    changed = [
        node
        for node, answer in heard.items()
        if answer["facts"].get("detr_ray") == here["detr_ray"] and answer["facts"].get("code") != here["code"]
    ]
    if changed:
        codes = ", ".join(sorted({heard[node]["facts"].get("code", "?") for node in changed}))
        message = (
            f"detr_ray {here['detr_ray']} has other source files on {_where(changed)} ({codes}) than here "
            f"({here['code']})"
        )
        report.add("error", AREA, message, _SAME_CODE)
    _check_gpus(nodes, heard, report)
    if report.count("error") + report.count("warning") == before:
        versions = ", ".join(f"{name} {_public(here[name])}" for name in ("ray", "Python", "torch", "detr_ray"))
        report.add("ok", AREA, f"{versions} (source {here['code']}) everywhere")


def _check_gpus(nodes: Sequence[Node], heard: dict[str, Answer], report: Report) -> None:
    with_gpus = [node.name for node in nodes if node.total.get("GPU", 0) and node.name in heard]
    blind = [node for node in with_gpus if heard[node]["facts"].get("torch", "").endswith("+cpu")]
    if blind:
        message = f"torch is a build without GPUs on {_where(blind)}, which Ray has GPUs on"
        report.add("error", AREA, message, "install a CUDA build of torch there")
    drivers = _by_value({node: heard[node]["facts"].get("NVIDIA driver", "none") for node in with_gpus})
    if len(drivers) > 1:
        shown = "; ".join(f"{driver} on {_where(names)}" for driver, names in sorted(drivers.items()))
        report.add("warning", AREA, f"NVIDIA drivers differ: {shown}")


def _public(version: str) -> str:
    """A version without its build suffix, which may differ on machines without GPUs."""
    return version.partition("+")[0]


def _report_storage(storage: str, heard: dict[str, Answer], unseen: list[str], report: Report) -> None:
    before = report.count("error")
    for node, answer in heard.items():
        faults = answer["faults"]
        if faults.get("read storage") == "":
            message = f"run.storage: {storage} is not shared: node {node} does not see what was written here"
            report.add("error", AREA, message, _SHARED)
        elif "read storage" in faults or "storage" in faults:
            reason = faults.get("read storage") or faults.get("storage")
            report.add("error", AREA, f"run.storage: {storage} cannot be read on node {node}: {reason}")
        elif "write storage" in faults:
            message = f"run.storage: {storage} cannot be written on node {node}: {faults['write storage']}"
            report.add("error", AREA, message)
        elif node in unseen:
            message = f"run.storage: {storage} is not shared: what node {node} wrote is not seen here"
            report.add("error", AREA, message, _SHARED)
    if report.count("error") == before:
        report.add("ok", AREA, f"run.storage: {storage} is written and read by all of them")


def _report_samples(samples: dict[str, str], heard: dict[str, Answer], report: Report) -> None:
    for key, location in samples.items():
        blind = _by_value({node: answer["faults"][key] for node, answer in heard.items() if key in answer["faults"]})
        for reason, names in blind.items():
            message = f"{key}: {location} cannot be read on {_where(names)}: {reason}"
            report.add("error", AREA, message, f"the nodes read the images themselves: {_SHARED}")
        if not blind:
            report.add("ok", AREA, f"{key}: {location} is read by all of them")


def _report_tracking(
    config: Config, uri: str, storage: str, heard: dict[str, Answer], report: Report, level: Level
) -> None:
    before = len(report.findings)
    faults = {node: answer["faults"]["tracking"] for node, answer in heard.items() if "tracking" in answer["faults"]}
    for reason, names in _by_value(faults).items():
        report.add(level, AREA, f"tracking: from {_where(names)}: {reason}", "rank 0 may run on any node")
    if config.tracking.uri is None:
        here = code_facts()["MLFLOW_TRACKING_URI"]
        unlike = [node for node, answer in heard.items() if answer["facts"].get("MLFLOW_TRACKING_URI") != here]
        if unlike:
            message = f"MLFLOW_TRACKING_URI is not on {_where(unlike)} what it is here"
            report.add("warning", AREA, message, "set tracking.uri, so that it does not matter where rank 0 runs")
    elsewhere = tracking_on_disk(uri, storage)
    if elsewhere and len(heard) > 1:
        report.add(
            "warning", AREA, f"tracking: {elsewhere} lies on the disk of whichever node rank 0 runs on",
            "set tracking.uri to an MLflow server that all nodes reach",
        )  # fmt: skip
    if len(report.findings) == before:
        report.add("ok", AREA, "tracking: the store is reached from all of them")


def _by_value(values: Mapping[str, str]) -> dict[str, list[str]]:
    """Value -> the nodes that have it."""
    nodes: dict[str, list[str]] = {}
    for node, value in values.items():
        nodes.setdefault(value, []).append(node)
    return nodes


def _where(names: Collection[str]) -> str:
    """Some nodes by name."""
    return few(sorted(names), _NODES_NAMED)
