"""The run configuration: one pydantic model a section, every field with its unit and bounds."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.config import JsonDict

from schemas.deepspeed import DeepSpeedSection
from schemas.future import AutoNPOSection, FutureSection
from schemas.section import Section

Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
CREDENTIALS = r"://(?!arn:)[^/@]*[:@]"
"""In a URL: a secret may itself hold a slash, so a colon in front of the first one says enough; an access point's ARN
holds some."""
WITHOUT_CREDENTIALS: JsonDict = {"pattern": rf"^(?!.*{CREDENTIALS})"}
"""For JSON schemas: Prefect's server refuses other values before it stores them."""


def without_credentials(url: str) -> str:
    """The URL of a store, which is written into records and shown to people.

    Raises:
        ValueError: it holds a user or a password.
    """
    if re.search(CREDENTIALS, url):
        raise ValueError(
            "the URL holds credentials; give them by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the AWS files"
        )
    return url


class RunSection(Section):
    """Who the run is, where it lives and how long it goes."""

    name: Slug
    """The run's identifier in its store: lower-case letters, digits, dot, dash, underscore."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of every random stream: data order, rollouts, guide, evaluation."""
    store: str = Field("file://./runs", json_schema_extra=WITHOUT_CREDENTIALS)
    """URL of the store that holds the run: `file://PATH` or `s3://BUCKET/PREFIX`. Credentials and the endpoint of a
    compatible store come from the environment (AWS_*), never from here."""
    single_writer: bool = False
    """Your word that no second process ever writes this run: only then is a store without conditional writes taken."""
    total_steps: int = Field(160, ge=1)
    """Optimizer steps of the main line. Not part of the run's identity: raise it to extend a finished run."""
    segment_steps: int = Field(10, ge=1)
    """Optimizer steps a segment: the unit of commit, retry and checkpointing."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Optional sinks of the metrics, beside the Parquet files, which stay the source."""
    tracker_dir: str = "./trackers"
    """Local directory for what the trackers write."""
    public_url: str | None = None
    """Address at which a browser reads what lies under `run.store`, `http(s)://…`: only with one do the artifacts in
    Prefect's UI show curves and link to the report. Without credentials: it is shown to people."""

    @field_validator("store")
    @classmethod
    def _no_credentials(cls, value: str) -> str:
        return without_credentials(value)

    @field_validator("public_url")
    @classmethod
    def _is_plain_address(cls, value: str | None) -> str | None:
        # The message leaves the value out, which may hold a secret.
        if value is not None and not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", value):
            raise ValueError(
                "it is no plain address; give http(s)://HOST/PATH without user, password, query and spaces"
            )
        return value


class ModelSection(Section):
    """The policy that training starts from."""

    path: str = "testbed"
    """`testbed` for the embedded model, or a local directory or hub name of a transformers causal language model."""
    start_from: str | None = None
    """`STORE/RUN` or `STORE/RUN@STEP`: take the weights of that checkpoint of a run's main line instead of `path`'s."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the weights in memory."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation that transformers loads."""

    @field_validator("start_from")
    @classmethod
    def _no_credentials(cls, value: str | None) -> str | None:
        return value if value is None else without_credentials(value)


class DataSection(Section):
    """The prompts, and the verifier that judges answers to them."""

    source: Literal["testbed"] = "testbed"
    """Where the prompts come from."""
    prompts: int = Field(512, ge=1)
    """Size of the training pool, in prompts."""
    held_out: int = Field(192, ge=1)
    """Size of the held-out set for evaluation, in prompts; disjoint from the pool."""
    min_length: int = Field(4, ge=1, le=12)
    """Shortest task input, in symbols (testbed)."""
    max_length: int = Field(12, ge=1, le=12)
    """Longest task input, in symbols (testbed)."""
    pool_seed: int = Field(0, ge=0)
    """Seed of the pool and the held-out set. Not `run.seed`, so that paired seeds share their prompts."""

    @model_validator(mode="after")
    def _lengths_are_ordered(self) -> DataSection:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length {self.min_length} exceeds max_length {self.max_length}; lower min_length")
        return self


