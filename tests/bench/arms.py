"""The arms of each study: what is compared. An arm is a configuration under overrides; the first is the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from npo_core.interfaces import NearFutureError

CONFIGS = {method: f"deploy/configs/testbed-{method}.yaml" for method in ("grpo", "npo", "autonpo")}
CONFIGS |= {f"shapes-{method}": f"deploy/configs/shapes-{method}.yaml" for method in ("grpo", "npo")}
LEARNING_RATES = ("3e-5", "1e-4", "3e-4")
TUNING_SEEDS = range(100, 105)
REPORT_SEEDS = range(5)


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    """As tables call it."""
    method: str
    """Key of `CONFIGS`."""
    overrides: tuple[str, ...] = ()

    def under(self, *overrides: str) -> Arm:
        """The arm with further overrides, which win over its own."""
        return replace(self, overrides=(*self.overrides, *overrides))


def changed(arms: Sequence[Arm], everywhere: Sequence[str], somewhere: Sequence[tuple[str, str]]) -> list[Arm]:
    """The arms under overrides from outside.

    Args:
        everywhere: overrides in every arm.
        somewhere: (arm, override), in that arm only.

    Raises:
        NearFutureError: an arm is not known.
    """
    names = [arm.name for arm in arms]
    if unknown := sorted({name for name, _ in somewhere} - set(names)):
        raise NearFutureError(f"no arm {unknown[0]!r}; the arms are {', '.join(map(repr, names))}")
    return [arm.under(*everywhere, *(text for name, text in somewhere if name == arm.name)) for arm in arms]


GRPO = Arm("GRPO", "grpo")
NPO = Arm("NPO", "npo")
"""Early, as its configuration has it: Δ = 160, window 120."""

TUNING = tuple(replace(GRPO, name=rate).under(f"learner.learning_rate={rate}") for rate in LEARNING_RATES)

REPORT = (GRPO, NPO)

ABLATION = (
    GRPO,
    NPO,
    Arm("correction exact", "npo", ("algorithm.guide_correction=exact",)),
    Arm("correction truncated", "npo", ("algorithm.guide_correction=truncated",)),
    Arm("gate 0", "npo", ("algorithm.gate=0",)),
    Arm("gate 0.3", "npo", ("algorithm.gate=0.3",)),
    Arm("gate 1", "npo", ("algorithm.gate=1",)),
    Arm("2 guide slots", "npo", ("algorithm.guide_slots=2",)),
)
"""One factor changed at a time; NPO itself has correction none, gate 0.6 and one slot."""

NARROW, FEW = "future.scout.group_size=4", "future.scout.prompts_per_step=4"
FAST, STOPS = "future.scout.learning_rate=6e-4", ("future.scout.patience=20", "future.scout.min_gain=0.02")
TERSE = "future.k=2"
LEAN = (NARROW, TERSE, "future.interventions=[{start: 0, lookahead: 80, window: 60}]")
"""Half the rollouts, half the distance, half the window and a quarter of the guide's answers."""

FUTURES = (
    GRPO,
    NPO,
    Arm("source leg", "npo", ("future.source=leg",)),
    Arm("source both", "npo", ("future.source=both",)),
    Arm("scout of 4 rollouts a prompt", "npo", (NARROW,)),
    Arm("scout of 4 prompts a step", "npo", (FEW,)),
    Arm("scout at twice the learning rate", "npo", (FAST,)),
    Arm("scout that stops", "npo", STOPS),
    Arm("lean", "npo", LEAN),
    Arm("lean, 4 prompts a step", "npo", (*LEAN, FEW)),
    Arm("lean, twice the learning rate", "npo", (*LEAN, FAST)),
)
"""Ways to make the future cheaper; NPO itself samples its guide from the checkpoint, and its scout is as wide and as
fast as the main line. The source leg needs a Δ of more than an epoch, 64 steps: it has only what came later."""

LONG = ("run.total_steps=480", "run.segment_steps=10", "evaluation.every=10")
"""A regime that is long enough for GRPO to reach its plateau."""
K = "future.k=32"
"""As many answers a prompt as AutoNPO's guides give: what is still failed at a plateau is seldom solved."""
EARLY, LATE_STAGE = "{start: 0, lookahead: 160, window: 120}", "{start: 280, lookahead: 80}"

LATE = (
    GRPO.under(*LONG),
    Arm("NPO early", "npo", (*LONG, K, f"future.interventions=[{EARLY}]")),
    Arm("NPO early + late", "npo", (*LONG, K, f"future.interventions=[{EARLY}, {LATE_STAGE}]")),
    Arm("AutoNPO", "autonpo", LONG),
)
LONGER = "GRPO, longer"
"""GRPO for as many steps as the last arm trained in all, seed by seed."""
