"""Trajectories of a run, for people and for export."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from npo_core import views
from npo_core.artifacts import RunArtifacts
from npo_core.interfaces import ConfigurationError
from npo_core.rows import EVERY_ROW, Where, frame, read_rows
from schemas import tables
from schemas.records import SegmentManifest

READABLE = (
    "leg_id",
    "step",
    "prompt_id",
    "task",
    "slot",
    "source",
    "behavior_step",
    "reward",
    "correct",
    "verdict",
    "finish_reason",
    "advantage",
    "group_accuracy",
    "displaced",
    "entropy",
    "text",
)
"""Columns of a trajectory that a person reads; tokens and log-probabilities are in the export."""

ORDER = ("step", "prompt_id", "slot", "source")
"""In which a person reads the rows of a leg."""


def trajectories(run: RunArtifacts, columns: Sequence[str], where: Where = EVERY_ROW) -> pl.DataFrame:
    """Columns of every committed trajectory (`schemas.tables.TRAJECTORIES`) that meets the conditions, in the order of
    legs and segments."""
    return frame(run, _segments(run, where), "rollouts", columns, where)


def inspect(run: RunArtifacts, where: Where = EVERY_ROW, limit: int = 20) -> pl.DataFrame:
    """The first `limit` trajectories that meet the conditions, by leg, step, prompt, slot and source, with the prompt's
    words (`prompt`) and `READABLE`."""
    rows = frame(run, _segments(run, where), "rollouts", READABLE, where, ORDER, limit)
    words = views.prompt_words(run)
    return rows.with_columns(
        prompt=pl.col("prompt_id").replace_strict(words, default="", return_dtype=pl.String) if words else pl.lit("")
    )


def export(run: RunArtifacts, path: Path, where: Where = EVERY_ROW, limit: int | None = None) -> int:
    """Writes trajectories with every column to a Parquet file, a few row groups at a time, and returns how many.

    Raises:
        StoreError: a data file of the run is damaged; what was at `path` is still there.
        ConfigurationError: the file cannot be written.
    """
    schema, count = tables.TRAJECTORIES, 0
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for table in read_rows(run, _segments(run, where), "rollouts", schema.names, where, limit=limit):
                writer.write_table(table.cast(schema))
                count += table.num_rows
        temporary.replace(path)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written ({error.strerror}); name another file") from error
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _segments(run: RunArtifacts, where: Where) -> list[SegmentManifest]:
    return [
        segment
        for _, segments in sorted(views.segments(run).items())
        for segment in segments
        if where.step is None or segment.start <= where.step < segment.stop
    ]
