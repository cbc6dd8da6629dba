"""Sizes agree with the real optimizer, and deploy/SCALING.md holds the tables that its command prints."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from npo_core.estimate import checkpoint_bytes, learner_memory
from npo_core.lora import Lora
from npo_core.model_shape import model_shape
from schemas.model import LoraSection
from tests.bench import scaling
from tests.command import ROOT


def test_the_torch_learners_memory_is_that_of_a_real_model_after_a_step() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    model = Qwen3ForCausalLM(shape).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [s[m] for s in optimizer.state.values() for m in ("exp_avg", "exp_avg_sq")]
    held = learner_memory(model_shape(shape.to_dict()), scaling.config("torch", 2), 1)
    assert held.weights == held.gradients == sum(p.nbytes for p in model.parameters())
    assert held.moments == sum(m.nbytes for m in moments)


def test_the_memory_of_adapters_is_that_of_real_ones_after_a_step() -> None:
    pytest.importorskip("peft", reason="model.lora needs it")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    model = Qwen3ForCausalLM(shape).to(torch.bfloat16)
    adapters = list(Lora(model, LoraSection(rank=4), 0).parameters.values())
    optimizer = torch.optim.AdamW(adapters, fused=True)
    for parameter in adapters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    count = sum(p.numel() for p in adapters)
    settings = scaling.config("torch", 2)
    held = learner_memory(model_shape(shape.to_dict()), settings, 1, count)
    assert held.weights == sum(p.nbytes for p in model.parameters())
    assert held.gradients == sum(p.nbytes for p in adapters)
    assert held.moments == sum(s[m].nbytes for s in optimizer.state.values() for m in ("exp_avg", "exp_avg_sq"))
    assert checkpoint_bytes(model_shape(shape.to_dict()), settings, count) == held.gradients + held.moments


def test_the_page_holds_the_computed_tables() -> None:
    assert scaling.tables() in (ROOT / "deploy" / "SCALING.md").read_text()
