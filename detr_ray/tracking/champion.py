"""Promotion: a new version becomes the champion only if it is better, measured on the same data in the same way.

Decisions about one registered model are made one after another, in the order of the versions' unique numbers. A version
is created with the tag that it is being decided, and its process waits until no earlier version has this tag. So if two
trainings end at the same time, the later version is compared with the champion after the earlier decision. A process
that dies leaves no lock: until its decision is written, a process changes a tag of its version every few seconds, and a
version whose tag has not changed for a minute is skipped. Clocks of different machines are not compared.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from detr_ray.callbacks import Say
from detr_ray.tracking.registry import (
    AP,
    DECISION,
    MEASURED_ANEW,
    REASON,
    ModelRegistry,
    ModelVersion,
    RegistryError,
)

logger = logging.getLogger(__name__)

_DECIDING = "being decided"
_KEPT = "not champion"
_PASSED_OVER = "passed over"
_ALIVE = "champion.alive"


class CannotBeMeasured(Exception):  # noqa: N818 - the name says what it is
    """A champion cannot be measured on other data; the message says why."""


@dataclass(frozen=True)
class Turns:
    """Time limits of waiting for earlier decisions.

    Attributes:
        look_s: seconds between two checks of the earlier versions.
        alive_s: seconds between two changes of the own tag.
        passed_over_s: a version whose tag has not changed for this number of seconds is skipped.
    """

    look_s: float = 1.0
    alive_s: float = 10.0
    passed_over_s: float = 60.0


@dataclass(frozen=True)
class Decision:
    """Whether a version became the champion, and why or why not."""

    is_champion: bool
    reason: str


Measure = Callable[[ModelVersion], float]
"""The AP of a version on the validation data of the new one, or `CannotBeMeasured`."""


def undecided_tags() -> dict[str, str]:
    """The tags that a version is to be made with, so that later ones wait for its decision."""
    return {DECISION: _DECIDING, _ALIVE: uuid.uuid4().hex}


def decide(
    registry: ModelRegistry,
    version: ModelVersion,
    margin: float,
    measure: Measure,
    say: Say,
    turns: Turns = Turns(),
) -> Decision:
    """Decides whether a new version becomes the champion, and writes decision and reason into its tags.

    Args:
        registry: of the model.
        version: made with `undecided_tags`.
        margin: it must be better by more than this.
        measure: measures a champion again that was measured on other data.
        say: shows the user a line.
        turns: time limits.

    Raises:
        RegistryError: the version was skipped meanwhile, or was deleted.
    """
    with _signs_of_life(registry, version, turns):
        _wait_for_turn(registry, version, turns, say)
        champion = registry.champion()
        decision = _better(registry, version, champion, margin, measure, say)
        present = registry.version(version.version)
        if present.tags.get(DECISION) != _DECIDING:
            raise RegistryError(
                f"{version} was decided about while it was compared with the champion ({present.tags.get(DECISION)}): "
                "register its checkpoint again, or promote it"
            )
        if decision.is_champion:
            registry.move_champion(version, decision.reason)
        else:
            registry.tag(version, {DECISION: _KEPT, REASON: decision.reason})
    return decision


def is_decided(version: ModelVersion) -> bool:
    """Whether a version was compared with the champion, or chosen by hand."""
    return version.tags.get(DECISION) not in (None, _DECIDING, _PASSED_OVER)


def _better(
    registry: ModelRegistry,
    version: ModelVersion,
    champion: ModelVersion | None,
    margin: float,
    measure: Measure,
    say: Say,
) -> Decision:
    own, measured_on = version.metrics.get(AP), version.measured_on
    if own is None or not measured_on:
        return Decision(False, "it has no AP: it was not evaluated on validation data")
    if champion is None:
        return Decision(True, f"AP {own:.4f}, and there was no champion")
    theirs, how = champion.ap_on(measured_on), ""
    if theirs is None:
        say(f"the champion, {champion}, was measured on other data or with other settings: measuring it anew")
        try:
            theirs = measure(champion)
        except CannotBeMeasured as error:
            return Decision(False, f"the champion, version {champion.version}, cannot be measured here: {error}")
        how = ", measured anew on this validation data"
        known = json.loads(champion.tags.get(MEASURED_ANEW, "[]"))
        registry.tag(champion, {MEASURED_ANEW: json.dumps([*known, [measured_on, theirs]][-10:])})
    digits = next((digits for digits in range(4, 12) if f"{own:.{digits}f}" != f"{theirs:.{digits}f}"), 4)
    compared = f"AP {own:.{digits}f} against {theirs:.{digits}f} of the champion, version {champion.version}{how}"
    if own - theirs > margin:
        return Decision(True, f"{compared}: better by more than {margin:g}")
    return Decision(False, f"{compared}: not better by more than {margin:g}")


def _wait_for_turn(registry: ModelRegistry, version: ModelVersion, turns: Turns, say: Say) -> None:
    """Waits until no earlier version is being decided; skips versions whose process seems dead."""
    seen: dict[int, tuple[str | None, float]] = {}
    while True:
        earlier = [
            each
            for each in registry.versions()
            if each.version < version.version and each.tags.get(DECISION) == _DECIDING
        ]
        if not earlier:
            return
        now = time.monotonic()
        for each in earlier:
            sign = each.tags.get(_ALIVE)
            if each.version not in seen:
                say(f"waiting for the decision about {each}, which is being registered by another process")
            if each.version not in seen or seen[each.version][0] != sign:
                seen[each.version] = sign, now
            elif now - seen[each.version][1] > turns.passed_over_s:
                reason = f"its process gave no sign of life for {turns.passed_over_s:g} s"
                say(f"WARNING: {each} is passed over: {reason}")
                registry.tag(each, {DECISION: _PASSED_OVER, REASON: reason})
        time.sleep(turns.look_s)


@contextlib.contextmanager
def _signs_of_life(registry: ModelRegistry, version: ModelVersion, turns: Turns) -> Iterator[None]:
    """Changes a tag of the version every few seconds, as long as the block runs."""
    over = threading.Event()

    def show() -> None:
        while not over.wait(turns.alive_s):
            try:
                registry.tag(version, {_ALIVE: uuid.uuid4().hex})
            except RegistryError as error:  # the next one may succeed, and if none does, the decision fails
                logger.warning("no sign of life of %s could be given: %s", version, error)

    thread = threading.Thread(target=show, name="detr_ray-champion", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=60)
