"""Two rows of a table over the same seeds: what the one is above the other, a confidence interval and a paired test."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

CONFIDENCE = 0.95


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
        spread = statistics.stdev(both) if len(both) > 1 else 0.0
        if not spread:
            return cls(both) if both else None
        from scipy.stats import t

        error, freedom = spread / math.sqrt(len(both)), len(both) - 1
        p = 2 * float(t.sf(abs(statistics.fmean(both)) / error, freedom))
        return cls(both, error * float(t.ppf((1 + CONFIDENCE) / 2, freedom)), p)

    def text(self, scale: float = 100.0) -> str:
        """
        >>> Paired([0.012]).text(), Paired([0.01, 0.02], half_width=0.0635, p=0.2).text()
        ('+1.2', '+1.5 ± 6.3')
        """
        interval = "" if self.half_width is None else f" ± {scale * self.half_width:.1f}"
        return f"{scale * self.mean:+.1f}{interval}"
