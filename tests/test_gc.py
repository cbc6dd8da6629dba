"""`npo gc` removes the checkpoints that nothing needs, all of them, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from npo_core import views
from npo_core.artifacts import RunArtifacts, main_line_checkpoint, main_line_checkpoints, open_run
from npo_core.export import export_checkpoint
from npo_core.gc import plan_gc
from npo_core.interfaces import NearFutureError
from npo_core.report import write_report
from npo_core.store import StoreError
from npo_core.tombstones import BIG, removed_keys
from schemas import layout
from schemas.digest import canonical_json
from schemas.records import CheckpointRef, Tombstone
from tests.command import last_json, npo
from tests.copies import copied, folder_of
from tests.sweeping import STRANGER, config_of, faults, files, leave, sweep, tip_leg
from tests.synthetic import build_run


@pytest.fixture
def run(sixteen_steps: Path, tmp_path: Path) -> RunArtifacts:
    return copied(sixteen_steps, tmp_path)


@pytest.fixture
def folder(run: RunArtifacts) -> Path:
    return folder_of(run)


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
    assert {roles[key] for key in before - set(files(folder))} == set(BIG) - {"adapter"}
    assert all(run.checkpoint(c.leg_id, c.step) == c for c in plan.checkpoints)
    (tombstone,) = run.tombstones()
    assert tombstone.reason == "keep_last 1, keep_every 0"
    assert set(tombstone.files) == {removal.key for removal in plan.removed} == removed_keys(run.tombstones())


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


# ---- damage


def record_key(run: RunArtifacts, kind: str) -> str:
    """Key of one of the run's records."""
    leg = tip_leg(run)
    return {
        "leg.json": layout.leg(leg),
        "segment": layout.manifest(layout.segment(leg, 8, 10)),
        "checkpoint": layout.manifest(layout.checkpoint(leg, 8)),
        "guide": layout.manifest(layout.guide(run.guides()[0].guide_id)),
        "eval": layout.manifest(layout.evaluation(run.evaluations()[0].eval_id)),
        "head.json": layout.HEAD,
        "model": layout.manifest(layout.MODEL),
        "lease": layout.lease(STRANGER),
    }[kind]


@pytest.mark.parametrize("kind", ["leg.json", "segment", "checkpoint", "guide", "eval", "head.json", "model", "lease"])
def test_nothing_goes_from_a_run_with_a_damaged_record(run: RunArtifacts, folder: Path, kind: str) -> None:
    key = record_key(run, kind)
    leave(folder, key, text='{"kind": "segm')
    before = files(folder)
    with pytest.raises(NearFutureError, match="nothing is removed from") as told:
        sweep(run, grace_hours=0)
    assert key in str(told.value)
    assert files(folder) == before


@pytest.mark.parametrize("kind", ["leg.json", "segment", "checkpoint", "guide", "head.json", "model"])
def test_nothing_goes_from_a_run_that_lacks_a_record(run: RunArtifacts, folder: Path, kind: str) -> None:
    (folder / record_key(run, kind)).unlink()
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
