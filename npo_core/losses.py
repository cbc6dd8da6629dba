"""The objective: clipped policy loss, guide corrections, KL, and how token losses become a batch's loss.

Everything is a sum over rows and tokens with weights that are fixed before the first micro-batch, so that the result
does not depend on how the rows are split. Pads may hold any finite numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from schemas.algorithm import AlgorithmSection

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this, in nats: exp(20) ≈ 5·10⁸ is a broken run, but it does not overflow."""


@dataclass(frozen=True)
class LossInputs:
    """Rows of one micro-batch. Own rows come from the policy at the start of the step, guide rows from the guide.

    With one update a batch, `old_logps_BT` is `logps_BT.detach()`: the ratio is then 1 in value and carries the
    gradient of the log-probability.
    """

    step: int
    """Named in errors."""
    logps_BT: Tensor
    """log π_θ: differentiable, under the policy that is being updated."""
    old_logps_BT: Tensor
    """log π_start: under the policy at the start of the step, which sampled the own rows."""
    mask_BT: Tensor
    """bool: the tokens that count."""
    advantages_B: Tensor
    """Over the modified groups."""
    guide_B: Tensor
    """bool: the guide rows."""
    guide_logps_BT: Tensor
    """log π_guide, as stored with the trajectory; not read in own rows."""
    ref_logps_BT: Tensor | None = None
    """log π_ref, needed iff `kl_beta` > 0."""
    sampling_weights_BT: Tensor | None = None
    """Weights of the tokens for what sampled them (see `npo_core.mismatch`); None: 1."""

    @property
    def guide_tokens(self) -> Tensor:
        """bool [B, T]: the guide rows' tokens."""
        return self.mask_BT & self.guide_B[:, None]


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class LossSums:
    """Sums over tokens, float64 scalars, from which metrics follow. Those of micro-batches add up to the batch's;
    `LossSums()` is the sum of none."""

    tokens: Tensor = field(default_factory=_zero)
    clipped_low: Tensor = field(default_factory=_zero)
    clipped_high: Tensor = field(default_factory=_zero)
    kl: Tensor = field(default_factory=_zero)
    guide_tokens: Tensor = field(default_factory=_zero)
    guide_ratio: Tensor = field(default_factory=_zero)
    guide_log_ratio: Tensor = field(default_factory=_zero)

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def metrics(self, kl_beta: float, batch_tokens: int | None = None) -> dict[str, float]:
        """Metrics by TRL's names and ours; those of guide rows are absent if there are none, `kl` if β = 0.

        `clip_ratio/*` are shares of tokens where the clip cuts the gradient: ratio beyond the bound on the side that
        the advantage pushes to. `npo/guide_ratio_mean` is the mean of π_start/π_guide over guide tokens,
        `npo/guide_kl` the mean of log π_guide − log π_start: a per-token estimate of KL(π_guide ‖ π_start) on
        selected answers.

        Args:
            kl_beta: β.
            batch_tokens: tokens of the whole batch, where rows with advantage 0 were left out of the pass: they
                clip nothing, but count. By default the tokens seen.
        """
        tokens = self.tokens.item() if batch_tokens is None else batch_tokens
        low, high = self.clipped_low.item() / tokens, self.clipped_high.item() / tokens
        metrics = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
        if kl_beta > 0:
            metrics["kl"] = self.kl.item() / tokens
        if guide_tokens := self.guide_tokens.item():
            metrics["npo/guide_ratio_mean"] = self.guide_ratio.item() / guide_tokens
            metrics["npo/guide_kl"] = self.guide_log_ratio.item() / guide_tokens
        return metrics


@dataclass(frozen=True)
class TokenLosses:
    """Outcome of `token_losses`."""

    loss_BT: Tensor
    """Differentiable; 0 where the mask is off."""
    sums: LossSums

    def weighted_sum(self, weight_B: Tensor) -> Tensor:
        """The micro-batch's share of the batch's loss, a scalar to call `backward` on; see `token_weights`."""
        return (self.loss_BT * weight_B.to(self.loss_BT)[:, None]).sum()


