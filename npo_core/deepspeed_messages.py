"""What the DeepSpeed learner and its ranks tell each other, beside the commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from npo_core import frames
from npo_core.interfaces import TrainBatch
from npo_core.pictures import Picture, PicturedPrompt, pictures_of

CONFIG_FILE, SOCKET, FAILURE = "config.json", "socket", "failed-{}.json"
"""In the directory of a session."""


def row_arrays(prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Rows as `rows_of` reads them: token ids, every picture once, cut, and the places of each prompt's pictures."""
    distinct = {picture.ref: picture for prompt in prompts for picture in pictures_of(prompt)}
    order = {ref: i for i, ref in enumerate(distinct)}
    shown = [np.array([order[picture.ref] for picture in pictures_of(prompt)], np.int64) for prompt in prompts]
    return {
        **frames.ragged("prompts", prompts, np.int32),
        **frames.ragged("completions", completions, np.int32),
        **frames.ragged("shown", shown, np.int64),
        **frames.ragged("patches", [picture.patches() for picture in distinct.values()], np.float32),
        "refs": np.array([ref.encode() for ref in distinct], np.bytes_),
        "grids": np.array([picture.grid for picture in distinct.values()], np.int64),
    }


def rows_of(arrays: Mapping[str, np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompts, with their pictures, and completions that `row_arrays` packed."""
    kept = zip(arrays["refs"], arrays["grids"], frames.rows_of("patches", arrays), strict=True)
    pictures = [_picture(bytes(ref).decode(), grid, patches) for ref, grid, patches in kept]
    prompts = [
        PicturedPrompt.of(ids, [pictures[i] for i in shown]) if len(shown) else ids
        for ids, shown in zip(frames.rows_of("prompts", arrays), frames.rows_of("shown", arrays), strict=True)
    ]
    return prompts, frames.rows_of("completions", arrays)


def batch_arrays(batch: TrainBatch, reference: list[np.ndarray] | None) -> dict[str, np.ndarray]:
    """A batch, and its rows' log-probabilities under the starting policy, as `batch_of` reads them."""
    arrays = {
        **row_arrays(batch.prompt_ids, batch.completion_ids),
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
    prompts, completions = rows_of(arrays)
    guide_logprobs = frames.rows_of("guide_logprobs", arrays)
    behavior, reference = (
        frames.rows_of(name, arrays) if name in arrays else None for name in ("behavior_logprobs", "reference")
    )
    batch = TrainBatch(step, prompts, completions, arrays["advantages"], arrays["guide"], guide_logprobs, behavior)
    return batch, reference


def _picture(ref: str, grid: np.ndarray, patches: np.ndarray) -> Picture:
    frames_, rows, columns = grid.tolist()
    return Picture(ref, (frames_, rows, columns), lambda: patches)
