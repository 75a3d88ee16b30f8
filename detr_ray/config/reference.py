"""The reference of all keys: as text for ``--help``, and as Markdown for ``docs/configuration.md``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from detr_ray.config.schema import Key, all_keys, keys_of
from detr_ray.config.transform_sections import TRANSFORMS, TransformSection
from detr_ray.config.yaml_format import format_inline

WIDTH = 100

_INTRODUCTION = """\
# Configuration

<!-- Written from the docstrings of the sections by
python -c "from detr_ray.config.reference import reference_markdown; print(reference_markdown(), end='')" \
> docs/configuration.md -->

A configuration is made of the defaults below, then of YAML files (`--config FILE`, more than once: later wins), then of
`dotted.key=value` on the command line. A file holds only what differs from the defaults. Values are YAML: `null`,
`true`, `0.5`, `1e-4`, `[1, 2]`. Every command prints the resolved configuration with `--print-config`, and what it
prints can be loaded again.
"""


def reference_text() -> str:
    """Every key with its kind, default and meaning, in lines of at most 100 columns."""
    lines: list[str] = []
    for key in all_keys():
        if _is_top(key):
            lines += [
                "",
                f"{key.path}:",
                *textwrap.wrap(key.meaning, WIDTH, initial_indent="  ", subsequent_indent="  "),
            ]
        else:
            head = f"{key.path}  ({key.kind}{'' if key.is_section else f'; default {_default(key)}'})"
            lines += textwrap.wrap(head, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
            lines += textwrap.wrap(
                key.meaning, WIDTH, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False
            )
        if key.path == "data.augment.transforms":
            lines += [line for transform in TRANSFORMS for line in _transform_lines(transform)]
    return "\n".join(lines[1:])


def _transform_lines(transform: type[TransformSection]) -> Iterator[str]:
    """A transform of the list and its parameters."""
    text = f"- {transform.name}: {_words(transform)}"
    yield from textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 8, break_on_hyphens=False)
    for key in keys_of(transform):
        text, indents = f"{key.path} ({key.kind}; default {_default(key)}): {key.meaning}", (" " * 10, " " * 12)
        yield from textwrap.wrap(text, WIDTH, initial_indent=indents[0], subsequent_indent=indents[1])


def reference_markdown() -> str:
    """Every key with its kind, default and meaning, one table a section."""
    return "\n".join(_markdown_lines())


def _markdown_lines() -> Iterator[str]:
    yield _INTRODUCTION
    for key in all_keys():
        if _is_top(key):
            yield f"## {key.path}\n\n{key.meaning}\n\n| key | value | default | meaning |\n| --- | --- | --- | --- |"
        else:
            default = "" if key.is_section else f"`{_default(key)}`"
            yield f"| `{key.path}` | {key.kind} | {default} | {key.meaning} |"
        if key is _last_of_section(key):
            yield ""
            if key.path.startswith("data."):
                yield from _markdown_of_transforms()


def _markdown_of_transforms() -> Iterator[str]:
    yield "### data.augment.transforms\n\n| transform | parameter | value | default | meaning |"
    yield "| --- | --- | --- | --- | --- |"
    for transform in TRANSFORMS:
        yield f"| `{transform.name}` | | | | {_words(transform)} |"
        for key in keys_of(transform):
            yield f"| | `{key.path}` | {key.kind} | `{_default(key)}` | {key.meaning} |"
    yield ""


def _words(section: type[TransformSection]) -> str:
    """The docstring of a section."""
    return " ".join((section.__doc__ or "").split())


def _is_top(key: Key) -> bool:
    return "." not in key.path


def _last_of_section(key: Key) -> Key:
    top = key.path.partition(".")[0]
    return [other for other in all_keys() if other.path.partition(".")[0] == top][-1]


def _default(key: Key) -> str:
    value = key.default
    return format_inline(list(value) if isinstance(value, tuple) else value)
