"""Addresses of MLflow stores."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from detr_ray.tracking import default_tracking_uri, tracking_uri, viewing_hint
from detr_ray.tracking.store import artifact_location, public_uri, sqlite_path


@pytest.fixture(autouse=True)
def no_server_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_the_default_is_a_database_in_the_storage_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = f"sqlite:///{tmp_path.resolve()}/runs/mlflow.db"
    assert default_tracking_uri("runs") == expected
    assert default_tracking_uri(f"file://{tmp_path}/runs") == expected
    assert tracking_uri(None, tmp_path / "runs") == expected
    assert artifact_location(expected) == f"file://{tmp_path.resolve()}/runs/mlartifacts"
    assert viewing_hint(expected) == f"mlflow ui --backend-store-uri {expected}"


def test_a_bucket_holds_no_database() -> None:
    with pytest.raises(ValueError, match=r"s3://bucket/runs is not a local folder.*MLflow server"):
        default_tracking_uri("s3://bucket/runs")
    assert tracking_uri("http://mlflow:5000", "s3://bucket/runs") == "http://mlflow:5000"


def test_the_configured_address_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment:5000")
    assert tracking_uri(None, tmp_path) == "http://from-environment:5000"
    assert tracking_uri("http://configured", tmp_path) == "http://configured"


def test_relative_databases_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        tracking_uri("sqlite:///my/db.sqlite?timeout=9", "x")
        == f"sqlite:///{tmp_path.resolve()}/my/db.sqlite?timeout=9"
    )
    assert tracking_uri("sqlite:////abs/db.sqlite", "x") == "sqlite:////abs/db.sqlite"


@pytest.mark.parametrize("name", ["a b", "a%20b", "a?b", "a#b", "a%3Fb", "ä'\"", "a&b=c", "file:x"])
def test_a_database_has_an_address_whatever_its_folder_is_called(tmp_path: Path, name: str) -> None:
    from sqlalchemy.engine import make_url

    path = tmp_path / name / "mlflow.db"
    uri = default_tracking_uri(path.parent)
    assert make_url(uri).database == str(path), "as MLflow reads it"
    assert sqlite_path(uri) == path and tracking_uri(uri, "x") == uri
    assert artifact_location(uri) == (path.parent / "mlartifacts").as_uri()
    *command, address = shlex.split(viewing_hint(uri))
    assert (command, address) == (["mlflow", "ui", "--backend-store-uri"], uri)
    assert default_tracking_uri(path.parent.as_uri()) == uri, "also as an address"


def test_passwords_are_not_shown() -> None:
    assert public_uri("https://ann:secret@mlflow.example:5000/path") == "https://mlflow.example:5000/path"
    assert viewing_hint("https://ann:secret@mlflow.example") == "https://mlflow.example"
    assert artifact_location("https://mlflow.example") is None
    assert public_uri("postgresql://ann:secret@db/mlflow?sslpassword=secret") == "postgresql://db/mlflow"
    assert public_uri("sqlite:////x/mlflow.db?timeout=9") == "sqlite:////x/mlflow.db?timeout=9"
