"""What samples from a committed policy: the starting policy, the guide, the evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

from prefect import task

from npo_core.interfaces import ConfigurationError
from schemas.benchmark import BenchmarkFile
from schemas.records import CheckpointRef, EvalManifest, GuideManifest, GuideSpec, Head
from tasks.artifacts import stage_progress
from tasks.options import OPTIONS
from tasks.shards import sample_guide
from tasks.workspaces import workspace

if TYPE_CHECKING:
    import pyarrow as pa

    from npo_core.artifacts import RunArtifacts


@task(name="warm start", **OPTIONS)
def commit_warm_start(run: str) -> CheckpointRef:
    """Commits the starting policy as the run's first checkpoint. Found if it is committed."""
    from npo_core.begin import warm_start

    return warm_start(workspace(run))


@task(name="make guide", task_run_name="guide {start}-{stop}", **OPTIONS)
def make_guide(
    run: str, checkpoint: CheckpointRef, start: int, stop: int, prompts: tuple[str, ...] | None = None
) -> GuideManifest:
    """Collects correct answers to prompts of steps [start, stop), by default to every distinct one, from the sources
    that `future.source` names, and commits them. Found if they are committed."""
    from npo_core import guide_sources as sources
    from npo_core.environment import environment
    from npo_core.lineage import guide_id

    if not (start < stop and start < checkpoint.step):
        raise ConfigurationError(
            f"a guide from step {checkpoint.step} cannot serve steps {start}-{stop}: the window must hold a step, and "
            "begin before the guide's checkpoint"
        )
    opened = workspace(run)
    opened.run.require_reached(checkpoint)
    config, steps = opened.config, sources.window_steps(opened.prompts, start, stop)
    spec = GuideSpec(
        checkpoint=checkpoint,
        weights_digest=opened.run.require_checkpoint(checkpoint.leg_id, checkpoint.step).weights_digest,
        start=start,
        stop=stop,
        prompt_ids=tuple(sorted(steps if prompts is None else set(prompts))),
        k=config.future.k,
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=config.run.seed,
        tokenizer_digest=opened.record.tokenizer_digest,
        verifier=opened.record.verifier,
        source=config.future.source,
        answers=config.algorithm.guide_slots,
    )
    identifier = guide_id(spec)
    committed = opened.run.guide(identifier)
    if committed is not None:
        return committed
    rollouts = () if spec.source == "checkpoint" else _rollouts_behind(opened.run, spec)
    reused = sources.reuse_rollouts(spec, identifier, rollouts, steps)
    asked = () if spec.source == "leg" else sources.unserved(spec, reused, steps)
    sampled, tokens = sample_guide(opened, spec, identifier, asked)
    trajectories = sources.with_sampled(reused, sampled)
    return opened.run.commit_guide(spec, trajectories, tokens, environment(config, "guide"))


def _rollouts_behind(run: RunArtifacts, spec: GuideSpec) -> Iterator[pa.Table]:
    """Correct rollouts to a guide's prompts, ended by themselves, of the steps from the window's start to the guide's
    checkpoint; segment by segment, the newest first."""
    import pyarrow.compute as pc

    from npo_core.lineage import main_line

    usable = (
        (pc.field("source") == "policy")
        & pc.field("correct")
        & (pc.field("finish_reason") == "stop")
        & pc.field("prompt_id").isin(spec.prompt_ids)
    )
    for stretch in reversed(main_line(run.legs(), Head(leg_id=spec.checkpoint.leg_id, epoch=0))):
        end = spec.checkpoint.step if stretch.stop is None else stretch.stop
        for segment in reversed(run.segments(stretch.leg.leg_id)):
            first, stop = max(segment.start, spec.start), min(segment.stop, end)
            if first < stop:
                within = (pc.field("step") >= first) & (pc.field("step") < stop)
                yield run.table(segment, "rollouts", filters=usable & within)


def has_weights(run: str, checkpoint: CheckpointRef) -> bool:
    """Whether a policy can be loaded: `npo gc` may have removed it since its steps were trained."""
    from npo_core.tombstones import removals

    return checkpoint not in removals(workspace(run).run.tombstones())


@task(name="evaluate policy", task_run_name="evaluate {checkpoint.step}", **OPTIONS)
def evaluate_policy(run: str, checkpoint: CheckpointRef, benchmark: BenchmarkFile | None = None) -> EvalManifest:
    """Samples answers to the held-out prompts, or a benchmark's, from a checkpoint, and commits the scores. Found if
    committed."""
    from npo_core.benchmarks import open_benchmark
    from npo_core.environment import environment
    from npo_core.evaluate import evaluate_policy
    from npo_core.lineage import eval_id

    opened = workspace(run)
    samples, greedy = opened.config.evaluation.samples, opened.config.evaluation.greedy
    other = None if benchmark is None else open_benchmark(benchmark, opened.config, opened.tokens, opened.model_config)
    spec = None
    if other is not None:
        samples, spec = other.samples, other.spec
    identifier = eval_id(checkpoint, samples, opened.record, greedy, spec)
    committed = opened.run.evaluation(identifier)
    if committed is not None:
        return committed
    manifest = opened.run.require_checkpoint(checkpoint.leg_id, checkpoint.step)
    generator = opened.sampling("evaluation", checkpoint)
    context = opened.context(checkpoint.leg_id, manifest.weights_digest)
    prompts = opened.prompts.held_out() if other is None else other.prompts
    name = f"evaluate {checkpoint.step}" if other is None else f"{other.spec.name} {checkpoint.step}"
    with ExitStack() as stack:
        if other is not None:
            stack.callback(other.verifier.close)
            opened.run.put_pictures(other.pictures)
        bar = stack.enter_context(stage_progress(run, name, len(prompts)))
        evaluation = evaluate_policy(
            context if other is None else other.context(context),
            generator,
            checkpoint.step,
            samples,
            lambda done, correct: bar(done, {"accuracy": correct / (done * samples)}),
            prompts,
            greedy,
        )
    return opened.run.commit_evaluation(
        identifier,
        checkpoint,
        samples,
        evaluation,
        environment(opened.config, "evaluation"),
        None if other is None else (other.spec, other.table),
    )
