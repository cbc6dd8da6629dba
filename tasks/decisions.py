"""Writes down why training rolls back, before it does."""

from __future__ import annotations

import logging
from typing import NamedTuple

from prefect import task

from schemas.decisions import DecisionRecord
from schemas.records import CheckpointRef
from tasks.legs import main_line_step
from tasks.options import OPTIONS
from tasks.workspaces import workspace

logger = logging.getLogger("npo")


class Replay(NamedTuple):
    """What a decision to replay says that the replay needs."""

    parent: CheckpointRef
    stop: int


@task(name="record decision", **OPTIONS)
def record_schedule(run: str, guide_id: str) -> Replay:
    """Commits the decision to roll back to the start of a guide's window, asked for by configuration or by a user."""
    from npo_core.artifacts import main_line_checkpoint
    from npo_core.controller import trained_clock
    from npo_core.workspace import now

    opened = workspace(run)
    # Read, verified and looked up before anything moves: what is refused must not cost the main line its steps.
    if not sum(1 for _ in opened.guide_trajectories(guide_id)):
        logger.warning("guide %s solves no prompt: its replay will repeat the main line", guide_id)
    manifest = opened.run.require_guide(guide_id)
    spec = manifest.spec
    parent = main_line_checkpoint(opened.run, spec.start)
    opened.run.commit_decision(
        DecisionRecord(
            leg_id=spec.checkpoint.leg_id,
            step=spec.checkpoint.step,
            intervene=True,
            reason=f"asked for: roll back to step {spec.start} and replay to step {spec.stop} with the guide from step "
            f"{spec.checkpoint.step}, which solves {manifest.solved} of {manifest.asked} prompts",
            source="schedule",
            start=spec.start,
            lookahead=spec.checkpoint.step - spec.start,
            window=spec.stop - spec.start,
            parent=parent,
            guide_id=guide_id,
            clock=trained_clock(opened.run.decisions(), main_line_step(run)[0]),
            created_at=now(),
        )
    )
    return Replay(parent, spec.stop)
