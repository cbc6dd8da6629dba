"""Low-rank adapters by peft: a model with frozen weights, and small matrices beside them that are trained.

A model directory may hold an adapter in its folder `adapter/`, in the files that peft's own `save_pretrained` writes.
LoRA: Hu et al., 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from npo_core.interfaces import ADAPTER, ConfigurationError, NearFutureError
from schemas.model import LoraSection

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
"""Of parameters' names in peft's files, which leave the adapter's own name out."""


class Lora:
    """The adapters of a model, which are put into it in place: its class and its parameters' names stay.

    Adapters are float32 beside bfloat16 weights, as TRL has them, and of the weights' type otherwise. Fresh ones change
    nothing, for their second matrix is 0.

    Args:
        model: a transformers model, on the CPU, so that fresh adapters are the same wherever they go.
        section: rank, scale and places.
        seed: of the first matrices' values.

    Raises:
        ConfigurationError: peft is not installed, or the places are none of the model's linear layers.
    """

    def __init__(self, model: Any, section: LoraSection, seed: int) -> None:
        require_peft("model.lora")
        from peft import LoraConfig, inject_adapter_in_model

        targets = section.targets if isinstance(section.targets, str) else list(section.targets)
        self.config = LoraConfig(
            r=section.rank, lora_alpha=section.alpha, target_modules=targets, task_type="CAUSAL_LM", bias="none"
        )
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                inject_adapter_in_model(self.config, model)
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigurationError(f"model.lora.targets {targets} do not fit the model: {reason}") from error
        for head in (model.get_input_embeddings(), model.get_output_embeddings()):
            if hasattr(head, "base_layer"):
                raise ConfigurationError(
                    f"model.lora.targets {targets} name an embedding, whose weights log-probabilities are computed "
                    "from in chunks; leave it out, or use all-linear"
                )
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        self._fresh = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def load(self, model_dir: Path) -> None:
        """Takes the adapter of a model directory; fresh values where it has none.

        Raises:
            NearFutureError: it is of other places or sizes.
        """
        values = self._fresh
        if (file := model_dir / ADAPTER / WEIGHTS_FILE).exists():
            stored = load_file(file)
            values = {name: stored[_stored(name)] for name in self.parameters if _stored(name) in stored}
            if len(stored) != len(values) or any(
                name not in values or values[name].shape != p.shape for name, p in self.parameters.items()
            ):
                raise NearFutureError(
                    f"adapter {file} is of other places or ranks than model.lora says (rank {self.config.r}); give "
                    "model.lora the rank and targets that its adapter_config.json has, or name another start"
                )
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def save(self, model_dir: Path, values: Mapping[str, Tensor] | None = None) -> None:
        """Writes the adapter into a model directory.

        Args:
            values: by parameter; by default those that the model holds.
        """
        folder = model_dir / ADAPTER
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {_stored(name): p.detach().cpu().contiguous() for name, p in (values or self.parameters).items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        # The base is the run's, wherever it lies; peft writes its sets in an order that differs between processes.
        told = self.config.to_dict() | {"inference_mode": True, "base_model_name_or_path": None}
        (folder / CONFIG_FILE).write_text(json.dumps(told, indent=2, sort_keys=True, default=sorted) + "\n")


def base_weights(model: Any) -> dict[str, Tensor]:
    """The weights of a model with adapters as it has them without, under their own names."""
    return {
        name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if ".lora_" not in name
    }


@torch.no_grad()
def merged_weights(model: Any) -> dict[str, Tensor]:
    """The weights of a model with adapters that has none and is the same policy, in the weights' type."""
    from peft.tuners.lora import LoraLayer

    weights = base_weights(model)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = weights[f"{name}.weight"]
            weights[f"{name}.weight"] = (weight + layer.get_delta_weight("default")).to(weight.dtype)
    return weights


def require_peft(field: str) -> None:
    """Refuses what needs peft where it is missing.

    Raises:
        ConfigurationError: names the command that installs it.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigurationError(
            f"{field} needs peft, which is not installed; `pip install 'near-future[lora]'` installs it"
        )


def has_adapter(model_dir: Path) -> bool:
    """Whether a model directory holds an adapter."""
    return (model_dir / ADAPTER / WEIGHTS_FILE).exists()


def merge(model_dir: Path, target: Path) -> Path:
    """Writes the policy of a model directory with an adapter as one without, in the weights' type on disk, into a new
    directory, which it returns.

    Raises:
        ConfigurationError: peft is not installed.
    """
    require_peft("merging a LoRA checkpoint")
    from peft import PeftModel

    target.mkdir(parents=True)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto", use_safetensors=True, local_files_only=True)
    PeftModel.from_pretrained(base, model_dir / ADAPTER).merge_and_unload().save_pretrained(target)
    for file in model_dir.iterdir():
        # Tokenizer and template; and the configuration as the run has it.
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copyfile(file, target / file.name)
    return target


def _stored(name: str) -> str:
    return _PREFIX + name.replace(".default.", ".")
