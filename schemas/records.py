"""Records of a run: what each JSON file of the store says. Every one is small, frozen and versioned."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1

LegKind = Literal["warm", "scout", "main", "replay"]
MAIN_LINE_KINDS: tuple[LegKind, ...] = ("warm", "main", "replay")


class Record(BaseModel):
    """Base of every record: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    schema_version: int = SCHEMA_VERSION
    """Version of the record's fields."""


class CheckpointRef(Record):
    """Names one committed checkpoint."""

    leg_id: str
    """Leg that saved it."""
    step: int = Field(ge=0)
    """Optimizer steps of the main line that it has behind it."""
    digest: str
    """SHA-256 over weights, optimizer and state (`CheckpointManifest.digest`)."""


class RunRecord(Record):
    """`run.json`: the frozen recipe, and digests of everything that it refers to by name."""

    run_id: str
    """The run's name."""
    recipe: dict[str, Any]
    """`Config.recipe()` as it was when the run began."""
    config: dict[str, Any] = {}
    """The whole configuration as first used: a stage that runs again takes from it what the recipe leaves out."""
    model_digest: str
    """SHA-256 of the starting weights and of the model's configuration."""
    tokenizer_digest: str
    """SHA-256 of the tokenizer and its chat template."""
    prompts_digest: str
    """SHA-256 of the prompts, training and held-out."""
    verifier: str
    """Identifier and version of the verifier, `name/version`."""
    recipe_digest: str
    """SHA-256 of `recipe` without `future` and `algorithm.method` (they shape the tree of legs, not a leg) and of the
    four digests above: what a leg's identity depends on."""
    created_at: str
    """UTC, ISO 8601."""


class Head(Record):
    """`head.json`: which leg the main line is in. It moves by compare-and-swap."""

    leg_id: str
    """Tip of the main line."""
    epoch: int = Field(ge=0)
    """Grows by 1 with each move; a segment of the main line commits only under the epoch that it began in."""


class LegRecord(Record):
    """`leg.json`: a contiguous stretch of optimizer steps that starts from one checkpoint."""

    leg_id: str
    """Short digest of the recipe, the parent's digest, kind, start and guide."""
    kind: LegKind
    """`warm` is the starting policy, `scout` a future leg, `main` on-policy training, `replay` with a guide."""
    parent: CheckpointRef | None
    """Checkpoint that it starts from; none for `warm`."""
    start: int = Field(ge=0)
    """Its first step."""
    guide_id: str | None = None
    """Guide whose trajectories are mixed in (`replay` only)."""
    recipe_digest: str
    """`RunRecord.recipe_digest`."""
    created_at: str
    """UTC, ISO 8601."""


class FileEntry(Record):
    """One data file of an artifact."""

    role: str
    """What it is: `rollouts`, `metrics`, `telemetry`, `weights`, `optimizer`, `state`, `trajectories`, `samples`,
    `monitor`, `signal`."""
    name: str
    """Its name where a reader expects one, say `model.safetensors`."""
    key: str
    """Its key, relative to the run's root. Has the content's hash in it."""
    bytes: int = Field(ge=0)
    """Its size."""
    sha256: str
    """SHA-256 of its bytes."""
    rows: int | None = Field(None, ge=0)
    """Rows of a Parquet file."""


class Manifest(Record):
    """Commits an artifact: written last, created only if absent. What no manifest names does not exist."""

    kind: str
    """Kind of artifact; fixed by each subclass."""
    files: tuple[FileEntry, ...]
    """Every data file."""
    nonce: str
    """Random, one a writer: tells our own commit whose reply was lost from another writer's."""
    created_at: str
    """UTC, ISO 8601."""
    environment: dict[str, str] = {}
    """Versions, device and thread count of the writer. A change is shown, not refused."""

    def file(self, role: str) -> FileEntry:
        """The one file with this role.

        Raises:
            KeyError: there is none, or more than one.
        """
        found = [entry for entry in self.files if entry.role == role]
        if len(found) != 1:
            raise KeyError(f"{len(found)} files with role {role!r} in a {self.kind} manifest")
        return found[0]


