"""A search on a real MLflow store (SQLite): a parent, its trials' runs as children, and what became of each."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow_reading import QUICK, client_of, history, wait_until
from test_mlflow_tracker import artifact_names, artifact_text

from detr_ray.tracking import PARENT_TAG, ChildState, MlflowTracker, SearchRun

pytestmark = pytest.mark.timeout(60)

SPACE = {"optim.lr": 3e-4, "loss.giou.points.1.1": 2}

OpenTracker = Callable[..., MlflowTracker]
OpenSearch = Callable[..., SearchRun]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def open_search(tmp_path: Path, store_uri: str, said: list[str]) -> Iterator[OpenSearch]:
    opened: list[SearchRun] = []

    def open_(folder: str = "search", **changes: Any) -> SearchRun:
        settings = {"uri": store_uri, "experiment": "detr", "name": "rates", "uid": "search-1", "timing": QUICK}
        opened.append(SearchRun(tmp_path / folder, **(settings | {"say": said.append} | changes)))
        return opened[-1]

    yield open_
    for search in opened:
        search.close("KILLED")


def runs_of(uri: str) -> dict[str, Any]:
    """All runs of the experiment that are not deleted, by name; no two may have the same."""
    client = client_of(uri)
    found = client.search_runs([client.get_experiment_by_name("detr").experiment_id])
    by_name = {run.info.run_name: run for run in found}
    assert len(by_name) == len(found), sorted(run.info.run_name for run in found)
    return by_name


def trial_tags(run: Any) -> dict[str, str]:
    return {name: value for name, value in run.data.tags.items() if name.startswith(("trial.", "search."))}


def train(open_tracker: OpenTracker, name: str, ends: str | None, parent: str | None = None) -> None:
    """What a training run writes; ``ends`` None: it dies without a word, after all it logged was sent."""
    tracker = open_tracker(name, run_name=name, run_uid=f"uid-{name}")
    if parent is not None:
        tracker.set_tags({PARENT_TAG: parent})
    tracker.log_metrics({"val/AP": 0.5}, step=10)
    if ends is None:
        wait_until(lambda: not tracker.pending())
    else:
        tracker.finish(ends)  # type: ignore[arg-type]


def test_the_parent_shows_what_is_searched_and_how_it_goes(
    open_search: OpenSearch, store_uri: str, tmp_path: Path
) -> None:
    search = open_search()
    search.describe({"search/scheduler": "asha", "search/seed": 3}, {"optim.lr": "loguniform 1e-5..1e-3"}, "tune: {}\n")
    search.log_progress(1, "val/AP", 0.2, {"running": 2, "waiting": 4})
    search.log_progress(2, "val/AP", 0.3, {"running": 2, "waiting": 4})
    search.log_progress(2, "val/AP", 0.3, {"running": 1, "finished": 1, "waiting": 4})
    search.log_progress(3, "val/AP", 0.3, {"running": 1, "stopped early": 1, "finished": 1})
    search.log_progress(3, "val/AP", 0.3, {"finished": 2, "failed": 3, "stopped early": 1})
    search.log_bytes(b"[]", "trials.json")
    search.log_bytes(b"[]", "trials.json")
    search.log_bytes(b"first", "trials.txt")
    search.log_bytes(b"trial state AP\n", "trials.txt")
    search.log_bytes(b"\x89PNG", "history.png")
    wait_until(lambda: search.run_id and "history.png" in artifact_names(store_uri, search.run_id))
    assert search.close("FINISHED")

    run = runs_of(store_uri)["rates"]
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "search/scheduler": "asha",
        "search/seed": "3",
        "space/optim.lr": "loguniform 1e-5..1e-3",
    }
    assert history(store_uri, run.info.run_id, "search/best_val_AP") == [(1, 0.2), (2, 0.3), (3, 0.3), (4, 0.3)]
    assert history(store_uri, run.info.run_id, "search/running") == [(1, 2), (2, 2), (3, 1), (4, 0)]
    assert run.data.metrics["search/failed"] == 3
    assert run.data.metrics["search/stopped_early"] == 1
    assert artifact_names(store_uri, run.info.run_id) == {"config.yaml", "trials.json", "trials.txt", "history.png"}
    assert artifact_text(store_uri, run.info.run_id, "trials.txt") == "trial state AP\n"
    logged = (tmp_path / "search" / "events.jsonl").read_text()
    assert logged.count('"target":"trials.json"') == 1, "the same content is stored once"


def test_a_resumed_search_adds_to_its_curves(open_search: OpenSearch, store_uri: str) -> None:
    """MLflow keeps the first point of a step, and the results of a moved trial's former weights count no more."""
    search = open_search()
    for results in (1, 2, 5):
        search.log_progress(results, "val/AP", results / 10, {"running": 2})
    search.log_progress(5, "val/AP", 0.5, {"stopped": 2})
    assert search.close("KILLED")
    search = open_search()
    for results in (3, 4):
        search.log_progress(results, "val/AP", 0.6, {"running": 2})
    search.log_progress(4, "val/AP", 0.6, {"finished": 2})
    assert search.close("FINISHED")
    run = runs_of(store_uri)["rates"]
    best = [(1, 0.1), (2, 0.2), (5, 0.5), (6, 0.5), (7, 0.6), (8, 0.6), (9, 0.6)]
    assert history(store_uri, run.info.run_id, "search/best_val_AP") == best
    assert run.data.metrics["search/finished"] == 2 and run.data.metrics["search/running"] == 0


