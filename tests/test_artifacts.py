"""A run's artifacts: commits, adoption, checkpoints without pickles, tables, and kills at every point of a commit."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from npo_core import parquet
from npo_core.artifacts import RunArtifacts, main_line_checkpoint, open_run, runs
from npo_core.checkpoints import files_digest
from npo_core.export import export_checkpoint
from npo_core.interfaces import ConfigurationError, NearFutureError
from npo_core.store import StoreError, open_store
from npo_core.verify import verify_run
from schemas import layout
from schemas.digest import canonical_json, digest_bytes
from schemas.records import CheckpointManifest, CheckpointRef, FileEntry, Head, LegRecord, Manifest, SegmentManifest
from schemas.tables import METRICS, TRAJECTORIES
from tests.synthetic import ENVIRONMENT, SyntheticVerifier, build_run, decode

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run of eight steps, to be copied."""
    store = tmp_path_factory.mktemp("original")
    build_run(store, steps=8, segment_steps=2)
    return store


@pytest.fixture
def run(original: Path, tmp_path: Path) -> RunArtifacts:
    """A run of a test's own."""
    shutil.copytree(original, tmp_path / "runs")
    return open_run(str(tmp_path / "runs" / "synthetic"))


def folder_of(run: RunArtifacts) -> Path:
    return Path(run.uri.removeprefix("file://"))


def leg_of(run: RunArtifacts, kind: str) -> LegRecord:
    return [leg for leg in run.legs() if leg.kind == kind][-1]


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


# ---- checkpoints


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def make_checkpoint(folder: Path) -> Path:
    for part, name in (("weights", "model"), ("optimizer", "optimizer")):
        (folder / part).mkdir(parents=True)
        save_file({"w": np.arange(4, dtype=np.float32)}, folder / part / f"{name}.safetensors")
    (folder / "weights" / "config.json").write_text("{}")
    (folder / "state.json").write_text('{"step": 9}')
    return folder


def test_a_checkpoint_comes_back_as_it_was_with_the_runs_model_files(run: RunArtifacts, tmp_path: Path) -> None:
    leg_id = leg_of(run, "scout").leg_id
    committed, same = run.commit_checkpoint(leg_id, 9, make_checkpoint(tmp_path / "in"), ENVIRONMENT)
    assert same
    assert sorted(entry.name for entry in committed.files) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    local = run.checkout(committed.ref, tmp_path / "out")
    assert (local.digest, local.step) == (committed.digest, 9)
    names = {path.relative_to(local.path).as_posix() for path in local.path.rglob("*") if path.is_file()}
    assert names == {
        "weights/model.safetensors",
        "weights/config.json",
        "weights/tokenizer.json",
        "optimizer/optimizer.safetensors",
        "state.json",
    }
    assert (local.weights / "config.json").read_text() == '{"model_type": "synthetic"}'
    np.testing.assert_array_equal(load_file(local.weights / "model.safetensors")["w"], np.arange(4))
    policy = run.checkout(committed.ref, tmp_path / "policy", weights_only=True)
    assert {path.name for path in policy.path.iterdir()} == {"weights"}


def test_equal_weights_have_equal_digests_wherever_they_are(run: RunArtifacts, tmp_path: Path) -> None:
    source, leg_id = make_checkpoint(tmp_path / "in"), leg_of(run, "scout").leg_id
    one, two = (run.commit_checkpoint(leg_id, step, source, ENVIRONMENT)[0] for step in (9, 10))
    assert (one.digest, one.weights_digest) == (two.digest, two.weights_digest)
    (source / "state.json").write_text("{}")
    three, _ = run.commit_checkpoint(leg_id, 11, source, ENVIRONMENT)
    assert three.weights_digest == one.weights_digest
    assert three.digest != one.digest


def test_a_missing_checkpoint_is_named_with_the_steps_that_there_are(run: RunArtifacts, tmp_path: Path) -> None:
    leg_id = leg_of(run, "scout").leg_id
    with pytest.raises(NearFutureError, match=f"leg {leg_id} of .*synthetic has no checkpoint at step 5 .*4, 6"):
        run.checkout(CheckpointRef(leg_id=leg_id, step=5, digest="0" * 64), tmp_path / "out")
    with pytest.raises(NearFutureError, match=r"has digest .*, not 000000000000 as it is referred to"):
        run.checkout(CheckpointRef(leg_id=leg_id, step=4, digest="0" * 64), tmp_path / "out")


