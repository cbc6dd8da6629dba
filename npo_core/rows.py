"""Rows of committed Parquet files: what is asked for is read, and what is read is checked; the rest stays unread."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from npo_core import parquet
from npo_core.run_files import RunFiles
from schemas.records import Manifest

FILES_AT_ONCE = 8
"""Files that are read at one time where only a little is wanted of each: waiting for the store is most of the work."""
LITTLE_BYTES = 1 << 18
GROUPS_AT_ONCE = 8
"""Row groups that are in memory at one time where all of a file is read."""


class Part(Protocol):
    """A Parquet file of which row groups are read: `parquet.RowGroups`, or a whole file that knows no checksums."""

    rows: list[int]

    def bounds(self, group: int, column: str) -> tuple[Any, Any] | None:
        """Least and greatest value of a column in a row group, if the file knows them."""

    def read(self, groups: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """Columns of row groups, in order."""


@dataclass(frozen=True)
class Where:
    """Which trajectory rows: every condition that is given must hold."""

    step: int | None = None
    prompts: Collection[str] | None = None
    source: str | None = None
    min_reward: float | None = None

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that the conditions are about."""
        given = {"step": self.step, "prompt_id": self.prompts, "source": self.source, "reward": self.min_reward}
        return tuple(name for name, value in given.items() if value is not None)

    @cached_property
    def _prompts(self) -> list[str]:
        return sorted(self.prompts or ())

    @cached_property
    def _value_set(self) -> pa.Array:
        return pa.array(self._prompts, pa.string())

    def admits(self, part: Part, group: int) -> bool:
        """Whether a row group may hold such a row, by its statistics."""
        if self.step is not None and (bounds := part.bounds(group, "step")):
            low, high = bounds
            if not low <= self.step <= high:
                return False
        if self.prompts is not None and (bounds := part.bounds(group, "prompt_id")):
            low, high = bounds
            nearest = bisect_left(self._prompts, low)
            return nearest < len(self._prompts) and self._prompts[nearest] <= high
        return True

    def select(self, table: pa.Table) -> pa.Array:
        """Which rows meet the conditions: their places, ascending."""
        mask = pa.array(np.ones(table.num_rows, bool))
        if self.step is not None:
            mask = pc.and_(mask, pc.equal(table["step"], self.step))
        if self.prompts is not None:
            mask = pc.and_(mask, pc.is_in(table["prompt_id"], value_set=self._value_set))
        if self.source is not None:
            mask = pc.and_(mask, pc.equal(table["source"], self.source))
        if self.min_reward is not None:
            mask = pc.and_(mask, pc.greater_equal(table["reward"], self.min_reward))
        return pc.indices_nonzero(mask)


EVERY_ROW = Where()


def read_rows(
    run: RunFiles,
    manifests: Sequence[Manifest],
    role: str,
    columns: Sequence[str],
    where: Where = EVERY_ROW,
    order: Sequence[str] = (),
    limit: int | None = None,
) -> Iterator[pa.Table]:
    """The rows of one role over artifacts, table by table, in the order of the artifacts.

    Args:
        columns: columns to read.
        where: rows to read.
        order: columns by which the rows of each artifact are sorted, in one table then; by default they come as they
            lie in the file, a few row groups at a time.
        limit: most rows in all; reading ends with them.

    Raises:
        StoreError: a file is missing or truncated, or what is read of it was altered; names it.
    """

    def of(manifest: Manifest) -> Iterator[pa.Table]:
        with _opened(run, manifest, role) as part:
            groups = [group for group in range(len(part.rows)) if where.admits(part, group)]
            if order:
                yield from _in_order(part, groups, columns, where, order, limit)
            else:
                yield from _as_they_lie(part, groups, columns, where)

    little = where.prompts is not None or all(m.file(role).bytes <= LITTLE_BYTES for m in manifests)
    for table in _of_all(of, manifests, FILES_AT_ONCE if little else 1):
        if limit is not None:
            table = table.slice(0, limit)
            limit -= table.num_rows
        yield table
        if limit == 0:
            return


def frame(
    run: RunFiles,
    manifests: Sequence[Manifest],
    role: str,
    columns: Sequence[str],
    where: Where = EVERY_ROW,
    order: Sequence[str] = (),
    limit: int | None = None,
) -> pl.DataFrame:
    """`read_rows` as one frame."""
    schema = parquet.SCHEMAS[role]
    empty = pa.schema([schema.field(name) for name in columns]).empty_table()
    found = read_rows(run, manifests, role, columns, where, order, limit)
    return pl.concat([pl.DataFrame(table) for table in (empty, *found)])


def _of_all(
    of: Callable[[Manifest], Iterator[pa.Table]], manifests: Sequence[Manifest], at_once: int
) -> Iterator[pa.Table]:
    if at_once == 1:
        yield from chain.from_iterable(map(of, manifests))
        return
    with ThreadPoolExecutor(at_once) as pool:
        for some in _batches(manifests, at_once):
            yield from chain.from_iterable(pool.map(lambda manifest: list(of(manifest)), some))


@contextmanager
def _opened(run: RunFiles, manifest: Manifest, role: str) -> Iterator[Part]:
    entry = manifest.file(role)
    if entry.footer_sha256 is None:
        yield _Whole(run.table(manifest, role))
        return
    with run.store.open(entry) as file:
        yield parquet.RowGroups(file, entry.footer_sha256, parquet.SCHEMAS[role], f"{run.uri}/{entry.key}")


class _Whole:
    """A file without checksums of its pages: its hash was checked, so it is in memory already."""

    def __init__(self, table: pa.Table) -> None:
        self.table, self.rows = table, [table.num_rows]

    def bounds(self, group: int, column: str) -> tuple[Any, Any] | None:
        """See `Part.bounds`."""
        return None

    def read(self, groups: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """See `Part.read`."""
        return self.table.select(list(columns))


def _as_they_lie(part: Part, groups: Sequence[int], columns: Sequence[str], where: Where) -> Iterator[pa.Table]:
    for some in _batches(groups, GROUPS_AT_ONCE):
        if not where.columns:
            yield part.read(some, columns)
        elif len(places := where.select(part.read(some, where.columns))):
            yield part.read(some, columns).take(places)


def _in_order(
    part: Part, groups: Sequence[int], columns: Sequence[str], where: Where, order: Sequence[str], limit: int | None
) -> Iterator[pa.Table]:
    """What decides is read of every row; what was asked for only of the groups that hold the first ones."""
    deciding = tuple(dict.fromkeys((*where.columns, *order)))
    keys, homes, places = [], [], []
    for group in groups:
        table = part.read([group], deciding)
        found = where.select(table)
        keys.append(table.take(found))
        homes.append(np.full(len(found), group))
        places.append(found.to_numpy())
    if not sum(map(len, places)):
        return
    first = pc.sort_indices(pa.concat_tables(keys), [(name, "ascending") for name in order])[:limit].to_numpy()
    home, place = np.concatenate(homes)[first], np.concatenate(places)[first]
    wanted = np.unique(home)
    tables = [part.read([group], columns).take(pa.array(place[home == group])) for group in wanted.tolist()]
    ranks = np.concatenate([np.flatnonzero(home == group) for group in wanted])
    yield pa.concat_tables(tables).take(pa.array(np.argsort(ranks)))


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    every = iter(items)
    while some := list(islice(every, size)):
        yield some
