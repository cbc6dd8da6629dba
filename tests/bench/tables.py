"""The study's results as markdown tables for people. Intervals are 95 % bootstrap intervals over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from npo_core.compare import AXES
from tests.bench.intervals import bootstrap_mean
from tests.bench.output import markdown
from tests.bench.paired import differences
from tests.bench.runs import END_STEPS, Ending

ROWS = 12
"""Most rows of a table of accuracies at equal cost; the JSON has all."""
WORDS = {axis: axis.replace("_", " ") for axis in AXES}


def tuning(result: Mapping[str, Any]) -> str:
    """GRPO over the grid of learning rates."""
    rows = [(rate, len(found["seeds"]), found["mean"]) for rate, found in result["final_accuracy"].items()]
    table = markdown(("learning rate", "seeds", "GRPO's final accuracy [95 %]"), rows)
    return f"{table}\n\nLearning rate for every method: {result['learning_rate']}"


def summary(result: Mapping[str, Any]) -> str:
    """One row an arm: where it ended, and what the baseline's target cost it."""
    baseline, seeds, arms, references = (result[name] for name in ("baseline", "seeds", "arms", "references"))
    columns = (
        "arm",
        "final accuracy",
        *(f"− {name}, paired" for name in references),
        *(f"{WORDS[axis]} to target" for axis in AXES),
        *(f"{WORDS[axis]}, {baseline} / arm" for axis in AXES),
        "censored",
    )
    rows = [
        (
            arm,
            found["final_accuracy"],
            *(found["difference"].get(name) for name in references),
            *(f"{'≥ ' if found['censored'] else ''}{found['mean_cost'][axis]:,.0f}" for axis in AXES),
            *(None if arm == baseline else _ratio(found, axis) for axis in AXES),
            f"{len(found['censored'])} of {len(seeds)}",
        )
        for arm, found in arms.items()
    ]
    return (
        f"{markdown(columns, rows)}\n\n"
        f"Seeds: {', '.join(map(str, seeds))}. Final accuracy: mean of the last three evaluations. "
        f"Target: {baseline}'s accuracy at 60 % of its budget, mean of three evaluations, seed by seed. Costs are "
        "means over seeds, scouts and guides that the policy depended on included; ratios are geometric means of the "
        "seeds' ratios. A run that never reached the target (censored) counts as reached at its end: costs with ≥ are "
        "lower bounds, ratios with ≤ upper ones. In brackets 95 % bootstrap intervals over seeds."
    )


def by_seed(result: Mapping[str, Any], arm: str) -> str:
    """One arm beside the baseline, seed by seed."""
    baseline = result["baseline"]
    first, other = result["arms"][baseline], result["arms"][arm]
    rows = []
    for n, seed in enumerate(result["seeds"]):
        costs = [(first["cost"][axis][n], other["cost"][axis][n]) for axis in AXES]
        rows.append(
            (
                f"{seed}{' (censored)' if seed in other['censored'] else ''}",
                result["targets"][seed],
                *(f"{own:,} / {its:,} = {own / its:.2f}" for own, its in costs),
                first["final"][n],
                other["final"][n],
            )
        )
    columns = (
        "seed",
        "target",
        *(f"{words}, {baseline} / {arm}" for words in WORDS.values()),
        f"final {baseline}",
        f"final {arm}",
    )
    return f"Cost of the target, seed by seed\n\n{markdown(columns, rows)}"


def at_equal_cost(found: Mapping[str, Sequence[Mapping[str, Any]]], along: str, how: str) -> str:
    """Accuracies at equal cost, a table an axis.

    Args:
        found: result of `paired.equal_cost`.
        along: the arm whose evaluations make the rows.
        how: which accuracy.
    """
    parts = []
    for axis, every in found.items():
        rows = [every[n] for n in sorted({round(n) for n in np.linspace(0, len(every) - 1, min(ROWS, len(every)))})]
        others = list(dict.fromkeys(name for row in rows for name in row["difference"]))
        columns = (f"{along}'s step", WORDS[axis], along, *(f"{arm} (− {along})" for arm in others))
        cells = [
            (
                row["step"],
                f"{row['cost']:,.0f}",
                row["accuracy"][along],
                *(_beside(row, arm) for arm in others),
            )
            for row in rows
        ]
        parts.append(
            f"Accuracy at equal {WORDS[axis]}: {how}; a dash where a run has ended\n\n{markdown(columns, cells)}"
        )
    return "\n\n".join(parts)


def endings(result: Mapping[str, Any], ended: Mapping[str, Mapping[int, Ending]]) -> str:
    """One row an arm: how its runs ended, and what they took in all."""
    arms, references = result["arms"], result["references"]
    columns = (
        "arm",
        "final accuracy",
        *(f"− {name}, paired" for name in references),
        "entropy at the end",
        "main-line steps",
        "trained steps",
        "tokens",
        "interventions",
    )
    rows = [
        (
            arm,
            found["final_accuracy"],
            *(found["difference"].get(name) for name in references),
            bootstrap_mean([end.entropy for end in ended[arm].values()]),
            *(
                f"{np.mean([getattr(end, field) for end in ended[arm].values()]):,.0f}"
                for field in ("main_steps", "trained_steps", "total_tokens")
            ),
            ", ".join(str(end.interventions) for end in ended[arm].values()),
        )
        for arm, found in arms.items()
    ]
    return (
        f"{markdown(columns, rows)}\n\n"
        f"Seeds: {', '.join(map(str, result['seeds']))}. Final accuracy: mean of the last three evaluations. "
        f"Entropy: nats a token of "
        f"the on-policy rollouts, mean of the last {END_STEPS} main-line steps. Trained steps and tokens: means of "
        "whole runs, scouts, guides, probes and abandoned steps included. Interventions: rollbacks, seed by seed. In "
        "brackets 95 % bootstrap intervals over seeds."
    )


def families(ended: Mapping[str, Mapping[int, Ending]], baseline: str) -> str:
    """Final accuracy by task family."""
    names = sorted(next(iter(ended[baseline].values())).families)
    others = [arm for arm in ended if arm != baseline]
    rows = []
    for name in names:
        by_arm = {arm: [end.families[name] for end in seeds.values()] for arm, seeds in ended.items()}
        cells = [f"{np.mean(by_arm[arm]):.3f} ({differences(by_arm, arm, [baseline])[baseline]})" for arm in others]
        rows.append((name, float(np.mean(by_arm[baseline])), *cells))
    columns = ("family", baseline, *(f"{arm} (− {baseline})" for arm in others))
    return (
        "Final accuracy by task family: mean over seeds of the last three evaluations; in parentheses the paired "
        f"difference\n\n{markdown(columns, rows)}"
    )


def _ratio(found: Mapping[str, Any], axis: str) -> str:
    return f"{'≤ ' if found['censored'] else ''}{found['ratio'][axis]}"


def _beside(row: Mapping[str, Any], arm: str) -> str | None:
    return f"{row['accuracy'][arm]:.3f} ({row['difference'][arm]})" if arm in row["difference"] else None
