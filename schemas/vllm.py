"""vLLM in place of transformers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from schemas.section import Section
from schemas.urls import plain_address


class VllmSection(Section):
    """vLLM, in an environment and a process of its own, in place of transformers. Not part of the run's identity: what
    computed an artifact is in its environment."""

    samples: tuple[Literal["rollout", "guide", "evaluation"], ...] = ()
    """What vLLM samples: training rollouts, answers of the guide, of the evaluation. All else is sampled by
    transformers, in process. With `rollout` vLLM takes the trainer's weights before each step: in place on a GPU, by a
    fresh engine on a CPU, which costs about 10 s a step."""
    python: str = ".venv-vllm/bin/python"
    """Interpreter of vLLM's environment, which `make setup-vllm` makes. Relative to the working directory."""
    url: str | None = None
    """Address of a `vllm serve` of yours, `http(s)://HOST:PORT`, instead of a process of ours. It cannot be given
    another checkpoint: it serves the one that is asked for, or the stage fails."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of vLLM's weights; by default `model.dtype`."""
    max_model_len: int | None = Field(None, ge=1)
    """Longest prompt and completion together, in tokens; by default the model's own limit, which takes memory."""
    gpu_memory_utilization: float = Field(0.3, gt=0, le=1)
    """Share of the GPU's memory that vLLM takes beside the trainer."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that share the model: `learner.device` and those after it."""
    enforce_eager: bool = True
    """No CUDA graphs: slower to sample, faster to start."""
    lora: Literal["merged", "adapter"] = "merged"
    """How vLLM takes the checkpoints of a run with `model.lora`: `merged` into a model's weights, or as an `adapter`
    beside the run's starting weights, which stay loaded."""
    tolerance: float | None = Field(None, gt=0)
    """Largest mean difference of the engine's log-probabilities from the trainer's, in nats a token, on a probe after
    each load and sync; by default 1e-4 where both compute in float32, else 0.05."""

    @field_validator("url")
    @classmethod
    def _is_plain_address(cls, value: str | None) -> str | None:
        return value if value is None else plain_address(value)
