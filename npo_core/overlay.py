"""A store to read from, and a folder beside it for all that is written: work is done again without touching what is
committed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from npo_core.store import FsspecStore
from schemas.records import FileEntry, Record


class Overlay(FsspecStore):
    """See `npo_core.interfaces.Store`. `walk` shows what was written, and only that.

    Args:
        base: is only read.
        scratch: takes what is written; it is read first.
        hidden: folders of a run which appear to be empty in the base.
    """

    def __init__(self, base: FsspecStore, scratch: FsspecStore, hidden: Collection[str]) -> None:
        super().__init__(scratch.fs, scratch.path, scratch.objects)
        self.root = base.root
        self._base, self._hidden = base, tuple(hidden)

    def within(self, folder: str) -> Overlay:
        return Overlay(self._base.within(folder), super().within(folder), self._hidden)

    def create_bytes(self, key: str, data: bytes) -> bytes:
        present = self.read_bytes(key)
        return super().create_bytes(key, data) if present is None else present

    def read_bytes(self, key: str) -> bytes | None:
        own = super().read_bytes(key)
        return own if own is not None or self._hides(key) else self._base.read_bytes(key)

    def swap(self, key: str, expected: Record | None, new: Record) -> bool:
        present = self.read_bytes(key)
        if present is not None:
            super().create_bytes(key, present)
        return super().swap(key, expected, new)

    def list(self, folder: str) -> list[str]:
        below = [name for name in self._base.list(folder) if not self._hides(f"{folder}/{name}".lstrip("/"))]
        return sorted({*super().list(folder), *below})

    @contextmanager
    def open(self, entry: FileEntry) -> Iterator[BinaryIO]:
        with super().open(entry) if self._wrote(entry) else self._base.open(entry) as file:
            yield file

    def _chunks(self, entry: FileEntry) -> Iterator[bytes]:
        return super()._chunks(entry) if self._wrote(entry) else self._base._chunks(entry)

    def _wrote(self, entry: FileEntry) -> bool:
        return bool(self.fs.exists(self._path(entry.key)))

    def _hides(self, key: str) -> bool:
        return any(key == folder or key.startswith(f"{folder}/") for folder in self._hidden)
