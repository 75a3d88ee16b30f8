"""Work on many images in threads, a group after the other, so that memory holds one group and progress can be told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Found = TypeVar("Found")


def in_groups(
    work: Callable[[int], Found], rows: Sequence[int], group_images: int, threads: int, threads_name: str
) -> Iterator[tuple[Sequence[int], list[Found]]]:
    """Does something with each image.

    A group begins when the next one is asked for: whoever stops asking has no further image read.

    Args:
        work: what is done with the image of a row.
        rows: which images.
        group_images: images of a group.
        threads: images at the same time.
        threads_name: what the threads are called.

    Yields:
        The rows of a group and what the work gave for each.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix=threads_name) as pool:
        for start in range(0, len(rows), group_images):
            group = rows[start : start + group_images]
            yield group, list(pool.map(work, group))
