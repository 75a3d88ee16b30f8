"""One self-contained HTML page: everything is inside it, and it makes no network requests."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from matplotlib.figure import Figure

from detr_ray.viz.figure import figure_bytes

MOST_LISTED = 20
"""Lines of a list that are shown."""

_MIME = {"svg": "image/svg+xml", "png": "image/png", "jpg": "image/jpeg"}

_STYLE = """
:root { --line: #d7dbe0; --pale: #5d6570; --good: #1a7f37; --bad: #b42318; --back: #f6f7f9; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #1b1f24;
  margin: 0 auto; padding: 1rem; max-width: 72rem; background: #fff; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: .3rem 0; } h2 { font-size: 1.25rem; margin: 2rem 0 .6rem;
  border-bottom: 2px solid var(--line); padding-bottom: .2rem; } h3 { font-size: 1.02rem; margin: 1.2rem 0 .4rem; }
p, ul { margin: .5rem 0; } .pale { color: var(--pale); font-size: .92rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.card { background: var(--back); border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .7rem; }
.card b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.card span { color: var(--pale); font-size: .82rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; min-width: 50%; }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.pairs td:last-child { overflow-wrap: anywhere; } td:nth-child(n+3):last-child:not(.number) { min-width: 11rem; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--pale); font-size: .88rem; }
code, pre { font: .86rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--back); border: 1px solid var(--line); border-radius: .4rem; padding: .6rem; overflow-x: auto; }
li.problem { margin: .4rem 0; } li.problem b { color: var(--bad); } li.fine { color: var(--good); }
nav { font-size: .92rem; } nav a { margin-right: .9rem; display: inline-block; } a { color: #0a58ca; }
@media screen and (max-width: 42rem) { .picture { overflow-x: auto; } .picture img { max-width: 46rem; }
  figcaption::after { content: " \\2194  swipe for the rest"; white-space: nowrap; }
  pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
  .long { table-layout: fixed; width: 100%; } .long td { overflow-wrap: anywhere; } }
details summary { cursor: pointer; color: #0a58ca; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } nav { display: none; }
  h2, h3 { break-after: avoid; } details:not([open]) { display: none; }
  figure, .card, tr, pre.command { break-inside: avoid; } .wide { overflow: visible; }
  pre { white-space: pre-wrap; } a { color: inherit; text-decoration: none; } }
"""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Tells browsers to load nothing from anywhere."""


@dataclass
class Section:
    """A part of the page.

    Attributes:
        anchor: name that links lead to.
        title: its heading.
        parts: HTML, one after another.
    """

    anchor: str
    title: str
    parts: list[str] = field(default_factory=list)


def render(title: str, head: Iterable[str], sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        title: of the page; plain text.
        head: HTML above all sections.
        sections: those without parts are left out.
    """
    shown = [section for section in sections if section.parts]
    links = "".join(f'<a href="#{section.anchor}">{escape(section.title)}</a>' for section in shown)
    body = "\n".join(
        f'<section id="{section.anchor}"><h2>{escape(section.title)}</h2>\n' + "\n".join(section.parts) + "</section>"
        for section in shown
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n'
        f"<body><header><h1>{escape(title)}</h1>\n{''.join(head)}</header>\n<nav>{links}</nav>\n{body}\n</body></html>\n"
    )


def paragraph(text: str, *, pale: bool = False) -> str:
    """Plain text as a paragraph."""
    kind = ' class="pale"' if pale else ""
    return f"<p{kind}>{escape(text)}</p>"


def heading(text: str) -> str:
    """A heading inside of a section."""
    return f"<h3>{escape(text)}</h3>"


def cards(numbers: Sequence[tuple[str, str]]) -> str:
    """Large numbers, each (value, meaning)."""
    inner = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in numbers
    )
    return f'<div class="cards">{inner}</div>'


def table(
    rows: Sequence[Sequence[str]], head: Sequence[str] = (), numbers_from: int | None = None, *, are_long: bool = False
) -> str:
    """A table of plain texts.

    Args:
        rows: of equal length.
        head: of each column.
        numbers_from: the columns from this one on hold numbers; None: none does.
        are_long: whether the texts are broken anywhere on a phone, so that all columns are seen there.
    """

    def cells(row: Sequence[str], tag: str) -> str:
        shown = []
        for place, text in enumerate(row):
            kind = ' class="number"' if numbers_from is not None and place >= numbers_from else ""
            shown.append(f"<{tag}{kind}>{escape(text)}</{tag}>")
        return "".join(shown)

    top = f"<thead><tr>{cells(head, 'th')}</tr></thead>" if head else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    is_of_pairs = not head and all(len(row) == 2 for row in rows)  # long values may be broken
    kind = ' class="pairs"' if is_of_pairs else ' class="long"' if are_long else ""
    return f'<div class="wide"><table{kind}>{top}<tbody>{body}</tbody></table></div>'


@dataclass
class Pictures:
    """Puts figures into a page, and keeps each as the content of a file of its own.

    Attributes:
        files: file name -> content, in the order of the page.
    """

    files: dict[str, bytes] = field(default_factory=dict)

    def add(self, name: str, figure: Figure, caption: str, file_format: str = "svg") -> str:
        """A figure inside of the page.

        Args:
            name: of its file, without the ending.
            figure: it.
            caption: what it shows; also the text for screen readers.
            file_format: ``svg`` for lines, ``jpg`` for photos, ``png``.
        """
        content = self.files[f"{name}.{file_format}"] = figure_bytes(figure, file_format, dpi=100)
        return _image(content, caption, file_format)


def picture(figure: Figure, caption: str, file_format: str = "svg") -> str:
    """A figure inside of the page; see `Pictures.add`."""
    return _image(figure_bytes(figure, file_format, dpi=100), caption, file_format)


def _image(content: bytes, caption: str, file_format: str) -> str:
    source = f"data:{_MIME[file_format]};base64,{base64.b64encode(content).decode()}"
    image = f'<div class="picture"><img src="{source}" alt="{escape(caption)}"></div>'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def commands(lines: Sequence[tuple[str, str]]) -> str:
    """Commands to copy, each (what it does, command)."""
    return "".join(f'<p>{escape(what)}</p><pre class="command">{escape(command)}</pre>' for what, command in lines)


def text_block(text: str) -> str:
    """A plain text whose lines and columns stay as they are."""
    return f"<pre>{escape(text)}</pre>"


def folded(summary: str, text: str) -> str:
    """A long plain text that is shown on demand."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def problems(found: Sequence[tuple[str, str]]) -> str:
    """What is wrong, each (what, what to do about it)."""
    if not found:
        return '<ul><li class="fine">Nothing was found that looks wrong.</li></ul>'
    items = "".join(f'<li class="problem"><b>{escape(what)}:</b> {escape(advice)}</li>' for what, advice in found)
    return f"<ul>{items}</ul>"


def listing(lines: Sequence[str]) -> str:
    """Plain lines, of which the first `MOST_LISTED` are shown."""
    more = f"<li>and {len(lines) - MOST_LISTED} more</li>" if len(lines) > MOST_LISTED else ""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines[:MOST_LISTED]) + more + "</ul>"
