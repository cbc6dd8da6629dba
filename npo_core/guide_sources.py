"""Where guide trajectories come from: the guide policy samples them, or rollouts of the steps that led to it are
reused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from npo_core.faults import fault_point
from npo_core.guide import GuideTrajectory
from npo_core.interfaces import Generator, Prompt, PromptSource, SamplingParams, StreamKey, Verifier
from schemas import tables
from schemas.records import SCHEMA_VERSION, GuideSpec

PROMPTS_AT_ONCE = 64
"""Prompts whose answers are sampled in one call."""


def window_steps(prompts: PromptSource, start: int, stop: int) -> dict[str, list[int]]:
    """The steps of a window [start, stop) at which each of its prompts occurs."""
    steps: dict[str, list[int]] = {}
    for step in range(start, stop):
        for prompt_id in prompts.batch_ids(step):
            steps.setdefault(prompt_id, []).append(step)
    return steps


def sample_answers(
    spec: GuideSpec,
    guide_id: str,
    run_id: str,
    prompts: Sequence[Prompt],
    generator: Generator,
    params: SamplingParams,
    verifier: Verifier,
    encode: Callable[[Prompt], np.ndarray],
    decode: Callable[[Sequence[int]], str],
    on_prompts: Callable[[int, int], None],
    block: int = PROMPTS_AT_ONCE,
) -> tuple[pa.Table, int]:
    """Samples K answers to each prompt from the guide policy and keeps, of each prompt, the first `spec.answers` in
    sampling order that are verified correct and ended by themselves. A result is thus one-correct-of-K, not a plain
    draw from the guide (NPO, arXiv 2604.20733, section 3.1). Truncated answers are never stored.

    Args:
        generator: holds the guide policy.
        on_prompts: called with (prompts done, prompts solved) after each block.
        block: prompts sampled at a time.

    Returns:
        Rows by `schemas.tables.TRAJECTORIES`, and the completion tokens that were sampled, wrong answers included.

    Raises:
        FloatingPointError: the guide policy's distribution is not finite; names the step.
    """
    rows: list[dict[str, Any]] = []
    tokens = solved = 0
    for first in range(0, len(prompts), block):
        part = prompts[first : first + block]
        prompt_ids = [encode(prompt) for prompt in part]
        streams = [
            StreamKey(spec.seed, "guide", spec.checkpoint.step, prompt.prompt_id, slot)
            for prompt in part
            for slot in range(spec.k)
        ]
        try:
            rollouts = generator.sample(prompt_ids, spec.k, params, streams)
        except FloatingPointError as error:
            raise FloatingPointError(f"guide from step {spec.checkpoint.step}: {error}") from error
        tokens += sum(map(len, rollouts.completion_ids))
        ended = [i for i, reason in enumerate(rollouts.finish_reasons) if reason == "stop"]
        texts = {i: decode(rollouts.completion_ids[i].tolist()) for i in ended}
        judged = verifier.judge([(part[i // spec.k], text) for i, text in texts.items()])
        verdicts = dict(zip(ended, judged, strict=True))
        for p, prompt in enumerate(part):
            kept = 0
            for slot in range(spec.k):
                i = p * spec.k + slot
                if kept == spec.answers or i not in verdicts or not verdicts[i].correct:
                    continue
                verdict = verdicts[i]
                trajectory = GuideTrajectory(
                    prompt.prompt_id,
                    rollouts.completion_ids[i],
                    rollouts.logprobs[i],
                    verdict.reward,
                    verdict.reason,
                    float(rollouts.entropies[i].mean(dtype=np.float64)),
                    texts[i],
                    spec.checkpoint.step,
                    spec.checkpoint.step,
                    spec.weights_digest,
                )
                rows.append(
                    {
                        **trajectory.row(),
                        "run_id": run_id,
                        "leg_id": guide_id,
                        "step": spec.checkpoint.step,
                        "prompt_id": prompt.prompt_id,
                        "task": prompt.task,
                        "slot": slot,
                        "prompt_ids": prompt_ids[p],
                        "verifier": verifier.name,
                        "image_refs": list(prompt.image_refs),
                        "schema_version": SCHEMA_VERSION,
                    }
                )
                kept += 1
            solved += kept > 0
        fault_point("guide-sampling")
        on_prompts(first + len(part), solved)
    return pa.Table.from_pylist(rows, tables.TRAJECTORIES), tokens


def reuse_rollouts(
    spec: GuideSpec, guide_id: str, rollouts: Iterable[pa.Table], steps: Mapping[str, Sequence[int]]
) -> pa.Table:
    """Of each prompt, the first `spec.answers` of the rollouts of the latest step that has any; none where even these
    come too early to serve an occurrence of the prompt in the window.

    What was sampled to train the future leg costs no further token. It is weaker than the guide policy's own answers:
    each comes from a policy nearer to the one that it teaches, and only from prompts that the leg saw once more.

    Args:
        rollouts: policy rollouts that may be reused, verified correct and ended by themselves, rows by
            `schemas.tables.TRAJECTORIES`; tables of later steps come first, and are read only as long as prompts are
            open.
        steps: `window_steps`.
    """
    rows: list[dict[str, Any]] = []
    open_prompts = set(spec.prompt_ids)
    for table in rollouts:
        table = table.sort_by([("step", "descending"), ("slot", "ascending")])
        latest: dict[str, int] = {}
        chosen: dict[str, list[int]] = {prompt_id: [] for prompt_id in open_prompts}
        keys = zip(table["prompt_id"].to_pylist(), table["step"].to_pylist(), strict=True)
        for row, (prompt_id, step) in enumerate(keys):
            if prompt_id in open_prompts and latest.setdefault(prompt_id, step) == step:
                chosen[prompt_id].append(row)
        serving = [
            row
            for prompt_id, step in latest.items()
            for row in chosen[prompt_id][: spec.answers]
            if min(steps[prompt_id]) < step
        ]
        # Only these become Python objects: a segment holds millions of tokens.
        rows += table.take(pa.array(serving, pa.int64())).to_pylist()
        open_prompts -= latest.keys()
        if not open_prompts:
            break
    # It is in no group yet, whatever became of it in its own.
    own = {"leg_id": guide_id, "source": "guide", "step": spec.checkpoint.step}
    no_group = {"advantage": None, "group_accuracy": None, "displaced": False}
    return pa.Table.from_pylist([{**row, **own, **no_group} for row in rows], tables.TRAJECTORIES)


def unserved(spec: GuideSpec, reused: pa.Table, steps: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """The guide's prompts that occur in the window at a step which no reused rollout serves."""
    latest = dict(zip(reused["prompt_id"].to_pylist(), reused["behavior_step"].to_pylist(), strict=True))
    return tuple(prompt for prompt in spec.prompt_ids if latest.get(prompt, 0) <= max(steps[prompt]))


def with_sampled(reused: pa.Table, sampled: pa.Table) -> pa.Table:
    """Both, sampled answers in the place of reused ones to the same prompt: they serve the whole window."""
    answered = pc.is_in(reused["prompt_id"], value_set=sampled["prompt_id"].combine_chunks())
    return pa.concat_tables([sampled, reused.filter(pc.invert(answered))])
