"""The gate, the slot and the modified group."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npo_core.advantages import group_advantages
from npo_core.mixing import Replacement, plan_replacement


def outcomes(*counts: tuple[int, int]) -> Tensor:
    """Rewards of groups in which the first k of n rollouts are right."""
    return torch.stack([(torch.arange(n) < k).double() for k, n in counts])


def everywhere(rewards_PG: Tensor, stored: int = 1) -> Tensor:
    """As many guide trajectories for every prompt."""
    return torch.full((len(rewards_PG),), stored)


def slots(plan: Replacement) -> list[dict[int, int]]:
    """By group: which slot which guide trajectory takes."""
    return [{slot: taken for slot, taken in enumerate(group) if taken >= 0} for group in plan.guide_PG.tolist()]


@pytest.mark.parametrize(
    ("correct", "rollouts", "gate"),
    [(3, 5, 0.6), (6, 10, 0.6), (9, 15, 0.6), (18, 30, 0.6), (5, 8, 0.625), (1, 8, 0.125), (7, 10, 0.7), (1, 3, 1 / 3)],
)
def test_the_gate_is_inclusive(correct: int, rollouts: int, gate: float) -> None:
    rewards_PG = outcomes((correct, rollouts), (correct + 1, rollouts))
    plan = plan_replacement(rewards_PG, rewards_PG > 0, everywhere(rewards_PG), gate, "last")
    assert plan.eligible_P.tolist() == [True, False]
    assert slots(plan) == [{rollouts - 1: 0}, {}]


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(0, 100))
def test_the_gate_decides_as_exact_arithmetic_does(rollouts: int, percent: int) -> None:
    rewards_PG = outcomes(*((k, rollouts) for k in range(rollouts + 1)))
    plan = plan_replacement(rewards_PG, rewards_PG > 0, everywhere(rewards_PG), percent / 100, "last")
    exact = [Fraction(k, rollouts) <= Fraction(percent, 100) for k in range(rollouts + 1)]
    assert plan.eligible_P.tolist() == exact


# In float64 the means are 0.20000000000000004 and 0.6000000000000001.
@pytest.mark.parametrize(("rewards", "gate"), [([0.1, 0.2, 0.3], 0.2), ([0.1, 0.7, 0.8, 0.8], 0.6)])
def test_rounding_does_not_hold_fractional_rewards_back_at_the_gate(rewards: list[float], gate: float) -> None:
    rewards_PG = torch.tensor([rewards], dtype=torch.float64)
    plan = plan_replacement(rewards_PG, rewards_PG > 0.5, everywhere(rewards_PG), gate, "last")
    assert plan.accuracy_P.item() > gate
    assert plan.eligible_P.tolist() == [True]


def test_only_prompts_with_a_guide_trajectory_are_replaced() -> None:
    rewards_PG = outcomes((0, 8), (2, 8), (8, 8), (7, 8))
    stored_P = torch.tensor([1, 0, 1, 0])
    plan = plan_replacement(rewards_PG, rewards_PG > 0, stored_P, 0.6, "last")
    assert plan.accuracy_P.tolist() == [0.0, 0.25, 1.0, 0.875]
    assert plan.eligible_P.tolist() == [True, True, False, False]
    assert slots(plan) == [{7: 0}, {}, {}, {}]
    assert plan.metrics() == {
        "npo/eligible": 2.0,
        "npo/replaced": 1.0,
        "npo/guide_missing": 1.0,
        "npo/gate_pass_rate": 0.5,
    }


def test_slot_failed_takes_the_last_failed_rollout_and_spares_groups_without_one() -> None:
    correct_PG = torch.tensor([[True, False, False, True], [False, True, True, True], [True, True, True, True]])
    # Fractional rewards: the third group is right everywhere and still below the gate.
    rewards_PG = torch.where(correct_PG, 0.5, 0.0).double()
    plan = plan_replacement(rewards_PG, correct_PG, everywhere(rewards_PG), 0.6, "failed")
    assert plan.eligible_P.tolist() == [True, True, True]
    assert slots(plan) == [{2: 0}, {0: 0}, {}]
    assert plan.metrics()["npo/replaced"] == 2.0


def test_slot_last_displaces_a_success_too() -> None:
    rewards_PG = torch.tensor([[0.0, 0.0, 1.0]])
    plan = plan_replacement(rewards_PG, rewards_PG > 0, everywhere(rewards_PG), 0.6, "last")
    assert slots(plan) == [{2: 0}]


def test_advantages_follow_the_modified_group() -> None:
    rewards_PG = outcomes((0, 8), (8, 8))
    plan = plan_replacement(rewards_PG, rewards_PG > 0, everywhere(rewards_PG), 0.6, "last")
    mixed_PG = plan.mix(rewards_PG, torch.tensor([[1.0], [torch.nan]]))
    assert mixed_PG.tolist() == [[0.0] * 7 + [1.0], [1.0] * 8]
    advantages_PG = group_advantages(mixed_PG, "group-std", 1e-6)
    assert round(advantages_PG[0, 7].item(), 3) == 2.475
    assert advantages_PG[1].tolist() == [0.0] * 8
    assert rewards_PG[0].sum() == 0, "the on-policy rewards stay as they were"


def test_a_group_of_one_becomes_the_guide_trajectory_and_teaches_nothing() -> None:
    rewards_PG = torch.zeros(1, 1)
    plan = plan_replacement(rewards_PG, rewards_PG > 0, everywhere(rewards_PG), 0.6, "last")
    mixed_PG = plan.mix(rewards_PG, torch.ones(1, 1))
    assert (slots(plan), mixed_PG.tolist()) == ([{0: 0}], [[1.0]])
    assert group_advantages(mixed_PG, "group-std", 1e-6).tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("slot", "stored", "taken"),
    [
        ("last", 1, {4: 0}),  # fewer are stored than slots may be taken
        ("last", 2, {4: 0, 3: 1}),
        ("last", 3, {4: 0, 3: 1}),
        ("failed", 3, {3: 0, 1: 1}),
        ("last", 0, {}),
    ],
)
def test_several_slots_take_one_trajectory_each_from_the_last_slot_on(
    slot: Literal["last", "failed"], stored: int, taken: dict[int, int]
) -> None:
    rewards_PG = torch.tensor([[0.0, 0.0, 1.0, 0.0, 1.0], [1.0] * 5])
    plan = plan_replacement(rewards_PG, rewards_PG > 0, everywhere(rewards_PG, stored), 0.6, slot, guide_slots=2)
    assert slots(plan) == [taken, {}]
    assert plan.metrics()["npo/replaced"] == bool(taken), "groups are counted, not slots"
    guide_PS = torch.tensor([[0.25, 0.75, 9.0], [9.0, 9.0, 9.0]])
    wanted = [{0: 0.25, 1: 0.75}[taken[g]] if g in taken else r for g, r in enumerate(rewards_PG[0].tolist())]
    assert plan.mix(rewards_PG, guide_PS).tolist() == [wanted, [1.0] * 5]


def test_slot_failed_takes_no_more_slots_than_have_failed() -> None:
    correct_PG = torch.tensor([[True, False, True, True]])
    rewards_PG = torch.where(correct_PG, 0.5, 0.0).double()
    plan = plan_replacement(rewards_PG, correct_PG, everywhere(rewards_PG, 3), 0.6, "failed", guide_slots=3)
    assert slots(plan) == [{1: 0}]
