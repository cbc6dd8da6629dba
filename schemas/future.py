"""The sections of the configuration that speak of the future: scheduled interventions, the scout, and AutoNPO."""

from __future__ import annotations

import itertools
from typing import Literal

from pydantic import Field, field_validator

from schemas.section import Section


class Intervention(Section):
    """One manual intervention (paper, section 3.2): scout ahead of `start`, then replay from `start`."""

    start: int = Field(0, ge=0)
    """Main-line step that training rolls back to: 0 is early-stage bootstrapping, a plateau's start the late stage."""
    lookahead: int = Field(80, ge=1)
    """Δ: steps that the scout trains ahead of `start`."""
    window: int | None = Field(None, ge=1)
    """W: steps that the guide serves from `start` on; by default Δ."""

    @property
    def stop(self) -> int:
        """First step after the window."""
        return self.start + (self.window if self.window is not None else self.lookahead)


class ScoutSection(Section):
    """What the future leg does otherwise than the main line, to be cheaper. Empty fields keep the main line's value."""

    group_size: int | None = Field(None, ge=2)
    """Rollouts a prompt and step."""
    prompts_per_step: int | None = Field(None, ge=1)
    """Prompts a step: the first of the main line's batch, so that scout and replay see the same ones."""
    learning_rate: float | None = Field(None, gt=0, le=1)
    """AdamW's peak learning rate."""
    patience: int = Field(0, ge=0)
    """Steps without growth of its coverage (share of groups that it solves at least once, mean of this many steps)
    after which the scout stops before Δ; 0: it never does."""
    min_gain: float = Field(0.02, ge=0, le=1)
    """Smallest rise of the coverage over `patience` steps that counts as growth."""


class FutureSection(Section):
    """The near future: when to look ahead, how far, and how the guide answers."""

    interventions: tuple[Intervention, ...] = ()
    """The interventions in the order of their start; their windows must not overlap."""
    k: int = Field(8, ge=1)
    """K: answers that the guide samples for each distinct prompt of the window; `algorithm.guide_slots` correct ones
    are kept at most."""
    source: Literal["checkpoint", "leg", "both"] = "checkpoint"
    """Where guide trajectories come from: `checkpoint` samples them from the guide policy (the paper); `leg` reuses
    the verified-correct rollouts of the steps that led to it, for no further token; `both` samples what `leg` leaves
    open."""
    scout: ScoutSection = ScoutSection()
    """Overrides for the future leg."""

    @field_validator("interventions")
    @classmethod
    def _windows_are_disjoint(cls, value: tuple[Intervention, ...]) -> tuple[Intervention, ...]:
        for before, after in itertools.pairwise(value):
            if after.start < before.stop:
                raise ValueError(
                    f"the intervention at step {after.start} starts inside the window [{before.start}, {before.stop}) "
                    f"of the one before it; start it at {before.stop} or later"
                )
        return value


Variance = Literal["kl_token", "kl_sequence", "chi2"]
Executor = Literal["flow", "event", "watchdog"]
"""The ways to see a warning, of which one acts on it."""


class AutoNPOSection(Section):
    """AutoNPO (paper, section 3.3): when training rolls back by itself, and how far. Numbers of steps are optimizer
    steps; the defaults are ours."""

    ema_weight: float = Field(0.1, gt=0, le=1)
    """Weight of the newest step in the moving averages of reward and entropy."""
    patience: int = Field(20, ge=2)
    """Steps over which the reward EMA must not have risen by `min_gain`, and the entropy EMA must have fallen."""
    min_gain: float = Field(0.015, ge=0)
    """Smallest rise of the mean reward over `patience` steps that counts as progress."""
    trend_steps: int = Field(80, ge=8)
    """Steps whose rewards the trend is fitted to. A warning needs as many since the start, or since a rollback's
    start."""
    trend_z: float = Field(0.5, ge=0)
    """The trend's upper bound, in standard errors above its estimate, must be below `min_gain` over `patience` steps
    too: larger is surer that training has stalled, and later. 0 takes the estimate itself."""
    first_check: int = Field(30, ge=1)
    """Trained steps before the first check."""
    cooldown: int = Field(25, ge=0)
    """Trained steps after the end of a replay in which nothing is checked."""
    max_interventions: int = Field(3, ge=0)
    """Budget of interventions of a run."""
    mistake_threshold: float = Field(0.125, ge=0, lt=1)
    """A group whose accuracy is at most this is a mistake (inclusive). Not the gate."""
    lookback: int = Field(80, ge=1)
    """Steps that a mistake stays in the pool, and the farthest rollback."""
    pool_capacity: int = Field(4096, ge=1)
    """Most mistakes in the pool; the oldest leave first."""
    min_pool: int = Field(16, ge=1)
    """Distinct prompts that the mistakes of the last Δ steps must hold for Δ to be a candidate."""
    probe_prompts: int = Field(32, ge=1)
    """Most prompts of the pool that the probe asks."""
    probe_samples: int = Field(8, ge=1)
    """Answers that the probe samples a prompt."""
    min_quality: float = Field(0.25, ge=0, le=1)
    """Smallest Q̂ of a distance that training rolls back by."""
    variance: Variance = "kl_token"
    """Which estimate of V divides Q̂: `kl_token` exp(κ · mean KL a token) (the paper), `kl_sequence` exp(κ · mean KL a
    sequence), `chi2` 1 + χ² of whole sequences, the inverse of the relative effective sample size."""
    kappa: float = Field(1.0, gt=0)
    """κ, scale of the KL in V̂. With long answers and `kl_sequence`, take about 10 / tokens an answer."""
    executes: Executor = "flow"
    """Who acts on a warning: `flow`, the flow that trains; `event`, the flow that the event `npo.lookahead.stagnation`
    triggers; `watchdog`, the scheduled flow of that name. The other two only file a request. Not part of the run's
    identity: the result is the same, and a run may change it."""
