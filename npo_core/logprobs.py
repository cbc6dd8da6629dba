"""Log-probabilities and entropies from hidden states, chunked over tokens and vocabulary.

A whole batch of logits never exists: at any time there are `chunk_tokens` × `chunk_vocab` of them. The forward pass
keeps an online logsumexp (Milakov and Gimelshein, arXiv 1805.02867) and the sums of the entropy beside it; the
backward pass computes the chunks again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_logprobs(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, temperature: float, chunk_tokens: int, chunk_vocab: int
) -> tuple[Tensor, Tensor]:
    """Log-softmax of hidden · weightᵀ / temperature at the targets, and the entropy of that distribution.

    Sums are accumulated in float64 for float64 inputs and in float32 otherwise (bfloat16 is upcast chunk by chunk).

    Args:
        hidden_NH: last hidden states.
        weight_VH: output embedding.
        targets_N: int64 token ids.
        temperature: divides the logits.
        chunk_tokens: most rows of logits at one time.
        chunk_vocab: most columns of logits at one time.

    Returns:
        logps_N, differentiable in hidden states and weight, and entropies_N, exact, in nats, detached; both of the
        accumulation type.
    """
    return _LinearLogprobs.apply(hidden_NH, weight_VH, targets_N, temperature, chunk_tokens, chunk_vocab)


class _LinearLogprobs(torch.autograd.Function):
    """With z = h·wᵀ/T and p = softmax(z): log p_y = z_y − logsumexp(z), ∂ log p_y / ∂z_v = 1[v = y] − p_v."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, temperature: float, rows: int, columns: int
    ) -> tuple[Tensor, Tensor]:
        dtype = _accumulation_dtype(hidden_NH, weight_VH)
        logps_N = hidden_NH.new_empty(len(hidden_NH), dtype=dtype)
        entropies_N, logsumexps_N = torch.empty_like(logps_N), torch.empty_like(logps_N)
        for n in _slices(len(hidden_NH), rows):
            scaled_CH = hidden_NH[n].to(dtype) / temperature
            target_C = torch.zeros_like(logps_N[n])
            # Over the columns seen so far: greatest logit, sum of e = exp(z − greatest), and sum of e·(z − greatest).
            greatest_C, sum_C, weighted_C = torch.full_like(target_C, -torch.inf), target_C.clone(), target_C.clone()
            for v in _slices(len(weight_VH), columns):
                logits_CV = scaled_CH @ weight_VH[v].to(dtype).T
                column_C, inside_C = _columns(targets_N[n], v)
                target_C += torch.where(inside_C, logits_CV.gather(1, column_C[:, None]).squeeze(1), 0)
                raised_C = torch.maximum(greatest_C, logits_CV.amax(dim=1))
                shift_C = torch.where(sum_C > 0, greatest_C - raised_C, 0)
                weighted_C = shift_C.exp() * (weighted_C + shift_C * sum_C)
                sum_C = shift_C.exp() * sum_C
                logits_CV -= raised_C[:, None]
                exps_CV = logits_CV.exp()
                sum_C += exps_CV.sum(dim=1)
                weighted_C += torch.linalg.vecdot(exps_CV, logits_CV)
                greatest_C = raised_C
            logsumexps_N[n] = greatest_C + sum_C.log()
            logps_N[n] = target_C - logsumexps_N[n]
            # H = logsumexp(z) − Σ p z, with the greatest logit cancelled before anything is rounded.
            entropies_N[n] = sum_C.log() - weighted_C / sum_C
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, logsumexps_N)
        ctx.temperature, ctx.rows, ctx.columns = temperature, rows, columns
        ctx.mark_non_differentiable(entropies_N)
        return logps_N, entropies_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, targets_N, logsumexps_N = ctx.saved_tensors
        dtype = logsumexps_N.dtype
        grad_hidden_NH, grad_weight_VH = torch.empty_like(hidden_NH), torch.zeros_like(weight_VH, dtype=dtype)
        for n in _slices(len(hidden_NH), ctx.rows):
            scaled_CH = hidden_NH[n].to(dtype) / ctx.temperature
            grad_scaled_CH = torch.zeros_like(scaled_CH)
            for v in _slices(len(weight_VH), ctx.columns):
                weight_KH = weight_VH[v].to(dtype)
                grad_logits_CV = scaled_CH @ weight_KH.T
                grad_logits_CV.sub_(logsumexps_N[n, None]).exp_().mul_(-grad_N[n, None])
                column_C, inside_C = _columns(targets_N[n], v)
                grad_logits_CV.scatter_add_(1, column_C[:, None], torch.where(inside_C, grad_N[n], 0)[:, None])
                grad_scaled_CH.addmm_(grad_logits_CV, weight_KH)
                grad_weight_VH[v].addmm_(grad_logits_CV.T, scaled_CH)
            grad_hidden_NH[n] = grad_scaled_CH / ctx.temperature
        return grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None


def _accumulation_dtype(hidden_NH: Tensor, weight_VH: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden_NH.dtype, weight_VH.dtype), torch.float32)


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _columns(targets_C: Tensor, v: slice) -> tuple[Tensor, Tensor]:
    """Column of each target within the slice `v` of the vocabulary (clamped), and whether it lies inside."""
    return (targets_C - v.start).clamp(0, v.stop - v.start - 1), (targets_C >= v.start) & (targets_C < v.stop)
