"""How long the parts of a step take, by arithmetic from a model's shape and what a machine is said to do. Computed, not
measured."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from npo_core.model_shape import ModelShape

BFLOAT16 = 2


@dataclass(frozen=True)
class Hardware:
    """One machine's GPUs, all of a kind, and the shares of their data sheet that are assumed to be reached. By default
    8 × H200."""

    gpus: int = 8
    flops: float = 989e12
    """Dense bfloat16 operations a second of a GPU."""
    memory: float = 141e9
    """Bytes of a GPU."""
    bandwidth: float = 4.8e12
    """Bytes a second between a GPU and its memory."""
    compute_share: float = 0.35
    """Of `flops`, in training, scoring and prefill."""
    bandwidth_share: float = 0.6
    """Of `bandwidth`, in decoding."""
    file_bandwidth: float = 2e9
    """Bytes a second to and from files, of weights that change hands and of checkpoints."""

    def compute(self, operations: float, gpus: int) -> float:
        """Seconds that so many operations take on some of the GPUs."""
        return operations / (gpus * self.flops * self.compute_share)


def sampling_s(
    shape: ModelShape, hardware: Hardware, rows: int, prompt: int, completion: int, memory_share: float
) -> float:
    """Seconds to sample rows that all reach their limit, the model spread over all GPUs.

    Each pass over a wave of rows reads the weights and the wave's KV cache, half grown on average; or it is bound by 2
    operations a parameter and row, if those take longer. Prefill takes 2 operations a parameter and prompt token.

    Args:
        rows: completions.
        prompt: tokens of a prompt.
        completion: tokens of a completion.
        memory_share: of the GPUs' memory, for weights and KV cache together (`vllm.gpu_memory_utilization`).

    Raises:
        ValueError: there is no room for the weights and one row.
    """
    weights, token = shape.parameters * BFLOAT16, shape.kv_bytes_a_token(BFLOAT16)
    room = hardware.gpus * hardware.memory * memory_share - weights
    at_once = min(rows, int(room // (token * (prompt + completion))))
    if at_once < 1:
        raise ValueError(
            f"{memory_share} of the memory of {hardware.gpus} GPUs holds not even one row beside the model"
        )
    waves = ceil(rows / at_once)
    wave = rows / waves
    moved = weights + wave * token * (prompt + completion / 2)
    read = moved / (hardware.gpus * hardware.bandwidth * hardware.bandwidth_share)
    compute = hardware.compute(2 * shape.parameters * wave, hardware.gpus)
    prefill = hardware.compute(2 * shape.parameters * rows * prompt, hardware.gpus)
    return waves * completion * max(read, compute) + prefill


def scoring_s(shape: ModelShape, hardware: Hardware, tokens: int) -> float:
    """Seconds of one forward pass on one GPU: 2 operations a parameter and token."""
    return hardware.compute(2 * shape.parameters * tokens, 1)


def update_s(shape: ModelShape, hardware: Hardware, tokens: int) -> float:
    """Seconds of forward, forward again (gradient checkpointing) and backward on all GPUs: 2 + 2 + 4 operations a
    parameter and token; attention's own, quadratic ones are left out."""
    return hardware.compute(8 * shape.parameters * tokens, hardware.gpus)


def files_s(hardware: Hardware, size: float, passes: int) -> float:
    """Seconds in which so many bytes are written or read that many times."""
    return passes * size / hardware.file_bandwidth
