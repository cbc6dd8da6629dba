"""Rows that look like a large run's, made without a Python loop over tokens: ids by Zipf's law, the text that they
stand for, log-probabilities of a policy that is mostly sure, prompts that recur.

Real text repeats itself more than independent draws do, so files of real runs are smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from npo_core.interfaces import Prompt
from schemas import tables
from schemas.digest import digest_json, short
from schemas.records import SCHEMA_VERSION

WORDS = 150_000
END, ASSISTANT = WORDS, WORDS + 1
SPECIAL = {"<|end|>": END, "<|assistant|>": ASSISTANT}
GROUP = 8
PROMPT_TOKENS = 40
LONGEST = 3
"""Completions are cut off at so many times the mean length."""
TASKS = ("algebra", "geometry", "counting", "number-theory")
VERIFIER = "testbed/1"
_CHUNK = 2**18
"""Numbers that are drawn at one time: temporary arrays stay in the processor's cache."""


class Vocabulary:
    """Words, the more frequent ones first and shorter; seven of ten begin with a space."""

    def __init__(self) -> None:
        self.words = [_word(rank) for rank in range(WORDS)]
        # The end token says nothing.
        self.texts = pa.array([*self.words, ""])
        self._whole = np.flatnonzero([word.startswith(" ") for word in self.words]).astype(np.int32)

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Ids by Zipf's law, int32: P(id < n) is log(n + 1) / log(WORDS + 1)."""
        ids = np.empty(count, np.int32)
        for chunk in _chunks(ids):
            chunk[:] = np.exp(rng.random(len(chunk), np.float32) * np.float32(np.log(WORDS + 1))) - 1
        return np.minimum(ids, WORDS - 1, out=ids)

    def draw_whole(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Ids of words that begin with a space: their text is encoded as these ids again."""
        return self._whole[rng.integers(0, len(self._whole), count)]

    def text(self, ids: np.ndarray, offsets: np.ndarray) -> pa.Array:
        """The texts of rows, which lie in one buffer one after the other as their words do."""
        words = self.texts.take(pa.array(ids))
        bounds = np.frombuffer(words.buffers()[1], np.int32)[offsets]
        return pa.StringArray.from_buffers(len(offsets) - 1, pa.py_buffer(bounds), words.buffers()[2])

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of these ids."""
        tokenizer = Tokenizer(models.WordLevel({**{word: n for n, word in enumerate(self.words)}, **SPECIAL}))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[^ ]+"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="<|end|>",
            additional_special_tokens=["<|assistant|>"],
            clean_up_tokenization_spaces=False,
            chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}<|assistant|>",
        )


