"""Correction for a sampler that is not quite the trainer: the same weights in two engines give two distributions.

With ρ = π_trainer/π_sampler of a sampled token, the weights multiply a row's token losses and carry no gradient:

- `none`: 1;
- `token-truncated`: min(ρ_t, c), truncated importance sampling of each token (F. Yao et al., "Your Efficient RL
  Framework Secretly Brings You Off-Policy RL Training", 2025; the documentation of TRL's `GRPOConfig` and of ms-swift
  name it `token_truncate`);
- `sequence-mask`: ρ = Π_t ρ_t for each token of the row, and 0 for a row whose ρ exceeds c (J. Liu et al., "When Speed
  Kills Stability", 2025; there `sequence_mask`).
"""

from __future__ import annotations

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


def sampling_metrics(
    trainer_logps_BT: Tensor, sampler_logps_BT: Tensor, mask_BT: Tensor, correction: Correction, cap: float
) -> dict[str, float]:
    """How far sampler and trainer are apart on the sampled tokens, and what the correction made of it.

    `sampling/ess` is the relative effective sample size of the tokens' weights, (Σw)²/(n·Σw²), in (0, 1]; 0 if no
    token has weight. `sampling/corrected` is the share of tokens that were truncated or masked.
    """
    log_ratio_BT = _log_ratio(trainer_logps_BT, sampler_logps_BT, mask_BT)
    log_ratio_N = log_ratio_BT[mask_BT]
    weights_N = sampling_weights(trainer_logps_BT, sampler_logps_BT, mask_BT, correction, cap)[mask_BT]
    squares = weights_N.square().sum()
    corrected_N = {
        "none": torch.zeros_like(mask_BT[mask_BT]),
        "token-truncated": log_ratio_N.exp() > cap,
        "sequence-mask": weights_N == 0,
    }[correction]
    return {
        "sampling/logp_difference_mean": log_ratio_N.abs().mean().item(),
        "sampling/logp_difference_max": log_ratio_N.abs().max().item(),
        "sampling/ratio_mean": log_ratio_N.exp().mean().item(),
        "sampling/corrected": corrected_N.double().mean().item(),
        "sampling/ess": (weights_N.sum().square() / (len(weights_N) * squares)).item() if squares > 0 else 0.0,
    }


def _log_ratio(trainer_logps_BT: Tensor, sampler_logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log ρ in float64, clamped, detached, 0 where the mask is off."""
    difference_BT = trainer_logps_BT.detach().double() - sampler_logps_BT.detach().double()
    return torch.where(mask_BT, difference_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), 0)
