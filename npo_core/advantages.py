"""Group-relative advantages (GRPO: DeepSeekMath, arXiv 2402.03300, section 4.1.2; Dr.GRPO: arXiv 2503.20783)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from npo_core.interfaces import NearFutureError


def group_accuracy(rewards_PG: Tensor) -> Tensor:
    """Group accuracy p̂ of each prompt: mean verified reward of its on-policy rollouts, before any replacement.

    The sum is divided by n, not multiplied by 1/n: k correct of n gives the float64 nearest to k/n, which is what the
    literal k/n in a configuration reads as.

    Returns:
        accuracy_P, float64.
    """
    return rewards_PG.double().sum(dim=1) / rewards_PG.shape[1]


def group_advantages(rewards_PG: Tensor, scale: Literal["group-std", "none"], eps: float) -> Tensor:
    """Advantages within each group, after mixing.

    A_i = (r_i − mean_j r_j) / (std_j r_j + ε) with the unbiased std (ddof 1): a lone success among 8 has A = 2.475.
    Without the scale, A_i = r_i − mean_j r_j (Dr.GRPO).

    Args:
        rewards_PG: rewards of the modified groups.
        scale: `AlgorithmSection.advantage_scale`.
        eps: ε, added to the std.

    Returns:
        advantages_PG, float64; exactly zero in a degenerate group: equal rewards, or a single rollout.

    Raises:
        NearFutureError: a reward is not finite.
    """
    rewards_PG = rewards_PG.double()
    if not bool(rewards_PG.isfinite().all()):
        p, g = torch.nonzero(~rewards_PG.isfinite())[0].tolist()
        raise NearFutureError(
            f"the reward of slot {g} in group {p} of the batch is {rewards_PG[p, g].item()}; "
            "a verifier must give finite rewards"
        )
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    # The mean of equal rewards may differ from them by a rounding error, which the std of such a group would blow up.
    degenerate_P1 = (rewards_PG == rewards_PG[:, :1]).all(dim=1, keepdim=True)
    if scale == "group-std":
        std_P1 = centred_PG.square().sum(dim=1, keepdim=True).div(max(rewards_PG.shape[1] - 1, 1)).sqrt()
        centred_PG = centred_PG / (std_P1 + eps)
    return torch.where(degenerate_P1, 0.0, centred_PG)
