"""A run's artifacts: commits, adoption, the head, and kills at every point of a commit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from npo_core import parquet
from npo_core.artifacts import RunArtifacts, main_line_checkpoint, open_run, runs
from npo_core.interfaces import ConfigurationError, NearFutureError
from npo_core.store import StoreError, open_store
from npo_core.verify import verify_run
from schemas import layout
from schemas.records import Head, LegRecord, Manifest, SegmentManifest
from schemas.tables import TRAJECTORIES
from tests.copies import copied, folder_of, leg_of
from tests.made_up import ENVIRONMENT
from tests.synthetic import SyntheticVerifier, build_run, decode

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(eight_steps: Path, tmp_path: Path) -> RunArtifacts:
    """A run of a test's own."""
    return copied(eight_steps, tmp_path)


def commit_again(
    run: RunArtifacts, leg: LegRecord, segment: SegmentManifest, epoch: int | None, stop: int | None = None
) -> Manifest:
    """The segment's tables once more, under the given epoch or another stop."""
    rollouts, metrics, telemetry = (run.table(segment, role) for role in ("rollouts", "metrics", "telemetry"))
    checkpoint = run.require_checkpoint(leg.leg_id, segment.stop)
    stop = stop or segment.stop
    rows = run.put_rows(leg, segment.start, stop, rollouts, metrics, telemetry)
    return run.commit_segment(leg, rows, checkpoint, epoch, ENVIRONMENT)


# ---- commits


def test_what_is_committed_is_read_back(run: RunArtifacts) -> None:
    assert [leg.kind for leg in run.legs()] == ["warm", "main", "scout", "replay", "main"]
    replay = leg_of(run, "replay")
    segments = run.segments(replay.leg_id)
    assert [(s.start, s.stop) for s in segments] == [(2, 4), (4, 6)]
    rollouts = run.table(segments[0], "rollouts")
    own = rollouts.to_pylist()
    assert sum(len(row["completion_ids"]) for row in own if row["source"] == "policy") == segments[0].tokens_policy
    assert {row["source"] for row in own} == {"policy", "guide"}
    assert [(row["prompt_id"], row["step"], row["slot"]) for row in own] == sorted(
        (row["prompt_id"], row["step"], row["slot"]) for row in own
    )
    assert run.table(segments[0], "rollouts", ["step"], [("step", "=", 3)])["step"].unique().to_pylist() == [3]
    assert [manifest.step for manifest in run.checkpoints(replay.leg_id)] == [4, 6]
    assert len(run.guides()) == 1
    assert run.guide(run.guides()[0].guide_id) == run.guides()[0]
    assert [decision.intervene for decision in run.decisions()] == [True]
    assert run.head() == Head(leg_id=run.legs()[-1].leg_id, epoch=3)
    assert run.is_frozen()
    assert runs(open_store(run.uri.removesuffix("/synthetic"))) == ["synthetic"]


def test_a_second_commit_of_a_segment_adopts_the_first_one(run: RunArtifacts) -> None:
    leg, head = leg_of(run, "main"), run.head()
    assert head is not None
    (first,) = run.segments(leg.leg_id)
    rollouts = run.table(first, "rollouts")
    others = rollouts.set_column(rollouts.schema.names.index("text"), "text", pa.array(["other"] * rollouts.num_rows))
    metrics, telemetry = run.table(first, "metrics"), run.table(first, "telemetry")
    checkpoint = run.require_checkpoint(leg.leg_id, first.stop)
    others = others.cast(TRAJECTORIES)
    rows = run.put_rows(leg, 6, 8, others, metrics, telemetry)
    adopted = run.commit_segment(leg, rows, checkpoint, head.epoch, ENVIRONMENT)
    assert adopted == first
    assert run.segments(leg.leg_id) == [first]
    assert run.table(first, "rollouts").equals(rollouts)


