"""Tiny models of the real classes, for tests of the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from npo_core.policy import Policy
from schemas.learner import LearnerSection
from schemas.model import ModelSection

VOCAB = 17
STOP = 1


def tiny_model_dir(path: Path, architecture: str = "qwen3", vocab: int = VOCAB, head_dim: int = 8) -> Path:
    """A model directory with random weights, spread enough that its distributions are far from uniform."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "initializer_range": 0.25,
        "bos_token_id": None,
        "eos_token_id": STOP,
        "pad_token_id": 0,
    }
    if architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=head_dim, tie_word_embeddings=True))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    model.save_pretrained(path)
    return path


def tiny_policy(path: Path, dtype: str = "float32", architecture: str = "qwen3", **learner: object) -> Policy:
    """A policy around `tiny_model_dir`."""
    section = LearnerSection.model_validate({"device": "cpu", **learner})
    return Policy(tiny_model_dir(path, architecture), ModelSection.model_validate({"dtype": dtype}), section)


def prompts_of(lengths: list[int]) -> list[np.ndarray]:
    """Random prompts of these lengths, without the stop token."""
    rng = np.random.default_rng(7)
    return [rng.integers(2, VOCAB, size=length).astype(np.int32) for length in lengths]
