"""What the README says about data of one's own is what happens."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from npo_core.artifacts import open_run
from schemas.config import Config
from tests.command import ROOT

pytestmark = pytest.mark.slow

SECTION = (ROOT / "README.md").read_text().partition("### Your own data in five minutes\n")[2].partition("\n### ")[0]


def blocks() -> list[str]:
    """The indented blocks of the section."""
    found: list[list[str]] = [[]]
    for line in SECTION.splitlines():
        if line.startswith("    ") or (not line and found[-1]):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [textwrap.dedent("\n".join(block)) for block in found if block]


def test_five_minutes_lead_to_a_run_that_has_learned(tmp_path: Path, prefect_server: dict[str, str]) -> None:
    command = tmp_path / "bin" / "npo"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m flows.cli "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", blocks()[0]],
        cwd=tmp_path,
        env={**os.environ, **prefect_server, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 rows of jsonl sums.jsonl: " in done.stdout
    assert "200 rows of jsonl sums.jsonl: " in done.stderr
    run = open_run(f"file://{tmp_path}/runs/mine")
    first, *_, last = sorted(run.evaluations(), key=lambda made: made.checkpoint.step)
    assert last.checkpoint.step == 40
    assert last.accuracy > first.accuracy + 0.2, (first.accuracy, last.accuracy)


def test_the_other_lines_are_configurations() -> None:
    sections = [yaml.safe_load(line) for line in blocks()[1].splitlines() if line]
    assert len(sections) == 5
    for section in sections:
        Config.model_validate({"run": {"name": "x"}, **section})
