"""`npo stage`: one stage of an existing run, alone. What is committed already is found, not done again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Group
from rich.table import Table

from flows.cli_output import Json, cell, emit, table
from flows.cli_scores import scores_table
from flows.local_server import prefect_api
from npo_core.interfaces import ConfigurationError
from schemas.decisions import DecisionRecord
from schemas.records import CheckpointRef, GuideManifest

if TYPE_CHECKING:  # it imports Prefect
    from flows.monitoring import Tick

app = typer.Typer(
    help="Runs one stage of an existing run; committed work is found, not done again.", no_args_is_help=True
)

Run = Annotated[str, typer.Argument(help="The run: STORE/NAME, say runs/demo or file:///data/runs/demo.")]
Force = Annotated[
    bool, typer.Option("--force", help="Compute again what is committed, and exit with 1 if it comes out otherwise.")
]
Step = Annotated[int | None, typer.Option(min=0, help="Step of the main line; its tip by default.")]


def stage(name: str, run: str, json: bool, **options: Any) -> None:
    """Runs a stage's flow and prints what it made."""
    from npo_core.artifacts import open_run

    uri = open_run(run).uri
    with prefect_api():
        from flows import monitoring, stages

        flow: Any = {
            "warm-start": stages.warm_start,
            "scout": stages.scout,
            "guide": stages.guide,
            "replay": stages.replay,
            "main": stages.main,
            "monitor": monitoring.monitor,
            "intervene": monitoring.intervene,
            "watchdog": monitoring.watchdog,
            "report": stages.report,
        }[name]
        made = flow(uri, **options)
    artifacts = [] if made is None else [made if isinstance(made, str) else made.model_dump(mode="json")]
    emit(json, {"stage": name, "artifacts": artifacts}, f"{name}: {_in_words(made)}")


def _in_words(made: str | CheckpointRef | GuideManifest | DecisionRecord | Tick | None) -> str:
    match made:
        case None:
            return "no decision to roll back waits; `npo stage monitor` decides about a warning"
        case DecisionRecord():
            return f"{made.code} at step {made.step}: {made.reason}"
        case CheckpointRef():
            return f"leg {made.leg_id} at step {made.step}"
        case GuideManifest():
            window = f"steps {made.spec.start}–{made.spec.stop}"
            return f"guide {made.guide_id} solves {made.solved} of {made.asked} prompts of {window}"
        case str():
            return made
    return f"{made.outcome} at step {made.step}: {made.reason}"


def _signal_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Q, V and S by step and distance; the largest S of a step and estimator is starred."""
    names = ("kl_token", "kl_sequence", "chi2")
    best = {
        (row["step"], name): max(r[f"signal_{name}"] or 0.0 for r in rows if r["step"] == row["step"])
        for row in rows
        for name in names
    }
    lines = []
    for row in rows:
        line = [row["step"], row["lookahead"], row["failed"], row["quality"], row["baseline"]]
        for name in names:
            value = row[f"signal_{name}"]
            star = "*" if value is not None and value == best[row["step"], name] else ""
            line += [row[name], cell(value) + star]
        lines.append(line)
    heads = (f"{symbol} by {name}" for name in names for symbol in ("V", "S"))
    made = table(("t", "Δ", "failed", "Q", "baseline", *heads), lines, "Signal (*: the largest S of a step)")
    # Eleven columns of numbers fit a terminal's 80 without frames.
    made.box, made.padding = box.SIMPLE_HEAD, 0
    return made


@app.command("warm-start")
def warm_start(
    run: Run,
    rebuild: Annotated[
        Path | None,
        typer.Option(help="Train the embedded testbed's warm start again into this directory, and compare."),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Commits the starting policy and evaluates it.

    Examples:

      npo stage warm-start runs/demo

      npo stage warm-start runs/demo --rebuild /data/warm
    """
    if rebuild is None:
        stage("warm-start", run, json, force=force)
        return
    from npo_core.testbed import warm_start as recipe

    if rebuild.exists() and any(rebuild.iterdir()):
        raise ConfigurationError(f"--rebuild {rebuild} is not empty; name a new directory")
    rebuilt, shipped = recipe.rebuild(rebuild)
    same = "the shipped one's" if rebuilt == shipped else f"not the shipped one's ({shipped[:12]})"
    artifact = {"path": str(rebuild), "digest": rebuilt, "shipped_digest": shipped, "identical": rebuilt == shipped}
    emit(json, {"stage": "warm-start", "artifacts": [artifact]}, f"warm start in {rebuild}: {rebuilt[:12]}, {same}")


@app.command()
def scout(
    run: Run,
    start: Annotated[int, typer.Option(min=0, help="Step of the main line to look ahead of.")],
    lookahead: Annotated[int, typer.Option(min=1, help="Δ, in steps.")],
    force: Force = False,
    json: Json = False,
) -> None:
    """Trains the future leg: Δ steps ahead of a step of the main line.

    Example:

      npo stage scout runs/demo --start 80 --lookahead 40
    """
    stage("scout", run, json, force=force, start=start, lookahead=lookahead)


