"""Expressions compute what Python computes, and nothing else can be reached through them."""

from __future__ import annotations

import math

import pytest

from detr_ray.search.expressions import parse_expression

VALUES = {"optim.lr": 1e-3, "factor": 0.5, "count": 7, "zero": 0, "word": "a", "flag": True}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("optim.lr * factor", 5e-4),
        ("(count + 1) / 2 - -3", 7.0),
        ("count * 32", 224),
        ("2 ** 3 ** 2", 512),
        ("factor ** 0.5", math.sqrt(0.5)),
        ("min(count, 3, factor) + max(1, 2)", 2.5),
        ("log10(optim.lr)", -3.0),
        ("round(count * factor)", 4),
        ("optim.lr <= factor < count", True),
        ("1 < count < 3", False),
        ("count == 7 and not count != 7", True),
        ("count > 9 or factor < 1", True),
        ("zero == 0 or 1 / zero > 2", True),
        ("+count", 7),
        ("1e-3", 1e-3),
    ],
)
def test_values(text: str, value: float) -> None:
    found = parse_expression(text).value(VALUES)
    assert found == value and type(found) is type(value)


def test_names_are_those_that_are_used_each_once() -> None:
    assert parse_expression("optim.lr * a + min(a, loss.ce) * 2").names == ("optim.lr", "a", "loss.ce")


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')", "open('x')", "().__class__", "[1, 2]", "a[0]", "lambda: 1", "'text'", "f(1)",
        "a if b else c", "min(a, key=b)", "(a := 1)", "a.b()", "a @ b", "a // b", "1j", "min", "", "a <", "a b", "x; y",
        "import os", "max(*a)", "log10(1, 2)", "min()", "a in b", "a is b", "1e999",
    ],
)  # fmt: skip
def test_only_arithmetic_is_allowed(text: str) -> None:
    if text == "min":
        assert parse_expression(text).names == ("min",), "a name like any other, which nothing has"
        return
    with pytest.raises(ValueError, match=r"expression|allowed|cannot take"):
        parse_expression(text)


def test_a_text_that_is_nested_too_deeply_is_refused() -> None:
    for text in ("+".join(["1"] * 5000), "(" * 5000 + "1" + ")" * 5000):
        with pytest.raises(ValueError, match=r"nested too deeply|is no expression"):
            parse_expression(text)
    assert parse_expression("+".join(["1"] * 50)).value({}) == 50


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / zero", "cannot be computed: division by zero"),
        ("log10(zero)", "cannot be computed"),
        ("word + 1", "word is 'a', not a number"),
        ("missing + 1", "missing is None, not a number"),
        ("10.0 ** 400", "cannot be computed"),
        ("9 ** 9 ** 9", "cannot be computed"),
        ("((9 ** 60) ** 60) ** 60", "cannot be computed"),
        ("1e308 * 10", "is inf, not a finite number"),
        ("(0 - 8) ** 0.5", "cannot be computed"),
    ],
)
def test_what_has_no_value(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"'.*'") as caught:
        parse_expression(text).value(VALUES)
    assert message in str(caught.value)
