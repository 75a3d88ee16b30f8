"""A worker that waits at ``breakpoint()`` is reached by the editor's configuration that attaches to it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from debug_adapter import DebugAdapter
from observing import SMALLEST
from test_debugging import CONFIGURATIONS, ROOT, filled
from tiny import TINY, make_dataset

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(590)]

ARGUMENTS = ("train.launcher=ray", "train.num_workers=1", "train.stall_timeout_s=86400", "train.max_failures=0")
"""As docs/debugging.md says; the first is the default."""


def test_a_worker_that_waits_at_a_breakpoint_is_reached(tmp_path: Path) -> None:
    code = tmp_path / "code"
    shutil.copytree(ROOT / "detr_ray", code / "detr_ray", ignore=shutil.ignore_patterns("__pycache__"))
    criterion = code / "detr_ray" / "loss" / "criterion.py"
    lines = criterion.read_text().splitlines(keepends=True)
    place = next(number for number, line in enumerate(lines) if "self.matcher.match(" in line)
    indent = len(lines[place]) - len(lines[place].lstrip())
    lines.insert(place, f"{' ' * indent}breakpoint()\n")
    criterion.write_text("".join(lines))
    data = make_dataset(tmp_path / "shapes", num_train=8, num_val=2)
    # Ray's sockets need a short path.
    ray_folder = Path(f"/tmp/detr-debug-{os.getpid()}")
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(code), "RAY_TMPDIR": str(ray_folder)}
    command = [sys.executable, "-m", "detr_ray.train", *TINY, *SMALLEST, *ARGUMENTS]
    ray_folder.mkdir()
    try:
        with (tmp_path / "out.txt").open("w") as out:
            training = subprocess.Popen(
                [*command, f"data.root={data}", f"run.storage={tmp_path}/runs"],
                env=environment, cwd=code, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
            try:
                host, port = where_it_listens(ray_folder, training, tmp_path / "out.txt")
                look(host, port, criterion, place + 2)
            finally:
                end_with_children(training)
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)


def end_with_children(training: subprocess.Popen[bytes]) -> None:
    """Ends a training with the Ray that it has started, whose processes don't end with a driver that is killed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(training.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    training.kill()
    training.wait(60)


def where_it_listens(ray_folder: Path, training: subprocess.Popen[bytes], out: Path) -> tuple[str, str]:
    """Address and port that a worker announces in its log."""
    give_up = time.monotonic() + 420
    while time.monotonic() < give_up and training.poll() is None:
        for log in ray_folder.glob("**/logs/worker-*.err"):
            found = re.search(r"Ray debugger is listening on (\S+):(\d+)", log.read_text(errors="replace"))
            if found is not None:
                return found[1], found[2]
        time.sleep(0.5)
    raise AssertionError(f"no worker waits for a debugger: {out.read_text()}")


def look(host: str, port: str, criterion: Path, line: int) -> None:
    """Attaches, and looks at the loss's inputs where the worker stands."""
    configuration = filled(
        CONFIGURATIONS["Attach to a worker that waits at breakpoint()"], **{"input:host": host, "input:port": port}
    )
    connect = configuration["connect"]
    address = (connect["host"], int(connect["port"]))
    configuration["connect"] = {"host": address[0], "port": address[1]}
    with DebugAdapter(criterion.parent, address) as adapter:
        attached = adapter.ask("attach", **configuration)
        adapter.event("initialized")
        adapter.answer_to(adapter.ask("configurationDone"))
        adapter.answer_to(attached)
        stopped = adapter.event("stopped")
        frames = adapter.answer_to(adapter.ask("stackTrace", threadId=stopped["threadId"]))["stackFrames"]
        places = [(Path(frame["source"]["path"]).name, frame["name"].rpartition(".")[2]) for frame in frames]
        below = [("criterion.py", "forward"), ("step.py", "_forward_backward"), ("loop.py", "_train")]
        assert [place for place in places if place in below] == below, places
        frame = frames[places.index(below[0])]
        assert frame["line"] in (line - 1, line), "where breakpoint() was written, or the line below it"
        found = adapter.answer_to(adapter.ask("evaluate", expression="len(targets)", frameId=frame["id"]))
        assert found["result"] == "4"
