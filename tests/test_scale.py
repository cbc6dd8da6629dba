"""The benchmark of size writes runs that are whole, and its measurements say what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from npo_core.artifacts import RunArtifacts
from npo_core.verifiers.kinds import load_verifier
from npo_core.verify import verify_run
from npo_core.workspace import Workspace
from tests.bench import scale
from tests.bench.scale_data import END, Vocabulary, make_pool
from tests.bench.scale_run import Shape, write_guide, write_run

SHAPE = Shape.of_rows("small", rows=20_000, steps=50, segment_steps=10, tokens=20, seed=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunArtifacts:
    """20,000 trajectories over 50 steps."""
    return write_run(str(tmp_path_factory.mktemp("store")), SHAPE)


@pytest.mark.slow
def test_the_run_is_whole_and_as_large_as_asked_for(run: RunArtifacts) -> None:
    opened = Workspace.of(run)
    assert verify_run(run, load_verifier(opened.config), opened.decode) == []
    leg = run.legs()[-1]
    segments = run.segments(leg.leg_id)
    assert [segment.stop for segment in segments] == [10, 20, 30, 40, 50]
    tables = [run.table(segment, "rollouts") for segment in segments]
    assert sum(table.num_rows for table in tables) == 20_000
    assert sum(segment.tokens_policy for segment in segments) / 20_000 == pytest.approx(20, rel=0.05)
    for row in tables[0].slice(0, 20).to_pylist():
        assert opened.decode(row["completion_ids"]) == row["text"]
        assert (row["completion_ids"][-1] == END) == (row["finish_reason"] == "stop")
        assert max(row["behavior_logprobs"]) <= 0
        assert row["prompt_ids"] == opened.encode(opened.prompts.get(row["prompt_id"])).tolist()


@pytest.mark.slow
def test_segments_that_are_there_are_not_made_again(run: RunArtifacts) -> None:
    leg = run.legs()[-1]
    before = {segment.stop: segment for segment in run.segments(leg.leg_id)}
    lost = before[30]
    path = Path(run.store.path, "legs", leg.leg_id, "segments", "000020-000030", "manifest.json")
    path.unlink()
    write_run(str(Path(run.store.path).parent), SHAPE)
    after = {segment.stop: segment for segment in run.segments(leg.leg_id)}
    assert after[30].logical_digest == lost.logical_digest
    assert after[30].nonce != lost.nonce
    assert {stop: s for stop, s in after.items() if stop != 30} == {s: b for s, b in before.items() if s != 30}


@pytest.mark.slow
def test_every_command_is_measured_in_a_process_of_its_own(run: RunArtifacts, tmp_path: Path) -> None:
    large = scale.measure(run.uri, repeats=1)
    assert (large["rows"], large["guide_prompts"]) == (20_000, SHAPE.pool)
    for result in large["commands"].values():
        assert result["seconds"] > 0.1
        assert 2**25 < result["peak_bytes"] < 2**31
        assert result["printed_bytes"] > 0
    assert large["lookup"]["found"] == large["lookup"]["prompts"] == SHAPE.pool
    assert 1 < large["bytes"]["parquet_per_token"] < large["bytes"]["jsonl_per_token"]

    guided = scale.measure(write_guide(str(tmp_path), Shape.of_guide("guided", 1000, 20, 0)).uri, repeats=1)
    assert guided["rows"] == 0
    assert guided["guide_prompts"] == 1000
    assert guided["lookup"]["found"] == guided["lookup"]["prompts"] == 400

    lines = scale.table([large, guided]).splitlines()
    assert lines[0] == "|  | small | guided | last / first |"
    assert "| guide's prompts | 500 | 1,000 | 2.0× |" in lines
    assert any(line.startswith("| verify: seconds | ") and line.endswith(" | – | – |") for line in lines)


@pytest.mark.slow
def test_the_peak_is_the_command_s_own(tmp_path: Path) -> None:
    ballast = np.ones(2**27)  # 1 GiB in this process is none of the command's
    code = "import time; data = bytearray(2**26); print(len(data))"
    found, printed = scale.timed([scale.sys.executable, "-c", code])
    assert printed == f"{2**26}\n"
    assert 2**26 < found["peak_bytes"] < 2**27 < ballast.nbytes
    with pytest.raises(RuntimeError, match="exit code 3"):
        scale.timed([scale.sys.executable, "-c", "raise SystemExit(3)"])


def test_texts_are_those_of_the_words_and_ids_follow_zipf_s_law() -> None:
    vocabulary = Vocabulary()
    assert len(set(vocabulary.words)) == len(vocabulary.words) == 150_000
    ids = vocabulary.draw(np.random.default_rng(0), 1_000_000)
    texts = vocabulary.text(ids[:30], np.array([0, 10, 10, 30])).to_pylist()
    words = [vocabulary.words[n] for n in ids[:30]]
    assert texts == ["".join(words[:10]), "", "".join(words[10:])]
    low, high = np.mean(ids < 10), np.mean((ids >= 10) & (ids < 100))
    assert low / high == pytest.approx(np.log(11) / np.log(101 / 11), rel=0.02)
    assert sum(len(vocabulary.words[n]) for n in ids[:10_000]) / 10_000 == pytest.approx(4, abs=0.3)


def test_the_tokenizer_speaks_as_the_rows_do() -> None:
    vocabulary = Vocabulary()
    pool = make_pool(vocabulary, 4, 10, 0)
    tokenizer = vocabulary.tokenizer()
    for prompt, ids, answer in zip(pool.prompts, pool.prompt_ids, pool.answer_ids, strict=True):
        messages = [dict(message) for message in prompt.messages]
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert encoded == ids.as_py()
        assert tokenizer.decode(answer.as_py()[:-1]) == prompt.answer
