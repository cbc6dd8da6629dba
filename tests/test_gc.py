"""`npo gc` removes what nothing needs, all of it, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from npo_core import views
from npo_core.artifacts import RunArtifacts, main_line_checkpoint, main_line_checkpoints, open_run
from npo_core.export import export_checkpoint
from npo_core.gc import Plan, carry_out, plan_gc
from npo_core.interfaces import NearFutureError
from npo_core.report import write_report
from npo_core.store import StoreError
from npo_core.tombstones import BIG
from npo_core.verify import verify_run
from schemas import layout
from schemas.config import Config
from schemas.digest import canonical_json
from schemas.records import CheckpointRef, Lease, Tombstone
from tests.command import ROOT, autonpo_arguments, fingerprint, last_json, npo, run_arguments
from tests.s3_server import S3Server
from tests.synthetic import SyntheticVerifier, build_run, decode

OLD = timedelta(hours=30)
HASH = "0123456789abcdef"
STRANGER = "a" * 32


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run of sixteen steps in segments of two, to be copied and swept."""
    store = tmp_path_factory.mktemp("original")
    build_run(store, steps=16, segment_steps=2)
    return store


@pytest.fixture
def run(original: Path, tmp_path: Path) -> RunArtifacts:
    shutil.copytree(original, tmp_path / "runs")
    return open_run(str(tmp_path / "runs" / "synthetic"))


@pytest.fixture
def folder(run: RunArtifacts, tmp_path: Path) -> Path:
    return tmp_path / "runs" / "synthetic"


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


# ---- checkpoints


def test_a_dry_run_changes_nothing_and_says_what_the_real_one_removes(run: RunArtifacts, folder: Path) -> None:
    leave(folder, "reports/.report.html.0123456789abcdef.tmp")
    before = files(folder)
    plan = plan_gc(run, config_of(run))
    assert files(folder) == before
    done = sweep(run)
    assert asdict(done) == asdict(plan)
    after = files(folder)
    assert set(before) - set(after) == {removal.key for removal in plan.removed} != set()
    assert sum(before.values()) - sum(after.values()) == plan.freed_bytes
    assert plan_gc(run, config_of(run)).removed == ()


def test_big_files_go_and_all_that_says_what_happened_stays(run: RunArtifacts, folder: Path) -> None:
    before = set(files(folder))
    plan = sweep(run, keep_last=1)
    roles = {entry.key: entry.role for c in plan.checkpoints for entry in c.files}
    assert {roles[key] for key in before - set(files(folder))} == set(BIG)
    assert all(run.checkpoint(c.leg_id, c.step) == c for c in plan.checkpoints)
    (tombstone,) = run.tombstones()
    assert tombstone.reason == "keep_last 1, keep_every 0"
    assert set(tombstone.files) == {removal.key for removal in plan.removed} == run.removed()


def test_a_swept_run_is_whole_and_can_be_read_and_exported(run: RunArtifacts, tmp_path: Path) -> None:
    metrics, shown, html = views.metrics(run), views.show(run), write_report(run, str)
    sweep(run, keep_last=1)
    again = open_run(run.uri)
    assert faults(again) == []
    assert views.metrics(again).equals(metrics)
    assert views.show(again) == shown
    assert len(last_json(npo("inspect", run.uri, "--step", 8, "--limit", 5, "--json"))["rows"]) == 5
    assert len(write_report(again, str)) == len(html)
    path, _ = export_checkpoint(again, main_line_checkpoint(again), tmp_path / "model")
    assert (path / "model.safetensors").exists()


def test_who_asks_for_a_removed_checkpoint_is_told_when_it_went_and_what_is_there(
    run: RunArtifacts, tmp_path: Path
) -> None:
    ref = main_line_checkpoint(run, 8)
    sweep(run)
    assert 8 not in main_line_checkpoints(run)
    (tombstone,) = run.tombstones()
    for ask in (lambda: main_line_checkpoint(run, 8), lambda: run.checkout(ref, tmp_path / "out")):
        with pytest.raises(NearFutureError) as told:
            ask()
        message = str(told.value)
        assert f"leg {tip_leg(run)} of {run.uri} at step 8 was removed by `npo gc`" in message
        assert f"on {tombstone.created_at[:16].replace('T', ' ')} UTC" in message
        assert "(10, 14, 16)" in message
        assert "set retention.keep_every" in message
    with pytest.raises(NearFutureError, match="has no checkpoint at step 9; its steps: 0, 2, 4, 6, 10, 14, 16"):
        main_line_checkpoint(run, 9)


