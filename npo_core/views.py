"""What a run says when it is read: frames and plain dictionaries behind the read-only commands and the report.

Only files that committed manifests name are read: debris in the store never is.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import polars as pl

from npo_core import evaluated, lineage
from npo_core.artifacts import RunArtifacts, runs
from npo_core.interfaces import NearFutureError, Store
from npo_core.rows import frame
from npo_core.store import READERS
from schemas import layout, tables
from schemas.records import EvalManifest, Head, LegRecord, SegmentManifest


def segments(run: RunArtifacts) -> dict[str, list[SegmentManifest]]:
    """Every leg's committed segments, by leg in the order of the legs."""
    return {leg.leg_id: run.segments(leg.leg_id) for leg in run.legs()}


def steps(run: RunArtifacts) -> pl.DataFrame:
    """One row a committed step of every leg, by leg and step.

    Beside the columns of `schemas.tables.METRICS`: `kind` of the leg; `guided`, whether it has a guide; `main_line`,
    whether the head descends from the step; `trained_steps` and `total_tokens`, what it took in all to have the policy
    after this step: its own line's steps and completion tokens, and those of every scout and guide that it depended on
    (`lineage.line_costs`). Evaluation is no training and is not in it.

    Raises:
        NearFutureError: a metrics file is damaged, or lacks a committed step.
    """
    legs, guides, decisions = run.legs(), run.guides(), run.decisions()
    done = segments(run)
    taken = frame(run, list(itertools.chain.from_iterable(done.values())), "metrics", tables.METRICS.names)
    tokens: dict[str, dict[int, int]] = {leg.leg_id: {} for leg in legs}
    for leg_id, step, sampled in taken.select("leg_id", "step", pl.col("tokens/policy").cast(pl.Int64)).iter_rows():
        tokens[leg_id][step] = sampled
    for segment in itertools.chain.from_iterable(done.values()):
        if absent := [step for step in range(segment.start, segment.stop) if step not in tokens[segment.leg_id]]:
            raise NearFutureError(
                f"the metrics of leg {segment.leg_id} lack its steps {absent}, which are committed; `npo verify RUN` "
                "names the damaged file, restore it from a copy"
            )
    line = {stretch.leg.leg_id: stretch for stretch in lineage.main_line(legs, run.head())}
    rows = [
        {
            "leg_id": leg.leg_id,
            "step": cost.step,
            "kind": leg.kind,
            "guided": leg.guide_id is not None,
            "main_line": leg.leg_id in line and line[leg.leg_id].holds(cost.step),
            "trained_steps": cost.total_steps,
            "total_tokens": cost.total_tokens,
        }
        for leg in legs
        # A leg's costs are those of the line which it would be the tip of.
        for cost in lineage.line_costs(_line_to(leg, legs), legs, guides, tokens, decisions)
        if cost.leg_id == leg.leg_id
    ]
    schema = {
        "leg_id": pl.String,
        "step": pl.Int32,
        "kind": pl.String,
        "guided": pl.Boolean,
        "main_line": pl.Boolean,
        "trained_steps": pl.Int64,
        "total_tokens": pl.Int64,
    }
    return pl.DataFrame(rows, schema=schema).join(taken, on=["leg_id", "step"], how="left", maintain_order="left")


def _line_to(leg: LegRecord, legs: Sequence[LegRecord]) -> list[lineage.Stretch]:
    return lineage.main_line(legs, Head(leg_id=leg.leg_id, epoch=0))


def metrics(run: RunArtifacts) -> pl.DataFrame:
    """The main line, one row a step: its metrics, with `trained_steps` and `total_tokens` as in `steps`, and AutoNPO's
    averages (`schemas.tables.MONITOR_COLUMNS`)."""
    every = itertools.chain.from_iterable(segments(run).values())
    return (
        steps(run)
        .filter("main_line")
        .drop("main_line")
        .join(averages(run, list(every)), on=["leg_id", "step"], how="left")
        .sort("step")
    )


