"""The composed flows: plain GRPO, NPO with its two manual interventions (paper, section 3.2), and AutoNPO (3.3).

Each gives its stages the tags of its deployment, by which a server finds those that died with it.
"""

from __future__ import annotations

from prefect import flow, tags
from prefect.runtime import flow_run
from pydantic import BaseModel

from flows import stages
from schemas.config import Config
from schemas.records import EvalManifest
from tasks.artifacts import publish_summary
from tasks.legs import main_line_checkpoint, main_line_step
from tasks.policies import evaluate_policy
from tasks.reports import publish_curves, publish_report
from tasks.workspaces import begin_run


class Summary(BaseModel):
    """What a whole run returns."""

    run: str
    """URI of the run."""
    status: str = "done"
    head_step: int
    before: EvalManifest
    after: EvalManifest
    report: str
    """Address of the report."""


@flow(name="grpo", flow_run_name="grpo {config.run.name}")
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


@flow(name="npo", flow_run_name="npo {config.run.name}")
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


@flow(name="autonpo", flow_run_name="autonpo {config.run.name}")
def autonpo(config: Config) -> Summary:
    """Trains on-policy until the monitor decides to roll back, replays with today's policy as guide, and goes on
    (paper, section 3.3).

    Args:
        config: The whole configuration, as in deploy/configs; what is left out has its default.
    """
    with tags(*flow_run.tags):
        run = begin_run(config)
        stages.warm_start(run)
        stages.intervene(run)  # what a killed process had begun
        while stages.main(run, config.run.total_steps).step < config.run.total_steps:
            stages.intervene(run)
        return finish(run)


def finish(run: str) -> Summary:
    """Evaluates both ends of the main line and publishes the report and the summary."""
    step, _ = main_line_step(run)
    after = evaluate_policy(run, main_line_checkpoint(run, step))
    before = evaluate_policy(run, main_line_checkpoint(run, 0))
    report = publish_report(run)
    publish_summary(run, report, publish_curves(run))
    return Summary(run=run, head_step=step, before=before, after=after, report=report)
