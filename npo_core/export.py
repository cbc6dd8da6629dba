"""A checkpoint as a model directory of its own, which `from_pretrained` and vLLM load."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from npo_core.artifacts import RunArtifacts
from npo_core.interfaces import ADAPTER, ConfigurationError, NearFutureError
from npo_core.lora import merge
from schemas.records import CheckpointRef

ORIGIN = "near_future.json"
"""Says which run, leg and step an exported model directory comes from."""


def export_checkpoint(run: RunArtifacts, ref: CheckpointRef, target: Path, adapter: bool = False) -> tuple[Path, str]:
    """Writes weights, configuration and tokenizer of a checkpoint into `target`, all of it or nothing.

    Args:
        adapter: of a LoRA run the adapter alone, in peft's files; otherwise it is merged into the weights.

    Returns:
        The absolute path, and the weights' digest (`CheckpointManifest.weights_digest`).

    Raises:
        ConfigurationError: an adapter is asked for where there is none, or the target is there and is not an empty
            directory.
        NearFutureError: the checkpoint is missing or damaged, or the target cannot be written.
    """
    target = target.expanduser().absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigurationError(f"export target {target} is not empty; choose a new directory, or empty this one")
    manifest = run.require_checkpoint(ref.leg_id, ref.step)
    has_one = any(entry.role == "adapter" for entry in manifest.files)
    if adapter and not has_one:
        raise ConfigurationError(
            f"step {ref.step} of {run.uri} has no adapter: runs with model.lora have one, after their first step; "
            "leave --adapter out for the model"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            weights = run.checkout(ref, Path(scratch) / "checkpoint", weights_only=True).weights
            if adapter:
                weights = weights / ADAPTER
            elif has_one:
                weights = merge(weights, Path(scratch) / "merged")
            origin = {"run": run.uri, "leg_id": ref.leg_id, "step": ref.step, "digest": manifest.weights_digest}
            (weights / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
            weights.rename(target)  # takes the place of an empty directory, and of nothing else
    except OSError as error:
        raise NearFutureError(
            f"export target {target} cannot be written: {error.strerror or error}; free space or choose another one"
        ) from error
    return target, manifest.weights_digest
