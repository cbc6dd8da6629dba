"""AutoNPO's monitor: reads a checkpoint's state, probes if that warns, and writes the decision down before anything
acts on it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event

from schemas.decisions import DecisionRecord
from schemas.records import CheckpointRef, LegRecord
from tasks.artifacts import key
from tasks.legs import leg_checkpoint, main_line_checkpoint, main_line_step
from tasks.options import OPTIONS
from tasks.workspaces import workspace

if TYPE_CHECKING:
    from npo_core.controller import Verdict
    from npo_core.workspace import Workspace
    from schemas.decisions import Candidate

logger = logging.getLogger("npo")

EVENT = "npo.lookahead.stagnation"
"""Name of the Prefect event that tells of a warning."""


def look(run: str, leg: LegRecord, step: int) -> DecisionRecord:
    """What AutoNPO makes of a leg's checkpoint at `step`: the decision that was committed, or else what the stored
    metrics say. No task: it changes nothing, and between two segments every millisecond counts."""
    from npo_core.controller import check
    from npo_core.workspace import now

    opened = workspace(run)
    today = leg_checkpoint(run, leg, step)
    committed = opened.run.decision(today.leg_id, step)
    if committed is not None:
        return committed
    replaying = leg.guide_id is not None and step < opened.run.require_guide(leg.guide_id).spec.stop
    state = opened.run.monitor_state(today)
    verdict = check(state, step, opened.run.decisions(), opened.config.autonpo, replaying)
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
        created_at=now(),
    )


@task(name="confirm warning", task_run_name="confirm {warning.step}", **OPTIONS)
def confirm(run: str, warning: DecisionRecord) -> DecisionRecord:
    """Probes the policy that gave the warning, decides, and commits the decision before anything acts on it. Found if
    it is committed."""
    opened = workspace(run)
    committed = opened.run.decision(warning.leg_id, warning.step)
    if committed is not None:
        return committed
    logger.info("warning at step %d: %s", warning.step, warning.reason)
    decision = opened.run.commit_decision(_decide(opened, warning))
    logger.info("decision at step %d: %s", decision.step, decision.reason)
    return decision


@task(name="announce decision", **OPTIONS)
def announce(run: str, decision: DecisionRecord) -> None:
    """Tells Prefect of a warning and what came of it: an event for automations, an artifact for people."""
    from npo_core.explain import markdown

    run_id = workspace(run).run.run_id
    emit_event(
        event=EVENT,
        resource={"prefect.resource.id": f"npo.run.{run_id}", "prefect.resource.name": run_id},
        payload={
            "run": run,
            "leg_id": decision.leg_id,
            "step": decision.step,
            "intervene": decision.intervene,
            "code": decision.code,
            "reason": decision.reason,
            "lookahead": decision.lookahead,
        },
    )
    create_markdown_artifact(
        markdown(decision),
        key=key("decision", run_id, decision.leg_id, decision.step),
        description=f"AutoNPO, {run_id}, step {decision.step}",
    )


class Rollback(NamedTuple):
    """What a decision to roll back says that its execution needs."""

    guide: CheckpointRef
    parent: CheckpointRef
    stop: int
    prompts: tuple[str, ...]


def pending_rollback(run: str) -> Rollback | None:
    """The rollback that the main line's tip waits for: decided, and its replay not begun, or not finished."""
    opened = workspace(run)
    step, tip = main_line_step(run)
    spec = opened.run.require_guide(tip.guide_id).spec if tip.guide_id else None
    # Within a replay it is the decision about the guide's policy that is being carried out.
    today = spec.checkpoint if spec and step < spec.stop else main_line_checkpoint(run, step)
    decision = opened.run.decision(today.leg_id, today.step)
    if decision is None or decision.guide is None or decision.parent is None:
        return None
    prompts = tuple(mistake.prompt_id for mistake in decision.mistakes)
    return Rollback(decision.guide, decision.parent, decision.step, prompts)


def _decide(opened: Workspace, warning: DecisionRecord) -> DecisionRecord:
    """Probes the policy, chooses the distance, and says what is to be done."""
    from npo_core import controller
    from npo_core.artifacts import main_line_checkpoints
    from npo_core.confirm import ask, measure, own_rows, with_baseline
    from npo_core.monitor import recent_mistakes
    from npo_core.probe import plan_probe

    step, settings, seed = warning.step, opened.config.autonpo, opened.config.run.seed
    manifest = opened.run.require_checkpoint(warning.leg_id, step)
    today, state = manifest.ref, opened.run.monitor_state(manifest.ref)
    candidates = controller.distances(state, step, main_line_checkpoints(opened.run), settings)
    refused = controller.confirmable(candidates, settings)
    if refused is not None:
        return _decided(warning, refused, candidates=candidates)
    prompts, bands = plan_probe(state.pool, step, [c.lookahead for c in candidates], settings.probe_prompts, seed)
    context, samples = opened.context(warning.leg_id, manifest.weights_digest), settings.probe_samples
    answers = ask(context, opened.holding(today, optimizer=False).generator, step, prompts, samples)
    measured = []
    for n, candidate in enumerate(candidates, start=1):
        past = opened.holding(candidate.parent, optimizer=False).generator
        past_logps = past.score(answers.prompt_ids, answers.completion_ids, opened.config.rollout.temperature)
        measured.append(measure(candidate, answers, past_logps, bands, n, settings, seed))
    verdict = controller.choose(measured, settings)
    probed = {"variance": settings.variance, "tokens_probe": answers.tokens}
    chosen = verdict.chosen
    if chosen is None:
        return _decided(warning, verdict, candidates=measured, **probed)
    n = measured.index(chosen) + 1
    past = opened.holding(chosen.parent, optimizer=False).generator
    asked = [prompts[row] for row in own_rows(bands, n)]
    again = ask(context, past, step, asked, samples, first_slot=samples)
    measured[n - 1] = with_baseline(chosen, again, bands, n, seed)
    return _decided(
        warning,
        verdict,
        candidates=measured,
        **{**probed, "tokens_probe": answers.tokens + again.tokens},
        intervene=True,
        start=chosen.parent.step,
        lookahead=chosen.lookahead,
        window=chosen.lookahead,
        parent=chosen.parent,
        guide=today,
        mistakes=recent_mistakes(state.pool, step, chosen.lookahead),
    )


def _decided(
    warning: DecisionRecord, verdict: Verdict, candidates: Sequence[Candidate], **fields: Any
) -> DecisionRecord:
    """The decision that a warning led to."""
    from npo_core.workspace import now

    return warning.model_copy(
        update={
            "code": verdict.code,
            "reason": f"{warning.reason}; {verdict.reason}",
            "candidates": tuple(candidates),
            "created_at": now(),
            **fields,
        }
    )
