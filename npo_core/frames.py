"""Messages over a stream socket: a JSON header and named arrays. Nothing in them can run code.

Every process of an engine loads this file, by its path where it has no packages of ours: the standard library and
numpy are all that it may import.

A message is the length of its header (8 bytes, big-endian), the header, and the raw bytes of the arrays, whose types
and shapes the header's `arrays` names in order. On the socket its own length goes before it.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_LENGTH = struct.Struct(">Q")


class DisconnectedError(Exception):
    """The other side is gone."""


def pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> bytes:
    """One message."""
    arrays = arrays or {}
    described = {name: [array.dtype.str, array.shape] for name, array in arrays.items()}
    head = json.dumps({**header, "arrays": described}).encode()
    return b"".join([_LENGTH.pack(len(head)), head, *(array.tobytes() for array in arrays.values())])


def unpack(message: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of a message."""
    place = _LENGTH.size + _LENGTH.unpack_from(message)[0]
    header = json.loads(message[_LENGTH.size : place])
    arrays = {}
    for name, (dtype, shape) in header.pop("arrays").items():
        count = math.prod(shape)
        # A copy: what lies in a message is at odd addresses, and cannot be written to.
        arrays[name] = np.frombuffer(message, dtype, count, place).reshape(shape).copy()
        place += arrays[name].nbytes
    return header, arrays


def send(connection: socket.socket, message: bytes) -> None:
    """Sends a message.

    Raises:
        DisconnectedError: nobody is there to take it.
    """
    try:
        connection.sendall(_LENGTH.pack(len(message)) + message)
    except OSError as error:
        raise DisconnectedError(str(error)) from error


def receive(connection: socket.socket) -> bytes:
    """The next message.

    Raises:
        DisconnectedError: there comes no more.
    """
    return _exactly(connection, _LENGTH.unpack(_exactly(connection, _LENGTH.size))[0])


def ragged(name: str, rows: Sequence[np.ndarray | None], dtype: type[np.generic]) -> dict[str, np.ndarray]:
    """Rows of unequal lengths as two arrays; `rows_of` takes them back."""
    lengths = np.array([-1 if row is None else len(row) for row in rows], np.int64)
    present = [np.asarray(row, dtype) for row in rows if row is not None]
    return {name: np.concatenate(present) if present else np.zeros(0, dtype), f"{name}.lengths": lengths}


def rows_of(name: str, arrays: Mapping[str, np.ndarray]) -> list[Any]:
    """The rows that `ragged` packed, None where it was given None."""
    lengths = arrays[f"{name}.lengths"]
    stops = np.cumsum(lengths.clip(min=0))
    return [
        None if length < 0 else arrays[name][stop - length : stop]
        for length, stop in zip(lengths.tolist(), stops.tolist(), strict=True)
    ]


def _exactly(connection: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        try:
            part = connection.recv(min(size - len(received), 1 << 20))
        except OSError as error:
            raise DisconnectedError(str(error)) from error
        if not part:
            raise DisconnectedError("the other side has closed the socket")
        received += part
    return bytes(received)