def _word(rank: int) -> str:
    length = 3 if rank < 26**3 else 4
    # Multiplied by a prime, so that neighbours look different and no two are alike.
    code = rank * 7919 % 26**3 if rank < 26**3 else (rank - 26**3) * 104_729 % 26**4
    letters = "".join(chr(ord("a") + code // 26**n % 26) for n in range(length))
    return f" {letters}" if rank % 10 < 7 else letters


@dataclass(frozen=True)
class Pool:
    """The prompts of a run with their right answers."""

    prompts: list[Prompt]
    prompt_ids: pa.Array
    answer_ids: pa.Array
    """End token included."""
    difficulty: np.ndarray

    @cached_property
    def names(self) -> pa.Array:
        """Every prompt's identifier."""
        return pa.array([prompt.prompt_id for prompt in self.prompts])

    @cached_property
    def tasks(self) -> pa.Array:
        """Every prompt's task."""
        return pa.array([prompt.task for prompt in self.prompts])

    @cached_property
    def places(self) -> dict[str, int]:
        """Every prompt's place by its identifier."""
        return {prompt.prompt_id: n for n, prompt in enumerate(self.prompts)}


def make_pool(vocabulary: Vocabulary, count: int, tokens: int, seed: int) -> Pool:
    """Prompts of `PROMPT_TOKENS` tokens, with answers of `tokens` tokens on average."""
    rng = np.random.default_rng([seed, 1])
    asked = np.full((count, PROMPT_TOKENS), ASSISTANT, np.int32)
    asked[:, :-1] = vocabulary.draw_whole(rng, count * (PROMPT_TOKENS - 1)).reshape(count, -1)
    questions = vocabulary.text(asked[:, :-1].ravel(), np.arange(count + 1) * (PROMPT_TOKENS - 1))
    offsets, _ = _lengths(rng, count, tokens)
    answers = vocabulary.draw(rng, offsets[-1])
    answers[offsets[1:] - 1] = END
    columns = zip(questions.to_pylist(), vocabulary.text(answers, offsets).to_pylist(), strict=True)
    prompts = [
        Prompt(short(digest_json([seed, n])), TASKS[n % len(TASKS)], ({"role": "user", "content": question},), answer)
        for n, (question, answer) in enumerate(columns)
    ]
    return Pool(
        prompts,
        _lists(asked.ravel(), np.arange(count + 1) * PROMPT_TOKENS),
        _lists(answers, offsets),
        rng.normal(0, 1.5, count),
    )


@dataclass(frozen=True)
class Rollouts:
    """The rollouts of some steps, and what metrics are made of; the arrays have one entry a row."""

    table: pa.Table
    steps: np.ndarray
    rewards: np.ndarray
    entropies: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray


def make_rollouts(
    vocabulary: Vocabulary,
    pool: Pool,
    run_id: str,
    leg_id: str,
    first: int,
    batches: list[list[Prompt]],
    progress: float,
    digest: str,
    tokens: int,
    seed: int,
) -> Rollouts:
    """Groups of `GROUP` rollouts for the batches of the steps from `first` on.

    Args:
        progress: from 0 to 1, how far training is: rewards rise and entropy falls with it.
        digest: of the weights at `first`; later steps' are held by no checkpoint.
    """
    rng = np.random.default_rng([seed, 2, first])
    places = np.array([pool.places[prompt.prompt_id] for batch in batches for prompt in batch])
    steps = np.repeat(np.arange(first, first + len(batches)), [GROUP * len(batch) for batch in batches])
    chosen = np.repeat(places, GROUP)
    count = len(chosen)
    correct = rng.random(count) < 1 / (1 + np.exp(1.5 - 4 * progress + pool.difficulty[chosen]))
    rewards = correct.astype(np.float64)
    accuracy = rewards.reshape(-1, GROUP).mean(axis=1)
    deviation = rewards.reshape(-1, GROUP).std(axis=1, ddof=1)
    offsets, truncated = _lengths(rng, count, tokens)
    ids = vocabulary.draw(rng, offsets[-1])
    ids[offsets[1:][~truncated] - 1] = END
    logprobs = _logprobs(rng, offsets[-1], 1 - 0.5 * progress)
    lengths = np.diff(offsets)
    entropies = -np.add.reduceat(logprobs, offsets[:-1], dtype=np.float64) / lengths
    verdicts = pa.array(["correct", *(f"first differs at symbol {n}" for n in range(1, 200))])
    columns = {
        "step": steps,
        "prompt_id": pool.names.take(pa.array(chosen)),
        "slot": np.tile(np.arange(GROUP), count // GROUP),
        "source": _same("policy", count),
        "task": pool.tasks.take(pa.array(chosen)),
        "behavior_step": steps,
        "behavior_digest": pc.if_else(pa.array(steps == first), digest, None),
        "prompt_ids": pool.prompt_ids.take(pa.array(chosen)),
        "completion_ids": _lists(ids, offsets),
        "behavior_logprobs": _lists(logprobs, offsets),
        "reward": rewards,
        "correct": correct,
        "verdict": verdicts.take(pa.array(np.where(correct, 0, rng.integers(1, 200, count)))),
        "finish_reason": pc.if_else(pa.array(truncated), "length", "stop"),
        "advantage": (rewards - np.repeat(accuracy, GROUP)) / (np.repeat(deviation, GROUP) + 1e-6),
        "group_accuracy": np.repeat(accuracy, GROUP),
        "entropy": entropies,
        "text": vocabulary.text(ids, offsets),
    }
    table = _table(columns, run_id, leg_id, count)
    return Rollouts(table, steps, rewards, entropies, lengths, truncated)


def make_guide_rows(pool: Pool, run_id: str, guide_id: str, step: int, digest: str, seed: int) -> pa.Table:
    """The right answer to every prompt of the pool, sampled at `step`."""
    rng = np.random.default_rng([seed, 3])
    count = len(pool.prompts)
    offsets = pool.answer_ids.offsets.to_numpy()
    logprobs = _logprobs(rng, offsets[-1], 0.5)
    columns = {
        "step": np.full(count, step),
        "prompt_id": pool.names,
        "slot": rng.integers(0, GROUP, count),
        "source": _same("guide", count),
        "task": pool.tasks,
        "behavior_step": np.full(count, step),
        "behavior_digest": _same(digest, count),
        "prompt_ids": pool.prompt_ids,
        "completion_ids": pool.answer_ids,
        "behavior_logprobs": _lists(logprobs, offsets),
        "reward": np.ones(count),
        "correct": np.ones(count, bool),
        "verdict": _same("correct", count),
        "finish_reason": _same("stop", count),
        "advantage": pa.nulls(count),
        "group_accuracy": pa.nulls(count),
        "entropy": -np.add.reduceat(logprobs, offsets[:-1], dtype=np.float64) / np.diff(offsets),
        "text": pa.array([prompt.answer for prompt in pool.prompts]),
    }
    return _table(columns, run_id, guide_id, count)


def _table(columns: dict[str, Any], run_id: str, leg_id: str, count: int) -> pa.Table:
    columns |= {
        "run_id": _same(run_id, count),
        "leg_id": _same(leg_id, count),
        "loss_mask": pa.nulls(count),
        "verifier": _same(VERIFIER, count),
        "displaced": np.zeros(count, bool),
        "image_refs": _lists(pa.array([], pa.string()), np.zeros(count + 1, np.int64)),
        "schema_version": np.full(count, SCHEMA_VERSION),
    }
    arrays = [pa.array(columns[field.name]).cast(field.type) for field in tables.TRAJECTORIES]
    return pa.Table.from_arrays(arrays, schema=tables.TRAJECTORIES)


def _lengths(rng: np.random.Generator, count: int, mean: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of completions whose lengths vary, int64, and which of them are cut off."""
    lengths = np.maximum(rng.gamma(4.0, mean / 4, count).astype(np.int64), 2)
    truncated = lengths > LONGEST * mean
    return np.concatenate([[0], np.cumsum(np.minimum(lengths, LONGEST * mean))]), truncated


def _logprobs(rng: np.random.Generator, count: int, doubt: float) -> np.ndarray:
    """Three of four tokens are all but certain. The logarithm of a float32 sum, as a softmax has it: near 0 there are
    few distinct values."""
    found = np.empty(count, np.float32)
    for chunk in _chunks(found):
        sure = np.exp(np.minimum(rng.standard_normal(len(chunk), np.float32) * 4 - 9, 0))
        unsure = rng.standard_exponential(len(chunk), np.float32) * np.float32(1.3 * doubt)
        surprise = np.where(rng.random(len(chunk), np.float32) < 0.25, unsure, sure)
        chunk[:] = -np.log(np.exp(surprise))
    return found


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[start : start + _CHUNK] for start in range(0, len(array), _CHUNK))


def _lists(values: Any, offsets: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def _same(value: str, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(value), count)
