"""`npo run --dry-run`: what would happen, what it would take, and what stands in its way. It changes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.cli_output import emit, table
from flows.cli_store import human_bytes
from npo_core.interfaces import ConfigurationError

if TYPE_CHECKING:  # it loads NumPy
    from npo_core.dry_run import DryRun
    from npo_core.plan import Stage


def show_dry_run(config: str, overrides: Sequence[str], json: bool) -> None:
    """Checks, plans and prints.

    Raises:
        ConfigurationError: something is wrong; names all of it.
    """
    from npo_core.config_file import draft_config
    from npo_core.dry_run import dry_run
    from npo_core.machine_check import this_machine

    # A verifier's process imports the user's module, and would write its bytecode beside it.
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    found = dry_run(draft_config(config, overrides), this_machine())
    emit(json, found.as_json(), Group(*_for_people(found)))
    if found.faults:
        faults = "\n  ".join(fault.said for fault in found.faults)
        raise ConfigurationError(f"configuration {config} cannot be run:\n  {faults}")


def _for_people(found: DryRun) -> Iterable[RenderableType]:
    rows = [[check.check, check.status, check.said] for check in found.checks]
    yield _dense(
        ("check", "status", "found"),
        rows,
        f"Dry run of {found.run or 'a wrong configuration'}: nothing is begun, nothing is written",
    )
    plan = found.plan
    if plan is None:
        return
    stages = [_stage(stage) for stage in plan.stages]
    evaluated = ["evaluations", None, None, plan.evaluation_rollouts, plan.evaluation_tokens, None, plan.evaluations]
    heads = ("stage", "steps", "times", "rollouts", "tokens", "checkpoints", "evaluated")
    yield _dense(heads, [*stages, evaluated], f"Stages of {plan.method}, counts at most")
    parts = [f"{plan.trained_steps:,} trained steps, {plan.tokens['total']:,} generated tokens at most"]
    if (storage := found.storage) is not None:
        parts.append(
            f"storage: {plan.checkpoints} checkpoints of {human_bytes(storage.checkpoint)}, together "
            f"{human_bytes(storage.checkpoints)} (after npo gc {plan.kept_checkpoints}: {human_bytes(storage.kept)}); "
            f"{plan.rows:,} trajectories {human_bytes(storage.rows)}"
        )
    if (memory := found.memory) is not None:
        held = memory.learner
        parts.append(
            f"memory of a learner process ({memory.processes}): weights {human_bytes(held.weights)}, gradients "
            f"{human_bytes(held.gradients)}, optimizer {human_bytes(held.master + held.moments)}; on the first device "
            f"{human_bytes(memory.device)} with the stage's own copy and cache, activations and logits apart"
        )
    yield Text("\n".join(parts))


def _stage(stage: Stage) -> list[Any]:
    steps = f"{stage.start}–{stage.stop}" if stage.start is not None else "as decided"
    times = stage.times if stage.times == 1 else f"≤ {stage.times}"
    return [
        stage.kind,
        steps,
        times,
        stage.rollouts or None,
        stage.tokens or None,
        stage.checkpoints or None,
        stage.evaluations or None,
    ]


def _dense(heads: Sequence[str], rows: Iterable[Iterable[Any]], title: str) -> Table:
    made = table(heads, rows, title)
    made.box, made.padding = box.SIMPLE_HEAD, (0, 1, 0, 0)
    return made
