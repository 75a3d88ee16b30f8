"""Where the texts of boxes are written, so that they do not cover each other."""

from __future__ import annotations

from collections.abc import Sequence

Place = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the image."""


def text_place(box: Sequence[float], size: tuple[float, float], taken: Sequence[Place], room: Place) -> Place:
    """Where a text is written: at the first corner of its box at which it covers no other one.

    Args:
        box: left, top, right, bottom.
        size: width and height of the text.
        taken: places of other texts.
        room: the image; texts stay inside of it where they can.

    Returns:
        Its place. Where every corner is taken, further down along the left side; then over another text, since one
        beside its box would be read as another box's.
    """
    left, top, right, bottom = box
    width, height = size
    corners = [(left, top - height), (left, top), (left, bottom), (right - width, bottom), (right - width, top)]
    corners += [(left, top + row * height) for row in range(1, int((bottom - top) / height))]
    places = [_inside((x, y, x + width, y + height), room) for x, y in corners]
    return next((place for place in places if not any(_covers(place, other) for other in taken)), places[0])


def _inside(place: Place, room: Place) -> Place:
    """A place moved into the room; at its left and upper end where it does not fit."""
    left, top, right, bottom = place
    x = max(min(left, room[2] - (right - left)), room[0])
    y = max(min(top, room[3] - (bottom - top)), room[1])
    return x, y, x + right - left, y + bottom - top


def _covers(one: Place, other: Place) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
