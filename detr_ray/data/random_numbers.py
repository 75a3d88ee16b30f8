"""Random numbers in [0, 1), and what is drawn with them.

They come from the raw 64-bit words of PCG64, which numpy keeps the same in all versions.
"""

from __future__ import annotations

import numpy as np


def uniform(words: np.ndarray) -> np.ndarray:
    """Random 64-bit words as numbers in [0, 1), of 53 bits each."""
    return (words >> np.uint64(11)) * 2.0**-53


def seed_from(number: float) -> int:
    """A number in [0, 1) as the seed of `numbers_of`."""
    return int(number * 2.0**53)


def numbers_of(seed: int, count: int) -> np.ndarray:
    """The first ``[count]`` numbers in [0, 1) of a seed."""
    return uniform(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count))


def below(counts: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Whole numbers 0..counts-1."""
    return np.minimum((numbers * counts).astype(np.int64), counts - 1)


def choice(values: tuple[int, ...], numbers: np.ndarray) -> np.ndarray:
    """Chooses one of the values for each number; all are equally likely."""
    return np.array(values, dtype=np.int64)[below(np.array(len(values)), numbers)]


def between(bounds: tuple[float, float], numbers: np.ndarray) -> np.ndarray:
    """Numbers from the lower to the upper bound."""
    return bounds[0] + (bounds[1] - bounds[0]) * numbers
