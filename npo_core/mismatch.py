"""Correction for a sampler that is not quite the trainer: the same weights in two engines give two distributions.

With ρ = π_trainer/π_sampler of a sampled token, the weights multiply the policy's part of its loss (not the KL term, as
in TRL and verl) and carry no gradient:

- `none`: 1;
- `token-truncated`: min(ρ_t, c), truncated importance sampling of each token (F. Yao et al., "Your Efficient RL
  Framework Secretly Brings You Off-Policy RL Training", 2025; the documentation of TRL's `GRPOConfig` and of ms-swift
  name it `token_truncate`);
- `sequence-mask`: ρ = Π_t ρ_t for each token of the row, and 0 for a row whose ρ exceeds c (J. Liu et al., "When Speed
  Kills Stability", 2025; there `sequence_mask`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from npo_core.losses import MAX_LOG_RATIO

Correction = Literal["none", "token-truncated", "sequence-mask"]


def sampling_weights(
    trainer_logps_BT: Tensor, sampler_logps_BT: Tensor, mask_BT: Tensor, correction: Correction, cap: float
) -> Tensor:
    """The weights of the token losses, [B, T], detached, 0 where the mask is off.

    Args:
        trainer_logps_BT: log-probabilities by the trainer, under the weights that sampled.
        sampler_logps_BT: of the same tokens, by the engine that sampled them.
        mask_BT: bool, the tokens that count.
        correction: see the module.
        cap: c > 0.
    """
    log_ratio_BT = _log_ratio(trainer_logps_BT, sampler_logps_BT, mask_BT)
    match correction:
        case "none":
            weights_BT = torch.ones_like(log_ratio_BT)
        case "token-truncated":
            weights_BT = log_ratio_BT.exp().clamp(max=cap)
        case "sequence-mask":
            ratio_B1 = log_ratio_BT.sum(dim=1, keepdim=True).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
            weights_BT = torch.where(ratio_B1 > cap, 0, ratio_B1).expand_as(log_ratio_BT)
    return torch.where(mask_BT, weights_BT, 0)


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class SamplingSums:
    """How far sampler and trainer are apart on the sampled tokens, and what the correction made of it: float64 scalars
    over tokens, from which metrics follow. Those of micro-batches add up; `SamplingSums()` is the sum of none."""

    tokens: Tensor = field(default_factory=_zero)
    difference: Tensor = field(default_factory=_zero)
    """Σ |log ρ|."""
    weight: Tensor = field(default_factory=_zero)
    """Σ w."""
    square: Tensor = field(default_factory=_zero)
    """Σ w²."""
    corrected: Tensor = field(default_factory=_zero)
    """Tokens that were truncated or masked."""
    largest: Tensor = field(default_factory=lambda: torch.tensor([0.0, -math.inf, -math.inf], dtype=torch.float64))
    """max |log ρ|, max w and max −w, which do not add up."""

    @classmethod
    def of(
        cls, trainer_logps_BT: Tensor, sampler_logps_BT: Tensor, mask_BT: Tensor, correction: Correction, cap: float
    ) -> SamplingSums:
        """Those of some rows; see `sampling_weights`."""
        if not bool(mask_BT.any()):
            return cls()
        log_ratio_N = _log_ratio(trainer_logps_BT, sampler_logps_BT, mask_BT)[mask_BT]
        weights_N = sampling_weights(trainer_logps_BT, sampler_logps_BT, mask_BT, correction, cap)[mask_BT]
        corrected_N = {
            "none": torch.zeros_like(weights_N),
            "token-truncated": log_ratio_N.exp() > cap,
            "sequence-mask": weights_N == 0,
        }[correction]
        return cls(
            tokens=mask_BT.sum(dtype=torch.float64),
            difference=log_ratio_N.abs().sum(),
            weight=weights_N.sum(),
            square=weights_N.square().sum(),
            corrected=corrected_N.sum(dtype=torch.float64),
            largest=torch.stack([log_ratio_N.abs().max(), weights_N.max(), -weights_N.min()]),
        )

    def __add__(self, other: SamplingSums) -> SamplingSums:
        sums = [getattr(self, f.name) + getattr(other, f.name) for f in fields(self)[:-1]]
        sums.append(torch.maximum(self.largest, other.largest.to(self.largest.device)))
        return SamplingSums(*sums)

    def metrics(self) -> dict[str, float]:
        """`sampling/*`, empty if there are no tokens; as in TRL, the importance sampling ratio is the weight w.

        `sampling/ess` is the relative effective sample size of the tokens' weights, (Σw)²/(n·Σw²), in (0, 1]; 0 if no
        token has weight.
        """
        if not (tokens := self.tokens.item()):
            return {}
        square = self.square.item()
        difference, weight, negative = self.largest.tolist()
        return {
            "sampling/sampling_logp_difference/mean": self.difference.item() / tokens,
            "sampling/sampling_logp_difference/max": difference,
            "sampling/importance_sampling_ratio/min": -negative,
            "sampling/importance_sampling_ratio/mean": self.weight.item() / tokens,
            "sampling/importance_sampling_ratio/max": weight,
            "sampling/ess": self.weight.item() ** 2 / (tokens * square) if square > 0 else 0.0,
            "sampling/corrected": self.corrected.item() / tokens,
        }


def _log_ratio(trainer_logps_BT: Tensor, sampler_logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log ρ in float64, clamped, detached, 0 where the mask is off."""
    difference_BT = trainer_logps_BT.detach().double() - sampler_logps_BT.detach().double()
    return torch.where(mask_BT, difference_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), 0)
