"""The starting model as far as it can be known without its weights: configuration, tokenizer, sizes."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npo_core.checks import Notes
from npo_core.interfaces import ConfigurationError, NearFutureError, first_line
from npo_core.model_shape import ModelShape, model_shape
from npo_core.room import positions
from schemas.config import Config

if TYPE_CHECKING:  # it loads transformers
    from npo_core.pictures import PictureProcessor


@dataclass(frozen=True)
class FoundModel:
    """What is known of it."""

    config: Any
    """transformers' configuration."""
    tokenizer: Any | None
    """None: it is not on this machine."""
    pictures: PictureProcessor | None
    """None: it sees none, or its image processor is not on this machine."""
    shape: ModelShape | None
    """None: this kind of model has no arithmetic here."""
    positions: int | None
    """Longest context, in tokens; None: it names no limit."""
    adapters: int | None
    """Parameters of `model.lora`; None without it, or if they cannot be counted."""


def check_model(config: Config, notes: Notes) -> FoundModel | None:
    """Reads the model's configuration and tokenizer. Nothing is downloaded, and no weights are read.

    Raises:
        ConfigurationError: `model.path` or `model.start_from` names nothing that a run could start from.
    """
    from npo_core.begin import starting_checkpoint

    notes.at(
        "model.start_from" if config.model.start_from else "model.path", config.model.start_from or config.model.path
    )
    with ExitStack() as stack:
        if config.model.start_from is not None:
            run, ref = starting_checkpoint(config.model.start_from)
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="near-future-")))
            folder: Path | None = run.checkout_model(scratch / "model")
            notes.ok(f"starts from leg {ref.leg_id} at step {ref.step} of {run.uri}")
        else:
            folder = _directory(config.model.path)
        if folder is None:
            return _elsewhere(config, notes)
        model, tokenizer = _read(folder), _tokenizer(folder)
        pictures = _pictures(folder, model)
        if config.model.start_from is None:
            if next(folder.glob("*.safetensors"), None) is None:
                notes.warn(
                    f"{folder} has configuration and tokenizer, but no .safetensors file yet; put the weights there"
                )
            else:
                notes.ok(f"configuration and tokenizer of {folder} can be read")
    return _found(config, notes, model, tokenizer, pictures)


def _directory(path: str) -> Path | None:
    """The model directory on this machine; None: a hub name that is not in its cache.

    Raises:
        ConfigurationError: neither a directory nor a hub name.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from npo_core import shapes, testbed

    if path == "testbed":
        return testbed.model_dir()
    if path == "shapes":
        return shapes.model_dir()
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    try:
        if path.startswith(("/", "~", ".")):
            raise HFValidationError
        cached = try_to_load_from_cache(path, "config.json")
    except HFValidationError as error:
        raise ConfigurationError(
            f"model.path {path!r} is none of testbed, shapes, a directory and a hub name; check the spelling"
        ) from error
    return Path(cached).parent if isinstance(cached, str) else None


def _elsewhere(config: Config, notes: Notes) -> FoundModel | None:
    """A model of the hub that this machine does not have."""
    from npo_core.known_models import known_model

    path, known = config.model.path, known_model(config.model.path)
    absent = f"{path} is not in this machine's cache of the hub; the run downloads it"
    if known is None:
        notes.unchecked(f"{absent}. Its sizes are unknown until then")
        return None
    notes.unchecked(f"{absent}. Its sizes are taken as published, its tokenizer is not looked at")
    return _found(config, notes, known, None, None)


def _read(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises what its parsers raise
        raise _unusable(folder, "config.json", error) from error


def _tokenizer(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise _unusable(folder, "tokenizer", error) from error


def _pictures(folder: Path, model: Any) -> PictureProcessor | None:
    from npo_core.pictures import PROCESSOR_FILES, load_processor, sees_pictures

    has_one = any((folder / name).exists() for name in PROCESSOR_FILES)
    return load_processor(folder) if has_one and sees_pictures(model) else None


def _unusable(folder: Path, part: str, error: Exception) -> ConfigurationError:
    reason = first_line(error)
    return ConfigurationError(
        f"model.path {folder}: its {part} cannot be used ({reason}); give a complete transformers model "
        "directory, with tokenizer and chat template"
    )


def _found(
    config: Config, notes: Notes, model: Any, tokenizer: Any | None, pictures: PictureProcessor | None
) -> FoundModel:
    try:
        shape = model_shape(model.to_dict())
    except NearFutureError as error:
        shape = None
        notes.unchecked(f"memory and storage: {error}")
    return FoundModel(model, tokenizer, pictures, shape, positions(model), _adapters(config, notes, model))


def _adapters(config: Config, notes: Notes, model: Any) -> int | None:
    """Parameters of the adapters, counted in a model without memory.

    Raises:
        ConfigurationError: peft is not installed, or `model.lora.targets` do not fit the model.
    """
    if config.model.lora is None:
        return None
    from npo_core.pictures import sees_pictures

    if sees_pictures(model):
        raise ConfigurationError(
            f"model.lora is not supported for a {model.model_type} model, which sees pictures: remove the section "
            "model.lora to train all weights, or use a language model"
        )
    import torch
    from transformers import AutoModelForCausalLM

    from npo_core.lora import Lora, require_peft

    require_peft("model.lora")
    notes.at("model.lora", config.model.lora.model_dump(mode="json"))
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(model)
        count = sum(p.numel() for p in Lora(empty, config.model.lora, 0).parameters.values())
    except ConfigurationError:
        raise
    except Exception as error:  # a class that transformers has no causal language model for, say
        notes.unchecked(f"the adapters' size: {first_line(error)}")
        return None
    notes.ok(f"adapters of {count:,} parameters fit the model")
    return count
