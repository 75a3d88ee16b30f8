"""Finds a state dict in checkpoints of other trainers, with dictionaries around it and prefixes before its names.

Knows mappings and names; reads no files and changes no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import Tensor

OWN_FORMAT = "detr_ray"
"""Value of the key ``format`` in files of this project."""

_WEIGHTS_KEYS = (
    "model", "state_dict", "model_state_dict", "model_state", "module", "net", "network", "weights", "params",
)  # fmt: skip
_AVERAGED_KEYS = (
    "ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "model_ema_state_dict", "ema_model_state_dict",
)  # fmt: skip
_DEEPEST = 3
"""Levels of nested dictionaries that are searched, for example ``{"ema": {"module": {...}}}``."""
_NAMES_SHOWN = 6


_COUNTER = ".num_batches_tracked"


class WeightsError(ValueError):
    """Weights that cannot be read or do not fit; the message names the file and what to do."""


class DamagedFileError(WeightsError):
    """A file that is not whole, or is not what was written."""


@dataclass(frozen=True)
class StateDict:
    """Tensors under the names that a model has for them.

    Attributes:
        tensors: the file's name without ``prefix`` -> tensor.
        prefix: common prefix of these names in the file; empty in most files.
        beside: names in the file without ``prefix``: parts of a larger model.
    """

    tensors: dict[str, Tensor]
    prefix: str
    beside: tuple[str, ...]


def is_counter(name: str) -> bool:
    """Whether a tensor only counts batch norm's batches: nothing reads it, and many files lack it."""
    return name.endswith(_COUNTER)


def shorten_names(names: Sequence[str]) -> str:
    """Names in one line; many names are grouped by their first word, and each group is shown by its common prefix."""
    if len(names) <= _NAMES_SHOWN:
        return ", ".join(names)
    groups: dict[str, list[list[str]]] = {}
    for name in names:
        words = name.split(".")
        groups.setdefault(words[0], []).append(words)
    shown = [
        ".".join(group[0]) if len(group) == 1 else f"{'.'.join(_shared_start(group))}.* ({len(group)})"
        for group in groups.values()
    ]
    more = f" and {len(shown) - _NAMES_SHOWN} more" if len(shown) > _NAMES_SHOWN else ""
    return ", ".join(shown[:_NAMES_SHOWN]) + more


def _shared_start(lists: Sequence[Sequence[str]]) -> list[str]:
    """The common first words of all lists."""
    columns = zip(*lists, strict=False)
    return [words[0] for words in takewhile(lambda words: len(set(words)) == 1, columns)]


def find_states(content: Any, source: str) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None]:
    """The state dicts in a checkpoint: the weights, and their moving average where there is one.

    Both may be inside the dictionaries of other trainers: ``{"state_dict": ...}``, ``{"ema": {"module": ...}}``. If
    there is only an average, it is used for both.

    Args:
        content: what the file holds.
        source: the file, for messages.

    Raises:
        WeightsError: there is none, or it contains values that are no tensors.
    """
    if not isinstance(content, Mapping):
        raise WeightsError(f"{source} holds a {type(content).__name__}, not a dictionary of weights")
    averaged = None
    for key in _AVERAGED_KEYS:
        if content.get(key) is not None:
            averaged = _checked(_innermost(content[key]), source, key)
            break
    weights = _innermost(content)
    if weights is content and averaged is not None:
        return averaged, averaged
    return _checked(weights, source, "model"), averaged


def _innermost(content: Any, depth: int = _DEEPEST) -> Any:
    """The innermost state dict; if there is none, the value that was found instead, for the message."""
    if not isinstance(content, Mapping) or not depth:
        return content
    inner = [content[key] for key in _WEIGHTS_KEYS if isinstance(content.get(key), Mapping)]
    found = [_innermost(value, depth - 1) for value in inner]
    return next((state for state in found if _is_state(state)), found[0] if found else content)


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def _checked(state: Any, source: str, key: str) -> Mapping[str, Tensor]:
    if not isinstance(state, Mapping):
        raise WeightsError(f"{source} holds no state dict under {key!r}, but a {type(state).__name__}")
    strangers = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if strangers:
        raise WeightsError(f"{source} holds no state dict of tensors: {shorten_names(strangers)} is something else")
    if not state:
        raise WeightsError(f"{source} holds no weights: its state dict is empty")
    return state


def without_prefix(state: Mapping[str, Tensor], own_names: Collection[str], source: str) -> StateDict:
    """The tensors of a model, without the prefix that its names have in the file.

    Wrappers put a word or more before each name: ``module.`` (DDP), ``model.`` (Lightning), ``detr.`` (the panoptic
    model), ``_orig_mod.`` (torch.compile), and any of them in each other.

    Args:
        state: the file's state dict.
        own_names: the model's names.
        source: the file, for messages.

    Raises:
        WeightsError: the file holds the model several times, under different prefixes.
    """
    own = set(own_names)
    counts: Counter[str] = Counter()
    for name in state:
        words = name.split(".")
        counts.update(
            "".join(f"{word}." for word in words[:place])
            for place in range(len(words))
            if ".".join(words[place:]) in own
        )
    most = max(counts.values(), default=0)
    # A part of the model may match some names, too; the whole model matches more of them than any part.
    candidates = [prefix for prefix, count in counts.items() if count == most]
    if len(candidates) > 1 and "" not in candidates and 2 * most > len(own):
        raise WeightsError(
            f"{source} holds the model {len(candidates)} times, under {', '.join(candidates)}: save the one that is "
            "meant alone, torch.save({'model': model.state_dict()}, path)"
        )
    prefix = "" if not candidates or "" in candidates else candidates[0]
    return StateDict(
        tensors={name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)},
        prefix=prefix,
        beside=tuple(name for name in state if not name.startswith(prefix)),
    )
