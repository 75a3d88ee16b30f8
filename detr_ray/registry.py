"""Shows and changes the versions of the registered model."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from detr_ray.cli import run_command, say, usage
from detr_ray.config import Config, ConfigError

if TYPE_CHECKING:
    from detr_ray.tracking.registry import ModelRegistry, ModelVersion

DESCRIPTION = """Show and change the versions of the registered model (tracking.model_name, in the store tracking.uri).

list                 all versions, with their AP and the alias `champion`
show VERSION         everything that is known of a version
register CHECKPOINT  make a run's best checkpoint, a checkpoint, a model package or a file of weights a version; it
                     becomes the champion if its AP is better than the champion's by more than tracking.champion_margin
promote VERSION      make a version the champion, whatever its AP is
compare A B          the numbers of two versions side by side, and the keys that they were trained with differently
rollback             make the version champion again that was it before

A VERSION is a number, an alias (champion), or models:/NAME/3, models:/NAME@champion. Exit code 0: done; 1: the registry
does not answer; 2: there is no such version, checkpoint or store."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = usage("ACTION [VERSION|CHECKPOINT]...")
    parser.add_argument("action", nargs="?", choices=sorted(_ACTIONS), metavar="ACTION", help="what to do, see above")
    parser.add_argument("what", nargs="*", metavar="VERSION|CHECKPOINT", help="which, see above")
    parser.add_argument("--json", action="store_true", help="print JSON for programs, and not a table")
    parser.add_argument("--reason", metavar="TEXT", help="why, for promote and rollback; kept with the version")


def _run(config: Config, arguments: argparse.Namespace) -> int:
    if arguments.action is None:
        raise ConfigError(f"what is to be done is missing: give one of {', '.join(_ACTIONS)}; see --help")
    act, needed = _ACTIONS[arguments.action]
    if len(arguments.what) != needed:
        wants = {0: "nothing more", 1: "one VERSION or CHECKPOINT", 2: "two VERSIONs"}[needed]
        raise ConfigError(f"{arguments.action} takes {wants} (got {' '.join(arguments.what) or 'nothing'}); see --help")
    if arguments.reason is not None and arguments.action not in ("promote", "rollback"):
        raise ConfigError(f"--reason: means nothing for {arguments.action}")
    act(config, arguments)
    return 0


def _registry(config: Config, versions: Sequence[str] = ()) -> ModelRegistry:
    """The registry of the model that the versions are of, if they are addresses, or else of tracking.model_name."""
    from detr_ray.engine.reporting.tracking_store import run_tracking_uri
    from detr_ray.tracking.registry import ModelRegistry, model_of

    addressed = [name for name in map(model_of, versions) if name is not None]
    return ModelRegistry(run_tracking_uri(config), addressed[0] if addressed else config.tracking.model_name)


def _list(config: Config, arguments: argparse.Namespace) -> None:
    registry = _registry(config)
    versions = registry.versions()
    if arguments.json:
        _print_json([_described(version) for version in versions])
        return
    if not versions:
        say(f"{registry.name!r}: {registry.what_there_is(versions)}")
        return
    rows = [("version", "aliases", "AP", "registered", "from", "decision")]
    for version in versions:
        ap = version.metrics.get("val/AP")
        rows.append(
            (
                str(version.version),
                ", ".join(version.aliases),
                "" if ap is None else f"{ap:.4f}",
                _time(version.created_ms),
                version.tags.get("checkpoint", version.source),
                f"{version.tags.get('champion.decision', '')}: {version.tags.get('champion.reason', '')}".strip(": "),
            )
        )
    _print_table(rows)


def _show(config: Config, arguments: argparse.Namespace) -> None:
    _print_version(_registry(config, arguments.what).version(arguments.what[0]), arguments.json)


def _register(config: Config, arguments: argparse.Namespace) -> None:
    from detr_ray.runtime.registration import register

    registered = register(config, arguments.what[0], _quiet if arguments.json else say)
    if arguments.json:
        _print_json(_described(registered.version))


def _promote(config: Config, arguments: argparse.Namespace) -> None:
    registry = _registry(config, arguments.what)
    _print_champion(registry.promote(arguments.what[0], arguments.reason or "promoted by hand"), arguments.json)


