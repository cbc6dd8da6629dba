"""Which groups take guide trajectories, and into which slots (NPO, arXiv 2604.20733, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from npo_core.advantages import group_accuracy

GATE_TOLERANCE = 1e-9
"""Makes the gate inclusive in spite of rounding. Group accuracies of 0/1 rewards are exact (see `group_accuracy`);
fractional rewards such as 0.1 are not, and their mean may miss the gate by a few units in the last place. Two
accuracies that differ at all differ by far more than this."""


@dataclass(frozen=True)
class Replacement:
    """What mixing does to a batch of groups."""

    accuracy_P: Tensor
    """float64: group accuracy p̂ before the replacement."""
    eligible_P: Tensor
    """bool: p̂ ≤ τ_gate, whether there is a guide trajectory or not."""
    stored_P: Tensor
    """int64: how many guide trajectories of the prompt there are."""
    guide_PG: Tensor
    """int64: which of them takes the slot; −1 where the policy's own rollout stays."""

    def mix(self, policy_PG: Tensor, guide_PS: Tensor) -> Tensor:
        """The groups' values (rewards, say) with the guide's in the replaced slots.

        Args:
            policy_PG: values of the on-policy rollouts.
            guide_PS: values of the stored guide trajectories, S ≥ 1; anything where there is none.
        """
        taken_PG = guide_PS.to(policy_PG.dtype).gather(1, self.guide_PG.clamp(min=0))
        return torch.where(self.guide_PG >= 0, taken_PG, policy_PG)

    def metrics(self) -> dict[str, float]:
        """`npo/*` of the step: counts of groups, and the share of groups that pass the gate."""
        return {
            "npo/eligible": float(self.eligible_P.sum()),
            "npo/replaced": float((self.guide_PG >= 0).any(dim=1).sum()),
            "npo/guide_missing": float((self.eligible_P & (self.stored_P == 0)).sum()),
            "npo/gate_pass_rate": float(self.eligible_P.double().mean()),
        }


def plan_replacement(
    rewards_PG: Tensor,
    correct_PG: Tensor,
    stored_P: Tensor,
    gate: float,
    slot: Literal["last", "failed"],
    guide_slots: int = 1,
) -> Replacement:
    """Decides for each group which guide trajectories enter it, and where.

    A group takes some iff p̂ ≤ τ_gate (inclusive) and guide trajectories of its prompt are stored: the first one goes
    into the last slot that may be taken, the second into the one before it, and so on. Advantages are to be computed
    over the modified group.

    Args:
        rewards_PG: verified rewards of the on-policy rollouts.
        correct_PG: bool, the verdicts.
        stored_P: int64, how many guide trajectories there are.
        gate: τ_gate.
        slot: `last` takes the slots n − 1, n − 2, … (n − 1 alone is the paper); `failed` the last slots whose rollout
            is not correct, and leaves a group without one as it is.
        guide_slots: most slots that are taken, each by another trajectory.
    """
    accuracy_P = group_accuracy(rewards_PG)
    eligible_P = accuracy_P <= gate + GATE_TOLERANCE
    free_PG = torch.ones_like(correct_PG, dtype=torch.bool) if slot == "last" else ~correct_PG.bool()
    # 0 for the last free slot of a group, 1 for the one before it.
    turn_PG = free_PG.flip(1).cumsum(1).flip(1) - 1
    wanted_P = torch.where(eligible_P, stored_P.clamp(max=guide_slots), 0)
    return Replacement(
        accuracy_P, eligible_P, stored_P, torch.where(free_PG & (turn_PG < wanted_P[:, None]), turn_PG, -1)
    )
