"""Equal to the reference, but for white space."""

from __future__ import annotations

from npo_core.interfaces import Verdict
from npo_core.verifiers.extract import final_answer
from npo_core.verifiers.judges import Judge, Question, compared, nothing_found
from schemas.verifier import VerifierSection

VERSION = "1"


def build(section: VerifierSection) -> Judge:
    """See `Judge`."""

    def judge(question: Question) -> Verdict:
        found = final_answer(question.text, section.extract)
        if found is None:
            return nothing_found(question.answer)
        return compared(found.split() == question.answer.split(), found, question.answer)

    return judge
