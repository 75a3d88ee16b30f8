"""From files and overrides to a configuration, or to one error that lists everything wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from detr_ray.config.addresses import refuse_credentials
from detr_ray.config.errors import ConfigError
from detr_ray.config.fields import Section
from detr_ray.config.messages import Finding, findings, shown
from detr_ray.config.schema import accepts_null, field_at, is_text, nested_section, unknown_key
from detr_ray.config.sections import Config
from detr_ray.config.yaml_format import parse_yaml

COMMAND_LINE = "command line"

FilePath = str | Path


def load_config(paths: FilePath | Sequence[FilePath] | None = None, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration: defaults, then the files in their order, then the overrides; what comes later wins.

    Sections are merged key by key; a list is replaced as a whole. A null in place of a section says nothing about its
    keys, but takes away a section that is null by default, such as ``data.train``. Paths inside stay as written.

    Args:
        paths: YAML file or files; none for the defaults alone.
        overrides: ``dotted.key=value``, also with two dashes in front; the value is read as YAML.

    Raises:
        ConfigError: files that cannot be read, unknown keys, values out of range, rules broken: all of them at once;
            or an address with a password, a key or a signature in it.
    """
    draft = _Draft()
    for path in [paths] if isinstance(paths, str | Path) else paths or ():
        draft.add_file(Path(path))
    for item in overrides:
        draft.add_override(item)
    config = draft.build()
    refuse_credentials(config.to_dict())
    return config


def config_from_dict(
    values: Mapping[str, Any], source: str, on_unknown: Callable[[str], object] | None = None
) -> Config:
    """Configuration of nested mappings, for example of those that a checkpoint holds.

    Args:
        values: section -> key -> value; what is absent has its default.
        source: what to call them in messages.
        on_unknown: told of each key that there is not, which is then passed over; None: they are errors.

    Raises:
        ConfigError: as `load_config`.
    """
    draft = _Draft(on_unknown)
    draft.merge(values, source)
    return draft.build()


def with_defaults(config: Config, defaults: Mapping[str, Any], source: str) -> Config:
    """The same configuration with other defaults: values for keys that nobody gave.

    Pydantic notes which keys a configuration was made with, here those of the files and overrides.

    Args:
        config: what was given.
        defaults: section -> key -> value.
        source: what to call the defaults in messages.

    Raises:
        ConfigError: given values and defaults do not go together.
    """
    draft = _Draft()
    draft.merge(defaults, source)
    draft.merge(config.model_dump(mode="json", exclude_unset=True), "what was given")
    return draft.build()


class _Draft:
    """What users gave so far: merged values, where each came from, and what is already known to be wrong."""

    def __init__(self, on_unknown: Callable[[str], object] | None = None) -> None:
        self._on_unknown = on_unknown
        self._values: dict[str, Any] = {}
        self._sources: dict[tuple[str, ...], str] = {}
        self._errors: list[str] = []
        # Keys with faults of their own; a rule that reads one of them would only repeat what was said.
        self._tainted: set[str] = set()

    def add_file(self, path: Path) -> None:
        try:
            content = parse_yaml(path.read_bytes())
        except FileNotFoundError:
            self._errors.append(f"{path}: there is no such file")
        except OSError as error:
            self._errors.append(f"{path}: cannot be read: {error.strerror}")
        except ValueError as error:
            self._errors.append(f"{path}: {error}")
        else:
            if content is None:
                return
            if not isinstance(content, dict):
                self._errors.append(f"{path}: must hold sections with keys, not {shown(content)}")
                return
            self.merge(content, str(path))

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
            self._tainted.add(name)
            self._errors.append(f"{name}: no value is given; write {name}=VALUE, or {name}=null for none")
            return
        value: Any
        if is_text(field.annotation) and raw[0] not in "'\"" and raw.lower() not in ("null", "~"):
            # Text is taken as typed: a run may be called 2026 and a path may hold what is special in YAML.
            value = raw
        else:
            try:
                value = parse_yaml(raw)
            except ValueError as error:
                self._tainted.add(name)
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
        self._tainted.update(guesses)
        self._errors.append(f"{message} (from {source})")

    def build(self) -> Config:
        """The configuration.

        Pydantic checks a rule only where its section has no other fault. So what is faulty is taken out, falling back
        to defaults, and the rest is checked again, until everything was looked at once.
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
            self._errors += [self._line(finding) for finding in found if not self._is_echo(finding)]
            for finding in found:
                self._tainted.update(finding.keys)
            pruned = _without(values, [key for finding in found for key in finding.keys])
            if pruned == values:
                # None of the keys was given, so it is the mention of their section that is faulty.
                pruned = _without(values, [finding.keys[0].rpartition(".")[0] for finding in found])
            if pruned == values:
                raise ConfigError(self._errors)
            values = pruned

    def _is_echo(self, finding: Finding) -> bool:
        return finding.follows and any(
            key == tainted or key.startswith(f"{tainted}.") or tainted.startswith(f"{key}.")
            for key in finding.keys
            for tainted in self._tainted
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
            default = None if field is None or field.is_required() else field.default
            origin = f"from {source}" if default is None else f"got {shown(default)}, the default"
        return f"{finding.place}: {finding.message}" + ("" if origin == "from None" else f" ({origin})")


def _without(values: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The values without some dotted keys, and without sections that this leaves empty."""
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