def test_a_state_that_does_not_exist_is_refused(open_search: OpenSearch) -> None:
    with pytest.raises(ValueError, match="no states of trials: dead"):
        open_search().log_progress(1, "val/AP", None, {"dead": 1})
    child = ChildState("t000", "running", "uid-t000", is_best=True)
    with pytest.raises(ValueError, match="2 children are 1 runs"):
        open_search("other", uid="search-2").reconcile([child, child])


def test_each_child_shows_what_became_of_it(open_search: OpenSearch, open_tracker: OpenTracker, store_uri: str) -> None:
    search = open_search()
    parent = search.wait_for_run_id(30)
    assert parent is not None
    train(open_tracker, "t000", "FINISHED", parent)
    train(open_tracker, "t001", "KILLED")  # stopped by the scheduler: the run itself knows only that it was stopped
    train(open_tracker, "t002", None)  # its process died
    train(open_tracker, "t003", "FAILED", parent)
    train(open_tracker, "t004", None)
    children = [
        ChildState("t000", "finished", "uid-t000", values=SPACE, is_best=True),
        ChildState("t001", "stopped early", "uid-t001", values=SPACE),
        ChildState("t002", "failed", "uid-t002", "the worker died (SIGKILL)", values=SPACE),
        ChildState("t003", "failed", "uid-t003", "the loss is not finite", values=SPACE),
        ChildState("t004", "stopped", "uid-t004", "the time is over", values=SPACE),
        ChildState("t005", "refused", None, "optim.lr_backbone > optim.lr", values=SPACE),
        ChildState("t006", "failed", "uid-t006", "no room on the cluster", values=SPACE),
    ]
    assert search.close("FINISHED", children)

    runs = runs_of(store_uri)
    assert {name: run.info.status for name, run in runs.items()} == {
        "rates": "FINISHED",
        "t000": "FINISHED",
        "t001": "FINISHED",
        "t002": "FAILED",
        "t003": "FAILED",
        "t004": "KILLED",
        "t005": "FAILED",
        "t006": "FAILED",
    }
    for child in children:
        run = runs[child.trial]
        assert run.data.tags[PARENT_TAG] == parent
        assert run.data.params == {"space/optim.lr": "0.0003", "space/loss.giou.points.1.1": "2"}
        expected = {"trial.name": child.trial, "trial.state": child.state, "trial.generation": "0"}
        expected |= {} if not child.problem else {"trial.problem": child.problem}
        assert trial_tags(run) == expected | ({"search.best": "true"} if child.is_best else {})
        assert run.info.start_time <= run.info.end_time
    (last,) = client_of(store_uri).get_metric_history(runs["t002"].info.run_id, "val/AP")
    assert runs["t002"].info.end_time == last.timestamp, (
        "a killed run ended with its last metric, not when it was found"
    )


def test_a_second_call_changes_nothing(
    open_search: OpenSearch, open_tracker: OpenTracker, store_uri: str, tmp_path: Path
) -> None:
    train(open_tracker, "t000", "FINISHED")
    train(open_tracker, "t001", None)
    children = [
        ChildState("t000", "finished", "uid-t000", values=SPACE, is_best=True),
        ChildState("t001", "failed", "uid-t001", "died", values=SPACE),
        ChildState("t002", "refused", None, "no", values=SPACE),
    ]
    open_search().close("FINISHED", children)
    first = {name: run.to_dictionary() for name, run in runs_of(store_uri).items()}
    shutil.rmtree(tmp_path / "search")  # another machine, which knows the uid alone
    open_search().close("FINISHED", children)
    second = {name: run.to_dictionary() for name, run in runs_of(store_uri).items()}
    assert second.keys() == first.keys()
    for name in ("t000", "t001", "t002"):
        assert second[name] == first[name]
    assert second["rates"]["info"]["run_id"] == first["rates"]["info"]["run_id"]


