"""Prompts by stable identifier: which ones a step trains on, their Parquet form and their tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from npo_core.interfaces import ConfigurationError, Prompt, first_line
from npo_core.streams import philox
from schemas.chat import ChatSection
from schemas.digest import canonical_json
from schemas.tables import PROMPTS

PLAIN = ChatSection()


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


def encode(tokenizer: Any, prompt: Prompt, chat: ChatSection = PLAIN) -> np.ndarray:
    """Token ids of a prompt, int32 [L], by the tokenizer's chat template, up to where the answer begins.

    Args:
        chat: the system prompt, where the prompt has none of its own, and the template's switch.
    """
    messages = [dict(message) for message in prompt.messages]
    if chat.system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": chat.system_prompt})
    switch = {} if chat.enable_thinking is None else {"enable_thinking": chat.enable_thinking}
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False, **switch
    )
    return np.asarray(ids, dtype=np.int32)


def counter(tokenizer: Any, chat: ChatSection) -> Callable[[Prompt], int]:
    """Counts a prompt's tokens; raises ValueError, with the template's words, for a prompt that it refuses.

    Raises:
        ConfigurationError: there is no chat template, or it has no switch `enable_thinking` that is to be set.
    """
    if not tokenizer.chat_template:
        raise ConfigurationError(
            "the tokenizer has no chat template, which turns a conversation into tokens; take an instruct model, or "
            "put the template into the model directory as chat_template.jinja"
        )

    def count(prompt: Prompt) -> int:
        try:
            length = len(encode(tokenizer, prompt, chat))
        except Exception as error:  # a template raises what it likes
            reason = first_line(error)
            hint = "" if chat.system_prompt is None else "; it may know no system message: remove chat.system_prompt"
            raise ValueError(f"{reason}{hint}") from error
        if not length:
            raise ValueError("it has no tokens")
        return length

    if chat.enable_thinking is not None:
        texts = {
            tokenizer.apply_chat_template(
                [dict(message) for message in ASKED.messages],
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=value,
            )
            for value in (True, False)
        }
        if len(texts) == 1:
            raise ConfigurationError(
                f"chat.enable_thinking {chat.enable_thinking}: the model's chat template has no such switch, so "
                "nothing would come of it; leave it out"
            )
    return count


ASKED = Prompt("made-up", "made-up", ({"role": "user", "content": "1 + 1 = ?"},), "2")
"""What a template or a verifier is tried on where there are no prompts."""
