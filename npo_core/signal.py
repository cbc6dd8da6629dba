"""Signal estimates of a distance Δ from one probe: Q̂, V̂ and Ŝ = Q̂/V̂ (NPO, arXiv 2604.20733, sections 3.1 to 3.3).

The guide policy π_g = π(t) answers prompts of the mistake pool; the past policy π_p = π(t−Δ), which is to be trained
with these answers, scores them. The divergence is KL(π_g ‖ π_p), sampled from the guide: that is what importance
weighting of the guide's answers pays. A replayed answer is one correct of K and no plain draw from the guide, so none
of these numbers makes its weight unbiased; they rank distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npo_core.losses import MAX_LOG_RATIO
from npo_core.streams import philox
from schemas.decisions import Estimate

DRAWS = 2000
"""Resamples of a bootstrap interval."""
MAX_EXPONENT = 50.0
"""V̂ ends at exp(50): beyond it, nothing is comparable, and records hold no infinity."""


@dataclass(frozen=True)
class Answers:
    """A guide policy's answers to P prompts, G a prompt, and what the past policy makes of them."""

    correct_PG: np.ndarray
    """bool."""
    tokens_PG: np.ndarray
    """Completion tokens."""
    kl_PG: np.ndarray
    """float64, nats: sum over an answer's tokens of −d, d = log π_p − log π_g. Unbiased for KL(π_g ‖ π_p), since the
    tokens were drawn from π_g; a mean below zero is noise and is read as zero. Not k3 = exp(d) − 1 − d, unbiased and
    never negative too: once π_g is sharp, a few rare tokens with a large exp(d) decide its mean, and V̂ jumps between
    neighbouring distances."""
    log_weight_PG: np.ndarray
    """float64: sum of d over an answer's tokens, the logarithm of its importance weight π_p/π_g."""


@dataclass(frozen=True)
class Band:
    """Prompts drawn at random from a part of the pool."""

    size: int
    """Distinct prompts of the pool in this band."""
    rows: tuple[int, ...]
    """Which of the P prompts were drawn from it."""


@dataclass(frozen=True)
class Signal:
    """What a probe says of one distance, with 95 % bootstrap intervals. See `schemas.decisions.Candidate`."""

    quality: Estimate | None
    """Q̂; None if no prompt of B_Δ was asked."""
    pass_rate: Estimate | None
    kl_per_token: Estimate
    relative_ess: Estimate
    variance: dict[str, Estimate]
    """V̂ ≥ 1 by `autonpo.variance`."""
    signal: dict[str, Estimate]
    """Ŝ likewise; empty without Q̂."""


