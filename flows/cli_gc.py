"""The command `npo gc`, which removes what a run no longer needs."""

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

if TYPE_CHECKING:
    from npo_core.debris import Removal
    from npo_core.retention import Kept

Run = Annotated[str, typer.Argument(help="The run: STORE/NAME, say runs/demo or file:///data/runs/demo.")]

SHOWN = 10
"""Most names of files that are shown to people."""


def register(app: typer.Typer) -> None:
    """Adds this command to `app`."""
    app.command()(gc)


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
    that the run began with.

    Examples:

      npo gc runs/demo --dry-run

      npo gc runs/demo --keep-last 1 --keep-every 40

      npo gc runs/demo --grace-hours 0 --json
    """
    from npo_core.artifacts import open_run
    from npo_core.config_file import overridden
    from npo_core.gc import carry_out, plan_gc
    from npo_core.workspace import Workspace

    opened = Workspace.of(open_run(run))
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