def averages(run: RunArtifacts, of: Sequence[SegmentManifest]) -> pl.DataFrame:
    """AutoNPO's averages after each step of some segments, as far as their checkpoints remember them."""
    with ThreadPoolExecutor(READERS) as pool:
        states = list(pool.map(lambda segment: run.monitor_state(segment.checkpoint), of))
    rows = [
        (segment.leg_id, seen.step, seen.reward_ema, seen.entropy_ema)
        for segment, state in zip(of, states, strict=True)
        for seen in state.observations
        if seen.step >= segment.start
    ]
    types = dict.fromkeys(tables.MONITOR_COLUMNS, pl.Float64)
    return pl.DataFrame(rows, schema={"leg_id": pl.String, "step": pl.Int32, **types}, orient="row")


def evaluations(run: RunArtifacts, taken: pl.DataFrame) -> pl.DataFrame:
    """One row an evaluated checkpoint: `leg_id`, `kind`, `step`, `main_line`, `accuracy`, `entropy`, `samples`, and
    the `trained_steps` and `total_tokens` spent when it was reached.

    Args:
        run: the run.
        taken: its `steps`.
    """
    kinds = {leg.leg_id: leg.kind for leg in run.legs()}
    line = {s.leg.leg_id: s for s in lineage.main_line(run.legs(), run.head())}
    rows = [
        {
            "eval_id": e.eval_id,
            "leg_id": e.checkpoint.leg_id,
            "kind": kinds.get(e.checkpoint.leg_id),
            "step": e.checkpoint.step,
            "main_line": e.checkpoint.leg_id in line and line[e.checkpoint.leg_id].saves(e.checkpoint.step),
            "accuracy": e.accuracy,
            "entropy": e.entropy,
            "samples": e.samples_per_prompt,
        }
        for e in sorted(run.evaluations(), key=lambda e: (e.samples_per_prompt, e.created_at))
    ]
    schema = {
        "eval_id": pl.String,
        "leg_id": pl.String,
        "kind": pl.String,
        "step": pl.Int32,
        "main_line": pl.Boolean,
        "accuracy": pl.Float64,
        "entropy": pl.Float64,
        "samples": pl.Int64,
    }
    spent = taken.select("leg_id", "trained_steps", "total_tokens", step=pl.col("step") + 1)
    return (
        pl.DataFrame(rows, schema=schema)
        .unique(["leg_id", "step"], keep="last", maintain_order=True)
        .join(spent, on=["leg_id", "step"], how="left")
        .with_columns(pl.col("trained_steps", "total_tokens").fill_null(0))
        .sort("trained_steps", "step")
    )


def main_evaluations(run: RunArtifacts) -> list[EvalManifest]:
    """The main line's evaluations by step, one a checkpoint."""
    chosen = evaluations(run, steps(run)).filter("main_line").sort("step")
    by_id = {manifest.eval_id: manifest for manifest in run.evaluations()}
    return [by_id[eval_id] for eval_id in chosen["eval_id"]]


def ls(store: Store) -> list[dict[str, Any]]:
    """The runs of a store, by name: `run` (URI), `run_id`, `method`, `head_step`, `accuracy` (the last of the main
    line, None without an evaluation), `created_at`."""
    found = []
    for name in runs(store):
        run = RunArtifacts(store, name)
        record = run.record()
        scores = main_evaluations(run)
        found.append(
            {
                "run": run.uri,
                "run_id": record.run_id,
                "method": record.recipe.get("algorithm", {}).get("method"),
                "head_step": head_step(run),
                "accuracy": scores[-1].accuracy if scores else None,
                "created_at": record.created_at,
            }
        )
    return found


def head_step(run: RunArtifacts) -> int:
    """Optimizer steps of the main line that are committed."""
    return lineage.line_stop(lineage.main_line(run.legs(), run.head()), segments(run))


