"""Statistics of several arms, paired by seed with the first, the baseline.

The target is the baseline's accuracy at 60 % of its budget (mean of three consecutive evaluations), seed by seed; an
arm has reached it at the first evaluation where the mean of it and the two before reaches it. A run that never does is
censored: it counts as if it had reached the target at its end, which makes its cost too small and its ratio too large.
Final accuracy is the mean of the last three evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from npo_core.compare import AXES, accuracy_at, smoothed, steps_to_accuracy, target_accuracy
from npo_core.interfaces import NearFutureError
from tests.bench.intervals import Interval, bootstrap, bootstrap_mean

Curves = Mapping[int, pl.DataFrame]
"""Evaluations of one arm by seed."""
FEW = "a run has fewer than three evaluations; raise run.total_steps or lower evaluation.every"


def final_accuracy(points: pl.DataFrame) -> float:
    """Mean of the last three evaluations.

    Raises:
        NearFutureError: there are fewer.
    """
    mean = smoothed(points)["mean"][-1]
    if mean is None:
        raise NearFutureError(FEW)
    return float(mean)


def tuned(by_rate: Mapping[str, Curves]) -> dict[str, Any]:
    """GRPO's final accuracy by learning rate, and the rate that has the best mean."""
    finals = {rate: [final_accuracy(points) for points in seeds.values()] for rate, seeds in by_rate.items()}
    best = max(finals, key=lambda rate: float(np.mean(finals[rate])))
    return {
        "learning_rate": best,
        "final_accuracy": {rate: {"seeds": values, "mean": bootstrap_mean(values)} for rate, values in finals.items()},
    }


def compared(arms: Mapping[str, Curves], references: Sequence[str]) -> dict[str, Any]:
    """What the target cost each arm, and where each ended.

    Args:
        arms: the baseline first.
        references: the arms that final accuracies are compared with.

    Returns:
        `seeds`, `baseline`, `references`, `targets` by seed, and by arm in `arms`: `cost` {axis: [by seed]},
        `censored` (seeds), `mean_cost` {axis: mean over seeds}, `ratio` {axis: baseline's cost over the arm's,
        geometric mean}, `final` [by seed], `final_accuracy`, and `difference` {reference: paired}.
    """
    baseline, *_ = arms
    seeds = list(arms[baseline])
    targets = {seed: _target(arms[baseline][seed]) for seed in seeds}
    finals = {arm: [final_accuracy(curves[seed]) for seed in seeds] for arm, curves in arms.items()}
    costs = {arm: [_cost(curves[seed], targets[seed]) for seed in seeds] for arm, curves in arms.items()}

    def entry(arm: str) -> dict[str, Any]:
        cost = {axis: [own[axis] for own, _ in costs[arm]] for axis in AXES}
        return {
            "cost": cost,
            "censored": [seed for seed, (_, reached) in zip(seeds, costs[arm], strict=True) if not reached],
            "mean_cost": {axis: float(np.mean(values)) for axis, values in cost.items()},
            "ratio": {axis: _mean_ratio([first[axis] for first, _ in costs[baseline]], cost[axis]) for axis in AXES},
            "final": finals[arm],
            "final_accuracy": bootstrap_mean(finals[arm]),
            "difference": differences(finals, arm, references),
        }

    return {
        "seeds": seeds,
        "baseline": baseline,
        "references": list(references),
        "targets": targets,
        "arms": {arm: entry(arm) for arm in arms},
    }


def differences(by_arm: Mapping[str, Sequence[float]], arm: str, references: Sequence[str]) -> dict[str, Interval]:
    """An arm's values by seed minus those of every other reference, paired by seed."""
    return {name: bootstrap_mean(np.subtract(by_arm[arm], by_arm[name])) for name in references if name != arm}


def equal_cost(arms: Mapping[str, Curves], along: str) -> dict[str, list[dict[str, Any]]]:
    """By axis, accuracies at what the arm `along` had cost at each evaluation that all its seeds have: `step` and mean
    `cost` of that arm, `accuracy` by arm (mean over seeds) and `difference` by arm (minus `along`, paired). An arm is
    not in a row where one of its runs has ended before that cost; a row with `along` alone is left out."""
    return {axis: list(_equal_cost(arms, along, column)) for axis, column in AXES.items()}


def _equal_cost(arms: Mapping[str, Curves], along: str, column: str) -> list[dict[str, Any]]:
    rows = []
    own = arms[along]
    for n in range(min(points.height for points in own.values())):
        costs = {seed: points[column][n] for seed, points in own.items()}
        # None, a run that has ended before that cost, becomes NaN.
        at = {
            arm: np.array([accuracy_at(curves[seed], column, cost) for seed, cost in costs.items()], dtype=np.float64)
            for arm, curves in arms.items()
        }
        whole = {arm: values_S for arm, values_S in at.items() if np.isfinite(values_S).all()}
        if along in whole and len(whole) > 1:
            rows.append(
                {
                    "step": next(iter(own.values()))["step"][n],
                    "cost": float(np.mean(list(costs.values()))),
                    "accuracy": {arm: float(values_S.mean()) for arm, values_S in whole.items()},
                    "difference": {
                        arm: bootstrap_mean(values_S - whole[along]) for arm, values_S in whole.items() if arm != along
                    },
                }
            )
    return rows


def steadied(curves: Curves) -> Curves:
    """The curves with each accuracy averaged with the two evaluations before it; the first two drop out."""
    return {
        seed: smoothed(points).drop_nulls("mean").with_columns(accuracy="mean").drop("mean")
        for seed, points in curves.items()
    }


def _target(points: pl.DataFrame) -> float:
    target = target_accuracy(points)
    if target is None:
        raise NearFutureError("60 % of the budget holds fewer than three evaluations; raise run.total_steps")
    return target


def _cost(points: pl.DataFrame, target: float) -> tuple[dict[str, int], bool]:
    """Cost of the target by axis, and whether it was reached."""
    reached = steps_to_accuracy("", points, target)
    if reached.main_steps is None:
        return {axis: int(points[column][-1]) for axis, column in AXES.items()}, False
    return {axis: getattr(reached, axis) for axis in AXES}, True


def _mean_ratio(costs: Sequence[float], others: Sequence[float]) -> Interval:
    """Geometric mean of costs over others, which treats a ratio and its inverse alike; bootstrap over seeds."""
    logs = np.log(np.divide(costs, others))
    return bootstrap(lambda seeds: float(np.exp(logs[seeds].mean())), len(logs))
