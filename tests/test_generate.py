"""Generation: the KV-cache loop equals the plain computation, and rows do not depend on who shares the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npo_core.generate import TransformersGenerator, draw
from npo_core.interfaces import Rollouts, SamplingParams, StreamKey
from npo_core.policy import Policy
from npo_core.streams import uniforms
from tests.tiny import STOP, prompts_of, tiny_policy

PARAMS = SamplingParams(temperature=0.8, max_new_tokens=10, stop_ids=(STOP,))


@pytest.fixture(scope="module")
def policy64(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return tiny_policy(tmp_path_factory.mktemp("policy"), dtype="float64")


def keys(prompts: int, n: int) -> list[StreamKey]:
    return [StreamKey(3, "rollout", 5, f"p{p}", g) for p in range(prompts) for g in range(n)]


def plain_sample(policy: Policy, prompts: list[np.ndarray], n: int, params: SamplingParams) -> Rollouts:
    """One row at a time, the whole sequence again for every token, no cache, no padding."""
    out = Rollouts([], [], [], [])
    draws = uniforms(keys(len(prompts), n), params.max_new_tokens)
    for i in range(len(prompts) * n):
        ids, logps, entropies = list(prompts[i // n]), [], []
        for t in range(params.max_new_tokens):
            with torch.no_grad():
                logits_V = policy.model(input_ids=torch.tensor([ids])).logits[0, -1]
            logps_V = torch.log_softmax(logits_V.double() / params.temperature, dim=-1)
            cdf_V = logps_V.exp().cumsum(0)
            token = int(torch.searchsorted(cdf_V, torch.tensor(draws[i, t]) * cdf_V[-1], right=True))
            ids.append(token)
            logps.append(float(logps_V[token]))
            entropies.append(float(-(logps_V.exp() * logps_V).sum()))
            if token in params.stop_ids:
                break
        out.completion_ids.append(np.array(ids[len(prompts[i // n]) :], np.int32))
        out.logprobs.append(np.array(logps))
        out.entropies.append(np.array(entropies))
        out.finish_reasons.append("stop" if ids[-1] in params.stop_ids else "length")
    return out


def test_sampling_equals_the_plain_loop_without_a_cache(policy64: Policy) -> None:
    prompts = prompts_of([3, 7, 5, 4])
    ours = TransformersGenerator(policy64, max_rows=1024).sample(prompts, 6, PARAMS, keys(4, 6))
    plain = plain_sample(policy64, prompts, 6, PARAMS)
    assert [ids.tolist() for ids in ours.completion_ids] == [ids.tolist() for ids in plain.completion_ids]
    assert ours.finish_reasons == plain.finish_reasons
    assert {"stop", "length"} == set(ours.finish_reasons), "the case must have rows of both kinds"
    # Stored values are float32.
    np.testing.assert_allclose(np.concatenate(ours.logprobs), np.concatenate(plain.logprobs), rtol=2e-7, atol=2e-7)
    np.testing.assert_allclose(np.concatenate(ours.entropies), np.concatenate(plain.entropies), rtol=1e-6)


def test_log_probs_of_sampled_tokens_equal_the_learners_forward(policy64: Policy) -> None:
    prompts = prompts_of([6, 2, 9])
    generator = TransformersGenerator(policy64, max_rows=1024)
    rollouts = generator.sample(prompts, 4, PARAMS, keys(3, 4))
    rows = [prompts[i // 4] for i in range(12)]
    scored = generator.score(rows, rollouts.completion_ids, PARAMS.temperature)
    for sampled, score in zip(rollouts.logprobs, scored, strict=True):
        np.testing.assert_allclose(sampled, score, atol=3e-7)


@settings(max_examples=10, deadline=None)
@given(max_rows=st.integers(1, 40), order=st.permutations(range(5)))
def test_a_rows_tokens_do_not_depend_on_its_batch(policy64: Policy, max_rows: int, order: list[int]) -> None:
    prompts, n = prompts_of([3, 8, 5, 6, 4]), 3
    whole = TransformersGenerator(policy64, max_rows=1024).sample(prompts, n, PARAMS, keys(5, n))
    streams = [key for p in order for key in keys(5, n)[p * n : (p + 1) * n]]
    parts = TransformersGenerator(policy64, max_rows).sample([prompts[p] for p in order], n, PARAMS, streams)
    for place, p in enumerate(order):
        for g in range(n):
            assert parts.completion_ids[place * n + g].tolist() == whole.completion_ids[p * n + g].tolist()


def test_the_stop_token_belongs_to_the_completion_and_nothing_follows_it(policy64: Policy) -> None:
    rollouts = TransformersGenerator(policy64, max_rows=64).sample(prompts_of([4]), 32, PARAMS, keys(1, 32))
    for ids, reason in zip(rollouts.completion_ids, rollouts.finish_reasons, strict=True):
        assert STOP not in ids[:-1].tolist()
        assert (ids[-1] == STOP) == (reason == "stop")
        assert reason == "stop" or len(ids) == PARAMS.max_new_tokens


def test_draws_follow_the_distribution() -> None:
    logits_1V = torch.tensor([[0.0, 1.0, -1.0, 2.0, -torch.inf]])
    count = 200_000
    tokens, logps, entropy = draw(logits_1V.expand(count, -1), 0.7, torch.rand(count, dtype=torch.float64))
    probs = torch.softmax(logits_1V[0] / 0.7, dim=0)
    shares = torch.bincount(tokens, minlength=5) / count
    assert shares[4] == 0, "a token of probability zero is never drawn"
    torch.testing.assert_close(shares, probs, atol=0.005, rtol=0)
    torch.testing.assert_close(logps, probs.log()[tokens])
    expected = -(probs[:4] * probs[:4].log()).sum()
    torch.testing.assert_close(entropy[0], expected)


def test_at_temperature_zero_the_likeliest_token_is_certain() -> None:
    logits_BV = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, -torch.inf]])
    tokens, logps, entropy = draw(logits_BV, 0.0, torch.tensor([0.99, 0.99], dtype=torch.float64))
    assert tokens.tolist() == [1, 0], "of equal tokens the first"
    assert logps.tolist() == entropy.tolist() == [0.0, 0.0]


def test_temperature_zero_is_where_sampling_goes_as_it_cools(policy64: Policy) -> None:
    prompts = prompts_of([4, 6])
    generator = TransformersGenerator(policy64, max_rows=8)
    answers = [generator.sample(prompts, 1, SamplingParams(t, 8, (STOP,)), keys(2, 1)) for t in (0.0, 1e-6)]
    assert [ids.tolist() for ids in answers[0].completion_ids] == [ids.tolist() for ids in answers[1].completion_ids]


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    logits_BV = torch.zeros(3, 4)
    logits_BV[1, 2] = bad
    with pytest.raises(FloatingPointError, match="1 of 3 rows"):
        draw(logits_BV, temperature, torch.full((3,), 0.5, dtype=torch.float64))


def test_streams_are_functions_of_their_key_alone() -> None:
    some = uniforms(keys(3, 2), 8)
    np.testing.assert_array_equal(uniforms(keys(3, 2)[::-1], 8), some[::-1])
    np.testing.assert_array_equal(uniforms(keys(3, 2), 5), some[:, :5])
    assert len(np.unique(some)) == some.size
