"""`npo verify` finds every altered byte, row and answer, and names a remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from npo_core import parquet
from npo_core.interfaces import NearFutureError, Prompt, Verdict
from npo_core.legs import segment_digest
from npo_core.verify import verify_run
from schemas import layout
from tests.copies import copied
from tests.damage import Damaged, edit, only
from tests.synthetic import SyntheticVerifier, decode, encode


@pytest.fixture
def damaged(eight_steps: Path, tmp_path: Path) -> Damaged:
    copied(eight_steps, tmp_path)
    return Damaged(tmp_path / "runs")


def test_an_undamaged_run_has_no_faults(damaged: Damaged) -> None:
    seen: list[str] = []
    assert verify_run(damaged.run, SyntheticVerifier(), decode, seen.append) == []
    manifests = {path.parent.relative_to(damaged.folder).as_posix() for path in damaged.folder.rglob("manifest.json")}
    assert set(seen) == manifests - {layout.MODEL}, "something was not looked at"


# ---- bytes


@pytest.mark.parametrize("role", ["rollouts", "metrics", "telemetry"])
def test_a_flipped_byte(damaged: Damaged, role: str) -> None:
    path = damaged.data(damaged.segment(), role)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    only(damaged.faults(), damaged.segment().file(role).key, "was altered")


def test_a_truncated_parquet_file(damaged: Damaged) -> None:
    path = damaged.data(damaged.segment(), "rollouts")
    path.write_bytes(path.read_bytes()[:-100])
    only(damaged.faults(), damaged.segment().file("rollouts").key, "its manifest says")


def test_a_missing_file(damaged: Damaged) -> None:
    damaged.data(damaged.segment(), "metrics").unlink()
    only(damaged.faults(), damaged.segment().file("metrics").key, "is missing")


def test_swapped_files(damaged: Damaged) -> None:
    one, other = damaged.segment("replay"), damaged.segment("scout")
    first, second = damaged.data(one, "rollouts"), damaged.data(other, "rollouts")
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    assert {fault.key for fault in damaged.faults()} == {one.file("rollouts").key, other.file("rollouts").key}


@pytest.mark.parametrize("role", ["weights", "optimizer", "state"])
def test_a_damaged_checkpoint(damaged: Damaged, role: str) -> None:
    manifest = damaged.run.checkpoints(damaged.leg("scout").leg_id)[0]
    path = damaged.data(manifest, role)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    only(damaged.faults(), manifest.file(role).key, "was altered")


def test_a_damaged_model_file(damaged: Damaged) -> None:
    next((damaged.folder / "model").glob("tokenizer-*")).write_text("[]")
    (fault,) = damaged.faults()
    assert fault.key.startswith("model/tokenizer-")


def test_altered_prompts(damaged: Damaged) -> None:
    prompts = edit(damaged.run.prompts(), "answer", lambda answers: ["0", *answers[1:]])
    (damaged.folder / layout.PROMPTS).write_bytes(parquet.encode(prompts, parquet.SCHEMAS["prompts"]))
    only(damaged.faults(), layout.PROMPTS, "was altered")


def test_a_manifest_that_is_no_json(damaged: Damaged) -> None:
    key = layout.manifest(damaged.folder_of(damaged.segment("main")))
    (damaged.folder / key).write_text('{"kind": "segm')
    only(damaged.faults(), key, "is no SegmentManifest")


# ---- rows


def test_an_edited_parquet_file_with_the_right_schema(damaged: Damaged) -> None:
    segment = damaged.segment()
    table = edit(damaged.run.table(segment, "rollouts"), "reward", lambda rewards: [0.5, *rewards[1:]])
    path = damaged.data(segment, "rollouts")
    path.write_bytes(parquet.encode(table, parquet.SCHEMAS["rollouts"]))
    (fault,) = damaged.faults()
    assert fault.key == segment.file("rollouts").key


def test_an_edited_row_whose_file_hash_was_edited_too(damaged: Damaged) -> None:
    segment = damaged.segment()
    table = edit(damaged.run.table(segment, "rollouts"), "reward", lambda rewards: [0.5, *rewards[1:]])
    folder = damaged.folder_of(segment)
    damaged.forge(folder, segment, "rollouts", table)
    only(damaged.faults(), layout.manifest(folder), "its rows are not those that were committed")


def test_a_row_count_that_is_off_by_one(damaged: Damaged) -> None:
    segment = damaged.segment()
    entry = segment.file("telemetry")
    assert entry.rows is not None
    files = tuple(file.model_copy(update={"rows": entry.rows + 1}) if file == entry else file for file in segment.files)
    damaged.write(layout.manifest(damaged.folder_of(segment)), segment.model_copy(update={"files": files}))
    only(damaged.faults(), entry.key, "has 2 rows, its manifest says 3")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), "1 rows are there twice"),
        (lambda table: table.filter(pa.compute.equal(table["step"], 2)), "has not the segment's steps"),
        (lambda table: edit(table, "verifier", lambda v: ["other/1", *v[1:]]), "verifier is other/1, synthetic/1"),
        (lambda table: edit(table, "leg_id", lambda v: ["other", *v[1:]]), "other"),
        (
            lambda table: edit(table, "completion_ids", lambda v: [[ord("0")]] * len(v)),
            "is not the guide's answer",
        ),
    ],
)
def test_rows_that_cannot_be_though_every_digest_is_right(
    damaged: Damaged, change: Callable[[pa.Table], pa.Table], problem: str
) -> None:
    segment = damaged.segment()
    table = change(damaged.run.table(segment, "rollouts"))
    digest = segment_digest(table, damaged.run.table(segment, "metrics"))
    key = damaged.forge(damaged.folder_of(segment), segment, "rollouts", table, logical_digest=digest)
    faults = damaged.faults()
    assert {fault.key for fault in faults} == {key}
    assert any(problem in fault.problem for fault in faults), faults


def test_metrics_of_a_step_too_few(damaged: Damaged) -> None:
    segment = damaged.segment()
    table = damaged.run.table(segment, "metrics").slice(1)
    digest = segment_digest(damaged.run.table(segment, "rollouts"), table)
    key = damaged.forge(damaged.folder_of(segment), segment, "metrics", table, logical_digest=digest)
    only(damaged.faults(), key, "its steps are not those of the segment")


def test_a_guide_answer_that_no_longer_verifies(damaged: Damaged) -> None:
    (guide,) = damaged.run.guides()
    table = damaged.run.table(guide, "trajectories")
    replayed = _replayed(damaged)
    place = next(i for i, prompt in enumerate(table["prompt_id"].to_pylist()) if prompt not in replayed)
    wrong = edit(table, "completion_ids", lambda v: [*v[:place], encode("9#").tolist(), *v[place + 1 :]])
    key = damaged.forge(layout.guide(guide.guide_id), guide, "trajectories", wrong)
    only(damaged.faults(), key, f"the answer to prompt {table['prompt_id'][place]} is not verified-correct")


def _replayed(damaged: Damaged) -> set[str]:
    """Prompts whose guide answer was mixed in."""
    segments = damaged.run.segments(damaged.leg("replay").leg_id)
    tables = [damaged.run.table(segment, "rollouts") for segment in segments]
    rows = [row for table in tables for row in table.select(["source", "prompt_id"]).to_pylist()]
    return {row["prompt_id"] for row in rows if row["source"] == "guide"}


def test_a_truncated_guide_answer_and_one_from_outside_the_window(damaged: Damaged) -> None:
    (guide,) = damaged.run.guides()
    table = damaged.run.table(guide, "trajectories")
    table = edit(table, "finish_reason", lambda v: ["length", *v[1:]])
    answered = table["prompt_id"][0].as_py()
    damaged.forge(layout.guide(guide.guide_id), guide, "trajectories", table)
    (guide,) = damaged.run.guides()
    window = damaged.run.table(guide, "window")
    window = window.filter(pc.not_equal(window["prompt_id"], answered))
    damaged.forge(layout.guide(guide.guide_id), guide, "window", window)
    problems = " ".join(fault.problem for fault in damaged.faults())
    assert "is truncated" in problems
    assert "is none of its window" in problems
    assert "was altered: it is of a guide" in problems


def test_a_guide_with_more_answers_than_it_keeps_or_fewer_prompts_than_it_says(damaged: Damaged) -> None:
    (guide,) = damaged.run.guides()
    table = damaged.run.table(guide, "trajectories")
    again = edit(table.slice(0, 1), "slot", lambda v: [v[0] + 1])
    key = damaged.forge(
        layout.guide(guide.guide_id),
        guide,
        "trajectories",
        pa.concat_tables([table, again]),
        solved=guide.solved + 1,
    )
    faults = damaged.faults()
    assert {fault.key for fault in faults} == {key}
    assert [fault.problem for fault in faults] == [
        "has 2 answers to a prompt, not 1",
        f"answers {guide.solved} prompts, not {guide.solved + 1}",
    ]


def test_a_verifier_that_changed_its_mind(damaged: Damaged) -> None:
    class Strict(SyntheticVerifier):
        def verify(self, prompt: Prompt, text: str) -> Verdict:
            return Verdict(0.0, False, "never")

    (guide,) = damaged.run.guides()
    faults = verify_run(damaged.run, Strict(), decode)
    assert len(faults) == guide.solved
    assert {fault.key for fault in faults} == {guide.file("trajectories").key}


def test_answers_that_cannot_be_decoded_are_one_fault(damaged: Damaged) -> None:
    def broken(ids: list[int]) -> str:
        raise NearFutureError("the tokenizer is damaged; restore it from a copy")

    (guide,) = damaged.run.guides()
    faults = verify_run(damaged.run, SyntheticVerifier(), broken)
    only(faults, guide.file("trajectories").key, "the tokenizer is damaged")


def test_another_version_of_the_verifier(damaged: Damaged) -> None:
    class Newer(SyntheticVerifier):
        name = "synthetic/2"

    (fault,) = verify_run(damaged.run, Newer(), decode)
    assert fault.key == layout.RUN
    assert "verifier is synthetic/1, this installation has synthetic/2" in fault.problem
    assert "verify with the version that began the run" in fault.remedy


def test_scores_that_are_not_those_of_the_samples(damaged: Damaged) -> None:
    evaluation = damaged.run.evaluations()[0]
    key = layout.manifest(layout.evaluation(evaluation.eval_id))
    damaged.write(key, evaluation.model_copy(update={"accuracy": 0.99}))
    only(damaged.faults(), key, "its scores are not those of its samples")


def test_rows_that_are_not_those_which_led_to_the_checkpoint(damaged: Damaged) -> None:
    segment = damaged.segment()
    after = damaged.run.require_checkpoint(segment.leg_id, segment.stop)
    assert after.segment is not None
    before = damaged.run.segments(segment.leg_id)[1]
    rows = after.segment.model_copy(update={"files": before.files})
    damaged.write(
        layout.manifest(layout.checkpoint(after.leg_id, after.step)), after.model_copy(update={"segment": rows})
    )
    key = layout.manifest(damaged.folder_of(segment))
    only(damaged.faults(), key, "its rows are not those that led to its checkpoint")


def test_a_footer_that_the_manifest_does_not_name(damaged: Damaged) -> None:
    segment = damaged.segment()
    entry = segment.file("rollouts")
    files = tuple(f.model_copy(update={"footer_sha256": "0" * 64}) if f == entry else f for f in segment.files)
    damaged.write(layout.manifest(damaged.folder_of(segment)), segment.model_copy(update={"files": files}))
    only(damaged.faults(), entry.key, "its footer is not the one")


def test_rows_under_other_bounds_than_those_behind_the_checkpoint_are_no_fault(damaged: Damaged) -> None:
    segment = damaged.segment()
    after = damaged.run.require_checkpoint(segment.leg_id, segment.stop)
    assert after.segment is not None
    rows = after.segment.model_copy(update={"start": segment.start - 1, "files": ()})
    damaged.write(
        layout.manifest(layout.checkpoint(after.leg_id, after.step)), after.model_copy(update={"segment": rows})
    )
    assert damaged.faults() == []


def test_a_window_that_is_missing_is_one_fault(damaged: Damaged) -> None:
    (guide,) = damaged.run.guides()
    damaged.data(guide, "window").unlink()
    only(damaged.faults(), guide.file("window").key, "is missing")
