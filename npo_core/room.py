"""Whether the longest prompt and the longest answer fit what holds them."""

from __future__ import annotations

from typing import Any

from npo_core.interfaces import ConfigurationError
from schemas.config import Config
from schemas.records import DataReport


def positions(model: Any) -> int | None:
    """Longest context of a model by transformers' configuration of it, in tokens; None: it names no limit."""
    found = getattr(model.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def require_room(config: Config, model: Any, report: DataReport) -> None:
    """Refuses prompts and answers that are longer together than the model's positions.

    Args:
        model: transformers' configuration of it.
        report: of the prompts; where `data.max_prompt_tokens` is set, prompts may be as long.

    Raises:
        ConfigurationError: names both lengths and the limit.
    """
    limit, answer = positions(model), config.rollout.max_new_tokens
    if limit is None:
        return
    asked = config.data.max_prompt_tokens
    longest, name = (report.longest or 0, "the longest prompt,") if asked is None else (asked, "data.max_prompt_tokens")
    if longest + answer > limit:
        remedy = "lower rollout.max_new_tokens"
        if answer < limit:
            remedy += f", or set data.max_prompt_tokens to at most {limit - answer} and data.over_long to skip"
        raise ConfigurationError(
            f"{name} {longest} tokens, and rollout.max_new_tokens {answer} exceed the model's {limit} positions; "
            f"{remedy}"
        )
