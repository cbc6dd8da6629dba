"""Everything that a run has committed, read at one time: what `npo gc` decides from. A run that is not whole has no
inventory, for what a lost or damaged record speaks of would look like debris."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from npo_core import lineage
from npo_core.artifacts import RunArtifacts, line_checkpoints
from npo_core.interfaces import NearFutureError
from npo_core.store import StoreError
from npo_core.tombstones import removals
from schemas import layout
from schemas.decisions import DecisionRecord
from schemas.records import (
    CheckpointManifest,
    CheckpointRef,
    EvalManifest,
    GuideManifest,
    Head,
    LegRecord,
    Manifest,
    RunRecord,
    SegmentManifest,
    ShardManifest,
    SignalManifest,
    Tombstone,
)


@dataclass(frozen=True)
class Inventory:
    """The committed records of a run."""

    record: RunRecord
    head: Head | None
    legs: Sequence[LegRecord]
    segments: dict[str, list[SegmentManifest]]
    """By leg, from its start on."""
    checkpoints: Sequence[CheckpointManifest]
    """Removed ones too."""
    guides: Sequence[GuideManifest]
    evaluations: Sequence[EvalManifest]
    """Of benchmarks too."""
    decisions: Sequence[DecisionRecord]
    signals: Sequence[SignalManifest]
    model: Manifest | None
    tombstones: Sequence[Tombstone]
    shards: Sequence[ShardManifest] = ()
    """Of guides that are committed too, until they are swept."""

    def manifests(self) -> Iterator[Manifest]:
        """Every manifest: what they name is no debris."""
        yield from (segment for group in self.segments.values() for segment in group)
        for group in (self.checkpoints, self.guides, self.shards, self.evaluations, self.signals):
            yield from group
        if self.model is not None:
            yield self.model

    @cached_property
    def present(self) -> list[CheckpointManifest]:
        """The checkpoints that were not removed."""
        gone = removals(self.tombstones)
        return [checkpoint for checkpoint in self.checkpoints if checkpoint.ref not in gone]

    @cached_property
    def line(self) -> dict[int, CheckpointManifest]:
        """The main line's checkpoints by step, removed ones too; the last is its tip."""
        return line_checkpoints(lineage.main_line(self.legs, self.head), self.segments, self.checkpoints)


def take_inventory(run: RunArtifacts) -> Inventory:
    """Reads all records of a run. What refers comes before what it refers to, so that a run which goes on meanwhile
    is no broken one.

    Raises:
        NearFutureError: a record is damaged, or one that another refers to is missing; names it.
    """
    try:
        record, head = run.record(), run.head()
        decisions, evaluations, signals = run.decisions(), run.all_evaluations(), run.signals()
        names, legs = run.store.list(layout.LEGS), run.legs()
        shards = run.shards()
        guides, model, tombstones = run.guides(), run.model(), run.tombstones()
        segments = {leg.leg_id: run.all_segments(leg.leg_id) for leg in legs}
        checkpoints = [found for leg in legs for found in run.checkpoints(leg.leg_id)]
    except StoreError as error:
        raise refusal(run, str(error).rpartition("; ")[0] or str(error)) from error
    found = Inventory(
        record, head, legs, segments, checkpoints, guides, evaluations, decisions, signals, model, tombstones, shards
    )
    for name in set(names) - {leg.leg_id for leg in legs}:
        if run.store.list(layout.segments(name)) or run.store.list(layout.checkpoints(name)):
            raise refusal(run, f"{layout.leg(name)} is missing")
    lost = _missing(found, lambda ref: run.checkpoint(ref.leg_id, ref.step))
    if lost is not None:
        raise refusal(run, lost)
    if found.line and found.line[max(found.line)] not in found.present:
        raise refusal(run, f"{layout.TOMBSTONES} name the tip of the main line")
    return found


def refusal(run: RunArtifacts, problem: str) -> NearFutureError:
    """Why nothing is removed from a run."""
    return NearFutureError(
        f"nothing is removed from {run.uri}, for it is not whole: {problem}; `npo verify` names all that is damaged, "
        "restore it from a copy first"
    )


def _missing(found: Inventory, read: Callable[[CheckpointRef], CheckpointManifest | None]) -> str | None:
    """What records refer to and is not there; None if nothing is.

    Args:
        read: looks a checkpoint up again: one may have been committed since the others were read.
    """
    if found.legs and found.model is None:
        return f"{layout.manifest(layout.MODEL)} is missing"
    trained = any(leg.kind != "scout" and found.segments[leg.leg_id] for leg in found.legs)
    if found.head is None and trained:
        return f"{layout.HEAD} is missing"
    try:
        lineage.main_line(found.legs, found.head)
    except NearFutureError as error:
        return str(error).rpartition("; ")[0]
    guides = {guide.guide_id for guide in found.guides}
    for leg in found.legs:
        if leg.guide_id is not None and leg.guide_id not in guides:
            return f"guide {leg.guide_id} of leg {leg.leg_id} is missing"
        step = leg.start
        for segment in found.segments[leg.leg_id]:
            if segment.start > step:
                return f"steps {step}-{segment.start} of leg {leg.leg_id} are missing"
            step = max(step, segment.stop)
    known = {checkpoint.ref for checkpoint in found.checkpoints}
    for what, ref in _references(found):
        if ref not in known and ((again := read(ref)) is None or again.ref != ref):
            return f"the checkpoint of leg {ref.leg_id} at step {ref.step}, {what}, is missing or another one"
    return None


def _references(found: Inventory) -> Iterator[tuple[str, CheckpointRef]]:
    """Every reference to a checkpoint, and whose it is."""
    for leg in found.legs:
        if leg.parent is not None:
            yield f"the parent of leg {leg.leg_id}", leg.parent
        for segment in found.segments[leg.leg_id]:
            yield f"the end of its steps {segment.start}-{segment.stop}", segment.checkpoint
    for guide in found.guides:
        yield f"the policy of guide {guide.guide_id}", guide.spec.checkpoint
    for evaluation in found.evaluations:
        yield f"the policy of evaluation {evaluation.eval_id}", evaluation.checkpoint
    for signal in found.signals:
        for ref in dict.fromkeys(ref for point in signal.spec.points for ref in point):
            yield f"a policy of study {signal.signal_id}", ref
    for decision in found.decisions:
        for wanted in (decision.parent, decision.guide):
            if wanted is not None:
                yield f"of the decision at step {decision.step}", wanted
    for tombstone in found.tombstones:
        for ref in tombstone.checkpoints:
            yield f"of the tombstone of {tombstone.created_at[:16]}", ref
