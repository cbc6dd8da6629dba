"""The pictures of a row: what its columns hold becomes files' bytes, and stands where the text places it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from npo_core.interfaces import NearFutureError
from npo_core.pictures import open_picture
from npo_core.sources.rows import Row, UnusableRowError, value_of
from schemas.digest import digest_bytes

PLACEHOLDER = re.compile(r"<image(?: ([1-9][0-9]*))?>")
"""Where a text places a picture: the next one, or that of a number from 1."""

Message = Mapping[str, Any]
_IMAGE = {"type": "image"}


def pictures_of_row(row: Row, columns: Sequence[str]) -> list[tuple[str, bytes]]:
    """(SHA-256, file) of each picture that a row's columns hold, in order.

    Raises:
        UnusableRowError: it lacks a column, or a picture cannot be read.
    """
    found = []
    for column in columns:
        try:
            value = value_of(row.values, column)
        except KeyError as error:
            raise UnusableRowError(f"it has no column {column}") from error
        for data in _files(value, column, row.folder):
            ref = digest_bytes(data)
            try:
                open_picture(ref, data)
            except NearFutureError as error:
                raise UnusableRowError(f"column {column}: {error}") from error
            found.append((ref, data))
    return found


def placed(messages: Sequence[Message], refs: Sequence[str]) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Messages of parts, and the pictures of their image parts, in order.

    The user's messages alone place pictures. Those that none places stand before the text of the last one.

    Args:
        messages: texts, the last one the user's.
        refs: the row's pictures; empty: nothing is changed.

    Raises:
        UnusableRowError: a placeholder has no picture.
    """
    texts = [message["content"] if message["role"] == "user" else "" for message in messages]
    marks = [match.group(1) for text in texts for match in PLACEHOLDER.finditer(text)]
    numbered = {int(mark) for mark in marks if mark}
    free = [n for n in range(1, len(refs) + 1) if n not in numbered]
    next_ones = marks.count(None)
    if (highest := max(numbered, default=0)) > len(refs) or next_ones > len(free):
        wanted = f"<image {highest}>" if highest > len(refs) else f"<image> {next_ones} times beside its numbered ones"
        raise UnusableRowError(f"its text names {wanted}, but it has {len(refs)} pictures")
    if not refs:
        return tuple(messages), ()
    order = iter(free)
    shown: list[int] = []
    parted = []
    for n, (message, text) in enumerate(zip(messages, texts, strict=True)):
        parts: list[Message] = []
        if n == len(messages) - 1:
            unplaced = free[next_ones:]
            parts += [_IMAGE] * len(unplaced)
            shown += unplaced
        for piece, mark in _pieces(text):
            if piece:
                parts.append({"type": "text", "text": piece})
            else:
                parts.append(_IMAGE)
                shown.append(int(mark) if mark else next(order))
        parted.append({**message, "content": parts} if _IMAGE in parts else message)
    return tuple(parted), tuple(refs[n - 1] for n in shown)


def _pieces(text: str) -> Iterator[tuple[str, str | None]]:
    """(text, None), or ("", number or None) for a placeholder, in order."""
    end = 0
    for match in PLACEHOLDER.finditer(text):
        if match.start() > end:
            yield text[end : match.start()], None
        yield "", match.group(1)
        end = match.end()
    if text[end:]:
        yield text[end:], None


def _files(value: Any, column: str, folder: Path | None) -> Iterator[bytes]:
    """The files that a column's value is, one or a list of them; none for null."""
    if isinstance(value, list):
        for each in value:
            yield from _files(each, column, folder)
    elif isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}:
        # Bytes come with the name that they once had.
        own = value.get("bytes")
        yield from _files(value.get("path") if own is None else own, column, folder)
    elif isinstance(value, bytes):
        yield value
    elif isinstance(value, str):
        yield _read(value, column, folder)
    elif value is not None:
        raise UnusableRowError(
            f"column {column} holds {type(value).__name__}, not a picture: a path, bytes, {{bytes, path}}, or a list "
            "of these"
        )


def _read(path: str, column: str, folder: Path | None) -> bytes:
    if folder is None and not Path(path).is_absolute():
        raise UnusableRowError(f"column {column}: picture {path[:200]} is a path, but its data set is no folder here")
    try:
        return Path(folder or "", path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or error
        raise UnusableRowError(f"column {column}: picture {path[:200]} cannot be read: {reason}") from error
