"""AutoNPO's controller over random and adversarial streams of metrics: no store, no model, only its own rules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_core.controller import check, choose, confirmable, distances, trained_clock, trend
from npo_core.explain import rescaled
from npo_core.monitor import observe
from schemas.decisions import Candidate, DecisionCode, DecisionRecord, Estimate, MonitorState
from schemas.future import AutoNPOSection
from schemas.records import CheckpointRef

QUICK = AutoNPOSection(
    patience=4,
    trend_steps=8,
    trend_z=0.0,
    first_check=10,
    cooldown=6,
    max_interventions=3,
    lookback=20,
    min_pool=2,
)
SEGMENT = 2


def exactly(value: float) -> Estimate:
    return Estimate(value=value, low=value, high=value)


def saved(step: int) -> CheckpointRef:
    return CheckpointRef(leg_id="leg", step=step, digest=f"{step:064d}")


def probed(candidate: Candidate, quality: float, variance: float) -> Candidate:
    return candidate.model_copy(
        update={
            "prompts": 4,
            "samples": 32,
            "quality": exactly(quality),
            "variance": {"kl_token": exactly(variance)},
            "signal": {"kl_token": exactly(quality / variance)},
        }
    )


def decided(step: int, clock: int, start: int | None = None, source: str = "autonpo") -> DecisionRecord:
    """A decision in vain, or, with a start, one to roll back."""
    rolled = start is not None
    return DecisionRecord.model_validate(
        {
            "leg_id": "leg",
            "step": step,
            "intervene": rolled,
            "reason": "",
            "source": source,
            "code": "intervene" if rolled else "low-quality",
            "clock": clock,
            "start": start,
            "lookahead": step - start if start is not None else None,
            "window": step - start if start is not None else None,
            "created_at": "",
        }
    )


@dataclass
class Simulation:
    """A run under the controller: metrics come by trained step, so that a replay sees new ones."""

    rewards: Sequence[float]
    entropies: Sequence[float]
    qualities: Sequence[float]
    settings: AutoNPOSection = QUICK
    restore: bool = False
    """Serialise and restore the state at every segment's end."""
    decisions: list[DecisionRecord] = field(default_factory=list)
    state: MonitorState = field(default_factory=MonitorState)

    def run(self) -> list[tuple[int, int, int | None]]:
        """(clock, step, Δ or None) of every confirmed warning."""
        states = {0: self.state}
        step = clock = replay_until = 0
        for reward, entropy in zip(self.rewards, self.entropies, strict=True):
            state = observe(self.state, step, reward, entropy, self.groups(clock), self.settings)
            step, clock, self.state = step + 1, clock + 1, state
            if step % SEGMENT:
                continue
            if self.restore:
                self.state = MonitorState.model_validate_json(self.state.model_dump_json())
                self.decisions = [DecisionRecord.model_validate_json(d.model_dump_json()) for d in self.decisions]
            states[step] = self.state
            assert trained_clock(self.decisions, step) == clock
            verdict = check(self.state, step, self.decisions, self.settings, replaying=step < replay_until)
            if verdict.code is not DecisionCode.WARNING:
                assert not verdict.code.warned
                continue
            span = max(self.settings.patience + 1, self.settings.trend_steps)
            seen = self.state.observations[-span:]
            assert all(o.reward is not None and o.entropy is not None for o in seen), "a NaN triggered"
            candidates = distances(self.state, step, {s: saved(s) for s in states if s < step}, self.settings)
            measured = [
                probed(c, self.qualities[(clock + c.lookahead) % len(self.qualities)], 1 + c.lookahead / 10)
                for c in candidates
            ]
            chosen = choose(measured, self.settings).chosen
            if chosen is None:
                self.decisions.append(decided(step, clock))
                continue
            assert chosen.parent.step in states, "a distance without a saved checkpoint"
            assert chosen.parent.step == step - chosen.lookahead
            self.decisions.append(decided(step, clock, chosen.parent.step))
            replay_until, step = step, chosen.parent.step
            self.state = states[step]
            states = {s: state for s, state in states.items() if s <= step}
        return [(d.clock or 0, d.step, d.lookahead) for d in self.decisions]

    def groups(self, clock: int) -> list[tuple[str, float]]:
        return [(f"p{clock % 7}", 0.0), (f"p{clock % 5 + 7}", 1.0)]


