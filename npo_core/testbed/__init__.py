"""The embedded testbed: a policy that is weak but not blind, graded tasks, and a verifier that cannot be guessed."""

from pathlib import Path

from npo_core.testbed.families import make_prompts
from npo_core.testbed.verifier import TestbedVerifier

__all__ = ["TestbedVerifier", "make_prompts", "model_dir"]


def model_dir() -> Path:
    """The model directory that ships with the package: the warm-started policy (see `warm_start`), its tokenizer, and
    `recipe.json`, the recipe that made it and the SHA-256 of its weights."""
    return Path(__file__).parent / "data"
