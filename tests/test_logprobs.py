"""Chunked log-probabilities: values, entropies, gradients, memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npo_core.logprobs import linear_logprobs


def problem(
    tokens: int, hidden: int, vocab: int, dtype: torch.dtype = torch.float64, scale: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight (both differentiable) and targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = (scale * torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)).to(dtype)
    weight_VH = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).to(dtype)
    targets_N = torch.randint(vocab, (tokens,), generator=generator)
    return hidden_NH.requires_grad_(), weight_VH.requires_grad_(), targets_N


def plain(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same with all logits at once."""
    logps_NV = torch.log_softmax(hidden_NH @ weight_VH.T / temperature, dim=-1)
    return logps_NV.gather(1, targets_N[:, None]).squeeze(1), -(logps_NV.exp() * logps_NV).sum(-1).detach()


@settings(deadline=None)
@given(
    tokens=st.integers(0, 9),
    vocab=st.integers(1, 12),
    chunk_tokens=st.integers(1, 11),
    chunk_vocab=st.integers(1, 14),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_equals_log_softmax_for_every_chunking(
    tokens: int, vocab: int, chunk_tokens: int, chunk_vocab: int, temperature: float, scale: float, seed: int
) -> None:
    hidden_NH, weight_VH, targets_N = problem(tokens, 5, vocab, scale=scale, seed=seed)
    logps_N, entropies_N = linear_logprobs(hidden_NH, weight_VH, targets_N, temperature, chunk_tokens, chunk_vocab)
    expected_N, expected_entropies_N = plain(hidden_NH, weight_VH, targets_N, temperature)
    torch.testing.assert_close(logps_N, expected_N, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropies_N, expected_entropies_N, rtol=1e-12, atol=1e-12)
    assert not entropies_N.requires_grad

    grad_N = torch.linspace(-1, 2, tokens, dtype=torch.float64)
    actual = torch.autograd.grad(logps_N, (hidden_NH, weight_VH), grad_N)
    expected = torch.autograd.grad(expected_N, (hidden_NH, weight_VH), grad_N)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("chunk_tokens", "chunk_vocab"), [(100, 100), (2, 3)])
def test_gradcheck(chunk_tokens: int, chunk_vocab: int) -> None:
    hidden_NH, weight_VH, targets_N = problem(5, 4, 8)

    def logps(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        return linear_logprobs(hidden_NH, weight_VH, targets_N, 0.7, chunk_tokens, chunk_vocab)[0]

    assert torch.autograd.gradcheck(logps, (hidden_NH, weight_VH))


def test_entropy_of_a_flat_and_of_a_certain_distribution() -> None:
    flat_NH, weight_VH = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[1.0, 0], [0, 1], [0, 0]]).double()
    target_N = torch.tensor([1])
    _, flat_N = linear_logprobs(flat_NH, weight_VH, target_N, 1.0, 8, 2)
    torch.testing.assert_close(flat_N, torch.tensor([3.0], dtype=torch.float64).log())
    logps_N, certain_N = linear_logprobs(flat_NH + torch.tensor([0.0, 1e4]), weight_VH, target_N, 1.0, 8, 2)
    assert (logps_N.item(), certain_N.item()) == (0.0, 0.0)


def test_entropy_is_exact_in_float32_for_logits_far_from_zero() -> None:
    hidden_NH, weight_VH, targets_N = problem(64, 5, 50)
    # One more hidden unit lifts every logit by 1000, which leaves the distribution as it is.
    lifted_NH = torch.cat([hidden_NH, torch.full((64, 1), 1000.0)], dim=1).float()
    lifted_VH = torch.cat([weight_VH, torch.ones(50, 1)], dim=1).float()
    _, entropies_N = linear_logprobs(lifted_NH, lifted_VH, targets_N, 1.0, 16, 16)
    expected_N = plain(lifted_NH.double(), lifted_VH.double(), targets_N, 1.0)[1]
    # The logits themselves carry an error of 1000 · 2⁻²⁴; the entropy adds none to it.
    torch.testing.assert_close(entropies_N.double(), expected_N, rtol=0, atol=3e-4)


def test_float32_stays_close_to_float64_in_a_large_vocabulary() -> None:
    hidden_NH, weight_VH, targets_N = problem(32, 16, 20_000)
    expected_N, expected_entropies_N = plain(hidden_NH, weight_VH, targets_N, 1.0)
    logps_N, entropies_N = linear_logprobs(hidden_NH.float(), weight_VH.float(), targets_N, 1.0, 10, 3000)
    torch.testing.assert_close(logps_N.double(), expected_N, rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(entropies_N.double(), expected_entropies_N, rtol=1e-5, atol=2e-5)


def test_bfloat16_inputs_are_accumulated_in_float32() -> None:
    hidden_NH, weight_VH, targets_N = problem(32, 16, 500, torch.bfloat16)
    logps_N, entropies_N = linear_logprobs(hidden_NH, weight_VH, targets_N, 1.0, 10, 64)
    assert (logps_N.dtype, entropies_N.dtype) == (torch.float32, torch.float32)
    expected_N, expected_entropies_N = plain(hidden_NH.double(), weight_VH.double(), targets_N, 1.0)
    torch.testing.assert_close(logps_N.double(), expected_N, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies_N.double(), expected_entropies_N, rtol=0, atol=1e-5)

    expected = torch.autograd.grad(expected_N.sum(), (hidden_NH, weight_VH))
    actual = torch.autograd.grad(logps_N.sum(), (hidden_NH, weight_VH))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_hidden_state_that_is_not_finite_spoils_its_own_row_and_no_other(value: float) -> None:
    hidden_NH, weight_VH, targets_N = problem(4, 3, 10)
    with torch.no_grad():
        hidden_NH[2, 1] = value
        logps_N, _ = linear_logprobs(hidden_NH, weight_VH, targets_N, 1.0, 2, 4)
    assert logps_N.isfinite().tolist() == [True, True, False, True]


def test_memory_stays_at_a_few_chunks() -> None:
    tokens, vocab, chunk_tokens, chunk_vocab = 1024, 32768, 256, 2048
    hidden_NH, weight_VH, targets_N = problem(tokens, 8, vocab, torch.float32)
    logits_bytes, chunk_bytes = 4 * tokens * vocab, 4 * chunk_tokens * chunk_vocab
    inputs_bytes = 4 * (hidden_NH.numel() + weight_VH.numel()) + 8 * tokens

    def chunked() -> Tensor:
        return linear_logprobs(hidden_NH, weight_VH, targets_N, 1.0, chunk_tokens, chunk_vocab)[0]

    assert peak_bytes(lambda: plain(hidden_NH, weight_VH, targets_N, 1.0)[0]) > logits_bytes, (
        "the gauge must see logits"
    )
    assert peak_bytes(chunked) < 4 * chunk_bytes + 2 * inputs_bytes < logits_bytes / 10


def peak_bytes(logps: Callable[[], Tensor]) -> int:
    """Most bytes that torch held at one time beyond those it began with, over a forward and a backward pass."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        logps().sum().backward()
    held = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
