"""The benchmarks of deployments count what a database holds, and say what is not as it should be."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.bench.database_growth import grown, size
from tests.bench.scheduled import faults

FINE: dict[str, Any] = {
    "ended": {"Completed": 200},
    "passed_through": {"Scheduled": 200, "Running": 200, "Completed": 200},
    "verify": {"code": 0, "said": []},
    "evaluations": {"before": 3, "same": True},
}


def test_growth_is_scaled_to_a_thousand_segments_and_counts_the_log_ahead(tmp_path: Path) -> None:
    path = tmp_path / "prefect.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE task_run (name TEXT UNIQUE)")
        connection.commit()
        before = size(path)
        connection.executemany("INSERT INTO task_run VALUES (?)", [(f"{n:01000}",) for n in range(50)])
        connection.commit()
        growth = grown(before, size(path), segments=25)
    assert growth["rows"] == {"task_run": 2000}
    # The rows themselves, and once more in their index.
    assert 2 * 2000 * 1000 < growth["table_bytes"]["task_run"] == growth["bytes"]


@pytest.mark.parametrize(
    ("amiss", "told"),
    [
        ({}, []),
        ({"ended": {"Completed": 199, "Crashed": 1}}, ["1 runs ended Crashed"]),
        ({"passed_through": {"Late": 2, "Completed": 200}}, ["2 runs were Late"]),
        ({"verify": {"code": 1, "said": ["a fault"]}}, ["npo verify: ['a fault']"]),
        ({"evaluations": {"before": 3, "same": False}}, ["the evaluations are others than before"]),
    ],
)
def test_what_is_not_as_it_should_be_after_scheduled_runs_is_told(amiss: dict[str, Any], told: list[str]) -> None:
    assert faults({**FINE, **amiss}) == told
