"""The guard of a weight sync: what it compares, what it tries, and what it says when nothing helps."""

from __future__ import annotations

import numpy as np
import pytest

from npo_core.interfaces import NearFutureError
from npo_core.weight_sync import Agreement, Probe, Sync, compare, synchronize

GOOD, BAD = Agreement(10, 1e-6, 1e-5), Agreement(10, 0.7, 2.0)


def rows(*values: list[float]) -> list[np.ndarray]:
    return [np.array(row, np.float32) for row in values]


def test_the_agreement_is_over_tokens_not_rows() -> None:
    agreement = compare(rows([-1.0, -2.0, -3.0], [-4.0]), rows([-1.0, -2.0, -3.0], [-2.0]))
    assert (agreement.tokens, agreement.mean, agreement.largest) == (4, 0.5, 2.0)
    assert agreement.within(0.5)
    assert not agreement.within(0.49)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_what_is_not_finite_never_agrees(bad: float) -> None:
    assert not compare(rows([bad, -1.0]), rows([-1.0, -1.0])).within(1e9)


IDS = [np.array([3, 1], np.int32)]


@pytest.mark.parametrize(
    ("ids", "engine", "trainer", "kept"),
    [
        (IDS, rows([-1.0, -2.0]), rows([-1.001, -2.0]), True),
        (IDS, rows([-1.0, -2.0]), rows([-1.0, -2.0]), False),
        (IDS, rows([-1.0, -2.001]), rows([-1.001, -2.0]), False),
        ([np.array([3, 2], np.int32)], rows([-1.0, -2.0]), rows([-1.001, -2.0]), False),
    ],
    ids=["kept its weights", "no weights changed", "moved too", "sampled other tokens"],
)
def test_an_engine_that_answers_as_before_kept_its_weights_if_the_policy_moved(
    ids: list[np.ndarray], engine: list[np.ndarray], trainer: list[np.ndarray], kept: bool
) -> None:
    before = Probe(IDS, rows([-1.0, -2.0]), rows([-1.0, -2.0]))
    now = Probe(ids, engine, trainer)
    assert now.agreement(before).kept == kept
    assert now.agreement(before).within(0.05) != kept
    assert now.agreement(None).within(0.05), "a fresh engine has no answers of before"


def ways(tried: list[str]) -> list[Sync]:
    return [
        Sync(name, lambda name=name: tried.append(name), tolerance)  # type: ignore[misc]
        for name, tolerance in (("in place", 1e-5), ("fresh", 1e-4))
    ]


def test_the_first_way_that_agrees_is_the_last() -> None:
    tried: list[str] = []
    assert synchronize(ways(tried), lambda: GOOD) == GOOD
    assert tried == ["in place"]


def test_each_way_has_a_tolerance_of_its_own() -> None:
    tried: list[str] = []
    between = Agreement(10, 5e-5, 1e-4)
    assert synchronize(ways(tried), lambda: between) == between
    assert tried == ["in place", "fresh"]


def test_after_a_sync_that_changed_nothing_comes_the_next_way() -> None:
    tried: list[str] = []
    assert synchronize(ways(tried), lambda: GOOD if "fresh" in tried else BAD) == GOOD
    assert tried == ["in place", "fresh"]


def test_when_no_way_agrees_the_figures_of_all_are_told() -> None:
    tried: list[str] = []
    with pytest.raises(NearFutureError) as raised:
        synchronize(ways(tried), lambda: BAD)
    said = str(raised.value)
    assert tried == ["in place", "fresh"]
    assert said.count("7.00e-01") == 2
    assert all(
        word in said for word in ("in place", "fresh", "tolerance 1.0e-05", "tolerance 1.0e-04", "vllm.tolerance")
    )


def test_a_way_that_fails_is_followed_by_the_next_and_told_if_none_is_left() -> None:
    tried: list[str] = []

    def fail() -> None:
        raise NearFutureError("no memory")

    failing = Sync("in place", fail, 1e-4)
    assert synchronize([failing, *ways(tried)[1:]], lambda: GOOD) == GOOD
    assert tried == ["fresh"]
    with pytest.raises(NearFutureError, match="in place: no memory; fresh: mean"):
        synchronize([failing, *ways(tried)[1:]], lambda: BAD)
