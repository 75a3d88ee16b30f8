"""The request for a picture, and its result. Imports nothing that takes time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PictureRequest:
    """What to draw; each picture uses the values that concern it.

    Attributes:
        images: most images that are drawn.
        image: id or file name of the image; None for the first ones.
        step: optimizer step whose batch or samples are drawn.
        points: (x, y) in pixels of the stored image; none: the picture chooses them.
        layer: of encoder or decoder, from 1; None for the last.
        score: lowest score of detections that are drawn.
    """

    images: int = 8
    image: str | None = None
    step: int = 0
    points: tuple[tuple[float, float], ...] = ()
    layer: int | None = None
    score: float = 0.5


@dataclass(frozen=True)
class Drawn:
    """A picture.

    Attributes:
        figure: what is shown or written.
        lines: text for the user beside it.
    """

    figure: Figure
    lines: list[str] = field(default_factory=list)
