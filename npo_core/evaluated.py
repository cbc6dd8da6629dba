"""Scores of committed evaluations, read from their samples: those of older versions have them too."""

from __future__ import annotations

from typing import Any

import numpy as np

from npo_core.artifacts import RunArtifacts
from npo_core.scores import Scores, score
from schemas.records import EvalManifest


def read_scores(run: RunArtifacts, made: EvalManifest) -> Scores:
    """The scores of an evaluation. The resamples' seed is its identity, so that they are always the same.

    Raises:
        StoreError: its samples are damaged.
    """
    greedy = _counts(run, made, "greedy") if made.greedy else None
    return score(_counts(run, made, "samples"), made.samples_per_prompt, greedy, int(made.eval_id, 16))


def benchmarks(run: RunArtifacts) -> list[dict[str, Any]]:
    """The evaluations on benchmarks, by name, step and creation: `eval_id`, `benchmark`, `leg_id`, `step`, `verifier`,
    `temperature`, `prompts`, `samples` a prompt, and `scores` (`Scores.as_json`)."""
    found = [(made, made.benchmark) for made in run.all_evaluations() if made.benchmark is not None]
    return [
        {
            "eval_id": made.eval_id,
            "benchmark": asked.name,
            "leg_id": made.checkpoint.leg_id,
            "step": made.checkpoint.step,
            "verifier": asked.verifier,
            "temperature": asked.temperature,
            "prompts": sum(task.prompts for task in made.tasks.values()),
            "samples": made.samples_per_prompt,
            "scores": read_scores(run, made).as_json(),
        }
        for made, asked in sorted(found, key=lambda pair: (pair[1].name, pair[0].checkpoint.step, pair[0].created_at))
    ]


def _counts(run: RunArtifacts, made: EvalManifest, role: str) -> dict[str, np.ndarray]:
    """Number of correct answers of each prompt, by task."""
    table = run.table(made, role, columns=["task", "prompt_id", "correct"])
    counts: dict[str, dict[str, int]] = {}
    for task, prompt_id, correct in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
        of_task = counts.setdefault(task, {})
        of_task[prompt_id] = of_task.get(prompt_id, 0) + correct
    return {task: np.array(list(of_task.values())) for task, of_task in counts.items()}
