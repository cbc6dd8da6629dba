"""What every kind of verifier is: a function of one question, and the words that it finds for its verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from npo_core.interfaces import Verdict

MOST_WORDS = 300
"""Characters of a reason."""


class UnusableReferenceError(Exception):
    """The data's reference answer is none that this kind of verifier can compare with."""


@dataclass(frozen=True)
class Question:
    """What a judge is asked."""

    answer: str
    """The reference."""
    text: str
    """What the policy wrote."""
    messages: tuple[Mapping[str, Any], ...] = ()
    metadata: Any = None
    """The prompt's JSON object."""


Judge = Callable[[Question], Verdict]
"""Raises only where it cannot judge."""


def compared(correct: bool, got: str, want: str) -> Verdict:
    """Reward 1 or 0, and why."""
    if correct:
        return Verdict(1.0, True, "correct")
    return Verdict(0.0, False, f"got {printable(got, 100)}, want {printable(want, 100)}")


def nothing_found(want: str) -> Verdict:
    """There is no answer in the text."""
    return Verdict(0.0, False, f"no answer found, want {printable(want, 100)}")


def printable(text: str, most: int = MOST_WORDS) -> str:
    """One line that every file and terminal takes, whatever the text holds."""
    line = "".join(c if c.isprintable() else " " for c in text[: most + 1])
    return line if len(text) <= most else line[:most] + "…"
