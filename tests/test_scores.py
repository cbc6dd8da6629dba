"""Scores are what brute force says: pass@k over all subsets of the samples, intervals by resampling prompts."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_core.scores import pass_at_k, score, tries

COUNTS = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.dictionaries(
            st.sampled_from(["sum", "count", "macro"]),
            st.lists(st.integers(0, n), min_size=1, max_size=12).map(np.array),
            min_size=1,
        ),
    )
)


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n), st.integers(0, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(case: tuple[int, int, int]) -> None:
    n, k, c = case
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, k)[c] == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_stays_exact_where_products_of_floats_would_not() -> None:
    values = pass_at_k(4096, 1024)
    assert values[0] == 0
    assert values[1] == pytest.approx(0.25, abs=1e-15)
    assert values[-1] == 1
    assert (np.diff(values) >= 0).all()


@pytest.mark.parametrize("k", [0, 5])
def test_more_tries_than_samples_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k {k} is not between 1 and the 4 samples"):
        pass_at_k(4, k)


@pytest.mark.parametrize(("n", "ks"), [(1, [1]), (2, [1, 2]), (3, [1, 2]), (4, [1, 2, 4]), (9, [1, 2, 4, 8])])
def test_tries_are_the_powers_of_two_up_to_the_samples(n: int, ks: list[int]) -> None:
    assert tries(n) == ks


@given(COUNTS)
def test_points_are_plain_means_and_lie_in_their_intervals(case: tuple[int, dict[str, np.ndarray]]) -> None:
    n, counts = case
    scores = score(counts, n)
    for task, values in counts.items():
        assert scores.tasks[task].pass_at[1].value == pytest.approx(values.mean() / n)
        assert scores.tasks[task].prompts == len(values)
    means = [values.mean() / n for values in counts.values()]
    assert scores.macro.pass_at[1].value == pytest.approx(np.mean(means))
    assert scores.overall.pass_at[1].value == pytest.approx(np.concatenate(list(counts.values())).mean() / n)
    for one in (*scores.tasks.values(), scores.macro, scores.overall):
        by_k = [one.pass_at[k] for k in tries(n)]
        assert all(-1e-9 <= e.low <= e.value + 1e-9 <= e.high + 2e-9 <= 1 + 3e-9 for e in by_k)
        assert all(a.value <= b.value + 1e-9 for a, b in itertools.pairwise(by_k))


def test_intervals_are_those_of_resampled_prompts() -> None:
    rng = np.random.default_rng(3)
    counts = {"easy": rng.binomial(4, 0.8, 60), "hard": rng.binomial(4, rng.beta(0.3, 0.6, 40))}
    scores = score(counts, 4)

    def interval(resampled: np.ndarray) -> list[float]:
        return list(np.quantile(resampled, (0.025, 0.975)))

    def resampled(values: np.ndarray, k: int) -> np.ndarray:
        rows = rng.integers(len(values), size=(20000, len(values)))
        return pass_at_k(4, k)[values][rows].mean(axis=1)

    for k in (1, 2, 4):
        by_task = {task: resampled(values, k) for task, values in counts.items()}
        expected = {task: interval(means) for task, means in by_task.items()}
        expected["macro"] = interval(np.mean(list(by_task.values()), axis=0))
        expected["overall"] = interval(resampled(np.concatenate(list(counts.values())), k))
        found = {**scores.tasks, "macro": scores.macro, "overall": scores.overall}
        for name, ends in expected.items():
            one = found[name].pass_at[k]
            # The resamples' own error: 2000 of ours against 20000.
            assert [one.low, one.high] == pytest.approx(ends, abs=0.015), (name, k)


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    truth = 0.4
    drawn = (rng.beta(2, 3, 80) for _ in range(200))
    found = [score({"t": rng.binomial(4, rates)}, 4, seed=i).overall.pass_at[1] for i, rates in enumerate(drawn)]
    assert 0.90 <= np.mean([one.low <= truth <= one.high for one in found]) <= 0.99


def test_equal_seeds_give_equal_intervals_whatever_the_order_of_tasks() -> None:
    counts = {"a": np.array([0, 1, 2, 2]), "b": np.array([2, 0, 1])}
    turned = {"b": counts["b"], "a": counts["a"]}
    assert score(counts, 2) == score(turned, 2)
    assert score(counts, 2).overall.pass_at[1].low != score(counts, 2, seed=1).overall.pass_at[1].low or (
        score(counts, 2).macro.pass_at[1] != score(counts, 2, seed=1).macro.pass_at[1]
    )


def test_greedy_answers_are_scored_beside_the_samples() -> None:
    counts = {"a": np.array([0, 2]), "b": np.array([1, 1, 2])}
    greedy = {"a": np.array([False, True]), "b": np.array([True, True, True])}
    scores = score(counts, 2, greedy)
    values = [one.greedy.value for one in (*scores.tasks.values(), scores.macro, scores.overall) if one.greedy]
    assert values == pytest.approx([0.5, 1.0, 0.75, 0.8])
    assert score(counts, 2).overall.greedy is None
    assert scores.overall.pass_at == score(counts, 2).overall.pass_at


def test_scores_are_plain_json() -> None:
    scores = score({"a": np.array([0, 2])}, 2)
    assert json.loads(json.dumps(scores.as_json()))["tasks"]["a"]["pass_at"].keys() == {"1", "2"}
    assert scores.as_json()["overall"]["pass_at"]["2"]["value"] == 0.5
    assert scores.as_json()["macro"]["greedy"] is None


@pytest.mark.parametrize("counts", [{}, {"a": np.array([], int)}, {"a": np.array([3])}, {"a": np.array([-1])}])
def test_what_cannot_be_scored_is_refused(counts: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="task"):
        score(counts, 2)
