"""The update equals the plain computation, whatever the micro-batches, chunks and rows without a gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npo_core.interfaces import LocalCheckpoint, TrainBatch
from npo_core.learner import TorchLearner
from npo_core.policy import Policy
from schemas.config import Config
from tests.tiny import VOCAB, prompts_of, tiny_policy

RATE = 1e-2


def config(**sections: dict[str, Any]) -> Config:
    learner = {"learning_rate": RATE, "device": "cpu", **sections.pop("learner", {})}
    rollout = {"temperature": 0.9, "max_new_tokens": 12, **sections.pop("rollout", {})}
    return Config.model_validate({"run": {"name": "t"}, "learner": learner, "rollout": rollout, **sections})


def batch(step: int, degenerate: tuple[int, ...] = (1,), guide: bool = True) -> TrainBatch:
    """Three groups of four rows of unequal lengths; the named groups have advantage 0; one guide row."""
    rng = np.random.default_rng(step)
    prompts = prompts_of([3, 6, 4])
    advantages = rng.normal(size=12)
    for group in degenerate:
        advantages[group * 4 : group * 4 + 4] = 0
    completions = [rng.integers(2, VOCAB, size=rng.integers(1, 12)).astype(np.int32) for _ in range(12)]
    is_guide = np.zeros(12, bool)
    logps: list[np.ndarray | None] = [None] * 12
    if guide:
        is_guide[3] = True
        logps[3] = -rng.random(len(completions[3])).astype(np.float32)
    return TrainBatch(step, [prompts[i // 4] for i in range(12)], completions, advantages, is_guide, logps)


def plain_update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    data: TrainBatch,
    settings: Config,
    reference: Policy | None = None,
) -> float:
    """GRPO's loss by its formula, row by row on full logits, with every row in the backward pass. Returns the norm."""
    optimizer.zero_grad()
    loss = torch.zeros((), dtype=policy.dtype)
    for i in range(len(data.prompt_ids)):
        logps_T, start = row_logps(policy, data, i, settings), None
        start = logps_T.detach()
        advantage = torch.tensor(data.advantages_B[i], dtype=policy.dtype)
        if data.guide_B[i] and settings.algorithm.guide_correction == "exact":
            start = torch.from_numpy(np.asarray(data.guide_logprobs[i], dtype=np.float64)).to(policy.dtype)
        ratio_T = (logps_T - start).exp()
        clipped_T = ratio_T.clamp(1 - settings.algorithm.clip_low, 1 + settings.algorithm.clip_high)
        loss_T = -torch.minimum(ratio_T * advantage, clipped_T * advantage)
        if reference is not None:
            with torch.no_grad():
                ref_T = row_logps(reference, data, i, settings)
            gap_T = ref_T - logps_T
            loss_T = loss_T + settings.algorithm.kl_beta * (gap_T.exp() - gap_T - 1)
        loss = loss + loss_T.mean() / len(data.prompt_ids)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), settings.learner.max_grad_norm)
    optimizer.step()
    return float(norm)


def row_logps(policy: Policy, data: TrainBatch, i: int, settings: Config) -> torch.Tensor:
    prompt, completion = data.prompt_ids[i], data.completion_ids[i]
    ids_1L = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
    logps_LV = torch.log_softmax(policy.model(input_ids=ids_1L).logits[0] / settings.rollout.temperature, dim=-1)
    return logps_LV[len(prompt) - 1 : -1].gather(1, ids_1L[0, len(prompt) :, None]).squeeze(1)


def adamw(policy: Policy, settings: Config) -> torch.optim.Optimizer:
    learner = settings.learner
    return torch.optim.AdamW(
        policy.model.parameters(), lr=learner.learning_rate, betas=learner.betas, eps=learner.eps, weight_decay=0.0
    )


def weights(policy: Policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.model.parameters()])


