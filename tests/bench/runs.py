"""Runs of the study: `npo run` in child processes, one thread each, and what the runs leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from npo_core import views
from npo_core.artifacts import RunArtifacts, open_run
from npo_core.compare import SMOOTHING, spending
from npo_core.interfaces import NearFutureError
from schemas.digest import digest_json
from tests.bench.arms import CONFIGS, Arm
from tests.bench.server import shared_server

END_STEPS = 20
"""Main-line steps at a run's end whose mean entropy is its entropy at the end."""

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One run of an arm."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """The run's name. The overrides are in it, so that a run is found again under the same ones only, by every
        study that has such an arm."""
        return f"{self.arm.method}-{digest_json(self.arm.overrides)[:8]}-s{self.seed}"


@dataclass(frozen=True)
class Ending:
    """A finished run."""

    families: dict[str, float]
    """Held-out accuracy by task family, mean of the main line's last three evaluations."""
    entropy: float
    """Of the on-policy rollouts, nats a token, mean of the last `END_STEPS` steps of the main line."""
    main_steps: int
    trained_steps: int
    """Of the whole run: scouts and abandoned steps too."""
    total_tokens: int
    """Of the whole run: policy, guides and probes, discarded. Evaluation is no training."""
    interventions: int
    """Rollbacks."""


def jobs_of(arms: Iterable[Arm], seeds: Iterable[int]) -> list[Job]:
    """Every arm on every seed, seed by seed, so that pairs are complete early."""
    arms = list(arms)
    return [Job(arm, seed) for seed in seeds for arm in arms]


def run_all(jobs: Iterable[Job], store: str, parallel: int) -> None:
    """Runs every job by the command `npo run`, which goes on where an earlier attempt ended.

    Raises:
        NearFutureError: a run failed; has the end of its standard error.
    """
    with shared_server(), ThreadPoolExecutor(parallel) as pool:
        for job in pool.map(lambda job: _run(job, store), list(jobs)):
            print(f"{job.name}: done", file=sys.stderr, flush=True)


def read(jobs: Sequence[Job], store: str, what: Callable[[RunArtifacts], T]) -> dict[str, dict[int, T]]:
    """`what` each finished run says, by arm and seed."""
    found: dict[str, dict[int, T]] = {}
    for job in jobs:
        found.setdefault(job.arm.name, {})[job.seed] = what(open_run(f"{store}/{job.name}"))
    return found


def ending(run: RunArtifacts) -> Ending:
    """What a finished run came to."""
    scores = views.main_evaluations(run)[-SMOOTHING:]
    line = views.steps(run).filter("main_line").sort("step")
    whole = spending(run)
    return Ending(
        families={
            family: sum(score.tasks[family].accuracy for score in scores) / len(scores) for family in scores[-1].tasks
        },
        entropy=float(line["entropy"].tail(END_STEPS).mean()),  # type: ignore[arg-type]
        main_steps=line.height,
        trained_steps=whole["trained_steps"],
        total_tokens=whole["policy"] + whole["guide"] + whole["discarded"],
        interventions=len(views.show(run)["interventions"]),
    )


def _run(job: Job, store: str) -> Job:
    own = (f"run.name={job.name}", f"run.seed={job.seed}", f"run.store={store}")
    sets = [word for override in (*job.arm.overrides, *own) for word in ("-s", override)]
    npo = Path(sys.executable).parent / "npo"
    done = subprocess.run(
        [npo, "run", CONFIGS[job.arm.method], *sets, "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise NearFutureError(f"{job.name} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return job
