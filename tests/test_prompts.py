"""Prompt tables: which prompts a step trains on, their Parquet form and their tokens."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npo_core import testbed
from npo_core.artifacts import prompts_digest
from npo_core.interfaces import ConfigurationError, Prompt, PromptSource, Verifier
from npo_core.prompts import PromptTable, encode, to_arrow
from npo_core.sources.load import load
from npo_core.testbed.tokenizer import build_tokenizer
from npo_core.verifiers.kinds import load_verifier
from schemas.config import Config
from schemas.digest import digest_json
from schemas.tables import PROMPTS

seeds = st.integers(0, 2**31 - 1)


def prompts(count: int, prefix: str = "t") -> list[Prompt]:
    return [Prompt(f"{prefix}{n}", "sum", ({"role": "user", "content": f"s{n}="},), str(n)) for n in range(count)]


def table(pool: int, batch: int, seed: int = 0) -> PromptTable:
    return PromptTable(to_arrow(prompts(pool), prompts(3, "h")), seed, batch)


def ids(batch: list[Prompt]) -> list[str]:
    return [prompt.prompt_id for prompt in batch]


def test_a_steps_identifiers_are_those_of_its_prompts() -> None:
    source = table(11, 3)
    for step in range(9):
        assert source.batch_ids(step) == ids(source.batch(step))


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_the_digest_of_prompts_is_that_of_their_canonical_json(count: int) -> None:
    rows = to_arrow(prompts(count), [])
    assert prompts_digest(rows) == digest_json(rows.to_pylist())


def config(**data: object) -> Config:
    return Config.model_validate({"run": {"name": "r"}, "data": data})


@st.composite
def pools(draw: st.DrawFn) -> tuple[int, int]:
    pool = draw(st.integers(1, 60))
    return pool, draw(st.integers(1, pool))


@given(pools(), seeds, st.integers(0, 3))
def test_an_epoch_takes_each_prompt_at_most_once_and_leaves_out_less_than_a_batch(
    pool_and_batch: tuple[int, int], seed: int, epoch: int
) -> None:
    pool, size = pool_and_batch
    source = table(pool, size, seed)
    turns = pool // size
    batches = [ids(source.batch(epoch * turns + turn)) for turn in range(turns)]
    assert all(len(batch) == size for batch in batches)
    seen = [prompt_id for batch in batches for prompt_id in batch]
    assert len(set(seen)) == len(seen) == turns * size > pool - size
    assert set(seen) <= set(ids(prompts(pool)))


@given(pools(), seeds, st.integers(0, 10_000))
def test_a_batch_is_a_function_of_seed_and_step_alone(pool_and_batch: tuple[int, int], seed: int, step: int) -> None:
    pool, size = pool_and_batch
    used, fresh = table(pool, size, seed), table(pool, size, seed)
    for other in (0, step + 1, 5):
        used.batch(other)
    assert used.batch(step) == fresh.batch(step)


def test_seeds_and_epochs_differ_in_their_order() -> None:
    assert ids(table(64, 64, 0).batch(0)) != ids(table(64, 64, 1).batch(0))
    assert ids(table(64, 64).batch(0)) != ids(table(64, 64).batch(1))


def test_the_order_of_an_epoch_is_what_it_was_in_earlier_releases() -> None:
    # A resumed run must meet the prompts that it would have met.
    assert ids(table(8, 4).batch(0) + table(8, 4).batch(1)) == ["t6", "t3", "t7", "t5", "t1", "t2", "t4", "t0"]


def test_the_tail_of_one_epoch_is_not_always_the_same_prompts() -> None:
    source = table(10, 4)
    assert {prompt_id for step in range(20) for prompt_id in ids(source.batch(step))} == set(ids(prompts(10)))


def test_prompts_are_found_by_identifier_in_both_splits() -> None:
    source: PromptSource = table(5, 2)
    assert source.get("t4").answer == "4"
    assert source.get("h2") is not None
    assert ids(source.held_out()) == ["h0", "h1", "h2"]
    with pytest.raises(KeyError):
        source.get("absent")


def test_doubled_identifiers_and_batches_beyond_the_pool_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt_id"):
        PromptTable(to_arrow(prompts(3), prompts(1)), 0, 2)
    for size in (0, 4):
        with pytest.raises(ValueError, match="prompts_per_step"):
            PromptTable(to_arrow(prompts(3), []), 0, size)


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(), st.text(), st.lists(st.text(), max_size=2)), min_size=1, max_size=5))
def test_prompts_come_back_from_parquet_as_they_were(contents: list[tuple[str, str, list[str]]]) -> None:
    train = [
        Prompt(f"p{n}", "t", ({"role": "system", "content": text}, {"role": "user", "content": answer}), answer,
               tuple(refs))
        for n, (text, answer, refs) in enumerate(contents)
    ]  # fmt: skip
    written = to_arrow(train, prompts(2, "h"))
    assert written.schema.equals(PROMPTS, check_metadata=True)
    buffer = io.BytesIO()
    pq.write_table(written, buffer)
    source = PromptTable(pq.read_table(buffer), seed=7, prompts_per_step=1)
    assert [source.get(prompt.prompt_id) for prompt in train] == train
    assert source.held_out() == prompts(2, "h")
    direct = PromptTable(to_arrow(train, prompts(2, "h")), seed=7, prompts_per_step=1)
    assert [source.batch(step) for step in range(6)] == [direct.batch(step) for step in range(6)]


def test_messages_are_canonical_json() -> None:
    assert to_arrow(prompts(1), [])["messages"].to_pylist() == ['[{"content":"s0=","role":"user"}]']


def test_a_prompt_is_encoded_as_the_characters_of_its_messages() -> None:
    tokenizer = build_tokenizer()
    encoded = encode(tokenizer, Prompt("p", "sum", ({"role": "user", "content": "s4821="},), ""))
    assert encoded.dtype == np.int32
    assert tokenizer.convert_ids_to_tokens(encoded.tolist()) == list("s4821=")


def test_the_configuration_names_prompts_and_verifier() -> None:
    loaded = load(config(prompts=40, held_out=16, min_length=5, max_length=6, pool_seed=3), None)
    assert loaded.report is None
    train = loaded.train
    assert (train, loaded.held_out) == testbed.make_prompts(40, 16, 5, 6, 3)
    verifier: Verifier = load_verifier(config())
    assert verifier.name == "testbed/1"
    assert all(verifier.verify(prompt, prompt.answer).correct for prompt in train)


def test_more_prompts_than_there_are_inputs_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match=r"data\.prompts 90 .*length 1 .*there are 10; raise data\.min_length"):
        load(config(prompts=90, held_out=8, min_length=1, max_length=1), None)
    loaded = load(config(prompts=72, held_out=8, min_length=1, max_length=1), None)
    assert len({prompt.prompt_id for prompt in loaded.train + loaded.held_out}) == 80
