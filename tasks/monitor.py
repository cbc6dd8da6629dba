"""AutoNPO's monitor: reads a checkpoint's state, probes if it warns, and writes the decision down before it is acted
on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event

from schemas.records import CheckpointRef, DecisionCode, DecisionRecord, LegRecord
from tasks.legs import leg_checkpoint, main_line_checkpoint, main_line_step
from tasks.options import OPTIONS
from tasks.workspaces import workspace

if TYPE_CHECKING:
    from npo_core.controller import Verdict
    from npo_core.workspace import Workspace
    from schemas.records import Candidate

logger = logging.getLogger("npo")

EVENT = "npo.lookahead.stagnation"
"""Name of the Prefect event that tells of a warning."""


@task(name="monitor", task_run_name="monitor {step}", **OPTIONS)
def monitor_leg(run: str, leg: LegRecord, step: int) -> DecisionRecord:
    """Decides whether training rolls back from a leg's checkpoint at `step`.

    A decision that had a warning is committed; asked for again, it is found. A quiet one is what the stored metrics say
    at any time, and is only returned.
    """
    from npo_core.controller import check

    opened = workspace(run)
    today = leg_checkpoint(run, leg, step)
    committed = opened.run.decision(today.leg_id, step)
    if committed is not None:
        return committed
    replaying = leg.guide_id is not None and step < opened.run.require_guide(leg.guide_id).spec.stop
    verdict = check(opened.run.monitor_state(today), step, opened.run.decisions(), opened.config.autonpo, replaying)
    if verdict.code is not DecisionCode.WARNING:
        return _record(today, verdict)
    logger.info("warning at step %d: %s", step, verdict.reason)
    decision = opened.run.commit_decision(_confirm(opened, today, verdict))
    logger.info("decision at step %d: %s", step, decision.reason)
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
    key = "".join(c if c.isalnum() else "-" for c in f"decision-{run_id}-{decision.leg_id}-{decision.step}".lower())
    create_markdown_artifact(markdown(decision), key=key, description=f"AutoNPO, {run_id}, step {decision.step}")


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


def _confirm(opened: Workspace, today: CheckpointRef, warning: Verdict) -> DecisionRecord:
    """Probes the policy, chooses the distance, and says what is to be done."""
    from npo_core import controller
    from npo_core.artifacts import main_line_checkpoints
    from npo_core.confirm import ask, measure, own_rows, with_baseline
    from npo_core.monitor import recent_mistakes
    from npo_core.probe import plan_probe

    step, settings, seed = today.step, opened.config.autonpo, opened.config.run.seed
    state = opened.run.monitor_state(today)
    candidates = controller.distances(state, step, main_line_checkpoints(opened.run), settings)
    refused = controller.confirmable(candidates, settings)
    if refused is not None:
        return _record(today, refused, warning, candidates)
    prompts, bands = plan_probe(state.pool, step, [c.lookahead for c in candidates], settings.probe_prompts, seed)
    context = opened.context(today.leg_id, opened.run.require_checkpoint(today.leg_id, today.step).weights_digest)
    answers = ask(context, opened.holding(today, optimizer=False).generator, step, prompts, settings.probe_samples)
    temperature = opened.config.rollout.temperature
    measured = []
    for n, candidate in enumerate(candidates, start=1):
        past = opened.holding(candidate.parent, optimizer=False).generator
        past_logps = past.score(answers.prompt_ids, answers.completion_ids, temperature)
        measured.append(measure(candidate, answers, past_logps, bands, n, settings, seed))
    verdict, tokens = controller.choose(measured, settings), answers.tokens
    chosen = verdict.chosen
    if chosen is None:
        return _record(today, verdict, warning, measured, opened.config.autonpo.variance, tokens)
    n = measured.index(chosen) + 1
    asked = [prompts[row] for row in own_rows(bands, n)]
    again = ask(
        context,
        opened.holding(chosen.parent, optimizer=False).generator,
        step,
        asked,
        settings.probe_samples,
        first_slot=settings.probe_samples,
    )
    measured[n - 1] = with_baseline(chosen, again, bands, n, seed)
    record = _record(today, verdict, warning, measured, settings.variance, tokens + again.tokens)
    return record.model_copy(
        update={
            "intervene": True,
            "start": chosen.parent.step,
            "lookahead": chosen.lookahead,
            "window": chosen.lookahead,
            "parent": chosen.parent,
            "guide": today,
            "mistakes": recent_mistakes(state.pool, step, chosen.lookahead),
        }
    )


def _record(
    today: CheckpointRef,
    verdict: Verdict,
    warning: Verdict | None = None,
    candidates: list[Candidate] | tuple[()] = (),
    variance: str | None = None,
    tokens: int = 0,
) -> DecisionRecord:
    """A decision not to intervene."""
    from npo_core.workspace import now

    numbers = dict((warning or verdict).numbers)
    reason = verdict.reason if warning is None else f"{warning.reason}; {verdict.reason}"
    return DecisionRecord(
        leg_id=today.leg_id,
        step=today.step,
        intervene=False,
        reason=reason,
        source="autonpo",
        code=verdict.code,
        clock=int(numbers.pop("clock")),
        numbers=numbers,
        candidates=tuple(candidates),
        variance=variance,
        tokens_probe=tokens,
        created_at=now(),
    )