def compare_policies(
    correct_PG: np.ndarray, guide_logps: Sequence[np.ndarray], past_logps: Sequence[np.ndarray]
) -> Answers:
    """Both policies' log-probabilities of the guide's answers, as sums over each answer's tokens.

    Args:
        correct_PG: bool, the verdicts.
        guide_logps: [T] a row, prompt-major: row p·G + g.
        past_logps: likewise.

    Raises:
        ValueError: rows or tokens are not as many.
        FloatingPointError: a log-probability is not finite.
    """
    if not (correct_PG.size == len(guide_logps) == len(past_logps)):
        raise ValueError(f"{correct_PG.size} verdicts, {len(guide_logps)} and {len(past_logps)} rows")
    shape = correct_PG.shape
    tokens, kl, log_weight = np.empty(correct_PG.size, np.int64), np.empty(correct_PG.size), np.empty(correct_PG.size)
    for i, (guide_T, past_T) in enumerate(zip(guide_logps, past_logps, strict=True)):
        if len(guide_T) != len(past_T):
            raise ValueError(f"row {i} has {len(guide_T)} and {len(past_T)} tokens")
        difference_T = past_T.astype(np.float64) - guide_T.astype(np.float64)
        if not np.isfinite(difference_T).all():
            raise FloatingPointError(f"row {i} of the probe has log-probabilities that are not finite")
        d_T = difference_T.clip(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        tokens[i], kl[i], log_weight[i] = len(d_T), -d_T.sum(), d_T.sum()
    return Answers(correct_PG, tokens.reshape(shape), kl.reshape(shape), log_weight.reshape(shape))


def estimate(answers: Answers, bands: Sequence[Band], chosen: int, kappa: float, seed: int) -> Signal:
    """Q̂ over the prompts of B_Δ, V̂ over all of the probe's answers, and Ŝ.

    `kl_token` = exp(κ · KL a token), the paper's; `kl_sequence` = exp(κ · KL an answer), a lower bound of 1 + χ² of
    whole answers, since χ² + 1 ≥ exp(KL); `chi2` = mean w² / (mean w)², the inverse of the relative effective sample
    size of the weights w = π_p/π_g. All three are at least 1, and 1 if the policies are equal.

    Args:
        bands: of the probe's prompts, nearest first; B_Δ is the union of the first `chosen`. A band without a drawn
            prompt counts for nothing.
        kappa: κ.
        seed: of the bootstrap, which resamples prompts within bands, the same ones for Q̂, V̂ and Ŝ.
    """
    draws_DP = _resamples(bands, len(answers.correct_PG), seed)
    tokens_P, kl_P = answers.tokens_PG.sum(axis=1), answers.kl_PG.sum(axis=1)
    # Relative to the largest weight: exp never overflows, and the ratio does not change.
    weights_PG = np.exp(answers.log_weight_PG - answers.log_weight_PG.max(initial=-np.inf))
    per_prompt = answers.correct_PG.shape[1]
    kl_per_token_D = np.maximum(kl_P[draws_DP].sum(axis=1), 0) / tokens_P[draws_DP].sum(axis=1)
    kl_per_answer_D = np.maximum(kl_P[draws_DP].mean(axis=1), 0) / per_prompt
    weight_D = weights_PG.mean(axis=1)[draws_DP].mean(axis=1)
    square_D = (weights_PG**2).mean(axis=1)[draws_DP].mean(axis=1)
    # A resample without any weight worth the name has one answer's, at least.
    ess_D = np.where(square_D > 0, weight_D**2 / np.where(square_D > 0, square_D, 1.0), 1.0).clip(
        np.exp(-MAX_EXPONENT), 1.0
    )
    variance = {
        "kl_token": np.exp(np.minimum(kappa * kl_per_token_D, MAX_EXPONENT)),
        "kl_sequence": np.exp(np.minimum(kappa * kl_per_answer_D, MAX_EXPONENT)),
        "chi2": 1 / ess_D,
    }
    quality_D = _weighted(answers.correct_PG.max(axis=1), bands, chosen, draws_DP)
    pass_rate_D = _weighted(answers.correct_PG.mean(axis=1), bands, chosen, draws_DP)
    return Signal(
        quality=None if quality_D is None else _interval(quality_D),
        pass_rate=None if pass_rate_D is None else _interval(pass_rate_D),
        kl_per_token=_interval(kl_per_token_D),
        relative_ess=_interval(ess_D),
        variance={name: _interval(values_D) for name, values_D in variance.items()},
        signal={}
        if quality_D is None
        else {name: _interval(quality_D / values_D) for name, values_D in variance.items()},
    )


def coverage(correct_PG: np.ndarray, bands: Sequence[Band], chosen: int, seed: int) -> Estimate | None:
    """Q̂ alone: the share of B_Δ that is answered correctly at least once."""
    quality_D = _weighted(correct_PG.max(axis=1), bands, chosen, _resamples(bands[:chosen], len(correct_PG), seed))
    return None if quality_D is None else _interval(quality_D)


def _resamples(bands: Sequence[Band], prompts: int, seed: int) -> np.ndarray:
    """int64 [1 + DRAWS, P]: the prompts themselves, and resamples of them, each within its band."""
    rng = philox("bootstrap", seed)
    draws_DP = np.tile(np.arange(prompts), (1 + DRAWS, 1))
    for band in bands:
        if band.rows:
            rows = np.array(band.rows)
            draws_DP[1:, rows] = rows[rng.integers(len(rows), size=(DRAWS, len(rows)))]
    return draws_DP


def _weighted(values_P: np.ndarray, bands: Sequence[Band], chosen: int, draws_DP: np.ndarray) -> np.ndarray | None:
    """float64 [1 + DRAWS]: the stratified mean of a value over the first `chosen` bands."""
    asked = [band for band in bands[:chosen] if band.rows]
    if not asked:
        return None
    total = sum(band.size for band in asked)
    means = [values_P[draws_DP[:, list(band.rows)]].mean(axis=1) * (band.size / total) for band in asked]
    return np.sum(means, axis=0)


def _interval(values_D: np.ndarray) -> Estimate:
    """The estimate, which comes first, and the percentile interval of its resamples."""
    low, high = np.quantile(values_D[1:], [0.025, 0.975])
    value = float(values_D[0])
    # The percentile interval of few prompts can miss its own estimate by rounding or skew.
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))
