"""Prompts by stable identifier: which ones a step trains on, their Parquet form and their tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from npo_core import shapes, testbed
from npo_core.interfaces import Prompt
from npo_core.streams import philox
from schemas.config import Config
from schemas.digest import canonical_json
from schemas.tables import PROMPTS


class PromptTable:
    """A `PromptSource` over a table in memory. Each epoch goes through a permutation of the pool which (seed, epoch)
    alone decide. What is left of the pool after its last whole batch waits for another epoch, so that the prompts of a
    step are always distinct.

    Args:
        table: prompts by `schemas.tables.PROMPTS`; the order of the rows counts.
        seed: of the permutations.
        prompts_per_step: size of a batch.

    Raises:
        ValueError: two prompts share an identifier, or the pool is smaller than a batch.
    """

    def __init__(self, table: pa.Table, seed: int, prompts_per_step: int) -> None:
        self._table = table.combine_chunks()
        self._rows = {prompt_id: row for row, prompt_id in enumerate(table["prompt_id"].to_pylist())}
        self._train, self._held_out = (
            pc.indices_nonzero(pc.equal(table["split"], split)).to_numpy() for split in ("train", "held_out")
        )
        self._seed, self._prompts_per_step = seed, prompts_per_step
        self._order: tuple[int, np.ndarray] | None = None
        if len(self._rows) != table.num_rows:
            raise ValueError("two prompts share a prompt_id")
        if not 0 < prompts_per_step <= len(self._train):
            raise ValueError(f"prompts_per_step {prompts_per_step} is not between 1 and the pool's {len(self._train)}")

    @property
    def pictured(self) -> bool:
        """Whether any prompt shows a picture."""
        return bool(pc.any(pc.greater(pc.list_value_length(self._table["image_refs"]), 0)).as_py())

    def get(self, prompt_id: str) -> Prompt:
        """See `PromptSource.get`."""
        return self._prompts([self._rows[prompt_id]])[0]

    def batch(self, step: int) -> list[Prompt]:
        """See `PromptSource.batch`."""
        return self._prompts(self._places(step))

    def batch_ids(self, step: int) -> list[str]:
        """The identifiers of `batch`."""
        return self._table["prompt_id"].take(pa.array(self._places(step))).to_pylist()

    def held_out(self) -> list[Prompt]:
        """See `PromptSource.held_out`."""
        return self._prompts(self._held_out)

    def _places(self, step: int) -> np.ndarray:
        """Rows of a step's batch."""
        epoch, turn = divmod(step, len(self._train) // self._prompts_per_step)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, philox("prompts", self._seed, epoch).permutation(len(self._train))
        return self._train[self._order[1][turn * self._prompts_per_step :][: self._prompts_per_step]]

    def _prompts(self, places: Sequence[int] | np.ndarray) -> list[Prompt]:
        return [
            Prompt(
                prompt_id=row["prompt_id"],
                task=row["task"],
                messages=tuple(json.loads(row["messages"])),
                answer=row["answer"],
                image_refs=tuple(row["image_refs"]),
                metadata=row["metadata"],
            )
            for row in self._table.take(pa.array(places, pa.int64())).to_pylist()
        ]


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
            "metadata": prompt.metadata,
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
        case "shapes":
            data = config.data
            return shapes.make_prompts(
                data.prompts, data.held_out, data.min_length, data.max_length, seed=data.pool_seed
            )


def load_pictures(config: Config) -> Mapping[str, bytes]:
    """The picture files that the prompts of `load_source` show, by their SHA-256."""
    match config.data.source:
        case "testbed":
            return {}
        case "shapes":
            data = config.data
            return shapes.draw_pictures(
                data.prompts, data.held_out, data.min_length, data.max_length, seed=data.pool_seed
            )
