"""Divides a data set without a validation set into training and validation images.

A hash of an image's name and the seed decides on which side it is, so adding images later does not move the others.
Images of one group (frames of one video) are on the same side. The hash gives each class its share only on average. If
a class would be on one side alone, one of its groups is moved: the group with the smallest hash to validation, or the
one with the largest to training, if no other class has it alone there. Adding images can
change which group is moved; all others stay.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from detr_ray.data.errors import DataError
from detr_ray.data.index import DatasetIndex
from detr_ray.data.known_folders import without_known_folders
from detr_ray.printable import printable

_ROUNDS = 10
"""Most passes over the classes: moving a group for one class may take the last one of another."""


@dataclass(frozen=True)
class Holdout:
    """How a data set is divided.

    Attributes:
        val: share of the images that is for validation, above 0 and below 1.
        seed: other seeds divide otherwise.
        group_by: regular expression that is searched in file names: images with the same match are a group, or, if it
            has groups in parentheses, those with the same text in them. Images without a match are by themselves.
    """

    val: float
    seed: int = 0
    group_by: str | None = None

    def part(self, index: DatasetIndex, split: str) -> DatasetIndex:
        """The images of a data set that are of ``train`` or ``val``, with their boxes.

        Raises:
            DataError: all images are of one group, or the expression matches no name.
        """
        is_val = self.is_val(index)
        return index.take(np.flatnonzero(is_val if split == "val" else ~is_val))

    def is_val(self, index: DatasetIndex) -> np.ndarray:
        """``[I]`` bool: which images are for validation."""
        # Known folders are left out: a table may name an image with or without them.
        names = list(map(without_known_folders, index.file_names.to_pylist()))
        groups, group_of = np.unique(np.array(list(self._groups(names, index.source))), return_inverse=True)
        if len(groups) < 2:
            what = "one image" if len(names) == 1 else f"one group, {printable(str(groups[0]))!r}"
            raise DataError(f"{index.source}: data.split cannot divide it: its {len(names)} images are {what}")
        hashes = np.array([self._hash(group) for group in groups.tolist()])
        is_val = hashes < self.val
        if not is_val.any():
            is_val[hashes.argmin()] = True
        if is_val.all():
            is_val[hashes.argmax()] = False
        _move_missing(is_val, hashes, [members for members in _groups_of_classes(index, group_of) if len(members) > 1])
        return is_val[group_of]

    def _groups(self, names: list[str], source: str) -> Iterator[str]:
        """The group of each image; one of its own is called after its file."""
        if self.group_by is None:
            yield from names
            return
        pattern, num_matches = re.compile(self.group_by), 0
        for name in names:
            match = pattern.search(name)
            num_matches += match is not None
            # No text of a match equals that of a name after this character, which names cannot have.
            yield f"\0{name}" if match is None else "\0".join(text or "" for text in match.groups() or (match[0],))
        if not num_matches:
            raise DataError(
                f"{source}: data.split.group_by ({self.group_by}) matches no file name; the first is "
                f"{printable(names[0])}"
            )

    def _hash(self, group: str) -> float:
        """A number in 0..1 for a group."""
        digest = hashlib.sha256(f"{self.seed}\0{group}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


def _move_missing(is_val: np.ndarray, hashes: np.ndarray, classes: Sequence[np.ndarray]) -> None:
    """Moves groups, in place, until each class is on both sides, if it can be; in at most `_ROUNDS` passes.

    Args:
        is_val: ``[G]`` bool, which groups are for validation.
        hashes: ``[G]``.
        classes: the groups of each class, two at least.
    """
    counts = [[int((is_val[members] == side).sum()) for side in (False, True)] for members in classes]
    if all(map(all, counts)):
        return
    times_moved: Counter[int] = Counter()
    classes_of: defaultdict[int, list[int]] = defaultdict(list)
    for number, members in enumerate(classes):
        for group in members.tolist():
            classes_of[group].append(number)
    for _ in range(_ROUNDS):
        for number, members in enumerate(classes):
            if all(counts[number]):
                continue
            side = int(counts[number][0] == 0)
            in_order = members[np.argsort(-hashes[members] if side else hashes[members])].tolist()
            moved = next((one for one in in_order if all(counts[other][side] > 1 for other in classes_of[one])), None)
            if moved is None:  # the class that it is taken from is looked at again
                moved = min(in_order, key=times_moved.__getitem__)
            times_moved[moved] += 1
            is_val[moved] = not side
            for other in classes_of[moved]:
                counts[other][side] -= 1
                counts[other][1 - side] += 1


def _groups_of_classes(index: DatasetIndex, group_of: np.ndarray) -> Iterator[np.ndarray]:
    """For each class, by rising id, the groups that have boxes of it."""
    groups = np.repeat(group_of, np.diff(index.first_box))
    for category_id, _ in index.categories:
        yield np.unique(groups[(index.category_ids == category_id) & ~index.is_crowd])
