"""The MLflow run of a search: the parent of its trials' runs.

Nothing here waits for MLflow. The parent's own records go the way of any run's: through a log on disk and a sender. The
states of the trials are written by another thread, which always works on the newest ones.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from detr_ray.callbacks import Say
from detr_ray.tracking.history import read_history
from detr_ray.tracking.mlflow_client import open_client
from detr_ray.tracking.mlflow_tracker import MlflowTracker
from detr_ray.tracking.search_children import ChildRuns, ChildState, refuse_ambiguous
from detr_ray.tracking.sender import Timing, error_text
from detr_ray.tracking.store import public_uri
from detr_ray.tracking.tracker import Scalar, Status, artifact_path
from detr_ray.tracking.whole_files import write_whole

logger = logging.getLogger(__name__)

_COUNTED_STATES = ("running", "finished", "stopped early", "failed", "refused", "stopped")
_LOOK_AGAIN_S = 0.1
_URGENT_RETRY_S = 0.5


class SearchRun:
    """Records a search in MLflow. The same uid finds the same MLflow run again, from any process and machine.

    Args:
        folder: local folder of this search, for records that MLflow does not have yet. With the folder of an earlier
            process, its unsent records are sent, too.
        uri: address of the MLflow store (see ``tracking_uri``).
        experiment: name of the MLflow experiment, which must be the trials'.
        name: what MLflow shows as the search's name.
        uid: identifies the search's MLflow run: letters, digits, blanks and ``_ . : / -``.
        timing: time limits; ``finish`` is the most that `close` waits, in seconds.
        say: called, from another thread, with one line when the states of trials cannot be written, and with one when
            they can be again.

    Raises:
        OSError: The folder cannot be written.
        ValueError: The uid has other characters, or the folder belongs to another search.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        uri: str,
        experiment: str,
        name: str,
        uid: str,
        timing: Timing | None = None,
        say: Say = logger.warning,
    ) -> None:
        self._timing = timing or Timing()
        earlier = read_history(folder)
        steps = [int(at[-1]) for at, _ in earlier.metrics.values()] if earlier is not None else []
        last_step = max(steps, default=-1)
        self._tracker = MlflowTracker(
            folder, uri=uri, experiment=experiment, run_name=name, run_uid=uid, timing=self._timing
        )
        self._files = Path(folder).resolve() / "files"
        self._files.mkdir(exist_ok=True)
        self._stored: dict[str, bytes] = {}
        self._progress: dict[str, float] = {}
        self._results = -1
        self._step = last_step
        self._writer = _StateWriter(self._tracker, uri, self._timing, say)
        self._all_sent: bool | None = None

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the search's run, for the tag of its children; None until MLflow was reached."""
        return self._tracker.run_id

    def wait_for_run_id(self, timeout_s: float) -> str | None:
        """Waits until MLflow was reached, at most so many seconds; None if it was not.

        Trials that start without it become children with the next `reconcile`.
        """
        deadline = time.monotonic() + timeout_s
        while self.run_id is None and time.monotonic() < deadline:
            time.sleep(_LOOK_AGAIN_S)
        return self.run_id

    def describe(self, params: Mapping[str, Scalar], space: Mapping[str, str], config_yaml: str) -> None:
        """Records what is searched and how. It may be called again when a search is resumed.

        Args:
            params: settings of the search, such as ``search/scheduler``, ``search/searcher``, ``search/seed``.
            space: name -> text of the distribution of each parameter; recorded as ``space/<name>``.
            config_yaml: the configuration that the trials' configurations are made from.
        """
        self._tracker.log_params({**params, **{f"space/{name}": text for name, text in space.items()}})
        self._tracker.log_text(config_yaml, "config.yaml")

    def log_progress(self, results: int, metric: str, best: float | None, counts: Mapping[str, int]) -> None:
        """Records how far the search is.

        MLflow has one point a step. If numbers change without a new result (a trial ends), they are recorded with the
        next result, or by `close` one step later.

        Args:
            results: number of results that all trials gave so far: the step in MLflow, or a later one, since each point
                comes after those of earlier processes.
            metric: name of what is searched for (``val/AP``), recorded as ``search/best_val_AP``.
            best: the best value so far; None or NaN: there is none.
            counts: state -> number of trials, of the states of `ChildState`; missing ones count 0.

        Raises:
            ValueError: There is no such state.
        """
        unknown = sorted(set(counts) - {*_COUNTED_STATES, "waiting"})
        if unknown:
            raise ValueError(f"no states of trials: {', '.join(unknown)}; they are {', '.join(_COUNTED_STATES)}")
        numbers = {f"search/{state.replace(' ', '_')}": float(counts.get(state, 0)) for state in _COUNTED_STATES}
        if best is not None and not math.isnan(best):
            numbers[f"search/best_{metric.replace('/', '_')}"] = best
        if results > self._results:
            self._step = max(results, self._step + 1)
            self._tracker.log_metrics(numbers, self._step)
            self._results, self._progress = results, {}
        else:
            self._progress = numbers

    def log_bytes(self, content: bytes, path: str) -> None:
        """Stores a file (``trials.json``, ``schedule.yaml``, ``history.png``, ``report.html``) as an artifact.

        A later content of the same path replaces it; the same content again costs nothing.
        """
        path = artifact_path(path)
        if self._stored.get(path) == content:
            return
        file = self._files / path
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content)
        self._tracker.log_file(file, path.rpartition("/")[0])
        self._stored[path] = content

    def reconcile(self, children: Sequence[ChildState]) -> None:
        """Has MLflow show what became of each run of the search; returns at once.

        Tags: ``mlflow.parentRunId``, ``trial.name``, ``trial.state``, ``trial.problem``, ``trial.generation``, and
        ``search.best`` on the best run alone. Parameters: ``space/<name>``. Status: FINISHED for ``finished`` and
        ``stopped early``, FAILED for ``failed`` and ``refused``, KILLED for ``stopped``; ``running`` ones set theirs.

        If the store is away, it is tried again later, with the newest states.

        Args:
            children: all runs of the search, the ones of earlier processes, too.

        Raises:
            ValueError: Several are the best one, or two are the same run.
        """
        refuse_ambiguous(children)
        self._writer.want(children)
        best = next((child for child in children if child.is_best), None)
        if best is not None:
            self._tracker.set_tags({"search.best_trial": best.trial})

    def close(self, status: Status, children: Sequence[ChildState] | None = None) -> bool:
        """Records how the search ended, and waits up to ``timing.finish`` seconds until MLflow has everything.

        Call it when no trial runs any more. What could not be sent is sent when the search is resumed.

        Args:
            status: FINISHED, KILLED (the user stopped it) or FAILED.
            children: as in `reconcile`; None: those of its last call.

        Returns:
            Whether MLflow has everything. A second call does nothing but return it again.
        """
        if self._all_sent is not None:
            return self._all_sent
        deadline = time.monotonic() + self._timing.finish
        if self._progress:
            self._tracker.log_metrics(self._progress, self._step + 1)
            self._progress = {}
        if children is not None:
            self.reconcile(children)
        self._writer.hurry()
        self._tracker.finish(status)
        states_written = self._writer.stop(deadline)
        self._all_sent = states_written and not self._tracker.pending()
        return self._all_sent


