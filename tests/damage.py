"""A copy of a run to damage by hand, and what `npo verify` says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from npo_core import parquet
from npo_core.artifacts import RunArtifacts, open_run
from npo_core.findings import Fault
from npo_core.verify import verify_run
from schemas import layout
from schemas.digest import canonical_json, digest_bytes
from schemas.records import LegKind, LegRecord, Manifest, Record, SegmentManifest
from tests.synthetic import SyntheticVerifier, decode


class Damaged:
    """A copy of the run, and the means to damage it as somebody with an editor could."""

    def __init__(self, store: Path) -> None:
        self.run: RunArtifacts = open_run(str(store / "synthetic"))
        self.folder = store / "synthetic"

    def leg(self, kind: LegKind) -> LegRecord:
        return [leg for leg in self.run.legs() if leg.kind == kind][-1]

    def segment(self, kind: LegKind = "replay") -> SegmentManifest:
        return self.run.segments(self.leg(kind).leg_id)[0]

    def folder_of(self, segment: SegmentManifest) -> str:
        return layout.segment(segment.leg_id, segment.start, segment.stop)

    def data(self, manifest: Manifest, role: str) -> Path:
        return self.folder / manifest.file(role).key

    def write(self, key: str, record: Record) -> str:
        """Replaces a record, by hand."""
        (self.folder / key).write_bytes(canonical_json(record.model_dump(mode="json")))
        return key

    def forge(self, folder: str, manifest: Manifest, role: str, table: pa.Table, **fields: Any) -> str:
        """Replaces a table, and all that the manifest says of its bytes; returns the table's key."""
        data = parquet.encode(table, parquet.SCHEMAS[role])
        entry = manifest.file(role)
        new = entry.model_copy(
            update={
                "key": layout.data_file(folder, f"{role}.parquet", digest_bytes(data)),
                "bytes": len(data),
                "sha256": digest_bytes(data),
                "rows": table.num_rows,
                "footer_sha256": parquet.footer_digest(data),
            }
        )
        (self.folder / new.key).write_bytes(data)
        files = tuple(new if file == entry else file for file in manifest.files)
        if isinstance(manifest, SegmentManifest):
            after = self.run.require_checkpoint(manifest.leg_id, manifest.stop)
            assert after.segment is not None
            rows = after.segment.model_copy(update={"files": files})
            self.write(
                layout.manifest(layout.checkpoint(after.leg_id, after.step)),
                after.model_copy(update={"segment": rows}),
            )
        self.write(layout.manifest(folder), manifest.model_copy(update={"files": files, **fields}))
        return new.key

    def faults(self) -> list[Fault]:
        return verify_run(self.run, SyntheticVerifier(), decode)


def edit(table: pa.Table, column: str, change: Callable[[list[Any]], list[Any]]) -> pa.Table:
    """The table with other values in one column."""
    field = table.schema.field(column)
    values = pa.array(change(table[column].to_pylist()), field.type)
    return table.set_column(table.schema.get_field_index(column), field, values)


def only(faults: list[Fault], key: str, problem: str) -> None:
    """There is one fault, of this file, and it says what is wrong and what to do."""
    assert [fault.key for fault in faults] == [key], faults
    assert problem in faults[0].problem
    assert "restore it from a copy" in faults[0].remedy