def token_weights(
    lengths_B: Tensor, aggregation: Literal["seq-mean-token-mean", "token-mean", "seq-sum-norm"], max_new_tokens: int
) -> Tensor:
    """Weight of every token of a row in the batch's loss, Σ_rows weight · Σ_tokens loss.

    - `seq-mean-token-mean`: 1 / (B · length). Mean over rows of the mean over tokens, which is GRPO's mean over
      groups, rollouts and tokens, as groups have one size (arXiv 2402.03300, eq. 3).
    - `token-mean`: 1 / Σ lengths (DAPO, arXiv 2503.14476, eq. 8).
    - `seq-sum-norm`: 1 / (B · max_new_tokens) (Dr.GRPO, arXiv 2503.20783, as in its code).

    Args:
        lengths_B: tokens in the loss of ALL rows of the batch, those left out of the backward pass included.
        aggregation: `AlgorithmSection.aggregation`.
        max_new_tokens: longest completion.

    Returns:
        weight_B, float64.
    """
    lengths_B = lengths_B.double()
    rows = len(lengths_B)
    match aggregation:
        case "seq-mean-token-mean":
            return 1 / (rows * lengths_B.clamp(min=1))
        case "token-mean":
            return torch.full_like(lengths_B, 1 / max(lengths_B.sum().item(), 1))
        case "seq-sum-norm":
            return torch.full_like(lengths_B, 1 / (rows * max_new_tokens))


def token_losses(inputs: LossInputs, algorithm: AlgorithmSection) -> TokenLosses:
    """Loss of each token, −objective + β·KL.

    The objective of own rows is min(ρA, clip(ρ, 1 − ε_low, 1 + ε_high) A), ρ = π_θ/π_start (arXiv 1707.06347, eq. 7).
    That of guide rows depends on `guide_correction`:

    - `none`: the same as of own rows, as if π_start had sampled the guide trajectory (the NPO paper: near enough);
    - `exact`: the same with ρ = π_θ/π_guide, the guide's stored log-probabilities;
    - `truncated`: log π_θ · A · w with the detached weight w = min(π_start/π_guide, c): the plain policy gradient,
      without a clip (with one, every c ≥ 1 + ε_high would equal `exact`);
    - `shaped`: f(π_θ) A with f(ρ) = ρ/(ρ + γ), without a clip (LUFFY, arXiv 2504.14945, section 3).

    None of the four is unbiased: the guide slot holds the first correct one of K answers, not a draw from the guide, so
    its true proposal is neither π_start nor π_guide. `exact` and `truncated` correct for the policy that sampled the
    tokens and ignore the selection.

    The KL is the k3 estimate exp(d) − d − 1, d = log π_ref − log π_θ (arXiv 2402.03300, eq. 4), on all rows. Where a
    log-ratio is clamped (see `MAX_LOG_RATIO`), its gradient is 0. Sampling weights multiply the objective alone.

    Raises:
        FloatingPointError: log-probabilities that are not finite; see `require_finite`.
        ValueError: β > 0 without reference log-probabilities.
    """
    step, logps_BT, mask_BT = inputs.step, inputs.logps_BT, inputs.mask_BT
    guide_tokens_BT = inputs.guide_tokens
    require_finite(step, "policy", logps_BT, mask_BT)
    require_finite(step, "old", inputs.old_logps_BT, mask_BT)
    require_finite(step, "guide", inputs.guide_logps_BT, guide_tokens_BT)
    guide_B1 = inputs.guide_B[:, None]
    advantages_B1 = inputs.advantages_B.to(logps_BT)[:, None]
    guide_logps_BT = torch.where(guide_tokens_BT, inputs.guide_logps_BT, inputs.old_logps_BT)
    sampled_BT = guide_logps_BT if algorithm.guide_correction == "exact" else inputs.old_logps_BT
    ratio_BT = _ratio(logps_BT, sampled_BT)
    low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
    objective_BT = torch.minimum(ratio_BT * advantages_B1, ratio_BT.clamp(low, high) * advantages_B1)
    clippable_BT = mask_BT
    guide_ratio_BT = _ratio(inputs.old_logps_BT, guide_logps_BT)
    if algorithm.guide_correction in ("truncated", "shaped"):
        clippable_BT = mask_BT & ~guide_B1
        if algorithm.guide_correction == "truncated":
            gain_BT = guide_ratio_BT.clamp(max=algorithm.truncation_cap) * logps_BT
        else:
            prob_BT = logps_BT.exp()
            gain_BT = prob_BT / (prob_BT + algorithm.shaping_gamma)
        objective_BT = torch.where(guide_B1, gain_BT * advantages_B1, objective_BT)
    if inputs.sampling_weights_BT is not None:
        objective_BT = objective_BT * inputs.sampling_weights_BT.to(objective_BT)
    loss_BT = -objective_BT

    kl_BT = torch.zeros_like(logps_BT)
    if algorithm.kl_beta > 0:
        if inputs.ref_logps_BT is None:
            raise ValueError(f"step {step}: kl_beta {algorithm.kl_beta} needs ref_logps_BT")
        require_finite(step, "reference", inputs.ref_logps_BT, mask_BT)
        kl_BT = k3(logps_BT, inputs.ref_logps_BT)
        loss_BT = loss_BT + algorithm.kl_beta * kl_BT

    sums = LossSums(
        tokens=_total(mask_BT),
        clipped_low=_total(clippable_BT & (ratio_BT < low) & (advantages_B1 < 0)),
        clipped_high=_total(clippable_BT & (ratio_BT > high) & (advantages_B1 > 0)),
        kl=_total(kl_BT, mask_BT),
        guide_tokens=_total(guide_tokens_BT),
        guide_ratio=_total(guide_ratio_BT, guide_tokens_BT),
        guide_log_ratio=_total(guide_logps_BT - inputs.old_logps_BT, guide_tokens_BT),
    )
    return TokenLosses(torch.where(mask_BT, loss_BT, 0), sums)


