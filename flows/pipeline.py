"""The composed flows: plain GRPO, and NPO with its two manual interventions (paper, section 3.2)."""

from __future__ import annotations

from prefect import flow

from flows import stages
from flows.stages import Summary
from schemas.config import Config
from tasks.workspaces import begin_run


@flow(name="grpo")
def grpo(config: Config) -> Summary:
    """On-policy training, without a future."""
    run = begin_run(config)
    stages.warm_start(run)
    stages.main(run, config.run.total_steps)
    return finish(run)


@flow(name="npo")
def npo(config: Config) -> Summary:
    """For each intervention: train to its start, scout ahead, let the guide answer, roll back and replay."""
    run = begin_run(config)
    stages.warm_start(run)
    for intervention in config.future.interventions:
        stages.main(run, intervention.start)
        future = stages.scout(run, intervention.start, intervention.lookahead)
        guide = stages.guide(run, future, intervention.start, intervention.stop)
        stages.replay(run, guide.guide_id)
    stages.main(run, config.run.total_steps)
    return finish(run)


def finish(run: str) -> Summary:
    """Evaluates both ends of the main line and publishes the report."""
    after = stages.evaluate(run)
    return Summary(
        run=run,
        head_step=after.checkpoint.step,
        before=stages.evaluate(run, 0),
        after=after,
        report=stages.report(run),
    )
