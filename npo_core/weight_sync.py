"""The guard of a weight sync: an engine that was given weights must give the trainer's log-probabilities.

An engine may report success and keep its old weights: vLLM's `reload_weights` does, on CPUs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from npo_core.interfaces import NearFutureError

logger = logging.getLogger("npo")


@dataclass(frozen=True)
class Agreement:
    """How far an engine's log-probabilities of a probe are from the trainer's, in nats a token."""

    tokens: int
    mean: float
    """Mean absolute difference; NaN or infinite if a log-probability is."""
    largest: float

    def within(self, tolerance: float) -> bool:
        """Whether the mean is at most this. A difference that is not finite never is."""
        return self.mean <= tolerance

    def __str__(self) -> str:
        return f"mean |Δ log p| {self.mean:.2e}, largest {self.largest:.2e} over {self.tokens} tokens"


@dataclass(frozen=True)
class Sync:
    """One way to give an engine the weights."""

    name: str
    """In words."""
    run: Callable[[], None]


def compare(engine: Sequence[np.ndarray], trainer: Sequence[np.ndarray]) -> Agreement:
    """The agreement on the same tokens, rows of the same lengths."""
    differences = np.abs(np.concatenate(engine).astype(np.float64) - np.concatenate(trainer).astype(np.float64))
    return Agreement(len(differences), float(differences.mean()), float(differences.max()))


def synchronize(ways: Sequence[Sync], probe: Callable[[], Agreement], tolerance: float) -> Agreement:
    """Syncs by the first way after which the probe agrees.

    Args:
        ways: tried in order, the cheapest first.
        probe: compares engine and trainer as they are now.
        tolerance: see `Agreement.within`.

    Raises:
        NearFutureError: it agrees after none; names every way's figures.
    """
    failed: list[str] = []
    for way in ways:
        try:
            way.run()
            agreement = probe()
        except NearFutureError as error:
            failed.append(f"{way.name}: {error}")
            logger.warning("the engine could not be given the weights by %s", failed[-1])
            continue
        if agreement.within(tolerance):
            logger.info("the engine holds the trainer's weights, by %s: %s", way.name, agreement)
            return agreement
        failed.append(f"{way.name}: {agreement}")
        logger.warning("the engine does not hold the trainer's weights after %s (tolerance %g)", failed[-1], tolerance)
    raise NearFutureError(
        f"the engine does not hold the trainer's weights ({'; '.join(failed)}; vllm.tolerance {tolerance:g}), so "
        "it samples from another policy; raise vllm.tolerance only if the engine's arithmetic explains the difference, "
        "or let transformers sample (vllm.samples)"
    )
