"""The files of one run: manifests and tables under its folder of a store."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypedDict

import pyarrow as pa

from npo_core import parquet
from npo_core.interfaces import ManifestT, Store
from schemas import layout
from schemas.records import FileEntry, Manifest

Environment = Mapping[str, str]
"""Versions, device and thread count of who commits (`Manifest.environment`)."""


class RunFiles:
    """The folder of one run.

    Args:
        store: holds the run under the folder `run_id`.
        run_id: the run's name.
    """

    def __init__(self, store: Store, run_id: str) -> None:
        self.store = store.within(run_id)
        self.run_id = run_id
        self.uri = self.store.root

    def table(
        self, manifest: Manifest, role: str, columns: Sequence[str] | None = None, filters: Any = None
    ) -> pa.Table:
        """A table of an artifact, its file's hash checked; by default all columns and rows.

        Args:
            filters: rows to read, as `pyarrow.parquet.read_table` takes it.
        """
        entry = manifest.file(role)
        data = self.store.read_data(entry)
        return parquet.decode(data, parquet.SCHEMAS[role], f"{self.uri}/{entry.key}", columns, filters)

    def put_table(self, folder: str, role: str, table: pa.Table) -> FileEntry:
        """Writes a table as a data file of an artifact; what no manifest names does not exist.

        Raises:
            ValueError: the table has not the role's schema.
        """
        data = parquet.encode(table, parquet.SCHEMAS[role])
        entry = self.store.put_data(folder, f"{role}.parquet", role, data, rows=table.num_rows)
        return entry.model_copy(update={"footer_sha256": parquet.footer_digest(data)})

    def manifests(self, folder: str, kind: type[ManifestT]) -> list[ManifestT]:
        """The committed manifests directly below a folder, by creation."""
        keys = [layout.manifest(f"{folder}/{name}") for name in self.store.list(folder)]
        found = self.store.read_all(keys, kind)
        return sorted((m for m in found if m is not None), key=lambda m: m.created_at)


class Origin(TypedDict):
    """The fields of a manifest that say who wrote it and when."""

    nonce: str
    created_at: str
    environment: dict[str, str]


def origin(environment: Environment) -> Origin:
    """This writer, now."""
    return Origin(nonce=secrets.token_hex(16), created_at=datetime.now(UTC).isoformat(), environment=dict(environment))
