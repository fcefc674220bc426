"""Confidence intervals, and two rows of a table over the same seeds: what the one is above the other, and a paired
test."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


def half_width(values: Sequence[float]) -> float | None:
    """Half of the confidence interval of the mean by Student's t; None where there is one value, or no spread.

    >>> round(half_width([1.0, 2.0, 3.0]), 2), half_width([1.0]), half_width([2.0, 2.0])
    (2.48, None, None)
    """
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    if not spread:
        return None
    from scipy.stats import t

    return spread / math.sqrt(len(values)) * float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share (95 % by default): it holds for few trials, and near 0 and 1.

    >>> [round(bound, 3) for bound in wilson(8, 10)], wilson(0, 0)
    ([0.49, 0.943], (0.0, 1.0))
    """
    if not trials:
        return 0.0, 1.0
    share, spread = successes / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = (spread * (share * (1 - share) + spread / 4)) ** 0.5 / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Paired:
    """Of n differences with the same seed; with one seed there is no interval and no test."""

    differences: list[float]
    half_width: float | None = None  # of the mean's confidence interval, by Student's t
    p: float | None = None  # of the paired t-test, two-sided

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences)

    @classmethod
    def of(cls, first: Mapping[int, float], second: Mapping[int, float]) -> Paired | None:
        """First minus second, for the seeds that both have; None where there is none.

        >>> found = Paired.of({0: 0.5, 1: 0.7, 2: 0.6}, {0: 0.4, 1: 0.5, 2: 0.5, 3: 0.9})
        >>> round(found.mean, 3), round(found.half_width, 3), round(found.p, 3)
        (0.133, 0.143, 0.057)
        """
        both = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
        half = half_width(both)
        if half is None:
            return cls(both) if both else None
        from scipy.stats import t

        error = statistics.stdev(both) / math.sqrt(len(both))
        return cls(both, half, 2 * float(t.sf(abs(statistics.fmean(both)) / error, len(both) - 1)))

    def text(self, scale: float = 100.0) -> str:
        """
        >>> Paired([0.012]).text(), Paired([0.01, 0.02], half_width=0.0635, p=0.2).text()
        ('+1.2', '+1.5 ± 6.3')
        """
        interval = "" if self.half_width is None else f" ± {scale * self.half_width:.1f}"
        return f"{scale * self.mean:+.1f}{interval}"
