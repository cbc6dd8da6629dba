"""AutoNPO's monitor: reads a checkpoint's state; if that warns, probes and writes the decision down before anything
acts on it, or asks whoever executes to do so."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event

from npo_core import tip
from npo_core.artifacts import open_run
from schemas.decisions import DecisionCode, DecisionRecord, Request
from schemas.future import Executor
from schemas.records import LegRecord
from tasks.artifacts import key
from tasks.options import OPTIONS
from tasks.workspaces import workspace

if TYPE_CHECKING:
    from npo_core.controller import Verdict
    from npo_core.workspace import Workspace
    from schemas.decisions import Candidate

logger = logging.getLogger("npo")

EVENT = "npo.lookahead.stagnation"
"""Name of the Prefect event that tells of a warning."""


_TOLD: set[tuple[str, str, int]] = set()
"""Of which run, leg and step this process has told Prefect."""


def watch(run: str, leg: LegRecord, step: int) -> bool:
    """Whether the main line stops at `step`: AutoNPO rolls back there, or somebody else has yet to decide that."""
    seen = look(run, leg, step)
    if seen.code is DecisionCode.WARNING and workspace(run).config.autonpo.executes != "flow":
        ask(run, seen, "flow")
        return True
    return settle(run, seen).intervene


def look(run: str, leg: LegRecord, step: int) -> DecisionRecord:
    """See `npo_core.tip.look`. No task: it changes nothing."""
    opened = workspace(run)
    return tip.look(opened.run, opened.config.autonpo, leg, step)


def waiting(run: str) -> DecisionRecord | None:
    """See `npo_core.tip.waiting`."""
    opened = workspace(run)
    return tip.waiting(opened.run, opened.config)


def settle(run: str, seen: DecisionRecord, told: bool = False) -> DecisionRecord:
    """The decision about what AutoNPO saw; it is made if that is a warning. Prefect hears of both.

    Args:
        told: it has heard of the warning already.
    """
    if seen.code is DecisionCode.WARNING:
        if not told:
            announce(run, seen)
        seen = confirm(run, seen)
    if seen.code is not None and seen.code.warned:
        publish_decision(run, seen)
    return seen


def ask(run: str, waits: DecisionRecord, by: Executor) -> None:
    """Leaves what the main line waits for to whoever executes."""
    file_request(run, waits, by)
    if by == "flow":
        announce(run, waits)


@task(name="file request", **OPTIONS)
def file_request(run: str, waits: DecisionRecord, by: Executor) -> Request:
    """Asks for the decision about a warning, or for a rollback that was decided. Found if `by` has asked already."""
    from npo_core.run_config import configure

    # No workspace: the watchdog loads no engine, and is no writer that others should be warned of.
    opened = open_run(run)
    configure(opened)
    now = datetime.now(UTC).isoformat()
    request = Request(leg_id=waits.leg_id, step=waits.step, by=by, reason=waits.reason, created_at=now)
    return opened.file_request(request)


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


@task(name="announce warning", **OPTIONS)
def announce(run: str, waits: DecisionRecord) -> None:
    """Tells Prefect that training stagnates, once a process: the event starts whoever executes by event."""
    about = (run, waits.leg_id, waits.step)
    if about in _TOLD:
        return
    _TOLD.add(about)
    run_id = workspace(run).run.run_id
    emit_event(
        event=EVENT,
        resource={"prefect.resource.id": f"npo.run.{run_id}", "prefect.resource.name": run_id},
        payload={"run": run, "leg_id": waits.leg_id, "step": waits.step, "code": waits.code, "reason": waits.reason},
    )


@task(name="publish decision", **OPTIONS)
def publish_decision(run: str, decision: DecisionRecord) -> None:
    """Shows people in Prefect what came of a warning."""
    from npo_core.explain import markdown

    run_id = workspace(run).run.run_id
    create_markdown_artifact(
        markdown(decision),
        key=key("decision", run_id, decision.leg_id, decision.step),
        description=f"AutoNPO, {run_id}, step {decision.step}",
    )


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
