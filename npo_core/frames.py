"""Messages over a stream socket: a JSON header and named arrays as safetensors. Nothing in them can run code."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import load, save

_LENGTH = struct.Struct(">Q")


class DisconnectedError(Exception):
    """The other side is gone."""


def pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> bytes:
    """One message."""
    head = json.dumps(header).encode()
    return _LENGTH.pack(len(head)) + head + save(dict(arrays or {}))


def unpack(message: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of a message."""
    end = _LENGTH.size + _LENGTH.unpack_from(message)[0]
    return json.loads(message[_LENGTH.size : end]), load(message[end:])


def send(connection: socket.socket, message: bytes) -> None:
    """Sends a message.

    Raises:
        DisconnectedError: nobody is there to take it.
    """
    try:
        connection.sendall(_LENGTH.pack(len(message)) + message)
    except OSError as error:
        raise DisconnectedError from error


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
            raise DisconnectedError from error
        if not part:
            raise DisconnectedError
        received += part
    return bytes(received)
