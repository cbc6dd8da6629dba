"""The objective: clip, guide corrections, KL, aggregation, and what must not change it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npo_core.advantages import group_advantages
from npo_core.losses import LossInputs, LossSums, TokenLosses, require_finite, token_losses, token_weights
from schemas.algorithm import AlgorithmSection

AGGREGATIONS = ("seq-mean-token-mean", "token-mean", "seq-sum-norm")
CORRECTIONS = ("none", "exact", "truncated", "shaped")
MAX_NEW_TOKENS = 12


def section(**values: Any) -> AlgorithmSection:
    return AlgorithmSection(**values)


def loss_inputs(
    groups: int,
    rollouts: int,
    seed: int = 0,
    noise: float = 0.3,
    lengths_B: Tensor | None = None,
    rewards_PG: Tensor | None = None,
) -> LossInputs:
    """A batch whose last slot of every other group is a guide row; float64, pads full of numbers that do not count."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    rows = groups * rollouts
    if lengths_B is None:
        lengths_B = torch.randint(1, MAX_NEW_TOKENS, (rows,), generator=generator)
    if rewards_PG is None:
        rewards_PG = random(groups, rollouts).round()
    guide_B = torch.zeros(groups, rollouts, dtype=torch.bool)
    guide_B[::2, -1] = True
    logps_BT = -3 * random(rows, int(lengths_B.max()))
    return LossInputs(
        step=7,
        logps_BT=logps_BT.requires_grad_(),
        old_logps_BT=logps_BT.detach() + noise * (random(*logps_BT.shape) - 0.5),
        mask_BT=torch.arange(logps_BT.shape[1]) < lengths_B[:, None],
        advantages_B=group_advantages(rewards_PG, "group-std", 1e-6).flatten(),
        guide_B=guide_B.flatten(),
        guide_logps_BT=logps_BT.detach() + random(*logps_BT.shape) - 0.5,
        ref_logps_BT=logps_BT.detach() + random(*logps_BT.shape) - 0.5,
    )


def rows_of(inputs: LossInputs, rows: Tensor) -> LossInputs:
    """Some rows of a batch, without the columns that are pads in all of them."""
    width = int(inputs.mask_BT[rows].sum(1).max())
    tensors = ("logps_BT", "old_logps_BT", "mask_BT", "guide_logps_BT", "ref_logps_BT")
    cut = {name: getattr(inputs, name)[rows][:, :width] for name in tensors}
    return replace(inputs, **cut, advantages_B=inputs.advantages_B[rows], guide_B=inputs.guide_B[rows])


