"""The long counts: a run is killed at random moments, again and again, and still ends bit-identical."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from npo_core.artifacts import open_run
from tests.command import ROOT, fingerprint, last_json, npo, run_arguments

pytestmark = pytest.mark.soak

KILLS = 50
SIZE = {"run__total_steps": 60, "future__interventions__0__lookahead": 30, "future__interventions__0__window": 30}


def test_random_kills_change_nothing(tmp_path: Path, prefect_server: dict[str, str]) -> None:
    reference = last_json(
        npo(*run_arguments("testbed-npo", tmp_path / "a", "demo", **SIZE), "--json", env=prefect_server)
    )
    expected = fingerprint(open_run(reference["run"]))
    moments, kills, runs = random.Random(0), 0, 0
    start_up = time_to_first_artifact(tmp_path / "b", prefect_server)
    while kills < KILLS:
        runs += 1
        arguments = run_arguments("testbed-npo", tmp_path / f"run{runs}", "demo", **SIZE)
        while True:
            # Most kills fall into the work, some into the start.
            delay = start_up + moments.uniform(-2, 4) if kills < KILLS else None
            if not killed_after(delay, arguments, prefect_server):
                break
            kills += 1
        result = last_json(npo(*arguments, "--json", env=prefect_server))
        assert fingerprint(open_run(result["run"])) == expected
        assert npo("verify", result["run"]).returncode == 0
        print(f"{kills} kills, {runs} runs, all bit-identical", flush=True)


def time_to_first_artifact(store: Path, server: dict[str, str]) -> float:
    """Seconds from a command's start to its first committed record, here and now."""
    began = time.monotonic()
    process = start(run_arguments("testbed-npo", store, "demo", **SIZE), server)
    while not (store / "demo" / "head.json").exists():
        assert process.poll() is None, "the command ended before it committed anything"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return time.monotonic() - began


def killed_after(delay: float | None, arguments: list[str], server: dict[str, str]) -> bool:
    """Starts the command and kills it after `delay` seconds; False if it ended before that."""
    process = start(arguments, server)
    try:
        assert process.wait(timeout=delay) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def start(arguments: list[str], server: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **server},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
