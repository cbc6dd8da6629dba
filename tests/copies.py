"""Copies of a synthetic run, for tests that change, damage or sweep one."""

from __future__ import annotations

import shutil
from pathlib import Path

from npo_core.artifacts import RunArtifacts, open_run
from schemas.records import LegKind, LegRecord


def copied(store: Path, target: Path) -> RunArtifacts:
    """The synthetic run of a store, copied."""
    shutil.copytree(store, target / "runs")
    return open_run(str(target / "runs" / "synthetic"))


def folder_of(run: RunArtifacts) -> Path:
    """Where a run lies."""
    return Path(run.uri.removeprefix("file://"))


def leg_of(run: RunArtifacts, kind: LegKind) -> LegRecord:
    """The run's last leg of a kind."""
    return [leg for leg in run.legs() if leg.kind == kind][-1]
