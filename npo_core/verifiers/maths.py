"""Mathematical equality, by math-verify."""

from __future__ import annotations

import logging

from npo_core.interfaces import Verdict
from npo_core.verifiers.extract import final_answer
from npo_core.verifiers.judges import Judge, Question, UnusableReferenceError, compared, nothing_found
from schemas.verifier import VerifierSection

VERSION = "1"


def build(section: VerifierSection) -> Judge:
    """See `Judge`."""
    import sympy.core.random
    from math_verify import parse, verify

    # It warns that its own time limit is off: ours ends the process, its own would need the main thread's alarm, and
    # does not interrupt a long multiplication.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def parsed(text: str) -> list[object]:
        for form in (text, f"${text}$"):
            if found := parse(form, parsing_timeout=None):
                return found
        return []

    def judge(question: Question) -> Verdict:
        # Some of sympy's tests of equality draw numbers.
        sympy.core.random.seed(0)
        want = parsed(question.answer)
        if not want:
            raise UnusableReferenceError("math-verify finds no expression in it")
        found = final_answer(question.text, section.extract)
        got = [] if found is None else parsed(found)
        if found is None or not got:
            return nothing_found(question.answer)
        return compared(verify(want, got, timeout_seconds=None), found, question.answer)

    return judge