def evaluate(
    inputs: LossInputs, algorithm: AlgorithmSection, batches: list[Tensor]
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss, gradient by `logps_BT`, and metrics of a batch computed in the given micro-batches."""
    weight_B = token_weights(inputs.mask_BT.sum(1), algorithm.aggregation, MAX_NEW_TOKENS)
    losses = [(token_losses(rows_of(inputs, rows), algorithm), weight_B[rows]) for rows in batches]
    loss = sum((part.weighted_sum(weights_B) for part, weights_B in losses), torch.zeros(()))
    (gradient_BT,) = torch.autograd.grad(loss, inputs.logps_BT)
    sums = sum((part.sums for part, _ in losses), LossSums())
    return loss.detach(), gradient_BT, sums.metrics(algorithm.kl_beta)


def one_guide_token(correction: str, advantage: float = 1.0, **values: float) -> tuple[float, float]:
    """Loss of a lone guide token and its gradient by log π_θ = log 0.5; π_start 0.4 and π_guide 0.1 by default."""
    logps_BT = torch.tensor([[values.pop("policy", 0.5)]], dtype=torch.float64).log().requires_grad_()
    old, guide = values.pop("old", 0.4), values.pop("guide", 0.1)
    inputs = LossInputs(
        step=0,
        logps_BT=logps_BT,
        old_logps_BT=torch.tensor([[math.log(old)]], dtype=torch.float64),
        mask_BT=torch.ones(1, 1, dtype=torch.bool),
        advantages_B=torch.tensor([advantage]),
        guide_B=torch.tensor([True]),
        guide_logps_BT=torch.tensor([[math.log(guide)]], dtype=torch.float64),
    )
    loss = token_losses(inputs, section(guide_correction=correction, **values)).weighted_sum(torch.ones(1))
    loss.backward()
    assert logps_BT.grad is not None
    return loss.item(), logps_BT.grad.item()


class TestClip:
    """min(ρA, clip(ρ, 1 − ε_low, 1 + ε_high) A)."""

    @pytest.mark.parametrize(
        ("ratio", "advantage", "loss", "gradient"),
        [
            (1.1, 2.0, -2.2, -2.2),  # inside the bounds: d(ρA)/d log π = ρA
            (1.5, 2.0, -2.6, 0.0),  # clipped high
            (1.5, -2.0, 3.0, 3.0),  # a pull back is never clipped
            (0.5, 2.0, -1.0, -1.0),
            (0.5, -2.0, 1.8, 0.0),  # clipped low
        ],
    )
    def test_cuts_only_what_goes_too_far(self, ratio: float, advantage: float, loss: float, gradient: float) -> None:
        # `none` treats the guide's token as one of the policy's own: π_start is the denominator.
        for correction, values in (("none", {"old": 0.5 / ratio}), ("exact", {"guide": 0.5 / ratio})):
            actual = one_guide_token(correction, advantage, clip_low=0.1, clip_high=0.3, **values)
            assert actual == pytest.approx((loss, gradient), rel=1e-12)

    def test_without_old_policy_the_ratio_is_one_and_carries_the_gradient(self) -> None:
        inputs = loss_inputs(3, 4)
        inputs = replace(inputs, old_logps_BT=inputs.logps_BT.detach())
        losses = token_losses(inputs, section())
        advantages_BT = inputs.advantages_B[:, None] * inputs.mask_BT
        torch.testing.assert_close(losses.loss_BT, -advantages_BT, rtol=1e-14, atol=0)
        (gradient_BT,) = torch.autograd.grad(losses.loss_BT.sum(), inputs.logps_BT)
        torch.testing.assert_close(gradient_BT, -advantages_BT, rtol=1e-14, atol=0)
        assert losses.sums.metrics(0.0)["clip_ratio/region_mean"] == 0

    def test_rows_that_were_left_out_count_in_the_clip_ratio(self) -> None:
        sums = token_losses(loss_inputs(4, 4, noise=2.0), section()).sums
        seen, tokens = sums.metrics(0.0), int(sums.tokens)
        assert seen["clip_ratio/low_mean"] > 0
        assert seen["clip_ratio/region_mean"] == seen["clip_ratio/low_mean"] + seen["clip_ratio/high_mean"]
        assert sums.metrics(0.0, 2 * tokens)["clip_ratio/low_mean"] == seen["clip_ratio/low_mean"] / 2

    def test_far_ratios_are_clamped_and_stay_finite(self) -> None:
        loss, gradient = one_guide_token("none", -1.0, old=1e-300)
        assert loss == pytest.approx(math.exp(20))
        assert gradient == 0


class TestGuideCorrection:
    """The slot of the guide; π_θ 0.5, π_start 0.4, π_guide 0.1 unless said."""

    def test_exact_divides_by_the_guides_stored_probability(self) -> None:
        assert one_guide_token("exact", guide=0.45) == pytest.approx((-0.5 / 0.45, -0.5 / 0.45))

    def test_exact_is_clipped_as_own_rows_are(self) -> None:
        assert one_guide_token("exact", guide=0.1) == pytest.approx((-1.2, 0.0))

    def test_truncated_is_the_plain_policy_gradient_times_a_capped_weight(self) -> None:
        assert one_guide_token("truncated", -3.0, guide=0.1) == pytest.approx((3 * 2 * math.log(0.5), 3 * 2))
        assert one_guide_token("truncated", -3.0, guide=0.8) == pytest.approx((3 * 0.5 * math.log(0.5), 3 * 0.5))

    def test_truncated_is_not_clipped_however_far_the_policy_has_moved(self) -> None:
        _, gradient = one_guide_token("truncated", 1.0, old=0.01, guide=0.01)
        assert gradient == pytest.approx(-1.0)

    def test_shaped_follows_luffy(self) -> None:
        loss, gradient = one_guide_token("shaped", 2.0)
        assert loss == pytest.approx(-2 * 0.5 / 0.6)
        assert gradient == pytest.approx(-2 * 0.5 * 0.1 / 0.6**2)  # ρ f'(ρ) A

    @pytest.mark.parametrize("correction", CORRECTIONS)
    def test_own_rows_are_the_same_under_every_correction(self, correction: str) -> None:
        inputs = loss_inputs(4, 4, noise=1.0)
        own = token_losses(inputs, section(guide_correction=correction)).loss_BT[~inputs.guide_B]
        torch.testing.assert_close(own, token_losses(inputs, section()).loss_BT[~inputs.guide_B], rtol=0, atol=0)

    @pytest.mark.parametrize("correction", ["truncated", "shaped"])
    def test_an_unclipped_slot_does_not_count_as_clipped(self, correction: str) -> None:
        inputs = loss_inputs(2, 1)
        inputs = replace(
            inputs,
            old_logps_BT=inputs.logps_BT.detach() - 1,
            advantages_B=torch.ones(2),
            guide_B=torch.ones(2, dtype=torch.bool),
        )
        assert token_losses(inputs, section()).sums.metrics(0.0)["clip_ratio/high_mean"] == 1
        sums = token_losses(inputs, section(guide_correction=correction)).sums
        assert sums.metrics(0.0)["clip_ratio/high_mean"] == 0

    def test_ratio_and_kl_are_means_over_guide_tokens(self) -> None:
        inputs = loss_inputs(4, 3)
        metrics = token_losses(inputs, section()).sums.metrics(0.0)
        chosen_BT = inputs.mask_BT & inputs.guide_B[:, None]
        log_ratio_N = (inputs.old_logps_BT - inputs.guide_logps_BT)[chosen_BT]
        assert metrics["npo/guide_ratio_mean"] == pytest.approx(log_ratio_N.exp().mean().item(), rel=1e-12)
        assert metrics["npo/guide_kl"] == pytest.approx(-log_ratio_N.mean().item(), rel=1e-12)

    def test_without_guide_rows_their_metrics_are_absent(self) -> None:
        inputs = replace(loss_inputs(2, 3), guide_B=torch.zeros(6, dtype=torch.bool))
        assert not [name for name in token_losses(inputs, section()).sums.metrics(0.0) if name.startswith("npo/")]


class TestKL:
    """The k3 estimate."""

    def test_adds_beta_times_k3_to_every_token(self) -> None:
        inputs = loss_inputs(2, 3)
        assert inputs.ref_logps_BT is not None
        difference_BT = inputs.ref_logps_BT - inputs.logps_BT
        k3_BT = (difference_BT.exp() - difference_BT - 1) * inputs.mask_BT
        with_kl, without = token_losses(inputs, section(kl_beta=0.1)), token_losses(inputs, section())
        torch.testing.assert_close(with_kl.loss_BT, without.loss_BT + 0.1 * k3_BT, rtol=1e-12, atol=1e-12)
        mean = (k3_BT.sum() / inputs.mask_BT.sum()).item()
        assert with_kl.sums.metrics(0.1)["kl"] == pytest.approx(mean, rel=1e-12)
        assert "kl" not in without.sums.metrics(0.0)

    def test_needs_the_reference(self) -> None:
        with pytest.raises(ValueError, match=r"step 7: kl_beta 0\.1 needs ref_logps_BT"):
            token_losses(replace(loss_inputs(1, 2), ref_logps_BT=None), section(kl_beta=0.1))


class TestAggregation:
    """Weights of rows; the batch's loss is a weighted sum."""

    def test_weights_of_the_three_names(self) -> None:
        lengths_B = torch.tensor([2, 5, 1])
        assert token_weights(lengths_B, "seq-mean-token-mean", 10).tolist() == pytest.approx([1 / 6, 1 / 15, 1 / 3])
        assert token_weights(lengths_B, "token-mean", 10).tolist() == pytest.approx([1 / 8] * 3)
        assert token_weights(lengths_B, "seq-sum-norm", 10).tolist() == pytest.approx([1 / 30] * 3)

    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    def test_a_row_without_tokens_has_a_finite_weight(self, aggregation: Any) -> None:
        assert token_weights(torch.tensor([0, 0]), aggregation, 10).isfinite().all()

    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    def test_leaving_out_rows_of_degenerate_groups_changes_nothing(self, aggregation: Any) -> None:
        rewards_PG = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
        inputs = loss_inputs(4, 3, rewards_PG=rewards_PG)
        algorithm = section(aggregation=aggregation)
        loss, gradient_BT, metrics = evaluate(inputs, algorithm, [torch.arange(12)])
        kept = torch.tensor([0, 1, 2, 6, 7, 8])
        assert inputs.guide_B[kept].sum() == inputs.guide_B.sum(), "no guide row is left out"
        kept_loss, kept_gradient_BT, _ = evaluate(inputs, algorithm, [kept])
        torch.testing.assert_close(kept_loss, loss, rtol=0, atol=1e-14)
        torch.testing.assert_close(kept_gradient_BT, gradient_BT, rtol=0, atol=1e-14)
        sums = token_losses(rows_of(inputs, kept), algorithm).sums
        assert sums.metrics(0.0, int(inputs.mask_BT.sum())) == pytest.approx(metrics, rel=1e-12)


class TestInvariance:
    """What the batch's loss, gradient and metrics must not depend on."""

    @settings(deadline=None)
    @given(
        groups=st.integers(1, 5),
        rollouts=st.integers(1, 5),
        seed=st.integers(0, 2**31),
        aggregation=st.sampled_from(AGGREGATIONS),
        correction=st.sampled_from(CORRECTIONS),
        beta=st.sampled_from([0.0, 0.05]),
        data=st.data(),
    )
    def test_split_and_order_of_rows(
        self,
        groups: int,
        rollouts: int,
        seed: int,
        aggregation: str,
        correction: str,
        beta: float,
        data: st.DataObject,
    ) -> None:
        algorithm = section(aggregation=aggregation, guide_correction=correction, kl_beta=beta)
        inputs = loss_inputs(groups, rollouts, seed)
        rows = groups * rollouts
        order = torch.tensor(data.draw(st.permutations(range(rows))))
        cuts = data.draw(st.lists(st.integers(1, max(rows - 1, 1)), max_size=4, unique=True).map(sorted))
        batches = [part for part in order.tensor_split(cuts) if len(part)]
        loss, gradient_BT, metrics = evaluate(inputs, algorithm, [torch.arange(rows)])
        split_loss, split_gradient_BT, split_metrics = evaluate(inputs, algorithm, batches)
        torch.testing.assert_close(split_loss, loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(split_gradient_BT, gradient_BT, rtol=1e-12, atol=1e-12)
        assert split_metrics == pytest.approx(metrics, rel=1e-12, abs=1e-12)

    @settings(deadline=None)
    @given(groups=st.integers(1, 6), rollouts=st.integers(1, 5), seed=st.integers(0, 2**31), data=st.data())
    def test_order_of_groups_from_rewards_to_gradient(
        self, groups: int, rollouts: int, seed: int, data: st.DataObject
    ) -> None:
        rewards_PG = torch.rand(groups, rollouts, generator=torch.Generator().manual_seed(seed)).round()
        inputs = loss_inputs(groups, rollouts, seed, rewards_PG=rewards_PG)
        order = torch.tensor(data.draw(st.permutations(range(groups))))
        rows = torch.arange(groups * rollouts).view(groups, rollouts)[order].flatten()
        advantages_B = group_advantages(rewards_PG[order], "group-std", 1e-6).flatten()
        moved = replace(rows_of(inputs, rows), advantages_B=advantages_B)
        moved = replace(moved, logps_BT=moved.logps_BT.detach().requires_grad_())
        loss, gradient_BT, _ = evaluate(inputs, section(), [torch.arange(len(rows))])
        moved_loss, moved_gradient_BT, _ = evaluate(moved, section(), [torch.arange(len(rows))])
        torch.testing.assert_close(moved_loss, loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(moved_gradient_BT, gradient_BT[rows], rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("correction", CORRECTIONS)
    @pytest.mark.parametrize("rewards", [[0.0] * 4, [1.0] * 4, [0.1] * 7, [1.0], [0.0]])
    def test_degenerate_groups_have_exactly_zero_gradient(self, correction: str, rewards: list[float]) -> None:
        inputs = loss_inputs(1, len(rewards), noise=2.0, rewards_PG=torch.tensor([rewards], dtype=torch.float64))
        algorithm = section(guide_correction=correction)
        loss, gradient_BT, metrics = evaluate(inputs, algorithm, [torch.arange(len(rewards))])
        assert loss == 0
        assert not gradient_BT.any()
        assert metrics["clip_ratio/region_mean"] == 0

    @pytest.mark.parametrize("correction", CORRECTIONS)
    def test_the_end_token_of_a_guide_row_longer_than_its_group_is_trained(self, correction: str) -> None:
        # The guide's row is the widest of the batch: its last column, the end token, is pad in every other row.
        inputs = loss_inputs(1, 4, noise=0.0, lengths_B=torch.tensor([2, 3, 1, 9]), rewards_PG=torch.eye(4)[3:])
        inputs = replace(inputs, guide_logps_BT=inputs.logps_BT.detach())
        assert inputs.mask_BT[:, -1].tolist() == [False, False, False, True]
        _, gradient_BT, metrics = evaluate(inputs, section(guide_correction=correction), [torch.arange(4)])
        assert gradient_BT[3].ne(0).all(), "every token of the guide row, its end token included, is pushed"
        assert gradient_BT[3, -1] < 0, "a success pushes its end token up"
        assert (gradient_BT != 0).sum() == 2 + 3 + 1 + 9
        assert metrics["npo/guide_ratio_mean"] == pytest.approx(1.0)
        _, gradient_alone_BT, _ = evaluate(
            inputs, section(guide_correction=correction), [torch.arange(3), torch.tensor([3])]
        )
        torch.testing.assert_close(gradient_alone_BT, gradient_BT, rtol=1e-12, atol=1e-12)


class TestFinite:
    """Log-probabilities that are not finite stop the step."""

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize(
        ("field", "name"),
        [("logps_BT", "policy"), ("old_logps_BT", "old"), ("guide_logps_BT", "guide"), ("ref_logps_BT", "reference")],
    )
    def test_names_step_and_tensor(self, field: str, name: str, value: float) -> None:
        inputs = loss_inputs(1, 3)
        row = int(inputs.guide_B.nonzero()[0])
        broken_BT = getattr(inputs, field).detach().clone()
        broken_BT[row, 0] = value
        with pytest.raises(
            FloatingPointError, match=f"step 7: 1 of .* {name} log-probabilities .* is {value} at row 2"
        ):
            token_losses(replace(inputs, **{field: broken_BT}), section(kl_beta=0.1))

    @pytest.mark.parametrize("correction", CORRECTIONS)
    def test_guide_log_probabilities_of_own_rows_are_not_read(self, correction: str) -> None:
        inputs = loss_inputs(1, 3)
        guide_logps_BT = inputs.guide_logps_BT.masked_fill(~inputs.guide_B[:, None], math.nan)
        losses = token_losses(replace(inputs, guide_logps_BT=guide_logps_BT), section(guide_correction=correction))
        (gradient_BT,) = torch.autograd.grad(losses.loss_BT.sum(), inputs.logps_BT)
        assert losses.loss_BT.isfinite().all()
        assert gradient_BT.isfinite().all()
        assert all(map(math.isfinite, losses.sums.metrics(0.0).values()))

    def test_finite_ones_pass(self) -> None:
        require_finite(3, "policy", torch.tensor([[-1.0, math.nan]]), torch.tensor([[True, False]]))


def test_losses_keep_the_type_of_the_log_probabilities() -> None:
    inputs = loss_inputs(2, 3)
    inputs = replace(inputs, logps_BT=inputs.logps_BT.detach().float(), old_logps_BT=inputs.old_logps_BT.float())
    inputs = replace(inputs, guide_logps_BT=inputs.guide_logps_BT.float(), ref_logps_BT=None)
    losses: TokenLosses = token_losses(inputs, section())
    weight_B = token_weights(inputs.mask_BT.sum(1), "token-mean", MAX_NEW_TOKENS)
    assert losses.loss_BT.dtype == losses.weighted_sum(weight_B).dtype == torch.float32
    assert losses.sums.guide_ratio.dtype == torch.float64
