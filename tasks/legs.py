"""Opens legs and trains their segments."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import task

from npo_core import tip
from npo_core.interfaces import ConfigurationError, NearFutureError
from schemas.records import MAIN_LINE_KINDS, CheckpointRef, LegKind, LegRecord, SegmentManifest
from tasks.artifacts import advance
from tasks.options import OPTIONS
from tasks.workspaces import workspace

if TYPE_CHECKING:
    from npo_core.workspace import Workspace

logger = logging.getLogger("npo")

WATCHED = ("reward", "entropy", "npo/replaced")
"""Metrics worth watching while a segment trains."""


@task(name="open leg", **OPTIONS)
def open_leg(run: str, kind: LegKind, parent: CheckpointRef, guide_id: str | None = None) -> LegRecord:
    """Finds or creates the leg; a leg of the main line becomes its tip unless it lies on it already.

    Raises:
        NearFutureError: another writer moves the main line elsewhere.
    """
    from npo_core import lineage
    from npo_core.workspace import new_leg

    opened = workspace(run)
    leg = opened.run.open_leg(new_leg(opened.record, kind, parent, parent.step, guide_id))
    head = opened.run.head()
    line = lineage.main_line(opened.run.legs(), head)
    if kind not in MAIN_LINE_KINDS or leg.leg_id in {stretch.leg.leg_id for stretch in line}:
        return leg
    try:
        opened.run.move_head(head, leg.leg_id)
    except NearFutureError:
        # Another writer of the same run may have opened this very leg, and gone on from it since.
        if leg.leg_id not in {s.leg.leg_id for s in lineage.main_line(opened.run.legs(), opened.run.head())}:
            raise
    if line and line[-1].leg.leg_id not in lineage.ancestors(opened.run.legs(), leg.leg_id):
        logger.warning("the main line leaves leg %s for leg %s", line[-1].leg.leg_id, leg.leg_id)
    return leg


@task(name="train segment", task_run_name="train {leg.kind} {start}-{stop}", **OPTIONS)
def train_segment(run: str, leg: LegRecord, start: int, stop: int) -> SegmentManifest:
    """Trains steps [start, stop) of a leg and commits the checkpoint, then the segment. Found if it is committed."""
    from npo_core.trackers import track

    opened = workspace(run)
    committed = {segment.start: segment for segment in opened.run.segments(leg.leg_id)}
    segment = committed.get(start) or _train(opened, leg, leg_checkpoint(run, leg, start), stop)
    # Here too if it was found: the process that committed it may have died before it said so.
    track(opened.config.run, opened.run)
    return segment


def _train(opened: Workspace, leg: LegRecord, parent: CheckpointRef, stop: int) -> SegmentManifest:
    from npo_core.environment import environment, warn_of_changes
    from npo_core.guide_sources import window_steps
    from npo_core.monitor import MONITOR_FILE
    from npo_core.progress import progress_bar
    from npo_core.segment import run_segment

    start, epoch = parent.step, None
    if leg.kind in MAIN_LINE_KINDS:
        epoch = opened.run.require_tip(leg.leg_id).epoch
    fingerprint = environment(opened.config, "rollout")
    left = opened.run.checkpoint(leg.leg_id, stop)
    if left is not None and (found := opened.run.rows_behind(left, start)) is not None:
        # A process died between the checkpoint and its segment.
        return opened.run.commit_segment(leg, found, left, epoch, fingerprint)
    engine = opened.holding(parent, optimizer=True, kind=leg.kind)
    before = opened.run.require_checkpoint(parent.leg_id, parent.step)
    warn_of_changes(before.environment, fingerprint)
    guide = opened.guide(leg.guide_id, window_steps(opened.prompts, start, stop)) if leg.guide_id else None
    context = opened.context(leg.leg_id, before.weights_digest, guide, opened.run.monitor_state(parent), leg.kind)
    opened.trained()
    with progress_bar(f"{leg.kind} {start}-{stop}", stop - start) as bar:

        def on_step(done: int, metrics: Mapping[str, float]) -> None:
            watched = {name: metrics[name] for name in WATCHED if name != "npo/replaced" or guide is not None}
            bar(done - start, watched)
            advance(done - leg.start, watched)

        tables = run_segment(context, engine.rollouts, engine.learner, start, stop, on_step)
    rows = opened.run.put_rows(leg, start, stop, tables.rollouts, tables.metrics, tables.telemetry)
    with tempfile.TemporaryDirectory(dir=opened.scratch) as directory:
        engine.learner.save(Path(directory))
        (Path(directory) / MONITOR_FILE).write_text(tables.monitor.model_dump_json())
        checkpoint, same = opened.run.commit_checkpoint(leg.leg_id, stop, Path(directory), fingerprint, rows)
    if checkpoint.segment != rows:
        # Another writer's checkpoint came first, and its rows with it.
        rows = opened.run.rows_behind(checkpoint, start) or rows
    segment = opened.run.commit_segment(leg, rows, checkpoint, epoch, fingerprint)
    if same:
        # Otherwise another attempt's checkpoint was there first, and the next segment starts from that one.
        opened.now_holds(checkpoint.ref, leg.kind)
    return segment


def scout_is_done(run: str, leg: LegRecord, step: int) -> bool:
    """Whether a scout stops at `step`, where a segment ends, because its coverage has stopped growing. What is
    committed says so, at any time."""
    from npo_core.coverage import has_stopped_growing

    opened = workspace(run)
    scout = opened.config.future.scout
    if not scout.patience:
        return False
    first = step - 2 * scout.patience
    segments = [s for s in opened.run.segments(leg.leg_id) if first < s.stop and s.stop <= step]
    tables = [opened.run.table(segment, "metrics", ["step", "batch/solve_none"]) for segment in segments]
    solve_none = [row["batch/solve_none"] for table in tables for row in table.to_pylist() if row["step"] >= first]
    done = has_stopped_growing([1 - share for share in solve_none], scout.patience, scout.min_gain)
    if done:
        logger.info(
            "the scout stops at step %d: its coverage has grown by less than %g in %d steps",
            step,
            scout.min_gain,
            scout.patience,
        )
    return done


def leg_checkpoint(run: str, leg: LegRecord, step: int) -> CheckpointRef:
    """See `npo_core.tip.leg_checkpoint`."""
    return tip.leg_checkpoint(workspace(run).run, leg, step)


def main_line_step(run: str) -> tuple[int, LegRecord]:
    """See `npo_core.tip.main_line_step`."""
    return tip.main_line_step(workspace(run).run)


def require_finished(run: str, leg: LegRecord, step: int) -> None:
    """Raises if the leg, the main line's tip, is a replay that has not come to the end of its guide's window.

    Raises:
        NearFutureError: it is; names the command that finishes it.
    """
    if leg.guide_id is not None and step < (stop := workspace(run).run.require_guide(leg.guide_id).spec.stop):
        raise NearFutureError(
            f"the replay leg {leg.leg_id} has come to step {step} of its window's end at {stop}; "
            f"`npo stage replay {run} --guide {leg.guide_id}` finishes it"
        )


def require_trained_by(run: str, checkpoint: CheckpointRef, kind: LegKind) -> None:
    """Raises if another kind of leg trained a checkpoint: its own stage does that again.

    Raises:
        ConfigurationError: it did; names the stage.
    """
    leg = workspace(run).run.leg(checkpoint.leg_id)
    if leg.kind != kind:
        guide = f" --guide {leg.guide_id}" if leg.guide_id else ""
        stage = {"warm": "warm-start"}.get(leg.kind, leg.kind)
        raise ConfigurationError(
            f"the main line at step {checkpoint.step} is a {leg.kind} leg's, not a {kind} leg's; `npo stage {stage} "
            f"{run}{guide} --force` computes it again"
        )


def require_replayed(run: str, guide_id: str) -> None:
    """Raises unless the main line holds the replay with this guide: the stage would leave the main line for it.

    Raises:
        ConfigurationError: it does not hold it.
    """
    from npo_core.lineage import main_line

    artifacts = workspace(run).run
    if guide_id not in {stretch.leg.guide_id for stretch in main_line(artifacts.legs(), artifacts.head())}:
        raise ConfigurationError(
            f"the main line of {run} holds no replay with guide {guide_id}, and to force one would roll it back; run "
            "the stage without force if it should"
        )


def main_line_checkpoint(run: str, step: int) -> CheckpointRef:
    """The main line's checkpoint at `step`.

    Raises:
        NearFutureError: the main line has none there; names the steps that it has.
    """
    from npo_core.artifacts import main_line_checkpoint

    return main_line_checkpoint(workspace(run).run, step)
