"""The stored Parquet files explain themselves, and open with what people have."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from npo_core import parquet, views
from npo_core.artifacts import RunArtifacts
from schemas import describe, tables
from tests.synthetic import build_run

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunArtifacts:
    """A run with a scout, a guide and a replay."""
    return build_run(tmp_path_factory.mktemp("store"))


def _path(run: RunArtifacts, role: str = "rollouts") -> Path:
    leg = next(leg for leg in run.legs() if run.segments(leg.leg_id))
    return Path(run.store.path, run.segments(leg.leg_id)[0].file(role).key)


# ---- descriptions


def test_the_schema_s_document_is_what_the_schemas_say() -> None:
    written = (ROOT / "schemas/README.md").read_text()
    assert written == describe.describe(), "run: python -m schemas.describe > schemas/README.md"


def test_the_document_names_every_role_its_schema_and_its_order() -> None:
    roles = {role: of for of in describe.FILES.values() for role in of.roles or ("prompts",)}
    assert {role: of.schema for role, of in roles.items()} == parquet.SCHEMAS
    for of in roles.values():
        order = ", ".join(f"`{name}`" for name in parquet.row_order(of.schema))
        assert of.order == order or (not order and of.schema is tables.PROMPTS)


@pytest.mark.parametrize("schema", [of.schema for of in describe.FILES.values()], ids=list(describe.FILES))
def test_every_column_has_a_description(schema: pa.Schema) -> None:
    for field in schema:
        assert field.metadata[tables.DESCRIPTION].decode().endswith("."), field.name
        if field.nullable and schema is not tables.METRICS and schema is not tables.SIGNAL:
            assert b"null:" in field.metadata[tables.DESCRIPTION], f"{field.name} does not say what null means"


@pytest.mark.parametrize("role", ["rollouts", "metrics", "telemetry"])
def test_the_files_carry_the_descriptions(run: RunArtifacts, role: str) -> None:
    written = pq.read_schema(_path(run, role))
    for field in parquet.SCHEMAS[role]:
        assert written.field(field.name).metadata[tables.DESCRIPTION] == field.metadata[tables.DESCRIPTION]


def test_files_without_descriptions_are_read_and_have_the_same_digest(run: RunArtifacts) -> None:
    data = _path(run).read_bytes()
    table = parquet.decode(data, tables.TRAJECTORIES, "new")
    bare = pa.schema(
        [pa.field(field.name, field.type, field.nullable) for field in tables.TRAJECTORIES],
        tables.TRAJECTORIES.metadata,
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table.cast(bare), sink)
    older = parquet.decode(sink.getvalue().to_pybytes(), tables.TRAJECTORIES, "older")
    assert older.schema.field("step").metadata is None
    assert parquet.logical_digest(older, tables.TRAJECTORIES) == parquet.logical_digest(table, tables.TRAJECTORIES)
    assert parquet.encode(older, tables.TRAJECTORIES) == data


def test_a_run_begun_without_descriptions_goes_on_and_is_read_as_one(tmp_path: Path) -> None:
    """Half of its files are of an older version."""
    run = build_run(tmp_path, with_replay=False)
    expected = views.collect(views.trajectories(run)).sort(tables.TRAJECTORY_KEY)
    path = _path(run)
    table = pq.read_table(path)
    fields = [pa.field(field.name, field.type, field.nullable) for field in table.schema]
    pq.write_table(table.cast(pa.schema(fields, table.schema.metadata)), path)
    main = next(leg for leg in run.legs() if run.segments(leg.leg_id))
    files = [f"{run.uri}/{segment.file('rollouts').key}" for segment in run.segments(main.leg_id)]
    mixed = pl.scan_parquet(files, glob=False).sort(tables.TRAJECTORY_KEY)
    assert views.collect(mixed).equals(expected)
