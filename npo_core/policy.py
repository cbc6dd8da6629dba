"""A transformers language model, or one that sees too, as training needs it: no full logits, exact load and save."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from npo_core.interfaces import ConfigurationError, NearFutureError
from npo_core.logprobs import linear_logprobs
from npo_core.lora import Lora, base_weights, merged_weights
from npo_core.padding import length_sorted_batches, pad, positions
from npo_core.pictures import sees_pictures
from npo_core.vision import Vision
from schemas.learner import LearnerSection
from schemas.model import ModelSection

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Policy:
    """A model on its device, with the sizes of one forward pass.

    Args:
        path: transformers model directory; with `model.lora` it may hold an adapter (see `npo_core.lora`).
        model: type of the weights, attention implementation and LoRA.
        learner: device, micro-batch and chunk sizes, gradient checkpointing.
        seed: of fresh adapters.

    Raises:
        NearFutureError: the directory holds no model that transformers can load.
        ConfigurationError: the model's logits are not a linear map of its last hidden states, or it sees pictures in a
            way that is not supported.
    """

    def __init__(self, path: Path, model: ModelSection, learner: LearnerSection, seed: int = 0) -> None:
        transformers_logging.disable_progress_bar()
        self.dtype = DTYPES[model.dtype]
        self.attention = model.attention
        self.device = choose_device(learner.device)
        self.micro_batch_tokens = learner.micro_batch_tokens
        self.chunk_tokens, self.chunk_vocab = learner.chunk_tokens, learner.chunk_vocab
        self.model = self._from_disk(path)
        self.vision = Vision(self.model) if sees_pictures(self.model.config) else None
        if self.vision and model.lora:
            raise ConfigurationError(
                f"model.lora is not supported for {type(self.model).__name__}, which sees pictures: remove the section "
                "model.lora to train all weights, or use a language model"
            )
        self.lora = Lora(self.model, model.lora, seed) if model.lora else None
        if self.lora:
            self.lora.load(path)
        self.model = self.model.to(self.device).eval()
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        """Those that are trained."""
        _switch_dropout_off(self.model)
        if learner.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            # transformers checkpoints a layer in training mode only; dropout is off, so nothing else changes.
            self.model.train()
        self.training = learner.gradient_checkpointing
        self._require_linear_head()

    def load_weights(self, path: Path) -> None:
        """Copies the weights of a model directory into the model, in place: optimizer and generator keep their hold.
        With LoRA the adapter's alone: all checkpoints of a run share the others."""
        if self.lora:
            self.lora.load(path)
            return
        self.model.load_state_dict(self._from_disk(path).state_dict())

    def save_weights(self, path: Path, values: Mapping[str, Tensor] | None = None) -> None:
        """Writes a model directory (safetensors and configuration); with LoRA its adapter alone.

        Args:
            values: of all trained parameters; by default those that the model holds.
        """
        if self.lora:
            self.lora.save(path, values)
        else:
            self._save(path, values)

    def save_base(self, path: Path) -> None:
        """Writes a model directory with the weights that adapters lie beside."""
        self._save(path, base_weights(self.model))

    def save_merged(self, path: Path) -> None:
        """Writes a model directory that needs no adapter: with LoRA the adapters are merged into its weights."""
        self._save(path, merged_weights(self.model) if self.lora else None)

    def prefill(self, prompts: Sequence[np.ndarray], cache: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Reads prompts into a KV cache.

        Returns:
            logits_PV of what follows each prompt; next_P, the position of it; and mask_PL of the left-padded prompts.
        """
        ids_PL, mask_PL = pad(prompts, "left", self.device)
        if self.vision:
            places = self.vision.place(prompts, mask_PL)
            hidden_PLH = self.vision.hidden_states(prompts, ids_PL, mask_PL, places, cache)
            return self.model.get_output_embeddings()(hidden_PLH[:, -1]), places.next_B, mask_PL
        output = self.model(
            input_ids=ids_PL,
            attention_mask=mask_PL,
            position_ids=positions(mask_PL),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1], mask_PL.sum(dim=1), mask_PL

    def token_logps(
        self, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray], temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of completion tokens in one forward pass, differentiable.

        Returns:
            logps_BT with 0 at pads, detached entropies_BT likewise, and mask_BT (bool) of the real tokens.
        """
        lengths = np.array([len(row) for row in completions])
        starts = np.array([len(row) for row in prompts])
        rows = [np.concatenate(pair) for pair in zip(prompts, completions, strict=True)]
        ids_BL, mask_BL = pad(rows, "right", self.device)
        self.model.train(self.training)
        if self.vision:
            hidden_BLH = self.vision.hidden_states(prompts, ids_BL, mask_BL, self.vision.place(prompts, mask_BL))
        else:
            # Right-padded rows need no mask under causal attention: pads come after every real token.
            hidden_BLH = self.model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
        rows_N = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(self.device)
        offsets_N = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(self.device)
        places_N = torch.from_numpy(np.repeat(starts, lengths)).to(self.device) + offsets_N
        logps_N, entropy_N = linear_logprobs(
            hidden_BLH[rows_N, places_N - 1],
            self.model.get_output_embeddings().weight,
            ids_BL[rows_N, places_N],
            temperature,
            self.chunk_tokens,
            self.chunk_vocab,
        )
        shape = (len(lengths), int(lengths.max()))
        logps_BT = logps_N.new_zeros(shape).index_put((rows_N, offsets_N), logps_N)
        entropies_BT = entropy_N.new_zeros(shape).index_put((rows_N, offsets_N), entropy_N)
        mask_BT = torch.zeros(shape, dtype=torch.bool, device=self.device)
        mask_BT[rows_N, offsets_N] = True
        return logps_BT, entropies_BT, mask_BT

    @torch.no_grad()
    def log_probs(
        self, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray], temperature: float
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(log-probabilities, entropies in nats) of completion tokens, [T] a row, in micro-batches."""
        logps: list[np.ndarray] = [np.empty(0)] * len(prompts)
        entropies: list[np.ndarray] = [np.empty(0)] * len(prompts)
        lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
        for rows in length_sorted_batches(lengths, self.micro_batch_tokens):
            logps_BT, entropies_BT, _ = self.token_logps(
                [prompts[i] for i in rows], [completions[i] for i in rows], temperature
            )
            for i, logps_T, entropies_T in zip(rows, logps_BT.cpu().numpy(), entropies_BT.cpu().numpy(), strict=True):
                logps[i] = logps_T[: len(completions[i])]
                entropies[i] = entropies_T[: len(completions[i])]
        return logps, entropies

    def _save(self, path: Path, weights: Mapping[str, Tensor] | None) -> None:
        # Where accelerate is installed, this imports DeepSpeed if it can, whose log goes to stdout as it then is.
        with contextlib.redirect_stdout(sys.stderr):
            self.model.save_pretrained(path, state_dict=weights)

    def _from_disk(self, path: Path) -> Any:
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            kind = AutoModelForImageTextToText if sees_pictures(config) else AutoModelForCausalLM
            return kind.from_pretrained(
                path, dtype=self.dtype, attn_implementation=self.attention, use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise NearFutureError(
                f"model directory {path} cannot be loaded ({reason}); start from one that transformers loads"
            ) from error

    @torch.no_grad()
    def _require_linear_head(self) -> None:
        """Some architectures cap or scale their logits; log-probabilities from the head alone would be wrong there."""
        ids_1L = torch.arange(4, device=self.device)[None] % self.model.config.get_text_config().vocab_size
        output = self.model(input_ids=ids_1L, output_hidden_states=False)
        hidden_1LH = self.model.base_model(input_ids=ids_1L, use_cache=False).last_hidden_state
        logits_1LV = hidden_1LH @ self.model.get_output_embeddings().weight.T
        bias = getattr(self.model.get_output_embeddings(), "bias", None)
        if bias is not None or not torch.allclose(output.logits, logits_1LV, rtol=1e-2, atol=1e-2, equal_nan=True):
            raise ConfigurationError(
                f"model.path: {type(self.model).__name__} scales, caps or shifts its logits, which is not supported; "
                "use an architecture whose logits are a plain product with the output embedding (Qwen3, Llama, …)"
            )


def choose_device(name: str) -> torch.device:
    """The device that `learner.device` names.

    Raises:
        ConfigurationError: a GPU is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigurationError(f"learner.device is {name}, but torch sees no GPU; use `auto` or `cpu`")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _switch_dropout_off(model: torch.nn.Module) -> None:
    """Ratios compare the same function at two weights; dropout would make it another function at every call."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  # a plain attribute, which nn.Module's types deny
