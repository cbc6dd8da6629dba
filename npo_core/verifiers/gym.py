"""reasoning-gym's own scores: the reward is the score, and only a score of 1 is correct."""

from __future__ import annotations

from npo_core.interfaces import Verdict
from npo_core.verifiers.extract import final_answer
from npo_core.verifiers.judges import Judge, Question, UnusableReferenceError, nothing_found, printable
from schemas.verifier import VerifierSection

VERSION = "1"


def build(section: VerifierSection) -> Judge:
    """See `Judge`. A question's metadata are {"dataset": name, "entry": reasoning-gym's whole entry}."""
    from reasoning_gym import get_score_answer_fn

    def judge(question: Question) -> Verdict:
        try:
            dataset, entry = question.metadata["dataset"], question.metadata["entry"]
            score_answer = get_score_answer_fn(dataset)
        except (TypeError, KeyError, ValueError) as error:
            raise UnusableReferenceError(
                f'its metadata are not {{"dataset": name, "entry": {{…}}}} of reasoning-gym ({error!r})'
            ) from error
        found = final_answer(question.text, section.extract)
        if found is None:
            return nothing_found(question.answer)
        score = float(score_answer(answer=found, entry=entry))
        return Verdict(
            score, score == 1.0, "correct" if score == 1.0 else f"score {score:g} for {printable(found, 100)}"
        )

    return judge
