"""Mathematical equality, by math-verify."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from npo_core.interfaces import Verdict
from npo_core.verifiers.extract import final_answer
from npo_core.verifiers.judges import Judge, Question, UnusableReferenceError, compared, nothing_found
from schemas.verifier import VerifierSection

VERSION = "1"
_MARKED = re.compile(r"\$|\\[(\[]|\\boxed")
_LATEX_WORDS = re.compile(r"\\(?:text|mathrm|mbox)\{[^{}]*\}")
_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sqrt|pi|sin|cos|tan|log|ln|exp)(?![A-Za-z]))[A-Za-z]{2}")


def build(section: VerifierSection) -> Judge:
    """See `Judge`."""
    import sympy.core.random
    from math_verify import parse, verify

    # It warns that its own time limit is off: ours ends the process, its own would need the main thread's alarm, and
    # does not interrupt a long multiplication.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def parsed(forms: Sequence[str]) -> list[object]:
        return next((found for form in forms if (found := parse(form, parsing_timeout=None))), [])

    def judge(question: Question) -> Verdict:
        # Some of sympy's tests of equality draw numbers.
        sympy.core.random.seed(0)
        want = parsed(_forms(question.answer))
        if not want:
            raise UnusableReferenceError("math-verify finds no expression in it")
        box = final_answer(question.text, "boxed") if section.extract in ("auto", "boxed") else None
        found = box if box is not None else final_answer(question.text, section.extract)
        if found is None:
            return nothing_found(question.answer)
        got = parsed((f"\\boxed{{{found}}}",) if box is not None else _forms(found))
        if not got:
            return nothing_found(question.answer)
        return compared(verify(want, got, timeout_seconds=None), found, question.answer)

    return judge


def _forms(text: str) -> tuple[str, ...]:
    """What to let math-verify read, the best form first. In a text it finds the formulas that are marked as such, and
    numbers else: of a bare `5\\pi` only the 5. So a bare formula is marked, and words around a number are not."""
    if _MARKED.search(text):
        return (text,)
    marked = f"${text}$"
    return (text, marked) if _WORD.search(_LATEX_WORDS.sub("", text)) else (marked, text)
