"""The commands about the files of a run: which of them count (files), and which can go (gc)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from flows.cli_output import Json, emit, table
from flows.cli_views import Run, open_existing

if TYPE_CHECKING:
    from npo_core.debris import Removal
    from npo_core.retention import Kept

SHOWN = 10
"""Most names of files that are shown to people."""


def register(app: typer.Typer) -> None:
    """Adds these commands to `app`."""
    for command in (files, gc):
        app.command()(command)


def files(
    run: Run,
    role: Annotated[
        str,
        typer.Option(
            help="rollouts, metrics, telemetry, trajectories and window (guides'), samples (evaluations'), signal."
        ),
    ] = "rollouts",
    main_line: Annotated[bool, typer.Option("--main-line", help="Only what is on the main line.")] = False,
    json: Json = False,
) -> None:
    """Lists the committed Parquet files of a role, one URI a line, for polars, DuckDB and pandas.

    A glob over the folder may also see what killed attempts left.

    Examples:

      npo files runs/demo

      npo files runs/demo --role metrics --main-line --json
    """
    from npo_core.data_files import data_files

    found = data_files(open_existing(run), role, main_line)
    if json:
        emit(json, {"files": found}, "")
    else:
        for file in found:
            print(file["uri"])


def gc(
    run: Run,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    keep_last: Annotated[int | None, typer.Option(min=1, help="Newest checkpoints that stay of every leg.")] = None,
    keep_every: Annotated[
        int | None, typer.Option(min=0, help="Main-line checkpoints at multiples of this stay; 0: not for that.")
    ] = None,
    grace_hours: Annotated[
        float | None, typer.Option(min=0, help="Debris younger than this stays; of the last 5 minutes in any case.")
    ] = None,
    json: Json = False,
) -> None:
    """Removes weights and optimizers that the run no longer needs, and what killed processes left.

    Whatever the run may still train on, roll back to, replay or evaluate stays; so do rollouts, metrics, guides,
    evaluations and decisions. It may run while the run does. Options left out are those of the section `retention`
    that the run was last opened with.

    Examples:

      npo gc runs/demo --dry-run

      npo gc runs/demo --keep-last 1 --keep-every 40

      npo gc runs/demo --grace-hours 0 --json
    """
    from npo_core.config_file import overridden
    from npo_core.gc import carry_out, plan_gc
    from npo_core.workspace import Workspace

    opened = Workspace.of(open_existing(run))
    asked = {"keep_last": keep_last, "keep_every": keep_every, "grace_hours": grace_hours}
    overrides = [f"retention.{name}={value}" for name, value in asked.items() if value is not None]
    config = overridden(opened.config, overrides, "retention")
    plan = plan_gc(opened.run, config)
    if not dry_run:
        plan = carry_out(opened.run, plan, config.retention)
    result = {
        "removed": [asdict(removal) for removal in plan.removed],
        "kept": [asdict(kept) for kept in plan.kept],
        "unknown": list(plan.unknown),
        "freed_bytes": plan.freed_bytes,
        "dry_run": dry_run,
    }
    what = "would be freed" if dry_run else "freed"
    parts = [
        _removed(plan.removed, f"{opened.run.uri}: {human_bytes(plan.freed_bytes)} {what}"),
        _kept(plan.kept),
        *([Text(f"not of this program, left alone: {_names(plan.unknown)}")] if plan.unknown else []),
    ]
    emit(json, result, Group(*parts))


def human_bytes(count: float) -> str:
    """A size for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _removed(removed: Iterable[Removal], title: str) -> Table | Text:
    files, sizes = Counter[str](), Counter[str]()
    for removal in removed:
        files[removal.why] += 1
        sizes[removal.why] += removal.bytes
    rows = ((why, files[why], human_bytes(sizes[why])) for why in files)
    return table(("what", "files", "size"), rows, title) if files else Text(title)


def _kept(kept: Iterable[Kept]) -> Table:
    steps: dict[tuple[str, str], list[int]] = {}
    for checkpoint in kept:
        steps.setdefault((checkpoint.leg_id, checkpoint.why), []).append(checkpoint.step)
    rows = ((leg_id, ", ".join(map(str, at)), why) for (leg_id, why), at in steps.items())
    return table(("leg", "steps", "why"), rows, "Checkpoints that stay")


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
