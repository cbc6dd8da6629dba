"""Counted parameters are those of the real classes, built without memory on torch's meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from npo_core.interfaces import NearFutureError
from npo_core.known_models import known_model
from npo_core.model_shape import model_shape

TEXT = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QWEN3_8B = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def vl(text: dict[str, Any], tied: bool = False, **vision: Any) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config=text,
        vision_config={**vision, "out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=tied,
    )


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        (Qwen3ForCausalLM, Qwen3Config(**TEXT, head_dim=16, tie_word_embeddings=True)),
        (Qwen3ForCausalLM, Qwen3Config(**TEXT, head_dim=16, attention_bias=True, tie_word_embeddings=False)),
        (Qwen3ForCausalLM, Qwen3Config(**QWEN3_8B, tie_word_embeddings=False)),
        (LlamaForCausalLM, LlamaConfig(**TEXT, tie_word_embeddings=False)),
        (LlamaForCausalLM, LlamaConfig(**TEXT, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
        (
            Qwen3VLForConditionalGeneration,
            vl({**TEXT, "head_dim": 16}, hidden_size=24, intermediate_size=40, depth=2, deepstack_visual_indexes=[0]),
        ),
        (Qwen3VLForConditionalGeneration, vl(QWEN3_8B)),
    ],
    ids=["qwen3-tied", "qwen3-bias", "qwen3-8b", "llama", "llama-bias-tied", "qwen3-vl", "qwen3-vl-8b"],
)
def test_the_count_is_the_real_models(architecture: Any, config: Any) -> None:
    with torch.device("meta"):
        model = architecture(config)
    assert model_shape(config.to_dict()).parameters == sum(p.numel() for p in model.parameters())


def test_a_token_of_an_8b_model_takes_144_kib_of_kv_cache() -> None:
    assert model_shape(Qwen3Config(**QWEN3_8B).to_dict()).kv_bytes_a_token(2) == 144 * 1024


def test_published_sizes_are_those_of_the_models_on_the_hub() -> None:
    # Safetensors' totals in the index files of both models, two bytes a parameter.
    for name, size in (("Qwen/Qwen3-8B", 16_381_470_720), ("Qwen/Qwen3-VL-8B-Instruct", 17_534_247_392)):
        known = known_model(name)
        assert known is not None
        assert 2 * model_shape(known.to_dict()).parameters == size
    assert known_model("Qwen/Qwen3-9B") is None


def test_another_kind_of_model_is_not_guessed() -> None:
    with pytest.raises(NearFutureError, match="'gpt2' has no arithmetic here"):
        model_shape({"model_type": "gpt2"})
