"""What tombstones say: which files of which checkpoints `npo gc` removed, and when."""

from __future__ import annotations

from collections.abc import Iterable

from schemas.records import CheckpointManifest, CheckpointRef, FileEntry, Tombstone

BIG = ("weights", "adapter", "optimizer", "state")
"""Roles of the files that go with a checkpoint. Its monitor file is small, and `npo metrics` and `explain` read it."""


def big_files(manifest: CheckpointManifest) -> tuple[FileEntry, ...]:
    """The files that a removal takes."""
    return tuple(entry for entry in manifest.files if entry.role in BIG)


def removed_keys(tombstones: Iterable[Tombstone]) -> frozenset[str]:
    """Keys of all files that were removed, or are about to be."""
    return frozenset(key for tombstone in tombstones for key in tombstone.files)


def removals(tombstones: Iterable[Tombstone]) -> dict[CheckpointRef, Tombstone]:
    """The checkpoints that were removed, each with the tombstone that first named it."""
    found: dict[CheckpointRef, Tombstone] = {}
    for tombstone in tombstones:
        for ref in tombstone.checkpoints:
            found.setdefault(ref, tombstone)
    return found
