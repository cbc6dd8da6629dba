"""Which groups take a guide trajectory, and into which slot (NPO, arXiv 2604.20733, section 3.1)."""

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
    has_guide_P: Tensor
    """bool: a guide trajectory of the prompt is stored."""
    slot_P: Tensor
    """int64: the slot that the guide trajectory takes; −1 where the group stays as it is."""

    def mix(self, policy_PG: Tensor, guide_P: Tensor) -> Tensor:
        """The groups' values (rewards, say) with the guide's in the replaced slots.

        Args:
            policy_PG: values of the on-policy rollouts.
            guide_P: values of the guide trajectories; anything where there is none.
        """
        slots_G = torch.arange(policy_PG.shape[1], device=policy_PG.device)
        return torch.where(slots_G == self.slot_P[:, None], guide_P[:, None].to(policy_PG.dtype), policy_PG)

    def metrics(self) -> dict[str, float]:
        """`npo/*` of the step: counts of groups, and the share of groups that pass the gate."""
        return {
            "npo/eligible": float(self.eligible_P.sum()),
            "npo/replaced": float((self.slot_P >= 0).sum()),
            "npo/guide_missing": float((self.eligible_P & ~self.has_guide_P).sum()),
            "npo/gate_pass_rate": float(self.eligible_P.double().mean()),
        }


def plan_replacement(
    rewards_PG: Tensor, correct_PG: Tensor, has_guide_P: Tensor, gate: float, slot: Literal["last", "failed"]
) -> Replacement:
    """Decides for each group whether a guide trajectory enters it, and where.

    A group takes one iff p̂ ≤ τ_gate (inclusive) and its prompt has a stored guide trajectory. Advantages are to be
    computed over the modified group.

    Args:
        rewards_PG: verified rewards of the on-policy rollouts.
        correct_PG: bool, the verdicts.
        has_guide_P: bool.
        gate: τ_gate.
        slot: `last` takes slot n − 1 (the paper); `failed` the last slot whose rollout is not correct, and leaves a
            group without one as it is.
    """
    accuracy_P = group_accuracy(rewards_PG)
    eligible_P = accuracy_P <= gate + GATE_TOLERANCE
    slots_PG = torch.arange(rewards_PG.shape[1], device=rewards_PG.device).expand_as(correct_PG)
    candidates_PG = slots_PG if slot == "last" else slots_PG.masked_fill(correct_PG.bool(), -1)
    return Replacement(
        accuracy_P, eligible_P, has_guide_P, torch.where(eligible_P & has_guide_P, candidates_PG.amax(dim=1), -1)
    )
