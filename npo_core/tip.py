"""Where a run's main line stands, and what AutoNPO sees there: from the store alone, without a model."""

from __future__ import annotations

from datetime import UTC, datetime

from npo_core import lineage
from npo_core.artifacts import RunArtifacts
from npo_core.controller import check
from npo_core.interfaces import NearFutureError
from schemas.config import Config
from schemas.decisions import DecisionCode, DecisionRecord
from schemas.future import AutoNPOSection
from schemas.records import CheckpointRef, LegRecord


def leg_checkpoint(run: RunArtifacts, leg: LegRecord, step: int) -> CheckpointRef:
    """The checkpoint from which a leg goes on at `step`.

    Raises:
        NearFutureError: the leg has not come that far.
    """
    if step == leg.start:
        if leg.parent is None:
            raise NearFutureError(f"leg {leg.leg_id} has no parent to start from; run the warm-start stage")
        return leg.parent
    return run.require_checkpoint(leg.leg_id, step).ref


def main_line_step(run: RunArtifacts) -> tuple[int, LegRecord]:
    """How far the main line has come, and the leg that its tip is in.

    Raises:
        NearFutureError: the run has no main line yet.
    """
    head = run.head()
    if head is None:
        raise NearFutureError(f"{run.uri} has no main line yet; run the warm-start stage first")
    line = lineage.main_line(run.legs(), head)
    tip = line[-1].leg
    return lineage.line_stop(line, {tip.leg_id: run.segments(tip.leg_id)}), tip


def look(run: RunArtifacts, settings: AutoNPOSection, leg: LegRecord, step: int) -> DecisionRecord:
    """What AutoNPO makes of a leg's checkpoint at `step`: the decision that was committed, or else what the stored
    metrics say. It changes nothing, and between two segments every millisecond counts."""
    today = leg_checkpoint(run, leg, step)
    committed = run.decision(today.leg_id, step)
    if committed is not None:
        return committed
    replaying = leg.guide_id is not None and step < run.require_guide(leg.guide_id).spec.stop
    verdict = check(run.monitor_state(today), step, run.decisions(), settings, replaying)
    numbers = dict(verdict.numbers)
    return DecisionRecord(
        leg_id=today.leg_id,
        step=step,
        intervene=False,
        reason=verdict.reason,
        source="autonpo",
        code=verdict.code,
        clock=int(numbers.pop("clock")),
        numbers=numbers,
        created_at=datetime.now(UTC).isoformat(),
    )


def waiting(run: RunArtifacts, config: Config) -> DecisionRecord | None:
    """What the main line's tip waits for: a rollback that was decided and is not done, or, before the end of an AutoNPO
    run, the decision about a warning (its code is `warning`)."""
    step, tip = main_line_step(run)
    if tip.parent is None:
        return None  # nothing is trained yet
    spec = run.require_guide(tip.guide_id).spec if tip.guide_id else None
    # Within a replay it is the decision about the guide's policy that is being carried out.
    today = spec.checkpoint if spec and step < spec.stop else leg_checkpoint(run, tip, step)
    decision = run.decision(today.leg_id, today.step)
    if decision is not None:
        return decision if decision.intervene else None
    if config.algorithm.method != "autonpo" or step >= config.run.total_steps:
        return None
    seen = look(run, config.autonpo, tip, step)
    return seen if seen.code is DecisionCode.WARNING else None
