"""Generation by vLLM, in a process of ours or on a server of the user's.

Tokens and their log-probabilities are the engine's. Entropies, and log-probabilities of given completions, come from
the trainer's own forward: vLLM computes no entropy, and scores a prompt at temperature 1 whatever is asked.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from npo_core.interfaces import FinishReason, LocalCheckpoint, NearFutureError, Rollouts, SamplingParams, StreamKey
from npo_core.pictures import Picture, PicturedPrompt
from npo_core.policy import Policy
from npo_core.streams import philox, row_seed
from npo_core.weight_sync import Agreement, Probe, Sync, synchronize

PROBE_PROMPTS, PROBE_LENGTH = 8, 12
PROBE_TOKENS = 2, 3
"""Rows and columns of tokens that its picture becomes."""
ROUNDING_GROWTH = 8
"""How much further apart than the fresh engine an engine that was updated in place may be from the trainer."""


class Sampler(Protocol):
    """An engine that samples."""

    @property
    def sees(self) -> bool:
        """Whether its prompts may show pictures."""

    @property
    def started(self) -> bool:
        """Whether there is an engine."""

    def fresh(self, model_dir: Path) -> None:
        """A fresh engine with the weights of a model directory."""

    def reload(self, model_dir: Path) -> None:
        """Gives the engine other weights in place; whether it took them has to be checked."""

    def sample(
        self, prompts: Sequence[np.ndarray], params: SamplingParams, seeds: Sequence[int]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(completion ids, log-probabilities) of one completion a seed, prompt-major."""

    def close(self) -> None:
        """Ends the engine."""


class VllmGenerator:
    """Samples from an engine that holds the same weights as a policy of ours, and proves that it does at each load.

    Args:
        engine: samples.
        policy: the trainer's, which gives the entropies and the probe's log-probabilities.
        temperature: of the probe; the run's, so that it proves what is used.
        tolerance: largest mean difference of the probe's log-probabilities, in nats a token.
        in_place: whether the engine takes new weights without being built anew.
        merges: whether adapters are merged into the weights for it; otherwise it takes them beside the weights.
    """

    def __init__(
        self,
        engine: Sampler,
        policy: Policy,
        temperature: float,
        tolerance: float,
        in_place: bool,
        merges: bool = True,
    ) -> None:
        self.engine, self.policy, self.merges = engine, policy, merges
        self.temperature, self.tolerance, self.in_place = temperature, tolerance, in_place
        # The weights that adapters lie beside, which never change, and the engine's adapter.
        self._beside: tempfile.TemporaryDirectory[str] | None = None
        # The last probe of the engine as it is: an update in place has to change its answers.
        self._probed: Probe | None = None
        # How far the fresh engine was from the trainer: by rounding alone.
        self._rounding = math.inf

    def load(self, checkpoint: LocalCheckpoint) -> None:
        """See `Generator.load`.

        Raises:
            NearFutureError: the engine does not hold these weights, even after it was started anew.
            FloatingPointError: they hold NaN or inf.
        """
        self.policy.load_weights(checkpoint.weights)
        if self.policy.lora:
            self.take_weights()
        else:
            self._sync(checkpoint.weights)

    def take_weights(self) -> None:
        """Gives the engine the policy's weights as they are now, by files.

        Raises:
            NearFutureError, FloatingPointError: see `load`.
        """
        if self.policy.lora and not self.merges:
            if self._beside is None:
                self._beside = tempfile.TemporaryDirectory(prefix="near-future-")
                self.policy.save_base(Path(self._beside.name))
            self.policy.save_weights(Path(self._beside.name))
            self._sync(Path(self._beside.name))
            return
        with tempfile.TemporaryDirectory(prefix="near-future-") as scratch:
            self.policy.save_merged(Path(scratch))
            self._sync(Path(scratch))

    def sample(
        self, prompts: Sequence[np.ndarray], n: int, params: SamplingParams, streams: Sequence[StreamKey]
    ) -> Rollouts:
        """See `Generator.sample`. A row's seed is a function of its stream's key: on one engine equal keys give equal
        samples as far as the engine computes rows independently of their batch."""
        completion_ids, logprobs = self.engine.sample(prompts, params, [row_seed(key) for key in streams])
        bad = sum(not np.isfinite(row).all() for row in logprobs)
        if bad:
            raise FloatingPointError(
                f"vLLM's distribution is not finite in {bad} of {len(logprobs)} rows, so the weights hold NaN or inf; "
                "start from a sound checkpoint, and lower learner.learning_rate if it diverged"
            )
        reasons: list[FinishReason] = ["stop" if ids[-1] in params.stop_ids else "length" for ids in completion_ids]
        if params.stops is not None:
            # Where a text ends an answer is ours to say, not the engine's detokenizer's.
            for row, ids in enumerate(completion_ids):
                length = params.stops.length(ids)
                if length is not None:
                    completion_ids[row], logprobs[row], reasons[row] = ids[:length], logprobs[row][:length], "stop"
        for ids, reason in zip(completion_ids, reasons, strict=True):
            if reason == "length" and len(ids) < params.max_new_tokens:
                raise NearFutureError(
                    f"vLLM cut a completion off after {len(ids)} of rollout.max_new_tokens {params.max_new_tokens} "
                    "tokens, for want of room; raise vllm.max_model_len above the longest prompt and completion"
                )
        if params.temperature == 0:
            # vLLM gives those of temperature 1.
            zeros = [np.zeros(len(ids), np.float32) for ids in completion_ids]
            return Rollouts(completion_ids, zeros, zeros, reasons)
        rows = [prompt for prompt in prompts for _ in range(n)]
        entropies = self.policy.log_probs(rows, completion_ids, params.temperature)[1]
        return Rollouts(completion_ids, logprobs, entropies, reasons)

    def score(
        self, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray], temperature: float
    ) -> list[np.ndarray]:
        """See `Generator.score`."""
        return self.policy.log_probs(prompts, completions, temperature)[0]

    def close(self) -> None:
        """See `Generator.close`."""
        try:
            self.engine.close()
        finally:
            if self._beside is not None:
                self._beside.cleanup()
                self._beside = None

    def _sync(self, weights: Path) -> None:
        require_finite(self.policy)

        def start() -> None:
            self._probed, self._rounding = None, math.inf
            self.engine.fresh(weights)

        def anew() -> None:
            self.engine.close()
            start()

        fresh = Sync("a fresh engine", start, self.tolerance)
        again = Sync("a fresh engine in a fresh process", anew, self.tolerance)
        ways = [fresh, again]
        if self.in_place and self.engine.started:
            tolerance = min(self.tolerance, ROUNDING_GROWTH * self._rounding)
            ways = [Sync("an update in place", lambda: self.engine.reload(weights), tolerance), again]
        agreement = synchronize(ways, self.probe)
        if self._rounding == math.inf:
            self._rounding = agreement.mean

    def probe(self) -> Agreement:
        """Samples from the engine, after prompts of random tokens, one of which shows a picture if it can, and compares
        with the policy's forward and with the engine's answers of the last time."""
        config = self.policy.model.config
        vocabulary = config.get_text_config().vocab_size
        prompts = list(philox("probe").integers(0, vocabulary, (PROBE_PROMPTS, PROBE_LENGTH)).astype(np.int32))
        if self.policy.vision and self.engine.sees:
            prompts[0] = show_noise(prompts[0], config)
        params = SamplingParams(self.temperature, PROBE_LENGTH, ())
        ids, logprobs = self.engine.sample(prompts, params, range(len(prompts)))
        before, self._probed = (
            self._probed,
            Probe(ids, logprobs, self.policy.log_probs(prompts, ids, self.temperature)[0]),
        )
        return self._probed.agreement(before)


