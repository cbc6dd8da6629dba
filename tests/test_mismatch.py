"""The correction for a sampler that is not quite the trainer, against the formulas written out token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npo_core.mismatch import Correction, SamplingSums, sampling_weights

CORRECTIONS: tuple[Correction, ...] = ("none", "token-truncated", "sequence-mask")
LOGP = st.floats(-8, -0.01)
ROWS = st.lists(st.lists(st.tuples(LOGP, LOGP), min_size=1, max_size=6), min_size=1, max_size=5)
CAPS = st.floats(0.3, 4)


def padded(rows: list[list[tuple[float, float]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Trainer's and sampler's log-probabilities, with pads that do not count, and the mask."""
    width = max(map(len, rows))
    trainer = torch.full((len(rows), width), -3.0, dtype=torch.float64)
    sampler, mask = torch.full_like(trainer, 5.0), torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        for t, (ours, theirs) in enumerate(row):
            trainer[b, t], sampler[b, t], mask[b, t] = ours, theirs, True
    return trainer, sampler, mask


def plain(row: list[tuple[float, float]], correction: Correction, cap: float) -> list[float]:
    ratios = [math.exp(ours - theirs) for ours, theirs in row]
    if correction == "none":
        return [1.0] * len(row)
    if correction == "token-truncated":
        return [min(ratio, cap) for ratio in ratios]
    # As the product is clamped: at exp(20) it is beyond every cap, at exp(−20) as good as none.
    product = min(max(math.prod(ratios), math.exp(-20)), math.exp(20))
    return [0.0 if product > cap else product] * len(row)


@pytest.mark.parametrize("correction", CORRECTIONS)
@given(rows=ROWS, cap=CAPS)
def test_weights_and_metrics_are_those_of_the_formulas(
    correction: Correction, rows: list[list[tuple[float, float]]], cap: float
) -> None:
    expected = [plain(row, correction, cap) for row in rows]
    inputs = padded(rows)
    weights_BT = sampling_weights(*inputs, correction, cap)
    for b, row in enumerate(expected):
        assert weights_BT[b, : len(row)].tolist() == pytest.approx(row, rel=1e-9, abs=1e-12)
        assert not weights_BT[b, len(row) :].any()
    flat, tokens = [w for row in expected for w in row], [token for row in rows for token in row]
    metrics = SamplingSums.of(*inputs, correction, cap).metrics()
    differences = [abs(ours - theirs) for ours, theirs in tokens]
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(sum(differences) / len(tokens))
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(max(differences))
    ratios = {name: metrics[f"sampling/importance_sampling_ratio/{name}"] for name in ("min", "mean", "max")}
    expected_ratios = {"min": min(flat), "mean": sum(flat) / len(flat), "max": max(flat)}
    assert ratios == pytest.approx(expected_ratios, rel=1e-9, abs=1e-12)
    squares = sum(w * w for w in flat)
    assert metrics["sampling/ess"] == pytest.approx(sum(flat) ** 2 / (len(flat) * squares) if squares else 0.0)


@pytest.mark.parametrize("correction", CORRECTIONS)
@given(rows=ROWS, cap=CAPS, cut=st.integers(0, 5))
def test_the_sums_of_parts_are_those_of_the_whole(
    correction: Correction, rows: list[list[tuple[float, float]]], cap: float, cut: int
) -> None:
    trainer_BT, sampler_BT, mask_BT = padded(rows)
    whole = SamplingSums.of(trainer_BT, sampler_BT, mask_BT, correction, cap)
    parts = SamplingSums()
    for part in (slice(0, cut), slice(cut, None)):
        parts += SamplingSums.of(trainer_BT[part], sampler_BT[part], mask_BT[part], correction, cap)
    assert parts.metrics() == pytest.approx(whole.metrics(), rel=1e-12)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_where_sampler_and_trainer_agree_nothing_is_corrected(correction: Correction) -> None:
    logps_BT = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]])
    mask_BT = torch.tensor([[True, True], [True, False]])
    assert torch.equal(sampling_weights(logps_BT, logps_BT, mask_BT, correction, 2.0), mask_BT.double())
    metrics = SamplingSums.of(logps_BT, logps_BT, mask_BT, correction, 2.0).metrics()
    assert (metrics["sampling/corrected"], metrics["sampling/ess"]) == (0, 1)
    assert {metrics[f"sampling/importance_sampling_ratio/{name}"] for name in ("min", "mean", "max")} == {1}


def test_the_share_that_is_corrected_counts_tokens() -> None:
    trainer_BT = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    sampler_BT = torch.tensor([[-3.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    mask_BT = torch.ones(2, 3, dtype=torch.bool)
    of = (SamplingSums.of(trainer_BT, sampler_BT, mask_BT, correction, 2.0) for correction in CORRECTIONS)
    shares = [sums.metrics()["sampling/corrected"] for sums in of]
    assert shares == pytest.approx([0, 1 / 6, 1 / 2])


def test_weights_carry_no_gradient() -> None:
    trainer_BT = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    mask_BT = torch.ones(1, 2, dtype=torch.bool)
    assert not sampling_weights(trainer_BT, trainer_BT.detach() - 0.1, mask_BT, "token-truncated", 2.0).requires_grad
