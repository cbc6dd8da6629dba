"""`npo gc`: removes the big files of checkpoints that nothing needs, and what belongs to nothing.

A removal of checkpoints is written down as a tombstone before the first file goes, so that a gc that is killed is
finished by the next one, and nobody takes what is gone for lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from npo_core.artifacts import RunArtifacts
from npo_core.debris import UNCOMMITTED, Removal, debris, folder_of, kind_of, unknown
from npo_core.interfaces import NearFutureError, StoredObject
from npo_core.inventory import Inventory, take_inventory
from npo_core.leases import live_leases
from npo_core.retention import Kept, retain
from npo_core.store import StoreError
from npo_core.tombstones import big_files, removed_keys
from schemas import layout
from schemas.config import Config, RetentionSection
from schemas.records import CheckpointManifest, Lease


@dataclass(frozen=True)
class Plan:
    """What a gc removes and leaves."""

    checkpoints: tuple[CheckpointManifest, ...]
    """Their big files go."""
    removed: tuple[Removal, ...]
    """All objects that go, those of the checkpoints first."""
    kept: tuple[Kept, ...]
    """The checkpoints that stay."""
    unknown: tuple[str, ...]
    """What this program did not write, and leaves alone."""

    @property
    def freed_bytes(self) -> int:
        """How much smaller the run gets."""
        return sum(removal.bytes for removal in self.removed)


def plan_gc(run: RunArtifacts, config: Config) -> Plan:
    """Looks for what can go; changes nothing.

    Args:
        run: the run.
        config: its configuration, `retention` as it is asked for now.

    Raises:
        NearFutureError: the run is not whole, so that it cannot be said what belongs to nothing.
    """
    # Before the records are read: what is committed meanwhile is named by one of them, and what comes later not seen.
    objects = run.store.walk("")
    live = _live(run)
    found = take_inventory(run)
    retention = retain(found, config)
    going = [
        Removal(e.key, e.bytes, "checkpoint that nothing needs") for c in retention.removable for e in big_files(c)
    ]
    named = {entry.key for manifest in found.manifests() for entry in manifest.named}
    committed = {folder_of(o.key) for o in objects if kind_of(o.key) == "record"}
    grace = timedelta(hours=config.retention.grace_hours)
    swept = debris(objects, named, committed, live, datetime.now(UTC), grace)
    removed = (*going, *_left_by_a_killed_gc(found, objects), *swept)
    return Plan(retention.removable, removed, retention.kept, unknown(objects))


def carry_out(run: RunArtifacts, plan: Plan, settings: RetentionSection) -> Plan:
    """Removes what a plan says; returns what was removed in fact.

    Raises:
        StoreError: an object cannot be removed; the next gc goes on from there.
    """
    if plan.checkpoints:
        run.bury(plan.checkpoints, f"keep_last {settings.keep_last}, keep_every {settings.keep_every}")
    gone = []
    for removal in plan.removed:
        if not _was_claimed(run, removal):
            run.store.remove(removal.key)
            gone.append(removal)
    return Plan(plan.checkpoints, tuple(gone), plan.kept, plan.unknown)


def _left_by_a_killed_gc(found: Inventory, objects: list[StoredObject]) -> Iterator[Removal]:
    """Files of removed checkpoints that are there all the same."""
    present = {o.key: o.bytes for o in objects}
    gone = removed_keys(found.tombstones)
    for checkpoint in found.checkpoints:
        for entry in big_files(checkpoint):
            if entry.key in gone and entry.key in present:
                yield Removal(entry.key, present[entry.key], "checkpoint, removed before by a gc that did not finish")


def _was_claimed(run: RunArtifacts, removal: Removal) -> bool:
    """Whether a writer may have claimed a data file since the plan was made: it writes the same file again under the
    same name, and commits it."""
    if removal.why != UNCOMMITTED:
        return False
    folder = folder_of(removal.key)
    own, *others = (run.store.read_bytes(key) for key in (layout.manifest(folder), *_checkpoint_after(folder)))
    if own is None and _live(run):
        return True
    found = [json.loads(data) for data in (own, *others) if data is not None]
    parts = [part for manifest in found for part in (manifest, manifest.get("segment")) if part]
    return removal.key in {entry["key"] for part in parts for entry in part["files"]}


def _checkpoint_after(folder: str) -> Iterator[str]:
    """The manifest of the checkpoint that names a segment's rows before the segment does."""
    leg, slash, bounds = folder.partition("/segments/")
    if slash:
        yield layout.manifest(layout.checkpoint(leg.removeprefix(f"{layout.LEGS}/"), int(bounds.partition("-")[2])))


def _live(run: RunArtifacts) -> list[Lease]:
    try:
        return live_leases(run)
    except StoreError as error:
        problem = str(error).rpartition("; ")[0] or str(error)
        raise NearFutureError(
            f"nothing is removed from {run.uri}: {problem}; remove that lease when no process writes the run"
        ) from error
