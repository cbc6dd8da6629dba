"""95 % intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 % for 1, 2, … degrees of freedom; with more, the last is on the safe side."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(statistic: Callable[[np.ndarray], float], units: int) -> Interval:
    """Percentile bootstrap: `statistic` of the indices of all `units`, and of units drawn with replacement."""
    rng = np.random.default_rng(0)
    drawn = [statistic(indices) for indices in rng.integers(units, size=(DRAWS, units))]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(statistic(np.arange(units))), float(low), float(high))


def bootstrap_mean(values: Sequence[float] | np.ndarray) -> Interval:
    """Bootstrap of a mean."""
    array = np.array(values)
    return bootstrap(lambda indices: float(array[indices].mean()), len(array))


def paired_t(differences: Sequence[float]) -> Interval:
    """Student's interval of the mean of paired differences.

    Raises:
        ValueError: there are fewer than two.
    """
    if len(differences) < 2:
        raise ValueError("an interval needs at least two seeds")
    array = np.array(differences)
    half = T_975[min(len(array) - 1, len(T_975)) - 1] * array.std(ddof=1) / np.sqrt(len(array))
    return Interval(float(array.mean()), float(array.mean() - half), float(array.mean() + half))
