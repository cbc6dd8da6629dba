"""What belongs to nothing goes when it is old enough, and not while a writer may still commit it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from npo_core.artifacts import RunArtifacts
from npo_core.gc import carry_out, plan_gc
from schemas import layout
from tests.copies import copied, folder_of
from tests.sweeping import HASH, OLD, STRANGER, config_of, files, lease, leave, sweep, tip_leg


@pytest.fixture
def run(sixteen_steps: Path, tmp_path: Path) -> RunArtifacts:
    return copied(sixteen_steps, tmp_path)


@pytest.fixture
def folder(run: RunArtifacts) -> Path:
    return folder_of(run)


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


def test_the_newest_report_stays_and_the_newest_picture_of_the_curves(run: RunArtifacts, folder: Path) -> None:
    older = [leave(folder, f"reports/report-{n}{HASH[1:]}.html", OLD * n) for n in (2, 3)]
    older.append(leave(folder, f"reports/curves-2{HASH[1:]}.png", OLD * 2))
    newest = leave(folder, f"reports/report-{HASH}.html", OLD * 1.5)
    leave(folder, f"reports/curves-{HASH}.png")
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
