"""What AutoNPO remembers, measures and decides, as it is written down."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, NamedTuple

from pydantic import Field

from schemas.future import Executor
from schemas.records import CheckpointRef, Record


class Mistake(NamedTuple):
    """A prompt that the policy failed."""

    prompt_id: str
    step: int
    """When, in steps of the main line."""
    accuracy: float
    """Its group accuracy p̂ then, before any replacement."""


class Observation(NamedTuple):
    """What AutoNPO saw of one step. A metric that was not finite is None, and leaves its average as it was."""

    step: int
    reward: float | None
    """Mean reward of the on-policy rollouts, before any replacement."""
    entropy: float | None
    """Exact token entropy of the sampling distribution, mean over the tokens of the on-policy rollouts, in nats."""
    reward_ema: float | None
    """None until a first finite value."""
    entropy_ema: float | None


class MonitorState(Record):
    """AutoNPO's state that is rewound on a rollback: part of every checkpoint."""

    observations: tuple[Observation, ...] = ()
    """The last steps, by step: as many as the trigger looks back."""
    pool: tuple[Mistake, ...] = ()
    """The mistake pool B, by step and prompt."""


class Estimate(Record):
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Candidate(Record):
    """What the probe says of one distance Δ. The probe's prompts are drawn from bands of the pool, one a candidate;
    estimates over B_Δ weight the bands by their sizes, and their intervals resample prompts within bands."""

    lookahead: int = Field(ge=1)
    """Δ, in steps."""
    parent: CheckpointRef
    """The saved checkpoint π(t−Δ)."""
    pool: int = Field(ge=0)
    """Distinct prompts in B_Δ, the mistakes of the last Δ steps."""
    prompts: int = Field(ge=0)
    """Of these, how many the probe asked."""
    samples: int = Field(ge=0)
    """Answers to them."""
    quality: Estimate | None = None
    """Q̂: share of B_Δ that π(t) answers correctly at least once in the probe's samples; None: none was asked."""
    pass_rate: Estimate | None = None
    """Share of correct answers, over the same."""
    kl_per_token: Estimate | None = None
    """KL(π(t) ‖ π(t−Δ)), sampled from π(t): mean over the tokens of all the probe's answers, nats."""
    relative_ess: Estimate | None = None
    """Relative effective sample size of the weights π(t−Δ)/π(t) of the probe's answers, as whole sequences."""
    variance: dict[str, Estimate] = Field(default_factory=dict)
    """V̂ ≥ 1 by estimator (`autonpo.variance`)."""
    signal: dict[str, Estimate] = Field(default_factory=dict)
    """Ŝ = Q̂/V̂ by estimator."""
    baseline: Estimate | None = None
    """Q̂ of π(t−Δ) itself on the same prompts, sampled afresh: prompts selected for failure regress to the mean, and
    only what exceeds this did the future add. Measured for the distance that was chosen."""


class DecisionCode(StrEnum):
    """Why AutoNPO intervened, or did not."""

    REPLAYING = "replaying"
    TOO_EARLY = "too-early"
    COOLDOWN = "cooldown"
    BUDGET_SPENT = "budget-spent"
    TOO_SHORT = "too-short"
    NOT_FINITE = "not-finite"
    REWARD_RISES = "reward-rises"
    TREND_RISES = "trend-rises"
    ENTROPY_HOLDS = "entropy-holds"
    WARNING = "warning"
    POOL_TOO_SMALL = "pool-too-small"
    NO_CHECKPOINT = "no-checkpoint"
    LOW_QUALITY = "low-quality"
    INTERVENE = "intervene"

    @property
    def warned(self) -> bool:
        """Whether there was a warning: such decisions are committed, the others are what the stored metrics say."""
        return self in (self.POOL_TOO_SMALL, self.NO_CHECKPOINT, self.LOW_QUALITY, self.INTERVENE)


class DecisionRecord(Record):
    """`decisions/…json`: why training does, or does not, roll back. Committed before anything acts."""

    leg_id: str
    """Leg that the decision is about."""
    step: int = Field(ge=0)
    """Its step when the decision fell."""
    intervene: bool
    reason: str
    """In words."""
    source: Literal["schedule", "autonpo"]
    """`schedule`: asked for by the configuration or a user; `autonpo`: the controller."""
    start: int | None = Field(None, ge=0)
    """Step that the replay starts from."""
    lookahead: int | None = Field(None, ge=1)
    """Δ, in steps."""
    window: int | None = Field(None, ge=1)
    """W, in steps."""
    parent: CheckpointRef | None = None
    """Checkpoint of the main line that training rolls back to."""
    guide_id: str | None = None
    """Guide to be mixed in, where it is known when the decision falls: one leg and step may have several."""
    code: DecisionCode | None = None
    """`autonpo` only, as is all that follows but the clock: the reason as a word."""
    clock: int | None = Field(None, ge=0)
    """Trained steps of the run's main lines when the decision fell, abandoned ones included: it never goes back."""
    numbers: dict[str, float] = Field(default_factory=dict)
    """What the trigger read, by name."""
    guide: CheckpointRef | None = None
    """The guide policy: today's, π(t)."""
    mistakes: tuple[Mistake, ...] = ()
    """B_Δ: the prompts to be replayed with the guide's answers, frozen here."""
    candidates: tuple[Candidate, ...] = ()
    """All distances, nearest first."""
    variance: str | None = None
    """The estimator of V that chose."""
    tokens_probe: int = Field(0, ge=0)
    """Completion tokens that the probe sampled."""
    created_at: str


class Request(Record):
    """`requests/…json`: one of the ways to see a warning asks whoever executes for an intervention."""

    leg_id: str
    """Leg that warns, or waits for a rollback that was decided."""
    step: int = Field(ge=0)
    """Its step."""
    by: Executor
    """Who asks."""
    reason: str
    """In words: the warning's, or the decision's."""
    created_at: str
    """UTC, ISO 8601."""
