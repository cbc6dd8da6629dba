"""What the tests of `npo gc` share: a run to sweep, and what others leave in its folder."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from npo_core.artifacts import RunArtifacts
from npo_core.gc import Plan, carry_out, plan_gc
from npo_core.verify import verify_run
from schemas import layout
from schemas.config import Config
from schemas.records import Lease
from tests.synthetic import SyntheticVerifier, decode

OLD = timedelta(hours=30)
HASH = "0123456789abcdef"
STRANGER = "a" * 32


def config_of(run: RunArtifacts, **retention: Any) -> Config:
    return Config.model_validate({**run.record().config, "retention": retention})


def sweep(run: RunArtifacts, **retention: Any) -> Plan:
    config = config_of(run, **retention)
    return carry_out(run, plan_gc(run, config), config.retention)


def files(folder: Path) -> dict[str, int]:
    """All files of a run but tombstones, with their sizes."""
    found = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    return {key: size for key, size in found.items() if not key.startswith(layout.TOMBSTONES)}


def faults(run: RunArtifacts) -> list[Any]:
    return verify_run(run, SyntheticVerifier(), decode)


def tip_leg(run: RunArtifacts) -> str:
    head = run.head()
    assert head is not None
    return head.leg_id


def leave(folder: Path, key: str, age: timedelta = OLD, text: str = "left over") -> str:
    """A file that somebody wrote that long ago."""
    path = folder / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    then = time.time() - age.total_seconds()
    os.utime(path, (then, then))
    return key


def lease(run: RunArtifacts, acquired: timedelta, renewed: timedelta, writer: str = STRANGER) -> None:
    now = datetime.now(UTC)
    record = Lease(
        writer=writer,
        host="elsewhere",
        pid=7,
        acquired_at=(now - acquired).isoformat(),
        renewed_at=(now - renewed).isoformat(),
        ttl_seconds=300,
    )
    run.store.create(layout.lease(record.writer), record)
