"""Counter-based random streams: one a row, keyed by what the row is, so that nothing depends on batch or order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from npo_core.interfaces import StreamKey


def philox(*key: object) -> np.random.Generator:
    """A generator on its own Philox stream, a pure function of `key`'s text."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def uniforms(streams: Sequence[StreamKey], length: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 [B, length]: row i is the beginning of stream i."""
    rows = np.empty((len(streams), length))
    for row, key in zip(rows, streams, strict=True):
        philox(key.seed, key.purpose, key.step, key.prompt_id, key.slot).random(out=row)
    return rows


def row_seed(key: StreamKey) -> int:
    """An integer seed in [0, 2⁶³), for engines that draw by themselves: a function of the stream's key alone."""
    return int(philox(key.seed, key.purpose, key.step, key.prompt_id, key.slot).integers(2**63))
