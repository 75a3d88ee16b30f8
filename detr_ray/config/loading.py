"""Builds a configuration from files and overrides, or raises one error that lists all faults."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from detr_ray.config.addresses import refuse_credentials
from detr_ray.config.errors import ConfigError
from detr_ray.config.fields import Section
from detr_ray.config.messages import Finding, findings, shown
from detr_ray.config.schema import accepts_null, default_of, field_at, is_text, nested_section, unknown_key
from detr_ray.config.sections import Config
from detr_ray.config.yaml_format import parse_yaml

COMMAND_LINE = "command line"

FilePath = str | Path


def _content_of(path: str) -> bytes:
    return Path(path).read_bytes()


def load_config(
    paths: FilePath | Sequence[FilePath] | None = None,
    overrides: Sequence[str] = (),
    read: Callable[[str], bytes] = _content_of,
) -> Config:
    """Reads a configuration: defaults, then the files in their order, then the overrides; later values win.

    Sections are merged key by key; a list is replaced as a whole. A null in place of a section is ignored, except for
    sections that are null by default, such as ``data.train``: it removes them. Relative paths stay as written.

    Args:
        paths: YAML file or files.
        overrides: ``dotted.key=value``, also with two dashes in front; the value is read as YAML.
        read: gives the content of a file; ``detr_ray.locations.read_bytes`` reads addresses (``s3://``), too.

    Raises:
        ConfigError: unreadable files, unknown keys, values out of range and broken rules, all of them at once; or an
            address that contains a password, a key or a signature.
    """
    draft = _Draft()
    for path in [paths] if isinstance(paths, str | Path) else paths or ():
        draft.add_file(str(path), read)
    for item in overrides:
        draft.add_override(item)
    config = draft.build()
    refuse_credentials(config.to_dict())
    return config


def config_from_dict(
    values: Mapping[str, Any], source: str, on_unknown: Callable[[str], object] | None = None
) -> Config:
    """Builds a configuration from nested mappings, for example from those of a checkpoint.

    Args:
        values: section -> key -> value; missing keys get their defaults.
        source: name of the values in messages.
        on_unknown: called with each unknown key, which is then ignored; None: unknown keys are errors.

    Raises:
        ConfigError: as `load_config`.
    """
    draft = _Draft(on_unknown)
    draft.merge(values, source)
    return draft.build()


def with_defaults(config: Config, defaults: Mapping[str, Any], source: str) -> Config:
    """The same configuration with other defaults for the keys that were not given.

    Args:
        config: the configuration; pydantic knows which of its keys were given in files and overrides.
        defaults: section -> key -> value.
        source: name of the defaults in messages.

    Raises:
        ConfigError: the given values and the defaults together break a rule.
    """
    draft = _Draft()
    draft.merge(defaults, source)
    draft.merge(config.model_dump(mode="json", exclude_unset=True), "what was given")
    return draft.build()


class _Draft:
    """The values read so far: merged, with the source of each, and the errors found so far."""

    def __init__(self, on_unknown: Callable[[str], object] | None = None) -> None:
        self._on_unknown = on_unknown
        self._values: dict[str, Any] = {}
        self._sources: dict[tuple[str, ...], str] = {}
        self._errors: list[str] = []
        # Keys with an error. A rule that uses one of them would only report the same error again.
        self._faulty: set[str] = set()

    def add_file(self, path: str, read: Callable[[str], bytes]) -> None:
        try:
            content = parse_yaml(read(path))
        except FileNotFoundError:
            self._errors.append(f"{path}: there is no such file")
        except OSError as error:
            self._errors.append(f"{path}: cannot be read: {error.strerror or error}")
        except ConfigError as error:  # of an address, which may hold a password and is not repeated
            self._errors += error.errors
        except ValueError as error:
            self._errors.append(f"{path}: {error}")
        else:
            if content is None:
                return
            if not isinstance(content, dict):
                self._errors.append(f"{path}: must hold sections with keys, not {shown(content)}")
                return
            self.merge(content, path)

    def add_override(self, item: str) -> None:
        name, equals, raw = item.removeprefix("--").partition("=")
        name, raw = name.strip(), raw.strip()
        if not equals or not name:
            self._errors.append(f"'{item}': must be dotted.key=value (from {COMMAND_LINE})")
            return
        path = tuple(name.split("."))
        field = field_at(path)
        if field is None:
            self._refuse_unknown(path, COMMAND_LINE)
            return
        if not raw:
            self._faulty.add(name)
            self._errors.append(f"{name}: no value is given; write {name}=VALUE, or {name}=null for none")
            return
        value: Any
        if is_text(field.annotation) and raw[0] not in "'\"" and raw.lower() not in ("null", "~"):
            # Text is not parsed as YAML: a run may be called 2026, and a path may contain special characters.
            value = raw
        else:
            try:
                value = parse_yaml(raw)
            except ValueError as error:
                self._faulty.add(name)
                self._errors.append(f"{name}: cannot be read as YAML: {error} (got {raw}, from {COMMAND_LINE})")
                return
        for part in reversed(path):
            value = {part: value}
        self.merge(value, COMMAND_LINE)

    def merge(self, values: Mapping[Any, Any], source: str) -> None:
        self._merge(self._values, values, Config, (), source)

    def _merge(
        self,
        target: dict[str, Any],
        values: Mapping[Any, Any],
        section: type[Section],
        prefix: tuple[str, ...],
        source: str,
    ) -> None:
        for key, value in values.items():
            name = str(key)
            path = (*prefix, name)
            field = section.model_fields.get(name)
            if field is None:
                self._refuse_unknown(path, source)
                continue
            nested = nested_section(field.annotation)
            if nested is not None and isinstance(value, Mapping):
                if not isinstance(target.get(name), dict):
                    target[name] = {}
                    self._sources[path] = source
                self._merge(target[name], value, nested, path, source)
            elif nested is not None and value is None and not accepts_null(field.annotation):
                continue
            else:
                target[name] = value
                self._sources[path] = source

    def _refuse_unknown(self, path: tuple[str, ...], source: str) -> None:
        if self._on_unknown is not None:
            self._on_unknown(".".join(path))
            return
        message, guesses = unknown_key(path)
        self._faulty.update(guesses)
        self._errors.append(f"{message} (from {source})")

    def build(self) -> Config:
        """Builds the configuration.

        Pydantic checks the rules of a section only if the section has no other fault. To report all faults at once,
        faulty keys are removed (so that they have their defaults) and the rest is validated again, until it is valid.
        """
        values = self._values
        while True:
            try:
                config = Config.model_validate(values)
            except ValidationError as error:
                found = list(findings(error))
            else:
                if self._errors:
                    raise ConfigError(self._errors)
                return config
            self._errors += [self._line(finding) for finding in found if not self._is_consequence(finding)]
            for finding in found:
                self._faulty.update(finding.keys)
            pruned = _without(values, [key for finding in found for key in finding.keys])
            if pruned == values:
                # None of the keys was given: remove their section.
                pruned = _without(values, [finding.keys[0].rpartition(".")[0] for finding in found])
            if pruned == values:
                raise ConfigError(self._errors)
            values = pruned

    def _is_consequence(self, finding: Finding) -> bool:
        """Whether another fault, which is reported already, may have caused this one."""
        return finding.may_follow and any(
            key == faulty or key.startswith(f"{faulty}.") or faulty.startswith(f"{key}.")
            for key in finding.keys
            for faulty in self._faulty
        )

    def _line(self, finding: Finding) -> str:
        value: Any = self._values
        given = True
        for part in finding.path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                given = False
                break
        keys = tuple(part for part in finding.path if isinstance(part, str))
        source = next((self._sources[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self._sources), None)
        if given:
            origin = f"got {shown(value)}, from {source}"
        else:
            field = field_at(keys)
            default = None if field is None or field.is_required() else default_of(field)
            origin = f"from {source}" if default is None else f"got {shown(default)}, the default"
        return f"{finding.place}: {finding.message}" + ("" if origin == "from None" else f" ({origin})")


def _without(values: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The values without some dotted keys, and without sections that become empty."""
    for key in keys:
        values = _without_one(values, key.split("."))
    return values


def _without_one(values: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    name, *rest = path
    if name not in values:
        return values
    inner = _without_one(values[name], rest) if rest and isinstance(values[name], dict) else {}
    if inner:
        return {**values, name: inner}
    return {key: value for key, value in values.items() if key != name}
