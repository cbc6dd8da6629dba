"""Arrow schemas of everything that is written as Parquet. Token ids are the truth; text is for people.

Every column carries its description as field metadata, so the files explain themselves; `schemas/README.md` lists them.
"""

from __future__ import annotations

import pyarrow as pa

from schemas.records import SCHEMA_VERSION

_META = {b"near_future.schema_version": str(SCHEMA_VERSION).encode()}
DESCRIPTION = b"description"
"""Key of a column's description in its field's metadata. Descriptions are no part of a schema's identity: files of
another wording are read as they are."""
LATER = b"later"
"""Key in the metadata of a column that is younger than version 1 of its schema: a file lacks it where all of it
would be null, as every older file does, and no digest knows such a column."""


def _column(name: str, kind: pa.DataType, description: str, nullable: bool = False, later: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable, {DESCRIPTION: description.encode()} | ({LATER: b"yes"} if later else {}))


TRAJECTORY_KEY = ("leg_id", "step", "prompt_id", "slot", "source")
TRAJECTORY_ORDER = ("prompt_id", "step", "slot", "source")
"""Sort order within a file: statistics prune one prompt's history."""

_RUN_ID = _column("run_id", pa.string(), "The run's name.")
_LEG_ID = _column("leg_id", pa.string(), "The leg that made the row; in a guide's file the guide's id.")
_TOKENS = pa.list_(pa.int32())
_PICTURES = "SHA-256 of the prompt's pictures, in order; each file is pictures/{sha256} of the run, once."

TRAJECTORIES = pa.schema(
    [
        _RUN_ID,
        _LEG_ID,
        _column(
            "step", pa.int32(), "Optimizer step of its batch, from 0; in guides and evaluations the checkpoint's step."
        ),
        _column("prompt_id", pa.string(), "Key into prompts.parquet."),
        _column("slot", pa.int32(), "Place in the prompt's group of answers, from 0."),
        _column("source", pa.string(), "policy: sampled by the leg's own policy; guide: taken from a guide."),
        _column("task", pa.string(), "Task family."),
        _column("behavior_step", pa.int32(), "Optimizer steps behind the policy that sampled it."),
        _column(
            "behavior_digest",
            pa.string(),
            "SHA-256 of that policy's weights, hexadecimal; null: no checkpoint holds them.",
            nullable=True,
        ),
        _column("prompt_ids", _TOKENS, "Token ids of the prompt, chat template included."),
        _column("completion_ids", _TOKENS, "Token ids of the answer, end token included."),
        _column(
            "loss_mask",
            pa.list_(pa.bool_()),
            "Which completion tokens count in the loss, one value a token; null: all do.",
            nullable=True,
        ),
        _column(
            "behavior_logprobs",
            pa.list_(pa.float32()),
            "Log-probability of each completion token in nats, under the distribution that it was sampled from.",
        ),
        _column("reward", pa.float64(), "The verifier's reward; may be fractional."),
        _column("correct", pa.bool_(), "The verifier's verdict."),
        _column("verdict", pa.string(), "The verifier's reason, in words."),
        _column("verifier", pa.string(), "The verifier, name/version."),
        _column("finish_reason", pa.string(), "stop: by an end token; length: cut off at the token limit."),
        _column(
            "advantage",
            pa.float64(),
            "Group-relative advantage in the update; null: the row was in no update (displaced, guide, evaluation).",
            nullable=True,
        ),
        _column(
            "group_accuracy",
            pa.float64(),
            "Mean reward of the group's own rollouts, before any replacement; null: the row is in no group.",
            nullable=True,
        ),
        _column("displaced", pa.bool_(), "A guide row took its slot: no weight in the loss."),
        _column(
            "entropy",
            pa.float64(),
            "Token entropy in nats under the policy that sampled it, mean over the answer; null: not known.",
            nullable=True,
        ),
        _column("text", pa.string(), "The answer for people, without its end token."),
        _column("image_refs", pa.list_(pa.string()), _PICTURES),
        _column("schema_version", pa.int32(), "Version of these columns."),
    ],
    metadata=_META,
)

PROMPTS = pa.schema(
    [
        _column("prompt_id", pa.string(), "The prompt's name, unique in the run."),
        _column("split", pa.string(), "train | held_out."),
        _column("task", pa.string(), "Task family."),
        _column("messages", pa.string(), 'The conversation as JSON: [{"role": …, "content": …}].'),
        _column("answer", pa.string(), "What the verifier compares with."),
        _column("image_refs", pa.list_(pa.string()), _PICTURES),
        _column(
            "metadata",
            pa.string(),
            "What the verifier may need beside the answer, a JSON object; null: nothing.",
            nullable=True,
            later=True,
        ),
    ],
    metadata=_META,
)

