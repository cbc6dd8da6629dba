"""A stage with `force` does its committed work again beside it, and tells what came out otherwise; nothing changes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from npo_core.artifacts import open_run
from tests.command import ROOT, npo, run_arguments

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, prefect_server: dict[str, str]) -> Path:
    """The store of a small finished NPO run."""
    folder = tmp_path_factory.mktemp("forced")
    made = npo(*run_arguments("testbed-npo", folder, "a_small.one"), env=prefect_server)
    assert made.returncode == 0, made.stderr
    return folder


def copied(store: Path, target: Path) -> Path:
    """A copy of the store, to be changed."""
    return Path(shutil.copytree(store, target / "store"))


def contents(store: Path) -> dict[str, str]:
    """Hash of every file of the run, but for leases."""
    files = [path for path in store.rglob("*") if path.is_file() and "leases" not in path.parts]
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


EVERY_STAGE = """
import sys
from flows.local_server import prefect_api
with prefect_api():
    from flows import stages
    from npo_core.artifacts import open_run
    import logging
    logging.getLogger("npo").setLevel(logging.INFO)
    logging.basicConfig(level=logging.INFO)
    run = sys.argv[1]
    guide = open_run(run).guides()[0]
    stages.warm_start(run, force=True)
    stages.scout(run, 0, 4, force=True)
    stages.guide(run, guide.spec.checkpoint, 0, 4, force=True)
    stages.replay(run, guide.guide_id, force=True)
    stages.main(run, 8, force=True)
    stages.evaluate(run, force=True)
    stages.signal(run, (0,), (2,), 4, 2, force=True)
"""


def test_every_stage_comes_out_the_same_and_leaves_the_store_as_it_was(
    store: Path, prefect_server: dict[str, str]
) -> None:
    run = f"file://{store}/a_small.one"
    before = contents(store)
    done = subprocess.run(
        [sys.executable, "-c", EVERY_STAGE, run],
        cwd=ROOT,
        env={**os.environ, **prefect_server},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "computed again and equal: " in line]
    told = [line.partition("equal: ")[2].split(", ") for line in lines]
    assert [len(artifacts) for artifacts in told] == [1, 4, 1, 4, 4, 1, 1], done.stderr
    after = contents(store)
    assert {key for key in after if "/signals/" not in key} == set(before)
    assert {key: after[key] for key in before} == before


def test_a_leg_that_was_stopped_and_extended_is_cut_as_it_is(store: Path, prefect_server: dict[str, str]) -> None:
    for steps in (3, 5):
        made = npo(*run_arguments("testbed-grpo", store, "cut", run__total_steps=steps), env=prefect_server)
        assert made.returncode == 0, made.stderr
    done = npo("stage", "main", f"file://{store}/cut", "--stop", 5, "--force", env=prefect_server)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("/segments/") == 4
    shutil.rmtree(store / "cut")


def test_what_comes_out_otherwise_is_told_with_its_distance_and_replaces_nothing(
    store: Path, tmp_path: Path, prefect_server: dict[str, str]
) -> None:
    changed = copied(store, tmp_path)
    record = changed / "a_small.one" / "run.json"
    content = json.loads(record.read_text())
    # Sums of gradients in other passes round differently.
    content["config"]["learner"]["micro_batch_tokens"] = 64
    record.write_text(json.dumps(content))
    before = contents(changed)
    done = npo("stage", "main", f"file://{changed}/a_small.one", "--stop", 8, "--force", env=prefect_server)
    assert done.returncode == 1
    assert "artifacts of" in done.stderr
    assert "came out otherwise than committed" in done.stderr
    assert "weights: relative L2 distance" in done.stderr
    assert contents(changed) == before


def test_force_never_moves_the_main_line(store: Path, tmp_path: Path, prefect_server: dict[str, str]) -> None:
    run = f"file://{copied(store, tmp_path)}/a_small.one"
    source = open_run(run).guides()[0].spec.checkpoint
    asked = ["guide", run, "--leg", source.leg_id, "--step", source.step, "--start", 0, "--stop", 3]
    assert npo("stage", *asked, env=prefect_server).returncode == 0
    other = next(guide for guide in open_run(run).guides() if guide.spec.stop == 3)
    head = open_run(run).head()
    done = npo("stage", "replay", run, "--guide", other.guide_id, "--force", env=prefect_server)
    assert done.returncode == 2
    assert "to force one would roll it back" in done.stderr
    assert open_run(run).head() == head
