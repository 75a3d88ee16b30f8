"""The check that runs on each node: its versions, and whether it can use the storage, images and tracking store.

Ray sends these functions to the node with their code, because the node may have another version of this package, or
none. So this module has no top-level imports of the package, and its functions take and return plain values.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypedDict


class Questions(TypedDict):
    """The checks of a node.

    Attributes:
        storage: a file that the driver wrote, and a file for the node to write; None: not checked.
        samples: configuration key -> a file for the node to read.
        tracking_uri: MLflow store that the node should reach; None: not checked.
        seconds: time limit of each check.
    """

    storage: tuple[str, str] | None
    samples: dict[str, str]
    tracking_uri: str | None
    seconds: float


class Answer(TypedDict):
    """The results of a node.

    Attributes:
        facts: its versions, see `code_facts`.
        faults: failed check -> reason. Checks are ``read storage``, ``write storage``, ``storage`` (both),
            ``tracking``, and the keys of ``samples``.
    """

    facts: dict[str, str]
    faults: dict[str, str]


def probe_node(questions: Questions) -> Answer:
    """Runs all checks on a node at the same time. A check that does not end in time is a fault; it is not stopped."""
    seconds = questions["seconds"]
    faults: dict[str, str] = {}
    tries: dict[str, Callable[[], Any]] = {
        key: partial(read_file, location, 1) for key, location in questions["samples"].items()
    }
    if questions["storage"] is not None:
        tries["storage"] = partial(_try_storage, *questions["storage"], faults)
    if questions["tracking_uri"] is not None:
        tries["tracking"] = partial(_try_tracking, questions["tracking_uri"])
    threads = {name: _start(name, work, faults) for name, work in tries.items()}
    facts = code_facts()
    deadline = time.monotonic() + seconds
    for name, thread in threads.items():
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            faults[name] = f"no answer within {seconds:.0f} s"
    return {"facts": facts, "faults": dict(faults)}


def _start(name: str, work: Callable[[], Any], faults: dict[str, str]) -> threading.Thread:
    def run() -> None:
        try:
            work()
        except BaseException as error:  # any error is a result of the check
            faults[name] = reason_of(error)

    thread = threading.Thread(target=run, name=f"probe {name}", daemon=True)
    thread.start()
    return thread


def code_facts() -> dict[str, str]:
    """Versions of Python, the GPU driver and installed packages in this process."""
    facts = {"Python": platform.python_version()}
    for package in ("ray", "torch", "torchvision"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        import detr_ray

        facts["detr_ray"] = detr_ray.__version__
        facts["code"] = _digest(Path(detr_ray.__file__).parent)
    except (ImportError, AttributeError, OSError, TypeError):
        pass
    try:
        driver = re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
        facts["NVIDIA driver"] = driver[1] if driver else "unknown"
    except OSError:
        pass
    # The address may contain a password. A hash is enough to compare nodes.
    facts["MLFLOW_TRACKING_URI"] = hashlib.sha256(os.environ.get("MLFLOW_TRACKING_URI", "").encode()).hexdigest()
    return facts


def _digest(folder: Path) -> str:
    """A short hash of the names and contents of all source files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


def _try_storage(read: str, written: str, faults: dict[str, str]) -> None:
    try:
        read_file(read, 1)
    except BaseException as error:
        faults["read storage"] = "" if isinstance(error, FileNotFoundError) else reason_of(error)
        return
    try:
        write_file(written, b"node")
    except BaseException as error:
        faults["write storage"] = reason_of(error)


def _try_tracking(uri: str) -> None:
    from detr_ray.tracking.reachability import try_store

    try_store(uri)


def read_file(location: str, num_bytes: int) -> bytes:
    """The first bytes of a local file or an object."""
    if "://" not in location:
        with Path(location).open("rb") as file:
            return file.read(num_bytes)
    from detr_ray.locations import at
    from detr_ray.retries import Patience

    def read(file_system: Any, path: str) -> bytes:
        with file_system.open_input_stream(path) as file:
            return file.read(num_bytes)

    return at(location, read, Patience(attempts=1))


def write_file(location: str, content: bytes) -> None:
    """Writes a small local file or object. Creates no folders: the driver has created them."""
    if "://" not in location:
        Path(location).write_bytes(content)
        return
    from detr_ray.locations import write_bytes
    from detr_ray.retries import Patience

    write_bytes(location, content, Patience(attempts=1))


def reason_of(error: BaseException) -> str:
    """The reason of an error, in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().split("\n")[0]
