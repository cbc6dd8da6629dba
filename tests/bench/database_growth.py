"""What a segment leaves in Prefect's database: bytes and rows by table.

On a server with a fresh SQLite database, `grpo/default` trains runs of many segments, one step each. Before the first
run and after each, when nothing is written any more, the database is read as it is: pages in use, the write-ahead log
included, without VACUUM. The figures are scaled to 1,000 segments; what a flow run costs once is in them.

    python -m tests.bench.database_growth --runs 4 --segments 250 --json OUT
"""

from __future__ import annotations

import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.deployed import database, deployed, finished, tiny
from tests.bench.output import MIB, arguments, markdown, spread, write_json
from tests.prefect_stack import eventually

QUIET_S = 15.0
"""Longer than the server's services hold rows back that they write in batches."""


@dataclass(frozen=True)
class Size:
    """Of a database."""

    used: int
    """Bytes of pages in use."""
    rows: dict[str, int]
    """By table."""
    bytes: dict[str, int]
    """By table, its indices included."""


def size(path: Path) -> Size:
    """Reads a database that a server writes."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:

        def value(query: str) -> int:
            return int(connection.execute(query).fetchone()[0])

        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        owners = connection.execute(
            "SELECT m.tbl_name, sum(s.pgsize) FROM dbstat s JOIN sqlite_master m ON m.name = s.name GROUP BY m.tbl_name"
        )
        free = value("PRAGMA freelist_count")
        return Size(
            used=(value("PRAGMA page_count") - free) * value("PRAGMA page_size"),
            rows={table: value(f'SELECT count(*) FROM "{table}"') for table in tables},
            bytes=dict(owners.fetchall()),
        )


def settled(path: Path) -> Size:
    """The size once nothing that belongs to flow runs is written any more."""
    last: list[Any] = [None, time.monotonic()]

    def quiet() -> bool:
        rows = {name: rows for name, rows in size(path).rows.items() if name in ("events", "log", "task_run_state")}
        if rows != last[0]:
            last[:] = rows, time.monotonic()
        return time.monotonic() - last[1] > QUIET_S

    eventually(quiet, "the database is quiet", 300)
    return size(path)


def grown(before: Size, after: Size, segments: int) -> dict[str, Any]:
    """Growth a thousand segments."""
    scale = 1000 / segments
    return {
        "bytes": (after.used - before.used) * scale,
        "rows": {name: (rows - before.rows[name]) * scale for name, rows in after.rows.items()},
        "table_bytes": {name: (held - before.bytes[name]) * scale for name, held in after.bytes.items()},
    }


def measure(folder: Path, runs: int, segments: int) -> dict[str, Any]:
    """Growth of each run, and the sizes of the database's files at the end."""
    growth = []
    with deployed(folder, query_seconds=1) as (server, client):
        path = database(server)
        deployment = client.read_deployment_by_name("grpo/default")
        before = first = settled(path)
        for n in range(runs):
            parameters = tiny(server, f"run-{n}", segments)
            finished(server, client, client.create_flow_run_from_deployment(deployment.id, parameters=parameters).id)
            after = settled(path)
            growth.append(grown(before, after, segments))
            print(f"run {n}: {growth[-1]['bytes'] / MIB:.2f} MiB a 1,000 segments", file=sys.stderr)
            before = after
            # Its checkpoints take 4 MiB a segment.
            shutil.rmtree(folder / "runs" / f"run-{n}")
        return {"segments": segments, "growth": growth, "empty_bytes": first.used, "files": files(path)}


def files(path: Path) -> dict[str, int]:
    """Bytes of the database's files."""
    return {file.name: file.stat().st_size for file in path.parent.glob(f"{path.name}*")}


def show(result: Mapping[str, Any]) -> str:
    """The result for people; tables that grow by less than a row a hundred segments are left out."""
    growth = result["growth"]
    by_rows = {name: [run["rows"][name] for run in growth] for name in growth[0]["rows"]}
    grew = [name for name, rows in by_rows.items() if sum(rows) >= 10 * len(growth)]
    rows = [
        (name, spread(by_rows[name]), spread([run["table_bytes"][name] / MIB for run in growth]))
        for name in sorted(grew, key=lambda name: -sum(by_rows[name]))
    ]
    whole = ("database", "", spread([run["bytes"] / MIB for run in growth]))
    written = ", ".join(f"{name} {held / MIB:.1f} MiB" for name, held in sorted(result["files"].items()))
    return "\n\n".join(
        [
            markdown(("per 1,000 segments, median and range", "rows", "MiB with indices"), [whole, *rows]),
            f"{len(growth)} runs of {result['segments']} segments; the database began with "
            f"{result['empty_bytes'] / MIB:.1f} MiB, its files at the end: {written}",
        ]
    )


def main() -> None:
    """Measures and prints the table."""
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=int, default=4, help="runs, one after the other")
    parser.add_argument("--segments", type=int, default=250, help="segments a run, one step each")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.runs, args.segments)
    print(show(result))
    write_json(args.json, result)


if __name__ == "__main__":
    main()
