"""Reads a run's files and notes what is wrong with them, instead of stopping at the first fault."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa

from npo_core import parquet
from npo_core.artifacts import RunArtifacts
from npo_core.checkpoints import require_safe_name
from npo_core.interfaces import ManifestT, NearFutureError, RecordT
from npo_core.tombstones import removed_keys
from schemas import layout
from schemas.records import Manifest, Tombstone

RESTORE = "restore it from a copy"


@dataclass(frozen=True)
class Fault:
    """Something in a run that is not as it was committed."""

    key: str
    """Key of the file, relative to the run's root."""
    problem: str
    remedy: str


def redo(folder: str) -> str:
    """Remedy for what a run makes again by itself."""
    return f"{RESTORE}, or remove {folder} and run again: it is made again"


class Findings:
    """The faults of one run, as they are found."""

    def __init__(self, run: RunArtifacts) -> None:
        self.run = run
        self.faults: list[Fault] = []
        self.removed: frozenset[str] = frozenset()
        """Keys of files that may be missing: tombstones name them."""

    def expect(self, holds: bool, key: str, problem: str, remedy: str = RESTORE) -> None:
        """Notes a fault unless `holds`."""
        if not holds:
            self.faults.append(Fault(key, problem, remedy))

    @contextmanager
    def about(self, key: str, remedy: str = RESTORE) -> Iterator[None]:
        """Notes a `NearFutureError` of the block as a fault of `key`."""
        try:
            yield
        except NearFutureError as error:
            # The message ends with a remedy in general; whoever knows the artifact has a better one.
            self.expect(False, key, str(error).rpartition("; ")[0] or str(error), remedy)

    def names(self, folder: str) -> list[str]:
        """Names below a folder; none if it cannot be listed."""
        with self.about(folder):
            return self.run.store.list(folder)
        return []

    def read(self, key: str, kind: type[RecordT]) -> RecordT | None:
        """A record; None where it is absent, or damaged, which is a fault."""
        with self.about(key):
            return self.run.store.read(key, kind)
        return None

    def manifest(self, folder: str, kind: type[ManifestT]) -> ManifestT | None:
        """A folder's manifest; None where there is none (debris), or a damaged one."""
        return self.read(layout.manifest(folder), kind)

    def tombstones(self) -> dict[str, Tombstone]:
        """The run's tombstones by key; from here on, the files that they name may be missing."""
        keys = [f"{layout.TOMBSTONES}/{name}" for name in self.names(layout.TOMBSTONES)]
        found = {key: tombstone for key in keys if (tombstone := self.read(key, Tombstone)) is not None}
        self.removed = removed_keys(found.values())
        return found

    def files(self, manifest: Manifest, remedy: str = RESTORE) -> None:
        """Checks name, size and hash of an artifact's files."""
        for entry in manifest.files:
            with self.about(entry.key, remedy):
                require_safe_name(entry.name)
                if entry.key not in self.removed:
                    self.run.store.check(entry)

    def table(self, manifest: Manifest, folder: str, role: str) -> pa.Table | None:
        """A table whose bytes, schema and number of rows are right, or None."""
        roles = [entry for entry in manifest.files if entry.role == role]
        if len(roles) != 1:
            self.expect(False, layout.manifest(folder), f"names {len(roles)} {role} files", redo(folder))
            return None
        entry = roles[0]
        with self.about(entry.key, redo(folder)):
            data = self.run.store.read_data(entry)
            table = parquet.decode(data, parquet.SCHEMAS[role], entry.key)
            same = entry.footer_sha256 in (None, parquet.footer_digest(data))
            self.expect(same, entry.key, "its footer is not the one that its manifest names", redo(folder))
            problem = f"has {table.num_rows} rows, its manifest says {entry.rows}"
            self.expect(table.num_rows == entry.rows, entry.key, problem, redo(folder))
            return table
        return None
