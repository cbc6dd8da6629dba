"""Whether a policy sees: its accuracy with each question's own picture, and with another picture of the same size.

A policy that answered from the question alone, or from the size of the picture, would do as well with either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from npo_core.generate import TransformersGenerator
from npo_core.interfaces import SamplingParams, StreamKey
from npo_core.pictures import PicturedPrompt, PictureEncoder, load_processor
from npo_core.policy import Policy
from npo_core.shapes import draw_pictures, make_prompts
from npo_core.shapes.model import END, VOCABULARY, build_tokenizer
from npo_core.streams import philox
from schemas.learner import LearnerSection
from schemas.model import ModelSection

K = TypeVar("K")

LENGTHS = (3, 12)
LONGEST = 14
"""Tokens of an answer."""


@dataclass(frozen=True)
class Sight:
    """Shares of answers that are right, with the right picture and with a swapped one."""

    right: float
    swapped: float
    tasks: dict[str, tuple[float, float]]
    """Both by family."""
    cells: dict[int, tuple[float, float]]
    """Both by the number of cells."""


def measure(model_dir: Path, prompts: int, samples: int, temperature: float, seed: int = 1) -> Sight:
    """Asks held-out questions with either picture.

    Args:
        prompts: how many questions.
        samples: answers to each; with temperature 0 one says all.
    """
    pool = (1, prompts, *LENGTHS, seed)
    held_out, files = make_prompts(*pool)[1], dict(draw_pictures(*pool))
    encoder, tokenizer = PictureEncoder(load_processor(model_dir), files.__getitem__), build_tokenizer()
    encoded = [encoder.encode(tokenizer, prompt) for prompt in held_out]
    policy = Policy(model_dir, ModelSection(), LearnerSection(device="cpu"))
    generator = TransformersGenerator(policy, max_rows=256)
    params = SamplingParams(temperature, LONGEST, (VOCABULARY.index(END),))
    found = []
    for asked in (encoded, swap(encoded)):
        streams = [StreamKey(0, "eval", 0, prompt.prompt_id, slot) for prompt in held_out for slot in range(samples)]
        answers = generator.sample(asked, samples, params, streams).completion_ids
        texts = [tokenizer.decode(ids[:-1] if ids[-1] == VOCABULARY.index(END) else ids) for ids in answers]
        found.append(np.array([text == held_out[i // samples].answer for i, text in enumerate(texts)]))
    asked_about = [prompt for prompt in held_out for _ in range(samples)]
    return Sight(
        float(found[0].mean()),
        float(found[1].mean()),
        _by([prompt.task for prompt in asked_about], found),
        _by([len(prompt.answer) for prompt in asked_about], found),
    )


def swap(prompts: Sequence[PicturedPrompt]) -> list[PicturedPrompt]:
    """The same questions, each with a picture of the same size that another one shows."""
    swapped = []
    for i, prompt in enumerate(prompts):
        (own,) = prompt.pictures
        others = sorted(
            {p.ref: p for q in prompts for p in q.pictures if p.grid == own.grid and p.ref != own.ref}.items()
        )
        other = others[int(philox("swap", i).integers(len(others)))][1]
        swapped.append(PicturedPrompt.of(prompt, [other]))
    return swapped


def _by(keys: Sequence[K], found: Sequence[np.ndarray]) -> dict[K, tuple[float, float]]:
    right, swapped = found
    return {
        key: (float(right[chosen].mean()), float(swapped[chosen].mean()))
        for key in sorted(set(keys), key=str)
        if (chosen := np.array([k == key for k in keys])).any()
    }
