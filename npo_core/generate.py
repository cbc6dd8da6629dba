"""Generation in process, on transformers: a KV-cache loop written for RL.

Each prompt is prefilled once and its cache is repeated for the n rollouts; finished rows leave the batch; each row
draws from its own random stream, so its tokens do not depend on who shares the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from npo_core.interfaces import FinishReason, LocalCheckpoint, Rollouts, SamplingParams, StreamKey
from npo_core.policy import Policy
from npo_core.stops import Stops
from npo_core.streams import uniforms


class TransformersGenerator:
    """Samples from a policy that it shares with the learner: no weights are copied between them.

    Args:
        policy: the model.
        max_rows: most rows generated at once.
    """

    def __init__(self, policy: Policy, max_rows: int) -> None:
        self.policy = policy
        self.max_rows = max_rows

    def load(self, checkpoint: LocalCheckpoint) -> None:
        """See `Generator.load`."""
        self.policy.load_weights(checkpoint.weights)

    def sample(
        self, prompts: Sequence[np.ndarray], n: int, params: SamplingParams, streams: Sequence[StreamKey]
    ) -> Rollouts:
        """See `Generator.sample`."""
        uniforms_BT = uniforms(streams, params.max_new_tokens)
        result = Rollouts([], [], [], [])
        block = max(1, self.max_rows // n)
        for first in range(0, len(prompts), block):
            part = prompts[first : first + block]
            self._sample_block(part, n, params, uniforms_BT[first * n : (first + len(part)) * n], result)
        return result

    def score(
        self, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray], temperature: float
    ) -> list[np.ndarray]:
        """See `Generator.score`."""
        return self.policy.log_probs(prompts, completions, temperature)[0]

    def close(self) -> None:
        """See `Generator.close`."""

    @torch.inference_mode()
    def _sample_block(
        self, prompts: Sequence[np.ndarray], n: int, params: SamplingParams, uniforms_BT: np.ndarray, out: Rollouts
    ) -> None:
        model, device = self.policy.model, self.policy.device
        rows, limit = len(prompts) * n, params.max_new_tokens
        model.eval()

        cache = DynamicCache(config=model.config)
        logits_PV, next_P, mask_PL = self.policy.prefill(prompts, cache)
        width = mask_PL.shape[1]
        cache.batch_repeat_interleave(n)
        logits_BV = logits_PV.repeat_interleave(n, dim=0)
        position_B = next_P.repeat_interleave(n)
        mask_BL = torch.ones(rows, width + limit, dtype=torch.int64, device=device)
        mask_BL[:, :width] = mask_PL.repeat_interleave(n, dim=0)
        stop_S = torch.tensor(params.stop_ids, dtype=torch.int64, device=device)
        draws_BT = torch.from_numpy(uniforms_BT).to(device)

        # What was sampled, on the full set of rows; `alive` maps the rows still in the batch to it.
        ids_BT = torch.zeros(rows, limit, dtype=torch.int64, device=device)
        logps_BT = torch.zeros(rows, limit, dtype=torch.float32, device=device)
        entropies_BT = torch.zeros_like(logps_BT)
        lengths_B = torch.full((rows,), limit, dtype=torch.int64, device=device)
        stopped_B = torch.zeros(rows, dtype=torch.bool, device=device)
        alive = torch.arange(rows, device=device)
        for t in range(limit):
            tokens_B, logps_B, entropy_B = draw(logits_BV, params.temperature, draws_BT[alive, t])
            ids_BT[alive, t], logps_BT[alive, t], entropies_BT[alive, t] = tokens_B, logps_B.float(), entropy_B.float()
            ended_B = torch.isin(tokens_B, stop_S)
            if params.stops is not None:
                ended_B |= _said_a_stop(params.stops, ids_BT[alive, : t + 1])
            if bool(ended_B.any()):
                gone = alive[ended_B]
                lengths_B[gone], stopped_B[gone] = t + 1, True
                keep = torch.nonzero(~ended_B).squeeze(1)
                alive, tokens_B, position_B, mask_BL = alive[keep], tokens_B[keep], position_B[keep], mask_BL[keep]
                if len(alive) == 0:
                    break
                cache.batch_select_indices(keep)
            if t + 1 == limit:
                break
            logits_BV = model(
                input_ids=tokens_B[:, None],
                attention_mask=mask_BL[:, : width + t + 1],
                position_ids=position_B[:, None],
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
            position_B = position_B + 1

        ids, logps, entropies = (x.cpu().numpy() for x in (ids_BT.to(torch.int32), logps_BT, entropies_BT))
        for i, (length, stopped) in enumerate(zip(lengths_B.tolist(), stopped_B.tolist(), strict=True)):
            reason: FinishReason = "stop" if stopped else "length"
            out.completion_ids.append(ids[i, :length].copy())
            out.logprobs.append(logps[i, :length].copy())
            out.entropies.append(entropies[i, :length].copy())
            out.finish_reasons.append(reason)


def _said_a_stop(stops: Stops, ids_BT: Tensor) -> Tensor:
    """bool [B]: which rows are over by what they say, with their last token."""
    return torch.tensor([stops.ended(row) for row in ids_BT.to(torch.int32).cpu().numpy()], device=ids_BT.device)


def draw(logits_BV: Tensor, temperature: float, uniform_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token a row by inverting the distribution's cumulative sum.

    One uniform number a token, so that a row's stream is as long as its completion whatever the vocabulary.

    Args:
        logits_BV: raw logits.
        temperature: divides them; 0 takes the likeliest token, of equal ones the first.
        uniform_B: float64 in [0, 1).

    Returns:
        tokens_B int64; log-probabilities and exact entropy (nats) of the distribution drawn from, at least float32.

    Raises:
        FloatingPointError: a row's logits are not finite.
    """
    wide = torch.promote_types(logits_BV.dtype, torch.float32)
    if temperature == 0:
        # A NaN is the largest of its row.
        largest_B = logits_BV.amax(dim=-1)
        _require_finite(largest_B)
        zero_B = torch.zeros_like(largest_B, dtype=wide)
        return logits_BV.argmax(dim=-1), zero_B, zero_B
    logps_BV = torch.log_softmax(logits_BV.to(wide) / temperature, dim=-1)
    probs_BV = logps_BV.exp()
    # float64: in float32 the sum over a large vocabulary would lose the tail's tokens.
    cdf_BV = probs_BV.cumsum(dim=-1, dtype=torch.float64)
    total_B = cdf_BV[:, -1]
    _require_finite(total_B)
    # right=True finds the first entry above the draw: never a token of probability zero.
    tokens_B1 = torch.searchsorted(cdf_BV, (uniform_B * total_B)[:, None], right=True)
    tokens_B1 = tokens_B1.clamp(max=logps_BV.shape[1] - 1)
    entropy_B = -(probs_BV * logps_BV.clamp(min=-1e4)).sum(dim=-1)
    return tokens_B1.squeeze(1), logps_BV.gather(1, tokens_B1).squeeze(1), entropy_B


def _require_finite(sums_B: Tensor) -> None:
    if not bool(torch.isfinite(sums_B).all()):
        raise FloatingPointError(
            f"the policy's distribution is not finite in {int((~torch.isfinite(sums_B)).sum())} of {len(sums_B)} "
            "rows, so its weights hold NaN or inf; start from a sound checkpoint, and lower learner.learning_rate if "
            "it diverged"
        )