METRIC_DESCRIPTIONS = {
    "reward": "Mean reward of the on-policy rollouts, before replacement.",
    "reward_std": "Standard deviation of rewards within a group, mean over groups, before replacement.",
    "frac_reward_zero_std": "Share of groups whose rewards are all equal, before replacement.",
    "entropy": "Token entropy of the sampling distribution in nats, mean over the on-policy completion tokens.",
    "loss": "The update's loss.",
    "kl": "KL(policy ‖ starting policy) in nats a token, estimated on the update's tokens.",
    "grad_norm": "Norm of the gradient before it is clipped.",
    "learning_rate": "Learning rate of the update.",
    "clip_ratio/low_mean": "Share of the update's tokens whose gradient the lower clip bound cuts.",
    "clip_ratio/high_mean": "Share of the update's tokens whose gradient the upper clip bound cuts.",
    "clip_ratio/region_mean": "Share of the update's tokens whose gradient either bound cuts.",
    "completions/mean_length": "Mean length of the on-policy completions, tokens.",
    "completions/min_length": "Shortest on-policy completion, tokens.",
    "completions/max_length": "Longest on-policy completion, tokens.",
    "completions/clipped_ratio": "Share of the on-policy completions that were cut off at the token limit.",
    "batch/accuracy": "Share of the on-policy rollouts that are correct.",
    "batch/solve_none": "Share of groups without a correct on-policy rollout.",
    "batch/solve_all": "Share of groups whose on-policy rollouts are all correct.",
    "npo/eligible": "Groups whose accuracy passes the gate.",
    "npo/replaced": "Groups in which guide trajectories took slots.",
    "npo/guide_missing": "Groups that pass the gate and for which the guide holds nothing; null without a guide.",
    "npo/gate_pass_rate": "Share of groups whose accuracy passes the gate.",
    "npo/guide_ratio_mean": "Probability ratio of the step's policy to the guide's, mean over guide tokens.",
    "npo/guide_kl": "KL(guide's policy ‖ step's policy) in nats a token, estimated on guide tokens.",
    "tokens/policy": "Completion tokens that the policy sampled.",
    "tokens/trained": "Completion tokens that went through the backward pass.",
}
SAMPLING_DESCRIPTIONS = {
    "sampling/sampling_logp_difference/mean": "|log π_trainer − log π_sampler|, nats, mean over the update's tokens.",
    "sampling/sampling_logp_difference/max": "The largest such difference, nats.",
    "sampling/importance_sampling_ratio/min": "Smallest weight of these tokens under algorithm.sampling_correction.",
    "sampling/importance_sampling_ratio/mean": "These weights' mean.",
    "sampling/importance_sampling_ratio/max": "The largest of them.",
    "sampling/ess": "Relative effective sample size of these weights.",
    "sampling/corrected": "Share of these tokens that the correction truncates or masks.",
}
"""Metrics of steps whose sampler is no part of the trainer, or whose updates are corrected for it."""
VERIFIER_DESCRIPTIONS = {
    "verifier/timeouts": "On-policy rollouts whose verdict took too long: reward 0.",
    "verifier/errors": "On-policy rollouts on which the verifier failed: reward 0.",
}
"""Metrics of verifiers that can fail."""
_LATER_DESCRIPTIONS = {**SAMPLING_DESCRIPTIONS, **VERIFIER_DESCRIPTIONS}
METRIC_COLUMNS = (*METRIC_DESCRIPTIONS, *_LATER_DESCRIPTIONS)
"""A step's metrics, TRL's names first."""

MONITOR_COLUMNS = ("autonpo/reward_ema", "autonpo/entropy_ema")
"""AutoNPO's averages after a step. They are not in the metrics' file: checkpoints hold them, and views show them beside
the metrics."""

_STEP = _column("step", pa.int32(), "Optimizer step, from 0.")

METRICS = pa.schema(
    [
        _RUN_ID,
        _LEG_ID,
        _STEP,
        *(_column(name, pa.float64(), text, nullable=True) for name, text in METRIC_DESCRIPTIONS.items()),
        *(_column(name, pa.float64(), text, nullable=True, later=True) for name, text in _LATER_DESCRIPTIONS.items()),
    ],
    metadata=_META,
)
"""Null where a metric is not defined at the step."""

TELEMETRY = pa.schema(
    [
        _RUN_ID,
        _LEG_ID,
        _STEP,
        _column("step_time", pa.float64(), "Seconds that the step took."),
        _column("generate_time", pa.float64(), "Of these, seconds of sampling."),
        _column("verify_time", pa.float64(), "Of these, seconds of verifying."),
        _column("update_time", pa.float64(), "Of these, seconds of mixing and updating."),
        _column("peak_rss_bytes", pa.int64(), "Largest resident memory of the process so far, bytes."),
        _column("host", pa.string(), "Name of the machine."),
        _column("finished_at", pa.string(), "When the step ended: UTC, ISO 8601."),
    ],
    metadata=_META,
)

_ESTIMATES = {
    "quality": "Q: share of the failed prompts that π(t+Δ) answers correctly at least once",
    "baseline": "Q of π(t) itself on the same prompts, sampled afresh",
    "pass_rate": "Share of π(t+Δ)'s answers that are correct",
    "kl_per_token": "KL(π(t+Δ) ‖ π(t)) in nats a token",
    "relative_ess": "Relative effective sample size of the answers' weights π(t)/π(t+Δ)",
    "kl_token": "V by the KL a token",
    "kl_sequence": "V by the KL a sequence",
    "chi2": "V by the χ² divergence",
    "signal_kl_token": "S = Q/V, V by the KL a token",
    "signal_kl_sequence": "S = Q/V, V by the KL a sequence",
    "signal_chi2": "S = Q/V, V by the χ² divergence",
}
_BOUNDS = {"": "", "_low": ": lower bound", "_high": ": upper bound"}

WINDOW = pa.schema([_column("prompt_id", pa.string(), "A prompt that the guide was asked.")], metadata=_META)

SIGNAL = pa.schema(
    [
        _column("step", pa.int32(), "t, the step that is looked ahead from."),
        _column("lookahead", pa.int32(), "Δ, in steps."),
        _column("prompts", pa.int32(), "Prompts that π(t) was asked."),
        _column("failed", pa.int32(), "Of these, on which π(t) fails: what all estimates are over."),
        _column("samples", pa.int32(), "Answers of π(t+Δ) to them."),
        *(
            _column(f"{name}{bound}", pa.float64(), f"{text}{which}.", nullable=True)
            for name, text in _ESTIMATES.items()
            for bound, which in _BOUNDS.items()
        ),
    ],
    metadata=_META,
)
"""Bounds are those of 95 % bootstrap intervals; null where π(t) failed no prompt. See `schemas.decisions.Candidate`."""
