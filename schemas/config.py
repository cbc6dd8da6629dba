"""The run configuration: one pydantic model a section, every field with its unit and bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from schemas.algorithm import AlgorithmSection
from schemas.data import DataSection
from schemas.deepspeed import DeepSpeedSection
from schemas.future import AutoNPOSection, FutureSection
from schemas.learner import LearnerSection
from schemas.model import ModelSection
from schemas.section import Section
from schemas.sharding import ShardingSection
from schemas.urls import WITHOUT_CREDENTIALS, plain_address, without_credentials
from schemas.verifier import VerifierSection
from schemas.vllm import VllmSection

Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


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
        return value if value is None else plain_address(value)


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


class EvaluationSection(Section):
    """Held-out evaluation by sampling: pass@1 averaged over samples, and pass@k."""

    every: int = Field(10, ge=0)
    """Steps between evaluations of the main line, a multiple of `run.segment_steps`; 0 evaluates its ends only."""
    samples: int = Field(4, ge=1)
    """Answers a held-out prompt (n); pass@k is estimated for k = 1, 2, 4, … up to it."""
    greedy: bool = False
    """Beside the samples one answer a prompt at temperature 0. An evaluation with it is another one than without."""


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
    "verifier": ("workers",),
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
    verifier: VerifierSection = VerifierSection()
    """What judges the answers."""
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
    sharding: ShardingSection = ShardingSection()
    """And in how many places at once."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        faults = list(self._disagreements())
        if faults:
            raise ValueError("\n  ".join(faults))
        return self

    def _disagreements(self) -> Iterator[str]:
        every, segment = self.evaluation.every, self.run.segment_steps
        if every % segment:
            yield (
                f"evaluation.every {every} is not a multiple of run.segment_steps {segment}; only a segment's end has "
                "a checkpoint to evaluate"
            )
        if self.rollout.prompts_per_step > self.data.prompts:
            yield (
                f"rollout.prompts_per_step {self.rollout.prompts_per_step} exceeds data.prompts {self.data.prompts}; "
                "a step's prompts are distinct"
            )
        if self.algorithm.method == "npo" and not self.future.interventions:
            yield ("algorithm.method npo needs at least one entry in future.interventions")
        method = self.algorithm.method
        if method != "npo" and self.future.interventions:
            yield (
                f"algorithm.method {method} takes no scheduled interventions, but future.interventions is not empty; "
                "set algorithm.method to npo or remove the interventions"
            )
        if method == "autonpo" and self.autonpo.lookback < segment:
            yield (
                f"autonpo.lookback {self.autonpo.lookback} is shorter than run.segment_steps {segment}: there would "
                "never be a checkpoint to roll back to; raise autonpo.lookback or lower run.segment_steps"
            )
        if self.algorithm.guide_slots >= self.rollout.group_size:
            yield (
                f"algorithm.guide_slots {self.algorithm.guide_slots} leaves no rollout of the policy in a group of "
                f"rollout.group_size {self.rollout.group_size}; lower algorithm.guide_slots"
            )
        if self.algorithm.guide_slots > self.future.k:
            yield (
                f"algorithm.guide_slots {self.algorithm.guide_slots} exceeds future.k {self.future.k}, the answers "
                "that a guide samples; raise future.k or lower algorithm.guide_slots"
            )
        scout_prompts = self.future.scout.prompts_per_step
        if scout_prompts is not None and scout_prompts > self.rollout.prompts_per_step:
            yield (
                f"future.scout.prompts_per_step {scout_prompts} exceeds rollout.prompts_per_step "
                f"{self.rollout.prompts_per_step}; a scout sees a part of each batch"
            )
        if self.learner.engine == "deepspeed":
            yield from self._beyond_deepspeed()
        if self.vllm.samples and self.vllm.url is None and (self.vllm.dtype or self.model.dtype) == "float64":
            yield (
                f"model.dtype float64 is none of vLLM's, and vllm.samples holds {', '.join(self.vllm.samples)}; set "
                "vllm.dtype to float32, or leave vllm.samples empty"
            )
        if "rollout" in self.vllm.samples and self.vllm.url is not None:
            yield (
                f"vllm.samples holds rollout, but the server at vllm.url {self.vllm.url} takes no new weights after a "
                "step; take rollout out, or vllm.url"
            )
        for intervention in self.future.interventions:
            if intervention.stop > self.run.total_steps:
                yield (
                    f"the window [{intervention.start}, {intervention.stop}) ends after run.total_steps "
                    f"{self.run.total_steps}; raise run.total_steps or shorten the window"
                )

    def _beyond_deepspeed(self) -> Iterator[str]:
        if self.model.dtype == "float64":
            yield ("model.dtype float64 is not DeepSpeed's; use float32, or learner.engine torch")
        if self.model.dtype == "bfloat16" and self.deepspeed.zero_stage == 0:
            yield (
                "deepspeed.zero_stage 0 with model.dtype bfloat16 is not supported: its float32 weights could not be "
                "saved; use zero_stage 1 to 3, or float32"
            )
        if ":" in self.learner.device:
            yield (
                f"learner.device {self.learner.device} names one GPU, but each rank of learner.engine deepspeed takes "
                "its own; use cuda, and CUDA_VISIBLE_DEVICES to choose"
            )

    @property
    def weighs_sampling(self) -> bool:
        """Whether an update looks at what its rollouts were sampled by: another engine, or one to be corrected for."""
        return "rollout" in self.vllm.samples or self.algorithm.sampling_correction != "none"

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
        recipe = self.model_dump(mode="json", exclude={"evaluation", "retention", "vllm", "deepspeed", "sharding"})
        recipe["run"] = {"seed": self.run.seed}
        for section, fields in NOT_RECIPE.items():
            for field in fields:
                del recipe[section][field]
        if self.model.lora is None:
            # As before there were adapters: the recipe of a run without them stays what it was.
            del recipe["model"]["lora"]
        if recipe["verifier"] == VerifierSection().model_dump(mode="json", exclude={"workers"}):
            # As before there was a choice.
            del recipe["verifier"]
        return recipe
