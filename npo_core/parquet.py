"""Tables as Parquet: exact schemas, one order of rows, equal bytes for equal rows; digests that know no encoding."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from npo_core.store import StoreError
from schemas import tables
from schemas.records import SCHEMA_VERSION

ROW_GROUP_ROWS = 4096
_VERSION_KEY = b"near_future.schema_version"

SCHEMAS: dict[str, pa.Schema] = {
    "rollouts": tables.TRAJECTORIES,
    "trajectories": tables.TRAJECTORIES,
    "samples": tables.TRAJECTORIES,
    "metrics": tables.METRICS,
    "telemetry": tables.TELEMETRY,
    "prompts": tables.PROMPTS,
    "signal": tables.SIGNAL,
}
"""Schema of a file by its role."""


def row_order(schema: pa.Schema) -> tuple[str, ...]:
    """The columns that rows are sorted by; none for prompts, whose order says which batch they are in."""
    if schema.names == tables.TRAJECTORIES.names:
        return tables.TRAJECTORY_ORDER
    return ("step",) if "step" in schema.names else ()


def canonical(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with this very schema, sorted, in one chunk.

    Raises:
        ValueError: other columns or types, or a null where there may be none.
    """
    if not table.schema.equals(schema, check_metadata=False):
        raise ValueError(f"table has the schema\n{table.schema.remove_metadata()}\nnot\n{schema.remove_metadata()}")
    for field in schema:
        if not field.nullable and table[field.name].null_count:
            raise ValueError(f"column {field.name} holds {table[field.name].null_count} nulls and may hold none")
    order = row_order(schema)
    if order:
        table = table.sort_by([(name, "ascending") for name in order])
    # The cast gives lists read from Parquet, whose items it names "element", their own type back.
    return table.cast(schema).combine_chunks()


def encode(table: pa.Table, schema: pa.Schema) -> bytes:
    """Parquet bytes: zstd, dictionaries, bounded row groups, sorted rows. Equal rows give equal bytes.

    Raises:
        ValueError: see `canonical`.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(
        canonical(table, schema), sink, compression="zstd", use_dictionary=True, row_group_size=ROW_GROUP_ROWS
    )
    return sink.getvalue().to_pybytes()


def decode(
    data: bytes, schema: pa.Schema, key: str, columns: Sequence[str] | None = None, filters: Any = None
) -> pa.Table:
    """The table in Parquet bytes, or some of its columns and rows.

    Args:
        data: the whole file.
        schema: what it must have.
        key: its name in error messages.
        columns: columns to read, by default all.
        filters: rows to read, as `pyarrow.parquet.read_table` takes it.

    Raises:
        StoreError: no Parquet, another version, or other columns; names the key.
    """
    try:
        present = pq.read_schema(pa.BufferReader(data))
        version = (present.metadata or {}).get(_VERSION_KEY, b"none").decode()
        if version != str(SCHEMA_VERSION):
            raise StoreError(
                f"{key} has schema version {version}, this program reads version {SCHEMA_VERSION}; "
                "use the program that wrote it"
            )
        if not present.equals(schema, check_metadata=False):
            differing = sorted(set(map(str, present)) ^ set(map(str, schema))) or ["the order of columns"]
            raise StoreError(f"{key} has another schema ({'; '.join(differing)}); restore it from a copy")
        return pq.read_table(pa.BufferReader(data), columns=columns, filters=filters)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{key} is no readable Parquet file ({error}); restore it from a copy") from error


def logical_digest(table: pa.Table, schema: pa.Schema) -> str:
    """SHA-256 of the sorted rows' values, whatever their chunks and encoding; floats by their bit patterns.

    Raises:
        ValueError: see `canonical`.
    """
    digest = hashlib.sha256()
    for field, column in zip(schema, canonical(table, schema).columns, strict=True):
        digest.update(f"{field.name}:{field.type}:{len(column)}\n".encode())
        _feed(digest, column.combine_chunks())
    return digest.hexdigest()


def _feed(digest: Any, array: pa.Array) -> None:
    """Validity, then lengths, then values. What lies under a null does not count."""
    digest.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    array = array.drop_null()
    if pa.types.is_list(array.type):
        digest.update(pc.list_value_length(array).cast(pa.int64()).to_numpy().tobytes())
        _feed(digest, array.flatten())
    elif pa.types.is_string(array.type):
        digest.update(pc.binary_length(array).cast(pa.int64()).to_numpy().tobytes())
        digest.update("".join(array.to_pylist()).encode())
    else:
        digest.update(np.ascontiguousarray(array.to_numpy(zero_copy_only=False)).tobytes())
