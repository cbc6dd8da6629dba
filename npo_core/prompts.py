"""Prompts by stable identifier: which ones a step trains on, their Parquet form and their tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from npo_core import testbed
from npo_core.interfaces import Prompt, Verifier
from npo_core.streams import philox
from schemas.config import Config
from schemas.digest import canonical_json
from schemas.tables import PROMPTS


class PromptTable:
    """A `PromptSource` in memory. Each epoch goes through a permutation of the pool which (seed, epoch) alone decide.
    What is left of the pool after its last whole batch waits for another epoch, so that the prompts of a step are
    always distinct.

    Args:
        train: the training pool.
        held_out: the prompts of the evaluation.
        seed: of the permutations.
        prompts_per_step: size of a batch.

    Raises:
        ValueError: two prompts share an identifier, or the pool is smaller than a batch.
    """

    def __init__(self, train: Sequence[Prompt], held_out: Sequence[Prompt], seed: int, prompts_per_step: int) -> None:
        self._train, self._held_out = list(train), list(held_out)
        self._by_id = {prompt.prompt_id: prompt for prompt in [*train, *held_out]}
        self._seed, self._prompts_per_step = seed, prompts_per_step
        if len(self._by_id) != len(train) + len(held_out):
            raise ValueError("two prompts share a prompt_id")
        if not 0 < prompts_per_step <= len(train):
            raise ValueError(f"prompts_per_step {prompts_per_step} is not between 1 and the pool's {len(train)}")

    @classmethod
    def from_arrow(cls, table: pa.Table, seed: int, prompts_per_step: int) -> PromptTable:
        """The source over a table by `schemas.tables.PROMPTS`; the order of its rows counts."""
        splits: dict[str, list[Prompt]] = {"train": [], "held_out": []}
        for row in table.to_pylist():
            splits[row["split"]].append(
                Prompt(
                    prompt_id=row["prompt_id"],
                    task=row["task"],
                    messages=tuple(json.loads(row["messages"])),
                    answer=row["answer"],
                    image_refs=tuple(row["image_refs"]),
                )
            )
        return cls(splits["train"], splits["held_out"], seed, prompts_per_step)

    def get(self, prompt_id: str) -> Prompt:
        """See `PromptSource.get`."""
        return self._by_id[prompt_id]

    def batch(self, step: int) -> list[Prompt]:
        """See `PromptSource.batch`."""
        epoch, turn = divmod(step, len(self._train) // self._prompts_per_step)
        order = philox("prompts", self._seed, epoch).permutation(len(self._train))
        return [self._train[n] for n in order[turn * self._prompts_per_step :][: self._prompts_per_step]]

    def held_out(self) -> list[Prompt]:
        """See `PromptSource.held_out`."""
        return list(self._held_out)


def to_arrow(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> pa.Table:
    """Both splits as a table by `schemas.tables.PROMPTS`, in their order, the training pool first."""
    rows = [
        {
            "prompt_id": prompt.prompt_id,
            "split": split,
            "task": prompt.task,
            "messages": canonical_json([dict(message) for message in prompt.messages]).decode(),
            "answer": prompt.answer,
            "image_refs": list(prompt.image_refs),
        }
        for split, prompts in (("train", train), ("held_out", held_out))
        for prompt in prompts
    ]
    return pa.Table.from_pylist(rows, schema=PROMPTS)


def encode(tokenizer: Any, prompt: Prompt) -> np.ndarray:
    """Token ids of a prompt, int32 [L], by the tokenizer's chat template, up to where the answer begins."""
    ids = tokenizer.apply_chat_template(
        [dict(message) for message in prompt.messages], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return np.asarray(ids, dtype=np.int32)


def load_source(config: Config) -> tuple[list[Prompt], list[Prompt]]:
    """(training pool, held-out set) that the configuration names.

    Raises:
        ConfigurationError: there are not as many prompts as it wants.
    """
    match config.data.source:
        case "testbed":
            data = config.data
            return testbed.make_prompts(
                data.prompts, data.held_out, data.min_length, data.max_length, seed=data.pool_seed
            )


def load_verifier(config: Config) -> Verifier:
    """The verifier of the configuration's prompts."""
    match config.data.source:
        case "testbed":
            return testbed.TestbedVerifier()
