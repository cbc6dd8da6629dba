"""The testbed's verifier: the whole working, exactly. A last digit alone could be guessed."""

from __future__ import annotations

from npo_core.interfaces import Prompt, Verdict, Verifier


class TestbedVerifier(Verifier):
    """Accepts a text that equals the prompt's working. Reward 1.0 or 0.0."""

    __test__ = False  # not a test class, whatever pytest makes of its name
    name = "testbed/1"

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """See `Verifier.verify`. `text` is the completion without special tokens."""
        reason = _reason(prompt.answer, text)
        return Verdict(reward=float(not reason), correct=not reason, reason=reason or "correct")


def _reason(answer: str, text: str) -> str:
    """What is wrong, in words; empty if nothing is."""
    for place, (want, got) in enumerate(zip(answer, text, strict=False), start=1):
        if want != got:
            # ascii(): the reason stays one printable line, whatever the text holds.
            return f"first differs at symbol {place}: got {ascii(got)[1:-1]}, want {want}"
    if len(text) == len(answer):
        return ""
    return f"too {'short' if len(text) < len(answer) else 'long'}: {len(text)} symbols, want {len(answer)}"
