"""Makes the testbed's starting policy: supervised learning on demonstrations in which each step may follow a habit.

The policy then knows the right and the wrong rule of every family, as a pretrained model does. The stage
`npo stage warm-start RUN --rebuild DIR` makes the shipped model again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from npo_core.demonstrations import IGNORED, descend, deterministic, seal
from npo_core.progress import progress_bar
from npo_core.streams import philox
from npo_core.testbed.families import FAMILIES, draw
from npo_core.testbed.tokenizer import END, PAD, VOCABULARY, build_tokenizer


@dataclass(frozen=True)
class WarmStartRecipe:
    """Everything that the weights depend on, besides the torch build."""

    seed: int = 0
    threads: int = 1
    steps: int = 1800
    """AdamW steps."""
    batch: int = 64
    """Demonstrations a step."""
    habit: float = 0.4
    """Probability that a step of a demonstration follows the wrong habit."""
    min_length: int = 4
    max_length: int = 12
    """Input symbols of a demonstration, uniform between the two."""
    learning_rate: float = 2e-3
    """Peak."""
    warmup_steps: int = 50
    final_fraction: float = 0.1
    """Learning rate of the last step, as a fraction of the peak; the decay is linear."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    hidden: int = 96
    layers: int = 3
    heads: int = 4
    head_dim: int = 24
    mlp: int = 288
    rope_theta: float = 10_000.0
    max_positions: int = 64

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        return self.learning_rate * (1 - (1 - self.final_fraction) * done)


def build_model(recipe: WarmStartRecipe) -> Qwen3ForCausalLM:
    """The untrained model, float32; initial weights come from torch's global generator."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(VOCABULARY),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.mlp,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            head_dim=recipe.head_dim,
            max_position_embeddings=recipe.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
            tie_word_embeddings=True,
            pad_token_id=VOCABULARY.index(PAD),
            eos_token_id=VOCABULARY.index(END),
            bos_token_id=None,
            dtype="float32",
        )
    )


def demonstrations(
    recipe: WarmStartRecipe, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """One batch: (token ids, labels), int64 [B, L+T], right-padded; the labels hold the working and its end token."""
    rows = []
    for _ in range(recipe.batch):
        family = FAMILIES[rng.integers(len(FAMILIES))]
        problem = draw(family, int(rng.integers(recipe.min_length, recipe.max_length + 1)), rng)
        habits = (rng.random(len(problem.digits)) < recipe.habit).tolist()
        rows.append((tokenizer.encode(problem.text), tokenizer.encode(problem.working(habits) + END)))
    width = max(len(prompt) + len(working) for prompt, working in rows)
    ids_BT = torch.full((recipe.batch, width), tokenizer.pad_token_id)
    labels_BT = torch.full((recipe.batch, width), IGNORED)
    for row, (prompt, working) in enumerate(rows):
        stop = len(prompt) + len(working)
        ids_BT[row, :stop] = torch.tensor(prompt + working)
        labels_BT[row, len(prompt) : stop] = torch.tensor(working)
    return ids_BT, labels_BT


def train(recipe: WarmStartRecipe, target: Path, on_step: Callable[[int, float], None] | None = None) -> str:
    """Trains the policy and writes a model directory: configuration, weights, tokenizer, and `recipe.json`.

    Args:
        recipe: what to do.
        target: directory; created if absent.
        on_step: called after each step with its number, from 0, and its loss in nats a token.

    Returns:
        Hexadecimal SHA-256 of `model.safetensors`; equal recipes give equal weights on one torch build.
    """
    transformers_logging.disable_progress_bar()
    tokenizer = build_tokenizer()
    rng = philox("warm start", recipe.seed)
    with deterministic(recipe):
        model = build_model(recipe).train()

        def loss_of(_: int) -> Tensor:
            ids_BT, labels_BT = demonstrations(recipe, tokenizer, rng)
            # Causal attention: right padding needs no mask, nothing that is learned looks at it.
            logits_BTV = model(input_ids=ids_BT).logits[:, :-1]
            return cross_entropy(logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED)

        optimizer = torch.optim.AdamW(model.parameters(), betas=recipe.betas, weight_decay=recipe.weight_decay)
        descend(recipe, optimizer, loss_of, on_step)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return seal(recipe, target)


def rebuild(target: Path) -> tuple[str, str]:
    """Trains the shipped policy again, by the shipped recipe, into `target`.

    Returns:
        Digest of the new weights, and of the shipped ones. They are equal on the torch build and processor that made
        the shipped ones.
    """
    shipped = json.loads((Path(__file__).parent / "data" / "recipe.json").read_text())
    recipe = WarmStartRecipe(**{**shipped["recipe"], "betas": tuple(shipped["recipe"]["betas"])})
    with progress_bar("warm start", recipe.steps) as bar:
        digest = train(recipe, target, lambda step, loss: bar(step + 1, {"loss": loss}))
    return digest, shipped["sha256"]
