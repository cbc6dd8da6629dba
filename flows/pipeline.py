"""The composed flows: plain GRPO, NPO with its two manual interventions (paper, section 3.2), and AutoNPO (3.3).

Each gives its stages the tags of its deployment, by which a server finds those that died with it.
"""

from __future__ import annotations

from typing import Literal

from prefect import flow, tags
from prefect.runtime import flow_run
from pydantic import BaseModel

from flows import monitoring, stages
from flows.deployed import OPTIONS
from schemas.config import Config
from schemas.records import EvalManifest
from tasks.artifacts import publish_summary
from tasks.legs import main_line_checkpoint, main_line_step
from tasks.monitor import ask, waiting
from tasks.policies import evaluate_policy
from tasks.reports import publish_curves, publish_report
from tasks.workspaces import begin_run


class Summary(BaseModel):
    """What a whole run returns."""

    run: str
    """URI of the run."""
    status: Literal["done", "waiting"] = "done"
    """`waiting`: AutoNPO warned, and whoever `autonpo.executes` names has to act; the same call then goes on, or finds
    the run done."""
    head_step: int
    before: EvalManifest
    after: EvalManifest | None = None
    """Of the end of the main line; None while the run waits."""
    report: str | None = None
    """Address of the report; None while the run waits."""


@flow(name="grpo", flow_run_name="grpo {config.run.name}", **OPTIONS)
def grpo(config: Config) -> Summary:
    """On-policy training, without a future.

    Args:
        config: The whole configuration, as in deploy/configs; what is left out has its default.
    """
    with tags(*flow_run.tags):
        run = begin_run(config)
        stages.warm_start(run)
        stages.main(run, config.run.total_steps)
        return finish(run)


@flow(name="npo", flow_run_name="npo {config.run.name}", **OPTIONS)
def npo(config: Config) -> Summary:
    """For each intervention: train to its start, scout ahead, let the guide answer, roll back and replay.

    Args:
        config: The whole configuration, as in deploy/configs; what is left out has its default.
    """
    with tags(*flow_run.tags):
        run = begin_run(config)
        stages.warm_start(run)
        for intervention in config.future.interventions:
            if intervention.start:
                stages.main(run, intervention.start)
            future = stages.scout(run, intervention.start, intervention.lookahead)
            guide = stages.guide(run, future, intervention.start, intervention.stop)
            stages.replay(run, guide.guide_id)
        stages.main(run, config.run.total_steps)
        return finish(run)


@flow(name="autonpo", flow_run_name="autonpo {config.run.name}", **OPTIONS)
def autonpo(config: Config) -> Summary:
    """Trains on-policy until the monitor decides to roll back, replays with today's policy as guide, and goes on
    (paper, section 3.3). Where `autonpo.executes` names another flow, it ends at a warning, and waits.

    Args:
        config: The whole configuration, as in deploy/configs; what is left out has its default.
    """
    with tags(*flow_run.tags):
        run = begin_run(config)
        stages.warm_start(run)
        while True:
            waits = waiting(run)  # perhaps for what a killed process had begun
            if waits is not None and config.autonpo.executes != "flow":
                ask(run, waits, "flow")
                step, before = main_line_step(run)[0], evaluate_policy(run, main_line_checkpoint(run, 0))
                return Summary(run=run, status="waiting", head_step=step, before=before)
            if waits is not None:
                monitoring.intervene(run, "flow")
            elif stages.main(run, config.run.total_steps).step >= config.run.total_steps:
                return finish(run)


def finish(run: str) -> Summary:
    """Evaluates both ends of the main line and publishes the report and the summary."""
    step, _ = main_line_step(run)
    after = evaluate_policy(run, main_line_checkpoint(run, step))
    before = evaluate_policy(run, main_line_checkpoint(run, 0))
    report = publish_report(run)
    publish_summary(run, publish_curves(run))
    return Summary(run=run, head_step=step, before=before, after=after, report=report)
