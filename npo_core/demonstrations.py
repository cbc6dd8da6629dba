"""Supervised learning of the policies that ship with the package: the same weights each time on one kind of machine."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from schemas.digest import digest_bytes

IGNORED = -100
"""Label of a token that is not learned: prompt and padding."""


class Recipe(Protocol):
    """A dataclass with everything that the weights depend on."""

    @property
    def seed(self) -> int:
        """Of torch's global generator."""

    @property
    def threads(self) -> int:
        """torch's, which change sums by rounding."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""

    @property
    def max_grad_norm(self) -> float:
        """The gradient is clipped to this norm."""

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of `step`, counted from 0."""


def descend(
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[int], Tensor],
    on_step: Callable[[int, float], None] | None,
) -> None:
    """Takes the recipe's steps.

    Args:
        loss_of: draws a step's demonstrations and gives their loss, nats a token.
        on_step: called after each step with its number, from 0, and its loss.
    """
    for step in range(recipe.steps):
        loss = loss_of(step)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step)
        optimizer.zero_grad()
        loss.backward()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        if on_step is not None:
            on_step(step, loss.item())


@contextlib.contextmanager
def deterministic(recipe: Recipe) -> Iterator[None]:
    """The recipe's seed and threads, and the caller's again afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            yield
    finally:
        torch.set_num_threads(threads)


def seal(recipe: Any, target: Path) -> str:
    """Writes `recipe.json` beside a model's weights.

    Args:
        recipe: a dataclass.

    Returns:
        Hexadecimal SHA-256 of `model.safetensors`.
    """
    digest = digest_bytes((target / "model.safetensors").read_bytes())
    document = {"recipe": asdict(recipe), "sha256": digest, "torch": torch.__version__}
    (target / "recipe.json").write_text(json.dumps(document, indent=2) + "\n")
    return digest
