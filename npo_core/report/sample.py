"""The trajectories that a report carries: a bounded sample of prompt groups, since people are to open the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from npo_core import views
from npo_core.artifacts import RunArtifacts
from npo_core.rows import Where, frame, read_rows
from schemas import tables
from schemas.records import SegmentManifest

MAX_GROUPS = 400
"""Most prompt groups in a report."""
MAX_TOKENS = 250_000
"""Most completion tokens in a report: about 4 MB of the file."""
REPLACED_SHARE = 0.75
"""Most of the groups that guided ones take while there are others; either kind fills what the other leaves."""

GROUP = ["leg_id", "step", "prompt_id"]


@dataclass(frozen=True)
class Sample:
    """What the trajectory browser shows."""

    groups: list[dict[str, Any]]
    """One a prompt group, by leg, step and prompt: leg, kind, main_line, guided, step, prompt_id, task, replaced,
    group_accuracy, rows."""
    vocabulary: dict[int, str]
    """Text of every token that occurs."""
    total: int
    """Prompt groups of the run."""
    total_replaced: int
    """Those of them with a guide trajectory."""

    @property
    def replaced(self) -> int:
        """Embedded groups with a guide trajectory."""
        return sum(group["replaced"] for group in self.groups)


def sample(run: RunArtifacts, steps: pl.DataFrame, token_text: Callable[[int], str]) -> Sample:
    """Chooses groups evenly over legs and steps, those with a guide trajectory first, and reads them.

    Args:
        run: the run.
        steps: its `views.steps`.
        token_text: text of one token.
    """
    segments = [segment for done in views.segments(run).values() for segment in done]
    index = (
        pl.concat(_sizes(run, segments))
        .group_by(GROUP)
        .agg(replaced=(pl.col("source") == "guide").any(), tokens=pl.col("tokens").sum())
        .sort("step", "leg_id", "prompt_id")
    )
    chosen = choose(index)
    kinds = {row["leg_id"]: row for row in steps.unique("leg_id").iter_rows(named=True)}
    on_line = set(steps.filter("main_line").select("leg_id", "step").iter_rows())
    rows = pl.concat(_rows_of(run, segments, chosen)).sort(*GROUP, "slot", "source")
    groups = [
        {
            "leg": leg_id,
            "kind": kinds[leg_id]["kind"],
            "guided": kinds[leg_id]["guided"],
            "main_line": (leg_id, step) in on_line,
            "step": step,
            "prompt_id": prompt_id,
            "task": part["task"][0],
            "replaced": "guide" in part["source"],
            "group_accuracy": part["group_accuracy"][0],
            "rows": [_row(row) for row in part.iter_rows(named=True)],
        }
        for (leg_id, step, prompt_id), part in rows.group_by(GROUP, maintain_order=True)
    ]
    groups.sort(key=lambda group: (group["step"], not group["main_line"], group["leg"], group["prompt_id"]))
    ids = sorted({token for group in groups for row in group["rows"] for token in row["ids"]})
    return Sample(groups, {i: token_text(i) for i in ids}, index.height, int(index["replaced"].sum()))


def _sizes(run: RunArtifacts, segments: Sequence[SegmentManifest]) -> Iterator[pl.DataFrame]:
    """`GROUP`, `source` and completion `tokens` of every row; the ids themselves leave memory at once."""
    for table in read_rows(run, segments, "rollouts", (*GROUP, "source", "completion_ids")):
        yield pl.DataFrame(table).with_columns(tokens=pl.col("completion_ids").list.len()).drop("completion_ids")


def _rows_of(run: RunArtifacts, segments: Sequence[SegmentManifest], chosen: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Whole rows of the chosen groups."""
    for segment in segments:
        here = chosen.filter(pl.col("step").is_between(segment.start, segment.stop - 1), leg_id=segment.leg_id)
        if here.height:
            asked = Where(prompts=frozenset(here["prompt_id"]))
            yield frame(run, [segment], "rollouts", tables.TRAJECTORIES.names, asked).join(here, on=GROUP, how="semi")


def choose(index: pl.DataFrame) -> pl.DataFrame:
    """At most `MAX_GROUPS` groups with at most `MAX_TOKENS` tokens (but always one), evenly spaced in the given order.

    Args:
        index: one row a group with `replaced` and `tokens`.
    """
    replaced, others = index.filter("replaced"), index.filter(~pl.col("replaced"))
    room = MAX_GROUPS
    while True:
        guided = min(replaced.height, max(round(REPLACED_SHARE * room), room - others.height))
        picked = pl.concat([evenly(replaced, guided), evenly(others, room - guided)])
        if room == 1 or picked["tokens"].sum() <= MAX_TOKENS:
            return picked
        room = room * 4 // 5


def evenly(rows: pl.DataFrame, count: int) -> pl.DataFrame:
    """`count` rows at equal distances, or all of them if there are no more."""
    if rows.height <= count:
        return rows
    return rows[[i * rows.height // count for i in range(count)]]


def _row(row: dict[str, Any]) -> dict[str, Any]:
    kept = ("slot", "source", "reward", "correct", "verdict", "advantage", "displaced", "entropy", "behavior_step")
    return {
        **{name: row[name] for name in kept},
        "finish": row["finish_reason"],
        "ids": row["completion_ids"],
        "logprobs": [round(value, 3) if math.isfinite(value) else None for value in row["behavior_logprobs"]],
    }
