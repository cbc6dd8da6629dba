"""Messages come back as they were sent, and ranks share rows evenly."""

from __future__ import annotations

import socket
import subprocess
import sys

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


ROWS = st.lists(st.none() | st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5), max_size=5)


@given(ids=ROWS, logprobs=ROWS)
def test_a_message_arrives_as_it_was_sent(ids: list[list[int] | None], logprobs: list[list[int] | None]) -> None:
    sent = {"seeds": [2**63 - 1], "is": "ü"}
    matrix = np.arange(6.0).reshape(2, 3) > 2
    rows = {"ids": (ids, np.int32), "lp": (logprobs, np.float32)}
    arrays = {"matrix": matrix}
    for name, (given_rows, dtype) in rows.items():
        arrays |= frames.ragged(name, [None if row is None else np.array(row, dtype) for row in given_rows], dtype)
    header, found = frames.unpack(frames.pack(sent, arrays))
    assert header == sent
    np.testing.assert_array_equal(found["matrix"], matrix)
    for name, (given_rows, dtype) in rows.items():
        for got, want in zip(frames.rows_of(name, found), given_rows, strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                np.testing.assert_array_equal(got, np.array(want, dtype))
                assert got.dtype == dtype


def test_a_closed_socket_is_an_end_not_half_a_message() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(b"\0\0\0")
        with pytest.raises(frames.DisconnectedError):
            frames.receive(theirs)


def test_objects_are_no_arrays() -> None:
    """A type that could run code where it is read is refused."""
    message = frames.pack({}, {"ids": np.zeros(1, np.int64)}).replace(b"<i8", b"|O8")
    with pytest.raises(ValueError, match="OBJECT"):
        frames.unpack(message)


def test_the_file_alone_is_enough() -> None:
    """vLLM's interpreter has none of our packages and dependencies."""
    program = (
        "import importlib.util as u, sys; spec = u.spec_from_file_location('frames', sys.argv[1]); "
        "module = u.module_from_spec(spec); spec.loader.exec_module(module); "
        "assert not {'npo_core', 'schemas', 'safetensors', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-P", "-c", program, str(frames.__file__)], check=True, env={"PYTHONPATH": ""})


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 4), st.integers(1, 200))
def test_ranks_share_rows_evenly_in_equally_many_batches(lengths: list[int], ranks: int, tokens: int) -> None:
    plan = rank_batches(lengths, ranks, tokens)
    assert len({len(own) for own in plan}) == 1
    assert len(plan[0]) >= 1
    assert sorted(i for own in plan for micro in own for i in micro) == list(range(len(lengths)))
    loads = [sum(lengths[i] for micro in own for i in micro) for own in plan]
    assert max(loads) - min(loads) <= max(lengths, default=0)