def test_a_segment_is_refused_after_another_writer_moved_the_head(run: RunArtifacts) -> None:
    leg, head = leg_of(run, "main"), run.head()
    assert head is not None
    (segment,) = run.segments(leg.leg_id)
    (folder_of(run) / layout.manifest(layout.segment(leg.leg_id, 6, 8))).unlink()
    with pytest.raises(NearFutureError, match="the head of synthetic was moved by another writer"):
        commit_again(run, leg, segment, head.epoch - 1)
    run.move_head(head, leg_of(run, "replay").leg_id)
    with pytest.raises(NearFutureError, match=f"not leg {leg.leg_id} epoch {head.epoch}"):
        commit_again(run, leg, segment, head.epoch)
    assert run.segments(leg.leg_id) == []


def test_segments_that_overlap_are_refused(run: RunArtifacts) -> None:
    scout = leg_of(run, "scout")
    first = run.segments(scout.leg_id)[0]
    with pytest.raises(NearFutureError, match=r"steps 2-4 of leg .* are committed already, 2-6 overlap them"):
        commit_again(run, scout, first, None, stop=6)
    assert len(run.all_segments(scout.leg_id)) == 2


def test_rows_of_another_leg_or_step_are_no_segment(run: RunArtifacts) -> None:
    scout, replay = leg_of(run, "scout"), leg_of(run, "replay")
    segment = run.segments(scout.leg_id)[0]
    with pytest.raises(ValueError, match=f"are not of leg {replay.leg_id}"):
        commit_again(run, replay, segment, 2)
    with pytest.raises(ValueError, match="a scout leg cannot commit under epoch 3"):
        commit_again(run, scout, segment, 3)


def test_the_head_moves_once_and_only_from_where_it_was(run: RunArtifacts) -> None:
    head, warm = run.head(), leg_of(run, "warm").leg_id
    moved = run.move_head(head, warm)
    assert moved == Head(leg_id=warm, epoch=4)
    assert run.move_head(head, warm) == moved, "a move whose reply was lost is not repeated"
    with pytest.raises(NearFutureError, match="moved by another writer"):
        run.move_head(head, leg_of(run, "scout").leg_id)


def test_segments_stop_at_the_first_gap_and_ignore_debris(run: RunArtifacts) -> None:
    scout = leg_of(run, "scout")
    folder = folder_of(run) / layout.segments(scout.leg_id)
    debris = folder / "000006-000008"
    debris.mkdir()
    (debris / "rollouts-0123456789abcdef.parquet").write_bytes(b"half a file")
    (debris / ".manifest.json.00.tmp").write_text("{}")
    (folder / "not-a-segment").mkdir()
    (folder_of(run) / "guides" / "half").mkdir()
    (folder_of(run) / "evals" / "half").mkdir()
    (folder_of(run) / layout.checkpoints(scout.leg_id) / "000099").mkdir()
    assert [segment.start for segment in run.segments(scout.leg_id)] == [2, 4]
    assert [manifest.step for manifest in run.checkpoints(scout.leg_id)] == [4, 6]
    assert len(run.guides()) == 1
    assert verify_run(run, SyntheticVerifier(), decode) == []
    shutil.rmtree(folder / "000002-000004")
    assert run.segments(scout.leg_id) == []
    assert [segment.start for segment in run.all_segments(scout.leg_id)] == [4]


def test_what_is_not_there_is_named_with_what_is(run: RunArtifacts) -> None:
    warm = leg_of(run, "warm")
    with pytest.raises(NearFutureError, match=r"there is no run 'other' in .*; runs there: synthetic"):
        open_run(run.uri.removesuffix("synthetic") + "other").record()
    with pytest.raises(NearFutureError, match=f"no leg 'nothing'; its legs: .*{warm.leg_id}"):
        run.leg("nothing")
    with pytest.raises(NearFutureError, match="has no checkpoint at step 3; its steps: 0, 2, 4, 6, 8"):
        main_line_checkpoint(run, 3)
    with pytest.raises(ConfigurationError, match="'synthetic' names no run; give STORE/RUN"):
        open_run("synthetic")


def test_the_main_lines_checkpoint_is_that_of_the_leg_that_the_line_goes_through(run: RunArtifacts) -> None:
    assert main_line_checkpoint(run).leg_id == run.legs()[-1].leg_id
    assert main_line_checkpoint(run, 4).leg_id == leg_of(run, "replay").leg_id
    assert main_line_checkpoint(run, 2).leg_id == run.legs()[1].leg_id


