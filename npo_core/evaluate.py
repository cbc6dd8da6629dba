"""Evaluation by sampling: pass@1 averaged over samples, by task family and over all prompts; `scores` has the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from npo_core.interfaces import Generator, Prompt, SamplingParams, StreamKey
from npo_core.segment import LegContext
from schemas import tables
from schemas.records import SCHEMA_VERSION, TaskScore


@dataclass(frozen=True)
class Evaluation:
    """An evaluation's outcome."""

    samples: pa.Table
    """Every sampled answer, by `schemas.tables.TRAJECTORIES`."""
    tasks: dict[str, TaskScore]
    accuracy: float
    entropy: float
    """Mean token entropy of the sampling distribution, in nats."""
    tokens: int
    greedy: pa.Table | None = None
    """One answer a prompt at temperature 0, like `samples`; None: none was asked for."""
    failures: dict[str, int] | None = None
    """Answers without a verdict, by `Verdict.failure`; None: the verifier cannot fail."""


def evaluate_policy(
    context: LegContext,
    generator: Generator,
    step: int,
    samples: int,
    on_prompts: Callable[[int, int], None],
    prompts: Sequence[Prompt],
    greedy: bool = False,
    block: int = 64,
) -> Evaluation:
    """Samples answers to prompts from the policy that `generator` holds, and verifies them.

    The streams are keyed by the step, so that runs with equal seeds are evaluated with equal random numbers.

    Args:
        step: step of the checkpoint.
        samples: answers a prompt.
        on_prompts: called with (prompts done, answers correct) after each block.
        prompts: to be asked.
        greedy: asks each once more at temperature 0.
        block: prompts sampled at a time.

    Raises:
        FloatingPointError: the policy's distribution is not finite; names the step.
    """
    rows: list[dict[str, Any]] = []
    likeliest: list[dict[str, Any]] = []
    asked: Counter[str] = Counter(prompt.task for prompt in prompts)
    correct: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    entropies: list[np.ndarray] = []
    for first in range(0, len(prompts), block):
        part = prompts[first : first + block]
        drawn, entropies_B, failed = _ask(context, generator, step, part, samples, context.sampling)
        rows += drawn
        entropies += entropies_B
        failures += failed
        for row in drawn:
            correct[row["task"]] += row["correct"]
        if greedy:
            params = replace(context.sampling, temperature=0.0)
            drawn, _, failed = _ask(context, generator, step, part, 1, params)
            likeliest += drawn
            failures += failed
        on_prompts(first + len(part), correct.total())
    return Evaluation(
        samples=pa.Table.from_pylist(rows, tables.TRAJECTORIES),
        greedy=pa.Table.from_pylist(likeliest, tables.TRAJECTORIES) if greedy else None,
        tasks={
            task: TaskScore(prompts=asked[task], samples=asked[task] * samples, correct=correct[task])
            for task in sorted(asked)
        },
        accuracy=correct.total() / len(rows),
        entropy=float(np.concatenate(entropies).mean(dtype=np.float64)),
        tokens=sum(len(row["completion_ids"]) for row in (*rows, *likeliest)),
        failures={"timeout": failures["timeout"], "error": failures["error"]} if context.verifier.can_fail else None,
    )


def _ask(
    context: LegContext,
    generator: Generator,
    step: int,
    part: Sequence[Prompt],
    samples: int,
    params: SamplingParams,
) -> tuple[list[dict[str, Any]], list[np.ndarray], Counter[str]]:
    """Verified answers to some prompts, rows by `schemas.tables.TRAJECTORIES`, their tokens' entropies, and how many
    verdicts failed."""
    prompt_ids = [context.encode(prompt) for prompt in part]
    streams = [
        StreamKey(context.config.run.seed, "eval", step, prompt.prompt_id, slot)
        for prompt in part
        for slot in range(samples)
    ]
    try:
        rollouts = generator.sample(prompt_ids, samples, params, streams)
    except FloatingPointError as error:
        raise FloatingPointError(f"evaluation of leg {context.leg_id} at step {step}: {error}") from error
    rows = []
    texts = [context.decode(completion_ids.tolist()) for completion_ids in rollouts.completion_ids]
    verdicts = context.verifier.judge([(part[i // samples], text) for i, text in enumerate(texts)])
    for i, (completion_ids, text, verdict) in enumerate(zip(rollouts.completion_ids, texts, verdicts, strict=True)):
        prompt = part[i // samples]
        rows.append(
            {
                "run_id": context.run_id,
                "leg_id": context.leg_id,
                "step": step,
                "prompt_id": prompt.prompt_id,
                "slot": i % samples,
                "source": "policy",
                "task": prompt.task,
                "behavior_step": step,
                "behavior_digest": context.weights_digest,
                "prompt_ids": prompt_ids[i // samples],
                "completion_ids": completion_ids,
                "behavior_logprobs": rollouts.logprobs[i],
                "reward": verdict.reward,
                "correct": verdict.correct,
                "verdict": verdict.reason,
                "verifier": context.verifier.name,
                "finish_reason": rollouts.finish_reasons[i],
                "displaced": False,
                "entropy": float(rollouts.entropies[i].mean(dtype=np.float64)),
                "text": text,
                "image_refs": list(prompt.image_refs),
                "schema_version": SCHEMA_VERSION,
            }
        )
    failed = Counter(str(verdict.failure) for verdict in verdicts if verdict.failure is not None)
    return rows, rollouts.entropies, failed
