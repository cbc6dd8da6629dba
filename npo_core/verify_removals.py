"""Checks what `npo gc` wrote down: it removed big files of known checkpoints, and none that a run goes on from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from npo_core.findings import Findings
from npo_core.tombstones import big_files
from schemas.records import CheckpointManifest, CheckpointRef, Tombstone


def check_removals(
    findings: Findings,
    tombstones: Mapping[str, Tombstone],
    checkpoints: Iterable[CheckpointManifest],
    tip: CheckpointRef | None,
) -> None:
    """Notes what is wrong with tombstones.

    Args:
        findings: where faults go.
        tombstones: by key.
        checkpoints: all of the run.
        tip: where the main line goes on.
    """
    known = {manifest.ref: manifest for manifest in checkpoints}
    for key, tombstone in tombstones.items():
        own: set[str] = set()
        for ref in tombstone.checkpoints:
            name = f"a checkpoint (leg {ref.leg_id}, step {ref.step})"
            findings.expect(ref in known, key, f"names {name} that is missing or another one now")
            findings.expect(ref != tip, key, f"names {name} from which the main line goes on")
            own |= {entry.key for entry in big_files(known[ref])} if ref in known else set()
        for other in sorted(set(tombstone.files) - own):
            findings.expect(False, key, f"names {other}, which is no weights, optimizer or state of its checkpoints")
