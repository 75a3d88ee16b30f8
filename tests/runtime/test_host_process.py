"""Library calls leave the process they are called from as it was."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from host_process import unchanged
from mlflow_store import empty_store
from tiny import make_dataset, tiny_config

from detr_ray.config import ConfigError
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.job import prepare_job
from detr_ray.engine.training_step.step import compiled
from detr_ray.runtime.host_process import host_process_as_before
from detr_ray.runtime.launch import evaluate, fit


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes", num_train=16, num_val=4)


@pytest.fixture(autouse=True)
def odd_settings() -> None:
    """What a host might have set."""
    torch.manual_seed(77)
    random.seed(77)


def test_training_and_evaluating_here(dataset: Path, tmp_path: Path) -> None:
    empty_store(tmp_path)
    settings = ("train.epochs=1", "model.dropout=0.1", "tracking.enabled=true")
    with unchanged():
        result = fit(tiny_config(dataset, tmp_path, "run.name=here", *settings))
    assert result.status == "finished"
    with unchanged():
        evaluate(tiny_config(dataset, tmp_path, f"eval.checkpoint={result.run_path}"))


def test_calls_that_raise(dataset: Path, tmp_path: Path) -> None:
    bad = make_dataset(tmp_path / "bad", num_train=16, num_val=4)
    path = sorted((bad / "train2017").iterdir())[5]
    path.write_bytes(path.read_bytes()[:200])
    with unchanged(), pytest.raises(RunFailed):
        fit(tiny_config(bad, tmp_path, "run.name=bad"))
    with unchanged(), pytest.raises(ConfigError):
        evaluate(tiny_config(dataset, tmp_path, f"eval.checkpoint={tmp_path}/nothing"))


def test_preparing_and_building(dataset: Path, tmp_path: Path) -> None:
    with unchanged():
        job = prepare_job(tiny_config(dataset, tmp_path), lambda line: None)
        first = job.build_detector().model.state_dict()
        again = job.build_detector().model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first), "its own random numbers are the seed's"


def test_a_compiled_model_leaves_the_limits_of_others() -> None:
    import torch._dynamo

    model = torch.nn.Conv2d(3, 4, 3)
    with unchanged():
        compiled(model)
    assert torch._dynamo.config.recompile_limit < 100


def test_what_a_call_changes_is_set_back_also_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANGED", "before")
    monkeypatch.setenv("REMOVED", "before")
    logger = logging.getLogger("a.host")
    with unchanged(), pytest.raises(ValueError, match="on the way"), host_process_as_before():
        os.environ.update(CHANGED="after", ADDED="after")
        del os.environ["REMOVED"]
        os.chdir(tmp_path)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        logger.setLevel(logging.CRITICAL)
        logger.addHandler(logging.NullHandler())
        warnings.simplefilter("ignore")
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.manual_seed(3)
        raise ValueError("on the way")


def test_outside_of_the_main_thread(dataset: Path, tmp_path: Path) -> None:
    statuses: list[str] = []

    def work() -> None:
        statuses.append(fit(tiny_config(dataset, tmp_path, "run.name=thread", "train.epochs=1")).status)

    with unchanged():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert statuses == ["finished"]


OWN_RAY = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
import torch
from host_process import unchanged
from tiny import tiny_config
import detr_ray.runtime.launch as launch
from detr_ray.runtime.session import session_of

config = tiny_config(Path({dataset!r}), Path({folder!r}), "run.name=ray", "train.launcher=ray", "train.epochs=1")
signal.signal(signal.SIGTERM, lambda *_: None)
with unchanged():
    {call}
print("nothing has changed")
"""


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "call",
    [
        pytest.param("with session_of(config): pass", id="session"),
        pytest.param("launch.fit(config)", id="fit", marks=pytest.mark.slow),
    ],
)
def test_a_ray_of_our_own(dataset: Path, tmp_path: Path, call: str) -> None:
    tests = str(Path(__file__).parents[1])
    program = OWN_RAY.format(tests=tests, dataset=str(dataset), folder=str(tmp_path), call=call)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=280, check=False)
    assert "nothing has changed" in done.stdout, done.stdout + done.stderr
