"""Memory and storage of a run by arithmetic, from its model's shape and its configuration. Computed, not measured."""

from __future__ import annotations

from dataclasses import dataclass

from npo_core.model_shape import ModelShape
from schemas.config import Config

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
FLOAT32 = 4
TOKEN = 4 + 4 + 5
"""Bytes of a completion's token: its id, its log-probability, its text."""
ROW = 200
"""Bytes of all else about a trajectory."""
FILES = 64 * 1024
"""Bytes of what three Parquet files hold beside their rows, metrics and telemetry included."""


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


def learner_memory(shape: ModelShape, config: Config, processes: int, adapters: int | None = None) -> LearnerMemory:
    """What a process of the learner holds, on its GPU or where it is offloaded to.

    The torch learner keeps everything in the model's type, AdamW's moments too, and no float32 weights. DeepSpeed adds
    up gradients in float32 and keeps moments in float32; stage 1 splits moments and master weights over the processes,
    2 gradients too, 3 weights too.

    Args:
        shape: the model.
        config: `model`, `learner` and `deepspeed` are read.
        processes: of the learner, on all hosts together; 1 under the torch learner.
        adapters: parameters of `model.lora`, which alone are trained; None without it.
    """
    count, stage = _trained(shape, adapters), config.deepspeed.zero_stage
    item, frozen = _item(config, adapters), 0 if adapters is None else shape.parameters
    base = frozen * ITEM_BYTES[config.model.dtype]
    if config.learner.engine == "torch":
        return LearnerMemory(base + count * item, count * item, 0, 2 * count * item)
    split, weights = count / processes, base + count * item
    return LearnerMemory(
        weights=weights / processes if stage == 3 else weights,
        gradients=FLOAT32 * (split if stage >= 2 else count),
        master=FLOAT32 * split if stage else 0,
        moments=2 * FLOAT32 * (split if stage else count),
    )


def checkpoint_bytes(shape: ModelShape, config: Config, adapters: int | None = None) -> int:
    """A checkpoint in the store: weights, moments, and DeepSpeed's float32 weights behind bfloat16; with LoRA, the
    adapters' (`adapters`: how many parameters)."""
    count, item = _trained(shape, adapters), _item(config, adapters)
    if config.learner.engine == "torch":
        return count * 3 * item
    master = FLOAT32 if item < FLOAT32 else 0
    return count * (item + 2 * FLOAT32 + master)


def rows_bytes(rows: int, prompt: int, completion: int, segments: int) -> int:
    """Stored trajectories, at most but for compression: ids, log-probabilities and text of every token.

    Args:
        rows: trajectories.
        prompt: tokens of a prompt.
        completion: tokens of a completion.
        segments: in how many places they lie, each with its metrics.
    """
    return rows * (ROW + 4 * prompt + TOKEN * completion) + segments * FILES


def cache_bytes(shape: ModelShape, config: Config, prompt: int) -> int:
    """Keys and values of all rows that transformers samples at once.

    Args:
        prompt: tokens of a prompt.
    """
    rollout = config.rollout
    rows = max(rollout.group_size, min(rollout.max_rows, rollout.prompts_per_step * rollout.group_size))
    return rows * (prompt + rollout.max_new_tokens) * shape.kv_bytes_a_token(ITEM_BYTES[config.model.dtype])


def _trained(shape: ModelShape, adapters: int | None) -> int:
    return shape.parameters if adapters is None else adapters


def _item(config: Config, adapters: int | None) -> int:
    """Bytes of a trained parameter: adapters beside bfloat16 weights are float32."""
    own = ITEM_BYTES[config.model.dtype]
    return own if adapters is None else max(own, FLOAT32)


def tokens_a_step(config: Config) -> int:
    """Tokens that a main-line step generates at most."""
    return config.rollout.prompts_per_step * config.rollout.group_size * config.rollout.max_new_tokens
