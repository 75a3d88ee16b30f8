"""Reads many small parts of a few large files: parts that are near each other in one read, with files kept open.

Knows nothing of images: parts are a file's number, an offset and a length.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pyarrow import fs

from detr_ray.locations import at

NEAR_BYTES = 256 << 10
"""Parts with at most this distance in bytes are read together: a further request would take longer."""
MOST_BYTES = 16 << 20
"""Parts are not joined beyond this, so that a batch is read by several requests at a time."""
_MOST_OPEN = 64


@dataclass(frozen=True, slots=True)
class Span:
    """One ranged read that serves several parts.

    Attributes:
        file: number of the file.
        start: first byte.
        num_bytes: length.
        parts: which of the parts lie in it, by their place in the list that was joined.
    """

    file: int
    start: int
    num_bytes: int
    parts: tuple[int, ...]


def join_parts(
    files: np.ndarray,
    offsets: np.ndarray,
    lengths: np.ndarray,
    near_bytes: int = NEAR_BYTES,
    most_bytes: int = MOST_BYTES,
) -> list[Span]:
    """The ranged reads that fetch all parts, by file and offset; each part lies whole in one of them.

    Args:
        files: ``[n]`` file of each part.
        offsets: ``[n]`` first byte.
        lengths: ``[n]`` bytes.
        near_bytes: most bytes between two parts that are read together.
        most_bytes: no part is added to a read that would grow beyond this.
    """
    spans: list[Span] = []
    members: list[int] = []
    file = start = end = -1
    for part in np.lexsort((offsets, files)).tolist():
        first, last = int(offsets[part]), int(offsets[part] + lengths[part])
        if members and files[part] == file and first - end <= near_bytes and max(last, end) - start <= most_bytes:
            members.append(part)
            end = max(end, last)
            continue
        if members:
            spans.append(Span(file, start, end - start, tuple(members)))
        members, file, start, end = [part], int(files[part]), first, last
    if members:
        spans.append(Span(file, start, end - start, tuple(members)))
    return spans


class OpenFiles:
    """Reads ranges of files, which stay open: for remote ones, opening is a request of its own.

    May be used by several threads, and sent to other processes, where the files are opened anew.

    Args:
        locations: the files, by their numbers.
    """

    def __init__(self, locations: Sequence[str]) -> None:
        self._locations = tuple(locations)
        self._open: OrderedDict[int, fs.NativeFile] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[tuple[str, ...]]]:
        return OpenFiles, (self._locations,)

    def read(self, file: int, start: int, num_bytes: int) -> bytes:
        """``num_bytes`` bytes of a file, or fewer if it ends before.

        Raises:
            OSError: it cannot be read, and repeating does not help; see `patiently`.
        """

        def attempt(file_system: fs.FileSystem, path: str) -> bytes:
            with self._lock:
                handle = self._open.get(file)
                if handle is not None:
                    self._open.move_to_end(file)
            if handle is None:
                handle = file_system.open_input_file(path)
                self._keep(file, handle)
            try:
                return handle.read_at(num_bytes, start)
            except OSError:
                with self._lock:
                    self._open.pop(file, None)
                raise

        return at(self._locations[file], attempt)

    def _keep(self, file: int, handle: fs.NativeFile) -> None:
        with self._lock:
            self._open[file] = handle
            while len(self._open) > _MOST_OPEN:
                # Not closed here, since another thread may be reading it: it closes when no thread holds it.
                self._open.popitem(last=False)
