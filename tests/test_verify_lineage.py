"""`npo verify` finds what is missing or misplaced in the tree of legs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from npo_core.artifacts import open_run
from npo_core.findings import Fault
from npo_core.interfaces import NearFutureError
from npo_core.verify import verify_run
from schemas import layout
from schemas.records import Record
from tests.copies import copied
from tests.damage import Damaged, only
from tests.synthetic import SyntheticVerifier, decode


@pytest.fixture
def damaged(eight_steps: Path, tmp_path: Path) -> Damaged:
    copied(eight_steps, tmp_path)
    return Damaged(tmp_path / "runs")


def test_a_missing_leg_record(damaged: Damaged) -> None:
    leg = damaged.leg("replay")
    (damaged.folder / layout.leg(leg.leg_id)).unlink()
    found = {fault.key: fault.problem for fault in damaged.faults()}
    assert found[layout.leg(leg.leg_id)] == "is missing"
    assert f"leg {leg.leg_id} of the main line is missing" in found[layout.HEAD]


def test_an_edited_leg_record(damaged: Damaged) -> None:
    leg = damaged.leg("replay")
    key = damaged.write(layout.leg(leg.leg_id), leg.model_copy(update={"start": 0}))
    problems = {fault.problem for fault in damaged.faults() if fault.key == key}
    assert any("was altered" in problem for problem in problems)
    assert "starts at step 0, its parent is of step 2" in problems


def test_a_leg_of_another_recipe(damaged: Damaged) -> None:
    record = damaged.run.record()
    damaged.write(layout.RUN, record.model_copy(update={"recipe_digest": "0" * 64}))
    keys = {fault.key for fault in damaged.faults() if "another recipe" in fault.problem}
    assert keys == {layout.leg(leg.leg_id) for leg in damaged.run.legs()}


def test_a_missing_parent_checkpoint(damaged: Damaged) -> None:
    parent = damaged.leg("replay").parent
    assert parent is not None
    shutil.rmtree(damaged.folder / layout.checkpoint(parent.leg_id, parent.step))
    faults = damaged.faults()
    keys = {fault.key for fault in faults}
    assert layout.leg(damaged.leg("replay").leg_id) in keys
    assert all(f"(leg {parent.leg_id}, step 2) is missing" in fault.problem for fault in faults)


def test_a_checkpoint_that_was_replaced(damaged: Damaged) -> None:
    parent = damaged.leg("replay").parent
    assert parent is not None
    other = damaged.run.require_checkpoint(damaged.leg("scout").leg_id, 4)
    key = layout.manifest(layout.checkpoint(parent.leg_id, parent.step))
    damaged.write(key, other.model_copy(update={"leg_id": parent.leg_id, "step": parent.step}))
    problems = {fault.key: fault.problem for fault in damaged.faults()}
    assert "is another checkpoint now" in problems[layout.leg(damaged.leg("replay").leg_id)]


def test_a_checkpoint_whose_digest_was_edited(damaged: Damaged) -> None:
    manifest = damaged.run.checkpoints(damaged.leg("scout").leg_id)[0]
    key = layout.manifest(layout.checkpoint(manifest.leg_id, manifest.step))
    damaged.write(key, manifest.model_copy(update={"weights_digest": "0" * 64}))
    only(damaged.faults(), key, "its digests are not those of its files")


def test_a_missing_guide(damaged: Damaged) -> None:
    leg = damaged.leg("replay")
    shutil.rmtree(damaged.folder / layout.guide(leg.guide_id or ""))
    found = {fault.key: fault.problem for fault in damaged.faults()}
    assert f"its guide {leg.guide_id} is missing" in found[layout.leg(leg.leg_id)]


def test_a_missing_segment(damaged: Damaged) -> None:
    segment = damaged.segment("replay")
    folder = damaged.folder_of(segment)
    shutil.rmtree(damaged.folder / folder)
    (fault,) = damaged.faults()
    assert fault == Fault(layout.manifest(folder), "steps 2-4 are missing", "restore them from a copy, or run again")


def test_a_main_line_that_ends_before_its_next_leg(damaged: Damaged) -> None:
    leg = damaged.leg("replay")
    shutil.rmtree(damaged.folder / layout.segment(leg.leg_id, 4, 6))
    only(damaged.faults(), layout.segments(leg.leg_id), "no segment ends at step 6, where the main line leaves the leg")


def test_steps_that_are_committed_twice(damaged: Damaged) -> None:
    segment = damaged.segment("scout")
    wide = layout.segment(segment.leg_id, 2, 6)
    (damaged.folder / wide).mkdir()
    damaged.write(layout.manifest(wide), segment.model_copy(update={"stop": 6}))
    problems = {fault.problem for fault in damaged.faults()}
    assert {"steps 2-4 are committed twice", "steps 4-6 are committed twice"} <= problems


def test_a_segment_that_says_it_is_another(damaged: Damaged) -> None:
    segment = damaged.segment("scout")
    key = damaged.write(
        layout.manifest(damaged.folder_of(segment)), damaged.segment("replay").model_copy(update={"nonce": "x"})
    )
    problems = [fault.problem for fault in damaged.faults() if fault.key == key]
    assert any("it is of another leg or of other steps" in problem for problem in problems)


@pytest.mark.parametrize("key", [layout.HEAD, "decisions"])
def test_a_reference_to_a_leg_that_is_not_there(damaged: Damaged, key: str) -> None:
    record: Record | None = damaged.run.head()
    if key == "decisions":
        record = damaged.run.decisions()[0]
        key = layout.decision("nowhere", 2, None)
    assert record is not None
    damaged.write(key, record.model_copy(update={"leg_id": "nowhere"}))
    (fault,) = damaged.faults()
    assert fault.key == key
    assert "nowhere" in fault.problem


def test_a_missing_head(damaged: Damaged) -> None:
    (damaged.folder / layout.HEAD).unlink()
    only(damaged.faults(), layout.HEAD, "is missing")


def test_no_run_is_no_list_of_faults(tmp_path: Path) -> None:
    with pytest.raises(NearFutureError, match="there is no run 'nothing'"):
        verify_run(open_run(str(tmp_path / "nothing")), SyntheticVerifier(), decode)