class _StateWriter:
    """The thread that writes the newest states of a search's runs to MLflow. After an error it tries again."""

    def __init__(self, tracker: MlflowTracker, uri: str, timing: Timing, say: Say) -> None:
        self._tracker, self._uri, self._timing, self._say = tracker, uri, timing, say
        self._changed = threading.Condition()
        self._children: tuple[ChildState, ...] = ()
        self._wanted = self._written = 0
        self._ending = self._stopped = False
        self._error = ""
        self._runs: ChildRuns | None = None
        self._thread = threading.Thread(target=self._loop, name="search-states", daemon=True)
        self._thread.start()

    def want(self, children: Sequence[ChildState]) -> None:
        with self._changed:
            self._children = tuple(children)
            self._wanted += 1
            self._changed.notify_all()

    def hurry(self) -> None:
        """Writes everything once more, with short pauses after errors."""
        with self._changed:
            self._ending = True
            self._wanted += 1
            self._changed.notify_all()

    def stop(self, deadline: float) -> bool:
        """Waits until the newest states are written, or until ``deadline`` (of `time.monotonic`); whether they are."""
        with self._changed:
            self._changed.wait_for(self._is_done, timeout=max(deadline - time.monotonic(), 1.0))
            done = self._is_done()
            self._stopped = True
            self._changed.notify_all()
        if not done:
            reason = f" ({self._error})" if self._error else ""
            self._say(
                f"WARNING: MLflow at {public_uri(self._uri)} does not show what became of all {len(self._children)} "
                f"runs of the search{reason}; resuming the search writes it"
            )
        return done

    def _is_done(self) -> bool:
        return self._written == self._wanted

    # The methods below run in the writer's thread.

    def _loop(self) -> None:
        failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or not self._is_done())
                if self._stopped:
                    return
                wanted, children, ending = self._wanted, self._children, self._ending
            try:
                if not self._write(children, ending):
                    self._pause(_LOOK_AGAIN_S)
                    continue
            except Exception as error:  # any error of MLflow or its store
                failures += 1
                self._runs = None
                self._failed(error)
                self._pause(min(self._timing.pause(failures), _URGENT_RETRY_S if self._ending else math.inf))
                continue
            failures = 0
            self._recovered()
            with self._changed:
                self._written = wanted
                self._changed.notify_all()

    def _write(self, children: tuple[ChildState, ...], ending: bool) -> bool:
        """Writes the states; False if the search's own MLflow run does not exist yet."""
        parent_id = self._tracker.run_id
        if parent_id is None:
            if self._tracker.last_error:
                raise ConnectionError(self._tracker.last_error)
            return False
        if self._runs is None or self._runs.parent_id != parent_id:
            self._runs = ChildRuns(open_client(self._uri), parent_id, self._tracker.run_uid)
        self._runs.reconcile(children, everything=ending)
        return True

    def _pause(self, seconds: float) -> None:
        with self._changed:
            ending = self._ending
            self._changed.wait_for(lambda: self._stopped or self._ending != ending, timeout=seconds)

    def _failed(self, error: Exception) -> None:
        reason = str(error) if isinstance(error, ConnectionError) else error_text(error)
        if not self._error:
            self._say(
                f"WARNING: MLflow at {public_uri(self._uri)} does not take what became of the trials ({reason}); the "
                "search goes on, and it is tried again"
            )
        self._error = reason

    def _recovered(self) -> None:
        if self._error:
            self._say(f"MLflow at {public_uri(self._uri)} takes what became of the trials again")
        self._error = ""
