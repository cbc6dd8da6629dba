"""How the model is spoken to, and where its answers end."""

from __future__ import annotations

from pydantic import Field, field_validator

from schemas.section import Section


class ChatSection(Section):
    """What the model's chat template is given beside the prompt, and what ends an answer beside its end token. It holds
    for rollouts, guides and evaluations alike."""

    system_prompt: str | None = Field(None, min_length=1)
    """Put before each conversation which has no system message of its own."""
    enable_thinking: bool | None = None
    """The switch of this name in the model's chat template (Qwen3 has one). None: as the template has it."""
    stop: tuple[str, ...] = Field((), max_length=16)
    """Texts that end an answer. The text belongs to the answer, as an end token does, and the verifier reads it."""

    @field_validator("stop")
    @classmethod
    def _can_be_found(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            if not text or text.startswith(" "):
                raise ValueError(
                    f"{text!r} is empty or begins with a space, which some tokenizers drop at the start of an answer; "
                    "leave the space out"
                )
        return value
