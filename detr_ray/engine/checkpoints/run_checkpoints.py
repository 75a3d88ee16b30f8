"""Checkpoints of a run during training: rank 0 writes them, and all workers know the newest.

Only writing the final state is essential; it is repeated with long pauses. If storage fails for anything else (noting
scores, removing old checkpoints, listing them), the run goes on and tries again later.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from detr_ray.callbacks import Say
from detr_ray.engine.checkpoints.info import CheckpointInfo
from detr_ray.engine.context import WorkerContext
from detr_ray.retries import may_pass, reason_of

if TYPE_CHECKING:  # see the loop
    from detr_ray.engine.checkpoints.store import CheckpointStore

logger = logging.getLogger(__name__)

ONCE: tuple[float, ...] = ()
BRIEFLY = (1.0, 2.0, 5.0)
PATIENTLY = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Pauses in seconds between attempts to write a checkpoint. Each attempt repeats its operations, too (`Patience`)."""


class Inessential:
    """Guards operations that a run does not need: a storage error is reported once, and the run goes on.

    Args:
        say: shows the user a line.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self._said: set[str] = set()

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Catches storage errors and reports them as ``what``; again only after a success in between."""
        try:
            yield
        except OSError as error:
            if what not in self._said:
                self._say(f"WARNING: {what}: {_reason(error)}; training goes on")
            self._said.add(what)
        else:
            self._said.discard(what)