def test_a_checkpoint_whose_segment_was_not_committed_is_not_the_main_lines(run: RunArtifacts) -> None:
    (folder_of(run) / layout.manifest(layout.segment(leg_of(run, "main").leg_id, 6, 8))).unlink()
    assert main_line_checkpoint(run).step == 6
    with pytest.raises(NearFutureError, match="has no checkpoint at step 8"):
        main_line_checkpoint(run, 8)


def test_other_prompts_are_refused_and_altered_ones_found(run: RunArtifacts) -> None:
    prompts = run.prompts()
    run.put_prompts(prompts)
    with pytest.raises(NearFutureError, match="holds other prompts"):
        run.put_prompts(prompts.slice(1))
    (folder_of(run) / layout.PROMPTS).write_bytes(parquet.encode(prompts.slice(1), parquet.SCHEMAS["prompts"]))
    with pytest.raises(StoreError, match=r"prompts\.parquet was altered"):
        run.prompts()


def test_a_report_lies_in_the_store(run: RunArtifacts) -> None:
    uri = run.put_report("report.html", b"<html>")
    assert Path(uri.removeprefix("file://")).read_bytes() == b"<html>"
    assert f"{run.uri}/reports/report-" in uri


# ---- kills


def state(run: RunArtifacts) -> dict[str, object]:
    """What two runs that did the same work have in common."""
    return {
        "head": run.head(),
        "segments": [
            (s.leg_id, s.start, s.stop, s.logical_digest, s.checkpoint)
            for leg in run.legs()
            for s in run.segments(leg.leg_id)
        ],
        "checkpoints": [manifest.ref for leg in run.legs() for manifest in run.checkpoints(leg.leg_id)],
        "guides": [(guide.guide_id, guide.files, guide.tokens_guide) for guide in run.guides()],
        "evaluations": sorted((e.eval_id, e.accuracy, e.tokens) for e in run.evaluations()),
        "decisions": run.decisions(),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "checkpoint-data:3",
        "checkpoint-manifest:3",
        "segment-data:2",
        "segment-manifest:2",
        "guide-data",
        "leg-record:2",
        "head-moved:2",
        "evaluation-data:2",
    ],
)
def test_a_kill_at_any_point_of_a_commit_leaves_nothing_half_visible(
    eight_steps: Path, tmp_path: Path, fault: str
) -> None:
    code = (
        f"import pathlib, tests.synthetic as s; s.build_run(pathlib.Path({str(tmp_path)!r}), steps=8, segment_steps=2)"
    )
    environment = {**os.environ, "NPO_FAULT": fault, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = open_run(str(tmp_path / "synthetic"))
    assert verify_run(run, SyntheticVerifier(), decode) == []
    whole = open_run(str(eight_steps / "synthetic"))
    before = state(run)
    assert before != state(whole), "it was killed too late to show anything"
    build_run(tmp_path, steps=8, segment_steps=2)
    assert state(run) == state(whole)
    assert verify_run(run, SyntheticVerifier(), decode) == []
    for name in ("segments", "checkpoints", "guides"):
        assert set(map(repr, before[name])) <= set(map(repr, state(run)[name])), "something committed was lost"


def test_a_misspelt_fault_point_is_refused(run: RunArtifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPO_FAULT", "segment-dta")
    with pytest.raises(ConfigurationError, match="'segment-dta' is no fault point"):
        run.open_leg(leg_of(run, "warm"))


def test_records_are_plain_json(run: RunArtifacts) -> None:
    for path in folder_of(run).rglob("*.json"):
        assert isinstance(json.loads(path.read_text()), dict)


def test_rows_behind_a_checkpoint_that_are_no_longer_whole_are_not_adopted(run: RunArtifacts) -> None:
    leg = leg_of(run, "replay")
    checkpoint = run.require_checkpoint(leg.leg_id, 4)
    assert checkpoint.segment is not None
    assert run.rows_behind(checkpoint, 2) == checkpoint.segment
    assert run.rows_behind(checkpoint, 0) is None
    path = folder_of(run) / checkpoint.segment.files[0].key
    path.write_bytes(path.read_bytes()[:-1])
    assert run.rows_behind(checkpoint, 2) is None
    path.unlink()
    assert run.rows_behind(checkpoint, 2) is None
