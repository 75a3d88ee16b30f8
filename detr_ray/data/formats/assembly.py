"""Makes an index of the images and boxes that a reader found: sizes, ids, order, and what was left out.

For formats that have no ids. Images are numbered from 1 in the order of their names, boxes from 1 in the order of the
images and of their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from detr_ray.callbacks import Progress
from detr_ray.data.errors import DataError, few
from detr_ray.data.formats.folder import refuse_other_encoding
from detr_ray.data.image_sizes import read_sizes
from detr_ray.data.images import ImageReader, StoredNames
from detr_ray.data.index import MOST_PIXELS_A_SIDE, DatasetIndex

_DECIMALS = 6
"""Boxes are rounded to a millionth of a pixel: a fraction made from a whole pixel then gives this pixel again."""
_MOST_FINITE = 1e38
_FRACTIONS_END = 2.0
"""A larger coordinate is no fraction of an image's side, not even one that was drawn over the border."""
_MOSTLY = 0.9


@dataclass(frozen=True)
class Reading:
    """How a data set is to be read.

    Attributes:
        skip_unreadable: whether images whose size cannot be read are left out; else they are an error.
        most_skipped: with ``skip_unreadable``: largest number of images that may be left out; None for no limit.
        pace: for what is done to images (``read the sizes of``), what is told of those that are done, and of all; None
            for no one to tell.
    """

    skip_unreadable: bool = False
    most_skipped: int | None = None
    pace: Callable[[str], Progress] | None = None

    def progress(self, what: str) -> Progress | None:
        """What is told of the images to which something is done."""
        return None if self.pace is None else self.pace(what)


@dataclass(slots=True)
class Gathered:
    """Images and boxes of one split, in any order.

    Attributes:
        in_fractions: whether boxes are fractions of the image's sides; else pixels.
        drop_repeated: whether a repeated box of an image, with the same class and alike a crowd or not, is kept once.
        names: a name for each image, below the images' folder.
        sizes: (height, width) as stated; None if it has to be read from the image's header.
        image_of: for each box, the place of its image in ``names``.
        corners: left, top, right, bottom of each box.
        category_ids: of each box.
        is_crowd: of each box.
        problems: what was corrected or left out so far; see `PROBLEMS`.
    """

    in_fractions: bool = False
    drop_repeated: bool = True
    names: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int] | None] = field(default_factory=list)
    image_of: list[int] = field(default_factory=list)
    corners: list[tuple[float, float, float, float]] = field(default_factory=list)
    category_ids: list[int] = field(default_factory=list)
    is_crowd: list[bool] = field(default_factory=list)
    problems: dict[str, int] = field(default_factory=dict)

    def add_image(self, name: str, size: tuple[int, int] | None = None) -> int:
        """Adds an image; gives its place."""
        self.names.append(name)
        self.sizes.append(size)
        return len(self.names) - 1

    def add_box(
        self, image: int, category_id: int, corners: tuple[float, float, float, float], is_crowd: bool = False
    ) -> None:
        """Adds a box (left, top, right, bottom) to the image at a place."""
        self.image_of.append(image)
        self.category_ids.append(category_id)
        self.corners.append(corners)
        self.is_crowd.append(is_crowd)

    def count(self, problem: str, number: int = 1) -> None:
        """Counts something that was corrected or left out."""
        self.problems[problem] = self.problems.get(problem, 0) + number


def assemble(
    gathered: Gathered,
    *,
    categories: tuple[tuple[int, str], ...],
    images_root: str,
    source: str,
    follow_links: bool,
    reading: Reading,
) -> DatasetIndex:
    """Makes an index.

    Args:
        gathered: images and boxes; each image once.
        categories: (id, name).
        images_root: folder or URI that the names are relative to.
        source: what to call the data set in messages.
        follow_links: whether links in that folder may lead out of it.
        reading: what happens with images whose size cannot be read.

    Raises:
        DataError: no images; the name of one is not UTF-8; or its size cannot be read, unless such are skipped.
    """
    if not gathered.names:
        raise DataError(f"{source}: no image in it")
    order = sorted(range(len(gathered.names)), key=gathered.names.__getitem__)
    place_of = np.empty(len(order), np.int64)
    place_of[order] = np.arange(len(order))
    refuse_other_encoding(images_root, gathered.names)
    names = pa.array([gathered.names[i] for i in order], pa.string())
    stated = [gathered.sizes[i] for i in order]
    sizes, _ = complete_sizes(stated, StoredNames(names, images_root, follow_links), source, reading)
    is_kept = np.asarray((sizes > 0).all(axis=1))
    gathered.count("images_without_size", int((~is_kept).sum()))

    image_of = place_of[np.array(gathered.image_of, np.int64)]
    rows = np.argsort(image_of, kind="stable")
    rows = rows[is_kept[image_of[rows]]]
    rows = rows[_finite_and_first(gathered, rows)]
    image_of = image_of[rows]
    boxes = _to_xywh_px(gathered, rows, sizes[image_of])
    image_ids = np.cumsum(is_kept)
    problems = gathered.problems | {"category_names_repeated": len(categories) - len({name for _, name in categories})}
    return DatasetIndex.of_annotations(
        image_ids=image_ids[is_kept],
        heights=sizes[is_kept, 0],
        widths=sizes[is_kept, 1],
        file_names=names.filter(pa.array(is_kept)),
        annotated_ids=image_ids[image_of],
        boxes_xywh_px=boxes,
        category_ids=np.array(gathered.category_ids, np.int64)[rows],
        areas=boxes[:, 2].clip(min=0) * boxes[:, 3].clip(min=0),
        is_crowd=np.array(gathered.is_crowd, bool)[rows],
        annotation_ids=np.arange(1, len(rows) + 1),
        categories=categories,
        source=source,
        images_root=images_root,
        follow_links=follow_links,
        problems=problems,
    )