@app.command()
def guide(
    run: Run,
    leg: Annotated[str, typer.Option(help="Leg whose policy answers (a scout's id; `npo show` lists them).")],
    step: Annotated[int, typer.Option(min=0, help="Step of that leg's checkpoint.")],
    start: Annotated[int, typer.Option(min=0, help="First step of the window that the guide serves.")],
    stop: Annotated[int, typer.Option(min=1, help="First step after the window.")],
    force: Force = False,
    json: Json = False,
) -> None:
    """Lets a checkpoint answer the prompts of a window and stores one verified-correct trajectory a prompt.

    Example:

      npo stage guide runs/demo --leg 1f2e3d4c5b6a --step 120 --start 80 --stop 120
    """
    from npo_core.artifacts import open_run

    opened = open_run(run)
    checkpoint = opened.require_checkpoint(opened.leg(leg).leg_id, step)
    stage("guide", run, json, force=force, checkpoint=checkpoint.ref, start=start, stop=stop)


@app.command()
def replay(
    run: Run,
    guide: Annotated[str, typer.Option(help="Guide to mix in (`npo show` lists them).")],
    force: Force = False,
    json: Json = False,
) -> None:
    """Rolls the main line back to the start of a guide's window and runs it again with the guide mixed in.

    Example:

      npo stage replay runs/demo --guide 0a1b2c3d4e5f
    """
    stage("replay", run, json, force=force, guide_id=guide)


@app.command()
def main(
    run: Run,
    stop: Annotated[int, typer.Option(min=1, help="Train until this step.")],
    force: Force = False,
    json: Json = False,
) -> None:
    """Goes on with the main line, on-policy.

    Example:

      npo stage main runs/demo --stop 200
    """
    stage("main", run, json, force=force, stop=stop)


@app.command()
def monitor(run: Run, json: Json = False) -> None:
    """Lets AutoNPO decide whether the main line rolls back from where it stands; it is written down, not acted on.

    Example:

      npo stage monitor runs/demo
    """
    stage("monitor", run, json)


@app.command()
def intervene(run: Run, json: Json = False) -> None:
    """Carries out the decision to roll back that the main line waits for, if there is one.

    Example:

      npo stage intervene runs/demo
    """
    stage("intervene", run, json)


@app.command()
def watchdog(run: Run, json: Json = False) -> None:
    """Looks once, without a model, whether an AutoNPO run waits at a warning; starts the deployment of `intervene` on
    the Prefect server if `autonpo.executes` is watchdog, and files a request otherwise.

    Example:

      npo stage watchdog runs/demo
    """
    stage("watchdog", run, json)


@app.command()
def evaluate(
    run: Run,
    step: Step = None,
    benchmark: Annotated[
        list[Path] | None,
        typer.Option(help="YAML file of prompts to ask instead of the held-out ones. Repeatable."),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Evaluates the main line's policy on the held-out prompts, or on benchmarks: pass@1 over all samples and pass@k,
    by task, with 95 % bootstrap intervals over prompts.

    Examples:

      npo stage evaluate runs/demo --step 80

      npo stage evaluate runs/demo --step 80 --force

      npo stage evaluate runs/demo --benchmark deploy/benchmarks/testbed-long.yaml
    """
    from npo_core.artifacts import open_run
    from npo_core.config_file import load_benchmark
    from npo_core.evaluated import read_scores

    opened = open_run(run)
    files = [load_benchmark(path) for path in benchmark] if benchmark else [None]
    with prefect_api():
        from flows import stages

        made = [stages.evaluate(opened.uri, step, file, force) for file in files]
    scored = [(one, read_scores(opened, one)) for one in made]
    artifacts = [{**one.model_dump(mode="json"), "scores": scores.as_json()} for one, scores in scored]
    emit(json, {"stage": "evaluate", "artifacts": artifacts}, Group(*(scores_table(*pair) for pair in scored)))


@app.command()
def signal(
    run: Run,
    step: Annotated[list[int] | None, typer.Option(min=0, help="A step t. Repeatable; start and middle.")] = None,
    lookahead: Annotated[
        list[int] | None, typer.Option(min=1, help="A distance Δ. Repeatable; by default eight.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Training prompts drawn at each step.")] = 128,
    samples: Annotated[int, typer.Option(min=1, help="Answers a prompt and policy.")] = 8,
    force: Force = False,
    json: Json = False,
) -> None:
    """Measures Q(Δ), V(Δ) and S(Δ) = Q/V on a run's own checkpoints: how far ahead its best guide lies.

    Q is the share of the prompts that π(t) fails and π(t+Δ) solves, `baseline` that which π(t) solves itself when it is
    asked again. The report draws the curves.

    Examples:

      npo stage signal runs/testbed-grpo

      npo stage signal runs/testbed-grpo --step 0 --step 80 --lookahead 20 --lookahead 40 --samples 32
    """
    from npo_core.artifacts import open_run

    opened = open_run(run)
    with prefect_api():
        from flows import stages

        made = stages.signal(opened.uri, tuple(step or ()), tuple(lookahead or ()), prompts, samples, force)
    rows = opened.table(made, "signal").to_pylist()
    emit(json, {"stage": "signal", "artifacts": [{**made.model_dump(mode="json"), "rows": rows}]}, _signal_table(rows))


@app.command()
def report(run: Run, json: Json = False) -> None:
    """Writes the run's report.

    Example:

      npo stage report runs/demo
    """
    stage("report", run, json)
