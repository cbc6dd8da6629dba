"""A small vision-language model of the real classes, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from npo_core.shapes.model import ModelSizes, build_model, build_processor, build_tokenizer


def tiny_vlm_dir(path: Path, sizes: ModelSizes, spread: float, processor_dir: Path | None = None) -> Path:
    """Writes a Qwen3-VL's model directory.

    Args:
        path: of the weights.
        spread: factor of the matrices' initial weights: distributions far from uniform, which depend on the picture.
        processor_dir: of the configuration, tokenizer and image processor; None: beside the weights.
    """
    torch.manual_seed(0)
    model = build_model(sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(spread)
    model.save_pretrained(path)
    beside = processor_dir or path
    model.config.save_pretrained(beside)
    build_tokenizer().save_pretrained(beside)
    build_processor().save_pretrained(beside)
    return path
