"""The study: GRPO and NPO by a protocol that was fixed before anything was measured.

`tune` trains GRPO at each learning rate of a declared grid on the tuning seeds and picks the best by GRPO's own final
accuracy. `report` trains both arms at the given settings on the report seeds, paired by seed: a is GRPO's accuracy at
60 % of its budget (mean of three consecutive evaluations), and an arm has reached a at the first evaluation where the
mean of it and the two before reaches a. Final accuracy is the mean of the last three evaluations. Beside the main
line's steps stand trained steps (the scout's included) and generated tokens (scout's and guide's included; evaluation
is no training). Run it again and it goes on where it was.

    python -m tests.bench.study tune --store runs/study
    python -m tests.bench.study report --store runs/study -s learner.learning_rate=1e-4
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from npo_core.compare import AXES, accuracy_at, smoothed, steps_to_accuracy, target_accuracy
from npo_core.interfaces import NearFutureError
from tests.bench.intervals import Interval, bootstrap, bootstrap_mean
from tests.bench.output import arguments, markdown, write_json
from tests.bench.runs import Job, curves, run_all

CONFIGS = {"grpo": "deploy/configs/testbed-grpo.yaml", "npo": "deploy/configs/testbed-npo.yaml"}
LEARNING_RATES = ("3e-5", "1e-4", "3e-4")
TUNING_SEEDS = range(100, 105)
REPORT_SEEDS = range(5)
Curves = Mapping[int, pl.DataFrame]
"""Evaluations by seed."""


def final_accuracy(points: pl.DataFrame) -> float:
    """Mean of the last three evaluations.

    Raises:
        NearFutureError: there are fewer.
    """
    mean = smoothed(points)["mean"][-1]
    if mean is None:
        raise NearFutureError("a run has fewer than three evaluations; raise run.total_steps or lower evaluation.every")
    return float(mean)


def tuned(by_rate: Mapping[str, Curves]) -> dict[str, Any]:
    """GRPO's final accuracy by learning rate, and the rate that has the best mean."""
    finals = {rate: [final_accuracy(points) for points in seeds.values()] for rate, seeds in by_rate.items()}
    best = max(finals, key=lambda rate: float(np.mean(finals[rate])))
    return {
        "learning_rate": best,
        "final_accuracy": {rate: {"seeds": values, "mean": bootstrap_mean(values)} for rate, values in finals.items()},
    }


def reported(grpo: Curves, npo: Curves) -> dict[str, Any]:
    """The comparison of two arms, paired by seed."""
    pairs = [_pair(seed, grpo[seed], npo[seed]) for seed in grpo]
    finals = {arm: [pair["final"][arm] for pair in pairs] for arm in ("grpo", "npo")}
    return {
        "pairs": pairs,
        "speedup": {axis: _mean_ratio([pair["ratio"][axis] for pair in pairs]) for axis in AXES},
        "censored": [pair["seed"] for pair in pairs if pair["censored"]],
        "final_accuracy": {arm: bootstrap_mean(values) for arm, values in finals.items()},
        "final_difference": bootstrap_mean(np.subtract(finals["npo"], finals["grpo"])),
        "equal_cost": {axis: _equal_cost(grpo, npo, column) for axis, column in AXES.items()},
    }


def _pair(seed: int, grpo: pl.DataFrame, npo: pl.DataFrame) -> dict[str, Any]:
    """One seed. A censored run counts as if it had reached the target at its end: its ratio is an upper bound."""
    target = target_accuracy(grpo)
    if target is None:
        raise NearFutureError("60 % of the budget holds fewer than three evaluations; raise run.total_steps")
    first, other = steps_to_accuracy("grpo", grpo, target), steps_to_accuracy("npo", npo, target)
    cost: dict[str, dict[str, int]] = {"grpo": {}, "npo": {}}
    for axis, column in AXES.items():
        cost["grpo"][axis] = getattr(first, axis)
        reached = getattr(other, axis)
        cost["npo"][axis] = int(npo[column][-1]) if reached is None else reached
    return {
        "seed": seed,
        "target": target,
        "censored": other.main_steps is None,
        "cost": cost,
        "ratio": {axis: cost["grpo"][axis] / cost["npo"][axis] for axis in AXES},
        "final": {"grpo": final_accuracy(grpo), "npo": final_accuracy(npo)},
    }


def _mean_ratio(ratios: Sequence[float]) -> Interval:
    """Geometric mean, which treats a ratio and its inverse alike; bootstrap over seeds."""
    logs = np.log(ratios)
    return bootstrap(lambda seeds: float(np.exp(logs[seeds].mean())), len(logs))


