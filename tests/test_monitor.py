"""AutoNPO's memory: averages and the mistake pool, and the probe's draw from it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_core.monitor import observe, recent_mistakes
from npo_core.probe import plan_probe
from schemas.decisions import Mistake, MonitorState
from schemas.future import AutoNPOSection

SETTINGS = AutoNPOSection(ema_weight=0.25, patience=4, trend_steps=8, lookback=10, mistake_threshold=0.125)


def test_averages_begin_at_the_first_finite_value_and_skip_what_is_not() -> None:
    state = MonitorState()
    for step, reward in enumerate([math.nan, 0.4, math.inf, 0.8]):
        state = observe(state, step, reward, 1.0, [], SETTINGS)
    assert [o.reward for o in state.observations] == [None, 0.4, None, 0.8]
    assert [o.reward_ema for o in state.observations] == [None, 0.4, 0.4, pytest.approx(0.5)]
    assert [o.entropy_ema for o in state.observations] == [1.0] * 4


def test_only_what_the_trigger_looks_back_at_is_kept() -> None:
    state = MonitorState()
    for step in range(30):
        state = observe(state, step, 0.5, 0.5, [], SETTINGS)
    assert [o.step for o in state.observations] == [*range(22, 30)]


def test_the_threshold_is_inclusive() -> None:
    state = observe(MonitorState(), 3, 0.5, 0.5, [("b", 0.125), ("a", 0.0), ("c", 0.25)], SETTINGS)
    assert state.pool == (Mistake("a", 3, 0.0), Mistake("b", 3, 0.125))


def test_mistakes_leave_the_pool_after_the_lookback_and_the_oldest_first_when_it_is_full() -> None:
    settings = SETTINGS.model_copy(update={"pool_capacity": 4})
    state = MonitorState()
    for step in range(25):
        state = observe(state, step, 0.5, 0.5, [(f"p{step}", 0.0)] if step in (0, 12) else [], settings)
    assert state.pool == ()
    for step in range(25, 31):
        state = observe(state, step, 0.5, 0.5, [(f"p{step}", 0.0)], settings)
    assert [m.step for m in state.pool] == [27, 28, 29, 30]


def test_a_farther_distance_holds_the_mistakes_of_the_nearer_ones() -> None:
    pool = [Mistake("a", 1, 0.0), Mistake("b", 3, 0.0), Mistake("a", 5, 0.125), Mistake("c", 8, 0.0)]
    assert recent_mistakes(pool, 9, 2) == (pool[3],)
    assert recent_mistakes(pool, 9, 5) == (pool[2], pool[3])
    assert recent_mistakes(pool, 9, 9) == (pool[2], pool[1], pool[3]), "of each prompt the newest mistake"
    assert recent_mistakes(pool, 5, 5) == (pool[0], pool[1]), "what fails at t or later is not yet known at t"


groups = st.lists(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from([0.0, 0.125, 0.5])), max_size=4))


@given(groups)
def test_the_state_survives_json_bit_for_bit(steps: list[list[tuple[str, float]]]) -> None:
    state = MonitorState()
    for step, seen in enumerate(steps):
        state = observe(state, step, 1 / (step + 3), math.pi / (step + 1), seen, SETTINGS)
    assert MonitorState.model_validate_json(state.model_dump_json()) == state


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 59)), max_size=120),
    st.sets(st.integers(1, 60), min_size=1, max_size=6),
    st.integers(1, 50),
)
def test_the_probe_draws_distinct_mistakes_from_every_band(
    failed: list[tuple[int, int]], lookaheads: set[int], count: int
) -> None:
    pool = [Mistake(f"p{prompt}", step, 0.0) for prompt, step in failed]
    near = sorted(lookaheads)
    prompts, bands = plan_probe(pool, 60, near, count, seed=1)
    assert (prompts, bands) == plan_probe(pool, 60, near, count, seed=1)
    reach = recent_mistakes(pool, 60, near[-1])
    assert len(prompts) == len(set(prompts)) == min(count, len(reach))
    assert [row for band in bands for row in band.rows] == [*range(len(prompts))]
    for n, lookahead in enumerate(near):
        own = {m.prompt_id for m in recent_mistakes(pool, 60, lookahead)}
        assert sum(band.size for band in bands[: n + 1]) == len(own)
        assert {prompts[row] for band in bands[: n + 1] for row in band.rows} <= own
    drawn = [len(band.rows) for band in bands]
    # Even shares: a band has fewer than another only where it is exhausted, or by the last round's one.
    assert all(few >= many - 1 or few == band.size for band, few in zip(bands, drawn, strict=True) for many in drawn)
