"""Sizes of models that the configurations of deploy/ name, as their config.json on the hub has them: with these, a run
is planned before anything is downloaded."""

from __future__ import annotations

from typing import Any

_QWEN3_8B = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def known_model(name: str) -> Any | None:
    """The transformers configuration of a model by its hub name; None: its sizes are not known here."""
    from transformers import Qwen3Config, Qwen3VLConfig

    if name == "Qwen/Qwen3-8B":
        return Qwen3Config(**_QWEN3_8B, max_position_embeddings=40960, tie_word_embeddings=False, dtype="bfloat16")
    if name == "Qwen/Qwen3-VL-8B-Instruct":
        return Qwen3VLConfig(
            text_config={**_QWEN3_8B, "max_position_embeddings": 262144},
            vision_config={"out_hidden_size": 4096},
            tie_word_embeddings=False,
            dtype="bfloat16",
        )
    return None
