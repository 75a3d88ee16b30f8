"""How often an epoch takes each image, so that rare classes, and images without objects, have their share.

Works on whole columns; knows nothing of plans, pixels or labels.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from detr_ray.data.errors import DataError, few, shown
from detr_ray.data.index import DatasetIndex
from detr_ray.data.statistics import learnt_boxes


@dataclass(frozen=True, slots=True)
class Balance:
    """How often images are repeated.

    Attributes:
        repeat_threshold: images of a class that is on a smaller share of the images are repeated (`repeat_factors`);
            0: none are.
        background: share of an epoch's samples that have no box; None: as in the data set.
        class_weights: by the name of a class: how often an epoch takes its images, times the class's repeat factor; an
            image is taken as its most frequent class says.
        source_weights: of a merged data set: how often an epoch takes the images of each source, before the other
            settings are applied; empty: once.
    """

    repeat_threshold: float = 0.0
    background: float | None = None
    class_weights: Mapping[str, float] = field(default_factory=dict)
    source_weights: tuple[float, ...] = ()

    def repeats(self, index: DatasetIndex) -> np.ndarray | None:
        """How often an epoch takes each image on average, ``[I]`` float64; None: each once.

        Raises:
            DataError: ``background`` asks for images with boxes, or without, and there are none; or ``class_weights``
                names a class that there is not.
        """
        is_weighted = any(weight != 1 for weight in self.source_weights)
        if not self.repeat_threshold and self.background is None and not is_weighted and not self.class_weights:
            return None
        repeats = repeat_factors(index, self.repeat_threshold, self._weights_by_id(index))
        if is_weighted and index.sources is not None:
            repeats *= np.array(self.source_weights)[index.sources.of]
        if self.background is None:
            return repeats
        image_of, _ = learnt_boxes(index)
        is_background = np.bincount(image_of, minlength=len(index)) == 0
        if not is_background.any() and self.background > 0:
            raise DataError(
                f"{index.source}: data.balance.background={self.background:g} is a share of samples without boxes, and "
                "every image has some; set it to null"
            )
        objects = float(repeats[~is_background].sum())
        if is_background.any():
            wanted = objects * self.background / (1 - self.background)
            repeats[is_background] *= wanted / float(repeats[is_background].sum())
        return repeats

    def _weights_by_id(self, index: DatasetIndex) -> dict[int, float]:
        """Category id -> weight of the class."""
        names = [name for _, name in index.categories]
        unknown = next((name for name in self.class_weights if name not in names), None)
        if unknown is not None:
            near = difflib.get_close_matches(unknown, names, n=1)
            raise DataError(
                f"{index.source}: data.balance.class_weights: there is no class {shown(unknown)}"
                + (f"; did you mean {shown(near[0])}?" if near else f"; the classes are {few(names, 8)}")
            )
        return {category_id: self.class_weights.get(name, 1.0) for category_id, name in index.categories}


def repeat_factors(
    index: DatasetIndex, threshold: float, class_weights: Mapping[int, float] | None = None
) -> np.ndarray:
    """Repeat factors of images (Gupta, Dollár and Girshick 2019: LVIS).

    A class that is on the share ``f`` of the images has the factor ``max(1, sqrt(threshold / f))`` times its weight, an
    image the largest factor of its classes, and 1 where it has none.

    Args:
        index: the training set.
        threshold: share of the images, 0..1.
        class_weights: category id -> weight of the class; None: 1.

    Returns:
        ``[I]`` float64, above 0.
    """
    image_of, category_ids = learnt_boxes(index)
    factors = np.ones(len(index))
    if len(image_of):
        classes, class_of = np.unique(category_ids, return_inverse=True)
        pairs = np.unique(np.stack([class_of, image_of]), axis=1)
        shares = np.bincount(pairs[0], minlength=len(classes)) / len(index)
        weights = np.array([(class_weights or {}).get(category_id, 1.0) for category_id in classes.tolist()])
        of_classes = np.maximum(1, np.sqrt(threshold / shares)) * weights
        factors[pairs[1]] = 0
        np.maximum.at(factors, pairs[1], of_classes[pairs[0]])
    return factors


@dataclass(frozen=True, slots=True)
class Takings:
    """How many images and samples have a class, or are of a source.

    Attributes:
        name: of the class or source.
        images: number of such images.
        samples: number of such samples in an epoch, on average.
    """

    name: str
    images: int
    samples: float

    @property
    def factor(self) -> float:
        """How often such an image is taken, on average."""
        return self.samples / self.images


def takings(index: DatasetIndex, repeats: np.ndarray) -> list[Takings]:
    """`Takings` of each class that has a box to learn, the most repeated class first.

    Args:
        index: the training set.
        repeats: ``[I]``, see `Balance.repeats`.
    """
    image_of, category_ids = learnt_boxes(index)
    found = []
    for category_id, name in index.categories:
        rows = np.unique(image_of[category_ids == category_id])
        if len(rows):
            found.append(Takings(name, len(rows), float(repeats[rows].sum())))
    return sorted(found, key=lambda taken: (-taken.factor, taken.name))


def takings_of_sources(index: DatasetIndex, repeats: np.ndarray) -> list[Takings]:
    """`Takings` of each data set that a merged one is made of, in their order; none where it is one.

    Args:
        index: the training set.
        repeats: ``[I]``, see `Balance.repeats`.
    """
    if index.sources is None:
        return []
    of, names = index.sources.of, index.sources.names
    images, samples = (np.bincount(of, weights, len(names)) for weights in (None, repeats))
    rows = zip(names, images.tolist(), samples.tolist(), strict=True)
    return [Takings(name, count, samples) for name, count, samples in rows]
