"""The generator and the learner of a run, around one policy."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from npo_core.deepspeed_learner import DeepSpeedLearner
from npo_core.generate import TransformersGenerator
from npo_core.interfaces import Generator, Learner
from npo_core.learner import TorchLearner
from npo_core.policy import Policy, choose_device
from npo_core.vllm_generator import VllmGenerator, VllmRollouts
from npo_core.vllm_process import VllmProcess
from npo_core.vllm_served import VllmServed
from schemas.config import Config

logger = logging.getLogger("npo")


@dataclass(frozen=True)
class Engine:
    """What samples and what learns."""

    generator: Generator
    learner: Learner
    rollouts: Generator
    """What samples in training: always from the learner's weights as they are."""
    frozen: VllmGenerator
    """What samples the work that `vllm.samples` names, from checkpoints that it is given one by one. With rollouts by
    vLLM it is their engine."""

    def close(self) -> None:
        """Ends the processes that were started for it."""
        try:
            self.frozen.close()
        finally:
            self.learner.close()

    @classmethod
    def build(
        cls,
        config: Config,
        model_dir: Path,
        starting_policy: Callable[[Callable[[Path], Policy]], Policy],
        tokenizer_dir: Path | None = None,
    ) -> Engine:
        """transformers in this process, and the learner that the configuration names: torch shares the generator's
        weights, DeepSpeed hands its new ones over after every step. vLLM, where it is asked for, beside them.

        Args:
            config: the run's.
            model_dir: a transformers model directory.
            starting_policy: loads the reference of the KL term by the function it is given; called iff it is needed.
            tokenizer_dir: holds the tokenizer as long as the engine lives; `chat.stop` needs it with vLLM.
        """

        def load(path: Path) -> Policy:
            return Policy(path, config.model, config.learner, config.run.seed)

        # Exactness: the same kernels in the same order, whoever started the process.
        torch.set_num_threads(config.learner.threads)
        # On a GPU some of the kernels that sampling needs have no deterministic form; bit-identity is promised on CPUs.
        torch.use_deterministic_algorithms(choose_device(config.learner.device).type == "cpu")
        policy = load(model_dir)
        if policy.lora:
            trained = sum(p.numel() for p in policy.parameters.values())
            total = sum(p.numel() for p in policy.model.parameters())
            logger.info("LoRA trains %d of %d parameters (%.2f %%)", trained, total, 100 * trained / total)
        reference = starting_policy(load) if config.algorithm.kl_beta > 0 else None
        learner = DeepSpeedLearner if config.learner.engine == "deepspeed" else TorchLearner
        generator = TransformersGenerator(policy, config.rollout.max_rows)
        vllm = _vllm(config, policy, tokenizer_dir if config.chat.stop or policy.vision else None)
        rollouts: Generator = VllmRollouts(vllm) if "rollout" in config.vllm.samples else generator
        return cls(generator, learner(policy, config, reference), rollouts, vllm)


def _vllm(config: Config, policy: Policy, tokenizer: Path | None) -> VllmGenerator:
    """vLLM beside a policy; it starts with the first checkpoint that it is given."""
    settings = config.vllm
    dtype = settings.dtype or config.model.dtype
    exact = dtype == config.model.dtype == "float32"
    tolerance = settings.tolerance or (1e-4 if exact else 0.05)
    sampler = VllmServed(settings.url) if settings.url else VllmProcess(settings, dtype, str(policy.device), tokenizer)
    # On a CPU vLLM keeps its old weights, but takes adapters.
    in_place = policy.device.type != "cpu" or (policy.lora is not None and settings.lora == "adapter")
    if "rollout" in settings.samples and not in_place:
        logger.warning(
            "vllm.samples holds rollout, and on a CPU vLLM takes no new weights in place: every step builds a fresh "
            "engine, about 10 s each; let transformers sample rollouts there"
        )
    return VllmGenerator(sampler, policy, config.rollout.temperature, tolerance, in_place, settings.lora == "merged")
