"""Group-relative advantages."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npo_core.advantages import group_accuracy, group_advantages
from npo_core.interfaces import NearFutureError

rewards = st.integers(1, 10).flatmap(
    lambda n: st.lists(
        st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]), min_size=n, max_size=n), min_size=1, max_size=6
    )
)


def test_lone_success_among_eight_has_the_unbiased_advantage() -> None:
    rewards_PG = torch.tensor([[0.0] * 7 + [1.0]])
    advantages_PG = group_advantages(rewards_PG, "group-std", 0.0)
    assert advantages_PG.dtype == torch.float64
    assert advantages_PG[0, 7].item() == pytest.approx((7 / 8) / math.sqrt(1 / 8), rel=1e-14)
    assert round(group_advantages(rewards_PG, "group-std", 1e-6)[0, 7].item(), 3) == 2.475


def test_eps_is_inside_the_denominator() -> None:
    # Rewards 0 and 1: mean 0.5, unbiased std sqrt(0.5).
    advantages_PG = group_advantages(torch.tensor([[0.0, 1.0]]), "group-std", 0.25)
    assert advantages_PG[0, 1].item() == pytest.approx(0.5 / (math.sqrt(0.5) + 0.25), rel=1e-14)


def test_without_scale_rewards_are_only_centred() -> None:
    advantages_PG = group_advantages(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), "none", 1e-6)
    assert advantages_PG.tolist() == [[-0.25, -0.25, -0.25, 0.75]]


@pytest.mark.parametrize("scale", ["group-std", "none"])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
# The mean of seven or ten times 0.1 is not 0.1 in float64.
@pytest.mark.parametrize("group", [[0.0] * 8, [1.0] * 8, [0.1] * 7, [0.1] * 10, [1 / 3] * 3, [1.0], [0.0]])
def test_degenerate_groups_have_exactly_zero_advantage(scale: str, eps: float, group: list[float]) -> None:
    advantages_PG = group_advantages(torch.tensor([group], dtype=torch.float64), scale, eps)  # type: ignore[arg-type]
    assert advantages_PG.tolist() == [[0.0] * len(group)]


@settings(deadline=None)
@given(rewards)
def test_agrees_with_the_formula_by_torch_std(groups: list[list[float]]) -> None:
    rewards_PG = torch.tensor(groups, dtype=torch.float64)
    advantages_PG = group_advantages(rewards_PG, "group-std", 1e-6)
    for rewards_G, advantages_G in zip(rewards_PG, advantages_PG, strict=True):
        if len(set(rewards_G.tolist())) == 1:
            assert advantages_G.tolist() == [0.0] * len(rewards_G)
        else:
            expected_G = (rewards_G - rewards_G.mean()) / (rewards_G.std(correction=1) + 1e-6)
            torch.testing.assert_close(advantages_G, expected_G, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(rewards, st.randoms())
def test_groups_do_not_depend_on_their_order(groups: list[list[float]], random: object) -> None:
    order = list(range(len(groups)))
    random.shuffle(order)  # type: ignore[attr-defined]
    rewards_PG = torch.tensor(groups, dtype=torch.float64)
    advantages_PG = group_advantages(rewards_PG, "group-std", 1e-6)
    torch.testing.assert_close(
        group_advantages(rewards_PG[order], "group-std", 1e-6), advantages_PG[order], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_named(value: float) -> None:
    rewards_PG = torch.zeros(3, 4)
    rewards_PG[1, 2] = value
    with pytest.raises(NearFutureError, match=f"slot 2 in group 1 of the batch is {value}"):
        group_advantages(rewards_PG, "group-std", 1e-6)


@settings(deadline=None)
@given(st.integers(1, 64).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_accuracy_of_k_of_n_is_the_float_nearest_to_the_fraction(counts: tuple[int, int]) -> None:
    correct, rollouts = counts
    rewards_PG = (torch.arange(rollouts) < correct).float()[None]
    assert group_accuracy(rewards_PG).tolist() == [correct / rollouts]
