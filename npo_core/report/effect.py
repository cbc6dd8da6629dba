"""What the guides did: how many prompts they solved, of which families, and how those fared on the main line."""

from __future__ import annotations

from typing import Any

import polars as pl

from npo_core.artifacts import RunArtifacts
from npo_core.rows import frame
from npo_core.trajectories import trajectories
from schemas.records import GuideManifest


def guides(run: RunArtifacts) -> list[dict[str, Any]]:
    """One a guide: its checkpoint, window, prompts, `solved`, tokens and `families` [{task, solved, prompts}]."""
    tasks = {row["prompt_id"]: row["task"] for row in run.prompts().select(["prompt_id", "task"]).to_pylist()}
    return [
        {
            "guide_id": guide.guide_id,
            "leg": guide.spec.checkpoint.leg_id,
            "step": guide.spec.checkpoint.step,
            "start": guide.spec.start,
            "stop": guide.spec.stop,
            "k": guide.spec.k,
            "prompts": guide.asked,
            "solved": guide.solved,
            "tokens": guide.tokens_guide,
            "families": _families(run, guide, tasks),
        }
        for guide in run.guides()
    ]


def before_and_after(run: RunArtifacts, steps: pl.DataFrame, start: int, stop: int) -> list[dict[str, Any]]:
    """Group accuracy of the prompts of a window [start, stop), before any replacement, on the main line.

    Args:
        run: the run.
        steps: its `views.steps`.
        start: the window's first step.
        stop: the first step after it.

    Returns:
        A row for the prompts that took a guide trajectory in the window and one for those that never did: `prompts`;
        `first` and `last`, mean group accuracy where they occur first and last in the window; `returned`, how many of
        them occur after it, and `after`, their mean group accuracy where they do so first. None where there are none.
    """
    line = steps.filter("main_line").select("leg_id", "step")
    groups = (
        trajectories(run, ("leg_id", "step", "prompt_id", "group_accuracy", "source"))
        .filter(pl.col("step") >= start)
        .join(line, on=["leg_id", "step"], how="semi")
        .group_by("prompt_id", "step")
        .agg(pl.col("group_accuracy").first(), replaced=(pl.col("source") == "guide").any())
        .sort("step")
    )
    inside, outside = groups.filter(pl.col("step") < stop), groups.filter(pl.col("step") >= stop)
    prompts = (
        inside.group_by("prompt_id")
        .agg(
            pl.col("replaced").any(),
            first=pl.col("group_accuracy").first(),
            last=pl.col("group_accuracy").last(),
        )
        .join(outside.group_by("prompt_id").agg(after=pl.col("group_accuracy").first()), on="prompt_id", how="left")
    )
    return [
        {
            "replaced": replaced,
            "prompts": part.height,
            "first": part["first"].mean(),
            "last": part["last"].mean(),
            "returned": part["after"].count(),
            "after": part["after"].mean(),
        }
        for replaced in (True, False)
        for part in (prompts.filter(pl.col("replaced") == replaced),)
    ]


def _families(run: RunArtifacts, guide: GuideManifest, tasks: dict[str, str]) -> list[dict[str, Any]]:
    solved = set(frame(run, [guide], "trajectories", ("prompt_id",))["prompt_id"])
    wanted: dict[str, list[str]] = {}
    for prompt_id in run.guide_spec(guide).prompt_ids:
        wanted.setdefault(tasks[prompt_id], []).append(prompt_id)
    return [
        {"task": task, "solved": len(solved.intersection(ids)), "prompts": len(ids)}
        for task, ids in sorted(wanted.items())
    ]
