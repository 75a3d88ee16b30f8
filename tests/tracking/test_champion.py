"""The gate: which new version becomes the champion, and that decisions are made one after another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from mlflow_reading import wait_until
from versions import ELSEWHERE, HERE, QUICK, entry

from detr_ray.tracking.champion import CannotBeMeasured, Decision, decide, is_decided
from detr_ray.tracking.registry import ModelRegistry, ModelVersion, RegistryError


@pytest.fixture
def registry(store_uri: str) -> ModelRegistry:
    return ModelRegistry(store_uri, "detr")


def not_needed(champion: ModelVersion) -> float:
    raise AssertionError(f"{champion} was measured where its AP is known")


def decided(
    registry: ModelRegistry,
    version: ModelVersion,
    margin: float = 0.0,
    measure: Callable[[ModelVersion], float] = not_needed,
) -> Decision:
    return decide(registry, version, margin, measure, lambda line: None, QUICK)


def champion(registry: ModelRegistry) -> int | None:
    found = registry.champion()
    return None if found is None else found.version


def test_the_champion_is_the_best_that_was_measured_in_the_same_way(registry: ModelRegistry) -> None:
    first = entry(registry)
    assert not is_decided(first)
    assert decided(registry, first) == Decision(False, "it has no AP: it was not evaluated on validation data")
    assert champion(registry) is None and is_decided(registry.version(1))
    assert decided(registry, entry(registry, 0.25)) == Decision(True, "AP 0.2500, and there was no champion")
    assert champion(registry) == 2
    equal = decided(registry, entry(registry, 0.25))
    assert (equal.is_champion, champion(registry)) == (False, 2)
    better = decided(registry, entry(registry, 0.375))
    assert better.reason == "AP 0.3750 against 0.2500 of the champion, version 2: better by more than 0"
    assert champion(registry) == 4
    tags = registry.version(4).tags
    assert (tags["champion.decision"], tags["champion.reason"]) == ("became champion", better.reason)
    tags = registry.version(3).tags
    assert (tags["champion.decision"], tags["champion.reason"]) == ("not champion", equal.reason)
    assert registry.rollback().version == 2


def test_aps_that_are_close_are_written_with_the_digits_that_tell_them_apart(registry: ModelRegistry) -> None:
    decided(registry, entry(registry, 0.0014))
    close = decided(registry, entry(registry, 0.00142))
    assert close.reason == "AP 0.00142 against 0.00140 of the champion, version 1: better by more than 0"


@pytest.mark.parametrize(("margin", "moves"), [(0.1, True), (0.125, False), (0.2, False)])
def test_it_has_to_be_better_by_more_than_the_margin(registry: ModelRegistry, margin: float, moves: bool) -> None:
    registry.promote(entry(registry, 0.25).version)
    assert decided(registry, entry(registry, 0.375), margin).is_champion is moves
    assert champion(registry) == (2 if moves else 1)


def test_a_champion_of_other_data_is_measured_anew_once(registry: ModelRegistry) -> None:
    registry.promote(entry(registry, 0.9, ELSEWHERE).version)
    measured = []

    def measure(version: ModelVersion) -> float:
        measured.append(version.version)
        return 0.25

    worse = decided(registry, entry(registry, 0.2), measure=measure)
    assert worse.reason == (
        "AP 0.2000 against 0.2500 of the champion, version 1, measured anew on this validation data: not better by "
        "more than 0"
    )
    assert decided(registry, entry(registry, 0.3)).is_champion, "its AP there is known now"
    assert measured == [1]
    assert registry.version(1).ap_on(HERE) == 0.25 and registry.version(1).ap_on(ELSEWHERE) == 0.9


def test_a_champion_that_cannot_be_measured_stays(registry: ModelRegistry) -> None:
    registry.promote(entry(registry, 0.1, ELSEWHERE).version)

    def measure(version: ModelVersion) -> float:
        raise CannotBeMeasured("it has other categories")

    found = decided(registry, entry(registry, 0.9), measure=measure)
    assert found == Decision(False, "the champion, version 1, cannot be measured here: it has other categories")
    assert champion(registry) == 1


def test_two_at_the_same_moment_are_decided_one_after_the_other(registry: ModelRegistry) -> None:
    """The later version is asked first, and the earlier one takes long; nothing is compared with an old champion."""
    registry.promote(entry(registry, 0.125, ELSEWHERE).version)
    versions = {number: entry(registry, ap) for number, ap in ((2, 0.5), (3, 0.375))}
    found: dict[int, Decision] = {}
    order: list[int] = []
    may_go_on = threading.Event()

    def measure(champion: ModelVersion) -> float:
        order.append(champion.version)
        assert may_go_on.wait(20)
        return 0.25

    def decide_in_a_thread(number: int) -> threading.Thread:
        def work() -> None:
            own = ModelRegistry(registry.uri, "detr")
            found[number] = decided(own, versions[number], measure=measure)

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    threads = [decide_in_a_thread(3)]
    time.sleep(0.1)
    threads.append(decide_in_a_thread(2))
    wait_until(lambda: order)
    time.sleep(2 * QUICK.passed_over_s)
    assert not found, "the first to decide shows signs of life, so that the other one waits longer than its limit"
    may_go_on.set()
    for thread in threads:
        thread.join(20)
    assert order == [1], "the later one was compared with the new champion, whose AP is known"
    assert found[2].is_champion and not found[3].is_champion
    assert "against 0.5000 of the champion, version 2" in found[3].reason
    assert champion(registry) == 2


def test_a_process_that_died_is_passed_over(registry: ModelRegistry) -> None:
    dead = entry(registry, 0.9)
    lines: list[str] = []
    found = decide(registry, entry(registry, 0.25), 0.0, not_needed, lines.append, QUICK)
    assert found.is_champion and champion(registry) == 2
    tags = registry.version(dead.version).tags
    assert (tags["champion.decision"], tags["champion.reason"]) == (
        "passed over", "its process gave no sign of life for 0.6 s"
    )  # fmt: skip
    assert not is_decided(registry.version(dead.version))
    assert lines == [
        "waiting for the decision about version 1 of detr, which is being registered by another process",
        "WARNING: version 1 of detr is passed over: its process gave no sign of life for 0.6 s",
    ]


def test_one_whose_decision_is_written_slowly_is_waited_for(registry: ModelRegistry) -> None:
    first, second = entry(registry, 0.25), entry(registry, 0.5)
    begun = threading.Event()

    class Slow(ModelRegistry):
        def move_champion(self, version: ModelVersion, reason: str) -> None:
            begun.set()
            time.sleep(1.5 * QUICK.passed_over_s)
            super().move_champion(version, reason)

    thread = threading.Thread(target=lambda: decided(Slow(registry.uri, "detr"), first))
    thread.start()
    assert begun.wait(20)
    lines: list[str] = []
    found = decide(ModelRegistry(registry.uri, "detr"), second, 0.0, not_needed, lines.append, QUICK)
    thread.join(20)
    assert len(lines) == 1, "it was not passed over"
    assert found.is_champion and "against 0.2500 of the champion, version 1" in found.reason
    assert champion(registry) == 2


def test_one_that_was_passed_over_does_not_come_back(registry: ModelRegistry) -> None:
    """Its process was held up for long, and others have decided meanwhile."""
    registry.promote(entry(registry, 0.1, ELSEWHERE).version)
    late = entry(registry, 0.9)

    def measure(version: ModelVersion) -> float:
        registry.tag(late, {"champion.decision": "passed over"})
        return 0.25

    with pytest.raises(
        RegistryError, match=r"version 2 of detr was decided about while it was compared .* \(passed over\)"
    ):
        decided(registry, late, measure=measure)
    assert champion(registry) == 1


def test_versions_that_others_made_are_not_waited_for(registry: ModelRegistry) -> None:
    registry.client.create_registered_model("detr")
    registry.client.create_model_version("detr", "file:///nowhere")
    assert decided(registry, entry(registry, 0.25)).is_champion
