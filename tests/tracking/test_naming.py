"""Names that MLflow takes."""

from __future__ import annotations

import pytest

from detr_ray.tracking.event_batch import clean_names


def clean(name: str) -> str:
    return clean_names([name])[name]


@pytest.mark.parametrize(
    "name", ["val/AP/traffic light", "perf/data_wait_frac", "loss/weight/ce", "a.b-c:d", "val/AP/猫"]
)
def test_good_names_stay(name: str) -> None:
    assert clean(name) == name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("val/AP/cup (small)", "val/AP/cup _small_"),
        ("val/AP/R&B", "val/AP/R_B"),
        ("val/AP/", "val/AP/_"),
        ("val//../AP", "val/_/_/AP"),
        ("/AP", "_/AP"),
        ("line\nbreak", "line_break"),
        ("..AP", "_..AP"),
        ("", "_"),
    ],
)
def test_other_names_are_cleaned(name: str, expected: str) -> None:
    assert clean(name) == expected


def test_every_cleaned_name_is_taken_by_mlflow() -> None:
    from mlflow.utils.validation import _validate_metric_name

    for name in ["a+b", "..", "a//b", "./a", "x" * 400, "é?", "", "/", "a/..", "\t", "....", "a/./b"]:
        _validate_metric_name(clean(name))


def test_different_names_stay_different_and_the_same_in_each_run() -> None:
    names = ["AP/a+b", "AP/a*b", "AP/a_b", "x" * 300 + "1", "x" * 300 + "2"]
    cleaned = clean_names(names)
    assert cleaned["AP/a_b"] == "AP/a_b"
    assert len(set(cleaned.values())) == len(names)
    assert all(len(name) <= 250 for name in cleaned.values())
    assert cleaned == clean_names(reversed(names))