numbers = st.one_of(
    st.floats(0, 1),
    st.sampled_from([0.0, 0.5, 1.0, math.nan, math.inf, -math.inf]),
)
streams = st.integers(20, 160).flatmap(
    lambda n: st.tuples(
        st.lists(numbers, min_size=n, max_size=n),
        st.lists(st.one_of(numbers, st.floats(0, 10)), min_size=n, max_size=n),
        st.lists(st.floats(0, 1), min_size=1, max_size=6),
    )
)
stalled = st.integers(40, 200).flatmap(
    # Flat reward and falling entropy: what fires as often as it is allowed to.
    lambda n: st.tuples(
        st.just([0.5] * n), st.just([1 - i / 1000 for i in range(n)]), st.lists(st.floats(0.3, 1), min_size=1)
    )
)


@given(st.one_of(streams, stalled))
def test_interventions_keep_their_distance_and_their_budget(stream: tuple[list[float], ...]) -> None:
    made = Simulation(*stream).run()
    rolled = [(clock, lookahead) for clock, _, lookahead in made if lookahead is not None]
    assert len(rolled) <= QUICK.max_interventions
    for (before, lookahead), (after, _) in itertools.pairwise(rolled):
        assert after >= before + lookahead + QUICK.cooldown
    assert all(clock >= QUICK.first_check for clock, _, _ in made)


@given(st.one_of(streams, stalled))
def test_the_same_stream_decides_the_same_whether_or_not_the_state_was_stored_in_between(
    stream: tuple[list[float], ...],
) -> None:
    assert Simulation(*stream).run() == Simulation(*stream).run() == Simulation(*stream, restore=True).run()


def test_a_stalled_reward_with_falling_entropy_intervenes_until_the_budget_is_spent() -> None:
    n = 200
    made = Simulation([0.5] * n, [1 - i / 1000 for i in range(n)], [1.0]).run()
    assert sum(lookahead is not None for _, _, lookahead in made) == QUICK.max_interventions


@pytest.mark.parametrize("metric", ["reward", "entropy"])
def test_one_value_that_is_not_finite_silences_the_trigger_as_long_as_it_is_looked_back_at(metric: str) -> None:
    n, lost = 60, 20
    rewards, entropies = [0.5] * n, [1 - i / 1000 for i in range(n)]
    (rewards if metric == "reward" else entropies)[lost] = math.nan
    quiet = QUICK.model_copy(update={"max_interventions": 0})
    settings = quiet.model_copy(update={"max_interventions": 1, "first_check": 1, "min_pool": 10_000})
    state, codes = MonitorState(), {}
    for step in range(n):
        state = observe(state, step, rewards[step], entropies[step], [], settings)
        codes[step + 1] = check(state, step + 1, [], settings).code
    assert codes[lost] is DecisionCode.WARNING
    assert all(codes[step] is DecisionCode.NOT_FINITE for step in range(lost + 1, lost + 9))
    assert codes[lost + 9] is DecisionCode.WARNING


def fed(rewards: Sequence[float], entropies: Sequence[float], settings: AutoNPOSection) -> MonitorState:
    state = MonitorState()
    for step, (reward, entropy) in enumerate(zip(rewards, entropies, strict=True)):
        state = observe(state, step, reward, entropy, [], settings)
    return state


FALLING = [1 - i / 1000 for i in range(40)]


@pytest.mark.parametrize(
    ("rewards", "entropies", "code"),
    [
        ([0.5] * 40, FALLING, DecisionCode.WARNING),
        ([i / 40 for i in range(40)], FALLING, DecisionCode.REWARD_RISES),
        ([0.5] * 40, FALLING[::-1], DecisionCode.ENTROPY_HOLDS),
        ([0.5] * 6, FALLING[:6], DecisionCode.TOO_SHORT),
    ],
)
def test_what_the_trigger_says(rewards: list[float], entropies: list[float], code: DecisionCode) -> None:
    settings = QUICK.model_copy(update={"first_check": 1})
    assert check(fed(rewards, entropies, settings), len(rewards), [], settings).code is code


def test_a_run_that_rises_in_noise_warns_by_its_averages_and_not_by_its_trend() -> None:
    rng = np.random.default_rng(0)
    n = 200
    rewards = np.linspace(0.1, 0.6, n) + 0.15 * rng.standard_normal(n)
    entropies = np.linspace(0.5, 0.1, n)

    def warnings(settings: AutoNPOSection) -> int:
        states = [fed(rewards[:stop], entropies[:stop], settings) for stop in range(100, n, 10)]
        return sum(check(s, len(rewards), [], settings).code is DecisionCode.WARNING for s in states)

    assert warnings(AutoNPOSection(trend_steps=8, trend_z=0.0)) > 0, "the averages alone are fooled by noise"
    assert warnings(AutoNPOSection()) == 0


