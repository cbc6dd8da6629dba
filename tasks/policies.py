"""What samples from a committed policy: the starting policy, the guide, the evaluation."""

from __future__ import annotations

from prefect import task

from npo_core.interfaces import ConfigurationError
from schemas.records import CheckpointRef, EvalManifest, GuideManifest, GuideSpec
from tasks.options import OPTIONS
from tasks.workspaces import workspace


@task(name="warm start", **OPTIONS)
def commit_warm_start(run: str) -> CheckpointRef:
    """Commits the starting policy as the run's first checkpoint. Found if it is committed."""
    from npo_core.begin import warm_start

    return warm_start(workspace(run))


@task(name="make guide", task_run_name="guide {start}-{stop}", **OPTIONS)
def make_guide(
    run: str, checkpoint: CheckpointRef, start: int, stop: int, prompts: tuple[str, ...] | None = None
) -> GuideManifest:
    """Lets the guide policy answer prompts of steps [start, stop), by default every distinct one, and commits what is
    correct."""
    from npo_core.guide import make_guide, window_prompts
    from npo_core.interfaces import SamplingParams
    from npo_core.lineage import guide_id
    from npo_core.progress import progress_bar
    from npo_core.workspace import environment

    if not (start < stop and start < checkpoint.step):
        raise ConfigurationError(
            f"a guide from step {checkpoint.step} cannot serve steps {start}-{stop}: the window must hold a step, and "
            "begin before the guide's checkpoint"
        )
    opened = workspace(run)
    opened.run.require_reached(checkpoint)
    rollout = opened.config.rollout
    spec = GuideSpec(
        checkpoint=checkpoint,
        weights_digest=opened.run.require_checkpoint(checkpoint.leg_id, checkpoint.step).weights_digest,
        start=start,
        stop=stop,
        prompt_ids=prompts or window_prompts(opened.prompts.batch(step) for step in range(start, stop)),
        k=opened.config.future.k,
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        seed=opened.config.run.seed,
        tokenizer_digest=opened.record.tokenizer_digest,
        verifier=opened.record.verifier,
    )
    identifier = guide_id(spec)
    committed = opened.run.guide(identifier)
    if committed is not None:
        return committed
    engine = opened.holding(checkpoint, optimizer=False)
    with progress_bar(f"guide {start}-{stop}", len(spec.prompt_ids)) as bar:
        guide = make_guide(
            spec,
            identifier,
            opened.run.run_id,
            [opened.prompts.get(prompt_id) for prompt_id in spec.prompt_ids],
            engine.generator,
            SamplingParams(rollout.temperature, rollout.max_new_tokens, opened.stop_ids),
            opened.verifier,
            opened.encode,
            opened.decode,
            lambda done, solved: bar(done, {"solved": solved}),
        )
    return opened.run.commit_guide(spec, guide.trajectories, guide.tokens, environment(opened.config))


@task(name="evaluate policy", task_run_name="evaluate {checkpoint.step}", **OPTIONS)
def evaluate_policy(run: str, checkpoint: CheckpointRef) -> EvalManifest:
    """Samples answers to the held-out prompts from a checkpoint, and commits the scores. Found if committed."""
    from npo_core.evaluate import evaluate_policy
    from npo_core.lineage import eval_id
    from npo_core.progress import progress_bar
    from npo_core.workspace import environment

    opened = workspace(run)
    samples = opened.config.evaluation.samples
    identifier = eval_id(checkpoint, samples, opened.record)
    committed = opened.run.evaluation(identifier)
    if committed is not None:
        return committed
    manifest = opened.run.require_checkpoint(checkpoint.leg_id, checkpoint.step)
    engine = opened.holding(checkpoint, optimizer=False)
    context = opened.context(checkpoint.leg_id, manifest.weights_digest)
    prompts = len(opened.prompts.held_out())
    with progress_bar(f"evaluate {checkpoint.step}", prompts) as bar:
        evaluation = evaluate_policy(
            context,
            engine.generator,
            checkpoint.step,
            samples,
            lambda done, correct: bar(done, {"accuracy": correct / (done * samples)}),
        )
    return opened.run.commit_evaluation(identifier, checkpoint, samples, evaluation, environment(opened.config))
