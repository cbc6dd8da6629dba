"""What the DeepSpeed learner and its ranks tell each other, beside the commands."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from npo_core import frames
from npo_core.interfaces import TrainBatch

CONFIG_FILE, SOCKET, FAILURE = "config.json", "socket", "failed-{}.json"
"""In the directory of a session."""
PAIR = ("prompts", "completions")


def batch_arrays(batch: TrainBatch, reference: list[np.ndarray] | None) -> dict[str, np.ndarray]:
    """A batch, and its rows' log-probabilities under the starting policy, as `batch_of` reads them."""
    arrays = {
        **frames.ragged("prompts", batch.prompt_ids, np.int32),
        **frames.ragged("completions", batch.completion_ids, np.int32),
        **frames.ragged("guide_logprobs", batch.guide_logprobs, np.float32),
        "advantages": batch.advantages_B,
        "guide": batch.guide_B,
    }
    for name, rows in (("behavior_logprobs", batch.behavior_logprobs), ("reference", reference)):
        if rows is not None:
            arrays |= frames.ragged(name, rows, np.float32)
    return arrays


def batch_of(step: int, arrays: Mapping[str, np.ndarray]) -> tuple[TrainBatch, list[np.ndarray] | None]:
    """What `batch_arrays` packed."""
    prompts, completions = (frames.rows_of(name, arrays) for name in PAIR)
    guide_logprobs = frames.rows_of("guide_logprobs", arrays)
    behavior, reference = (
        frames.rows_of(name, arrays) if name in arrays else None for name in ("behavior_logprobs", "reference")
    )
    batch = TrainBatch(step, prompts, completions, arrays["advantages"], arrays["guide"], guide_logprobs, behavior)
    return batch, reference
