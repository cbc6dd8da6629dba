"""The final answer in a text, in time linear in its length, whatever it holds."""

from __future__ import annotations

import re
from collections import deque

from schemas.verifier import Extract

# Every repetition before the answer is bounded: hostile texts cost no backtracking.
_STATED = re.compile(
    r"####[ \t]{0,9}(?P<a>\S[^\n]*)"
    r"|\banswer(?:[ \t]{1,9}is)?[ \t]{0,9}\*{0,2}[ \t]{0,9}[:：][ \t]{0,9}\*{0,2}[ \t]{0,9}(?P<b>\S[^\n]*)"
    r"|\b(?:the|final)[ \t]{1,9}answer[ \t]{1,9}is[ \t]{1,9}(?P<c>[^\s:：][^\n]*)",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\(?:boxed|fbox)[ \t]{0,9}\{")
NUMBER = re.compile(
    r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
)
"""A decimal number, thousands by commas or not."""


def final_answer(text: str, extract: Extract, numbers: bool = False) -> str | None:
    """The part of `text` that `extract` names; None if there is none.

    Args:
        numbers: `auto` ends with the last number instead of the whole text.
    """
    text = after_thinking(text)
    match extract:
        case "boxed":
            return _boxed(text)
        case "answer":
            return _stated(text)
        case "last-number":
            return _last_number(text)
        case "text":
            return text.strip() or None
        case "auto":
            for found in (_boxed(text), _stated(text)):
                if found is not None:
                    return found
            return _last_number(text) if numbers else text.strip() or None


def after_thinking(text: str) -> str:
    """What follows the last `</think>`; nothing while the thinking goes on. The opening tag may be in the prompt."""
    _, closed, after = text.rpartition("</think>")
    rest = after if closed else text
    return rest.partition("<think>")[0]


def _boxed(text: str) -> str | None:
    """What is in the last box; None if it does not close."""
    last = _last(_BOX, text)
    if last is None:
        return None
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[last.end() :], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if not depth:
            return text[last.end() : last.end() + brace.start()].strip() or None
    return None


def _stated(text: str) -> str | None:
    """What a tag or a phrase announces."""
    tagged, closed, _ = text.rpartition("</answer>")
    if closed:
        _, opened, inside = tagged.rpartition("<answer>")
        if opened:
            inner = inside.strip()
            return (_boxed(inner) or inner) or None
    last = _last(_STATED, text)
    if last is None:
        return None
    found = next(part for part in last.groups() if part is not None)
    return found.strip().rstrip("*").rstrip(" .") or None


def _last_number(text: str) -> str | None:
    last = _last(NUMBER, text)
    return last.group() if last else None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)
