"""`npo gc` and real runs: before they go on, beside them, on S3."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from npo_core.artifacts import open_run
from schemas import layout
from tests.command import ROOT, autonpo_arguments, fingerprint, last_json, npo, run_arguments
from tests.s3_server import S3Server

# The last evaluation of a run that ends early is not one of a long run's.
SAME = ("head", "legs", "segments", "checkpoints", "guides", "decisions")


@pytest.mark.slow
def test_a_run_that_goes_on_after_a_gc_is_bit_identical(tmp_path: Path, prefect_server: dict[str, str]) -> None:
    for config in ("testbed-grpo", "testbed-npo"):
        short = run_arguments(config, tmp_path / "swept", config, run__total_steps=6)
        uri = last_json(npo(*short, "--json", env=prefect_server))["run"]
        swept = last_json(npo("gc", uri, "--json", "--keep-last", 1, "--grace-hours", 0))
        assert {removal["why"] for removal in swept["removed"]} == {"checkpoint that nothing needs"}
        last_json(npo(*run_arguments(config, tmp_path / "swept", config), "--json", env=prefect_server))
        calm = last_json(npo(*run_arguments(config, tmp_path / "calm", config), "--json", env=prefect_server))
        found, wanted = fingerprint(open_run(uri)), fingerprint(open_run(calm["run"]))
        assert {part: found[part] for part in SAME} == {part: wanted[part] for part in SAME}
        assert npo("verify", uri).returncode == 0


@pytest.mark.slow
def test_evaluations_asked_for_after_a_gc_leave_out_what_it_removed(
    tmp_path: Path, prefect_server: dict[str, str]
) -> None:
    first = run_arguments("testbed-grpo", tmp_path, "demo", evaluation__every=0)
    uri = last_json(npo(*first, "--json", env=prefect_server))["run"]
    swept = last_json(npo("gc", uri, "--keep-last", "1", "--json"))
    assert swept["removed"]
    more = run_arguments("testbed-grpo", tmp_path, "demo", evaluation__every=2, run__total_steps=12)
    assert last_json(npo(*more, "--json", env=prefect_server))["head_step"] == 12
    assert {e.checkpoint.step for e in open_run(uri).evaluations()} == {0, 8, 10, 12}


@pytest.mark.slow
def test_autonpo_rolls_back_the_same_way_after_a_gc(
    tmp_path: Path, prefect_server: dict[str, str], autonpo_run: str
) -> None:
    # It ends where the monitor warns: what it would roll back to must outlive the gc.
    short = autonpo_arguments(tmp_path / "swept", "demo", run__total_steps=8)
    uri = last_json(npo(*short, "--json", env=prefect_server))["run"]
    for total in (8, 10, 16):
        last_json(npo("gc", uri, "--json", "--keep-last", 1, "--grace-hours", 0))
        arguments = autonpo_arguments(tmp_path / "swept", "demo", run__total_steps=total)
        last_json(npo(*arguments, "--json", env=prefect_server))
    assert open_run(uri).tombstones()
    found, wanted = fingerprint(open_run(uri)), fingerprint(open_run(autonpo_run))
    assert {part: found[part] for part in SAME} == {part: wanted[part] for part in SAME}
    assert len([d for d in open_run(uri).decisions() if d.intervene]) == 2
    assert npo("verify", uri).returncode == 0


GC_LOOP = """
import json, sys
from datetime import timedelta
from npo_core import debris
from npo_core.artifacts import open_run
from npo_core.gc import carry_out, plan_gc
from npo_core.leases import live_leases
from schemas.config import Config

debris.MARGIN = timedelta(0)  # nothing is old in a test: what protects the writer here is its lease alone
run = open_run(sys.argv[1])
while not live_leases(run):
    pass
config = Config.model_validate({**run.record().config, "retention": {"keep_last": 1, "grace_hours": 0}})
while live_leases(run):
    done = carry_out(run, plan_gc(run, config), config.retention)
    print(json.dumps([removal.why for removal in done.removed]), flush=True)
"""


@pytest.mark.slow
def test_gc_in_a_loop_beside_a_run_that_writes_harms_nothing(
    tmp_path: Path, prefect_server: dict[str, str], autonpo_run: str
) -> None:
    uri = str(tmp_path / "swept" / "demo")
    with (tmp_path / "gc.out").open("w") as out, (tmp_path / "gc.err").open("w") as err:
        loop = subprocess.Popen([sys.executable, "-c", GC_LOOP, uri], cwd=ROOT, stdout=out, stderr=err)
        try:
            result = npo(*autonpo_arguments(tmp_path / "swept", "demo"), "--json", env=prefect_server)
            assert loop.wait(timeout=60) == 0, (tmp_path / "gc.err").read_text()
        finally:
            loop.kill()
            loop.wait()
    run = open_run(last_json(result)["run"])
    swept = [json.loads(line) for line in (tmp_path / "gc.out").read_text().splitlines()]
    assert len(swept) > 5
    # The last sweep may find the lease given back since the loop saw it.
    assert {why for sweep in swept[:-1] for why in sweep} == {"checkpoint that nothing needs"}
    assert run.tombstones()
    found, wanted = fingerprint(run), fingerprint(open_run(autonpo_run))
    assert found == wanted
    assert npo("verify", run.uri).returncode == 0


@pytest.mark.slow
def test_on_s3_a_run_gives_its_lease_back_and_gc_does_what_it_does_on_disk(
    tmp_path: Path, prefect_server: dict[str, str], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    done = []
    for store in ("s3://runs/swept", tmp_path):
        uri = last_json(npo(*run_arguments("testbed-grpo", store, "demo"), "--json", env=prefect_server))["run"]
        run = open_run(uri)
        assert not [found for found in run.store.walk("") if found.key.startswith(layout.LEASES)]
        would = last_json(npo("gc", uri, "--dry-run", "--json", "--keep-last", 1, "--grace-hours", 0))
        did = last_json(npo("gc", uri, "--json", "--keep-last", 1, "--grace-hours", 0))
        assert would == did | {"dry_run": True}
        gone = {removal["key"] for removal in did["removed"]}
        assert gone
        assert not gone & {found.key for found in run.store.walk("")}
        assert npo("verify", uri).returncode == 0
        done.append({part: did[part] for part in ("removed", "kept", "unknown")})
    assert done[0] == done[1]
    assert done[0]["unknown"] == []
