"""Prompt groups: the rollouts of one prompt at one step, before and after guide trajectories take slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from npo_core.advantages import group_advantages
from npo_core.guide import GuideTrajectories, GuideTrajectory
from npo_core.interfaces import FinishReason, Prompt, Rollouts, Verdict
from npo_core.mixing import plan_replacement
from schemas.algorithm import AlgorithmSection
from schemas.records import SCHEMA_VERSION


@dataclass(frozen=True)
class Group:
    """The G on-policy rollouts of one prompt; every list has one entry a slot."""

    prompt: Prompt
    prompt_ids: np.ndarray
    completion_ids: list[np.ndarray]
    logprobs: list[np.ndarray]
    entropies: list[np.ndarray]
    finish_reasons: list[FinishReason]
    texts: Sequence[str] = ()
    verdicts: Sequence[Verdict] = ()

    @classmethod
    def sampled(cls, prompt: Prompt, prompt_ids: np.ndarray, rollouts: Rollouts, rows: slice) -> Group:
        """The group which the given rows of a generator's output are."""
        return cls(
            prompt,
            prompt_ids,
            rollouts.completion_ids[rows],
            rollouts.logprobs[rows],
            rollouts.entropies[rows],
            rollouts.finish_reasons[rows],
        )

    def judged(self, texts: Sequence[str], verdicts: Sequence[Verdict]) -> Group:
        """The same group with what the verifier read and said."""
        return replace(self, texts=texts, verdicts=verdicts)


@dataclass(frozen=True)
class MixedGroup:
    """A group as it enters the update."""

    group: Group
    accuracy: float
    """p̂: mean reward of the on-policy rollouts, before any replacement."""
    guides: Sequence[GuideTrajectory | None]
    """What took each slot; None: the policy's own rollout stayed."""
    advantages_G: np.ndarray
    """float64, over the modified group."""


def mix_groups(
    step: int, groups: Sequence[Group], guide: GuideTrajectories, algorithm: AlgorithmSection
) -> tuple[list[MixedGroup], dict[str, float]]:
    """Gate, slot replacement and advantages over the modified groups (NPO, arXiv 2604.20733, section 3.1).

    Returns:
        The modified groups, and the `npo/*` metrics of the replacement.
    """
    rewards_PG = torch.tensor([[v.reward for v in g.verdicts] for g in groups], dtype=torch.float64)
    correct_PG = torch.tensor([[v.correct for v in g.verdicts] for g in groups])
    stored = [[t for t in guide.get(g.prompt.prompt_id, ()) if t.serves(step)] for g in groups]
    stored_P = torch.tensor([len(found) for found in stored])
    plan = plan_replacement(rewards_PG, correct_PG, stored_P, algorithm.gate, algorithm.slot, algorithm.guide_slots)
    guide_rewards_PS = torch.zeros(len(groups), max(1, *map(len, stored)), dtype=torch.float64)
    for p, found in enumerate(stored):
        guide_rewards_PS[p, : len(found)] = torch.tensor([t.reward for t in found], dtype=torch.float64)
    advantages_PG = group_advantages(
        plan.mix(rewards_PG, guide_rewards_PS), algorithm.advantage_scale, algorithm.advantage_eps
    )
    columns = zip(groups, plan.accuracy_P.tolist(), stored, plan.guide_PG.tolist(), advantages_PG.numpy(), strict=True)
    mixed = [
        MixedGroup(group, accuracy, [None if s < 0 else found[s] for s in taken_G], advantages_G)
        for group, accuracy, found, taken_G, advantages_G in columns
    ]
    return mixed, plan.metrics()


def step_metrics(mixed: Sequence[MixedGroup]) -> dict[str, float]:
    """The metrics of a step's on-policy rollouts; rewards are those before replacement."""
    rewards_PG = np.array([[v.reward for v in m.group.verdicts] for m in mixed])
    correct_PG = np.array([[v.correct for v in m.group.verdicts] for m in mixed])
    lengths = np.array([len(ids) for m in mixed for ids in m.group.completion_ids])
    truncated = [reason == "length" for m in mixed for reason in m.group.finish_reasons]
    std_P = rewards_PG.std(axis=1, ddof=1) if rewards_PG.shape[1] > 1 else np.zeros(len(mixed))
    return {
        "reward": float(rewards_PG.mean()),
        "reward_std": float(std_P.mean()),
        "frac_reward_zero_std": float(np.mean(rewards_PG.min(axis=1) == rewards_PG.max(axis=1))),
        "entropy": float(np.concatenate([e for m in mixed for e in m.group.entropies]).mean(dtype=np.float64)),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(np.mean(truncated)),
        "batch/accuracy": float(correct_PG.mean()),
        "batch/solve_none": float(np.mean(~correct_PG.any(axis=1))),
        "batch/solve_all": float(np.mean(correct_PG.all(axis=1))),
        "tokens/policy": float(lengths.sum()),
    }


def failure_metrics(mixed: Sequence[MixedGroup]) -> dict[str, float]:
    """The metrics of a verifier that can fail: how many on-policy rollouts have no verdict, and therefore reward 0."""
    failures = [verdict.failure for m in mixed for verdict in m.group.verdicts]
    return {
        "verifier/timeouts": float(failures.count("timeout")),
        "verifier/errors": float(failures.count("error")),
    }


def group_rows(
    run_id: str, leg_id: str, step: int, weights_digest: str | None, verifier: str, mixed: Sequence[MixedGroup]
) -> list[dict[str, Any]]:
    """Trajectory rows of a step: every rollout, the displaced ones too, and the guide's."""
    rows: list[dict[str, Any]] = []
    for m in mixed:
        prompt = m.group.prompt
        shared = {
            "run_id": run_id,
            "leg_id": leg_id,
            "step": step,
            "prompt_id": prompt.prompt_id,
            "task": prompt.task,
            "prompt_ids": m.group.prompt_ids,
            "verifier": verifier,
            "group_accuracy": m.accuracy,
            "image_refs": list(prompt.image_refs),
            "schema_version": SCHEMA_VERSION,
        }
        for slot, verdict in enumerate(m.group.verdicts):
            displaced = m.guides[slot] is not None
            rows.append(
                {
                    **shared,
                    "slot": slot,
                    "source": "policy",
                    "behavior_step": step,
                    "behavior_digest": weights_digest,
                    "completion_ids": m.group.completion_ids[slot],
                    "behavior_logprobs": m.group.logprobs[slot],
                    "reward": verdict.reward,
                    "correct": verdict.correct,
                    "verdict": verdict.reason,
                    "finish_reason": m.group.finish_reasons[slot],
                    "advantage": None if displaced else float(m.advantages_G[slot]),
                    "displaced": displaced,
                    "entropy": float(m.group.entropies[slot].mean(dtype=np.float64)),
                    "text": m.group.texts[slot],
                }
            )
        rows += [
            {**guide.row(), **shared, "slot": slot, "advantage": float(m.advantages_G[slot])}
            for slot, guide in enumerate(m.guides)
            if guide is not None
        ]
    return rows
