"""A job with hooks, from every place that programs run it: the main thread, another one, an event loop, an actor."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from mlflow_store import empty_store
from tiny import tiny_config

from detr_ray.config import Config, ConfigError
from detr_ray.engine.hooks import Budget, Evaluated, JobHooks
from detr_ray.engine.job import prepare_job
from detr_ray.engine.reporting.progress import FitResult
from detr_ray.runtime.job_status import NAMESPACE
from detr_ray.runtime.launch import run_job
from detr_ray.runtime.resources import plan_workers
from detr_ray.runtime.session import is_own_ray

STEPS_AN_EPOCH = 5

ON_RAY = ("train.launcher=ray", "train.num_workers=2")


def quiet(line: str) -> None:
    """Shows nothing."""


def run(config: Config, hooks: JobHooks) -> FitResult:
    return run_job(prepare_job(config, quiet), hooks)


def in_thread(work: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def in_event_loop(work: Callable[[], Any]) -> Any:
    async def main() -> Any:
        return work()

    return asyncio.run(main())


def at_once(work: Callable[[], Any]) -> Any:
    return work()


PLACES = {"main thread": at_once, "thread": in_thread, "event loop": in_event_loop}


def told_and_stopped(place: Callable[[Callable[[], Any]], Any], config: Config) -> None:
    """Stops the run after its first evaluation, and has it go on to its end: each evaluation is told once."""
    told: list[Evaluated] = []
    stopped = place(lambda: run(config, JobHooks(lambda: bool(told), told.append)))
    assert stopped.status == "stopped" and STEPS_AN_EPOCH <= stopped.step < 200 * STEPS_AN_EPOCH
    for evaluated in told:
        assert evaluated.checkpoint == f"{stopped.run_path}/checkpoints/step_{evaluated.step:08d}"
        assert Path(evaluated.checkpoint, "model.pt").is_file() and "val/AP" in evaluated.metrics
    first = [evaluated.step for evaluated in told]
    last = -(-(stopped.step + 2) // STEPS_AN_EPOCH)
    end = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": last * STEPS_AN_EPOCH})})
    finished = place(lambda: run(end, JobHooks(on_evaluation=told.append)))
    assert finished.status == "finished" and finished.step == last * STEPS_AN_EPOCH
    steps = [evaluated.step for evaluated in told]
    assert steps == sorted(set(steps)) and steps[len(first) :] and steps[-1] == finished.step
    assert told[-1].metrics["val/AP"] == finished.metrics["val/AP"]


LONG = ("train.epochs=200", "run.name=a", "train.keep_last=99")


@pytest.mark.parametrize("place", PLACES)
def test_hooks_of_a_run_in_this_process(place: str, dataset: Path, tmp_path: Path) -> None:
    told_and_stopped(PLACES[place], tiny_config(dataset, tmp_path, *LONG))


def test_an_error_of_a_hook_ends_the_run(dataset: Path, tmp_path: Path) -> None:
    def fail(evaluated: Evaluated) -> None:
        raise ValueError("told")

    with pytest.raises(ValueError, match="told"):
        run(tiny_config(dataset, tmp_path, *LONG), JobHooks(on_evaluation=fail))


def test_a_run_in_this_process_keeps_its_budget(dataset: Path, tmp_path: Path) -> None:
    before, during = torch.get_num_threads(), set()
    torch.set_num_threads(2)
    hooks = JobHooks(on_evaluation=lambda evaluated: during.add(torch.get_num_threads()), budget=Budget(cpus=1))
    run(tiny_config(dataset, tmp_path, "train.epochs=1"), hooks)
    assert during == {1} and torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_a_run_is_the_child_of_its_parent(dataset: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    config = tiny_config(dataset, tmp_path, "train.epochs=1", "tracking.enabled=true", "tracking.experiment=search")
    client = MlflowClient(empty_store(tmp_path))
    parent = client.create_run(
        client.create_experiment("search", artifact_location=str(tmp_path / "artifacts"))
    ).info.run_id
    run(config, JobHooks(parent_run=parent))
    (child,) = client.search_runs(
        [client.get_experiment_by_name("search").experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"
    )
    assert child.info.status == "FINISHED" and "val/AP" in child.data.metrics


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("shared_ray")
class TestOnRay:
    @pytest.mark.slow
    @pytest.mark.parametrize("place", ["thread", "event loop"])
    def test_hooks(self, place: str, dataset: Path, tmp_path: Path) -> None:
        told_and_stopped(PLACES[place], tiny_config(dataset, tmp_path, *ON_RAY, *LONG))

    def test_stopped_before_a_worker_has_begun(self, dataset: Path, tmp_path: Path) -> None:
        result = run(tiny_config(dataset, tmp_path, *ON_RAY, "run.name=a"), JobHooks(should_stop=lambda: True))
        assert (result.status, result.step, result.run_name) == ("stopped", 0, "a")

    def test_a_budget_is_kept(self, dataset: Path, tmp_path: Path) -> None:
        def plan(budget: Budget, *overrides: str) -> tuple[int, int, int]:
            request = plan_workers(tiny_config(dataset, tmp_path, *ON_RAY, *overrides), budget)
            return request.min_workers, request.max_workers, request.tasks_per_worker

        assert plan(Budget()) == (2, 2, 2)
        assert plan(Budget(workers=1)) == (1, 1, 2)
        assert plan(Budget(workers=(1, 2), cpus=2)) == (1, 1, 1)
        assert plan(Budget(cpus=3), "train.num_workers=[1, 8]") == (1, 2, 1)
        assert plan(Budget(workers=1, cpus=4), "data.tasks_per_worker=9") == (1, 1, 3)
        with pytest.raises(ConfigError, match="2 workers would take more than this run's budget of 2 CPUs"):
            plan(Budget(cpus=2))
        with pytest.raises(ConfigError, match="the cluster has no GPU"):
            plan(Budget(gpus=1), "train.use_gpu=true")


class Trial:
    """An actor that trains."""

    def fit(self, config: str, overrides: list[str]) -> tuple[str, list[int], int]:
        import signal

        from detr_ray.config import load_config
        from detr_ray.runtime.session import is_own_ray

        before = signal.getsignal(signal.SIGTERM)
        told: list[int] = []
        handlers: list[Any] = []

        def on_evaluation(evaluated: Evaluated) -> None:
            told.append(evaluated.step)
            handlers.append(signal.getsignal(signal.SIGTERM))

        job = prepare_job(load_config([config], overrides), print)
        result = run_job(job, JobHooks(on_evaluation=on_evaluation))
        assert set(handlers) == {before}, "signals are Ray's"
        assert not is_own_ray(), "it is the driver's"
        return result.status, told, result.step


def free_cpus() -> float:
    return ray.available_resources().get("CPU", 0.0)


def own_actors() -> list[str]:
    return [each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if each["namespace"] == NAMESPACE]


@pytest.mark.ray
@pytest.mark.timeout(250)
@pytest.mark.usefixtures("shared_ray")
def test_an_actor_trains_forks_and_leaves_nothing_behind_when_it_is_killed(dataset: Path, tmp_path: Path) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    config = tmp_path / "config.yaml"
    config.write_text(tiny_config(dataset, tmp_path, *ON_RAY).to_yaml())
    assert is_own_ray()
    every_cpu = ray.cluster_resources()["CPU"]
    run(tiny_config(dataset, tmp_path, "train.epochs=2", "run.name=whole"), JobHooks())
    trial = ray.remote(num_cpus=0)(Trial).remote()
    one = ["train.epochs=3", "train.num_workers=1", "run.name=forked", f"run.fork_from={tmp_path}/whole"]
    assert ray.get(trial.fit.remote(str(config), one), timeout=200) == ("finished", [15], 15)
    trial.fit.remote(str(config), ["train.epochs=500", "run.name=killed", "train.checkpoint_every_steps=1"])
    checkpoints = tmp_path / "killed" / "checkpoints"
    wait_for(lambda: len(list(checkpoints.glob("step_*"))) > 0, 120)
    assert free_cpus() <= every_cpu - 2
    ray.kill(trial)
    wait_for(lambda: free_cpus() == every_cpu, 60)
    wait_for(lambda: not own_actors(), 60)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, (free_cpus(), own_actors())
        time.sleep(0.5)
