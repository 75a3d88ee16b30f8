"""The records of a search: an MLflow run with the trials' runs as children, and files in the search's folder."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from detr_ray.addresses import join
from detr_ray.callbacks import Say
from detr_ray.config import Config
from detr_ray.engine.checkpoints.run_directory import RECORD, record_at
from detr_ray.engine.checkpoints.store import CheckpointStore, release
from detr_ray.engine.opened_data import OpenedData
from detr_ray.engine.reporting.tracking_store import local_storage
from detr_ray.engine.run_report.report import REPORT
from detr_ray.engine.run_report.search_page import Searched, search_report
from detr_ray.locations import read_bytes
from detr_ray.retries import reason_of
from detr_ray.runtime.search.directory import SearchDirectory
from detr_ray.runtime.search.results import measured_best
from detr_ray.search.book import Book
from detr_ray.search.confirmation import Confirmation
from detr_ray.search.confirmed import read_confirmation, write_confirmation
from detr_ray.search.importance import importance
from detr_ray.search.population import Population
from detr_ray.search.space import SearchSpace
from detr_ray.search.tables import Ending, final_table, importance_table
from detr_ray.search.trials import TRIALS_FILE, Mode, Trial, run_name
from detr_ray.tracking.search_children import ChildState, RunState
from detr_ray.tracking.search_run import SearchRun
from detr_ray.tracking.sender import Timing
from detr_ray.tracking.tracker import Status
from detr_ray.viz.figure import png_bytes
from detr_ray.viz.search_pictures import history, parallel_coordinates

logger = logging.getLogger(__name__)

RUN_ID_WITHIN_S = 5.0
RECONCILE_EVERY_S = 10.0
ENDS_WITHIN_S = 20.0


class SearchRecords:
    """The records of a search.

    Args:
        config: of the search.
        opened: its data; None where settings of the data are searched.
        space: its space.
        directory: its folder.
        book: its trials.
        tracking_uri: MLflow store; None for a search that is not tracked.
        say: shows the user a line.
        population: the population of the search, if there is one.

    Attributes:
        report: where the page about the search is; None until it is written.
    """

    def __init__(
        self,
        config: Config,
        opened: OpenedData | None,
        space: SearchSpace,
        directory: SearchDirectory,
        book: Book,
        tracking_uri: str | None,
        say: Say,
        population: Population | None = None,
    ) -> None:
        self.metric = config.tune.metric
        self.mode: Mode = config.tune.mode
        self.parameters = list(space.parameters)
        self._config, self._opened = config, opened
        self._space, self._directory, self._book, self._say = space, directory, book, say
        self._population = population
        self.report: str | None = None
        self._page_with: Callable[[Confirmation | None], str] | None = None
        self._tracking_uri = tracking_uri
        self._run: SearchRun | None = None
        self._status: Status = "FINISHED"
        self._run_uids: dict[str, str] = {}
        self._reconciled_at = 0.0
        if tracking_uri is None:
            return
        self._run = self._open_run(tracking_uri)
        settings = {f"search/{key}": value for key, value in config.tune.model_dump(mode="json").items()}
        described = {
            key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in settings.items()
        }
        described.pop("search/space")
        self._run.describe(
            described, {name: json.dumps(text) for name, text in config.tune.space.items()}, config.to_yaml()
        )

    def parent_run(self) -> str | None:
        """MLflow's id of the search's run; None if the store is unreachable: children then get their parent later."""
        return None if self._run is None else self._run.wait_for_run_id(RUN_ID_WITHIN_S)

    def path_of(self, name: str) -> str:
        """The folder of a trial's run."""
        return join(self._directory.path, name)

    @property
    def best(self) -> Trial | None:
        """The best trial, with the run that has the best weights; see `measured_best`. None: nothing was measured."""
        best = self._book.best
        if best is None:
            return None
        best = measured_best(best, self._population)
        return dataclasses.replace(best, run_path=self.path_of(best.run_name))

    def release(self, checkpoint: str) -> None:
        """Releases a checkpoint that no other trial will start from; after a storage error, at the end."""
        try:
            release(checkpoint)
        except OSError as error:
            logger.info("%s cannot be released: %s", checkpoint, reason_of(error))

    def tidy(self, name: str, keep_last: int) -> None:
        """Removes checkpoints of a run that is no longer written, except for the newest ones and the best.

        Args:
            name: of the run.
            keep_last: number of newest checkpoints that stay.
        """
        store = CheckpointStore(join(self.path_of(name), "checkpoints"))
        try:
            for info in store.checkpoints():
                if info.held:
                    release(info.path)
            store.prune(keep_last)
        except OSError as error:
            self._say(f"WARNING: old checkpoints of {name} cannot be removed (they stay): {reason_of(error)}")

    def progress(self) -> None:
        """Records the progress of the search."""
        if self._run is None:
            return
        best = self._book.best
        counts = {str(state): count for state, count in self._book.counts.items()}
        self._run.log_progress(self._book.num_results, self.metric, None if best is None else best.best, counts)
        if time.monotonic() - self._reconciled_at > RECONCILE_EVERY_S:
            self._reconciled_at = time.monotonic()
            try:
                self._run.reconcile(self._children())
            except OSError as error:  # a run's record; the next call may read it
                logger.info("the runs of the trials cannot be read: %s", reason_of(error))

    def end(self, ending: Ending, texts: dict[str, str], seconds: float) -> None:
        """Records how the search ended, with its pictures. Waits only some seconds for an unreachable store.

        Args:
            ending: how it ended.
            texts: name -> content of further files.
            seconds: that this process took.
        """
        table = final_table(self._book.trials, self.parameters, self.metric, self.mode) + "\n"
        files = {name: text.encode() for name, text in {"trials.txt": table, **texts}.items()}
        for name, content in files.items():
            self._directory.write_bytes(name, content)
        files |= self._pictured(ending, table, texts, seconds)
        if self._run is None:
            return
        for name, content in files.items():
            self._run.log_bytes(content, name)
        self._run.log_bytes(read_bytes(join(self._directory.path, TRIALS_FILE)), TRIALS_FILE)
        self.progress()
        failed = ending == "failed" or (ending != "stopped" and self._book.best is None)
        self._status = "KILLED" if ending == "stopped" else "FAILED" if failed else "FINISHED"
        self._run.close(self._status, self._children())

    def confirmed(self, found: Confirmation) -> None:
        """Keeps what confirms the best configuration, and brings it onto the page. Call it after `end`.

        An error here affects only the page: what was found is printed, too.

        Args:
            found: what several trainings of it and of the default one gave.
        """
        best = self.best
        assert best is not None, "a search without a result has nothing to confirm"
        try:
            write_confirmation(self._directory.path, best.run_name, found)
            if self._page_with is not None:
                self._replace_page(self._page_with(found).encode())
        except Exception as error:
            logger.exception("what confirms the best configuration could not be written")
            self._say(f"WARNING: what confirms the best configuration could not be brought into the report: {error}")

    def _replace_page(self, content: bytes) -> None:
        """Replaces the page about the search, in its folder and in MLflow, which has recorded its end already."""
        self._directory.write_bytes(REPORT, content)
        if self._tracking_uri is not None:
            run = self._open_run(self._tracking_uri)
            run.log_bytes(content, REPORT)
            run.close(self._status, self._children())

    def _open_run(self, tracking_uri: str) -> SearchRun:
        """The search's MLflow run; the same one again after it was closed."""
        return SearchRun(
            _tracking_folder(self._config, self._directory),
            uri=tracking_uri,
            experiment=self._config.tracking.experiment,
            name=self._directory.name,
            uid=self._directory.search_id,
            say=self._say,
            timing=Timing(finish=ENDS_WITHIN_S),
        )

    def _pictured(self, ending: Ending, table: str, texts: Mapping[str, str], seconds: float) -> dict[str, bytes]:
        """Writes the pictures and the page about the search; gives name -> content of what was written.

        An error here affects only these: the search is over, and its result is kept.
        """
        trials, written = self._book.trials, dict[str, bytes]()
        logs = {name for name, found in self._space.parameters.items() if found.log}
        try:
            pictures = {
                "parallel_coordinates.png": parallel_coordinates(
                    trials, self.metric, mode=self.mode, log_parameters=logs
                ),
                "history.png": history(trials, self.metric, mode=self.mode),
            }
            contents = {name: png_bytes(figure) for name, figure in pictures.items()}
            if self._config.tracking.report:
                searched = Searched(
                    self._directory.name, self._directory.path, self._config, self._opened, ending, seconds, trials,
                    self.best,
                )  # fmt: skip
                mattered = importance_table(importance(trials, self._space.parameters))
                self._page_with = lambda confirmation: search_report(
                    dataclasses.replace(searched, confirmation=confirmation), table, mattered, texts, pictures
                )
                contents[REPORT] = self._page_with(self._confirmation()).encode()
            for name, content in contents.items():
                self._directory.write_bytes(name, content)
                written[name] = content
            if REPORT in written:
                self.report = join(self._directory.path, REPORT)
        except Exception as error:
            logger.exception("the report of the search could not be written")
            self._say(f"WARNING: the pictures and the report of the search could not be written: {error}")
        return written

    def _confirmation(self) -> Confirmation | None:
        """What an earlier process found of the configuration that is the best one now."""
        best = self.best
        try:
            return None if best is None else read_confirmation(self._directory.path, best.run_name)
        except (OSError, ValueError) as error:
            self._say(f"WARNING: the report stays without what confirmed the best configuration: {error}")
            return None

    def _children(self) -> list[ChildState]:
        best = self.best
        found = []
        for trial in self._book.trials:
            if trial.state != "waiting" or trial.attempts:
                found += self._children_of(trial, None if best is None else best.run_name)
        return found

    def _children_of(self, trial: Trial, best: str | None) -> list[ChildState]:
        """The runs of a trial. In a population, each move starts another run; all but the last ended with a move."""
        children = []
        for generation in range(trial.generation + 1):
            name = run_name(trial.name, generation)
            uid = self._run_uid(name)
            last = generation == trial.generation
            state: RunState = "stopped" if trial.state == "waiting" else trial.state
            if not last:
                state = "stopped early"
            elif uid is None and trial.state not in ("refused", "failed"):
                continue  # it has not begun
            if uid is None and not last:
                continue
            children.append(
                ChildState(
                    trial.name, state, uid, trial.problem if last else "moved to another trial's weights",
                    dict(trial.values) if last else {}, name == best, generation, name,
                )
            )  # fmt: skip
        return children

    def _run_uid(self, name: str) -> str | None:
        if name not in self._run_uids:
            record = record_at(join(self.path_of(name), RECORD))
            if record is None:
                return None
            self._run_uids[name] = record["run_id"]
        return self._run_uids[name]


def _tracking_folder(config: Config, directory: SearchDirectory) -> Path:
    return local_storage(config) / f"{directory.name}-{directory.search_id[:8]}-tracking"