@pytest.mark.parametrize("correction", ["none", "exact"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_updates_equal_the_plain_computation_in_float64(tmp_path: Path, correction: str, checkpointing: bool) -> None:
    settings_ = config(
        algorithm={"guide_correction": correction},
        learner={
            "micro_batch_tokens": 40,
            "chunk_tokens": 5,
            "chunk_vocab": 6,
            "gradient_checkpointing": checkpointing,
        },
    )
    ours = policy_for(tmp_path, settings_)
    plain = tiny_policy(tmp_path / "plain", dtype="float64")
    learner, optimizer = TorchLearner(ours, settings_), adamw(plain, settings_)
    for step, degenerate in enumerate([(1,), (), (0, 2)]):
        data = batch(step, degenerate)
        metrics = learner.step(data)
        norm = plain_update(plain, optimizer, data, settings_)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-10)
        torch.testing.assert_close(weights(ours), weights(plain), rtol=0, atol=1e-10)


def test_updates_equal_the_plain_computation_in_float32_to_a_millionth_of_a_step(tmp_path: Path) -> None:
    """Rows in another order and in micro-batches: float32 sums differ by rounding, here under 1e-5 of the gradient."""
    settings_ = config(learner={"micro_batch_tokens": 40, "chunk_tokens": 5, "chunk_vocab": 6, "eps": 1.0})
    ours = tiny_policy(tmp_path / "ours", **settings_.learner.model_dump(exclude={"device"}))
    plain = tiny_policy(tmp_path / "plain")
    before = weights(plain).clone()
    TorchLearner(ours, settings_).step(batch(0))
    plain_update(plain, adamw(plain, settings_), batch(0), settings_)
    moved = (weights(plain) - before).norm()
    # eps = 1 makes AdamW's step proportional to the gradient, so that rounding of tiny entries is not blown up.
    assert (weights(ours) - weights(plain)).norm() < 1e-5 * moved


def test_the_kl_term_sees_rows_without_advantage(tmp_path: Path) -> None:
    settings_ = config(algorithm={"kl_beta": 0.3}, learner={"micro_batch_tokens": 40})
    ours, plain = policy_for(tmp_path, settings_), tiny_policy(tmp_path / "plain", dtype="float64")
    reference = tiny_policy(tmp_path / "reference", dtype="float64")
    with torch.no_grad():
        for parameter in reference.model.parameters():
            parameter.mul_(1.05)
    learner, optimizer = TorchLearner(ours, settings_, reference), adamw(plain, settings_)
    data = batch(0, degenerate=(0, 1, 2), guide=False)
    metrics = learner.step(data)
    norm = plain_update(plain, optimizer, data, settings_, reference)
    assert metrics["kl"] > 0
    assert norm > 0
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-10)
    torch.testing.assert_close(weights(ours), weights(plain), rtol=0, atol=1e-10)


@settings(max_examples=8, deadline=None)
@given(tokens=st.integers(1, 400))
def test_the_gradient_does_not_depend_on_the_micro_batch_size(
    tmp_path_factory: pytest.TempPathFactory, tokens: int
) -> None:
    path = tmp_path_factory.mktemp("policy")
    results = []
    for size in (10_000, tokens):
        settings_ = config(learner={"micro_batch_tokens": size})
        policy = policy_for(path, settings_)
        results.append((TorchLearner(policy, settings_).step(batch(0)), weights(policy)))
    (whole, ours), (split, theirs) = results
    assert split == pytest.approx(whole, rel=1e-10, abs=1e-13)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_a_batch_without_any_gradient_still_steps_optimizer_and_scheduler(tmp_path: Path) -> None:
    settings_ = config(learner={"warmup_steps": 4})
    policy = policy_for(tmp_path, settings_)
    learner = TorchLearner(policy, settings_)
    learner.step(batch(0))
    moved = weights(policy).clone()
    metrics = learner.step(batch(1, degenerate=(0, 1, 2), guide=False))
    assert metrics["grad_norm"] == 0
    assert metrics["tokens/trained"] == 0
    assert metrics["learning_rate"] == pytest.approx(RATE * 2 / 4), "the scheduler went on"
    assert not torch.equal(weights(policy), moved), "AdamW's first moment moves the weights on"


def test_several_updates_a_batch_clip_against_the_start_of_the_step(tmp_path: Path) -> None:
    settings_ = config(learner={"updates_per_batch": 3, "learning_rate": 0.05, "max_grad_norm": 100.0})
    learner = TorchLearner(policy_for(tmp_path, settings_), settings_)
    assert learner.step(batch(0))["clip_ratio/region_mean"] > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_fail_with_the_step_named(tmp_path: Path, bad: float) -> None:
    settings_ = config()
    policy = policy_for(tmp_path, settings_)
    with torch.no_grad():
        next(iter(policy.model.parameters()))[3] = bad
    with pytest.raises(FloatingPointError, match="step 17"):
        TorchLearner(policy, settings_).step(batch(17))


def test_save_and_load_restore_every_bit(tmp_path: Path) -> None:
    settings_ = config(learner={"warmup_steps": 5})
    one = TorchLearner(tiny_policy(tmp_path / "one"), settings_)
    for step in range(3):
        one.step(batch(step))
    one.save(tmp_path / "saved")
    other = TorchLearner(tiny_policy(tmp_path / "other"), settings_)
    other.load(LocalCheckpoint(tmp_path / "saved", "0" * 64, 3), RATE)
    assert torch.equal(weights(one.policy), weights(other.policy))
    for step in range(3, 6):
        assert one.step(batch(step)) == other.step(batch(step))
    assert torch.equal(weights(one.policy), weights(other.policy))
    one.save(tmp_path / "a")
    other.save(tmp_path / "b")
    for name in ("weights/model.safetensors", "optimizer/optimizer.safetensors", "state.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def policy_for(path: Path, settings_: Config) -> Policy:
    """The tiny policy in float64 with a configuration's learner section."""
    return tiny_policy(path / "ours", dtype="float64", **settings_.learner.model_dump(exclude={"device"}))
