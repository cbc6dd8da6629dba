"""The guard of a weight sync: an engine that was given weights must give the trainer's log-probabilities.

An engine may report success and keep old weights: vLLM's `reload_weights` keeps those of the linear layers, on CPUs.
One step may move the policy by less than the tolerance, so a tolerance alone would pass weights that are a step old.
Hence an update in place has to do better: agree about as well as the fresh engine did, and change the engine's answers
if the policy's changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
    kept: bool = False
    """Whether the engine answered as it did before its update, to the bit, while the trainer's policy moved."""

    def within(self, tolerance: float) -> bool:
        """Whether the engine moved with the trainer, and the mean is at most this. A difference that is not finite
        never is."""
        return self.mean <= tolerance and not self.kept

    def __str__(self) -> str:
        figures = f"mean |Δ log p| {self.mean:.2e}, largest {self.largest:.2e} over {self.tokens} tokens"
        return figures + (", and its answers are those of before, though the policy moved" if self.kept else "")


@dataclass(frozen=True)
class Probe:
    """An engine's answers to fixed prompts under fixed seeds, with the trainer's view of them."""

    ids: Sequence[np.ndarray]
    engine: Sequence[np.ndarray]
    """Log-probabilities by the engine that sampled them, a row an answer."""
    trainer: Sequence[np.ndarray]
    """Of the same tokens by the trainer."""

    def agreement(self, before: Probe | None) -> Agreement:
        """How far engine and trainer are apart.

        Args:
            before: of the same engine before an update in place; None for a fresh engine.
        """
        kept = (
            before is not None
            and _equal(before.ids, self.ids)
            and _equal(before.engine, self.engine)
            and not _equal(before.trainer, self.trainer)
        )
        return replace(compare(self.engine, self.trainer), kept=kept)


def compare(engine: Sequence[np.ndarray], trainer: Sequence[np.ndarray]) -> Agreement:
    """The agreement on the same tokens, rows of the same lengths."""
    differences = np.abs(np.concatenate(engine).astype(np.float64) - np.concatenate(trainer).astype(np.float64))
    return Agreement(len(differences), float(differences.mean()), float(differences.max()))


def _equal(before: Sequence[np.ndarray], now: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(before, now, strict=True))


@dataclass(frozen=True)
class Sync:
    """One way to give an engine the weights."""

    name: str
    """In words."""
    run: Callable[[], None]
    tolerance: float
    """Largest mean difference of the probe's log-probabilities after it, in nats a token."""


def synchronize(ways: Sequence[Sync], probe: Callable[[], Agreement]) -> Agreement:
    """Syncs by the first way after which the probe agrees.

    Args:
        ways: tried in order, the cheapest first.
        probe: compares engine and trainer as they are now.

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
        if agreement.within(way.tolerance):
            logger.info("the engine holds the trainer's weights, by %s: %s", way.name, agreement)
            return agreement
        failed.append(f"{way.name}: {agreement}, tolerance {way.tolerance:.1e}")
        logger.warning("the engine does not hold the trainer's weights after %s", failed[-1])
    raise NearFutureError(
        f"the engine does not hold the trainer's weights ({'; '.join(failed)}), so it samples from another policy; "
        "raise vllm.tolerance only if the engine's arithmetic explains the difference, or let transformers sample "
        "(vllm.samples)"
    )
