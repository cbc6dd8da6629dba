"""A chat model of the user's: its template is given what the section `chat` says, and its answers end where it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from npo_core.generate import TransformersGenerator
from npo_core.interfaces import ConfigurationError, Prompt, SamplingParams, StreamKey
from npo_core.policy import Policy
from npo_core.prompts import counter, encode
from npo_core.stops import Stops
from schemas.chat import ChatSection
from schemas.learner import LearnerSection
from schemas.model import ModelSection
from tests.chat_model import LLAMA, QWEN, chat_model_dir, chat_tokenizer

HELLO = Prompt("p", "t", ({"role": "user", "content": "Hello"},), "x")
OWN = Prompt("p", "t", ({"role": "system", "content": "Own"}, *HELLO.messages), "x")


def text(tokenizer: Any, prompt: Prompt, **chat: object) -> str:
    return tokenizer.decode(encode(tokenizer, prompt, ChatSection.model_validate(chat)).tolist())


def test_the_system_prompt_comes_first_unless_a_prompt_has_its_own() -> None:
    tokenizer = chat_tokenizer(QWEN)
    assert text(tokenizer, HELLO) == "<user>Hello<assistant>"
    assert text(tokenizer, HELLO, system_prompt="Be brief.") == "<system>Be brief.<user>Hello<assistant>"
    assert text(tokenizer, OWN, system_prompt="Be brief.") == "<system>Own<user>Hello<assistant>"


def test_the_switch_reaches_a_template_that_has_it() -> None:
    tokenizer = chat_tokenizer(QWEN)
    assert text(tokenizer, HELLO, enable_thinking=False) == "<user>Hello<assistant><think></think>"
    assert text(tokenizer, HELLO, enable_thinking=True) == text(tokenizer, HELLO)
    assert counter(tokenizer, ChatSection(enable_thinking=False))(HELLO) > counter(tokenizer, ChatSection())(HELLO)


def test_a_template_without_the_switch_or_none_at_all_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigurationError, match=r"chat\.enable_thinking False: .* no such switch.*leave it out"):
        counter(chat_tokenizer(LLAMA), ChatSection(enable_thinking=False))
    tokenizer = chat_tokenizer(LLAMA)
    tokenizer.chat_template = None
    with pytest.raises(ConfigurationError, match=r"no chat template.*take an instruct model"):
        counter(tokenizer, ChatSection())


def test_a_template_that_refuses_a_system_prompt_says_so() -> None:
    with pytest.raises(ValueError, match=r"System role not supported; .* remove chat\.system_prompt"):
        counter(chat_tokenizer(LLAMA), ChatSection(system_prompt="Be brief."))(HELLO)


# ---- stop texts

TOKENIZER = chat_tokenizer(QWEN)


def stops(*texts: str) -> Stops:
    found = Stops.of(texts, TOKENIZER)
    assert found is not None
    return found


@given(st.lists(st.sampled_from([1, 2, *range(5, len(TOKENIZER))]), max_size=12), st.integers(0, 12))
def test_an_answer_ends_with_the_first_token_after_which_its_text_holds_a_stop(filler: list[int], place: int) -> None:
    found = stops("STOP", "é", "<user>")
    ids = np.array([*filler[:place], *TOKENIZER.encode("xSTOPé", add_special_tokens=False), *filler[place:]], np.int32)
    texts = [TOKENIZER.decode(ids[:t].tolist()) for t in range(len(ids) + 1)]
    first = next(t for t, said in enumerate(texts) if any(stop in said for stop in found.texts))
    assert found.length(ids) == first
    assert [found.ended(ids[:t]) for t in range(1, first + 1)] == [False] * (first - 1) + [True]
    assert found.length(ids[: first - 1]) is None


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_sampled_answers_are_those_without_stops_cut_where_the_first_is_said(tmp_path: Path, architecture: str) -> None:
    folder = chat_model_dir(tmp_path / "model", architecture)
    policy = Policy(folder, ModelSection(), LearnerSection(device="cpu"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = TransformersGenerator(policy, max_rows=24)
    prompts, n = [encode(tokenizer, HELLO), encode(tokenizer, OWN if architecture == "qwen3" else HELLO)], 24
    keys = [StreamKey(1, "rollout", 0, f"p{p}", slot) for p in range(2) for slot in range(n)]
    params = SamplingParams(1.0, 24, (tokenizer.eos_token_id,))
    whole = generator.sample(prompts, n, params, keys)
    found = Stops.of(("S", "STOP", "e", "~"), tokenizer)
    assert found is not None
    cut = generator.sample(prompts, n, replace(params, stops=found), keys)
    lengths = [found.length(ids) for ids in whole.completion_ids]
    assert 0 < sum(length is not None for length in lengths) < len(lengths), "the case must have rows of both kinds"
    for row, length in enumerate(lengths):
        assert cut.completion_ids[row].tolist() == whole.completion_ids[row][:length].tolist()
        np.testing.assert_allclose(cut.logprobs[row], whole.logprobs[row][:length], rtol=1e-4, atol=1e-5)
        assert len(cut.entropies[row]) == len(cut.completion_ids[row])
        assert cut.finish_reasons[row] == (whole.finish_reasons[row] if length is None else "stop")
