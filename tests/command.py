"""Runs the command `npo` in processes of its own, against one local Prefect server, and compares what runs left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from npo_core import parquet
from npo_core.artifacts import RunArtifacts
from tests.preloaded import PreloadedParent

ROOT = Path(__file__).parent.parent
SMALL = {
    "run.total_steps": 8,
    "run.segment_steps": 2,
    "data.prompts": 16,
    "data.held_out": 16,
    "rollout.prompts_per_step": 4,
    "future.interventions.0.lookahead": 4,
    "future.interventions.0.window": 4,
    "evaluation.every": 4,
    "evaluation.samples": 2,
}


_parent: PreloadedParent | None = None


def npo(
    *arguments: object, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs `npo` with these arguments to its end."""
    global _parent
    if _parent is None:
        _parent = PreloadedParent()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return _parent.run([*map(str, arguments)], environment, timeout)


def run_arguments(config: str, store: Path | str, name: str, **overrides: object) -> list[str]:
    """Arguments of `npo run` for a small run in a folder or at a store's URL; overrides use `__` for the dot."""
    values = {**SMALL, "run.store": store if isinstance(store, str) else f"file://{store}", "run.name": name}
    if config != "testbed-npo":
        values = {key: value for key, value in values.items() if not key.startswith("future")}
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return ["run", f"deploy/configs/{config}.yaml", *(part for k, v in values.items() for part in ("-s", f"{k}={v}"))]


EAGER = {
    "run.total_steps": 16,
    "data.prompts": 32,
    "learner.learning_rate": 1e-3,
    "autonpo.patience": 4,
    "autonpo.trend_steps": 8,
    "autonpo.trend_z": 0,
    "autonpo.min_gain": 9,
    "autonpo.first_check": 8,
    "autonpo.cooldown": 2,
    "autonpo.max_interventions": 2,
    "autonpo.lookback": 6,
    "autonpo.min_pool": 2,
    "autonpo.probe_prompts": 4,
    "autonpo.probe_samples": 4,
    "autonpo.min_quality": 0,
    "autonpo.mistake_threshold": 0.5,
}
"""AutoNPO that warns as soon as entropy falls: at step 8, and at step 10 once it has been replayed."""


def autonpo_arguments(store: Path | str, name: str, **overrides: object) -> list[str]:
    """`run_arguments` of a small AutoNPO run that intervenes twice."""
    eager = {key.replace(".", "__"): value for key, value in EAGER.items()}
    return run_arguments("testbed-autonpo", store, name, **{**eager, **overrides})


def last_json(result: subprocess.CompletedProcess[str]) -> Any:
    """The JSON object that a command printed as its last line."""
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def was_killed(result: subprocess.CompletedProcess[str]) -> bool:
    """Whether SIGKILL ended the process."""
    return result.returncode == -signal.SIGKILL


def fingerprint(run: RunArtifacts) -> dict[str, Any]:
    """Everything that two runs of one recipe must have in common, bit for bit: no times, no nonces, no hosts."""
    legs = run.legs()
    head = run.head()
    return {
        "head": head and [head.leg_id, head.epoch],
        "legs": sorted((leg.leg_id, leg.kind, leg.start, leg.guide_id) for leg in legs),
        "segments": {(leg.leg_id, s.start, s.stop): s.logical_digest for leg in legs for s in run.segments(leg.leg_id)},
        "checkpoints": {(leg.leg_id, c.step): c.digest for leg in legs for c in run.checkpoints(leg.leg_id)},
        "guides": {g.guide_id: _rows(run, g, "trajectories") for g in run.guides()},
        "evaluations": {e.eval_id: (e.accuracy, _rows(run, e, "samples")) for e in run.evaluations()},
        "decisions": sorted((d.leg_id, d.step, d.reason) for d in run.decisions()),
    }


def _rows(run: RunArtifacts, manifest: Any, role: str) -> str:
    return parquet.logical_digest(run.table(manifest, role), parquet.SCHEMAS[role])
