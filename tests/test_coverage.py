"""When a scout's coverage has stopped growing."""

from __future__ import annotations

import pytest

from npo_core.coverage import has_stopped_growing


@pytest.mark.parametrize(
    ("solved", "stopped"),
    [
        ([0.2, 0.2, 0.2], False),  # too short for a verdict
        ([0.2, 0.2, 0.2, 0.2], True),
        ([0.2, 0.2, 0.25, 0.25], False),
        ([0.2, 0.2, 0.25, 0.22], True),
        ([0.5, 0.5, 0.3, 0.3], True),
        ([0.0, 0.9, 0.2, 0.2, 0.3, 0.3], False),  # only the last steps count
    ],
)
def test_coverage_has_stopped_when_its_mean_rose_by_less_than_the_smallest_gain(
    solved: list[float], stopped: bool
) -> None:
    assert has_stopped_growing(solved, patience=2, min_gain=0.04) == stopped


def test_a_rise_is_enough_where_any_gain_counts() -> None:
    assert not has_stopped_growing([0.25, 0.5], patience=1, min_gain=0.0)
    assert has_stopped_growing([0.5, 0.25], patience=1, min_gain=0.0)
