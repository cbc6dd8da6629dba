"""One optimizer update as every learner computes it: which rows have a gradient, their weights, their part of the loss.

All of it is fixed before the first micro-batch, so that the result does not depend on who computes which rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from npo_core.interfaces import TrainBatch
from npo_core.losses import LossInputs, LossSums, require_finite, token_losses, token_weights
from npo_core.mismatch import SamplingSums, sampling_weights
from npo_core.padding import pad_rows
from npo_core.policy import Policy
from schemas.algorithm import AlgorithmSection
from schemas.config import RolloutSection

TokenLogps = Callable[[Sequence[np.ndarray], Sequence[np.ndarray], float], tuple[Tensor, Tensor, Tensor]]
"""See `Policy.token_logps`."""


@dataclass(frozen=True)
class UpdateSums:
    """What micro-batches and ranks add up beside the loss; `UpdateSums()` is the sum of none."""

    losses: LossSums = field(default_factory=LossSums)
    sampling: SamplingSums = field(default_factory=SamplingSums)

    def __add__(self, other: UpdateSums) -> UpdateSums:
        return UpdateSums(self.losses + other.losses, self.sampling + other.sampling)

    def through(self, total: Callable[[Tensor], Tensor], largest: Callable[[Tensor], Tensor]) -> UpdateSums:
        """The same with its sums, and its maxima, passed through a function each: over the ranks, say."""
        losses, sampling = ([getattr(part, f.name) for f in fields(part)] for part in (self.losses, self.sampling))
        return UpdateSums(
            LossSums(*total(torch.stack(losses))),
            SamplingSums(*[*total(torch.stack(sampling[:-1])), largest(sampling[-1])]),
        )


@dataclass(frozen=True)
class Update:
    """Rows are counted among those with a gradient; their lists have one entry a row."""

    batch: TrainBatch
    rows: list[int]
    """Places in the batch of the rows that have a gradient."""
    weights_B: Tensor
    """Of the whole batch; see `token_weights`."""
    algorithm: AlgorithmSection
    temperature: float
    start: list[np.ndarray] | None = None
    """Log-probabilities at the start of the step, needed with several updates a batch."""
    reference: list[np.ndarray] | None = None
    """Those of the starting policy, needed iff `kl_beta` > 0."""

    @classmethod
    def of(cls, batch: TrainBatch, algorithm: AlgorithmSection, rollout: RolloutSection) -> Update:
        """The update on a batch."""
        # A row with advantage 0 adds a constant to the loss unless the KL term sees it.
        rows = [i for i, a in enumerate(batch.advantages_B) if a != 0 or algorithm.kl_beta > 0]
        lengths_B = torch.tensor([len(ids) for ids in batch.completion_ids])
        weights_B = token_weights(lengths_B, algorithm.aggregation, rollout.max_new_tokens)
        return cls(batch, rows, weights_B, algorithm, rollout.temperature)

    @cached_property
    def prompts(self) -> list[np.ndarray]:
        """Prompts of the rows."""
        return [self.batch.prompt_ids[i] for i in self.rows]

    @cached_property
    def completions(self) -> list[np.ndarray]:
        """Completions of the rows."""
        return [self.batch.completion_ids[i] for i in self.rows]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of the rows, prompt and completion."""
        return [len(p) + len(c) for p, c in zip(self.prompts, self.completions, strict=True)]

    def share(self, token_logps: TokenLogps, micro: Sequence[int]) -> tuple[Tensor, UpdateSums]:
        """The share of some rows in the batch's loss, to call `backward` on, and their sums.

        Raises:
            FloatingPointError: a log-probability is not finite; names the step.
        """
        batch, places = self.batch, [self.rows[j] for j in micro]
        logps_BT, _, mask_BT = token_logps(
            [self.prompts[j] for j in micro], [self.completions[j] for j in micro], self.temperature
        )

        def padded(values: Sequence[np.ndarray | None]) -> Tensor:
            return pad_rows(values, logps_BT.shape[1], logps_BT.dtype, logps_BT.device)

        old_logps_BT = logps_BT.detach() if self.start is None else padded([self.start[j] for j in micro])
        guide_B = torch.from_numpy(batch.guide_B[places]).to(logps_BT.device)
        weights_BT, sampling = None, SamplingSums()
        if batch.behavior_logprobs is not None:
            sampler_logps_BT = padded([batch.behavior_logprobs[i] for i in places])
            weights_BT, sampling = self._sampling(old_logps_BT, sampler_logps_BT, mask_BT, guide_B)
        losses = token_losses(
            LossInputs(
                step=batch.step,
                logps_BT=logps_BT,
                old_logps_BT=old_logps_BT,
                mask_BT=mask_BT,
                advantages_B=torch.from_numpy(batch.advantages_B[places]).to(logps_BT.device),
                guide_B=guide_B,
                guide_logps_BT=padded([batch.guide_logprobs[i] for i in places]),
                ref_logps_BT=padded([self.reference[j] for j in micro]) if self.reference else None,
                sampling_weights_BT=weights_BT,
            ),
            self.algorithm,
        )
        share = losses.weighted_sum(self.weights_B[places].to(logps_BT.device))
        return share, UpdateSums(losses.sums, sampling)

    def _sampling(
        self, trainer_logps_BT: Tensor, sampler_logps_BT: Tensor, mask_BT: Tensor, guide_B: Tensor
    ) -> tuple[Tensor, SamplingSums]:
        """Weights of the tokens for what sampled them, 1 in guide rows, and the sums of the own rows."""
        own_BT = mask_BT & ~guide_B[:, None]
        require_finite(self.batch.step, "sampler's", sampler_logps_BT, own_BT)
        inputs = (trainer_logps_BT, sampler_logps_BT, own_BT)
        how = (self.algorithm.sampling_correction, self.algorithm.sampling_cap)
        return torch.where(own_BT, sampling_weights(*inputs, *how), 1), SamplingSums.of(*inputs, *how)

    def metrics(self, sums: UpdateSums, loss: float, norm: float, rate: float) -> dict[str, float]:
        """See `Learner.step`.

        Raises:
            FloatingPointError: loss or gradient norm is not finite.
        """
        if not (np.isfinite(norm) and np.isfinite(loss)):
            raise FloatingPointError(f"step {self.batch.step}: loss {loss} and gradient norm {norm} are not finite")
        return {
            **sums.losses.metrics(self.algorithm.kl_beta, sum(map(len, self.batch.completion_ids))),
            **sums.sampling.metrics(),
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens/trained": float(sum(map(len, self.completions))),
        }


def reference_logps(reference: Policy, update: Update) -> list[np.ndarray]:
    """Log-probabilities of an update's rows under the starting policy."""
    return reference.log_probs(update.prompts, update.completions, update.temperature)[0]