def test_a_damaged_checkpoint_is_not_loaded(run: RunArtifacts, tmp_path: Path) -> None:
    manifest = run.checkpoints(leg_of(run, "scout").leg_id)[0]
    path = folder_of(run) / next(entry.key for entry in manifest.files if entry.role == "weights")
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(StoreError, match=r"model-.*safetensors was altered"):
        run.checkout(manifest.ref, tmp_path / "out")
    assert not (tmp_path / "out" / "weights" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["weights/model.safetensors", "weights/pytorch_model.bin", "optimizer/optimizer.pt"])
def test_a_pickle_is_not_committed_as_a_checkpoint(run: RunArtifacts, tmp_path: Path, name: str) -> None:
    source = make_checkpoint(tmp_path / "in")
    (source / name).write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises(NearFutureError, match="is refused"):
        run.commit_checkpoint(leg_of(run, "scout").leg_id, 9, source, ENVIRONMENT)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "is named as safetensors and is none"),
        ("pytorch_model.bin", "only .safetensors, .json"),
        ("../../../model.safetensors", "only .safetensors, .json"),
    ],
)
def test_a_pickle_that_a_forged_manifest_names_is_not_loaded(
    run: RunArtifacts, tmp_path: Path, name: str, message: str
) -> None:
    evil = pickle.dumps(Payload(tmp_path / "executed"))
    leg_id = leg_of(run, "scout").leg_id
    folder = layout.checkpoint(leg_id, 9)
    (folder_of(run) / folder).mkdir()
    (folder_of(run) / folder / "evil").write_bytes(evil)
    files = (FileEntry(role="weights", name=name, key=f"{folder}/evil", bytes=len(evil), sha256=digest_bytes(evil)),)
    forged = CheckpointManifest(
        files=files,
        leg_id=leg_id,
        step=9,
        digest=files_digest(files),
        weights_digest=files_digest(files),
        nonce="",
        created_at="",
    )
    (folder_of(run) / layout.manifest(folder)).write_bytes(canonical_json(forged.model_dump(mode="json")))
    with pytest.raises(NearFutureError, match=message):
        run.checkout(forged.ref, tmp_path / "a" / "b" / "out")
    assert not (tmp_path / "executed").exists()