def test_the_trend_is_the_least_squares_line_and_its_standard_error() -> None:
    rng = np.random.default_rng(1)
    y = 0.01 * np.arange(50) + rng.standard_normal(50)
    (slope, _), covariance = np.polyfit(np.arange(50), y, 1, cov=True)
    gain, bound = trend(list(y), 20, 1.5)
    assert gain == pytest.approx(20 * slope)
    assert bound == pytest.approx(20 * (slope + 1.5 * np.sqrt(covariance[0, 0])))


def test_the_cooldown_counts_trained_steps_from_the_end_of_the_replay() -> None:
    state = fed([0.5] * 40, FALLING, QUICK)
    before = [decided(30, clock=30, start=20)]
    assert trained_clock(before, 30) == 40
    codes = {step: check(state, step, before, QUICK).code for step in range(30, 40)}
    assert [step for step, code in codes.items() if code is DecisionCode.COOLDOWN] == [*range(30, 36)]
    assert codes[36] is DecisionCode.WARNING


def test_a_users_rollback_moves_the_clock_and_spends_no_budget() -> None:
    settings = QUICK.model_copy(update={"max_interventions": 1})
    asked_for = [decided(30, clock=30, start=10, source="schedule")]
    assert trained_clock(asked_for, 36) == 56
    assert check(fed([0.5] * 40, FALLING, settings), 40, asked_for, settings).code is DecisionCode.WARNING


def test_nothing_is_checked_while_a_guide_is_replayed() -> None:
    assert check(fed([0.5] * 40, FALLING, QUICK), 40, [], QUICK, replaying=True).code is DecisionCode.REPLAYING


def at(lookahead: int, pool: int = 8) -> Candidate:
    return Candidate(lookahead=lookahead, parent=saved(100 - lookahead), pool=pool, prompts=0, samples=0)


def test_the_distance_is_the_one_with_the_best_ratio_and_the_nearest_among_equals() -> None:
    measured = [probed(at(10), 0.4, 1.0), probed(at(20), 0.8, 1.6), probed(at(30), 1.0, 2.0), probed(at(40), 1.0, 4.0)]
    verdict = choose(measured, QUICK)
    assert verdict.chosen is not None
    assert verdict.chosen.lookahead == 20
    assert "Δ = 20" in verdict.reason


def test_a_distance_with_too_few_mistakes_is_not_chosen() -> None:
    verdict = choose([probed(at(10, pool=1), 1.0, 1.0), probed(at(20), 0.4, 1.0)], QUICK)
    assert verdict.chosen is not None
    assert verdict.chosen.lookahead == 20


def test_a_best_distance_of_low_quality_is_refused() -> None:
    verdict = choose([probed(at(10), 0.1, 1.0), probed(at(20), 0.2, 3.0)], QUICK)
    assert (verdict.code, verdict.chosen) == (DecisionCode.LOW_QUALITY, None)


def test_a_probe_is_not_made_where_it_cannot_confirm() -> None:
    assert (confirmable([], QUICK) or at(1)).code is DecisionCode.NO_CHECKPOINT  # type: ignore[union-attr]
    assert (confirmable([at(10, pool=1)], QUICK) or at(1)).code is DecisionCode.POOL_TOO_SMALL  # type: ignore[union-attr]
    assert confirmable([at(10, pool=1), at(20, pool=2)], QUICK) is None


@given(st.sets(st.integers(0, 60)), st.integers(1, 60), st.integers(1, 40))
def test_distances_are_those_to_saved_checkpoints_within_the_lookback(
    steps: set[int], step: int, lookback: int
) -> None:
    settings = QUICK.model_copy(update={"lookback": lookback})
    found = distances(MonitorState(), step, {s: saved(s) for s in steps}, settings)
    assert [c.parent.step for c in found] == sorted((s for s in steps if 0 < step - s <= lookback), reverse=True)
    assert all(c.parent.step == step - c.lookahead for c in found)


def test_another_kappa_raises_the_variance_cost_to_a_power_and_divides_the_quality_by_it() -> None:
    before = probed(at(10), 0.5, 1.5)
    doubled = rescaled(before, QUICK, QUICK.model_copy(update={"kappa": 2 * QUICK.kappa}))
    assert doubled.variance["kl_token"] == exactly(1.5**2)
    assert doubled.signal["kl_token"] == exactly(0.5 / 1.5**2)
    assert rescaled(before, QUICK, QUICK) == before
