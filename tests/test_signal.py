"""Q̂, V̂ and Ŝ: closed forms, bounds and intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from npo_core.signal import Band, compare_policies, coverage, estimate

WHOLE = [Band(6, tuple(range(6)))]


def rows(values: list[list[float]]) -> list[np.ndarray]:
    return [np.array(row, np.float32) for row in values]


log_ratios = st.lists(
    st.lists(st.one_of(st.floats(-60, 60), st.sampled_from([-1e30, 1e30, 0.0])), min_size=1, max_size=5),
    min_size=12,
    max_size=12,
)
verdicts = arrays(np.bool_, (6, 2))


@given(verdicts, log_ratios, st.floats(0.01, 20))
def test_the_variance_cost_is_at_least_one_and_finite_and_every_interval_holds_its_estimate(
    correct_PG: np.ndarray, ratios: list[list[float]], kappa: float
) -> None:
    zero = rows([[0.0] * len(row) for row in ratios])
    found = estimate(compare_policies(correct_PG, zero, rows(ratios)), WHOLE, 1, kappa, seed=3)
    assert found.quality is not None
    assert found.quality.value == pytest.approx(correct_PG.any(axis=1).mean())
    assert 0 < found.relative_ess.low <= found.relative_ess.high <= 1
    for name, variance in found.variance.items():
        assert variance.low >= 1
        assert math.isfinite(variance.high)
        assert found.signal[name].value == pytest.approx(found.quality.value / variance.value)
    for part in (found.quality, found.kl_per_token, *found.variance.values(), *found.signal.values()):
        assert part.low <= part.value <= part.high


@given(verdicts)
def test_equal_policies_cost_nothing_and_the_signal_is_the_quality(correct_PG: np.ndarray) -> None:
    logps = rows([[-0.5, -1.0]] * 12)
    found = estimate(compare_policies(correct_PG, logps, logps), WHOLE, 1, 1.0, seed=0)
    assert {estimate.value for estimate in found.variance.values()} == {1.0}
    assert found.kl_per_token.value == 0.0
    assert {estimate.value for estimate in found.signal.values()} == {found.quality.value if found.quality else None}


def test_the_divergence_of_two_distributions_comes_out_of_samples_of_the_first() -> None:
    rng = np.random.default_rng(0)
    guide, past = np.array([0.7, 0.2, 0.1]), np.array([0.4, 0.4, 0.2])
    tokens = rng.choice(3, size=(200, 50, 4), p=guide)
    guide_logps, past_logps = (list(np.log(policy)[tokens].reshape(-1, 4)) for policy in (guide, past))
    answers = compare_policies(np.ones((200, 50), bool), guide_logps, past_logps)
    found = estimate(answers, [Band(200, tuple(range(200)))], 1, 2.0, seed=0)
    kl = float(np.sum(guide * np.log(guide / past)))
    chi2 = float(np.sum(past**2 / guide)) ** 4  # 1 + χ²(past ‖ guide) of four independent tokens
    assert found.kl_per_token.value == pytest.approx(kl, rel=0.03)
    assert found.variance["kl_token"].value == pytest.approx(math.exp(2 * kl), rel=0.03)
    assert found.variance["kl_sequence"].value == pytest.approx(math.exp(2 * 4 * kl), rel=0.1)
    assert found.variance["chi2"].value == pytest.approx(chi2, rel=0.1)
    assert found.kl_per_token.low < kl < found.kl_per_token.high


def test_a_divergence_that_comes_out_negative_by_chance_is_none() -> None:
    guide_logps, past_logps = rows([[-2.0]] * 12), rows([[-1.0]] * 12)
    found = estimate(compare_policies(np.ones((6, 2), bool), guide_logps, past_logps), WHOLE, 1, 1.0, seed=0)
    assert found.kl_per_token.value == 0.0
    assert (found.variance["kl_token"].value, found.variance["kl_sequence"].value) == (1.0, 1.0)


def test_bands_count_by_their_sizes_and_only_those_within_the_distance() -> None:
    correct_PG = np.array([[True], [True], [False], [False], [False], [True]])
    logps = rows([[0.0]] * 6)
    bands = [Band(10, (0, 1)), Band(30, (2, 3)), Band(7, ()), Band(60, (4, 5))]
    answers = compare_policies(correct_PG, logps, logps)
    qualities = [estimate(answers, bands, n, 1.0, seed=0).quality for n in (1, 2, 3, 4)]
    assert [q.value for q in qualities if q] == pytest.approx([1.0, 0.25, 0.25, 0.4])
    assert coverage(correct_PG[:4], bands, 2, seed=0) == qualities[1], "the baseline is estimated likewise"


def test_a_distance_none_of_whose_prompts_was_asked_has_no_quality() -> None:
    logps = rows([[0.0]] * 2)
    found = estimate(compare_policies(np.ones((2, 1), bool), logps, logps), [Band(4, ()), Band(4, (0, 1))], 1, 1.0, 0)
    assert (found.quality, found.pass_rate, found.signal) == (None, None, {})
    assert found.variance["chi2"].value == 1.0


def test_intervals_shrink_with_the_number_of_prompts_and_cover_the_truth() -> None:
    rng = np.random.default_rng(5)
    widths, covered = {}, 0
    for prompts in (16, 256):
        correct_PG = rng.random((prompts, 1)) < 0.4
        found = coverage(correct_PG, [Band(prompts, tuple(range(prompts)))], 1, seed=1)
        assert found is not None
        widths[prompts] = found.high - found.low
    for seed in range(200):
        correct_PG = rng.random((64, 1)) < 0.4
        found = coverage(correct_PG, [Band(64, tuple(range(64)))], 1, seed=seed)
        assert found is not None
        covered += found.low <= 0.4 <= found.high
    assert widths[256] < widths[16] / 3
    assert 180 <= covered <= 200


def test_the_same_seed_gives_the_same_interval() -> None:
    correct_PG = np.random.default_rng(0).random((40, 2)) < 0.3
    bands = [Band(40, tuple(range(40)))]
    assert coverage(correct_PG, bands, 1, seed=1) == coverage(correct_PG, bands, 1, seed=1)


def test_log_probabilities_that_are_not_finite_or_do_not_fit_are_refused() -> None:
    ok = rows([[-1.0], [-1.0]])
    with pytest.raises(FloatingPointError, match="row 1"):
        compare_policies(np.ones((2, 1), bool), ok, rows([[-1.0], [-math.inf]]))
    with pytest.raises(ValueError, match="row 0 has 1 and 2 tokens"):
        compare_policies(np.ones((2, 1), bool), ok, rows([[-1.0, -1.0], [-1.0]]))
    with pytest.raises(ValueError, match="3 verdicts"):
        compare_policies(np.ones((3, 1), bool), ok, ok)
