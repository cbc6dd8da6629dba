"""Durations by arithmetic: what bounds them, and that work is neither lost nor counted twice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from npo_core.durations import Hardware, files_s, sampling_s, scoring_s, update_s
from npo_core.model_shape import ModelShape

SHAPE = ModelShape(
    layers=10, hidden=512, kv_heads=2, head_dim=64, vocab=1000, text_parameters=10**8, vision_parameters=0
)
ONE = Hardware(gpus=1, flops=1e12, memory=1e9, bandwidth=1e9, compute_share=0.5, bandwidth_share=0.5)


def test_few_rows_are_decoded_as_fast_as_the_weights_are_read() -> None:
    # 0.2 GB of weights a token at half of 1 GB/s; a row of 100 tokens has 0.5 MB of cache.
    assert sampling_s(SHAPE, ONE, rows=1, prompt=0, completion=100, memory_share=1) == pytest.approx(40, rel=0.01)


def test_many_rows_are_decoded_as_fast_as_they_are_computed() -> None:
    rows = 1000
    found = sampling_s(SHAPE, replace(ONE, bandwidth=1e15, memory=1e12), rows, 50, 100, 1)
    assert found == pytest.approx(rows * 150 * 2e8 / 0.5e12)


def test_rows_that_have_no_room_wait_for_another_wave() -> None:
    rows = 200
    row = SHAPE.kv_bytes_a_token(2) * 100
    roomy = replace(ONE, memory=2e8 + rows * row)
    tight = replace(ONE, memory=2e8 + rows * row / 2)
    once, twice = (sampling_s(SHAPE, hardware, rows, 0, 100, 1) for hardware in (roomy, tight))
    # The weights are read twice as often, the cache as often as before.
    assert twice - once == pytest.approx(100 * 2e8 / 0.5e9)
    with pytest.raises(ValueError, match="not even one row"):
        sampling_s(SHAPE, ONE, rows, 0, 100, 0.2)


def test_an_update_is_four_forwards_and_is_shared_while_scoring_is_not() -> None:
    assert update_s(SHAPE, ONE, 1000) == pytest.approx(4 * scoring_s(SHAPE, ONE, 1000))
    eight = replace(ONE, gpus=8)
    assert update_s(SHAPE, eight, 1000) == pytest.approx(update_s(SHAPE, ONE, 1000) / 8)
    assert scoring_s(SHAPE, eight, 1000) == scoring_s(SHAPE, ONE, 1000)
    assert files_s(replace(ONE, file_bandwidth=1e9), 1e9, passes=4) == pytest.approx(4)