def test_the_best_tag_moves_and_problems_go_away(
    open_search: OpenSearch, open_tracker: OpenTracker, store_uri: str
) -> None:
    for name in ("t000", "t001"):
        train(open_tracker, name, None)
    search = open_search()

    def best() -> list[str]:
        return [name for name, run in runs_of(store_uri).items() if run.data.tags.get("search.best") == "true"]

    def note(trial: str) -> str | None:
        return runs_of(store_uri)[trial].data.tags.get("mlflow.note.content")

    def show(best_trial: str | None, problem: str = "") -> None:
        children = [
            ChildState(name, "running", f"uid-{name}", problem, is_best=name == best_trial) for name in ("t000", "t001")
        ]
        search.reconcile(children)

    show("t000", "the first attempt failed")
    wait_until(lambda: best() == ["t000"])
    wait_until(lambda: "trial.problem" in runs_of(store_uri)["t001"].data.tags)
    assert note("t001") == "running: the first attempt failed"
    client_of(store_uri).set_tag(runs_of(store_uri)["t000"].info.run_id, "mlflow.note.content", "mine")
    show("t001")
    wait_until(lambda: best() == ["t001"])
    assert (note("t000"), note("t001")) == ("mine", None), "a description that the user wrote stays"
    assert all("trial.problem" not in run.data.tags for run in runs_of(store_uri).values())
    assert {runs_of(store_uri)[name].info.status for name in ("t000", "t001")} == {"RUNNING"}
    show(None)
    wait_until(lambda: best() == [])
    # A tag that another process left on a run that this one does not write.
    client = client_of(store_uri)
    client.set_tag(runs_of(store_uri)["t000"].info.run_id, "search.best", "true")
    show("t001")
    wait_until(lambda: best() == ["t001"])


def test_generations_of_a_trial_are_children_of_the_search(
    open_search: OpenSearch, open_tracker: OpenTracker, store_uri: str
) -> None:
    for name in ("t000", "t000-g1"):
        train(open_tracker, name, "FINISHED")
    search = open_search()
    children = [
        ChildState("t000", "stopped early", "uid-t000", "went on from t001 at step 40", {"optim.lr": 1e-4}),
        ChildState("t000", "finished", "uid-t000-g1", "", {"optim.lr": 2e-4}, is_best=True, generation=1),
    ]
    assert search.close("FINISHED", children)
    runs = runs_of(store_uri)
    shown = [
        (runs[name].data.tags["trial.name"], runs[name].data.tags["trial.generation"]) for name in sorted(runs)[1:]
    ]
    assert shown == [("t000", "0"), ("t000", "1")]
    assert runs["t000-g1"].data.params == {"space/optim.lr": "0.0002"}
    assert runs["rates"].data.tags["search.best_trial"] == "t000"


def test_a_search_goes_on_without_the_store_and_mends_all_once_it_is_there(
    open_search: OpenSearch, open_tracker: OpenTracker, store_uri: str, said: list[str], tmp_path: Path
) -> None:
    store, away = tmp_path / "store", tmp_path / "away"
    store.rename(away)
    store.write_text("no folder")
    search = open_search()
    assert search.wait_for_run_id(0.3) is None
    tracker = open_tracker("t000", run_name="t000", run_uid="uid-t000")
    children = [
        ChildState("t000", "running", "uid-t000", values=SPACE),
        ChildState("t001", "refused", None, "optim.lr is too large", SPACE),
    ]
    search.reconcile(children)
    search.log_progress(1, "val/AP", 0.1, {"running": 1, "refused": 1})
    wait_until(lambda: said)
    search.reconcile(children)
    assert len(said) == 1
    assert said[0].startswith(f"WARNING: MLflow at {store_uri} does not take what became of the trials (")

    store.unlink()
    away.rename(store)
    wait_until(lambda: len(said) == 2)
    assert said[1] == f"MLflow at {store_uri} takes what became of the trials again"
    wait_until(lambda: PARENT_TAG in runs_of(store_uri)["t000"].data.tags)
    runs = runs_of(store_uri)
    assert runs["t000"].data.tags[PARENT_TAG] == search.run_id == runs["rates"].info.run_id
    assert (runs["t000"].info.status, runs["t001"].info.status) == ("RUNNING", "FAILED")
    tracker.finish("FINISHED")
    assert search.close("FINISHED")


