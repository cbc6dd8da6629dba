"""Fingerprint of what computes: an artifact keeps it, and a run that goes on elsewhere is told what differs."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from typing import Literal

import torch
import transformers

from npo_core.deepspeed_learner import deepspeed_version
from npo_core.policy import choose_device, device_name
from npo_core.vllm_version import sampler_name
from schemas.config import Config

logger = logging.getLogger("npo")

Sampled = Literal["rollout", "guide", "evaluation"]


def environment(config: Config, sampled: Sampled | None) -> dict[str, str]:
    """Fingerprint of what computes: shown beside an artifact, not part of any identity.

    Args:
        sampled: the work whose sampler stands in it; None for work that transformers always sample.
    """
    learner = config.learner
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": device_name(choose_device(learner.device)),
        "threads": str(learner.threads),
        # How work is cut into passes changes sums by rounding.
        "passes": "/".join(map(str, (config.rollout.max_rows, learner.micro_batch_tokens, learner.chunk_tokens))),
        "chunk_vocab": str(learner.chunk_vocab),
        "attention": config.model.attention,
        "gradient_checkpointing": str(learner.gradient_checkpointing),
        "generator": sampler_name(config.vllm) if sampled in config.vllm.samples else "transformers",
        "learner": _learner_name(config),
    }


def _learner_name(config: Config) -> str:
    """The learner's engine; DeepSpeed's with its version and how it is spread, which changes sums by rounding."""
    if config.learner.engine == "torch":
        return "torch"
    spread = config.deepspeed
    parts = [
        f"deepspeed {deepspeed_version()}",
        f"{spread.ranks} ranks",
        f"ZeRO {spread.zero_stage}",
    ]
    parts += [name for name in ("offload_optimizer", "offload_param") if getattr(spread, name)]
    return ", ".join(parts + ([f"on the hosts of {spread.hostfile}"] if spread.hostfile else []))


def warn_of_changes(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Says what differs between two fingerprints: from here on, bits may differ from an undisturbed run's."""
    changes = [f"{k} {v} → {now.get(k)}" for k, v in before.items() if v != now.get(k)]
    if changes:
        logger.warning("the environment changed since the last checkpoint: %s", ", ".join(changes))
