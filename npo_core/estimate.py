"""Memory and storage of a run by arithmetic, from its model's shape and its configuration. Computed, not measured."""

from __future__ import annotations

from dataclasses import dataclass

from npo_core.model_shape import ModelShape
from schemas.config import Config

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
FLOAT32 = 4


@dataclass(frozen=True)
class LearnerMemory:
    """Bytes that one learner process holds between two passes; activations, buckets and logits come on top."""

    weights: float
    gradients: float
    master: float
    """float32 weights behind the model's, which DeepSpeed keeps from ZeRO 1 on whatever the model's type."""
    moments: float
    """AdamW's two."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.master + self.moments


def learner_memory(shape: ModelShape, config: Config, processes: int) -> LearnerMemory:
    """What a process of the learner holds, on its GPU or where it is offloaded to; without LoRA.

    The torch learner keeps everything in the model's type, AdamW's moments too, and no float32 weights. DeepSpeed adds
    up gradients in float32 and keeps moments in float32; stage 1 splits moments and master weights over the processes,
    2 gradients too, 3 weights too.

    Args:
        shape: the model.
        config: `model`, `learner` and `deepspeed` are read.
        processes: of the learner, on all hosts together; 1 under the torch learner.
    """
    count, item, stage = shape.parameters, ITEM_BYTES[config.model.dtype], config.deepspeed.zero_stage
    if config.learner.engine == "torch":
        return LearnerMemory(count * item, count * item, 0, 2 * count * item)
    split = count / processes
    return LearnerMemory(
        weights=item * (split if stage == 3 else count),
        gradients=FLOAT32 * (split if stage >= 2 else count),
        master=FLOAT32 * split if stage else 0,
        moments=2 * FLOAT32 * (split if stage else count),
    )


def checkpoint_bytes(shape: ModelShape, config: Config) -> int:
    """A checkpoint in the store: weights, moments, and DeepSpeed's float32 weights behind bfloat16; without LoRA."""
    item = ITEM_BYTES[config.model.dtype]
    if config.learner.engine == "torch":
        return shape.parameters * 3 * item
    master = FLOAT32 if config.model.dtype == "bfloat16" else 0
    return shape.parameters * (item + 2 * FLOAT32 + master)


def tokens_a_step(config: Config) -> int:
    """Tokens that a main-line step generates at most."""
    return config.rollout.prompts_per_step * config.rollout.group_size * config.rollout.max_new_tokens
