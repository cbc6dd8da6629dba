"""Measures what a run's own checkpoints say of Q(Δ), V(Δ) and S(Δ)."""

from __future__ import annotations

from prefect import task

from schemas.records import SignalManifest, SignalSpec
from tasks.artifacts import stage_progress
from tasks.options import OPTIONS
from tasks.workspaces import workspace


@task(name="measure signal", **OPTIONS)
def measure_signal(
    run: str, steps: tuple[int, ...], lookaheads: tuple[int, ...], prompts: int, samples: int
) -> SignalManifest:
    """Measures Q, V and S over a grid of steps and distances, and commits them. Found if they are committed."""
    from npo_core.artifacts import main_line_checkpoints
    from npo_core.environment import environment
    from npo_core.lineage import signal_id
    from npo_core.signal_study import grid, measure_signal

    opened = workspace(run)
    settings = opened.config.autonpo
    spec = SignalSpec(
        points=grid(main_line_checkpoints(opened.run), steps, lookaheads),
        prompts=prompts,
        samples=samples,
        mistake_threshold=settings.mistake_threshold,
        kappa=settings.kappa,
        seed=opened.config.run.seed,
    )
    committed = opened.run.signal(signal_id(spec))
    if committed is not None:
        return committed
    pool = [row["prompt_id"] for row in opened.run.prompts().to_pylist() if row["split"] == "train"]
    first = spec.points[0][0]
    context = opened.context(first.leg_id, opened.run.require_checkpoint(first.leg_id, first.step).weights_digest)
    with stage_progress(run, "signal", len(spec.points)) as bar:
        study = measure_signal(
            spec,
            context,
            lambda ref: opened.holding(ref, optimizer=False).generator,
            pool,
            lambda done: bar(done, {}),
        )
    return opened.run.commit_signal(spec, study.table, study.tokens, environment(opened.config, None))
