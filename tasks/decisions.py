"""Writes down why training rolls back, before it does."""

from __future__ import annotations

from prefect import task

from schemas.records import DecisionRecord, GuideSpec
from tasks.options import OPTIONS
from tasks.workspaces import workspace


@task(name="record decision", **OPTIONS)
def record_schedule(run: str, guide_id: str) -> GuideSpec:
    """Commits the decision to roll back to the start of a guide's window, asked for by configuration or by a user."""
    from npo_core.workspace import now

    opened = workspace(run)
    # Read and verified before anything moves: a guide that is refused must not cost the main line its steps.
    opened.guide(guide_id)
    manifest = opened.run.require_guide(guide_id)
    spec = manifest.spec
    opened.run.commit_decision(
        DecisionRecord(
            leg_id=spec.checkpoint.leg_id,
            step=spec.checkpoint.step,
            intervene=True,
            reason=f"asked for: roll back to step {spec.start} and replay to step {spec.stop} with the guide from step "
            f"{spec.checkpoint.step}, which solves {manifest.solved} of {len(spec.prompt_ids)} prompts",
            source="schedule",
            start=spec.start,
            lookahead=spec.checkpoint.step - spec.start,
            window=spec.stop - spec.start,
            created_at=now(),
        )
    )
    return spec
