"""Content addresses: canonical JSON and SHA-256."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal values have equal bytes. NaN and infinities are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_bytes(data: bytes | memoryview) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """Hexadecimal SHA-256 of the canonical JSON of `value`."""
    return digest_bytes(canonical_json(value))


def short(digest: str) -> str:
    """The first 12 hexadecimal digits of a digest, as they stand in names and identifiers."""
    return digest[:12]