def _rollback(config: Config, arguments: argparse.Namespace) -> None:
    registry = _registry(config)
    _print_champion(registry.rollback(arguments.reason or "rolled back by hand"), arguments.json)


def _compare(config: Config, arguments: argparse.Namespace) -> None:
    registry = _registry(config, arguments.what)
    comparison = registry.compare(*arguments.what)
    first, second = comparison.first, comparison.second
    changed, unknown = _trained_differently(registry, first, second)
    if arguments.json:
        _print_json(
            {
                "versions": [first.version, second.version],
                "metrics": comparison.metrics,
                "same_data": comparison.same_data,
                "config": changed,
            }
        )
        return
    rows = [("", f"version {first.version}", f"version {second.version}", "difference")]
    for name, (a, b) in comparison.metrics.items():
        difference = "" if a is None or b is None else f"{b - a:+.4f}"
        rows.append((name, _number(a), _number(b), difference))
    _print_table(rows)
    if not comparison.same_data:
        say(
            "\nWARNING: measured on different data or in different ways, so the difference says little:\n"
            f"  version {first.version}: {_listed(first.measured_on)}\n"
            f"  version {second.version}: {_listed(second.measured_on)}"
        )
    if changed is None:
        say(f"\nWARNING: what they were trained with is not known: {unknown}")
        return
    say("\ntrained with the same configuration" if not changed else "\ntrained with other values of")
    for key, (a, b) in changed.items():
        say(f"  {key}: {json.dumps(a)} -> {json.dumps(b)}")


def _trained_differently(
    registry: ModelRegistry, first: ModelVersion, second: ModelVersion
) -> tuple[dict[str, tuple[Any, Any]] | None, str]:
    """Keys that two versions were trained with differently; None, and why, where their files do not say it any more."""
    from detr_ray.tracking.fetching import read_record
    from detr_ray.tracking.registry import RegistryError, RegistryUnavailable

    try:
        configs = [json.loads(read_record(registry, version))["config"] for version in (first, second)]
    except RegistryUnavailable:
        raise
    except RegistryError as error:
        return None, str(error)
    return _differences(*configs), ""


_ACTIONS: dict[str, tuple[Callable[[Config, argparse.Namespace], None], int]] = {
    "list": (_list, 0),
    "show": (_show, 1),
    "register": (_register, 1),
    "promote": (_promote, 1),
    "compare": (_compare, 2),
    "rollback": (_rollback, 0),
}
"""Action -> the function, and how many versions or checkpoints it takes."""


def _described(version: ModelVersion) -> dict[str, Any]:
    content = dataclasses.asdict(version)
    content["tags"] = dict(version.tags)
    return content | {"metrics": version.metrics, "measured_on": version.measured_on}


def _print_version(version: ModelVersion, as_json: bool) -> None:
    if as_json:
        _print_json(_described(version))
        return
    rows = [
        ("model", version.name),
        ("version", str(version.version)),
        ("aliases", ", ".join(version.aliases) or "none"),
        ("registered", _time(version.created_ms)),
        ("MLflow run", version.run_id or "none in this store"),
        ("files", version.source),
    ]
    _print_table([*rows, *((key, value) for key, value in sorted(version.tags.items()) if key != "champion.alive")])


def _print_champion(version: ModelVersion, as_json: bool) -> None:
    if as_json:
        _print_json(_described(version))
    else:
        say(f"{version} is the champion: {version.tags.get('champion.reason', '')}")


def _differences(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> both values, of the keys of two configurations that differ."""
    a, b = ({f"{section}.{key}": value for section, keys in each.items() for key, value in keys.items()}
            for each in (first, second))  # fmt: skip
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        say("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_json(content: Any) -> None:
    say(json.dumps(content, indent=1))


def _quiet(line: str) -> None:
    say(line, sys.stderr)


def _listed(measured_on: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in measured_on.items()) or "unknown"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _time(milliseconds: int) -> str:
    return datetime.datetime.fromtimestamp(milliseconds / 1000).strftime("%Y-%m-%d %H:%M")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m detr_ray.registry``."""
    return run_command("registry", DESCRIPTION, _run, argv, add_arguments=_arguments)


if __name__ == "__main__":
    sys.exit(main())
