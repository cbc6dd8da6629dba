"""False alarms of AutoNPO's warning, offline: its controller run again over finished runs of GRPO, which nothing rolled
back.

A run still improves at step t if its held-out accuracy, mean of the evaluations in (t, t + 60], exceeds that in
(t − 60, t] by more than 0.02; a warning at such a step is false. In a run's last 60 steps that cannot be known, and
what falls there is not judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from npo_core.artifacts import RunArtifacts
from npo_core.config_file import load_config
from npo_core.explain import moments
from schemas.future import AutoNPOSection
from tests.bench.arms import CONFIGS
from tests.bench.output import markdown

HORIZON = 60
"""Steps before and after t."""
RISE = 0.02
"""Rise of the held-out accuracy above which a run still improves."""


@dataclass(frozen=True)
class Trigger:
    """Settings of the warning."""

    name: str
    overrides: tuple[str, ...] = ()
    averages_only: bool = False
    """Whether the two averages decide alone, as in the paper, without the trend."""

    def warns(self, seen: Mapping[str, float], settings: AutoNPOSection) -> bool:
        """Whether what the controller reads is a warning under these settings."""
        stalled = seen["reward_gain"] < settings.min_gain and seen["entropy_gain"] < 0
        return stalled and (self.averages_only or seen["trend_bound"] < settings.min_gain)


TRIGGERS = (
    Trigger("the paper's averages alone", ("autonpo.trend_steps=8",), averages_only=True),
    Trigger("trend of 8 steps, z 0", ("autonpo.trend_steps=8", "autonpo.trend_z=0")),
    *(
        Trigger(f"trend of {steps} steps, z {z}", (f"autonpo.trend_steps={steps}", f"autonpo.trend_z={z}"))
        for steps in (40, 60, 80, 120)
        for z in ("0", "0.25", "0.5")
    ),
)


def looks(run: RunArtifacts, trigger: Trigger) -> dict[int, bool]:
    """Whether the trigger warns, at each step where it can: the end of a segment that has enough steps behind it."""
    settings = load_config(CONFIGS["autonpo"], trigger.overrides).autonpo
    read = {moment.step: moment.check(settings).numbers for moment in moments(run, settings)}
    return {step: trigger.warns(seen, settings) for step, seen in read.items() if "reward_gain" in seen}


def still_improves(points: pl.DataFrame, step: int) -> bool | None:
    """Whether a run does at a step, by its evaluations; None if it ends too soon to know, or has none before."""
    after = points.filter(pl.col("step").is_between(step, step + HORIZON, closed="right"))["accuracy"].mean()
    before = points.filter(pl.col("step").is_between(step - HORIZON, step, closed="right"))["accuracy"].mean()
    if step + HORIZON > int(points["step"][-1]) or after is None or before is None:
        return None
    return float(after) - float(before) > RISE  # type: ignore[arg-type]


def judged(warned: Mapping[int, Mapping[int, bool]], curves: Mapping[int, pl.DataFrame]) -> dict[str, Any]:
    """What a trigger's warnings were worth.

    Args:
        warned: by seed and step, whether it warns.
        curves: evaluations by seed.

    Returns:
        `runs`, `alarmed` (with a warning), `first` (mean step of the first; None without one), `first_false` (runs, of
        `known`: those that do not warn, or whose first warning is judged), `false` and `judged` (warnings), `improving`
        and `looks` (judged ones, with a warning or without).
    """
    improves = {(seed, at): still_improves(curves[seed], at) for seed, steps in warned.items() for at in steps}
    fired = {seed: [at for at, warns in sorted(steps.items()) if warns] for seed, steps in warned.items()}
    firsts = {seed: steps[0] for seed, steps in fired.items() if steps}
    of_first = [improves[key] for key in firsts.items()]
    of_all = [improves[seed, at] for seed, steps in fired.items() for at in steps]
    return {
        "runs": len(warned),
        "alarmed": len(firsts),
        "first": float(np.mean(list(firsts.values()))) if firsts else None,
        "first_false": of_first.count(True),
        "known": len(warned) - of_first.count(None),
        "false": of_all.count(True),
        "judged": len(of_all) - of_all.count(None),
        "improving": sum(verdict is True for verdict in improves.values()),
        "looks": sum(verdict is not None for verdict in improves.values()),
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a trigger."""
    columns = (
        "trigger",
        "runs that warn",
        "mean step of the first warning",
        "runs whose first warning is false",
        "warnings that are false",
        "looks at which the run still improves",
    )
    rows = [
        (
            name,
            f"{row['alarmed']} of {row['runs']}",
            None if row["first"] is None else f"{row['first']:.0f}",
            _share(row["first_false"], row["known"]),
            _share(row["false"], row["judged"]),
            _share(row["improving"], row["looks"]),
        )
        for name, row in found.items()
    ]
    return (
        f"{markdown(columns, rows)}\n\n"
        f"A warning at step t is false if the held-out accuracy in (t, t + {HORIZON}] is more than {RISE} above that "
        f"in (t − {HORIZON}, t], means of evaluations. A trigger looks at the end of each segment that has "
        f"enough steps behind it; what falls in a run's last {HORIZON} steps is not judged, nor counted in the last "
        "three columns. The last column is the share of false warnings that a trigger which warns at random would have."
    )


def _share(part: int, whole: int) -> str | None:
    return f"{part} of {whole} ({part / whole:.0%})" if whole else None
