"""Tables as Parquet: exact schemas, one order of rows, equal bytes for equal rows; digests that know no encoding."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from npo_core.store import StoreError
from schemas import tables
from schemas.records import SCHEMA_VERSION

ROW_GROUP_ROWS = 4096
_VERSION_KEY = b"near_future.schema_version"
_SPLIT = ("completion_ids", "behavior_logprobs")
_TAIL = 8
_RESTORE = "restore it from a copy"

SCHEMAS: dict[str, pa.Schema] = {
    "rollouts": tables.TRAJECTORIES,
    "trajectories": tables.TRAJECTORIES,
    "samples": tables.TRAJECTORIES,
    "greedy": tables.TRAJECTORIES,
    "metrics": tables.METRICS,
    "telemetry": tables.TELEMETRY,
    "prompts": tables.PROMPTS,
    "window": tables.WINDOW,
    "signal": tables.SIGNAL,
}
"""Schema of a file by its role."""


def row_order(schema: pa.Schema) -> tuple[str, ...]:
    """The columns that rows are sorted by; none for prompts, whose order says which batch they are in."""
    if schema.names == tables.TRAJECTORIES.names:
        return tables.TRAJECTORY_ORDER
    if schema.names == tables.PROMPTS.names:
        return ()
    return ("step",) if "step" in schema.names else ("prompt_id",)


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
    """Parquet bytes: zstd, dictionaries, bounded row groups, sorted rows. Equal rows give equal bytes, those without a
    value in later columns (`tables.LATER`) the bytes that they had before there were such columns.

    Raises:
        ValueError: see `canonical`.
    """
    sink = pa.BufferOutputStream()
    table = canonical(table, schema)
    table = table.select([field.name for field in schema if not _says_nothing(field, table[field.name])])
    schema = table.schema
    # The bytes of each token's numbers apart: high bytes and exponents, which repeat, lie together then.
    split = [path for path in _leaves(schema) if path.startswith(_SPLIT)]
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=[path for path in _leaves(schema) if path not in split],
        column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT"),
        row_group_size=ROW_GROUP_ROWS,
        write_page_checksum=True,
    )
    return sink.getvalue().to_pybytes()


def _leaves(schema: pa.Schema) -> list[str]:
    """Parquet's names of the columns."""
    return [f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in schema]


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
    with _readable(key):
        present = pq.read_schema(pa.BufferReader(data))
        _require_schema(present, schema, key)
        wanted = schema.names if columns is None else columns
        there = [name for name in wanted if name in present.names]
        # It is in memory already: there is nothing to read ahead in other threads.
        table = pq.read_table(pa.BufferReader(data), columns=there, filters=filters, pre_buffer=False)
        return _with_later(table, schema, wanted)


def footer_digest(data: bytes) -> str:
    """SHA-256 of a Parquet file's footer: where each column of each row group lies, and its statistics."""
    return hashlib.sha256(data[-_footer_bytes(data[-_TAIL:]) :]).hexdigest()


class RowGroups:
    """A Parquet file of which parts are read. The footer is checked against its digest, and whatever is read against
    the checksums of its pages: nothing that was altered is believed, and nothing else is read.

    Args:
        file: the open file.
        digest: `footer_digest` as the manifest has it.
        schema: what it must have.
        key: its name in error messages.

    Raises:
        StoreError: the footer was altered, or the file has another schema; names the key.
    """

    def __init__(self, file: BinaryIO, digest: str, schema: pa.Schema, key: str) -> None:
        self.key, self.schema = key, schema
        with _readable(key):
            file.seek(-_TAIL, os.SEEK_END)
            size = _footer_bytes(file.read(_TAIL))
            file.seek(-size, os.SEEK_END)
            footer = file.read(size)
            if hashlib.sha256(footer).hexdigest() != digest:
                raise StoreError(f"{key} was altered: its footer's SHA-256 is not the manifest's; {_RESTORE}")
            self._file = pq.ParquetFile(
                file,
                metadata=pq.read_metadata(pa.BufferReader(footer)),
                page_checksum_verification=True,
                pre_buffer=True,  # columns that lie side by side come in one request
            )
            _require_schema(self._file.schema_arrow, schema, key)
        metadata = self._file.metadata
        self.rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def bounds(self, group: int, column: str) -> tuple[Any, Any] | None:
        """Least and greatest value of a column in a row group, if the file knows them."""
        place = self._file.schema_arrow.names.index(column)
        statistics = self._file.metadata.row_group(group).column(place).statistics
        return (statistics.min, statistics.max) if statistics is not None and statistics.has_min_max else None

    def read(self, groups: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """Columns of row groups, in order.

        Raises:
            StoreError: a page was altered, or the store fails; names the key.
        """
        present = [name for name in columns if name in self._file.schema_arrow.names]
        with _readable(self.key):
            table = self._file.read_row_groups(list(groups), columns=present, use_threads=False)
            return _with_later(table, self.schema, columns)


def _footer_bytes(tail: bytes) -> int:
    """Size of the footer with the file's last eight bytes: its length and the magic number."""
    return int.from_bytes(tail[:4], "little") + _TAIL


@contextmanager
def _readable(key: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, ValueError, OSError) as error:
        raise StoreError(f"{key} is no readable Parquet file ({error}); {_RESTORE}") from error


def _require_schema(present: pa.Schema, schema: pa.Schema, key: str) -> None:
    version = (present.metadata or {}).get(_VERSION_KEY, b"none").decode()
    if version != str(SCHEMA_VERSION):
        raise StoreError(
            f"{key} has schema version {version}, this program reads version {SCHEMA_VERSION}; "
            "use the program that wrote it"
        )
    expected = pa.schema([field for field in schema if field.name in present.names or not _is_later(field)])
    if not present.equals(expected, check_metadata=False):
        differing = sorted(set(map(str, present)) ^ set(map(str, expected))) or ["the order of columns"]
        raise StoreError(f"{key} has another schema ({'; '.join(differing)}); {_RESTORE}")


def _is_later(field: pa.Field) -> bool:
    return tables.LATER in (field.metadata or {})


def _says_nothing(field: pa.Field, column: pa.ChunkedArray) -> bool:
    """Whether the column is a later one without a value."""
    return _is_later(field) and column.null_count == len(column)


def _with_later(table: pa.Table, schema: pa.Schema, columns: Sequence[str]) -> pa.Table:
    """The table with these columns; later ones that it lacks are null."""
    lacking = [name for name in columns if name not in table.schema.names]
    for name in lacking:
        table = table.append_column(schema.field(name), pa.nulls(table.num_rows, schema.field(name).type))
    return table.select(list(columns)) if lacking else table


def logical_digest(table: pa.Table, schema: pa.Schema) -> str:
    """SHA-256 of the sorted rows' values, whatever their chunks and encoding; floats by their bit patterns. Later
    columns without a value are not in it.

    Raises:
        ValueError: see `canonical`.
    """
    digest = hashlib.sha256()
    for field, column in zip(schema, canonical(table, schema).columns, strict=True):
        if _says_nothing(field, column):
            continue
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
