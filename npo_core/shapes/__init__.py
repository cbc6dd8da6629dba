"""Questions about drawn shapes: a visual counterpart of the testbed, with a small vision-language model that has
learned to see them, but answers by a wrong habit now and then."""

from pathlib import Path

from npo_core.shapes.families import draw_pictures, make_prompts

__all__ = ["draw_pictures", "make_prompts", "model_dir"]


def model_dir() -> Path:
    """The model directory that ships with the package: the warm-started policy (see `warm_start`), its tokenizer and
    image processor, and `recipe.json`, the recipe that made it and the SHA-256 of its weights."""
    return Path(__file__).parent / "data"
