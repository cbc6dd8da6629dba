"""Coverage of a scout: which share of its prompt groups it solves at least once, and whether that still grows. A guide
can only answer what the future leg has learned to solve, so a scout that stopped covering more has done its work."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean


def has_stopped_growing(solved: Sequence[float], patience: int, min_gain: float) -> bool:
    """Whether coverage rose by less than `min_gain` over the last `patience` steps.

    Coverage at a step is the mean over the `patience` steps up to it, so twice as many steps are needed for a verdict;
    before that it counts as growing.

    Args:
        solved: share of solved groups, a step each, the newest last.
        patience: at least 1.
        min_gain: smallest rise that counts as growth.
    """
    if len(solved) < 2 * patience:
        return False
    return fmean(solved[-patience:]) < fmean(solved[-2 * patience : -patience]) + min_gain