def show_noise(ids: np.ndarray, config: Any) -> PicturedPrompt:
    """A prompt that shows a picture of noise in its midst, the same for each model of these sizes.

    Args:
        ids: what goes around it.
        config: transformers', of the model.
    """
    sizes, merge = config.vision_config, config.vision_config.spatial_merge_size
    grid = (1, PROBE_TOKENS[0] * merge, PROBE_TOKENS[1] * merge)
    values = sizes.in_channels * sizes.temporal_patch_size * sizes.patch_size**2
    patches = philox("probe picture").uniform(-1, 1, (math.prod(grid), values)).astype(np.float32)
    # No other token may pass for a part of it.
    around = np.where(ids == config.image_token_id, 0, ids)
    half = len(around) // 2
    shown = np.full(math.prod(PROBE_TOKENS), config.image_token_id)
    row: list[np.ndarray | list[int]] = [
        around[:half],
        [config.vision_start_token_id],
        shown,
        [config.vision_end_token_id],
        around[half:],
    ]
    return PicturedPrompt.of(np.concatenate(row), [Picture("probe", grid, lambda: patches)])


def require_finite(policy: Policy) -> None:
    """Refuses weights that no engine could be shown to hold.

    Raises:
        FloatingPointError: names the first parameter that holds NaN or inf.
    """
    for name, parameter in policy.model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise FloatingPointError(
                f"the policy's weights hold NaN or inf, in {name}; start from a sound checkpoint, and lower "
                "learner.learning_rate if it diverged"
            )


class VllmRollouts:
    """Samples a training policy's rollouts: before each sample the engine takes the weights that the policy has then,
    so that none which it samples from can be stale.

    Args:
        vllm: holds the engine, and the policy that is trained.
    """

    def __init__(self, vllm: VllmGenerator) -> None:
        self.vllm = vllm

    def load(self, checkpoint: LocalCheckpoint) -> None:
        """See `Generator.load`."""
        self.vllm.policy.load_weights(checkpoint.weights)

    def sample(
        self, prompts: Sequence[np.ndarray], n: int, params: SamplingParams, streams: Sequence[StreamKey]
    ) -> Rollouts:
        """See `Generator.sample` and `VllmGenerator.take_weights`."""
        self.vllm.take_weights()
        return self.vllm.sample(prompts, n, params, streams)

    def score(
        self, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray], temperature: float
    ) -> list[np.ndarray]:
        """See `Generator.score`."""
        return self.vllm.score(prompts, completions, temperature)

    def close(self) -> None:
        """See `Generator.close`."""
        self.vllm.close()
