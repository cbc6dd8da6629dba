"""The generator and the learner of a run, around one policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from npo_core.deepspeed_learner import DeepSpeedLearner
from npo_core.generate import TransformersGenerator
from npo_core.interfaces import Generator, Learner
from npo_core.learner import TorchLearner
from npo_core.policy import Policy, choose_device
from schemas.config import Config


@dataclass(frozen=True)
class Engine:
    """What samples and what learns."""

    generator: Generator
    learner: Learner

    @classmethod
    def build(
        cls, config: Config, model_dir: Path, starting_policy: Callable[[Callable[[Path], Policy]], Policy]
    ) -> Engine:
        """transformers in this process, and the learner that the configuration names: torch shares the generator's
        weights, DeepSpeed hands its new ones over after every step.

        Args:
            config: the run's.
            model_dir: a transformers model directory.
            starting_policy: loads the reference of the KL term by the function it is given; called iff it is needed.
        """

        def load(path: Path) -> Policy:
            return Policy(path, config.model, config.learner)

        # Exactness: the same kernels in the same order, whoever started the process.
        torch.set_num_threads(config.learner.threads)
        # On a GPU some of the kernels that sampling needs have no deterministic form; bit-identity is promised on CPUs.
        torch.use_deterministic_algorithms(choose_device(config.learner.device).type == "cpu")
        policy = load(model_dir)
        reference = starting_policy(load) if config.algorithm.kl_beta > 0 else None
        learner = DeepSpeedLearner if config.learner.engine == "deepspeed" else TorchLearner
        return cls(TransformersGenerator(policy, config.rollout.max_rows), learner(policy, config, reference))
