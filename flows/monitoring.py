"""AutoNPO's stages. A warning is seen in the flow that trains, by the event that it emits, and by a scheduled watchdog;
`autonpo.executes` says which of the three acts on it, and the others file a request. Nothing intervenes twice: there is
one decision record a leg and step, and what it leads to is found where it is done."""

from __future__ import annotations

from typing import Literal

from prefect import flow, get_client, tags
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from pydantic import BaseModel

from flows.deployed import OPTIONS
from flows.stages import Run, main, train
from npo_core import tip
from npo_core.artifacts import open_run
from npo_core.interfaces import ConfigurationError, NearFutureError
from npo_core.run_config import configure
from schemas.decisions import DecisionRecord
from schemas.records import CheckpointRef
from tasks.legs import main_line_step, open_leg
from tasks.monitor import ask, file_request, look, settle, waiting
from tasks.policies import make_guide
from tasks.workspaces import workspace

INTERVENE = "intervene/default"
"""The deployment that the watchdog and the event start."""
ATTEMPTS = 5
"""Flow runs that the watchdog starts about one warning: what fails so often wants a person."""


class Tick(BaseModel):
    """What the watchdog found, and did."""

    run: str
    """URI of the run."""
    step: int
    """How far its main line has come."""
    outcome: Literal["quiet", "ended", "requested", "started", "cancelled"]
    """`started`: the deployment runs, or will, for this tick or an earlier one; `cancelled`: somebody ended that, and
    the watchdog leaves it at that."""
    reason: str
    """In words."""


@flow(name="monitor", flow_run_name="monitor {run}", **OPTIONS)
def monitor(run: Run) -> DecisionRecord:
    """Decides whether the main line rolls back from where it stands, and says why.

    Args:
        run: URI of the run, STORE/NAME.
    """
    step, leg = main_line_step(run)
    return settle(run, look(run, leg, step))


@flow(name="intervene", flow_run_name="intervene {run}", **OPTIONS)
def intervene(run: Run, by: Literal["person", "flow", "event", "watchdog"] = "person") -> CheckpointRef | None:
    """Carries out the rollback that the main line waits for: today's policy answers the mistakes, training rolls back,
    and replays to where it was. None if it waits for none.

    Asked by `event` or `watchdog` it decides about a warning first, and afterwards goes on with the main line, until
    the end or the next warning; it only files a request if `autonpo.executes` names another.

    Args:
        run: URI of the run, STORE/NAME.
        by: Who asks; a person's wish is carried out, whoever else executes.
    """
    config, waits = workspace(run).config, waiting(run)
    if waits is None:
        return None
    if by == "person":
        return carry_out(run, waits)
    if by != config.autonpo.executes:
        ask(run, waits, by)
        return None
    # A second event about one warning would start a flow run for nothing.
    reached = carry_out(run, settle(run, waits, told=by != "flow"))
    if by == "flow":
        return reached
    with tags(*flow_run.tags):
        return main(run, config.run.total_steps)


@flow(name="watchdog", flow_run_name="watchdog of {run}", **OPTIONS)
def watchdog(run: Run) -> Tick:
    """Looks from outside whether an AutoNPO run waits at a warning, or for a rollback that nobody finished. If
    `autonpo.executes` is `watchdog` it starts the deployment of `intervene`, again where that failed; otherwise it
    files a request. It reads the store, and loads no model.

    Args:
        run: URI of the run, STORE/NAME.
    """
    opened = open_run(run)
    config = configure(opened)
    if config.algorithm.method != "autonpo":
        raise ConfigurationError(
            f"{run} is a run of {config.algorithm.method}: only autonpo warns; give the watchdog a run of "
            "algorithm.method autonpo"
        )
    step, waits = tip.main_line_step(opened)[0], tip.waiting(opened, config)
    if waits is None:
        ended = step >= config.run.total_steps
        reason = f"all {step} steps are trained" if ended else f"nothing waits at step {step}"
        return Tick(run=run, step=step, outcome="ended" if ended else "quiet", reason=reason)
    if config.autonpo.executes == "watchdog":
        outcome, reason = start(run, waits)
        return Tick(run=run, step=step, outcome=outcome, reason=reason)
    file_request(run, waits, "watchdog")
    reason = f"{config.autonpo.executes} executes, who is asked to act on this: {waits.reason}"
    return Tick(run=run, step=step, outcome="requested", reason=reason)


def carry_out(run: str, decision: DecisionRecord) -> CheckpointRef | None:
    """Replays as a decision says; None if it does not say so."""
    if decision.guide is None or decision.parent is None:
        return None
    prompts = tuple(mistake.prompt_id for mistake in decision.mistakes)
    guide = make_guide(run, decision.guide, decision.parent.step, decision.step, prompts)
    leg = open_leg(run, "replay", decision.parent, guide.guide_id)
    return train(run, leg, decision.step)


def start(run: str, waits: DecisionRecord) -> tuple[Literal["started", "cancelled"], str]:
    """Has the deployment carry out what the main line waits for, unless it is at it. Returns what it is at, in words.

    Raises:
        NearFutureError: there is no such deployment, or it has failed too often.
    """
    # By URI: two stores may hold runs of one name, and legs of one id.
    keys = [f"intervene/{run}/{waits.leg_id}/{waits.step}/{attempt}" for attempt in range(ATTEMPTS)]
    parameters = {"run": run, "by": "watchdog"}
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(INTERVENE)
        except ObjectNotFound as error:
            raise NearFutureError(
                f"the Prefect API at {PREFECT_API_URL.value()} has no deployment {INTERVENE}, which the watchdog "
                "starts; name by PREFECT_API_URL the server that deploy/bootstrap has readied, or act here: "
                f"`npo stage monitor {run}`, then `npo stage intervene {run}`"
            ) from error
        known = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=keys))
        # Whatever ended has left the main line waiting, and its key would give it back for ever.
        earlier = client.read_flow_runs(flow_run_filter=known)
        for made in earlier:
            if made.state is not None and made.state.is_cancelled():
                remedy = f"`npo stage monitor {run}`, then `npo stage intervene {run}`"
                return "cancelled", f"flow run {made.name} of {INTERVENE} was; {remedy} act on this: {waits.reason}"
        ended = sum(made.state is not None and made.state.is_final() for made in earlier)
        if ended == ATTEMPTS:
            raise NearFutureError(
                f"{INTERVENE} has ended {ATTEMPTS} times and left {run} waiting at step {waits.step}; the logs of its "
                f"flow runs say why: mend that, then `npo stage monitor {run}` and `npo stage intervene {run}`"
            )
        made = client.create_flow_run_from_deployment(deployment.id, parameters=parameters, idempotency_key=keys[ended])
    return "started", f"flow run {made.name} of {INTERVENE}, attempt {ended + 1}, is {made.state_name}: {waits.reason}"
