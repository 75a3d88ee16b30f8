"""How figures are made and written: without pyplot, so that there is no global state and no display is needed."""

from __future__ import annotations

import io
import textwrap

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FIGURE_FORMATS = ("png", "svg", "pdf", "jpg", "webp")
"""Endings of the files that figures are written in."""
PALE = "#8c8c8c"
_LETTER = 0.62
"""Mean width of a letter, in sizes of the font."""


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def message_figure(message: str) -> Figure:
    """A figure with a text in place of a picture, where there is nothing to draw."""
    figure = new_figure(7.0, 2.0)
    figure.text(0.5, 0.5, message, ha="center", va="center", fontsize=12, color=PALE, parse_math=False)
    return figure


def write_title(figure: Figure, title: str, size: float = 10) -> None:
    """Writes a title above all of a figure, on as many lines as its width asks for.

    Args:
        figure: it.
        title: plain text.
        size: of the font, in points.
    """
    letters = int(figure.get_figwidth() * 72 / (_LETTER * size))
    figure.suptitle("\n".join(textwrap.wrap(title, letters, break_on_hyphens=False)), fontsize=size, parse_math=False)


def cut(text: str, longest: int) -> str:
    """The text, or its beginning where it is longer."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def end_of(location: str, most: int = 60) -> str:
    """The end of a long location, which says most, for titles."""
    return location if len(location) <= most else f"…{location[1 - most :]}"


def figure_bytes(figure: Figure, file_format: str, dpi: int = 110) -> bytes:
    """The content of a file with the picture.

    Args:
        figure: the picture.
        file_format: one of `FIGURE_FORMATS`.
        dpi: pixels an inch, in formats of pixels.
    """
    content = io.BytesIO()
    # A fixed salt, so that the same figure gives the same bytes.
    with rc_context({"svg.hashsalt": "detr_ray"}):
        figure.savefig(content, format=file_format, dpi=dpi)
    return content.getvalue()


def png_bytes(figure: Figure) -> bytes:
    """The picture as the content of a PNG file."""
    return figure_bytes(figure, "png")
