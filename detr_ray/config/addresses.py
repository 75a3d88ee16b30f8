"""Refuses passwords in addresses: the whole configuration is stored with the run and shown in its records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from detr_ray.config.errors import ConfigError
from detr_ray.credentials import credentials_in

_ADVICE = {
    "tracking": "give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, or the whole "
    "address as MLFLOW_TRACKING_URI, in the environment, which is not kept",
    "web": "fetch the file, and give its path",
    "other": "give them in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, the machine's "
    "role), and the address without them",
}


def refuse_credentials(values: Mapping[str, Any]) -> None:
    """Refuses a configuration that contains credentials.

    Args:
        values: section -> key -> value.

    Raises:
        ConfigError: an address contains credentials; the message does not repeat them.
    """
    errors = []
    for key, text in _texts(values, ""):
        found = credentials_in(text)
        if found is not None:
            kind = "tracking" if key.startswith("tracking.") else "web" if text.lower().startswith("http") else "other"
            errors.append(
                f"{key}: the address holds credentials ({found}), which would be stored with the run and shown in its "
                f"records; {_ADVICE[kind]}"
            )
    if errors:
        raise ConfigError(errors)


def _texts(values: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, str):
        yield key, values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _texts(value, key)