def test_a_directory_without_weights_is_no_checkpoint(run: RunArtifacts, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(NearFutureError, match=r"holds no weights/\*\.safetensors"):
        run.commit_checkpoint("leg", 1, tmp_path / "in", ENVIRONMENT)
    with pytest.raises(NearFutureError, match=r"holds no config\.json"):
        run.put_model(tmp_path / "in")


def test_an_export_is_loaded_by_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=32, head_dim=8, num_key_value_heads=2, **sizes))
    model.save_pretrained(tmp_path / "checkpoint" / "weights")
    run = open_run(str(tmp_path / "runs" / "real"))
    run.put_model(tmp_path / "checkpoint" / "weights")
    ref = run.commit_checkpoint("leg", 1, tmp_path / "checkpoint", ENVIRONMENT)[0].ref
    (tmp_path / "export").mkdir()
    path, digest = export_checkpoint(run, ref, tmp_path / "export")
    loaded = AutoModelForCausalLM.from_pretrained(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert digest == run.require_checkpoint("leg", 1).weights_digest
    with pytest.raises(ConfigurationError, match=r"export is not empty; choose a new directory"):
        export_checkpoint(run, ref, tmp_path / "export")
    assert not list(tmp_path.glob(".export*")), "scratch was left behind"


# ---- tables


def _rows(count: int, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    rows = [
        {
            "run_id": "r",
            "leg_id": "l",
            "step": int(rng.integers(3)),
            "prompt_id": f"p{index}",
            "slot": index,
            "source": "policy",
            "task": "sum",
            "behavior_step": 0,
            "behavior_digest": "d",
            "prompt_ids": rng.integers(0, 9, 3).tolist(),
            "completion_ids": rng.integers(0, 9, int(rng.integers(0, 5))).tolist(),
            "loss_mask": None if index % 2 else [True],
            "behavior_logprobs": rng.standard_normal(2).astype(np.float32).tolist(),
            "reward": float(rng.random()),
            "correct": bool(index % 3),
            "verdict": "ü",
            "verifier": "v",
            "finish_reason": "stop",
            "advantage": None if index % 3 else 0.5,
            "displaced": False,
            "text": "",
            "image_refs": ["a"] * (index % 2),
            "schema_version": 1,
        }
        for index in range(count)
    ]
    return pa.Table.from_pylist(rows, TRAJECTORIES)


@settings(deadline=None)  # the machine may be busy
@given(st.integers(0, 30), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_digests_and_bytes_do_not_depend_on_order_chunks_or_encoding(count: int, seed: int, random: object) -> None:
    table = _rows(count, seed)
    order = list(range(count))
    random.shuffle(order)  # type: ignore[attr-defined]
    half = count // 2
    shuffled = table.take(pa.array(order, pa.int64()))
    chunked = pa.concat_tables([shuffled.slice(half), shuffled.slice(0, half)])
    data = parquet.encode(table, TRAJECTORIES)
    assert parquet.encode(chunked, TRAJECTORIES) == data
    sink = pa.BufferOutputStream()
    pq.write_table(chunked, sink, compression="none", use_dictionary=False, row_group_size=3)
    reread = parquet.decode(sink.getvalue().to_pybytes(), TRAJECTORIES, "key")
    digests = {parquet.logical_digest(t, TRAJECTORIES) for t in (table, chunked, reread)}
    assert len(digests) == 1
    assert parquet.decode(data, TRAJECTORIES, "key").equals(parquet.canonical(table, TRAJECTORIES))


@pytest.mark.parametrize(
    ("column", "one", "other"),
    [
        ("reward", 0.0, -0.0),
        ("reward", 1.0, float(np.nextafter(1.0, 2.0))),
        ("advantage", None, 0.0),
        ("loss_mask", None, []),
        ("completion_ids", [1, 2], [1, 3]),
        ("behavior_logprobs", [-1.0, 0.0], [-1.0, -0.0]),
        ("image_refs", ["ab", "c"], ["a", "bc"]),
        ("text", "a", "b"),
    ],
)
def test_any_other_value_has_another_digest(column: str, one: object, other: object) -> None:
    row = _rows(1, 0).to_pylist()[0]
    tables = [pa.Table.from_pylist([{**row, column: value}], TRAJECTORIES) for value in (one, other)]
    first, second = (parquet.logical_digest(table, TRAJECTORIES) for table in tables)
    assert first != second


def test_nan_payloads_count() -> None:
    bits = np.array([0x7FF8000000000000, 0x7FF8000000000001], np.uint64).view(np.float64)
    row = pa.Table.from_pylist([{"run_id": "r", "leg_id": "l", "step": 0}], METRICS)
    place = METRICS.names.index("loss")
    tables = [row.set_column(place, METRICS.field(place), pa.array(bits[i : i + 1])) for i in range(2)]
    assert len({parquet.logical_digest(table, METRICS) for table in tables}) == 2


def test_another_schema_or_version_is_refused_with_the_keys_name() -> None:
    table = _rows(2, 0)
    with pytest.raises(ValueError, match="table has the schema"):
        parquet.encode(table.drop_columns(["text"]), TRAJECTORIES)
    nulls = pa.Table.from_pylist([{**table.to_pylist()[0], "reward": None}], TRAJECTORIES)
    with pytest.raises(ValueError, match="column reward holds 1 nulls"):
        parquet.encode(nulls, TRAJECTORIES)
    for bad, message in (
        (table.replace_schema_metadata({b"near_future.schema_version": b"99"}), "the-key has schema version 99"),
        (table.replace_schema_metadata(None), "the-key has schema version none"),
        (table.drop_columns(["text"]), r"the-key has another schema \(.*text"),
    ):
        sink = pa.BufferOutputStream()
        pq.write_table(bad, sink)
        with pytest.raises(StoreError, match=message):
            parquet.decode(sink.getvalue().to_pybytes(), TRAJECTORIES, "the-key")
    with pytest.raises(StoreError, match="the-key is no readable Parquet file"):
        parquet.decode(b"PAR1 no", TRAJECTORIES, "the-key")


def test_row_groups_are_bounded() -> None:
    table = pa.concat_tables([_rows(500, 0)] * 10)
    info = pq.ParquetFile(pa.BufferReader(parquet.encode(table, TRAJECTORIES))).metadata
    assert [info.row_group(i).num_rows for i in range(info.num_row_groups)] == [4096, 904]
    assert info.row_group(0).column(0).compression == "ZSTD"


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
    original: Path, tmp_path: Path, fault: str
) -> None:
    code = (
        f"import pathlib, tests.synthetic as s; s.build_run(pathlib.Path({str(tmp_path)!r}), steps=8, segment_steps=2)"
    )
    environment = {**os.environ, "NPO_FAULT": fault, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = open_run(str(tmp_path / "synthetic"))
    assert verify_run(run, SyntheticVerifier(), decode) == []
    whole = open_run(str(original / "synthetic"))
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
