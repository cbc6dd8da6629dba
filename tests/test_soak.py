"""The long counts: a run is killed at random moments, again and again, and still ends bit-identical."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from npo_core.artifacts import open_run
from npo_core.store import open_store
from schemas import layout
from tests.command import ROOT, fingerprint, last_json, npo, run_arguments

pytestmark = pytest.mark.soak

KILLS = 50
SIZE = {"run__total_steps": 60, "future__interventions__0__lookahead": 30, "future__interventions__0__window": 30}


def test_random_kills_change_nothing(tmp_path: Path, prefect_server: dict[str, str]) -> None:
    expected = undisturbed(tmp_path / "a", prefect_server)
    endure_random_kills(f"file://{tmp_path}", expected, prefect_server, KILLS)


def undisturbed(store: Path, server: dict[str, str]) -> dict[str, Any]:
    """What a run leaves that nobody kills."""
    reference = last_json(npo(*run_arguments("testbed-npo", store, "demo", **SIZE), "--json", env=server))
    return fingerprint(open_run(reference["run"]))


def endure_random_kills(stores: str, expected: dict[str, Any], server: dict[str, str], wanted: int) -> None:
    """Runs in stores below a URL, killed at random moments until there were enough kills; each ends as expected."""
    moments, kills, runs = random.Random(0), 0, 0
    start_up = time_to_first_artifact(f"{stores}/b", server)
    while kills < wanted:
        runs += 1
        arguments = run_arguments("testbed-npo", f"{stores}/run{runs}", "demo", **SIZE)
        while True:
            # Most kills fall into the work, some into the start.
            delay = start_up + moments.uniform(-2, 4) if kills < wanted else None
            if not killed_after(delay, arguments, server):
                break
            kills += 1
        result = last_json(npo(*arguments, "--json", env=server))
        assert fingerprint(open_run(result["run"])) == expected
        assert npo("verify", result["run"]).returncode == 0
        print(f"{kills} kills, {runs} runs, all bit-identical", flush=True)


def time_to_first_artifact(store: str, server: dict[str, str]) -> float:
    """Seconds from a command's start to its first committed record, here and now."""
    began = time.monotonic()
    process = start(run_arguments("testbed-npo", store, "demo", **SIZE), server)
    while open_store(store).within("demo").read_bytes(layout.HEAD) is None:
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
