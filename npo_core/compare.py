"""Runs side by side: held-out accuracy at equal main-line steps, equal trained steps and equal generated tokens.

Main-line steps alone flatter a method that looks ahead, so every table stands beside those that charge it for the
scouts and guides that its steps depended on; what the whole run spent, discarded steps included, stands below them.
Between two evaluations a run has the accuracy of the earlier one: nothing is interpolated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from npo_core import views
from npo_core.artifacts import RunArtifacts
from npo_core.interfaces import NearFutureError

AXES = {"main_steps": "step", "trained_steps": "trained_steps", "total_tokens": "total_tokens"}
"""What is held equal, and the column of `views.evaluations` that measures it."""

BUDGET_SHARE = 0.6
"""The target is what the first run reaches at this share of its own main-line steps."""
SMOOTHING = 3
"""Evaluations whose mean must reach the target."""


@dataclass(frozen=True)
class Reached:
    """When a run reached the target accuracy; None in every field but `run` if it never did (censored)."""

    run: str
    main_steps: int | None
    trained_steps: int | None
    total_tokens: int | None


def compare(runs: Sequence[RunArtifacts]) -> dict[str, Any]:
    """Held-out accuracy of several runs at equal cost, and what each needed to reach the first run's target.

    Returns:
        `rows` [{axis, at, run, accuracy}]: for each axis of `AXES`, at every cost where one of the runs was evaluated;
        `accuracy` is None beyond a run's end. `target`, None if the first run has fewer than three evaluations.
        `steps_to_accuracy` [{run, main_steps, trained_steps, total_tokens, speedup{axis: ratio}}]: the cost at the
        first evaluation at which the mean of it and the two before it reaches the target; the ratio is the first run's
        cost over the run's. `spent` [{run, trained_steps, policy, guide, discarded}]: the whole run's steps, and its
        generated tokens by what became of them.

    Raises:
        NearFutureError: a run has no evaluation of its main line, two have the same name, or prompts or verifier
            differ.
    """
    _require_same_questions(runs)
    curves = {run.uri: curve(run) for run in runs}
    if len(curves) < len(runs):
        raise NearFutureError("the same run is named twice; name each run once")
    names = list(curves)
    rows = [
        {"axis": axis, "at": at, "run": name, "accuracy": accuracy_at(curves[name], column, at)}
        for axis, column in AXES.items()
        for at in _grid(list(curves.values()), column)
        for name in names
    ]
    target = target_accuracy(curves[names[0]])
    spent = [spending(run) for run in runs]
    if target is None:
        return {"rows": rows, "target": None, "steps_to_accuracy": [], "spent": spent}
    reached = [steps_to_accuracy(name, curves[name], target) for name in names]
    return {
        "rows": rows,
        "target": target,
        "steps_to_accuracy": [{**asdict(r), "speedup": _speedup(asdict(reached[0]), asdict(r))} for r in reached],
        "spent": spent,
    }


def _require_same_questions(runs: Sequence[RunArtifacts]) -> None:
    first, *others = [run.record() for run in runs]
    for other in others:
        for what, one, two in (
            ("prompts", first.prompts_digest[:12], other.prompts_digest[:12]),
            ("verifier", first.verifier, other.verifier),
        ):
            if one != two:
                raise NearFutureError(
                    f"runs {first.run_id} and {other.run_id} have other {what} ({one}, {two}): their accuracies cannot "
                    "be compared; compare runs of one data section"
                )


def spending(run: RunArtifacts) -> dict[str, Any]:
    """What the whole run took: `run`, `trained_steps` of all legs, and the tokens `policy`, `guide`, `discarded`."""
    steps = sum(s.stop - s.start for done in views.segments(run).values() for s in done)
    return {"run": run.uri, "trained_steps": steps, **views.show(run)["tokens"]}


def curve(run: RunArtifacts) -> pl.DataFrame:
    """The main line's evaluations by step: `step`, `trained_steps`, `total_tokens`, `accuracy`.

    Raises:
        NearFutureError: there is none.
    """
    found = views.evaluations(run, views.steps(run)).filter("main_line").sort("step")
    if found.is_empty():
        raise NearFutureError(
            f"run {run.uri} has no evaluation of its main line; set evaluation.every and run it again"
        )
    return found.select("step", "trained_steps", "total_tokens", "accuracy")


def accuracy_at(points: pl.DataFrame, column: str, at: int) -> float | None:
    """Accuracy at the last evaluation that cost at most `at`; None if the run ended before, or had not begun."""
    if at > points[column].max():  # type: ignore[operator]
        return None
    before = points.filter(pl.col(column) <= at)
    return None if before.is_empty() else float(before["accuracy"][-1])


def smoothed(points: pl.DataFrame) -> pl.DataFrame:
    """The curve with `mean`: of each evaluation and the two before it (null for the first two)."""
    return points.with_columns(mean=pl.col("accuracy").rolling_mean(SMOOTHING))


def target_accuracy(points: pl.DataFrame) -> float | None:
    """The smoothed accuracy of a run at `BUDGET_SHARE` of its main-line steps; None if it is not defined there."""
    budget = BUDGET_SHARE * float(points["step"][-1])
    at = smoothed(points).filter(pl.col("step") <= budget)
    return None if at.is_empty() else at["mean"][-1]


def steps_to_accuracy(name: str, points: pl.DataFrame, target: float) -> Reached:
    """The cost at the first evaluation whose smoothed accuracy reaches `target`."""
    # Rolling sums round: a run must reach its own target.
    found = smoothed(points).filter(pl.col("mean") >= target - 1e-12)
    if found.is_empty():
        return Reached(name, None, None, None)
    first = found.row(0, named=True)
    return Reached(name, first["step"], first["trained_steps"], first["total_tokens"])


def _grid(curves: Sequence[pl.DataFrame], column: str) -> list[int]:
    return sorted({int(cost) for points in curves for cost in points[column]})


def _speedup(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float | None]:
    return {axis: first[axis] / other[axis] if first[axis] and other[axis] else None for axis in AXES}
