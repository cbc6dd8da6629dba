"""The confirmation of a warning: one probe of today's policy, from which every estimate comes
(NPO, arXiv 2604.20733, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npo_core.faults import fault_point
from npo_core.interfaces import Generator, StreamKey
from npo_core.segment import LegContext
from npo_core.signal import Band, compare_policies, coverage, estimate
from schemas.decisions import Candidate
from schemas.future import AutoNPOSection


@dataclass(frozen=True)
class Asked:
    """A policy's answers to P prompts, G a prompt; lists are prompt-major, row p·G + g."""

    prompt_ids: list[np.ndarray]
    """int32 [L] a row."""
    completion_ids: list[np.ndarray]
    logprobs: list[np.ndarray]
    correct_PG: np.ndarray
    """bool."""

    @property
    def tokens(self) -> int:
        """Completion tokens that were sampled."""
        return sum(map(len, self.completion_ids))


def ask(
    context: LegContext, generator: Generator, step: int, prompts: Sequence[str], samples: int, first_slot: int = 0
) -> Asked:
    """Samples answers of the policy that `generator` holds, and verifies them.

    Args:
        step: t, which keys the random streams.
        prompts: their prompt_ids.
        samples: G.
        first_slot: of the streams; another policy that is asked at the same step takes other ones.

    Raises:
        FloatingPointError: the policy's distribution is not finite; names the step.
    """
    chosen = [context.prompts.get(prompt_id) for prompt_id in prompts]
    prompt_ids = [context.encode(prompt) for prompt in chosen]
    seed = context.config.run.seed
    streams = [
        StreamKey(seed, "probe", step, prompt_id, first_slot + slot) for prompt_id in prompts for slot in range(samples)
    ]
    try:
        rollouts = generator.sample(prompt_ids, samples, context.sampling, streams)
    except FloatingPointError as error:
        raise FloatingPointError(f"probe of leg {context.leg_id} at step {step}: {error}") from error
    fault_point("probe-sampled")
    verdicts = context.verifier.judge(
        [(chosen[i // samples], context.decode(ids.tolist())) for i, ids in enumerate(rollouts.completion_ids)]
    )
    return Asked(
        [ids for ids in prompt_ids for _ in range(samples)],
        rollouts.completion_ids,
        rollouts.logprobs,
        np.array([verdict.correct for verdict in verdicts], dtype=bool).reshape(len(prompts), samples),
    )


def measure(
    candidate: Candidate,
    asked: Asked,
    past_logps: Sequence[np.ndarray],
    bands: Sequence[Band],
    chosen: int,
    settings: AutoNPOSection,
    seed: int,
) -> Candidate:
    """A distance with what the probe says of it.

    Args:
        asked: today's answers to the probe's prompts.
        past_logps: log-probabilities of their tokens under π(t−Δ).
        bands: of the probe's prompts, one a distance.
        chosen: how many of the bands make up B_Δ.
        seed: of the bootstrap.
    """
    found = estimate(
        compare_policies(asked.correct_PG, asked.logprobs, past_logps), bands, chosen, settings.kappa, seed
    )
    rows = own_rows(bands, chosen)
    return candidate.model_copy(
        update={
            "prompts": len(rows),
            "samples": len(rows) * asked.correct_PG.shape[1],
            "quality": found.quality,
            "pass_rate": found.pass_rate,
            "kl_per_token": found.kl_per_token,
            "relative_ess": found.relative_ess,
            "variance": found.variance,
            "signal": found.signal,
        }
    )


def with_baseline(candidate: Candidate, asked: Asked, bands: Sequence[Band], chosen: int, seed: int) -> Candidate:
    """The chosen distance with the coverage of π(t−Δ) itself.

    Args:
        asked: answers of π(t−Δ) to the prompts of the first `chosen` bands, in their order.
    """
    return candidate.model_copy(update={"baseline": coverage(asked.correct_PG, bands[:chosen], chosen, seed)})


def own_rows(bands: Sequence[Band], chosen: int) -> list[int]:
    """The probe's prompts that lie in B_Δ."""
    return [row for band in bands[:chosen] for row in band.rows]
