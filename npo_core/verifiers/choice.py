"""One letter of a multiple choice."""

from __future__ import annotations

import re

from npo_core.interfaces import Verdict
from npo_core.verifiers.extract import final_answer
from npo_core.verifiers.judges import Judge, Question, UnusableReferenceError, compared, nothing_found
from schemas.verifier import VerifierSection

VERSION = "1"
_LETTER = re.compile(
    r"[\s$*(\[{]{0,9}(?:\\(?:text|textbf|mathrm|mathbf)\{)?[\s*(\[{]{0,9}([A-Za-z])(?=[.)\]}:,*$]|\s{0,9}\Z)"
)
"""B, (B), **B**, B) some words, \\text{B}; not the first letter of a sentence."""


def build(section: VerifierSection) -> Judge:
    """See `Judge`."""

    def judge(question: Question) -> Verdict:
        want = _letter(question.answer)
        if want is None:
            raise UnusableReferenceError("it is not one letter")
        found = final_answer(question.text, section.extract)
        got = None if found is None else _letter(found)
        return nothing_found(want) if got is None else compared(got == want, got, want)

    return judge


def _letter(text: str) -> str | None:
    found = _LETTER.match(text)
    return found.group(1).upper() if found else None