def complete_sizes(
    stated: Sequence[tuple[int, int] | None], stored: StoredNames, source: str, reading: Reading
) -> tuple[np.ndarray, int]:
    """Sizes of images, read from their headers where they are not stated.

    Args:
        stated: (height, width) of each; None where its header is to be read, as it is where no image has this size.
        stored: where they lie.
        source: what to call the data set in messages.
        reading: what happens with images whose size cannot be read.

    Returns:
        ``[I, 2]`` int64, height and width; 0 where the size cannot be read, of which the second value is the number.

    Raises:
        DataError: the size of one cannot be read, unless such are skipped.
    """
    sizes = np.array([size or (0, 0) for size in stated], np.int64).reshape(-1, 2)
    missing = np.flatnonzero(((sizes <= 0) | (sizes > MOST_PIXELS_A_SIDE)).any(axis=1)).tolist()
    if not missing:
        return sizes, 0
    sizes[missing], faults = read_sizes(ImageReader(stored), missing, reading.progress("read the sizes of"))
    is_too_many = reading.most_skipped is not None and len(faults) > reading.most_skipped
    if faults and (not reading.skip_unreadable or is_too_many or len(faults) == len(stated)):
        skip = "data.on_bad_image=skip leaves them out, as many as data.max_bad_images says"
        raise DataError(
            f"{source}: the size of {len(faults)} of {len(stated)} images cannot be read "
            f"({few(list(faults.values()), 3)}). Replace these files or take them out; "
            f"{'or raise data.max_bad_images' if reading.skip_unreadable and is_too_many else skip}"
        )
    return sizes, len(faults)


def refuse_pixels(gathered: Gathered, what: str, advice: str) -> None:
    """Refuses boxes that ought to be fractions and look like pixels.

    Args:
        gathered: the boxes.
        what: what to call the data set.
        advice: how to get fractions, for the message.

    Raises:
        DataError: most of them look like pixels.
    """
    far = sum(max(corners) > _FRACTIONS_END for corners in gathered.corners)
    if far and far >= _MOSTLY * len(gathered.corners):
        raise DataError(
            f"{what}: {far} of {len(gathered.corners)} boxes have numbers above {_FRACTIONS_END:g}: they look like "
            f"pixels, and ought to be fractions: divide {advice}"
        )


def _finite_and_first(gathered: Gathered, rows: np.ndarray) -> np.ndarray:
    """Which rows stay: finite boxes, each once; the others are counted."""
    corners = np.array(gathered.corners, np.float64).reshape(-1, 4)[rows]
    stays = (np.abs(corners) < _MOST_FINITE).all(axis=1)
    gathered.count("boxes_not_finite", int((~stays).sum()))
    if gathered.drop_repeated:
        seen = set()
        for place, row in enumerate(rows.tolist()):
            key = (
                gathered.image_of[row], gathered.category_ids[row], gathered.corners[row], gathered.is_crowd[row],
            )  # fmt: skip
            if stays[place] and key in seen:
                stays[place] = False
                gathered.count("rows_repeated")
            seen.add(key)
    return stays


def _to_xywh_px(gathered: Gathered, rows: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    corners = np.array(gathered.corners, np.float64).reshape(-1, 4)[rows]
    return fractions_to_xywh_px(corners, sizes[:, ::-1] if gathered.in_fractions else np.ones((len(rows), 2)))


def fractions_to_xywh_px(corners: np.ndarray, widths_heights: np.ndarray) -> np.ndarray:
    """Boxes as left, top, width, height in pixels, rounded.

    Args:
        corners: ``[A, 4]`` left, top, right, bottom as fractions of the image's sides.
        widths_heights: ``[A, 2]`` width and height of each box's image; 1 where corners are in pixels.
    """
    boxes = corners * np.concatenate([widths_heights, widths_heights], axis=1)
    boxes[:, 2:] -= boxes[:, :2]
    # Adding 0 turns -0.0 into 0.0, which would otherwise change the fingerprint.
    rounded: np.ndarray = np.round(boxes, _DECIMALS) + 0.0
    return rounded
