"""The stored Parquet files explain themselves, and open with what people have."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

from npo_core import parquet, views
from npo_core.artifacts import RunArtifacts
from npo_core.data_files import ROLES, data_files
from npo_core.interfaces import ConfigurationError
from schemas import describe, tables
from tests.command import last_json, npo
from tests.s3_server import S3Server
from tests.synthetic import build_run, decode

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunArtifacts:
    """A run with a scout, a guide and a replay."""
    return build_run(tmp_path_factory.mktemp("store"))


@pytest.fixture
def on_s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> RunArtifacts:
    """A run on an S3 server that this process and those that it starts may use."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return build_run("s3://runs/opened", with_replay=False, steps=10)


def _rows(run: RunArtifacts) -> pl.DataFrame:
    segments = (segment for leg in run.legs() for segment in run.segments(leg.leg_id))
    return pl.concat([pl.DataFrame(run.table(segment, "rollouts")) for segment in segments])


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
    schema = parquet.SCHEMAS[role]
    assert set(written.names) == {field.name for field in schema if tables.LATER not in field.metadata}
    for field in written:
        assert field.metadata[tables.DESCRIPTION] == schema.field(field.name).metadata[tables.DESCRIPTION]


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
    expected = _rows(run).sort(tables.TRAJECTORY_KEY)
    path = _path(run)
    table = pq.read_table(path)
    fields = [pa.field(field.name, field.type, field.nullable) for field in table.schema]
    pq.write_table(table.cast(pa.schema(fields, table.schema.metadata)), path)
    main = next(leg for leg in run.legs() if run.segments(leg.leg_id))
    files = [f"{run.uri}/{segment.file('rollouts').key}" for segment in run.segments(main.leg_id)]
    mixed = pl.scan_parquet(files, glob=False).sort(tables.TRAJECTORY_KEY)
    assert mixed.collect().equals(expected)


# ---- npo files


def test_files_are_those_that_manifests_name(run: RunArtifacts) -> None:
    debris = _path(run).with_name("rollouts-0123456789abcdef.parquet")
    debris.write_bytes(_path(run).read_bytes())
    try:
        found = last_json(npo("files", run.uri, "--json"))["files"]
        printed = npo("files", run.uri).stdout.splitlines()
    finally:
        debris.unlink()
    assert printed == [file["uri"] for file in found]
    assert debris.name not in "".join(printed)
    segments = [segment for leg in run.legs() for segment in run.segments(leg.leg_id)]
    assert [(f["leg_id"], f["start"], f["stop"], f["rows"]) for f in found] == [
        (s.leg_id, s.start, s.stop, s.file("rollouts").rows) for s in segments
    ]
    assert [Path(f["uri"].removeprefix("file://")).stat().st_size for f in found] == [f["bytes"] for f in found]


@pytest.mark.parametrize("role", ROLES)
def test_every_role_opens(run: RunArtifacts, role: str) -> None:
    files = data_files(run, role)
    assert files or role in ("signal", "greedy")  # no study was made, and nothing asked at temperature 0
    for file in files:
        assert file["role"] == role
        assert pl.scan_parquet(file["uri"]).select(pl.len()).collect().item() == file["rows"]


def test_the_main_line_s_files_hold_its_rows_and_no_others(run: RunArtifacts) -> None:
    files = data_files(run, "rollouts", main_line=True)
    rows = pl.scan_parquet([file["uri"] for file in files]).select("leg_id", "step").unique().collect()
    line = views.metrics(run)
    assert set(rows.iter_rows()) == set(line.select("leg_id", "step").iter_rows())
    assert len(files) < len(data_files(run, "rollouts"))  # the scout's are not among them
    assert len(data_files(run, "trajectories", main_line=True)) == 1
    scored = [(file["leg_id"], file["stop"]) for file in data_files(run, "samples", main_line=True)]
    assert scored == [(e.checkpoint.leg_id, e.checkpoint.step) for e in views.main_evaluations(run)]


def test_a_role_that_is_none_is_named(run: RunArtifacts) -> None:
    with pytest.raises(ConfigurationError, match="'weights' is none of rollouts, metrics"):
        data_files(run, "weights")
    with pytest.raises(ConfigurationError, match=r"'signal'.*leave --main-line out"):
        data_files(run, "signal", main_line=True)


# ---- the README's examples


def _examples(uri: str) -> dict[str, str]:
    """The README's code by the package that it opens the data with."""
    section = (ROOT / "README.md").read_text().split("\n## Open the data\n")[1].split("\n## ")[0]
    code = "\n".join(line.removeprefix("    ") for line in section.splitlines() if line[:4] == "    " or not line)
    begins = "import subprocess\n"
    blocks = [begins + block.replace("runs/testbed-npo", uri) for block in code.split(begins)[1:]]
    return dict(zip(("polars", "duckdb", "pandas"), blocks, strict=True))


def _executed(library: str, uri: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    names: dict[str, Any] = {}
    exec(compile(_examples(uri)[library], f"README.md, {library}", "exec"), names)
    return names


def test_the_polars_example(run: RunArtifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = _executed("polars", run.uri, monkeypatch)["rewards"]
    line = views.metrics(run).select("leg_id", "step")
    expected = (
        _rows(run)
        .join(line, on=["leg_id", "step"])
        .group_by("step", "source")
        .agg(pl.mean("reward"))
        .sort("step", "source")
    )
    assert rewards.height > line.height  # both sources
    assert_frame_equal(rewards, expected)


def test_the_duckdb_example(run: RunArtifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = _executed("duckdb", run.uri, monkeypatch)["taken"]
    guided = _rows(run).filter(source="guide")
    counts = guided["prompt_id"].value_counts()
    assert len(taken) == counts["count"].max()
    columns = ("leg_id", "step", "slot", "reward", "group_accuracy", "text")
    chosen = [guided.filter(prompt_id=name).sort("step", "slot").select(columns).rows() for name in counts["prompt_id"]]
    assert taken in chosen


def test_the_pandas_example(run: RunArtifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    names = _executed("pandas", run.uri, monkeypatch)
    rollout, tokens = names["rollout"], names["tokens"]
    key = {name: rollout[name] for name in tables.TRAJECTORY_KEY}
    expected = _rows(run).filter(**key).row(0, named=True)
    assert tokens["id"].tolist() == expected["completion_ids"]
    assert tokens["logprob"].tolist() == expected["behavior_logprobs"]
    assert decode(tokens["id"]) == expected["text"] == rollout.text


@pytest.mark.slow
@pytest.mark.parametrize("library", ["polars", "pandas"])
def test_the_examples_open_a_run_on_s3(
    library: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, on_s3: RunArtifacts
) -> None:
    names = _executed(library, on_s3.uri, monkeypatch)
    assert len(names["rewards" if library == "polars" else "tokens"])
