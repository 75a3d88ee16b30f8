"""Processes many images in threads, group by group, to limit memory and to report progress in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Found = TypeVar("Found")


def in_groups(
    work: Callable[[int], Found], rows: Sequence[int], group_images: int, threads: int, threads_name: str
) -> Iterator[tuple[Sequence[int], list[Found]]]:
    """Calls a function for each image.

    A group begins when the caller asks for the next one, so no further images are read if the caller stops.

    Args:
        work: the function, called with the row of an image.
        rows: the images.
        group_images: number of images of a group.
        threads: number of images at the same time.
        threads_name: name of the threads.

    Yields:
        The rows of a group, and the function's result for each.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix=threads_name) as pool:
        for start in range(0, len(rows), group_images):
            group = rows[start : start + group_images]
            yield group, list(pool.map(work, group))
