"""Runs of the study: `npo run` in child processes, one thread each, and the curves that the runs leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from npo_core.artifacts import open_run
from npo_core.compare import curve
from npo_core.interfaces import NearFutureError
from schemas.digest import digest_json
from tests.bench.server import shared_server


@dataclass(frozen=True)
class Job:
    """One run of a configuration under overrides and a seed."""

    arm: str
    config: str
    overrides: tuple[str, ...]
    seed: int

    @property
    def name(self) -> str:
        """The run's name. The overrides are in it, so that a run is found again under the same ones only."""
        return f"{self.arm}-{digest_json(self.overrides)[:8]}-s{self.seed}"


def run_all(jobs: Iterable[Job], store: str, parallel: int) -> None:
    """Runs every job by the command `npo run`, which goes on where an earlier attempt ended.

    Raises:
        NearFutureError: a run failed; has the end of its standard error.
    """
    with shared_server(), ThreadPoolExecutor(parallel) as pool:
        for job in pool.map(lambda job: _run(job, store), list(jobs)):
            print(f"{job.name}: done", file=sys.stderr, flush=True)


def curves(jobs: Sequence[Job], store: str) -> dict[str, dict[int, pl.DataFrame]]:
    """The evaluations of each finished run (`npo_core.compare.curve`), by arm and seed."""
    found: dict[str, dict[int, pl.DataFrame]] = {}
    for job in jobs:
        found.setdefault(job.arm, {})[job.seed] = curve(open_run(f"{store}/{job.name}"))
    return found


def _run(job: Job, store: str) -> Job:
    own = (f"run.name={job.name}", f"run.seed={job.seed}", f"run.store={store}")
    sets = [word for override in (*job.overrides, *own) for word in ("-s", override)]
    npo = Path(sys.executable).parent / "npo"
    done = subprocess.run(
        [npo, "run", job.config, *sets, "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise NearFutureError(f"{job.name} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return job
