"""Updates that are corrected for the engine that sampled their rows, against the formulas row by row."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from npo_core.deepspeed_messages import batch_arrays, batch_of
from npo_core.frames import pack, unpack
from npo_core.interfaces import TrainBatch
from npo_core.learner import TorchLearner
from npo_core.policy import Policy
from schemas.config import Config
from tests.test_learner import adamw, batch, config, policy_for, row_logps, weights
from tests.tiny import tiny_policy

CORRECTIONS = ("none", "token-truncated", "sequence-mask")
CAP = 1.3
PERTURBATION = 0.4
"""Standard deviation in nats a token: every correction has rows that it changes and rows that it leaves."""


def perturbed(policy: Policy, settings: Config, data: TrainBatch, nats: float = PERTURBATION) -> TrainBatch:
    """The batch as if another engine had sampled it, whose log-probabilities are off by so much."""
    noise = np.random.default_rng(5)
    exact = policy.log_probs(data.prompt_ids, data.completion_ids, settings.rollout.temperature)[0]
    behavior = [
        None if guide else (row + noise.normal(0, nats, len(row))).astype(np.float32)
        for row, guide in zip(exact, data.guide_B, strict=True)
    ]
    return replace(data, behavior_logprobs=behavior)


def by_hand(ratios: list[float], correction: str) -> list[float]:
    if correction == "token-truncated":
        return [min(ratio, CAP) for ratio in ratios]
    if correction == "sequence-mask":
        whole = math.prod(ratios)
        return [whole if whole <= CAP else 0.0] * len(ratios)
    return [1.0] * len(ratios)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("updates", [1, 2])
def test_the_gradient_is_the_one_computed_by_hand(tmp_path: Path, correction: str, updates: int) -> None:
    algorithm = {"sampling_correction": correction, "sampling_cap": CAP, "kl_beta": 0.1}
    settings = config(algorithm=algorithm, learner={"micro_batch_tokens": 40, "updates_per_batch": updates})
    ours, plain = policy_for(tmp_path, settings), tiny_policy(tmp_path / "plain", dtype="float64")
    reference = tiny_policy(tmp_path / "reference", dtype="float64")
    with torch.no_grad():
        for parameter in reference.model.parameters():
            parameter.mul_(1.05)
    data = perturbed(ours, settings, batch(0))
    metrics = TorchLearner(ours, settings, reference).step(data)

    assert data.behavior_logprobs is not None
    start = [row_logps(plain, data, i, settings).detach() for i in range(12)]
    weighed, gaps = [], []
    for i, behavior in enumerate(data.behavior_logprobs):
        if behavior is None:
            weighed.append([1.0] * len(start[i]))
            continue
        gaps.append(gap := [float(a) - float(b) for a, b in zip(start[i], behavior, strict=True)])
        weighed.append(by_hand([math.exp(x) for x in gap], correction))
    optimizer = adamw(plain, settings)
    for _ in range(updates):
        optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for i in range(12):
            logps_T, advantage = row_logps(plain, data, i, settings), float(data.advantages_B[i])
            ratio_T = (logps_T - start[i]).exp()
            objective_T = torch.minimum(ratio_T * advantage, ratio_T.clamp(0.8, 1.2) * advantage)
            objective_T = objective_T * torch.tensor(weighed[i], dtype=torch.float64)
            with torch.no_grad():
                ref_T = row_logps(reference, data, i, settings)
            gap_T = ref_T - logps_T
            loss = loss + (0.1 * (gap_T.exp() - gap_T - 1) - objective_T).mean() / 12
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.model.parameters(), settings.learner.max_grad_norm)
        optimizer.step()
    # The start of the step is kept in float32 where there are several updates.
    tolerance = 1e-10 if updates == 1 else 1e-5
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=tolerance)
    torch.testing.assert_close(weights(ours), weights(plain), rtol=0, atol=tolerance)

    tokens = [x for gap in gaps for x in gap]
    own = [
        w for row, behavior in zip(weighed, data.behavior_logprobs, strict=True) if behavior is not None for w in row
    ]
    corrected = {
        "none": 0.0,
        "token-truncated": sum(math.exp(x) > CAP for x in tokens),
        "sequence-mask": own.count(0.0),
    }[correction]
    assert (0 < corrected < len(own)) == (correction != "none"), "the case must have rows of both kinds"
    assert {name: value for name, value in metrics.items() if name.startswith("sampling/")} == pytest.approx(
        {
            "sampling/sampling_logp_difference/mean": sum(map(abs, tokens)) / len(tokens),
            "sampling/sampling_logp_difference/max": max(map(abs, tokens)),
            "sampling/importance_sampling_ratio/min": min(own),
            "sampling/importance_sampling_ratio/mean": sum(own) / len(own),
            "sampling/importance_sampling_ratio/max": max(own),
            "sampling/ess": sum(own) ** 2 / (len(own) * sum(w * w for w in own)),
            "sampling/corrected": corrected / len(own),
        },
        rel=1e-6,
    )


def test_corrections_of_a_sampler_that_is_the_trainer_change_nothing(tmp_path: Path) -> None:
    plain = config()
    wanted = TorchLearner(alone := policy_for(tmp_path / "plain", plain), plain).step(batch(0))
    assert not [name for name in wanted if name.startswith("sampling/")]
    for correction in CORRECTIONS:
        settings = config(algorithm={"sampling_correction": correction})
        policy = policy_for(tmp_path / correction, settings)
        metrics = TorchLearner(policy, settings).step(perturbed(policy, settings, batch(0), nats=0.0))
        assert metrics["sampling/sampling_logp_difference/max"] < 1e-6
        assert metrics["sampling/ess"] == pytest.approx(1)
        torch.testing.assert_close(weights(policy), weights(alone), rtol=0, atol=0 if correction == "none" else 1e-5)


def test_log_probabilities_that_are_not_finite_name_step_and_sampler(tmp_path: Path) -> None:
    settings = config()
    policy = policy_for(tmp_path, settings)
    data = perturbed(policy, settings, batch(17))
    assert data.behavior_logprobs is not None
    first = data.behavior_logprobs[0]
    assert first is not None
    first[0] = -np.inf
    with pytest.raises(FloatingPointError, match=r"step 17: 1 of .* sampler's log-probabilities"):
        TorchLearner(policy, settings).step(data)


@pytest.mark.parametrize("sampled_elsewhere", [False, True])
def test_a_batch_reaches_the_ranks_with_its_samplers_log_probabilities(tmp_path: Path, sampled_elsewhere: bool) -> None:
    settings = config()
    data = batch(3)
    if sampled_elsewhere:
        data = perturbed(policy_for(tmp_path, settings), settings, data)
    found, reference = batch_of(3, unpack(pack({}, batch_arrays(data, None)))[1])
    assert reference is None
    assert rows(found.behavior_logprobs) == rows(data.behavior_logprobs)
    assert rows(found.guide_logprobs) == rows(data.guide_logprobs)


def rows(values: list[np.ndarray | None] | None) -> Any:
    return values and [None if row is None else row.tolist() for row in values]
