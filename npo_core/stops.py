"""Texts that end an answer, found in its token ids: the same tokens end the same answer, whichever engine samples."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MARGIN = 4
"""Tokens before the bytes of a text: a window's first token may decode to less than it does in its place."""


@dataclass(frozen=True)
class Stops:
    """Texts that end an answer: it ends with the first token after which its text holds one of them.

    Args:
        texts: at least one, none empty.
        decode: token ids to text, special tokens included, without tidying spaces.
    """

    texts: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]

    @classmethod
    def of(cls, texts: tuple[str, ...], tokenizer: Any) -> Stops | None:
        """These texts under a transformers tokenizer; None if there are none."""

        def decode(ids: Sequence[int]) -> str:
            return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

        return cls(texts, decode) if texts else None

    def length(self, ids: np.ndarray) -> int | None:
        """Tokens of the answer that `ids` begin with; None: it is not over after them.

        Args:
            ids: int32 [T].
        """
        row = ids.tolist()
        if not self._holds(row):
            return None
        # A text that is there after t tokens is there after more.
        return bisect_left(range(len(row) + 1), True, key=lambda t: self._holds(row[:t]))

    def ended(self, ids: np.ndarray) -> bool:
        """Whether an answer that was not over before its last token is over now.

        Args:
            ids: int32 [T].
        """
        # A token has at least one byte, so the end of a text is within as many tokens.
        window = MARGIN + max(len(text.encode()) for text in self.texts)
        return self._holds(ids[-window:].tolist()) and self._holds(ids.tolist())

    def _holds(self, ids: Sequence[int]) -> bool:
        text = self.decode(ids)
        return any(stop in text for stop in self.texts)
