"""Which Parquet files of a run count: those that manifests name. A glob may also see what killed attempts left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from npo_core import lineage
from npo_core.artifacts import RunArtifacts
from npo_core.interfaces import ConfigurationError
from schemas.records import EvalManifest, Manifest

SEGMENT_ROLES = ("rollouts", "metrics", "telemetry")
GUIDE_ROLES = ("trajectories", "window")
ROLES = (*SEGMENT_ROLES, *GUIDE_ROLES, "samples", "greedy", "signal")
"""Of segments; of guides, evaluations, and studies of Q, V and S. `schemas/README.md` describes each one's columns."""


def data_files(run: RunArtifacts, role: str, main_line: bool = False) -> list[dict[str, Any]]:
    """The committed files of a role, by leg and step.

    Args:
        role: one of `ROLES`.
        main_line: only what is on the main line: its segments, the guides that were mixed into it, the evaluations of
            its checkpoints.

    Returns:
        `role`, `uri`, `rows`, `bytes`, and whose it is: `leg_id`, `start` and `stop` are the leg and the steps of a
        segment; the leg of a guide's checkpoint and the window that it serves; the leg and step of an evaluated
        checkpoint, twice; None of a study. `benchmark`: whose prompts an evaluation asked; None: the held-out ones.

    Raises:
        ConfigurationError: there is no such role, or it knows no main line.
    """
    if role not in ROLES:
        raise ConfigurationError(f"role {role!r} is none of {', '.join(ROLES)}")
    if role == "signal" and main_line:
        raise ConfigurationError("role 'signal': a study belongs to no leg; leave --main-line out")
    return [
        {
            "role": role,
            "uri": f"{run.uri}/{entry.key}",
            "rows": entry.rows,
            "bytes": entry.bytes,
            "leg_id": leg_id,
            "start": start,
            "stop": stop,
            "benchmark": manifest.benchmark.name if isinstance(manifest, EvalManifest) and manifest.benchmark else None,
        }
        for manifest, leg_id, start, stop in _artifacts(run, role, main_line)
        for entry in (manifest.file(role),)
    ]


def _artifacts(
    run: RunArtifacts, role: str, main_line: bool
) -> Iterator[tuple[Manifest, str | None, int | None, int | None]]:
    """The manifests that hold a role, each with its leg and steps."""
    if role == "signal":
        yield from ((study, None, None, None) for study in run.signals())
        return
    legs = run.legs()
    line = {stretch.leg.leg_id: stretch for stretch in lineage.main_line(legs, run.head())}
    if role in SEGMENT_ROLES:
        for leg in legs:
            for segment in run.segments(leg.leg_id) if leg.leg_id in line or not main_line else ():
                if not main_line or line[leg.leg_id].holds(segment.start):
                    yield segment, leg.leg_id, segment.start, segment.stop
    elif role in GUIDE_ROLES:
        mixed = {stretch.leg.guide_id for stretch in line.values()}
        for guide in run.guides():
            had = role != "window" or guide.window is not None
            if had and (not main_line or guide.guide_id in mixed):
                yield guide, guide.spec.checkpoint.leg_id, guide.spec.start, guide.spec.stop
    else:
        for score in sorted(run.all_evaluations(), key=lambda e: (e.checkpoint.step, e.created_at)):
            at = score.checkpoint
            if role == "greedy" and not score.greedy:
                continue
            if not main_line or (at.leg_id in line and line[at.leg_id].saves(at.step)):
                yield score, at.leg_id, at.step, at.step
