"""How many parameters a model has, and what a token takes in its KV cache, by arithmetic from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from npo_core.interfaces import NearFutureError

KINDS = ("qwen3", "llama", "qwen3_vl")
"""Values of `model_type` whose layers are known here."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a transformers causal language model."""

    layers: int
    hidden: int
    kv_heads: int
    head_dim: int
    vocab: int
    text_parameters: int
    """Of the language model, embeddings included; a tied output embedding counts once."""
    vision_parameters: int
    """Of the tower that sees pictures; 0 without one."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.text_parameters + self.vision_parameters

    def kv_bytes_a_token(self, item_bytes: int) -> int:
        """Keys and values of one token in all layers, in bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * item_bytes


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Counts as the classes Qwen3ForCausalLM, LlamaForCausalLM and Qwen3VLForConditionalGeneration build themselves.

    Args:
        config: a complete transformers configuration as a dictionary.

    Raises:
        NearFutureError: another kind of model.
    """
    kind = config.get("model_type")
    if kind not in KINDS:
        raise NearFutureError(f"model_type {kind!r} has no arithmetic here; known: {', '.join(KINDS)}")
    text = config["text_config"] if kind == "qwen3_vl" else config
    hidden, layers, vocab = text["hidden_size"], text["num_hidden_layers"], text["vocab_size"]
    heads = text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or hidden // heads
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    if text.get("attention_bias"):
        attention += head_dim * (heads + 2 * kv_heads) + hidden
    if kind != "llama":
        attention += 2 * head_dim  # norms of queries and keys
    mlp = 3 * hidden * text["intermediate_size"]
    if text.get("mlp_bias"):
        mlp += 2 * text["intermediate_size"] + hidden
    embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    counted = embeddings + layers * (attention + mlp + 2 * hidden) + hidden
    vision = _vision_parameters(config["vision_config"]) if kind == "qwen3_vl" else 0
    return ModelShape(layers, hidden, kv_heads, head_dim, vocab, counted, vision)


def _vision_parameters(config: Mapping[str, Any]) -> int:
    """Patch and place embeddings, blocks, the merger and its copies for deeper layers (DeepStack)."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    patch = config["in_channels"] * config["temporal_patch_size"] * config["patch_size"] ** 2
    block = 4 * hidden + _linear(hidden, 3 * hidden) + _linear(hidden, hidden) + _linear(hidden, mlp)
    block += _linear(mlp, hidden)
    merged = hidden * config["spatial_merge_size"] ** 2
    merge = _linear(merged, merged) + _linear(merged, config["out_hidden_size"])
    deeper = len(config["deepstack_visual_indexes"]) * (2 * merged + merge)
    places = config["num_position_embeddings"] * hidden
    return _linear(patch, hidden) + places + config["depth"] * block + 2 * hidden + merge + deeper


def _linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with bias."""
    return inputs * outputs + outputs
