"""Tiny models of real classes that are spoken to in a chat, byte by byte."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = ("<pad>", "<end>", "<system>", "<user>", "<assistant>")
QWEN = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
"""Knows the switch."""
LLAMA = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Knows neither the switch nor a system message."""


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """One token a byte of UTF-8, and some merges: a text has several ways to be spelled."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("S", "T"), ("O", "P"), ("ST", "OP")]
    words = [*SPECIAL, *bytes_, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", chat_template=template
    )


def chat_model_dir(path: Path, architecture: str = "qwen3", positions: int = 256, head_dim: int = 8) -> Path:
    """A model directory with random weights and a chat template."""
    torch.manual_seed(0)
    tokenizer = chat_tokenizer(QWEN if architecture == "qwen3" else LLAMA)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": positions,
        "initializer_range": 0.25,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    if architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=head_dim))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
