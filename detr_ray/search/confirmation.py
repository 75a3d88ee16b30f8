"""Whether the best configuration of a search is better than the default one, or was only lucky.

Both are trained several times with new seeds. The test is an exact permutation test: of all divisions of the results
into two groups of these sizes, it counts those whose means differ at least as much as the observed ones.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from detr_ray.search.trials import Mode

SIGNIFICANT = 0.05

MOST_SPLITS = 2_000_000
"""Largest number of divisions that are counted."""

MOST_SEEDS = 11
"""Largest number of seeds for each of the two configurations: with more there are more than `MOST_SPLITS`."""


@dataclass(frozen=True, slots=True)
class Confirmation:
    """The comparison of two samples of final metrics.

    Attributes:
        best: metrics of the best configuration, one a seed.
        default: metrics of the default configuration, one a seed.
        p_value: share of all divisions of the results whose means differ at least as much; two-sided.
        smallest_p_value: the smallest that these numbers of seeds can give.
        mode: whether a larger or a smaller metric is better.
    """

    best: tuple[float, ...]
    default: tuple[float, ...]
    p_value: float
    smallest_p_value: float
    mode: Mode = "max"

    @property
    def difference(self) -> float:
        """Mean of the best configuration less that of the default one."""
        return statistics.fmean(self.best) - statistics.fmean(self.default)

    @property
    def is_better(self) -> bool:
        """Whether the best configuration is better by more than noise."""
        improved = self.difference > 0 if self.mode == "max" else self.difference < 0
        return improved and self.p_value < SIGNIFICANT

    def lines(self, metric: str = "val/AP") -> list[str]:
        """Lines with means, spreads, and the verdict.

        Args:
            metric: name of what was measured.
        """
        return [
            f"{metric} of the best configuration     {_spread(self.best)}",
            f"{metric} of the default configuration  {_spread(self.default)}",
            self.comparison,
            self.verdict,
        ]

    @property
    def comparison(self) -> str:
        """The difference of the means, and p."""
        return f"difference {self.difference:+.4f}, p = {self.p_value:.3g} (exact permutation test, two-sided)"

    @property
    def verdict(self) -> str:
        """One sentence, or two: whether the difference can be told from noise."""
        if self.smallest_p_value >= SIGNIFICANT:
            return f"The difference cannot be told from noise: {_too_few(self.smallest_p_value)}"
        if self.p_value >= SIGNIFICANT:
            return f"The difference cannot be told from noise (p is not below {SIGNIFICANT})."
        which = "better" if self.is_better else "worse"
        return f"The best configuration is {which} than the default one by more than noise (p is below {SIGNIFICANT})."


def compare(best: Sequence[float], default: Sequence[float], mode: Mode = "max") -> Confirmation:
    """Compares two samples.

    Args:
        best: final metrics of the best configuration, one a seed.
        default: those of the default configuration; their number may differ.
        mode: whether a larger or a smaller metric is better.

    Raises:
        ValueError: a sample is empty, a metric is not finite, or there are too many seeds to count all divisions.
    """
    if not best or not default:
        raise ValueError("both configurations need at least one result")
    if not all(map(math.isfinite, (*best, *default))):
        raise ValueError("a result is not a finite number")
    splits = math.comb(len(best) + len(default), len(best))
    if splits > MOST_SPLITS:
        raise ValueError(f"{len(best)} and {len(default)} seeds are too many: {splits} divisions would be compared")
    together = (*best, *default)
    total, count = math.fsum(together), len(best)

    def distance(group: Sequence[float]) -> float:
        inside = math.fsum(group)
        return abs(inside / count - (total - inside) / (len(together) - count))

    # Divisions with the same results in another order may differ by rounding.
    least = distance(best) * (1 - 1e-12) - 1e-15
    as_large = sum(distance(group) >= least for group in combinations(together, count))
    return Confirmation(
        tuple(best), tuple(default), as_large / splits, _smallest_p_value(len(best), len(default)), mode
    )


def reservation(seeds: int) -> str:
    """Why so few seeds for each configuration cannot tell a difference from noise; empty if they can."""
    least = _smallest_p_value(seeds, seeds)
    return "" if least < SIGNIFICANT else _too_few(least)


def fewest_seeds() -> int:
    """The smallest number of seeds for each configuration with which p can be below `SIGNIFICANT`."""
    seeds = 1
    while _smallest_p_value(seeds, seeds) >= SIGNIFICANT:
        seeds += 1
    return seeds


def _smallest_p_value(first: int, second: int) -> float:
    """The p of two samples that do not overlap. For equal sizes, the two samples exchanged differ as much."""
    return (2 if first == second else 1) / math.comb(first + second, first)


def _too_few(smallest_p_value: float) -> str:
    return (
        f"with so few seeds p is at least {smallest_p_value:.2g}, whatever the results. Reaching {SIGNIFICANT} takes "
        f"at least {fewest_seeds()} seeds each (--confirm {fewest_seeds()})."
    )


def _spread(sample: Sequence[float]) -> str:
    values = ", ".join(f"{value:.4f}" for value in sample)
    deviation = f" ± {statistics.stdev(sample):.4f}" if len(sample) > 1 else ""
    return f"{statistics.fmean(sample):.4f}{deviation} ({values})"