def test_a_gc_killed_between_tombstone_and_files_is_finished_by_the_next(
    run: RunArtifacts, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {removal.key for removal in plan_gc(run, config_of(run)).removed}
    left = iter(range(2))

    def remove(key: str, really: Callable[[str], None] = run.store.remove) -> None:
        next(left)
        really(key)

    with monkeypatch.context() as killed:
        killed.setattr(run.store, "remove", remove)
        with pytest.raises(StopIteration):
            sweep(run)
    half = wanted & set(files(folder))
    assert len(half) == len(wanted) - 2
    assert faults(run) == []
    assert 8 not in main_line_checkpoints(run)  # from here on, whether or not its files are there
    plan = sweep(run)
    assert {removal.key for removal in plan.removed} == half
    assert not wanted & set(files(folder))
    assert len(run.tombstones()) == 1


def test_a_leg_whose_last_segment_was_lost_is_gone_on_with_from_where_it_was(tmp_path: Path) -> None:
    run = build_run(tmp_path, steps=8, with_replay=False, segment_steps=2)
    leg = tip_leg(run)
    # As a kill between checkpoint and segment leaves it.
    (tmp_path / "synthetic" / layout.manifest(layout.segment(leg, 6, 8))).unlink()
    plan = sweep(run, keep_last=1)
    kept = {kept.step: kept.why for kept in plan.kept if kept.leg_id == leg}
    assert kept[8] == "its segment is not committed"
    assert kept[6] == "the tip of the main line"


# ---- debris

DEBRIS = (
    f"model/tokenizer-{HASH}.json",
    f"guides/0123456789ab/trajectories-{HASH}.parquet",
    f"evals/0123456789ab/samples-{HASH}.parquet",
    f"signals/0123456789ab/signal-{HASH}.parquet",
    f".head.json.{HASH}.tmp",
    f"decisions/.0123456789ab-000010.json.{HASH}.tmp",
    f"leases/.{STRANGER}.json.lock",
    f"tombstones/.20260101T000000-{STRANGER}.json.{HASH}.tmp",
)


def in_leg(run: RunArtifacts) -> tuple[str, ...]:
    """What killed attempts leave in a leg: in folders with a manifest, and in those that never got one."""
    leg = tip_leg(run)
    return (
        f"{layout.segment(leg, 14, 16)}/rollouts-{HASH}.parquet",
        f"{layout.segment(leg, 16, 18)}/metrics-{HASH}.parquet",
        f"{layout.segment(leg, 16, 18)}/.metrics-{HASH}.parquet.{HASH}.tmp",
        f"{layout.checkpoint(leg, 16)}/model-00001-of-00002-{HASH}.safetensors",
        f"{layout.checkpoint(leg, 18)}/state-{HASH}.json",
        f"legs/{leg}/.leg.json.{HASH}.tmp",
    )


def test_debris_goes_when_it_is_old_enough(run: RunArtifacts, folder: Path) -> None:
    before = files(folder)
    old = {leave(folder, key) for key in (*DEBRIS, *in_leg(run))}
    young = {leave(folder, f"{layout.guide('0123456789ab')}/trajectories-{n}{HASH[1:]}.parquet", OLD / 2) for n in "12"}
    plan = sweep(run, keep_last=16)
    assert {removal.key for removal in plan.removed} == old
    assert set(files(folder)) == set(before) | young
    assert plan.unknown == ()
    assert {removal.key for removal in sweep(run, keep_last=16, grace_hours=14).removed} == young
    assert files(folder) == before


def test_the_newest_report_stays(run: RunArtifacts, folder: Path) -> None:
    older = [leave(folder, f"reports/report-{n}{HASH[1:]}.html", OLD * n) for n in (2, 3)]
    newest = leave(folder, f"reports/report-{HASH}.html")
    assert {removal.key for removal in sweep(run, keep_last=16).removed} == set(older)
    assert (folder / newest).exists()


def test_a_file_that_is_not_ours_is_named_and_stays(run: RunArtifacts, folder: Path) -> None:
    leg = tip_leg(run)
    keys = (
        "notes.txt",
        "leases/readme",
        f"legs/{leg}/checkpoints/000008/backup.safetensors",
        f"copies/{leg}/checkpoints/000008/model-{HASH}.safetensors",
        f"model-{HASH}.safetensors",
        "reports/report.html",
        "guides/manifest.json",
    )
    for key in keys:
        leave(folder, key)
    plan = sweep(run, keep_last=16)
    assert set(plan.unknown) == set(keys)
    assert plan.removed == ()
    assert all((folder / key).exists() for key in keys)


def test_beside_a_live_writer_nothing_goes_that_it_may_be_about_to_commit(run: RunArtifacts, folder: Path) -> None:
    lease(run, acquired=timedelta(hours=1), renewed=timedelta(seconds=10))
    leg = tip_leg(run)
    begun = leave(folder, f"{layout.segment(leg, 14, 16)}/rollouts-{HASH}.parquet", timedelta(hours=1, minutes=4))
    before = leave(folder, f"{layout.segment(leg, 12, 14)}/rollouts-{HASH}.parquet", timedelta(hours=1, minutes=6))
    # The writer may come by these steps, write the same file again under the same name, and commit it.
    open_still = leave(folder, f"{layout.segment(leg, 16, 18)}/rollouts-{HASH}.parquet")
    temporary = leave(folder, f"{layout.segment(leg, 16, 18)}/.rollouts-{HASH}.parquet.{HASH}.tmp")
    plan = sweep(run, keep_last=16, grace_hours=0)
    assert {removal.key for removal in plan.removed} == {before, temporary}
    run.store.remove(layout.lease(STRANGER))
    plan = sweep(run, keep_last=16, grace_hours=0)
    assert {removal.key for removal in plan.removed} == {begun, open_still}


def test_an_expired_lease_protects_nothing_and_is_debris_itself(run: RunArtifacts, folder: Path) -> None:
    lease(run, acquired=timedelta(hours=40), renewed=timedelta(minutes=6))
    record = layout.lease(STRANGER)
    leave(folder, record, timedelta(minutes=6), (folder / record).read_text())
    left = leave(folder, f"{layout.segment(tip_leg(run), 16, 18)}/rollouts-{HASH}.parquet", timedelta(minutes=6))
    assert sweep(run, keep_last=16).removed == ()
    plan = sweep(run, keep_last=16, grace_hours=0)
    assert {removal.key for removal in plan.removed} == {left, record}


def test_what_was_written_a_moment_ago_stays_though_there_is_no_lease(run: RunArtifacts, folder: Path) -> None:
    # A process that begins a run, or writes a report, holds none.
    leave(folder, f".prompts.parquet.{HASH}.tmp", timedelta(minutes=4))
    assert sweep(run, keep_last=16, grace_hours=0).removed == ()


def test_what_was_committed_since_the_plan_was_made_stays(run: RunArtifacts, folder: Path) -> None:
    evaluation = run.evaluations()[0]
    manifest = folder / layout.manifest(layout.evaluation(evaluation.eval_id))
    data, written = manifest.read_bytes(), {entry.key for entry in evaluation.files}
    for key in written:
        leave(folder, key)
    manifest.unlink()
    config = config_of(run, keep_last=16)
    plan = plan_gc(run, config)
    assert written <= {removal.key for removal in plan.removed}
    manifest.write_bytes(data)
    assert carry_out(run, plan, config.retention).removed == ()
    manifest.unlink()
    lease(run, acquired=timedelta(0), renewed=timedelta(0))
    assert carry_out(run, plan, config.retention).removed == ()
    assert written <= set(files(folder))


# ---- damage


@pytest.mark.parametrize("kind", ["leg.json", "segment", "checkpoint", "guide", "eval", "head.json", "model", "lease"])
def test_nothing_goes_from_a_run_with_a_damaged_record(run: RunArtifacts, folder: Path, kind: str) -> None:
    leg = tip_leg(run)
    key = {
        "leg.json": layout.leg(leg),
        "segment": layout.manifest(layout.segment(leg, 8, 10)),
        "checkpoint": layout.manifest(layout.checkpoint(leg, 8)),
        "guide": layout.manifest(layout.guide(run.guides()[0].guide_id)),
        "eval": layout.manifest(layout.evaluation(run.evaluations()[0].eval_id)),
        "head.json": layout.HEAD,
        "model": layout.manifest(layout.MODEL),
        "lease": layout.lease(STRANGER),
    }[kind]
    leave(folder, key, text='{"kind": "segm')
    before = files(folder)
    with pytest.raises(NearFutureError, match="nothing is removed from") as told:
        sweep(run, grace_hours=0)
    assert key in str(told.value)
    assert files(folder) == before


@pytest.mark.parametrize("kind", ["leg.json", "segment", "checkpoint", "guide", "head.json", "model"])
def test_nothing_goes_from_a_run_that_lacks_a_record(run: RunArtifacts, folder: Path, kind: str) -> None:
    leg = tip_leg(run)
    key = {
        "leg.json": layout.leg(leg),
        "segment": layout.manifest(layout.segment(leg, 8, 10)),
        "checkpoint": layout.manifest(layout.checkpoint(leg, 8)),
        "guide": layout.manifest(layout.guide(run.guides()[0].guide_id)),
        "head.json": layout.HEAD,
        "model": layout.manifest(layout.MODEL),
    }[kind]
    (folder / key).unlink()
    before = files(folder)
    with pytest.raises(NearFutureError, match="nothing is removed from"):
        sweep(run, grace_hours=0)
    assert files(folder) == before


def bury(run: RunArtifacts, checkpoint: CheckpointRef, keys: tuple[str, ...]) -> str:
    """A tombstone that gc would not have written."""
    tombstone = Tombstone(
        checkpoints=(checkpoint,), files=keys, reason="r", created_at="2026-01-01T00:00:00+00:00", nonce=STRANGER
    )
    key = layout.tombstone(tombstone.created_at, tombstone.nonce)
    run.store.create(key, tombstone)
    return key


def test_verify_knows_a_removal_from_a_loss(run: RunArtifacts, folder: Path) -> None:
    sweep(run)
    kept = main_line_checkpoint(run, 10)
    lost = run.require_checkpoint(kept.leg_id, 10).file("weights").key
    (folder / lost).unlink()
    assert [fault.key for fault in faults(run)] == [lost]


def test_verify_refuses_tombstones_that_gc_does_not_write(run: RunArtifacts, folder: Path) -> None:
    tip = main_line_checkpoint(run)
    manifest = run.require_checkpoint(tip.leg_id, tip.step)
    key = bury(run, tip, (manifest.file("weights").key,))
    (fault,) = faults(run)
    assert (fault.key, "from which the main line goes on" in fault.problem) == (key, True)
    with pytest.raises(NearFutureError, match="name the tip of the main line"):
        sweep(open_run(run.uri))
    (folder / key).unlink()
    bury(run, tip.model_copy(update={"step": 99}), (layout.PROMPTS,))
    found = {fault.problem for fault in faults(run)}
    assert any("(leg " in problem and "step 99) that is missing" in problem for problem in found)
    assert any(problem.startswith("names prompts.parquet, which is no weights") for problem in found)
    (folder / key).write_bytes(canonical_json({"no": "tombstone"}))
    assert key in {fault.key for fault in faults(run)}


def test_a_store_that_cannot_remove_says_so(run: RunArtifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    def remove(key: str) -> None:
        raise StoreError(f"{key}: permission denied; give this user the permission and run again")

    monkeypatch.setattr(run.store, "remove", remove)
    with pytest.raises(StoreError, match="permission denied"):
        sweep(run)


# ---- the command


def test_the_command_says_what_went_what_stays_and_why(run: RunArtifacts, folder: Path) -> None:
    leave(folder, "notes.txt")
    would = last_json(npo("gc", run.uri, "--dry-run", "--json", "--keep-last", 1))
    did = last_json(npo("gc", run.uri, "--json", "--keep-last", 1))
    assert would == did | {"dry_run": True}
    assert did["unknown"] == ["notes.txt"]
    assert did["freed_bytes"] == sum(removal["bytes"] for removal in did["removed"]) > 0
    assert {"leg_id": tip_leg(run), "step": 16, "why": "the tip of the main line"} in did["kept"]
    told = npo("gc", run.uri, "--grace-hours", 0)
    assert told.returncode == 0, told.stderr
    for part in ("0 B freed", "Checkpoints that stay", "the starting policy", "left alone: notes.txt"):
        assert part in told.stdout
    assert npo("gc", run.uri, "--keep-last", 0).returncode == 2
    refused = npo("gc", run.uri, "--grace-hours", "inf")
    assert (refused.returncode, "retention.grace_hours" in refused.stderr) == (2, True)


# ---- real runs

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
def test_autonpo_rolls_back_the_same_way_after_a_gc(tmp_path: Path, prefect_server: dict[str, str]) -> None:
    calm = last_json(npo(*autonpo_arguments(tmp_path / "calm", "demo"), "--json", env=prefect_server))
    # It ends where the monitor warns: what it would roll back to must outlive the gc.
    short = autonpo_arguments(tmp_path / "swept", "demo", run__total_steps=8)
    uri = last_json(npo(*short, "--json", env=prefect_server))["run"]
    for total in (8, 10, 16):
        last_json(npo("gc", uri, "--json", "--keep-last", 1, "--grace-hours", 0))
        arguments = autonpo_arguments(tmp_path / "swept", "demo", run__total_steps=total)
        last_json(npo(*arguments, "--json", env=prefect_server))
    assert open_run(uri).tombstones()
    found, wanted = fingerprint(open_run(uri)), fingerprint(open_run(calm["run"]))
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
def test_gc_in_a_loop_beside_a_run_that_writes_harms_nothing(tmp_path: Path, prefect_server: dict[str, str]) -> None:
    calm = last_json(npo(*autonpo_arguments(tmp_path / "calm", "demo"), "--json", env=prefect_server))
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
    assert {why for sweep in swept for why in sweep} == {"checkpoint that nothing needs"}
    assert run.tombstones()
    found, wanted = fingerprint(run), fingerprint(open_run(calm["run"]))
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