class RolloutSection(Section):
    """How the policy samples its on-policy rollouts."""

    group_size: int = Field(8, ge=2)
    """Rollouts a prompt and step (n). A single one would have no group to be better than."""
    prompts_per_step: int = Field(32, ge=1)
    """Distinct prompts a step."""
    max_new_tokens: int = Field(14, ge=1)
    """Longest completion, in tokens, its end token included."""
    temperature: float = Field(1.0, gt=0, le=10)
    """Sampling temperature of rollouts, guide and evaluation; log-probabilities are those of this distribution."""
    max_rows: int = Field(1024, ge=1)
    """Most rows that are generated at once, but at least one prompt's: bounds the memory of the KV cache."""


class LearnerSection(Section):
    """The optimizer and the shape of an update."""

    engine: Literal["torch", "deepspeed"] = "torch"
    """`torch`: in the segment's process. `deepspeed`: in processes of its own, as the section `deepspeed` says."""
    learning_rate: float = Field(1e-4, gt=0, le=1)
    """AdamW's peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up; the learning rate is constant after them."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Largest global L2 norm of the gradient; it is scaled down to this."""
    updates_per_batch: int = Field(1, ge=1)
    """Optimizer updates on each step's batch (PPO epochs). With 1, the ratios of own rollouts are exactly 1."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Most padded tokens of one forward and backward pass. Does not change the result beyond rounding."""
    chunk_tokens: int = Field(1024, ge=1)
    """Tokens whose logits exist at one time."""
    chunk_vocab: int = Field(4096, ge=1)
    """Vocabulary entries whose logits exist at one time."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    threads: int = Field(1, ge=1)
    """CPU threads of torch. Bit-identity after a resume holds for one number of threads."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`."""


class AlgorithmSection(Section):
    """GRPO's objective, and NPO's mixing of guide trajectories into hard groups."""

    method: Literal["grpo", "npo", "autonpo"] = "grpo"
    """`grpo` trains on-policy; `npo` runs the interventions of `future.interventions`; `autonpo` decides by itself when
    to roll back, and how far."""
    advantage_scale: Literal["group-std", "none"] = "group-std"
    """`group-std` divides the centred rewards by the group's unbiased std (GRPO); `none` does not (Dr.GRPO)."""
    advantage_eps: float = Field(1e-6, ge=0)
    """Added to the group's std."""
    aggregation: Literal["seq-mean-token-mean", "token-mean", "seq-sum-norm"] = "seq-mean-token-mean"
    """How token losses are averaged: GRPO, DAPO, Dr.GRPO (sum over tokens divided by `max_new_tokens`)."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """ε_low: ratios are clipped below 1 − ε_low."""
    clip_high: float = Field(0.2, ge=0)
    """ε_high: ratios are clipped above 1 + ε_high."""
    kl_beta: float = Field(0.0, ge=0)
    """β, weight of the k3 estimate of the KL to the starting policy; 0 switches the reference forward off."""
    gate: float = Field(0.6, ge=0, le=1)
    """τ_gate: a group takes a guide trajectory if its group accuracy is at most this (inclusive)."""
    slot: Literal["last", "failed"] = "last"
    """Which slot of a hard group the guide trajectory takes: the last (the paper) or the last failed one."""
    guide_slots: int = Field(1, ge=1)
    """Most slots of a hard group that guide trajectories take, each its own one: 1 is the paper."""
    guide_correction: Literal["none", "exact", "truncated", "shaped"] = "none"
    """Importance correction of the guide slot."""
    truncation_cap: float = Field(2.0, gt=0)
    """c of `truncated`: largest detached importance weight."""
    shaping_gamma: float = Field(0.1, gt=0)
    """γ of `shaped`: f(ρ) = ρ/(ρ+γ)."""


class EvaluationSection(Section):
    """Held-out evaluation by sampling: pass@1 averaged over samples."""

    every: int = Field(10, ge=0)
    """Steps between evaluations of the main line, a multiple of `run.segment_steps`; 0 evaluates its ends only."""
    samples: int = Field(4, ge=1)
    """Answers a held-out prompt."""


class VllmSection(Section):
    """vLLM, in an environment and a process of its own, in place of transformers. Not part of the run's identity: what
    computed an artifact is in its environment."""

    samples: tuple[Literal["guide", "evaluation"], ...] = ()
    """What vLLM samples: answers of the guide, of the evaluation. All else is sampled by transformers, in process:
    rollouts too, whose policy changes every step."""
    python: str = ".venv-vllm/bin/python"
    """Interpreter of vLLM's environment, which `make setup-vllm` makes. Relative to the working directory."""
    url: str | None = None
    """Address of a `vllm serve` of yours, `http(s)://HOST:PORT`, instead of a process of ours. It cannot be given
    another checkpoint: it serves the one that is asked for, or the stage fails."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of vLLM's weights; by default `model.dtype`."""
    max_model_len: int | None = Field(None, ge=1)
    """Longest prompt and completion together, in tokens; by default the model's own limit, which takes memory."""
    gpu_memory_utilization: float = Field(0.3, gt=0, le=1)
    """Share of the GPU's memory that vLLM takes beside the trainer."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that share the model."""
    enforce_eager: bool = True
    """No CUDA graphs: slower to sample, faster to start."""
    tolerance: float | None = Field(None, gt=0)
    """Largest mean difference of the engine's log-probabilities from the trainer's, in nats a token, on a probe after
    each load; by default 1e-4 where both compute in float32, else 0.05."""

    @field_validator("url")
    @classmethod
    def _no_credentials(cls, value: str | None) -> str | None:
        return value if value is None else without_credentials(value)


