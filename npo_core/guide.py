"""The guide: one verified-correct trajectory of the future policy for each prompt of a window that it can solve."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from npo_core.faults import fault_point
from npo_core.interfaces import Generator, NearFutureError, Prompt, SamplingParams, StreamKey, Verdict, Verifier
from schemas import tables
from schemas.records import SCHEMA_VERSION, GuideSpec


@dataclass(frozen=True)
class GuideTrajectory:
    """A verified-correct response of the guide policy (o'_x), token by token."""

    prompt_id: str
    completion_ids: np.ndarray
    """int32 [T], its end token included."""
    logprobs: np.ndarray
    """float32 [T], under the guide policy."""
    reward: float
    verdict: str
    entropy: float | None
    """Mean token entropy under the guide policy, in nats."""
    text: str
    step: int
    """Step of the guide's checkpoint."""
    weights_digest: str

    def row(self) -> dict[str, Any]:
        """The columns of a trajectory row that it determines."""
        return {
            "source": "guide",
            "behavior_step": self.step,
            "behavior_digest": self.weights_digest,
            "completion_ids": self.completion_ids,
            "behavior_logprobs": self.logprobs,
            "reward": self.reward,
            "correct": True,
            "verdict": self.verdict,
            "finish_reason": "stop",
            "displaced": False,
            "entropy": self.entropy,
            "text": self.text,
        }


@dataclass(frozen=True)
class Guide:
    """What `make_guide` returns: rows by `schemas.tables.TRAJECTORIES` and the tokens that they cost."""

    trajectories: pa.Table
    tokens: int


def window_prompts(batches: Iterable[Sequence[Prompt]]) -> tuple[str, ...]:
    """The distinct prompts of a window's batches, sorted."""
    return tuple(sorted({prompt.prompt_id for batch in batches for prompt in batch}))


def make_guide(
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
    block: int = 64,
) -> Guide:
    """Samples K answers to each prompt from the guide policy and keeps, of each prompt, the first in sampling order
    that is verified correct and ended by itself. The result is thus one-correct-of-K, not a plain draw from the guide
    (NPO, arXiv 2604.20733, section 3.1). Truncated answers are never stored.

    Args:
        generator: holds the guide policy.
        on_prompts: called with (prompts done, prompts solved) after each block.
        block: prompts sampled at a time.

    Raises:
        FloatingPointError: the guide policy's distribution is not finite; names the step.
    """
    rows: list[dict[str, Any]] = []
    tokens = 0
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
        for p, prompt in enumerate(part):
            for slot in range(spec.k):
                i = p * spec.k + slot
                if rollouts.finish_reasons[i] != "stop":
                    continue
                text = decode(rollouts.completion_ids[i].tolist())
                verdict = verifier.verify(prompt, text)
                if verdict.correct:
                    trajectory = GuideTrajectory(
                        prompt.prompt_id,
                        rollouts.completion_ids[i],
                        rollouts.logprobs[i],
                        verdict.reward,
                        verdict.reason,
                        float(rollouts.entropies[i].mean(dtype=np.float64)),
                        text,
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
                    break
        fault_point("guide-sampling")
        on_prompts(first + len(part), len(rows))
    return Guide(pa.Table.from_pylist(rows, tables.TRAJECTORIES), tokens)


def read_guide(
    table: pa.Table, verify: Callable[[str, Sequence[int]], Verdict], encode: Callable[[str], np.ndarray]
) -> dict[str, GuideTrajectory]:
    """A guide's trajectories by prompt, each verified again: nothing unverified is ever replayed.

    Args:
        table: rows by `schemas.tables.TRAJECTORIES`.
        verify: judges (prompt_id, completion_ids).
        encode: prompt_id to the token ids that the run gives to its policy.

    Raises:
        NearFutureError: an answer is not correct, is truncated, or its prompt has other token ids in this run.
    """
    guide: dict[str, GuideTrajectory] = {}
    for row in table.to_pylist():
        prompt_id = row["prompt_id"]
        verdict = verify(prompt_id, row["completion_ids"])
        if not verdict.correct or row["finish_reason"] != "stop":
            raise NearFutureError(
                f"guide {row['leg_id']}: the stored answer to prompt {prompt_id} is not a verified-correct one "
                f"({verdict.reason}, finish_reason {row['finish_reason']}); make the guide again"
            )
        if row["prompt_ids"] != encode(prompt_id).tolist():
            raise NearFutureError(
                f"guide {row['leg_id']}: prompt {prompt_id} was encoded with another tokenizer or template; "
                "make the guide again under this run's"
            )
        guide[prompt_id] = GuideTrajectory(
            prompt_id,
            np.array(row["completion_ids"], np.int32),
            np.array(row["behavior_logprobs"], np.float32),
            verdict.reward,
            verdict.reason,
            row["entropy"],
            row["text"],
            row["behavior_step"],
            row["behavior_digest"],
        )
    return guide
