"""One flow a stage. Each finds what is committed, does what is missing, and can be scheduled and run again alone.
AutoNPO's are in `flows.monitoring`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

from prefect import flow
from pydantic import Field

from flows.deployed import OPTIONS
from schemas.benchmark import BenchmarkFile
from schemas.records import MAIN_LINE_KINDS, CheckpointRef, EvalManifest, GuideManifest, LegRecord, SignalManifest
from schemas.urls import WITHOUT_CREDENTIALS
from tasks.again import do_again
from tasks.artifacts import publish_metrics, publish_summary, stage_progress
from tasks.decisions import record_schedule
from tasks.legs import (
    leg_checkpoint,
    main_line_checkpoint,
    main_line_step,
    open_leg,
    require_finished,
    require_replayed,
    require_trained_by,
    scout_is_done,
    train_segment,
)
from tasks.monitor import watch
from tasks.policies import commit_warm_start, evaluate_policy, has_weights, make_guide
from tasks.reports import publish_curves, publish_report
from tasks.signals import measure_signal
from tasks.workspaces import workspace

# What the Prefect UI shows beside a parameter, and what the server refuses before it makes a run.
Run = Annotated[str, Field(min_length=1, json_schema_extra=WITHOUT_CREDENTIALS)]
Step = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
MadeT = TypeVar("MadeT", CheckpointRef, GuideManifest, EvalManifest, SignalManifest)


@flow(name="warm-start", flow_run_name="warm start of {run}", **OPTIONS)
def warm_start(run: Run, force: bool = False) -> CheckpointRef:
    """Commits the starting policy, and evaluates it.

    Args:
        run: URI of the run, STORE/NAME.
        force: Compute again what is committed, beside it, and fail if it comes out otherwise; nothing is replaced.
    """
    checkpoint = checked(run, force, lambda: commit_warm_start(run))
    evaluate_policy(run, checkpoint)
    return checkpoint


@flow(name="scout", flow_run_name="scout {start}+{lookahead} of {run}", **OPTIONS)
def scout(run: Run, start: Step, lookahead: Count, force: bool = False) -> CheckpointRef:
    """The future leg: trains `lookahead` steps ahead of the main line's checkpoint at `start`, or, with
    `future.scout.patience`, until it has stopped to solve more.

    Args:
        run: URI of the run, STORE/NAME.
        start: Step of the main line to look ahead of; it has a checkpoint there.
        lookahead: Δ, in optimizer steps.
        force: Compute again what is committed, beside it, and fail if it comes out otherwise; nothing is replaced.
    """
    leg = open_leg(run, "scout", main_line_checkpoint(run, start))
    made = train(run, leg, start + lookahead, lambda step: scout_is_done(run, leg, step))
    return retrained(run, made) if force else made


@flow(name="guide", flow_run_name="guide {start}-{stop} of {run}", **OPTIONS)
def guide(run: Run, checkpoint: CheckpointRef, start: Step, stop: Count, force: bool = False) -> GuideManifest:
    """Verified-correct trajectories of the near future at `checkpoint` for the prompts of steps [start, stop).

    Args:
        run: URI of the run, STORE/NAME.
        checkpoint: Whose policy answers: a leg, a step of it, and the digest in that checkpoint's manifest.
        start: First step of the window that the guide serves.
        stop: First step after the window.
        force: Compute again what is committed, beside it, and fail if it comes out otherwise; nothing is replaced.
    """
    return checked(run, force, lambda: make_guide(run, checkpoint, start, stop))


@flow(name="replay", flow_run_name="replay with {guide_id} of {run}", **OPTIONS)
def replay(run: Run, guide_id: str, force: bool = False) -> CheckpointRef:
    """Rolls back to the start of the guide's window and runs it again, with the guide's trajectories mixed in.

    Args:
        run: URI of the run, STORE/NAME.
        guide_id: Guide to mix in; `npo show` lists them.
        force: Compute again what is committed, beside it, and fail if it comes out otherwise; nothing is replaced.
    """
    if force:
        require_replayed(run, guide_id)
    decision = record_schedule(run, guide_id)
    leg = open_leg(run, "replay", decision.parent, guide_id)
    made = train(run, leg, decision.stop)
    return retrained(run, made) if force else made


@flow(name="main", flow_run_name="main to {stop} of {run}", **OPTIONS)
def main(run: Run, stop: Count, force: bool = False) -> CheckpointRef:
    """Goes on with the main line, on-policy, until step `stop`; nothing is done if it has come that far.

    Under AutoNPO it comes less far where the monitor decides to roll back, or, where `autonpo.executes` names another
    flow, warns: then `intervene` is next.

    Args:
        run: URI of the run, STORE/NAME.
        stop: Step of the main line to train until.
        force: Compute again what is committed, beside it, and fail if it comes out otherwise; nothing is replaced.
    """
    made = go_on(run, stop)
    if force:
        require_trained_by(run, made, "main")
    return retrained(run, made) if force else made


@flow(name="evaluate", flow_run_name="evaluate {run}", **OPTIONS)
def evaluate(
    run: Run, step: Step | None = None, benchmark: BenchmarkFile | None = None, force: bool = False
) -> EvalManifest:
    """Evaluates the main line's policy at `step`, by default its tip.

    Args:
        run: URI of the run, STORE/NAME.
        step: Step of the main line; its tip by default.
        benchmark: Prompts to ask; the run's held-out ones by default.
        force: Compute again what is committed, beside it, and fail if it comes out otherwise; nothing is replaced.
    """
    checkpoint = main_line_checkpoint(run, main_line_step(run)[0] if step is None else step)
    evaluation = checked(run, force, lambda: evaluate_policy(run, checkpoint, benchmark))
    publish_summary(run, publish_curves(run))
    return evaluation


@flow(name="signal", flow_run_name="signal of {run}", **OPTIONS)
def signal(
    run: Run,
    steps: tuple[Step, ...] = (),
    lookaheads: tuple[Count, ...] = (),
    prompts: Count = 128,
    samples: Count = 8,
    force: bool = False,
) -> SignalManifest:
    """Measures Q(Δ), V(Δ) and S(Δ) on the main line's checkpoints, by default at its start and in its middle.

    Args:
        run: URI of the run, STORE/NAME.
        steps: Steps t of the main line; by default its start and its middle.
        lookaheads: Distances Δ, in steps; by default eight.
        prompts: Training prompts drawn at each step.
        samples: Answers a prompt and policy.
        force: Compute again what is committed, beside it, and fail if it comes out otherwise; nothing is replaced.
    """
    return checked(run, force, lambda: measure_signal(run, steps, lookaheads, prompts, samples))


@flow(name="report", flow_run_name="report of {run}", **OPTIONS)
def report(run: Run) -> str:
    """Writes the run's report and returns its address.

    Args:
        run: URI of the run, STORE/NAME.
    """
    address = publish_report(run)
    publish_summary(run, publish_curves(run))
    return address


def checked(run: str, force: bool, stage: Callable[[], MadeT]) -> MadeT:
    """What a stage makes. With `force` it is made again beside what is committed, and must come out the same."""
    made = stage()
    if force:
        do_again(run, made, stage)
    return made


def retrained(run: str, made: CheckpointRef) -> CheckpointRef:
    """Trains a leg's committed segments up to a checkpoint again, beside them and cut as they are: the leg may have
    been extended since. They must come out the same."""
    artifacts = workspace(run).run
    leg = artifacts.leg(made.leg_id)
    bounds = [(s.start, s.stop) for s in artifacts.segments(made.leg_id) if s.stop <= made.step]
    do_again(run, made, lambda: [train_segment(run, leg, *steps) for steps in bounds])
    return made


def train(run: str, leg: LegRecord, stop: int, ends_at: Callable[[int], bool] = lambda step: False) -> CheckpointRef:
    """Trains a leg to `stop`, segment by segment; legs of the main line are evaluated on the way.

    Args:
        ends_at: asked before each segment whether the leg ends at this step already.
    """
    config = workspace(run).config
    size, every = config.run.segment_steps, config.evaluation.every
    step, accuracy = leg.start, {}
    with stage_progress(run, f"{leg.kind} {leg.start}-{stop}", stop - leg.start) as bar:
        while step < stop and not ends_at(step):
            # Boundaries lie at multiples of the segment's size, wherever the leg starts.
            segment = train_segment(run, leg, step, min(stop, (step // size + 1) * size))
            step = segment.stop
            due = leg.kind in MAIN_LINE_KINDS and every and step % every == 0
            if due and has_weights(run, segment.checkpoint):
                accuracy = {"accuracy": evaluate_policy(run, segment.checkpoint).accuracy}
            bar(step - leg.start, accuracy)
    if step > leg.start:
        publish_metrics(run, leg)
    return leg_checkpoint(run, leg, step)


def go_on(run: str, stop: int) -> CheckpointRef:
    """Trains the main line until `stop`, or until the monitor decides to roll back."""
    step, tip = main_line_step(run)
    require_finished(run, tip, step)
    if step >= stop:
        return main_line_checkpoint(run, step)
    leg = tip if tip.kind == "main" else open_leg(run, "main", main_line_checkpoint(run, step))
    if workspace(run).config.algorithm.method != "autonpo":
        return train(run, leg, stop)
    # What was trained beyond a step has been decided there.
    return train(run, leg, stop, lambda at: at >= step and watch(run, leg, at))