def show(run: RunArtifacts) -> dict[str, Any]:
    """The tree of legs, the head, the interventions and the token counts.

    Returns:
        `legs` [{leg_id, kind, parent, start, stop, status, guide_id}], `head` {leg_id, epoch, step} or None, `guides`
        [{guide_id, leg_id, step, start, stop, solved, prompts}], `interventions` (decision records that intervene),
        `benchmarks` (`evaluated.benchmarks`), `tokens` {policy, guide, discarded}, `data` (`DataReport`, or None of the
        testbed's prompts).
    """
    record = run.record()
    legs, head, done, decisions = run.legs(), run.head(), segments(run), run.decisions()
    line = lineage.main_line(legs, head)
    return {
        "run": run.uri,
        "legs": [
            {
                "leg_id": leg.leg_id,
                "kind": leg.kind,
                "parent": leg.parent.leg_id if leg.parent else None,
                "start": leg.start,
                "stop": done[leg.leg_id][-1].stop if done[leg.leg_id] else leg.start,
                "status": lineage.status(leg, line, done[leg.leg_id]),
                "guide_id": leg.guide_id,
            }
            for leg in legs
        ],
        "head": None if head is None else {"leg_id": head.leg_id, "epoch": head.epoch, "step": head_step(run)},
        "guides": [
            {
                "guide_id": guide.guide_id,
                "leg_id": guide.spec.checkpoint.leg_id,
                "step": guide.spec.checkpoint.step,
                "start": guide.spec.start,
                "stop": guide.spec.stop,
                "solved": guide.solved,
                "prompts": guide.asked,
            }
            for guide in run.guides()
        ],
        "interventions": [d.model_dump(mode="json") for d in decisions if d.intervene],
        "benchmarks": evaluated.benchmarks(run),
        "data": None if record.data is None else record.data.model_dump(mode="json"),
        "tokens": asdict(lineage.count_tokens(line, done, run.guides(), decisions)),
    }


def newest_report(run: RunArtifacts) -> str | None:
    """URI of the report that was written last."""
    reports = [o for o in run.store.walk(layout.REPORTS) if o.key.startswith(f"{layout.REPORTS}/report-")]
    return f"{run.uri}/{max(reports, key=lambda o: o.modified).key}" if reports else None


def recent_segments(run: RunArtifacts, leg_id: str, count: int) -> pl.DataFrame:
    """One row a segment of a leg, its last `count`: `start`, `stop`, the means of its steps' `reward`, `entropy` and
    `grad_norm`, the sums of `replaced` slots and sampled `tokens`, and `accuracy` of its checkpoint if it was
    evaluated."""
    chosen = run.segments(leg_id)[-count:]
    scores = {e.checkpoint: e.accuracy for e in run.evaluations()}
    columns = ("step", "reward", "entropy", "grad_norm", "npo/replaced", "tokens/policy")
    taken = frame(run, chosen, "metrics", columns).sort("step")
    ends = {"start": pl.Int32, "stop": pl.Int32, "accuracy": pl.Float64}
    made = pl.DataFrame([(s.start, s.stop, scores.get(s.checkpoint)) for s in chosen], schema=ends, orient="row")
    means = (
        taken.join_asof(made.select("start"), left_on="step", right_on="start")
        .group_by("start")
        .agg(
            pl.mean("reward", "entropy", "grad_norm"),
            replaced=pl.col("npo/replaced").sum().cast(pl.Int64),
            tokens=pl.col("tokens/policy").sum().cast(pl.Int64),
        )
    )
    return made.join(means, on="start", how="left").select(
        "start", "stop", "reward", "entropy", "grad_norm", "replaced", "tokens", "accuracy"
    )


def prompt_words(run: RunArtifacts) -> dict[str, str]:
    """What each prompt asks, by `prompt_id`: the contents of its messages, a line each."""
    rows = run.prompts().select(["prompt_id", "messages"]).to_pylist()
    return {row["prompt_id"]: "\n".join(map(message_text, json.loads(row["messages"]))) for row in rows}


def message_text(message: Mapping[str, Any]) -> str:
    """What a message says to people; a picture is `[picture]`."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] if part["type"] == "text" else "[picture]" for part in content)
