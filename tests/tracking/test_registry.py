"""Versions of a registered model: found, promoted, rolled back and compared, in a real store."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from versions import ELSEWHERE, entry

from detr_ray import registry as registry_command
from detr_ray.tracking import default_tracking_uri
from detr_ray.tracking.registry import ModelRegistry, RegistryError, RegistryUnavailable


@pytest.fixture
def registry(store_uri: str) -> ModelRegistry:
    return ModelRegistry(store_uri, "detr")


def test_versions_are_found_by_number_alias_and_address(registry: ModelRegistry) -> None:
    assert registry.versions() == [] and registry.champion() is None
    with pytest.raises(RegistryError, match=r"there is no version 1 of 'detr'; it has no versions \(.* register CHECK"):
        registry.version(1)
    for ap in (0.1, 0.2):
        entry(registry, ap)
    registry.promote(2)
    found = registry.versions()
    assert [version.version for version in found] == [1, 2]
    assert [version.aliases for version in found] == [(), ("champion",)]
    for which in (2, "2", "champion", "@champion", "models:/detr/2", "models:/detr@champion"):
        assert registry.version(which).version == 2
    with pytest.raises(RegistryError, match=r"there is no version 7 of 'detr'; there are 1, 2 \(champion\)"):
        registry.version("7")
    with pytest.raises(RegistryError, match="models:/other/1 is of another model than 'detr'"):
        registry.version("models:/other/1")
    other = ModelRegistry(registry.uri, "other")
    assert other.versions() == []
    with pytest.raises(
        RegistryError, match=r"of 'other'; it has no versions .*; the store has detr, which tracking.mod"
    ):
        other.version(1)


def test_the_command_names_the_models_of_a_store_and_takes_their_addresses(
    registry: ModelRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    entry(registry, 0.1)
    entry(registry, 0.3)

    def command(*arguments: str) -> str:
        assert registry_command.main([*arguments, f"tracking.uri={registry.uri}", "tracking.model_name=mine"]) == 0
        return capsys.readouterr().out

    listed = command("list")
    assert listed.startswith("'mine': it has no versions") and "the store has detr, " in listed
    assert "version 2 of detr is the champion" in command("promote", "models:/detr/2")
    assert '"version": 2' in command("show", "models:/detr@champion", "--json")
    assert "+0.2000" in command("compare", "models:/detr/1", "models:/detr/2")


def test_more_versions_than_a_page_of_the_store_are_all_there(
    registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        entry(registry)
    whole = registry.client.search_model_versions
    monkeypatch.setattr(
        registry.client, "search_model_versions", lambda query, page_token: whole(query, 2, page_token=page_token)
    )
    assert [version.version for version in registry.versions()] == [1, 2, 3, 4, 5]


def test_numbers_are_read_from_tags_in_their_usual_order(registry: ModelRegistry) -> None:
    version = entry(registry, 0.25, **{"val/seconds": "3", "val/AR1": "0.5"})
    assert list(version.metrics.items()) == [("val/AP", 0.25), ("val/AP50", 0.45), ("val/AR1", 0.5)]
    other = {"eval.size": 48, "validation data": "other"}
    assert version.ap_on(version.measured_on) == 0.25 and version.ap_on(other) is None
    registry.tag(version, {"champion.measured_anew": json.dumps([[ELSEWHERE, 0.75], [other, 0.5]])})
    version = registry.version(1)
    assert (version.ap_on(other), version.ap_on(ELSEWHERE)) == (0.5, 0.75)
    unknown = entry(registry, 0.25, {})
    assert unknown.ap_on({}) is None, "what was measured nobody knows where compares with nothing"


def test_rollback_goes_back_through_the_champions(registry: ModelRegistry) -> None:
    for _ in range(4):
        entry(registry)
    with pytest.raises(RegistryError, match="'detr' has no champion to roll back; there are 1, 2, 3, 4"):
        registry.rollback()
    for number in (1, 2, 3):
        registry.promote(number, "it is good")
    assert registry.version(3).tags["champion.reason"] == "it is good"
    registry.promote(3, "again")
    assert registry.version(3).tags["champion.reason"] == "it is good", "it was champion already"
    assert registry.rollback("it was bad").version == 2
    assert registry.version(3).tags["champion.decision"] == "rolled back"
    assert registry.version(3).tags["champion.reason"] == "it was bad: back to version 2"
    registry.promote(4)
    assert [registry.rollback().version for _ in range(2)] == [2, 1]
    with pytest.raises(RegistryError, match="version 1 of detr is the first champion of 'detr': none was before it"):
        registry.rollback()
    assert registry.champion() == registry.version(1)


def test_rollback_knows_of_moves_by_other_means_and_of_deleted_versions(registry: ModelRegistry) -> None:
    for _ in range(4):
        entry(registry)
    for number in (1, 2, 3):
        registry.promote(number)
    registry.client.set_registered_model_alias("detr", "champion", "4")
    registry.client.delete_model_version("detr", "3")
    registry.client.delete_model_version("detr", "2")
    assert registry.rollback().version == 1


def test_two_versions_side_by_side(registry: ModelRegistry) -> None:
    entry(registry, 0.25)
    entry(registry, 0.5, **{"val/APs": "0.125"})
    entry(registry, 0.5, ELSEWHERE)
    found = registry.compare(1, 2)
    assert found.same_data and (found.first.version, found.second.version) == (1, 2)
    assert found.metrics == {"val/AP": (0.25, 0.5), "val/AP50": (0.45, 0.7), "val/APs": (None, 0.125)}
    assert not registry.compare(1, 3).same_data
    entry(registry, 0.5, {})
    assert not registry.compare(4, 4).same_data, "unknown"


def test_a_store_that_is_not_there_is_not_made_by_looking(tmp_path: Path) -> None:
    uri = default_tracking_uri(tmp_path / "runs")
    with pytest.raises(RegistryError, match=r"there is no MLflow store in .*/runs/mlflow.db; set MLFLOW_TRACKING_URI"):
        ModelRegistry(uri, "detr")
    assert not (tmp_path / "runs").exists()


def test_a_server_that_is_away_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(RegistryUnavailable, match=r"http://127\.0\.0\.1:9 does not answer"):
        ModelRegistry("http://127.0.0.1:9", "detr")


def test_mlflow_is_imported_with_its_settings(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quiet, without a connection to the internet, and without its own long retries."""
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setattr("detr_ray.tracking.registry.open_client", lambda uri: None)
    ModelRegistry(store_uri, "detr")
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
