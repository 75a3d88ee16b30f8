"""Trains the best configuration of a search and the unchanged one again, with several new seeds each."""

from __future__ import annotations

from collections.abc import Callable

from detr_ray.callbacks import Say
from detr_ray.config import Config
from detr_ray.engine.errors import RunFailed
from detr_ray.engine.hooks import Budget, JobHooks
from detr_ray.engine.job import prepare_job
from detr_ray.engine.reporting.tracking_store import recorded_in
from detr_ray.runtime.host_process import host_process_as_before
from detr_ray.runtime.launch import Runs
from detr_ray.runtime.search.directory import locked_search
from detr_ray.runtime.search.results import SearchResult
from detr_ray.search.confirmation import Confirmation, compare
from detr_ray.search.confirmed import DEFAULT, FIRST_SEED, confirmation_run
from detr_ray.search.space import with_values


class Stopped(Exception):  # noqa: N818 - it names what happened
    """The user stopped the trainings; the same command resumes them. Its text is the name of the run."""


@host_process_as_before()
def confirm(
    config: Config,
    result: SearchResult,
    seeds: int,
    say: Say,
    on_progress: Callable[[float], None] = lambda trainings: None,
) -> Confirmation:
    """Compares the best configuration of a search with the unchanged one.

    Each training is a run in the search's folder, recorded where the search is, as a child of its MLflow run. Finished
    ones are not trained again. The page about the search gets the verdict. The search is locked meanwhile: another
    process that went on with it would write its files, too.

    Args:
        config: of the search.
        result: of the search.
        seeds: number of trainings of each.
        say: shows the user a line.
        on_progress: told how many trainings are done, with the done part of the one that runs.

    Raises:
        Stopped: the user stopped it.
        ConfigError: another process has locked the search.
        RunFailed: a training cannot go on, or its last evaluation has no such metric.
    """
    assert result.best is not None and result.best_values is not None, "it has nothing to confirm without a result"
    best = result.best.run_name
    compared = {best: with_values(config, result.best_values), DEFAULT: with_values(config, {})}
    measured: dict[str, list[float]] = {name: [] for name in compared}
    with locked_search(result.path, result.name, say), Runs(Budget(), say, says_how_to_resume=False) as runs:
        for number in range(seeds):
            for which, chosen in compared.items():
                seed = config.run.seed + FIRST_SEED + number
                name = confirmation_run(which, seed)
                run = {"run.name": name, "run.storage": result.path, "run.seed": seed}
                job = prepare_job(_recorded(with_values(chosen, run), result), say)
                before = sum(map(len, measured.values()))
                done = runs.run(job, _hooks(on_progress, before, job.total_steps, result.parent_run))
                if done.status == "stopped":
                    raise Stopped(name)
                value = done.metrics.get(config.tune.metric)
                if value is None:
                    raise RunFailed(f"{name}: its last evaluation gave no {config.tune.metric} that could be compared")
                measured[which].append(value)
                say(f"{name}: {config.tune.metric} {value:.4f}")
        found = compare(measured[best], measured[DEFAULT], config.tune.mode)
        if result.on_confirmed is not None:
            result.on_confirmed(found)
    return found


def _recorded(config: Config, result: SearchResult) -> Config:
    """The configuration with the MLflow store of the search."""
    return config if result.tracking_uri is None else recorded_in(config, result.tracking_uri)


def _hooks(on_progress: Callable[[float], None], before: int, total_steps: int, parent_run: str | None) -> JobHooks:
    return JobHooks(on_step=lambda step: on_progress(before + step / total_steps), parent_run=parent_run)
