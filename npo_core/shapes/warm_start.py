"""Makes the starting policy of the shapes: supervised learning on demonstrations in which each step may follow a habit.

The policy then sees the pictures and knows the right and the wrong rule of every family. `python -m tests.bench.shapes
warm-start DIR` makes the shipped model again, and measures what it sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.utils import logging as transformers_logging

from npo_core.demonstrations import IGNORED, descend, deterministic, seal
from npo_core.padding import pad
from npo_core.pictures import PicturedPrompt, PictureEncoder, load_processor
from npo_core.shapes.families import FAMILIES, Question
from npo_core.shapes.model import END, ModelSizes, build_model, build_processor, build_tokenizer
from npo_core.shapes.scene import COLOURS, GRIDS, draw_scene
from npo_core.streams import philox
from npo_core.vision import Vision


@dataclass(frozen=True)
class WarmStartRecipe:
    """Everything that the weights depend on, besides the builds of torch and Pillow."""

    seed: int = 0
    threads: int = 1
    scenes: int = 2000
    """Pictures that the demonstrations are about."""
    steps: int = 1000
    """AdamW steps."""
    batch: int = 48
    """Demonstrations a step."""
    habit: float = 0.4
    """Probability that a step of a demonstration follows the wrong habit, from `sober_steps` on."""
    sober_steps: int = 500
    """Steps at the beginning whose demonstrations follow the right rule only, so that the model learns to see first."""
    learning_rate: float = 3e-3
    """Peak; warmed up over `warmup_steps`, then falling on a line to 0."""
    warmup_steps: int = 50
    max_grad_norm: float = 1.0
    sizes: ModelSizes = field(default_factory=ModelSizes)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        return self.learning_rate * (self.steps - step) / (self.steps - self.warmup_steps)


class Demonstrations:
    """Draws batches of demonstrations about a fixed set of pictures.

    Args:
        recipe: how many, and how often they follow the habit.
        model_dir: tokenizer and image processor.
    """

    def __init__(self, recipe: WarmStartRecipe, model_dir: Path) -> None:
        self.recipe, self.tokenizer = recipe, build_tokenizer()
        self.rng = philox("shapes warm start", recipe.seed)
        self.scenes = [draw_scene(GRIDS[n % len(GRIDS)], self.rng) for n in range(recipe.scenes)]
        files = {str(n): scene.draw() for n, scene in enumerate(self.scenes)}
        self._encoder = PictureEncoder(load_processor(model_dir), files.__getitem__)

    def batch(self, step: int) -> tuple[list[PicturedPrompt], list[np.ndarray]]:
        """(prompts, workings with their end token, int32 [T]) of a step."""
        prompts, workings = [], []
        habit = self.recipe.habit if step >= self.recipe.sober_steps else 0.0
        for _ in range(self.recipe.batch):
            n = int(self.rng.integers(len(self.scenes)))
            family = FAMILIES[self.rng.integers(len(FAMILIES))]
            colour = tuple(COLOURS)[self.rng.integers(len(COLOURS))] if family.names_colour else ""
            question = Question(family, self.scenes[n], colour)
            habits = (self.rng.random(len(question.scene.cells)) < habit).tolist()
            prompts.append(self._encoder.encode(self.tokenizer, question.prompt(str(n))))
            workings.append(np.array(self.tokenizer.encode(question.working(habits) + END), np.int32))
        return prompts, workings


def train(recipe: WarmStartRecipe, target: Path, on_step: Callable[[int, float], None] | None = None) -> str:
    """Trains the policy and writes a model directory: configuration, weights in bfloat16, tokenizer, image processor,
    and `recipe.json`.

    Args:
        recipe: what to do.
        target: directory; created if absent.
        on_step: called after each step with its number, from 0, and its loss in nats a token.

    Returns:
        Hexadecimal SHA-256 of `model.safetensors`; equal recipes give equal weights on one machine kind.
    """
    transformers_logging.disable_progress_bar()
    build_tokenizer().save_pretrained(target)
    build_processor().save_pretrained(target)
    with deterministic(recipe):
        model = build_model(recipe.sizes).train()
        model.config.save_pretrained(target)
        vision, shown = Vision(model), Demonstrations(recipe, target)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
        descend(recipe, optimizer, lambda step: demonstration_loss(model, vision, *shown.batch(step)), on_step)
    model.to(torch.bfloat16).save_pretrained(target)
    return seal(recipe, target)


def demonstration_loss(
    model: torch.nn.Module, vision: Vision, prompts: list[PicturedPrompt], workings: list[np.ndarray]
) -> Tensor:
    """Cross entropy of the workings, nats a token."""
    rows = [np.concatenate(pair) for pair in zip(prompts, workings, strict=True)]
    ids_BL, mask_BL = pad(rows, "right", torch.device("cpu"))
    labels_BL = ids_BL.masked_fill(mask_BL == 0, IGNORED)
    for i, prompt in enumerate(prompts):
        labels_BL[i, : len(prompt)] = IGNORED
    hidden_BLH = vision.hidden_states(prompts, ids_BL, mask_BL, vision.place(prompts, mask_BL))
    logits_BLV = model.get_output_embeddings()(hidden_BLH[:, :-1])  # type: ignore[operator]
    return cross_entropy(logits_BLV.flatten(0, 1), labels_BL[:, 1:].flatten(), ignore_index=IGNORED)
