"""Committed work and the same work done again: whether they are equal, bit for bit, and if not, how far apart."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from npo_core import parquet
from npo_core.artifacts import RunArtifacts
from npo_core.checkpoints import POLICY
from npo_core.interfaces import ConfigurationError
from npo_core.overlay import Overlay
from npo_core.store import open_store
from npo_core.tombstones import removals
from schemas import layout
from schemas.records import (
    MAIN_LINE_KINDS,
    CheckpointManifest,
    CheckpointRef,
    EvalManifest,
    GuideManifest,
    Manifest,
    SignalManifest,
)

Made = CheckpointRef | GuideManifest | EvalManifest | SignalManifest
"""What a stage makes: a leg's last checkpoint stands for the leg."""


class Comparison(NamedTuple):
    """One artifact, made twice."""

    artifact: str
    """Its folder in the run."""
    differences: tuple[str, ...]
    """None: equal bit for bit, but for times and measured seconds."""


def beside(run: RunArtifacts, made: Made, scratch: Path) -> RunArtifacts:
    """The run without what a stage made; a stage that is run on it writes into `scratch`."""
    hidden, leg = _folders(made), run.leg(made.leg_id) if isinstance(made, CheckpointRef) else None
    # A leg's stage trains the main line's tip alone, and later legs may have gone on from it.
    tip = leg if leg is not None and leg.kind in MAIN_LINE_KINDS else None
    if tip is not None:
        hidden.append(layout.HEAD)
    base = open_store(run.uri.rpartition("/")[0])
    again = RunArtifacts(Overlay(base, open_store(str(scratch)), hidden), run.run_id)
    if tip is not None:
        again.move_head(None, tip.leg_id)
    return again


def compare(run: RunArtifacts, again: RunArtifacts, made: Made) -> list[Comparison]:
    """What a stage made against what it made again.

    Raises:
        ConfigurationError: the stage made nothing that could be compared.
    """
    pairs = list(_pairs(run, again, made))
    if not pairs:
        raise ConfigurationError("nothing was computed again: the stage trained no step of its own; force another one")
    return [
        Comparison(folder, tuple(_differences(run, before, again, after)) or _fields_differ(before, after))
        if before
        else Comparison(folder, ("was not committed",))
        for folder, before, after in pairs
    ]


def _folders(made: Made) -> list[str]:
    """Where what a stage made lies."""
    match made:
        case CheckpointRef(leg_id=leg_id):
            return [layout.segments(leg_id), layout.checkpoints(leg_id)]
        case GuideManifest(guide_id=guide_id):
            return [layout.guide(guide_id)]
        case EvalManifest(eval_id=eval_id):
            return [layout.evaluation(eval_id)]
        case SignalManifest(signal_id=signal_id):
            return [layout.signal(signal_id)]


def _pairs(run: RunArtifacts, again: RunArtifacts, made: Made) -> Iterator[tuple[str, Manifest | None, Manifest]]:
    """(folder, committed, made again) of every artifact that was made again."""
    match made:
        case CheckpointRef(leg_id=leg_id):
            segments = {(s.start, s.stop): s for s in run.all_segments(leg_id)}
            for segment in again.all_segments(leg_id):
                bounds = segment.start, segment.stop
                yield layout.segment(leg_id, *bounds), segments.get(bounds), segment
            for checkpoint in again.checkpoints(leg_id):
                yield layout.checkpoint(leg_id, checkpoint.step), run.checkpoint(leg_id, checkpoint.step), checkpoint
        case GuideManifest(guide_id=guide_id):
            yield layout.guide(guide_id), made, again.require_guide(guide_id)
        case EvalManifest(eval_id=eval_id):
            if (evaluation := again.evaluation(eval_id)) is not None:
                yield layout.evaluation(eval_id), made, evaluation
        case SignalManifest(signal_id=signal_id):
            if (signal := again.signal(signal_id)) is not None:
                yield layout.signal(signal_id), made, signal


def _differences(run: RunArtifacts, before: Manifest, again: RunArtifacts, after: Manifest) -> Iterator[str]:
    roles = {entry.role for entry in (*before.files, *after.files)} - {"telemetry"}
    weights_differ = False
    for role in sorted(roles):
        if role in parquet.SCHEMAS:
            if (told := _rows_differ(run.table(before, role), again.table(after, role), role)) is not None:
                yield told
            continue
        files = [{e.name: e.sha256 for e in manifest.files if e.role == role} for manifest in (before, after)]
        if files[0] != files[1]:
            weights_differ |= role in POLICY
            names = sorted(name for name in {*files[0], *files[1]} if files[0].get(name) != files[1].get(name))
            yield f"{role}: other bytes in {', '.join(names)}"
    if weights_differ and isinstance(before, CheckpointManifest) and isinstance(after, CheckpointManifest):
        if before.ref in removals(run.tombstones()):
            return
        yield f"weights: relative L2 distance {_distance(run, before.ref, again, after.ref):.2e}"


def _fields_differ(before: Manifest, after: Manifest) -> tuple[str, ...]:
    """What the manifests say besides their files, such as counts of tokens."""
    of_the_writer = {"files", "nonce", "created_at", "environment", "segment"}
    ours, theirs = (manifest.model_dump(exclude=of_the_writer) for manifest in (before, after))
    return tuple(f"{name}: {theirs[name]}, was {value}" for name, value in ours.items() if theirs[name] != value)


def _rows_differ(before: pa.Table, after: pa.Table, role: str) -> str | None:
    schema = parquet.SCHEMAS[role]
    if parquet.logical_digest(before, schema) == parquet.logical_digest(after, schema):
        return None
    if len(before) != len(after):
        return f"{role}: {len(after)} rows, were {len(before)}"
    ours, theirs = parquet.canonical(before, schema), parquet.canonical(after, schema)
    # By text, in which what is not a number equals itself.
    rows = {name: _unequal(ours[name], theirs[name]) for name in schema.names}
    columns = [name for name, found in rows.items() if found]
    return f"{role}: {len(set().union(*rows.values()))} of {len(before)} rows differ, in {', '.join(columns)}"


def _unequal(before: pa.ChunkedArray, after: pa.ChunkedArray) -> set[int]:
    pairs = enumerate(zip(before.to_pylist(), after.to_pylist(), strict=True))
    return {row for row, (one, other) in pairs if repr(one) != repr(other)}


def _distance(run: RunArtifacts, before: CheckpointRef, again: RunArtifacts, after: CheckpointRef) -> float:
    """‖after − before‖ / ‖before‖ over all weights."""
    from safetensors.torch import load_file

    squares, apart = 0.0, 0.0
    with tempfile.TemporaryDirectory() as directory:
        ours = run.checkout(before, Path(directory) / "before", weights_only=True).weights
        theirs = again.checkout(after, Path(directory) / "after", weights_only=True).weights
        for file in sorted(ours.rglob("*.safetensors")):
            old, new = load_file(file), load_file(theirs / file.relative_to(ours))
            for name, tensor in old.items():
                squares += tensor.double().square().sum().item()
                apart += (new[name].double() - tensor.double()).square().sum().item()
    return math.sqrt(apart / squares) if squares else math.inf
