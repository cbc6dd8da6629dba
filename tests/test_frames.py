"""Messages come back as they were sent, and ranks share rows evenly."""

from __future__ import annotations

import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_core import frames
from npo_core.padding import rank_batches


def test_ragged_rows_come_back_through_a_socket() -> None:
    rows = [np.array([3, 4], np.int32), None, np.zeros(0, np.int32), np.array([5], np.int32)]
    here, there = socket.socketpair()
    with here, there:
        frames.send(here, frames.pack({"do": "step"}, frames.ragged("ids", rows, np.int32)))
        header, arrays = frames.unpack(frames.receive(there))
        here.close()
        with pytest.raises(frames.DisconnectedError):
            frames.receive(there)
    assert header == {"do": "step"}
    back = frames.rows_of("ids", arrays)
    assert [None if row is None else row.tolist() for row in back] == [[3, 4], None, [], [5]]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 4), st.integers(1, 200))
def test_ranks_share_rows_evenly_in_equally_many_batches(lengths: list[int], ranks: int, tokens: int) -> None:
    plan = rank_batches(lengths, ranks, tokens)
    assert len({len(own) for own in plan}) == 1
    assert len(plan[0]) >= 1
    assert sorted(i for own in plan for micro in own for i in micro) == list(range(len(lengths)))
    loads = [sum(lengths[i] for micro in own for i in micro) for own in plan]
    assert max(loads) - min(loads) <= max(lengths, default=0)
