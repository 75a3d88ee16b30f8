"""Every key of the configuration does something: one case a key (`registry.py`), and none without.

Run one: ``pytest tests/config_keys -k data.window``. The cases are in ``*_cases.py``, a file a section; those of keys
that mean something on Ray alone run in ``tests/runtime/test_runtime_keys.py``.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from config_keys.registry import CASES, RAY_CASES, Case, Place

from detr_ray.config.schema import all_keys

for _module in Path(__file__).parent.glob("*_cases.py"):
    importlib.import_module(f"config_keys.{_module.stem}")

KEYS = [key.path for key in all_keys() if not key.is_section]

# A case that shows several keys runs once; its outcome is that of each of them.
_OUTCOMES: dict[Case, BaseException | None] = {}


@pytest.mark.parametrize("key", [key for key in KEYS if key not in RAY_CASES])
def test_key_does_what_it_says(key: str, key_data: Path, tmp_path: Path) -> None:
    assert key in CASES, f"{key} has no case: write one in tests/config_keys that sees what it does where it is used"
    case = CASES[key]
    if case not in _OUTCOMES:
        _OUTCOMES[case] = None
        try:
            case(Place(key_data, tmp_path))
        except BaseException as error:
            _OUTCOMES[case] = error
    outcome = _OUTCOMES[case]
    if outcome is not None:
        raise outcome


def test_there_is_no_case_of_a_key_that_is_gone() -> None:
    assert (CASES.keys() | RAY_CASES.keys()) - set(KEYS) == set()
