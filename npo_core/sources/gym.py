"""Questions of reasoning-gym, each with the entry that its own scorer wants to see."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from npo_core.interfaces import ConfigurationError, Prompt, first_line
from npo_core.sources.columns import Mapped
from npo_core.sources.rows import EmptyRowError, UnusableRowError
from schemas.data import GymTask
from schemas.digest import digest_json, short


def generate(task: GymTask) -> Iterator[tuple[str, Any]]:
    """(where, entry) of each of its questions.

    Raises:
        ConfigurationError: reasoning-gym is not installed, or has no such task or parameter.
    """
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "data.source reasoning-gym needs a package that is not installed: pip install 'near-future[verifiers]', or "
            "choose another data.source"
        ) from error
    try:
        made = reasoning_gym.create_dataset(task.name, size=task.size, seed=task.seed, **task.parameters)
    except Exception as error:  # each task checks its own parameters
        reason = first_line(error)
        raise ConfigurationError(
            f"data.tasks {task.name} with {task.parameters or 'no parameters'} is none of reasoning-gym's ({reason}); "
            "correct its name or parameters"
        ) from error
    for number in range(task.size):
        yield f"{task.name} question {number + 1}", made[number]


def question(task: GymTask, where: str, entry: Any) -> Mapped:
    """An entry as a prompt. The reference is shown; the scorer judges by the entry, as it comes back from JSON.

    Raises:
        UnusableRowError: the entry cannot be kept as JSON, or its scorer does not find its own answer right then.
    """
    from reasoning_gym import get_score_answer_fn

    text, answer = entry["question"], entry["answer"]
    if not text.strip():
        raise EmptyRowError("it asks nothing")
    try:
        kept = json.dumps({"dataset": task.name, "entry": entry}, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UnusableRowError(f"its metadata cannot be written as JSON ({error})") from error
    if answer is not None:
        try:
            score = get_score_answer_fn(task.name)(answer=answer, entry=json.loads(kept)["entry"])
        except Exception as error:  # a scorer that misses what JSON does not keep
            raise UnusableRowError(f"its scorer fails on its own answer ({error!r})") from error
        if score != 1.0:
            raise UnusableRowError(f"its scorer gives its own answer {score:g}, not 1")
    return Mapped(
        where,
        Prompt(
            prompt_id=short(digest_json([task.name, text])),
            task=task.name,
            messages=({"role": "user", "content": text},),
            answer="" if answer is None else answer,
            metadata=kept,
        ),
    )