def test_the_end_comes_in_time_when_the_store_is_away_and_a_resumed_search_mends_all(
    open_search: OpenSearch, open_tracker: OpenTracker, store_uri: str, said: list[str], tmp_path: Path
) -> None:
    search = open_search(timing=replace(QUICK, finish=1.0))
    parent = search.wait_for_run_id(30)
    train(open_tracker, "t000", None, parent)
    store, away = tmp_path / "store", tmp_path / "away"
    store.rename(away)
    store.write_text("no folder")
    children = [ChildState("t000", "running", "uid-t000", values=SPACE), ChildState("t001", "failed", None, "no room")]
    assert not search.close("KILLED", children)
    assert "does not show what became of all 2 runs of the search (" in said[-1]
    assert said[-1].endswith("; resuming the search writes it")
    store.unlink()
    away.rename(store)

    train(open_tracker, "t001", "FINISHED")  # tried again, with a training run this time
    resumed = open_search()
    states = [
        ChildState("t000", "finished", "uid-t000", values=SPACE, is_best=True),
        ChildState("t001", "finished", "uid-t001"),
    ]
    assert resumed.close("FINISHED", states)
    runs = runs_of(store_uri)
    assert runs.keys() == {"rates", "t000", "t001"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert resumed.run_id == parent


def test_a_run_that_stood_for_a_trial_is_replaced_by_its_training_run(
    open_search: OpenSearch, open_tracker: OpenTracker, store_uri: str
) -> None:
    search = open_search()
    search.reconcile([ChildState("t000", "failed", None, "no room on the cluster")])
    search.wait_for_run_id(30)
    wait_until(lambda: "t000" in runs_of(store_uri))
    stood_for_it = runs_of(store_uri)["t000"].info.run_id
    train(open_tracker, "t000", "FINISHED")
    assert search.close("FINISHED", [ChildState("t000", "finished", "uid-t000")])
    assert runs_of(store_uri)["t000"].info.run_id != stood_for_it


def test_a_run_that_is_about_to_begin_is_not_made_twice(
    open_search: OpenSearch, open_tracker: OpenTracker, store_uri: str
) -> None:
    search = open_search()
    search.wait_for_run_id(30)
    children = [ChildState("t000", "failed", "uid-t000", "died"), ChildState("t001", "refused", None, "too large")]
    search.reconcile(children)
    wait_until(lambda: "t001" in runs_of(store_uri))
    assert "t000" not in runs_of(store_uri), "its own sender may be making it"
    train(open_tracker, "t000", "KILLED")
    assert search.close("FINISHED", children)
    assert runs_of(store_uri)["t000"].info.status == "FAILED"


def test_the_last_call_looks_at_runs_that_were_right_before(
    open_search: OpenSearch, open_tracker: OpenTracker, store_uri: str
) -> None:
    """A run's own sender may write its state after the search did."""
    tracker = open_tracker("t000", run_name="t000", run_uid="uid-t000")
    search = open_search()
    children = [ChildState("t000", "stopped early", "uid-t000")]
    wait_until(lambda: search.run_id and tracker.run_id)
    search.reconcile(children)
    wait_until(lambda: runs_of(store_uri)["t000"].info.status == "FINISHED")
    tracker.finish("KILLED")
    assert runs_of(store_uri)["t000"].info.status == "KILLED"
    assert search.close("FINISHED")
    assert runs_of(store_uri)["t000"].info.status == "FINISHED"


def test_a_run_that_the_user_deleted_stays_deleted(
    open_search: OpenSearch,
    open_tracker: OpenTracker,
    store_uri: str,
    said: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    train(open_tracker, "t000", "FINISHED")
    client_of(store_uri).delete_run(runs_of(store_uri)["t000"].info.run_id)
    assert open_search().close("FINISHED", [ChildState("t000", "finished", "uid-t000", is_best=True)])
    assert runs_of(store_uri).keys() == {"rates"}
    assert [*said, *caplog.messages] == []


def test_states_are_written_while_runs_write(
    open_search: OpenSearch, open_tracker: OpenTracker, store_uri: str
) -> None:
    """Senders and the search write at once; nothing is lost, doubled or overwritten."""
    search = open_search()
    trackers = {name: open_tracker(name, run_name=name, run_uid=f"uid-{name}") for name in ("t000", "t001")}
    ending = threading.Event()

    def keep_reconciling() -> None:
        while not ending.wait(0.05):
            search.reconcile([ChildState(name, "running", f"uid-{name}", values=SPACE) for name in trackers])

    thread = threading.Thread(target=keep_reconciling)
    thread.start()
    for step in range(40):
        for tracker in trackers.values():
            tracker.log_metrics({"train/loss": float(step)}, step=step)
        ending.wait(0.01)
    ending.set()
    thread.join()
    for tracker in trackers.values():
        tracker.finish("FINISHED")
    assert search.close("FINISHED", [ChildState(name, "finished", f"uid-{name}", values=SPACE) for name in trackers])
    runs = runs_of(store_uri)
    for name in trackers:
        assert history(store_uri, runs[name].info.run_id, "train/loss") == [(step, float(step)) for step in range(40)]
        assert runs[name].info.status == "FINISHED"
        assert runs[name].data.params == {"space/optim.lr": "0.0003", "space/loss.giou.points.1.1": "2"}
