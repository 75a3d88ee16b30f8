"""Which keys of the configuration can be searched, and which of those can change while a trial trains."""

from __future__ import annotations

import keyword

from detr_ray.config.schema import all_keys, unknown_key
from detr_ray.search.expressions import FUNCTIONS

_NO_EFFECT = "does not change results, so there is nothing to search"
_MEASURE = "changes how trials are measured: their metrics could not be compared"
_DATA = "decides on the data, which is the same for all trials; start one search for each data set"
_OWN = "is set by the search itself for every trial"

NOT_SEARCHED: dict[str, str] = {
    "run.": _OWN,
    "tune.": "describes the search itself",
    "tracking.": "says where trials are recorded, not how they train",
    "eval.": _MEASURE,
    "data.root": _DATA,
    "data.format": _DATA,
    "data.split.": _DATA,
    "data.sources": _DATA,
    "data.train.": _DATA,
    "data.val.": _DATA,
    "data.generate.": _DATA,
    "data.max_images": _DATA,
    "data.label_space": _DATA,
    "data.tasks_per_worker": _NO_EFFECT,
    "data.prefetch_batches": _NO_EFFECT,
    "data.follow_links": _NO_EFFECT,
    "train.max_steps": "ends trials at different lengths: they could not be compared",
    "train.early_stopping.": "ends trials at different lengths: they could not be compared",
    "train.micro_batch_size": _NO_EFFECT,
    "train.num_workers": _NO_EFFECT,
    "train.use_gpu": _NO_EFFECT,
    "train.worker_resource": _NO_EFFECT,
    "train.launcher": _NO_EFFECT,
    "train.checkpoint_every_steps": _NO_EFFECT,
    "train.keep_last": _NO_EFFECT,
    "train.max_failures": _NO_EFFECT,
    "train.log_every_steps": _NO_EFFECT,
    "train.compile": _NO_EFFECT,
    "train.channels_last": _NO_EFFECT,
    "train.stall_timeout_s": _NO_EFFECT,
    "train.start_timeout_s": _NO_EFFECT,
    "train.resize_check_s": _NO_EFFECT,
    "train.record_stream": _NO_EFFECT,
}
"""Key, or section with a dot at its end -> why it is not searched."""

SEARCHED_ANYWAY = ("run.seed",)

CHANGEABLE = ("optim.lr", "optim.lr_backbone", "loss.")
"""What can change while a trial trains: it is part neither of the model nor of the optimizer's state."""


def is_changeable(key: str) -> bool:
    """Whether the value of a key can change while a trial trains."""
    return _matches(key, CHANGEABLE)


def fault_of_key(key: str) -> str | None:
    """Why a key cannot be searched; None if it can.

    Args:
        key: a dotted name.
    """
    known = {known.path: known for known in all_keys()}
    if key not in known:
        above = key.rpartition(".")[0]
        while above and above not in known:
            above = above.rpartition(".")[0]
        if above and not known[above].is_section:
            return (
                f"is no key; to search a part of {above}, write its whole value with a distribution inside, as in "
                "{points: [[0, 2], [20, {uniform: [1, 4]}]]}"
            )
        return unknown_key(tuple(key.split(".")))[0]
    if known[key].is_section:
        return "is a section; name one of its keys"
    reasons = [why for name, why in NOT_SEARCHED.items() if _matches(key, (name,))]
    return reasons[0] if reasons and key not in SEARCHED_ANYWAY else None


def fault_of_variable(name: str) -> str | None:
    """Why a name without a dot cannot be a variable; None if it can."""
    if name in {key.path for key in all_keys()}:
        return "is a section; name one of its keys"
    if not name.isidentifier() or keyword.iskeyword(name) or name in FUNCTIONS:
        return "cannot be the name of a variable: take letters, digits and '_'"
    return None


def _matches(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or (name.endswith(".") and (key.startswith(name) or key == name[:-1])) for name in names)
