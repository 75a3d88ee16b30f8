"""Makes MLflow show each run of a search as a child of the search's run, with the state that the search knows.

A training run writes its own MLflow run, and knows nothing of the search's decisions. If its process is killed, MLflow
shows it as running for ever. So the search, which knows what became of it, corrects the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from detr_ray.tracking.event_batch import clean_names
from detr_ray.tracking.mlflow_client import UID_TAG, run_of_uid
from detr_ray.tracking.mlflow_run import PARENT_TAG, MlflowRun, RefusedError, RunGoneError

logger = logging.getLogger(__name__)

RunState = Literal["running", "finished", "stopped early", "failed", "refused", "stopped"]

BEST_TAG = "search.best"
_STATE_TAG = "trial.state"
_PROBLEM_TAG = "trial.problem"
_NOTE_TAG = "mlflow.note.content"
"""The tag that MLflow shows as a run's description, in full; it shows only the beginning of others."""
_STATUS: dict[RunState, str] = {
    "finished": "FINISHED",
    "stopped early": "FINISHED",
    "failed": "FAILED",
    "refused": "FAILED",
    "stopped": "KILLED",
}


@dataclass(frozen=True)
class ChildState:
    """What a search knows of one run of a trial.

    Attributes:
        trial: name of the trial. All runs of a trial have it: in a population, each generation is a run.
        state: ``stopped early`` by the scheduler, ``stopped`` by the user or at the end of the time; ``refused``: the
            configuration does not allow the values, so that no training began.
        run_uid: the run's uid, by which its MLflow run is found; None: no training run was ever made.
        problem: why it failed, was refused or was stopped; empty: there is nothing to say.
        values: name -> value of the parameters that were searched.
        is_best: whether it is the best run of the search.
        generation: counts the runs of a trial in a population, from 0.
        run_name: name of the MLflow run, where it has to be made; None: the trial's.
    """

    trial: str
    state: RunState
    run_uid: str | None
    problem: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    is_best: bool = False
    generation: int = 0
    run_name: str | None = None


def refuse_ambiguous(children: Sequence[ChildState]) -> None:
    """Refuses children of which two are the same run, or several the best.

    Raises:
        ValueError: They are.
    """
    runs = {(child.run_uid, child.trial if child.run_uid is None else "") for child in children}
    best = [child.trial for child in children if child.is_best]
    if len(best) > 1 or len(runs) < len(children):
        raise ValueError(f"{len(children)} children are {len(runs)} runs, and the best is one of {best}")


class ChildRuns:
    """The MLflow runs of a search's trials. Everything may be done again: only what differs is written.

    Args:
        client: an ``MlflowClient``.
        parent_id: MLflow's id of the search's run.
        search_uid: the search's uid; trials without a training run get uids that begin with it.
    """

    def __init__(self, client: Any, parent_id: str, search_uid: str) -> None:
        self._client, self.parent_id, self._search_uid = client, parent_id, search_uid
        self._experiment_id: str = client.get_run(parent_id).info.experiment_id
        self._run_ids: dict[str, str] = {}
        self._written: dict[str, ChildState] = {}

    def reconcile(self, children: Sequence[ChildState], everything: bool) -> None:
        """Makes MLflow show these states. Runs that were deleted in MLflow are left alone.

        Args:
            children: all runs of the search.
            everything: also look at runs whose state was written before, make the MLflow runs of training runs that
                ended without one, and delete runs that stand for a trial which got a training run later. Ask for it
                when no process trains: else a training run that is just beginning could be made twice.

        Raises:
            Exception: Any error of MLflow where the store cannot be reached.
        """
        wanted = {self._uid_of(child): child for child in children}
        if everything:
            self._written.clear()
            self._delete_replaced(set(wanted))
        # The old best loses its tag before the new one gets it, so that there are never two.
        self._take_best_from_others({uid for uid, child in wanted.items() if child.is_best})
        for uid, child in wanted.items():
            if self._written.get(uid) != child and self._write_if_there(uid, child, everything):
                self._written[uid] = child

    def _uid_of(self, child: ChildState) -> str:
        return child.run_uid or f"{self._search_uid}/{child.trial}"

    def _write_if_there(self, uid: str, child: ChildState, everything: bool) -> bool:
        """Writes a child's state; False if its MLflow run does not exist yet."""
        run_id = self._run_ids.get(uid) or run_of_uid(self._client, self._experiment_id, uid)
        if run_id is None:
            is_beginning = child.state == "running" or (child.run_uid is not None and not everything)
            if is_beginning:
                return False
            run_id = self._create(uid, child)
        self._run_ids[uid] = run_id
        try:
            _write(MlflowRun(self._client, run_id), self.parent_id, child)
        except (RunGoneError, RefusedError) as error:
            logger.warning("MLflow does not take the state of trial %s: %s", child.trial, error)
        return True

    def _create(self, uid: str, child: ChildState) -> str:
        tags = {UID_TAG: uid, PARENT_TAG: self.parent_id}
        created = self._client.create_run(self._experiment_id, tags=tags, run_name=child.run_name or child.trial)
        return created.info.run_id

    def _take_best_from_others(self, best: set[str]) -> None:
        query = f"tags.`{PARENT_TAG}` = '{self.parent_id}' and tags.`{BEST_TAG}` = 'true'"
        for run in self._client.search_runs([self._experiment_id], query):
            uid = run.data.tags.get(UID_TAG)
            if uid not in best:
                self._client.delete_tag(run.info.run_id, BEST_TAG)
                self._written.pop(uid, None)

    def _delete_replaced(self, wanted: set[str]) -> None:
        """Deletes the runs that stood for trials without a training run, and that are not wanted any more."""
        query = f"tags.`{PARENT_TAG}` = '{self.parent_id}' and tags.`{UID_TAG}` LIKE '{self._search_uid}/%'"
        for run in self._client.search_runs([self._experiment_id], query):
            if run.data.tags[UID_TAG] not in wanted:
                self._client.delete_run(run.info.run_id)


def _write(run: MlflowRun, parent_id: str, child: ChildState) -> None:
    if run.is_deleted:
        return
    values = {f"space/{name}": str(value) for name, value in child.values.items()}
    names = clean_names(values)
    run.log_params({names[name]: value for name, value in values.items()})
    before = dict(run.tags)
    tags = {
        PARENT_TAG: parent_id,
        "trial.name": child.trial,
        _STATE_TAG: child.state,
        "trial.generation": str(child.generation),
    }
    if child.problem:
        tags[_PROBLEM_TAG] = child.problem
    if child.is_best:
        tags[BEST_TAG] = "true"
    deleted = {_PROBLEM_TAG, BEST_TAG}
    # A description that the user wrote stays.
    if before.get(_NOTE_TAG) in (None, "", _note(before.get(_STATE_TAG, ""), before.get(_PROBLEM_TAG, ""))):
        deleted.add(_NOTE_TAG)
        if child.problem:
            tags[_NOTE_TAG] = _note(child.state, child.problem)
    run.set_tags(tags)
    run.delete_tags(deleted - tags.keys())
    status = _STATUS.get(child.state)  # a running one sets its own
    if status is not None and status != run.status:
        run.set_ended(status, _end_of(run))


def _note(state: str, problem: str) -> str:
    return f"{state}: {problem}"


def _end_of(run: MlflowRun) -> int:
    """When a run ended, in milliseconds since 1970. A killed one could not say so: its last metric tells best."""
    if run.status != "RUNNING" and run.ended_ms is not None:
        return run.ended_ms
    return run.last_metric_ms or time.time_ns() // 1_000_000
