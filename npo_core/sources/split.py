"""Which prompts are held out: decided by the hash of what a prompt asks, so that it does not depend on their order."""

from __future__ import annotations

from collections.abc import Sequence

from npo_core.interfaces import Prompt
from schemas.digest import digest_json


def split(prompts: Sequence[Prompt], held_out: int | float) -> tuple[list[Prompt], list[Prompt]]:
    """(held-out set, the others), each in the order that they came in.

    A share is decided prompt by prompt, by its hash alone, so that no prompt changes sides when others come. Of a
    number of prompts the ones with the smallest hashes are held out: of those a new one may take one's place.
    """
    if isinstance(held_out, int):
        return apart(prompts, held_out)
    chosen = [_place(prompt) < held_out for prompt in prompts]
    return (
        [prompt for prompt, held in zip(prompts, chosen, strict=True) if held],
        [prompt for prompt, held in zip(prompts, chosen, strict=True) if not held],
    )


def question_of(prompt: Prompt) -> str:
    """What a prompt asks, whatever it is called."""
    return digest_json([[dict(message) for message in prompt.messages], list(prompt.image_refs)])


def _place(prompt: Prompt) -> float:
    """A prompt's place in [0, 1), by what it asks."""
    return int(question_of(prompt)[:13], 16) / 16**13


def apart(prompts: Sequence[Prompt], count: int | float | None) -> tuple[list[Prompt], list[Prompt]]:
    """(`count` prompts by the smallest hashes, or that share, the others); None takes all."""
    if count is None:
        return list(prompts), []
    if isinstance(count, float):
        return split(prompts, count)
    order = sorted(range(len(prompts)), key=lambda i: question_of(prompts[i]))
    chosen = set(order[:count])
    return (
        [prompt for i, prompt in enumerate(prompts) if i in chosen],
        [prompt for i, prompt in enumerate(prompts) if i not in chosen],
    )