class CheckpointManifest(Manifest):
    """A checkpoint: weights, optimizer and state after `step` steps."""

    kind: Literal["checkpoint"] = "checkpoint"
    leg_id: str
    step: int = Field(ge=0)
    digest: str
    """SHA-256 over (role, name, sha256) of every file, sorted: the checkpoint's identity."""
    weights_digest: str
    """The same over the weights alone: which policy this is."""

    @property
    def ref(self) -> CheckpointRef:
        """The reference that other records hold."""
        return CheckpointRef(leg_id=self.leg_id, step=self.step, digest=self.digest)


class SegmentManifest(Manifest):
    """Steps [start, stop) of a leg: rollouts, metrics and telemetry, and the checkpoint after them."""

    kind: Literal["segment"] = "segment"
    leg_id: str
    start: int = Field(ge=0)
    stop: int = Field(ge=1)
    """First step after the segment."""
    checkpoint: CheckpointRef
    """Checkpoint at `stop`, committed before this manifest."""
    logical_digest: str
    """SHA-256 of the rollouts and metrics as sorted rows: equal for equal training, whatever the file encoding."""
    tokens_policy: int = Field(ge=0)
    """Completion tokens that the policy sampled."""


class GuideSpec(Record):
    """The inputs of a guide. Its digest is the `guide_id`, so the same guide asked for twice is found."""

    checkpoint: CheckpointRef
    """The guide policy π(t+Δ)."""
    weights_digest: str
    """Its weights."""
    start: int = Field(ge=0)
    """First step of the window that the guide serves (t)."""
    stop: int = Field(ge=1)
    """First step after the window (t+W)."""
    prompt_ids: tuple[str, ...]
    """Distinct prompts of the window, sorted."""
    k: int = Field(ge=1)
    """Answers sampled a prompt."""
    temperature: float
    max_new_tokens: int
    seed: int
    tokenizer_digest: str
    verifier: str
    source: Literal["checkpoint", "leg", "both"] = "checkpoint"
    """`checkpoint`: sampled from the guide policy; `leg`: rollouts of the steps that led to it; `both`: these, and what
    they leave open is sampled."""
    answers: int = Field(1, ge=1)
    """Most trajectories kept a prompt."""


class GuideManifest(Manifest):
    """A guide: at most `spec.answers` verified-correct trajectories a prompt (role `trajectories`)."""

    kind: Literal["guide"] = "guide"
    guide_id: str
    spec: GuideSpec
    solved: int = Field(ge=0)
    """Prompts for which at least one trajectory is stored."""
    tokens_guide: int = Field(ge=0)
    """Completion tokens that the guide sampled, wrong answers included."""


class TaskScore(Record):
    """Held-out result of one task family."""

    prompts: int = Field(ge=0)
    samples: int = Field(ge=0)
    correct: int = Field(ge=0)

    @property
    def accuracy(self) -> float:
        """pass@1 averaged over samples."""
        return self.correct / self.samples if self.samples else 0.0


class EvalManifest(Manifest):
    """An evaluation of one checkpoint on the held-out prompts (role `samples`)."""

    kind: Literal["eval"] = "eval"
    eval_id: str
    checkpoint: CheckpointRef
    samples_per_prompt: int = Field(ge=1)
    accuracy: float = Field(ge=0, le=1)
    """pass@1 averaged over samples, over all prompts."""
    tasks: dict[str, TaskScore]
    """By task family."""
    entropy: float
    """Mean token entropy of the sampling distribution, in nats."""
    tokens: int = Field(ge=0)
    """Completion tokens sampled; not counted as training compute."""


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
    variance: dict[str, Estimate] = {}
    """V̂ ≥ 1 by estimator (`autonpo.variance`)."""
    signal: dict[str, Estimate] = {}
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
    numbers: dict[str, float] = {}
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


class SignalSpec(Record):
    """The inputs of a study of Q, V and S on a run. Its digest is the `signal_id`."""

    points: tuple[tuple[CheckpointRef, CheckpointRef], ...]
    """(π(t), π(t+Δ)) of every point."""
    prompts: int = Field(ge=1)
    """Training prompts drawn at each step t."""
    samples: int = Field(ge=1)
    """Answers a prompt and policy."""
    mistake_threshold: float
    kappa: float
    seed: int


class SignalManifest(Manifest):
    """Q(Δ), V(Δ) and S(Δ) over a grid of steps and distances (role `signal`)."""

    kind: Literal["signal"] = "signal"
    signal_id: str
    spec: SignalSpec
    tokens: int = Field(ge=0)
    """Completion tokens sampled; not counted as training compute."""
