"""Tables as Parquet: exact schemas, one order, digests that know no encoding."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npo_core import parquet
from npo_core.store import StoreError
from schemas.tables import LATER, METRICS, TRAJECTORIES


def _rows(count: int, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    rows = [
        {
            "run_id": "r",
            "leg_id": "l",
            "step": int(rng.integers(3)),
            "prompt_id": f"p{index}",
            "slot": index,
            "source": "policy",
            "task": "sum",
            "behavior_step": 0,
            "behavior_digest": "d",
            "prompt_ids": rng.integers(0, 9, 3).tolist(),
            "completion_ids": rng.integers(0, 9, int(rng.integers(0, 5))).tolist(),
            "loss_mask": None if index % 2 else [True],
            "behavior_logprobs": rng.standard_normal(2).astype(np.float32).tolist(),
            "reward": float(rng.random()),
            "correct": bool(index % 3),
            "verdict": "ü",
            "verifier": "v",
            "finish_reason": "stop",
            "advantage": None if index % 3 else 0.5,
            "displaced": False,
            "text": "",
            "image_refs": ["a"] * (index % 2),
            "schema_version": 1,
        }
        for index in range(count)
    ]
    return pa.Table.from_pylist(rows, TRAJECTORIES)


@settings(deadline=None)  # the machine may be busy
@given(st.integers(0, 30), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_digests_and_bytes_do_not_depend_on_order_chunks_or_encoding(count: int, seed: int, random: object) -> None:
    table = _rows(count, seed)
    order = list(range(count))
    random.shuffle(order)  # type: ignore[attr-defined]
    half = count // 2
    shuffled = table.take(pa.array(order, pa.int64()))
    chunked = pa.concat_tables([shuffled.slice(half), shuffled.slice(0, half)])
    data = parquet.encode(table, TRAJECTORIES)
    assert parquet.encode(chunked, TRAJECTORIES) == data
    sink = pa.BufferOutputStream()
    pq.write_table(chunked, sink, compression="none", use_dictionary=False, row_group_size=3)
    reread = parquet.decode(sink.getvalue().to_pybytes(), TRAJECTORIES, "key")
    digests = {parquet.logical_digest(t, TRAJECTORIES) for t in (table, chunked, reread)}
    assert len(digests) == 1
    assert parquet.decode(data, TRAJECTORIES, "key").equals(parquet.canonical(table, TRAJECTORIES))


@pytest.mark.parametrize(
    ("column", "one", "other"),
    [
        ("reward", 0.0, -0.0),
        ("reward", 1.0, float(np.nextafter(1.0, 2.0))),
        ("advantage", None, 0.0),
        ("loss_mask", None, []),
        ("completion_ids", [1, 2], [1, 3]),
        ("behavior_logprobs", [-1.0, 0.0], [-1.0, -0.0]),
        ("image_refs", ["ab", "c"], ["a", "bc"]),
        ("text", "a", "b"),
    ],
)
def test_any_other_value_has_another_digest(column: str, one: object, other: object) -> None:
    row = _rows(1, 0).to_pylist()[0]
    tables = [pa.Table.from_pylist([{**row, column: value}], TRAJECTORIES) for value in (one, other)]
    first, second = (parquet.logical_digest(table, TRAJECTORIES) for table in tables)
    assert first != second


def test_nan_payloads_count() -> None:
    bits = np.array([0x7FF8000000000000, 0x7FF8000000000001], np.uint64).view(np.float64)
    row = pa.Table.from_pylist([{"run_id": "r", "leg_id": "l", "step": 0}], METRICS)
    place = METRICS.names.index("loss")
    tables = [row.set_column(place, METRICS.field(place), pa.array(bits[i : i + 1])) for i in range(2)]
    assert len({parquet.logical_digest(table, METRICS) for table in tables}) == 2


OLDER = pa.schema([field for field in METRICS if LATER not in field.metadata], METRICS.metadata)
"""The metrics as they were before there were others."""


def _metrics(**values: float) -> pa.Table:
    rows = [{"run_id": "r", "leg_id": "l", "step": step, "loss": 0.5, **values} for step in range(3)]
    return pa.Table.from_pylist(rows, METRICS)


def test_rows_without_a_value_in_a_later_column_are_those_of_a_file_that_knows_none() -> None:
    table, older = _metrics(), _metrics().select(OLDER.names)
    data = parquet.encode(table, METRICS)
    assert data == parquet.encode(older, OLDER)
    assert parquet.logical_digest(table, METRICS) == parquet.logical_digest(older, OLDER)
    read = parquet.decode(data, METRICS, "key")
    assert read.equals(table)
    assert parquet.logical_digest(read, METRICS) == parquet.logical_digest(table, METRICS)
    columns = ["sampling/ess", "step"]
    groups = parquet.RowGroups(io.BytesIO(data), parquet.footer_digest(data), METRICS, "key")
    for part in (parquet.decode(data, METRICS, "key", columns), groups.read([0], columns)):
        assert part.to_pydict() == {"sampling/ess": [None] * 3, "step": [0, 1, 2]}
    filtered = parquet.decode(data, METRICS, "key", ["sampling/ess"], pc.field("step") > 0)
    assert filtered.to_pydict() == {"sampling/ess": [None] * 2}


def test_a_value_in_a_later_column_is_kept_and_counts() -> None:
    one, other = _metrics(**{"sampling/ess": 0.5}), _metrics(**{"sampling/ess": 0.25})
    data = parquet.encode(one, METRICS)
    assert pq.read_schema(pa.BufferReader(data)).names == [*OLDER.names, "sampling/ess"]
    assert parquet.decode(data, METRICS, "key").equals(one)
    digests = {parquet.logical_digest(table, METRICS) for table in (_metrics(), one, other)}
    assert len(digests) == 3


def test_a_missing_column_that_is_no_later_one_is_refused() -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(_metrics().drop_columns(["loss"]), sink)
    with pytest.raises(StoreError, match=r"the-key has another schema \(.*loss"):
        parquet.decode(sink.getvalue().to_pybytes(), METRICS, "the-key")


def test_another_schema_or_version_is_refused_with_the_keys_name() -> None:
    table = _rows(2, 0)
    with pytest.raises(ValueError, match="table has the schema"):
        parquet.encode(table.drop_columns(["text"]), TRAJECTORIES)
    nulls = pa.Table.from_pylist([{**table.to_pylist()[0], "reward": None}], TRAJECTORIES)
    with pytest.raises(ValueError, match="column reward holds 1 nulls"):
        parquet.encode(nulls, TRAJECTORIES)
    for bad, message in (
        (table.replace_schema_metadata({b"near_future.schema_version": b"99"}), "the-key has schema version 99"),
        (table.replace_schema_metadata(None), "the-key has schema version none"),
        (table.drop_columns(["text"]), r"the-key has another schema \(.*text"),
    ):
        sink = pa.BufferOutputStream()
        pq.write_table(bad, sink)
        with pytest.raises(StoreError, match=message):
            parquet.decode(sink.getvalue().to_pybytes(), TRAJECTORIES, "the-key")
    with pytest.raises(StoreError, match="the-key is no readable Parquet file"):
        parquet.decode(b"PAR1 no", TRAJECTORIES, "the-key")


def test_row_groups_are_bounded() -> None:
    table = pa.concat_tables([_rows(500, 0)] * 10)
    info = pq.ParquetFile(pa.BufferReader(parquet.encode(table, TRAJECTORIES))).metadata
    assert [info.row_group(i).num_rows for i in range(info.num_row_groups)] == [4096, 904]
    assert info.row_group(0).column(0).compression == "ZSTD"