def k3(logps_BT: Tensor, ref_logps_BT: Tensor) -> Tensor:
    """k3 estimate of KL(π_θ ‖ π_ref) from tokens of π_θ: exp(d) − d − 1 ≥ 0, d = log π_ref − log π_θ, clamped.

    Source: J. Schulman, "Approximating KL divergence" (2020).
    """
    difference_BT = (ref_logps_BT - logps_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference_BT.exp() - difference_BT - 1


def require_finite(step: int, name: str, logps_BT: Tensor, mask_BT: Tensor) -> None:
    """Checks the masked log-probabilities.

    Args:
        step: named in the error.
        name: whose log-probabilities they are; named in the error.
        logps_BT: log-probabilities.
        mask_BT: bool, the tokens that count.

    Raises:
        FloatingPointError: some are NaN, +inf or −inf.
    """
    bad_BT = mask_BT & ~logps_BT.isfinite()
    if bool(bad_BT.any()):
        row, token = torch.nonzero(bad_BT)[0].tolist()
        raise FloatingPointError(
            f"step {step}: {int(bad_BT.sum())} of {int(mask_BT.sum())} {name} log-probabilities are not finite, "
            f"the first is {logps_BT[row, token].item()} at row {row}, token {token} of its micro-batch"
        )


def _ratio(logps_BT: Tensor, sampled_BT: Tensor) -> Tensor:
    return (logps_BT - sampled_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _total(values_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Sum in float64, detached, over the mask if there is one."""
    values_BT = values_BT.detach()
    return (values_BT if mask_BT is None else torch.where(mask_BT, values_BT, 0)).sum(dtype=torch.float64)
