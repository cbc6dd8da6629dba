"""The loop of one segment: sample, verify, mix, update, and write down what happened. Knows no store, no scheduler."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from npo_core.faults import fault_point
from npo_core.groups import Group, MixedGroup, failure_metrics, group_rows, mix_groups, step_metrics
from npo_core.guide import GuideTrajectories
from npo_core.interfaces import (
    Generator,
    Learner,
    Prompt,
    PromptSource,
    SamplingParams,
    StreamKey,
    TrainBatch,
    Verifier,
)
from npo_core.memory import peak_rss_bytes
from npo_core.monitor import observe
from npo_core.stops import Stops
from schemas import tables
from schemas.config import Config
from schemas.decisions import MonitorState


@dataclass(frozen=True)
class LegContext:
    """What every step of a leg needs to know."""

    run_id: str
    leg_id: str
    config: Config
    prompts: PromptSource
    verifier: Verifier
    encode: Callable[[Prompt], np.ndarray]
    """Prompt to token ids, int32 [L]."""
    decode: Callable[[Sequence[int]], str]
    """Token ids of a completion to the text that the verifier judges."""
    stop_ids: tuple[int, ...]
    guide: GuideTrajectories | None
    """For the prompts of these steps; None where nothing is mixed in."""
    weights_digest: str
    """Weights that the segment starts from, as recorded in its rows."""
    monitor: MonitorState = field(default_factory=MonitorState)
    """AutoNPO's state where the segment starts."""
    stops: Stops | None = None
    """Texts that end a completion too."""

    @property
    def sampling(self) -> SamplingParams:
        """How the policy samples its rollouts."""
        rollout = self.config.rollout
        return SamplingParams(rollout.temperature, rollout.max_new_tokens, self.stop_ids, self.stops)


@dataclass(frozen=True)
class SegmentTables:
    """A segment's outcome, by the schemas of `schemas.tables`."""

    rollouts: pa.Table
    metrics: pa.Table
    telemetry: pa.Table
    monitor: MonitorState
    """AutoNPO's state after the segment."""


def run_segment(
    context: LegContext,
    generator: Generator,
    learner: Learner,
    start: int,
    stop: int,
    on_step: Callable[[int, Mapping[str, float]], None],
) -> SegmentTables:
    """Trains steps [start, stop) with a generator and a learner that hold the policy of step `start`.

    Args:
        on_step: called after each step with the number of steps done and the step's metrics.

    Raises:
        FloatingPointError: something is not finite; names the step.
    """
    rows: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    telemetry: list[dict[str, Any]] = []
    monitor = context.monitor
    for step in range(start, stop):
        began = time.perf_counter()
        groups = sample_groups(context, generator, step)
        generated = time.perf_counter()
        groups = judge(context, groups)
        verified = time.perf_counter()
        mixed, replacement = mix_groups(step, groups, context.guide or {}, context.config.algorithm)
        if context.guide is None:
            # No guide was to be had: none is missing.
            del replacement["npo/guide_missing"]
        updated = learner.step(train_batch(step, mixed, context.config.weighs_sampling))
        done = time.perf_counter()

        fault_point("segment-step")
        digest = context.weights_digest if step == start else None
        rows += group_rows(context.run_id, context.leg_id, step, digest, context.verifier.name, mixed)
        failed = failure_metrics(mixed) if context.verifier.can_fail else {}
        metrics.append({"step": step, **step_metrics(mixed), **replacement, **updated, **failed})
        telemetry.append(
            {
                "step": step,
                "generate_time": generated - began,
                "verify_time": verified - generated,
                "update_time": done - verified,
                "step_time": time.perf_counter() - began,
                "peak_rss_bytes": peak_rss_bytes(),
                "host": socket.gethostname(),
                "finished_at": datetime.now(UTC).isoformat(),
            }
        )
        monitor = observe(
            monitor,
            step,
            metrics[-1]["reward"],
            metrics[-1]["entropy"],
            [(m.group.prompt.prompt_id, m.accuracy) for m in mixed],
            context.config.autonpo,
        )
        on_step(step + 1, metrics[-1])
    return SegmentTables(
        pa.Table.from_pylist(rows, tables.TRAJECTORIES),
        _with_leg(context, metrics, tables.METRICS),
        _with_leg(context, telemetry, tables.TELEMETRY),
        monitor,
    )


def sample_groups(context: LegContext, generator: Generator, step: int) -> list[Group]:
    """The step's prompt groups, sampled and not yet verified."""
    rollout, seed = context.config.rollout, context.config.run.seed
    # A scout may train on the first part of the main line's batch.
    batch, n = context.prompts.batch(step)[: rollout.prompts_per_step], rollout.group_size
    prompt_ids = [context.encode(prompt) for prompt in batch]
    streams = [StreamKey(seed, "rollout", step, prompt.prompt_id, slot) for prompt in batch for slot in range(n)]
    try:
        rollouts = generator.sample(prompt_ids, n, context.sampling, streams)
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step}: {error}") from error
    return [
        Group.sampled(prompt, ids, rollouts, slice(p * n, (p + 1) * n))
        for p, (prompt, ids) in enumerate(zip(batch, prompt_ids, strict=True))
    ]


def judge(context: LegContext, groups: list[Group]) -> list[Group]:
    """The groups with texts and verdicts."""
    texts = [[context.decode(ids.tolist()) for ids in group.completion_ids] for group in groups]
    verdicts = iter(
        context.verifier.judge([(group.prompt, text) for group, own in zip(groups, texts, strict=True) for text in own])
    )
    return [group.judged(own, [next(verdicts) for _ in own]) for group, own in zip(groups, texts, strict=True)]


def train_batch(step: int, mixed: Sequence[MixedGroup], weighs_sampling: bool = False) -> TrainBatch:
    """The rows of the update: every group's own rollouts, the displaced ones' places taken by guide trajectories.

    Args:
        weighs_sampling: see `Config.weighs_sampling`.
    """
    prompt_ids, completion_ids, guide_logprobs, behavior, advantages, is_guide = [], [], [], [], [], []
    for group in mixed:
        for slot, (advantage, guide) in enumerate(zip(group.advantages_G, group.guides, strict=True)):
            prompt_ids.append(group.group.prompt_ids)
            completion_ids.append(guide.completion_ids if guide else group.group.completion_ids[slot])
            guide_logprobs.append(guide.logprobs if guide else None)
            behavior.append(None if guide else group.group.logprobs[slot])
            advantages.append(advantage)
            is_guide.append(guide is not None)
    return TrainBatch(
        step,
        prompt_ids,
        completion_ids,
        np.array(advantages),
        np.array(is_guide),
        guide_logprobs,
        behavior if weighs_sampling else None,
    )


def _with_leg(context: LegContext, rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows with the run's and leg's identifiers; what a step does not define stays null."""
    own = {"run_id": context.run_id, "leg_id": context.leg_id}
    return pa.Table.from_pylist([{**own, **row} for row in rows], schema)