class RetentionSection(Section):
    """What `npo gc` keeps beside what a run still needs. Not part of the run's identity."""

    keep_last: int = Field(2, ge=1)
    """Newest checkpoints that stay of every leg."""
    keep_every: int = Field(0, ge=0)
    """Main-line checkpoints at multiples of this many steps stay; 0: none for this reason."""
    grace_hours: float = Field(24.0, ge=0, le=1e6)
    """Files that belong to nothing and are younger than this stay, for somebody may be about to commit them. Those of
    the last five minutes stay in any case."""


NOT_RECIPE = {
    "model": ("attention",),
    "rollout": ("max_rows",),
    "learner": (
        "engine",
        "threads",
        "device",
        "micro_batch_tokens",
        "chunk_tokens",
        "chunk_vocab",
        "gradient_checkpointing",
    ),
    "autonpo": ("executes",),
}
"""How the work is cut to fit a machine, which changes results by rounding only and may have to change in mid-run; and
who acts, which changes none."""


class Config(Section):
    """A run's whole configuration, as `npo run` reads it from YAML."""

    run: RunSection
    """Who the run is."""
    model: ModelSection = ModelSection()
    """What is trained."""
    data: DataSection = DataSection()
    """On which prompts."""
    rollout: RolloutSection = RolloutSection()
    """How rollouts are sampled."""
    learner: LearnerSection = LearnerSection()
    """How the weights are updated."""
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    """By how many processes."""
    algorithm: AlgorithmSection = AlgorithmSection()
    """By which objective."""
    future: FutureSection = FutureSection()
    """With which guides."""
    autonpo: AutoNPOSection = AutoNPOSection()
    """Rolling back by itself."""
    evaluation: EvaluationSection = EvaluationSection()
    """And how it is judged."""
    retention: RetentionSection = RetentionSection()
    """And what stays of it."""
    vllm: VllmSection = VllmSection()
    """What samples instead of transformers."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        every, segment = self.evaluation.every, self.run.segment_steps
        if every % segment:
            raise ValueError(
                f"evaluation.every {every} is not a multiple of run.segment_steps {segment}; only a segment's end has "
                "a checkpoint to evaluate"
            )
        if self.rollout.prompts_per_step > self.data.prompts:
            raise ValueError(
                f"rollout.prompts_per_step {self.rollout.prompts_per_step} exceeds data.prompts {self.data.prompts}; "
                "a step's prompts are distinct"
            )
        if self.algorithm.method == "npo" and not self.future.interventions:
            raise ValueError("algorithm.method npo needs at least one entry in future.interventions")
        method = self.algorithm.method
        if method != "npo" and self.future.interventions:
            raise ValueError(
                f"algorithm.method {method} takes no scheduled interventions, but future.interventions is not empty; "
                "set algorithm.method to npo or remove the interventions"
            )
        if method == "autonpo" and self.autonpo.lookback < segment:
            raise ValueError(
                f"autonpo.lookback {self.autonpo.lookback} is shorter than run.segment_steps {segment}: there would "
                "never be a checkpoint to roll back to; raise autonpo.lookback or lower run.segment_steps"
            )
        if self.algorithm.guide_slots >= self.rollout.group_size:
            raise ValueError(
                f"algorithm.guide_slots {self.algorithm.guide_slots} leaves no rollout of the policy in a group of "
                f"rollout.group_size {self.rollout.group_size}; lower algorithm.guide_slots"
            )
        if self.algorithm.guide_slots > self.future.k:
            raise ValueError(
                f"algorithm.guide_slots {self.algorithm.guide_slots} exceeds future.k {self.future.k}, the answers "
                "that a guide samples; raise future.k or lower algorithm.guide_slots"
            )
        scout_prompts = self.future.scout.prompts_per_step
        if scout_prompts is not None and scout_prompts > self.rollout.prompts_per_step:
            raise ValueError(
                f"future.scout.prompts_per_step {scout_prompts} exceeds rollout.prompts_per_step "
                f"{self.rollout.prompts_per_step}; a scout sees a part of each batch"
            )
        if self.learner.engine == "deepspeed":
            self._require_deepspeed_can()
        for intervention in self.future.interventions:
            if intervention.stop > self.run.total_steps:
                raise ValueError(
                    f"the window [{intervention.start}, {intervention.stop}) ends after run.total_steps "
                    f"{self.run.total_steps}; raise run.total_steps or shorten the window"
                )
        return self

    def _require_deepspeed_can(self) -> None:
        if self.model.dtype == "float64":
            raise ValueError("model.dtype float64 is not DeepSpeed's; use float32, or learner.engine torch")
        if self.model.dtype == "bfloat16" and self.deepspeed.zero_stage == 0:
            raise ValueError(
                "deepspeed.zero_stage 0 with model.dtype bfloat16 is not supported: its float32 weights could not be "
                "saved; use zero_stage 1 to 3, or float32"
            )
        if ":" in self.learner.device:
            raise ValueError(
                f"learner.device {self.learner.device} names one GPU, but each rank of learner.engine deepspeed takes "
                "its own; use cuda, and CUDA_VISIBLE_DEVICES to choose"
            )

    def scout(self) -> Config:
        """The configuration of the future leg: this one under `future.scout`'s overrides."""
        scout = self.future.scout
        rollout = {"group_size": scout.group_size, "prompts_per_step": scout.prompts_per_step}
        learner = {"learning_rate": scout.learning_rate}
        return self.model_copy(
            update={
                "rollout": self.rollout.model_copy(update={k: v for k, v in rollout.items() if v is not None}),
                "learner": self.learner.model_copy(update={k: v for k, v in learner.items() if v is not None}),
            }
        )

    def recipe(self) -> dict[str, Any]:
        """What the user asked to be computed, without where, how long, how observed, and on how many threads.

        Two configurations with equal recipes may continue each other's run.
        """
        recipe = self.model_dump(mode="json", exclude={"evaluation", "retention", "vllm", "deepspeed"})
        recipe["run"] = {"seed": self.run.seed}
        for section, fields in NOT_RECIPE.items():
            for field in fields:
                del recipe[section][field]
        return recipe
