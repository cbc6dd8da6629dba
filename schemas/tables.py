"""Arrow schemas of everything that is written as Parquet. Token ids are the truth; text is for people."""

from __future__ import annotations

import pyarrow as pa

from schemas.records import SCHEMA_VERSION

_META = {b"near_future.schema_version": str(SCHEMA_VERSION).encode()}

TRAJECTORY_KEY = ("leg_id", "step", "prompt_id", "slot", "source")
TRAJECTORY_ORDER = ("prompt_id", "step", "slot", "source")
"""Sort order within a file: statistics prune one prompt's history."""

TRAJECTORIES = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("leg_id", pa.string(), nullable=False),  # in a guide's file: the guide's id
        pa.field("step", pa.int32(), nullable=False),  # of its batch; in guides and evaluations: the checkpoint's
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("slot", pa.int32(), nullable=False),  # place in the group, from 0
        pa.field("source", pa.string(), nullable=False),  # policy | guide
        pa.field("task", pa.string(), nullable=False),  # task family
        pa.field("behavior_step", pa.int32(), nullable=False),  # optimizer steps behind the policy that sampled it
        pa.field("behavior_digest", pa.string()),  # of its weights; null: no checkpoint holds them
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),  # tokens, chat template included
        pa.field("completion_ids", pa.list_(pa.int32()), nullable=False),  # tokens, the end token included
        pa.field("loss_mask", pa.list_(pa.bool_())),  # null: every completion token
        pa.field("behavior_logprobs", pa.list_(pa.float32()), nullable=False),  # of the distribution sampled from, nats
        pa.field("reward", pa.float64(), nullable=False),  # the verifier's; may be fractional
        pa.field("correct", pa.bool_(), nullable=False),  # the verifier's explicit verdict
        pa.field("verdict", pa.string(), nullable=False),  # the verifier's reason
        pa.field("verifier", pa.string(), nullable=False),  # name/version
        pa.field("finish_reason", pa.string(), nullable=False),  # stop | length
        pa.field("advantage", pa.float64()),  # null: a row that is in no group (guide artifacts, evaluations)
        pa.field("group_accuracy", pa.float64()),  # before replacement; null likewise
        pa.field("displaced", pa.bool_(), nullable=False),  # a guide row took its slot: no weight in the loss
        pa.field("entropy", pa.float64()),  # mean token entropy in nats under the behavior policy; null: not known
        pa.field("text", pa.string(), nullable=False),  # for people: without the end token
        pa.field("image_refs", pa.list_(pa.string()), nullable=False),  # keys of images in the prompt
        pa.field("schema_version", pa.int32(), nullable=False),
    ],
    metadata=_META,
)

PROMPTS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),  # train | held_out
        pa.field("task", pa.string(), nullable=False),
        pa.field("messages", pa.string(), nullable=False),  # JSON: [{"role": …, "content": …}]
        pa.field("answer", pa.string(), nullable=False),
        pa.field("image_refs", pa.list_(pa.string()), nullable=False),
    ],
    metadata=_META,
)

METRIC_COLUMNS = (
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "entropy",
    "loss",
    "kl",
    "grad_norm",
    "learning_rate",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "batch/accuracy",
    "batch/solve_none",
    "batch/solve_all",
    "npo/eligible",
    "npo/replaced",
    "npo/guide_missing",
    "npo/gate_pass_rate",
    "npo/guide_ratio_mean",
    "npo/guide_kl",
    "tokens/policy",
    "tokens/trained",
)
"""A step's metrics, TRL's names first. `reward`, `entropy` (nats a token), `completions/*` (tokens) and `batch/*`
(shares of rollouts and groups) are of the on-policy rollouts, before replacement; `npo/*` counts groups; `loss`, `kl`,
`grad_norm` and `clip_ratio/*` are of the update; `tokens/policy` were sampled, `tokens/trained` went through the
backward pass."""

MONITOR_COLUMNS = ("autonpo/reward_ema", "autonpo/entropy_ema")
"""AutoNPO's averages after a step. They are not in the metrics' file: checkpoints hold them, and views show them beside
the metrics."""

METRICS = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("leg_id", pa.string(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        *(pa.field(name, pa.float64()) for name in METRIC_COLUMNS),  # null: not defined at this step
    ],
    metadata=_META,
)

TELEMETRY = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("leg_id", pa.string(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("step_time", pa.float64(), nullable=False),  # seconds, as are the three below
        pa.field("generate_time", pa.float64(), nullable=False),
        pa.field("verify_time", pa.float64(), nullable=False),
        pa.field("update_time", pa.float64(), nullable=False),
        pa.field("peak_rss_bytes", pa.int64(), nullable=False),
        pa.field("host", pa.string(), nullable=False),
        pa.field("finished_at", pa.string(), nullable=False),  # UTC, ISO 8601
    ],
    metadata=_META,
)

_ESTIMATES = ("quality", "baseline", "pass_rate", "kl_per_token", "relative_ess", "kl_token", "kl_sequence", "chi2")

SIGNAL = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),  # t
        pa.field("lookahead", pa.int32(), nullable=False),  # Δ
        pa.field("prompts", pa.int32(), nullable=False),  # asked at t
        pa.field("failed", pa.int32(), nullable=False),  # of these, on which π(t) fails: what all estimates are over
        pa.field("samples", pa.int32(), nullable=False),  # answers of π(t+Δ) to them
        # See `schemas.decisions.Candidate`; the last three are V̂, and Ŝ = Q̂/V̂ stands beside each.
        *(
            pa.field(f"{name}{bound}", pa.float64())
            for name in (*_ESTIMATES, "signal_kl_token", "signal_kl_sequence", "signal_chi2")
            for bound in ("", "_low", "_high")
        ),
    ],
    metadata=_META,
)
"""One row a point of a study of Q, V and S, with 95 % bootstrap intervals; null where π(t) failed no prompt."""
