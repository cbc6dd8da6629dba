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
    return arrays if reference is None else arrays | frames.ragged("reference", reference, np.float32)


def batch_of(step: int, arrays: Mapping[str, np.ndarray]) -> tuple[TrainBatch, list[np.ndarray] | None]:
    """What `batch_arrays` packed."""
    prompts, completions = (frames.rows_of(name, arrays) for name in PAIR)
    guide_logprobs = frames.rows_of("guide_logprobs", arrays)
    batch = TrainBatch(step, prompts, completions, arrays["advantages"], arrays["guide"], guide_logprobs)
    return batch, frames.rows_of("reference", arrays) if "reference" in arrays else None
