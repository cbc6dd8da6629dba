"""One optimizer update as every learner computes it: which rows have a gradient, their weights, their part of the loss.

All of it is fixed before the first micro-batch, so that the result does not depend on who computes which rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from npo_core.interfaces import TrainBatch
from npo_core.losses import LossInputs, LossSums, token_losses, token_weights
from npo_core.padding import pad_rows
from npo_core.policy import Policy
from schemas.algorithm import AlgorithmSection
from schemas.config import RolloutSection

TokenLogps = Callable[[Sequence[np.ndarray], Sequence[np.ndarray], float], tuple[Tensor, Tensor, Tensor]]
"""See `Policy.token_logps`."""


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

    def share(self, token_logps: TokenLogps, micro: Sequence[int]) -> tuple[Tensor, LossSums]:
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

        losses = token_losses(
            LossInputs(
                step=batch.step,
                logps_BT=logps_BT,
                old_logps_BT=logps_BT.detach() if self.start is None else padded([self.start[j] for j in micro]),
                mask_BT=mask_BT,
                advantages_B=torch.from_numpy(batch.advantages_B[places]).to(logps_BT.device),
                guide_B=torch.from_numpy(batch.guide_B[places]).to(logps_BT.device),
                guide_logps_BT=padded([batch.guide_logprobs[i] for i in places]),
                ref_logps_BT=padded([self.reference[j] for j in micro]) if self.reference else None,
            ),
            self.algorithm,
        )
        return losses.weighted_sum(self.weights_B[places].to(logps_BT.device)), losses.sums

    def metrics(self, sums: LossSums, loss: float, norm: float, rate: float) -> dict[str, float]:
        """See `Learner.step`.

        Raises:
            FloatingPointError: loss or gradient norm is not finite.
        """
        if not (np.isfinite(norm) and np.isfinite(loss)):
            raise FloatingPointError(f"step {self.batch.step}: loss {loss} and gradient norm {norm} are not finite")
        return {
            **sums.metrics(self.algorithm.kl_beta, sum(map(len, self.batch.completion_ids))),
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens/trained": float(sum(map(len, self.completions))),
        }


def reference_logps(reference: Policy, update: Update) -> list[np.ndarray]:
    """Log-probabilities of an update's rows under the starting policy."""
    return reference.log_probs(update.prompts, update.completions, update.temperature)[0]
