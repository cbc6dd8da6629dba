"""What made-up runs of any size have in common: a record without a model, checkpoints of a few numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import save_file

from npo_core.artifacts import prompts_digest
from schemas.config import Config
from schemas.digest import digest_json
from schemas.records import RunRecord

ENVIRONMENT = {"torch": "none", "threads": "1", "generator": "synthetic"}


def made_up_record(
    run_id: str, config: Config, prompts: pa.Table, verifier: str, identity: Any, created_at: str
) -> RunRecord:
    """The record of a run of a model that does not exist; `identity` makes its legs its own."""
    recipe = config.recipe()
    return RunRecord(
        run_id=run_id,
        recipe=recipe,
        config=config.model_dump(mode="json"),
        model_digest=digest_json("model"),
        tokenizer_digest=digest_json("tokenizer"),
        prompts_digest=prompts_digest(prompts),
        verifier=verifier,
        recipe_digest=digest_json([recipe, identity]),
        created_at=created_at,
    )


def write_checkpoint(directory: Path, step: int, rng: np.random.Generator) -> None:
    """Random weights and optimizer of sixteen numbers each, laid out as `LocalCheckpoint`."""
    for folder, file in (("weights", "model"), ("optimizer", "optimizer")):
        (directory / folder).mkdir()
        tensors = {"w": rng.standard_normal((4, 4)).astype(np.float32)}
        save_file(tensors, directory / folder / f"{file}.safetensors", {"format": "pt"})
    (directory / "state.json").write_text(json.dumps({"step": step}))