def _equal_cost(grpo: Curves, npo: Curves, column: str) -> list[dict[str, Any]]:
    """Accuracy of both at what GRPO had cost at each of its evaluations, mean over seeds. No entry where a run has
    ended before that cost."""
    rows = []
    for n, step in enumerate(next(iter(grpo.values()))["step"]):
        costs = {seed: points[column][n] for seed, points in grpo.items()}
        # None, a run that has ended before that cost, becomes NaN.
        own_S, other_S = (
            np.array([accuracy_at(arm[seed], column, cost) for seed, cost in costs.items()], dtype=np.float64)
            for arm in (grpo, npo)
        )
        if np.isfinite(own_S).all() and np.isfinite(other_S).all():
            rows.append(
                {
                    "grpo_step": step,
                    "cost": float(np.mean(list(costs.values()))),
                    "grpo": float(own_S.mean()),
                    "npo": float(other_S.mean()),
                    "difference": bootstrap_mean(other_S - own_S),
                }
            )
    return rows


def show_tuned(result: dict[str, Any]) -> str:
    """The tuning for people."""
    rows = [(rate, len(found["seeds"]), found["mean"]) for rate, found in result["final_accuracy"].items()]
    table = markdown(("learning rate", "seeds", "GRPO's final accuracy [95 %]"), rows)
    return f"{table}\n\nLearning rate for every method: {result['learning_rate']}"


def show_reported(result: dict[str, Any]) -> str:
    """The report for people."""
    seeds = [
        (
            f"{p['seed']}{' (censored)' if p['censored'] else ''}",
            p["target"],
            *(f"{p['cost']['grpo'][axis]:,} / {p['cost']['npo'][axis]:,} = {p['ratio'][axis]:.2f}" for axis in AXES),
            p["final"]["grpo"],
            p["final"]["npo"],
        )
        for p in result["pairs"]
    ]
    names = [axis.replace("_", " ") for axis in AXES]
    per_seed = markdown(
        ("seed", "target", *(f"{n}, GRPO / NPO" for n in names), "final GRPO", "final NPO"),
        [*seeds, ("**all**", None, *result["speedup"].values(), *result["final_accuracy"].values())],
    )
    tables = [
        f"Accuracy at equal {axis.replace('_', ' ')}\n\n"
        + markdown(
            ("GRPO's step", axis.replace("_", " "), "GRPO", "NPO", "difference [95 %]"),
            [(r["grpo_step"], f"{r['cost']:,.0f}", r["grpo"], r["npo"], r["difference"]) for r in rows],
        )
        for axis, rows in result["equal_cost"].items()
    ]
    censored = result["censored"]
    note = (
        f"Seeds {censored} of NPO never reached the target (censored): counted as reached at their end, so that the "
        "ratios are upper bounds."
        if censored
        else "No run was censored."
    )
    return "\n\n".join(
        [
            "Cost of reaching GRPO's accuracy at 60 % of its budget; means of ratios are geometric, with a 95 % "
            "bootstrap interval over seeds",
            per_seed,
            f"{note} Final accuracy, NPO − GRPO, paired: {result['final_difference']}.",
            *tables,
        ]
    )


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = arguments(None)
    shared.add_argument("--store", default="runs/study", help="directory of the runs")
    shared.add_argument("--parallel", type=int, default=2, help="runs at a time, each on one thread")
    shared.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="override in every arm")
    tune = commands.add_parser("tune", parents=[shared], conflict_handler="resolve", help="GRPO over the grid")
    tune.add_argument("--seeds", type=int, nargs="+", default=[*TUNING_SEEDS])
    report = commands.add_parser("report", parents=[shared], conflict_handler="resolve", help="GRPO against NPO")
    report.add_argument("--seeds", type=int, nargs="+", default=[*REPORT_SEEDS])
    report.add_argument("--npo", action="append", default=[], metavar="KEY=VALUE", help="override in the NPO arm only")
    args = parser.parse_args()

    store, overrides = f"file://{Path(args.store).resolve()}", tuple(args.set)
    if args.command == "tune":
        jobs = [
            Job(f"grpo-lr{rate}", CONFIGS["grpo"], (*overrides, f"learner.learning_rate={rate}"), seed)
            for rate in LEARNING_RATES
            for seed in args.seeds
        ]
        run_all(jobs, store, args.parallel)
        found = curves(jobs, store)
        result = tuned({rate: found[f"grpo-lr{rate}"] for rate in LEARNING_RATES})
        print(show_tuned(result))
    else:
        arms = {"grpo": overrides, "npo": (*overrides, *args.npo)}
        jobs = [Job(arm, CONFIGS[arm], sets, seed) for seed in args.seeds for arm, sets in arms.items()]
        run_all(jobs, store, args.parallel)
        result = reported(**curves(jobs, store))
        print(show_reported(result))
    write_json(args.json, {"overrides": overrides, "jobs": [job.name for job in jobs], **result})


if __name__ == "__main__":
    try:
        main()
    except NearFutureError as error:
        sys.exit(f"study: {error}")
