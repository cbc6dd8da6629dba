"""The work that both sides do: one checkpoint, one order of prompts, one configuration, one verifier."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from npo_core import testbed
from npo_core.interfaces import Prompt, Verdict, Verifier
from npo_core.prompts import PromptTable, to_arrow
from npo_core.sources.load import load
from schemas.config import Config


@dataclass(frozen=True)
class Work:
    """What to train, on what, and how."""

    config: Config
    model_dir: Path
    prompts: PromptTable
    verifier: Verifier

    @property
    def rows(self) -> int:
        """Rollouts a step."""
        return self.config.rollout.prompts_per_step * self.config.rollout.group_size

    def row_prompts(self, step: int) -> tuple[str, ...]:
        """The prompt of each rollout of a step, in order."""
        return tuple(p.prompt_id for p in self.prompts.batch(step) for _ in range(self.config.rollout.group_size))


@dataclass(frozen=True)
class StepRecord:
    """What one side did in one step."""

    step: int
    prompt_ids: tuple[str, ...]
    """Prompt of each rollout, in order."""
    reward: float
    """Mean over the rollouts."""
    tokens: int
    """Sampled tokens."""
    trained_tokens: int
    """Of these, the tokens that went through the backward pass."""
    generate_s: float
    verify_s: float
    update_s: float
    rest_s: float = 0.0
    """Writing down what happened."""

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.generate_s + self.verify_s + self.update_s + self.rest_s


def small_work(seed: int, learning_rate: float = 1e-4) -> Work:
    """GRPO on the embedded testbed: 32 prompts × 8 rollouts of at most 14 tokens."""
    config = grpo_config(seed, learning_rate, {})
    loaded = load(config, None)
    prompts = PromptTable(to_arrow(loaded.train, loaded.held_out), seed, config.rollout.prompts_per_step)
    return Work(config, testbed.model_dir(), prompts, testbed.TestbedVerifier())


def random_work(directory: Path) -> Work:
    """GRPO on 22.9M random weights with a vocabulary of 32,768: 2 prompts × 8 rollouts of 256 tokens, with rewards
    that a hash decides, so that nearly every group has an advantage."""
    vocabulary, pool, prompt_words = 32768, 64, 32
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    model = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(model).save_pretrained(directory)
    words = {word: n for n, word in enumerate(["<pad>", "<end>", *(f"w{n}" for n in range(2, vocabulary))])}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        clean_up_tokenization_spaces=False,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    ).save_pretrained(directory)
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(f"p{n}", "random", ({"role": "user", "content": " ".join(f"w{w}" for w in words_n)},), "")
        for n, words_n in enumerate(rng.integers(2, vocabulary, size=(pool, prompt_words)))
    ]
    config = grpo_config(0, 1e-4, {"prompts_per_step": 2, "max_new_tokens": 256})
    return Work(config, directory, PromptTable(to_arrow(prompts, []), 0, 2), HashVerifier())


def grpo_config(seed: int, learning_rate: float, rollout: dict[str, int]) -> Config:
    """Our configuration; what it does not name has the product's default."""
    return Config.model_validate(
        {
            "run": {"name": "bench", "seed": seed},
            "rollout": rollout,
            "learner": {"learning_rate": learning_rate, "device": "cpu"},
            # TRL adds 1e-4 to a group's standard deviation, and that cannot be configured.
            "algorithm": {"advantage_eps": 1e-4},
        }
    )


class HashVerifier(Verifier):
    """Rewards every other text, by a hash."""

    name = "hash/1"

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """See `Verifier.verify`."""
        correct = bool(zlib.crc32(f"{prompt.prompt_id} {text}".encode()) & 1)
        return Verdict(float(correct), correct, "by hash")