class RunCheckpoints:
    """The checkpoints of a run, in one worker.

    Args:
        store: reads and writes them.
        context: this worker's group.
        keep_last: number of newest checkpoints that are kept, besides the best and those that must be evaluated.
        inessential: guards operations that may fail.
        measured_on: data and settings of this process's evaluations (`PlannedData.measured_on`).

    Attributes:
        latest: the newest checkpoint; the same on all workers.
        best: the checkpoint with the best scores, on rank 0; None on other ranks.
    """

    def __init__(
        self,
        store: CheckpointStore,
        context: WorkerContext,
        keep_last: int,
        inessential: Inessential,
        measured_on: Mapping[str, Any],
    ) -> None:
        self.store = store
        self.latest: CheckpointInfo | None = None
        self.best: CheckpointInfo | None = None
        self._context = context
        self._keep_last = keep_last
        self._inessential = inessential
        self._measured_on = measured_on
        self._known: dict[int, CheckpointInfo] = {}
        self._not_noted: dict[int, tuple[Mapping[str, float] | None, str]] = {}

    def going_on_from(self, info: CheckpointInfo, found: Sequence[CheckpointInfo]) -> None:
        """Notes the checkpoint that training resumes from (every worker), and all checkpoints (rank 0).

        Checkpoints newer than ``info`` are damaged. They are ignored, and replaced when training reaches their steps.
        """
        self.latest = info
        self._know(found)
        self.best = self.store.best_of(self._known.values())
        before = self.best.measured_on if self.best else {}
        changes = [
            f"{name}: {before[name]!r}, now {self._measured_on.get(name)!r}"
            for name in before
            if before[name] != self._measured_on.get(name)
        ]
        if changes:
            self._context.say(
                "WARNING: what is evaluated has changed: scores from now on are not compared with those before, and "
                f"the best checkpoint of each kind is kept ({'; '.join(changes)})"
            )

    def unscored(self) -> list[CheckpointInfo]:
        """The checkpoints that must still be evaluated, oldest first; the same on every worker."""
        return self._context.broadcast([info for _, info in sorted(self._known.items()) if info.unscored])

    def path_of(self, step: int) -> str | None:
        """Rank 0: the folder of the checkpoint of a step; None where there is none, and on other ranks."""
        return self._known[step].path if step in self._known else None

    def save(
        self,
        step: int,
        files: Callable[[], Mapping[str, Any]],
        details: Mapping[str, Any],
        *,
        evaluation_due: bool,
        held: bool = False,
        pauses: Sequence[float] = ONCE,
    ) -> str:
        """Writes a checkpoint; every worker must call it.

        Args:
            step: optimizer steps taken.
            files: returns the content of its files.
            details: stored in its manifest.
            evaluation_due: whether these weights are to be evaluated.
            held: whether it stays until it is released.
            pauses: seconds before each further attempt.

        Returns:
            Why it could not be written; empty on success. Earlier checkpoints are not changed.
        """
        for pause_s in (0.0, *pauses):
            self._pause(pause_s, step)
            self._context.enter("writing a checkpoint", step)
            written: tuple[CheckpointInfo | None, str, bool] = (None, "", False)
            if self._context.rank == 0:
                written = self._write(step, files(), details, evaluation_due, held)
            self._context.enter("waiting for the checkpoint", step)
            info, problem, again = self._context.broadcast(written)
            if info is not None:
                self.latest = info
                return ""
            if not again:
                break
        return problem

    def note(self, step: int, metrics: Mapping[str, float] | None, problem: str = "") -> None:
        """Rank 0: notes the result of an evaluation in its checkpoint, now or as soon as storage works again."""
        self._not_noted[step] = metrics, problem
        self.tidy()

    def finish(self) -> None:
        """Rank 0: the last attempts to note scores that could not be noted before."""
        for pause_s in BRIEFLY:
            if not self._not_noted:
                return
            time.sleep(pause_s)
            self.tidy()
        if self._not_noted:
            steps = ", ".join(str(step) for step in sorted(self._not_noted))
            self._context.say(
                f"WARNING: the scores of step {steps} could not be noted in its checkpoint; the same command evaluates "
                "it again"
            )

    def tidy(self) -> None:
        """Rank 0: notes outstanding scores, chooses the best checkpoint and removes old ones."""
        with self._inessential("the checkpoints cannot be listed"):
            self._know(self.store.checkpoints())
        with self._inessential("scores cannot be noted in their checkpoint (it is tried again)"):
            for step, (metrics, problem) in sorted(self._not_noted.items()):
                if step in self._known:
                    self._known[step] = self.store.annotate(self._known[step], metrics, problem, self._measured_on)
                del self._not_noted[step]
        # Includes scores that could not be noted: their checkpoint may be the best, and must not be removed.
        known = [self._with_scores(info) for _, info in sorted(self._known.items())]
        self.best = self.store.best_of(known)
        with self._inessential("old checkpoints cannot be removed (they stay)"):
            self.store.prune(self._keep_last, known, self._not_noted)

    def _know(self, found: Sequence[CheckpointInfo]) -> None:
        newest = -1 if self.latest is None else self.latest.step
        self._known = {info.step: info for info in found if info.step <= newest}

    def _with_scores(self, info: CheckpointInfo) -> CheckpointInfo:
        if info.step not in self._not_noted:
            return info
        metrics, problem = self._not_noted[info.step]
        return info.with_scores(metrics, problem, self._measured_on)

    def _write(
        self, step: int, files: Mapping[str, Any], details: Mapping[str, Any], evaluation_due: bool, held: bool
    ) -> tuple[CheckpointInfo | None, str, bool]:
        """The checkpoint; or why it could not be written, and whether another attempt may help."""
        started = time.perf_counter()
        try:
            info = self.store.save(step, files, details, evaluation_due=evaluation_due, held=held)
        except OSError as error:
            since = "there is none yet" if self.latest is None else f"the last one is of step {self.latest.step}"
            self._context.say(f"WARNING: no checkpoint at step {step} ({since}): {_reason(error)}")
            return None, _reason(error), may_pass(error)
        logger.info("checkpoint of step %d in %.2f s", step, time.perf_counter() - started)
        self.latest = self._known[step] = info
        self.tidy()
        return info, "", False

    def _pause(self, seconds: float, step: int) -> None:
        """Waits, and reports progress every second, so that the worker does not count as hanging."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._context.enter("waiting for the checkpoint", step)
            time.sleep(min(left, 1.0))


def _reason(error: OSError) -> str:
    return str(error) if getattr(error, "filename", None) else reason_of(error)
