"""The commands that read runs: ls, show, inspect, metrics, compare, explain, verify, report, export. None trains."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.text import Text
from rich.tree import Tree

from flows.cli_output import Json, cell, emit, table, visible
from flows.cli_scores import benchmarks_table
from npo_core.interfaces import ConfigurationError

if TYPE_CHECKING:
    from npo_core.artifacts import RunArtifacts
    from npo_core.workspace import Workspace

Run = Annotated[str, typer.Argument(help="The run: STORE/NAME, say runs/demo or file:///data/runs/demo.")]

ROWS_SHOWN = 10
"""About as many rows of a comparison are shown to people."""
METRICS_SHOWN = ("step", "kind", "reward", "batch/accuracy", "entropy", "npo/replaced", "trained_steps", "total_tokens")
"""Columns that `npo metrics` shows to people; `--json` has all."""


def register(app: typer.Typer) -> None:
    """Adds these commands to `app`."""
    for command in (ls, show, inspect, metrics, compare, explain, verify, report, export):
        app.command()(command)


def ls(
    store: Annotated[str, typer.Argument(help="The store, say runs or file:///data/runs.")], json: Json = False
) -> None:
    """Lists the runs of a store.

    Example:

      npo ls runs
    """
    from npo_core import views
    from npo_core.store import open_store

    opened = open_store(store)
    rows = views.ls(opened)
    columns = ("run_id", "method", "head_step", "accuracy")
    cells = ([*(row[column] for column in columns), row["created_at"][:16].replace("T", " ")] for row in rows)
    shown = table((*columns, "created (UTC)"), cells, f"Runs in {opened.root}")
    emit(json, {"runs": rows}, shown if rows else Text(f"no runs in {opened.root}"))


def show(run: Run, json: Json = False) -> None:
    """Shows a run's tree of legs, its head, interventions and token counts.

    Example:

      npo show runs/demo
    """
    from npo_core import views
    from npo_core.sources.told import told
    from schemas.records import DataReport

    shown = views.show(open_existing(run))
    head, tokens = shown["head"], shown["tokens"]
    where = f"head: leg {head['leg_id']} at step {head['step']}" if head else "no head yet"
    guides = [
        f"guide {g['guide_id']}: leg {g['leg_id']} at step {g['step']} solves {g['solved']} of {g['prompts']} prompts "
        f"of steps {g['start']}–{g['stop']}"
        for g in shown["guides"]
    ]
    decisions = [f"intervention at step {d['start']}: {d['reason']}" for d in shown["interventions"]]
    spent = (
        f"generated tokens: main line {tokens['policy']:,}, guides {tokens['guide']:,}, "
        f"scouts and discarded {tokens['discarded']:,}"
    )
    rows = told(DataReport.model_validate(shown["data"])) if shown["data"] else []
    benchmarks = [benchmarks_table(shown["benchmarks"])] if shown["benchmarks"] else []
    text = Group(_tree(shown), Text("\n".join([where, *map(visible, rows), *guides, *decisions, spent])), *benchmarks)
    emit(json, shown, text)


def inspect(
    run: Run,
    step: Annotated[int | None, typer.Option(min=0, help="Only this step.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Only this prompt_id.")] = None,
    source: Annotated[str | None, typer.Option(help="Only these rows: policy or guide.")] = None,
    min_reward: Annotated[float | None, typer.Option(help="Only rewards from this on.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most rows; by default 20, an export has all.")] = None,
    parquet: Annotated[Path | None, typer.Option(help="Write the rows to this Parquet file, tokens included.")] = None,
    json: Json = False,
) -> None:
    """Shows trajectories, or exports them.

    Examples:

      npo inspect runs/demo --step 12 --source guide

      npo inspect runs/demo --prompt 3da5d573a679 --parquet one.parquet
    """
    from npo_core import trajectories
    from npo_core.rows import Where

    if source not in (None, "policy", "guide"):
        raise ConfigurationError(f"--source {source!r} is neither policy nor guide")
    opened = open_existing(run)
    where = Where(step, None if prompt is None else (prompt,), source, min_reward)
    if parquet is not None:
        count = trajectories.export(opened, parquet, where, limit)
        emit(json, {"path": str(parquet), "count": count, "rows": []}, Text(f"{count} rows written to {parquet}"))
        return
    found = trajectories.inspect(opened, where, limit or 20).to_dicts()
    emit(json, {"rows": found}, Group(*map(_trajectory, found)) if found else "no trajectory meets these conditions")


def metrics(run: Run, json: Json = False) -> None:
    """Shows the main line's metrics, one row a step, with what it took by then, scouts and guides included.

    Example:

      npo metrics runs/demo --json
    """
    from npo_core import views

    rows = views.metrics(open_existing(run)).fill_nan(None)
    shown = table(METRICS_SHOWN, rows.select(METRICS_SHOWN).iter_rows(), "Main line")
    emit(json, {"rows": rows.to_dicts()}, shown if rows.height else "no committed step yet")


def compare(
    runs: Annotated[list[str], typer.Argument(help="Runs, STORE/NAME each; the first is the reference.")],
    json: Json = False,
) -> None:
    """Compares runs at equal main-line steps, equal trained steps and equal generated tokens.

    Example:

      npo compare runs/testbed-grpo runs/testbed-npo
    """
    from npo_core.compare import AXES, compare

    result = compare([open_existing(run) for run in runs])
    emit(json, result, Group(*_comparison(result, AXES)))


def explain(
    run: Run,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Explain with another value, say -s autonpo.patience=40. Repeatable."),
    ] = None,
    json: Json = False,
) -> None:
    """Explains every decision of AutoNPO: what it read after each segment, and why it rolled back or did not.

    Below that, who asked for an intervention that another was to make.

    With other settings: up to the first decision that would have been another one. On a run of another method: what
    AutoNPO would have made of it.

    Examples:

      npo explain runs/testbed-autonpo

      npo explain runs/testbed-autonpo -s autonpo.patience=40 --json
    """
    from npo_core.config_file import overridden
    from npo_core.explain import explain, periods

    opened = _workspace(open_existing(run))
    then = opened.config
    now = overridden(then, overrides or [], "autonpo")
    rows = explain(opened.run, then.autonpo, now.autonpo)
    cells = ([p.steps, p.clock, p.code, p.reason] for p in periods(rows))
    shown = table(("step", "trained steps", "decision", "why"), cells, f"AutoNPO on {opened.run.uri}")
    requests = opened.run.requests()
    asked = [f"request of {r.by} at step {r.step} of leg {r.leg_id}: {r.reason}" for r in requests]
    emit(
        json,
        {"decisions": rows, "requests": [request.model_dump(mode="json") for request in requests]},
        Group(shown, Text("\n".join(asked))) if rows else Text("no committed segment yet"),
    )


def verify(run: Run, json: Json = False) -> None:
    """Checks manifests, hashes and lineage, that every step is there exactly once, and every guide answer again.

    Exit code 1 if there are faults.

    Example:

      npo verify runs/demo
    """
    from npo_core.verifiers.kinds import load_verifier
    from npo_core.verify import verify_run

    opened = _workspace(open_existing(run))
    # Not the workspace's, which refuses to be another one than the run's: that is one of the faults.
    with closing(load_verifier(opened.config)) as verifier:
        faults = [asdict(f) for f in verify_run(opened.run, verifier, opened.decode)]
    shown = table(("key", "problem", "remedy"), (fault.values() for fault in faults), f"{len(faults)} faults")
    emit(json, {"faults": faults}, shown if faults else Text(f"{opened.run.uri}: no faults"))
    if faults:
        raise typer.Exit(1)


def report(
    run: Run,
    out: Annotated[Path | None, typer.Option(help="Write it to this file instead of into the store.")] = None,
    json: Json = False,
) -> None:
    """Writes the run's report, one HTML file that needs no network to open.

    Examples:

      npo report runs/demo

      npo report runs/demo --out demo.html
    """
    from npo_core.report import write_report

    opened = _workspace(open_existing(run))
    html = write_report(opened.run, opened.token_text).encode()
    if out is None:
        where = opened.run.put_report("report.html", html)
    else:
        where = str(out)
        try:
            out.write_bytes(html)
        except OSError as error:
            raise ConfigurationError(f"--out {out} cannot be written ({error.strerror}); name another file") from error
    emit(json, {"report": where}, Text(where))


def export(
    run: Run,
    to: Annotated[Path, typer.Option(help="Directory to create.")],
    step: Annotated[
        int | None, typer.Option(min=0, help="Step of the main line; by default its last checkpoint.")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a run with model.lora the adapter alone, in peft's files.")
    ] = False,
    json: Json = False,
) -> None:
    """Exports a model directory that from_pretrained and vLLM load; adapters are merged into it.

    Example:

      npo export runs/demo --to ./model --step 80
    """
    from npo_core.artifacts import main_line_checkpoint
    from npo_core.export import export_checkpoint

    opened = open_existing(run)
    ref = main_line_checkpoint(opened, step)
    path, digest = export_checkpoint(opened, ref, to, adapter)
    emit(json, {"path": str(path), "digest": digest, "step": ref.step}, f"step {ref.step} exported to {path}")


def open_existing(uri: str) -> RunArtifacts:
    """The run at `STORE/RUN`, which must be there.

    Raises:
        ConfigurationError: the URI names no run.
        NearFutureError: there is none; names those that there are.
    """
    from npo_core.artifacts import open_run

    run = open_run(uri)
    run.record()  # says what runs there are if there is no such one
    return run


def _workspace(run: RunArtifacts) -> Workspace:
    from npo_core.workspace import Workspace

    return Workspace.of(run)


# ---- for people


def _tree(shown: dict[str, Any]) -> Tree:
    def grow(node: Tree, parent: str | None) -> Tree:
        for leg in shown["legs"]:
            if leg["parent"] == parent:
                guide = f", guide {leg['guide_id']}" if leg["guide_id"] else ""
                label = f"{leg['kind']} {leg['leg_id']}  steps {leg['start']}–{leg['stop']}  {leg['status']}{guide}"
                grow(node.add(Text(label)), leg["leg_id"])
        return node

    return grow(Tree(Text(shown["run"])), None)


def _trajectory(row: dict[str, Any]) -> Text:
    marks = [
        f"leg {row['leg_id']} step {row['step']} prompt {row['prompt_id']} ({row['task']}) slot {row['slot']}",
        row["source"] + (", displaced" if row["displaced"] else ""),
        f"reward {row['reward']:.2f}",
        f"advantage {cell(row['advantage'])}",
        f"group accuracy {cell(row['group_accuracy'])}",
    ]
    text = Text(" · ".join(marks), style="dim")
    text.append(f"\n{visible(row['prompt'])}\n", style="default not dim")
    text.append(f"{visible(row['text'])}\n", style="not dim green" if row["correct"] else "not dim red")
    text.append(f"{visible(row['verdict'])}, {row['finish_reason']}\n")
    return text


def _comparison(result: dict[str, Any], axes: Iterable[str]) -> Iterable[Any]:
    names = list(dict.fromkeys(row["run"] for row in result["rows"]))
    labels = [name.rsplit("/", 1)[-1] for name in names]
    if len(set(labels)) < len(labels):
        labels = names
    for axis in axes:
        at: dict[int, dict[str, float | None]] = {}
        for row in result["rows"]:
            if row["axis"] == axis:
                at.setdefault(row["at"], {})[row["run"]] = row["accuracy"]
        rows = [[cost, *(scores[name] for name in names)] for cost, scores in at.items()]
        # The first, the last and some between: `--json` has all.
        rows = rows[: -1 : max(1, len(rows) // ROWS_SHOWN)] + rows[-1:]
        yield table((axis, *labels), rows, f"Held-out accuracy at equal {axis.replace('_', ' ')}")
    spent = [[label, *list(row.values())[1:]] for label, row in zip(labels, result["spent"], strict=True)]
    heads = ("run", "trained steps", "main line's tokens", "guides'", "scouts' and discarded")
    yield table(heads, spent, "Spent by the whole run")
    if result["target"] is None:
        yield Text("the first run has too few evaluations for a target accuracy")
        return
    rows = [
        [label, *(value for axis in axes for value in (reached[axis], reached["speedup"][axis]))]
        for label, reached in zip(labels, result["steps_to_accuracy"], strict=True)
    ]
    columns = ("run", *(column for axis in axes for column in (axis, "speed-up")))
    title = f"Cost of reaching {result['target']:.3f}, the first run's accuracy at 60 % of its steps (–: never)"
    yield table(columns, rows, title)
