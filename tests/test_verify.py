"""`verify_run` names every kind of damage, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from npo_core import parquet
from npo_core.artifacts import RunArtifacts, open_run
from npo_core.findings import Fault
from npo_core.interfaces import NearFutureError, Prompt, Verdict
from npo_core.legs import segment_digest
from npo_core.verify import verify_run
from schemas import layout
from schemas.digest import canonical_json, digest_bytes
from schemas.records import LegKind, LegRecord, Manifest, Record, SegmentManifest
from tests.synthetic import SyntheticVerifier, build_run, decode, encode


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run of eight steps, to be copied and damaged."""
    store = tmp_path_factory.mktemp("original")
    build_run(store, steps=8, segment_steps=2)
    return store


class Damaged:
    """A copy of the run, and the means to damage it as somebody with an editor could."""

    def __init__(self, store: Path) -> None:
        self.run: RunArtifacts = open_run(str(store / "synthetic"))
        self.folder = store / "synthetic"

    def leg(self, kind: LegKind) -> LegRecord:
        return [leg for leg in self.run.legs() if leg.kind == kind][-1]

    def segment(self, kind: LegKind = "replay") -> SegmentManifest:
        return self.run.segments(self.leg(kind).leg_id)[0]

    def folder_of(self, segment: SegmentManifest) -> str:
        return layout.segment(segment.leg_id, segment.start, segment.stop)

    def data(self, manifest: Manifest, role: str) -> Path:
        return self.folder / manifest.file(role).key

    def write(self, key: str, record: Record) -> str:
        """Replaces a record, by hand."""
        (self.folder / key).write_bytes(canonical_json(record.model_dump(mode="json")))
        return key

    def forge(self, folder: str, manifest: Manifest, role: str, table: pa.Table, **fields: Any) -> str:
        """Replaces a table, and all that the manifest says of its bytes; returns the table's key."""
        data = parquet.encode(table, parquet.SCHEMAS[role])
        entry = manifest.file(role)
        new = entry.model_copy(
            update={
                "key": layout.data_file(folder, f"{role}.parquet", digest_bytes(data)),
                "bytes": len(data),
                "sha256": digest_bytes(data),
                "rows": table.num_rows,
                "footer_sha256": parquet.footer_digest(data),
            }
        )
        (self.folder / new.key).write_bytes(data)
        files = tuple(new if file == entry else file for file in manifest.files)
        if isinstance(manifest, SegmentManifest):
            after = self.run.require_checkpoint(manifest.leg_id, manifest.stop)
            assert after.segment is not None
            rows = after.segment.model_copy(update={"files": files})
            self.write(
                layout.manifest(layout.checkpoint(after.leg_id, after.step)),
                after.model_copy(update={"segment": rows}),
            )
        self.write(layout.manifest(folder), manifest.model_copy(update={"files": files, **fields}))
        return new.key

    def faults(self) -> list[Fault]:
        return verify_run(self.run, SyntheticVerifier(), decode)


@pytest.fixture
def damaged(original: Path, tmp_path: Path) -> Damaged:
    shutil.copytree(original, tmp_path / "runs")
    return Damaged(tmp_path / "runs")


def edit(table: pa.Table, column: str, change: Callable[[list[Any]], list[Any]]) -> pa.Table:
    """The table with other values in one column."""
    field = table.schema.field(column)
    values = pa.array(change(table[column].to_pylist()), field.type)
    return table.set_column(table.schema.get_field_index(column), field, values)


def test_an_undamaged_run_has_no_faults(damaged: Damaged) -> None:
    seen: list[str] = []
    assert verify_run(damaged.run, SyntheticVerifier(), decode, seen.append) == []
    manifests = {path.parent.relative_to(damaged.folder).as_posix() for path in damaged.folder.rglob("manifest.json")}
    assert set(seen) == manifests - {layout.MODEL}, "something was not looked at"


def only(faults: list[Fault], key: str, problem: str) -> None:
    """There is one fault, of this file, and it says what is wrong and what to do."""
    assert [fault.key for fault in faults] == [key], faults
    assert problem in faults[0].problem
    assert "restore it from a copy" in faults[0].remedy


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


# ---- lineage


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
