"""The generator and the learner of a run, around one policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

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
        """transformers and torch in this process, sharing one set of weights.

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
        return cls(TransformersGenerator(policy, config.rollout.max_rows), TorchLearner(policy, config, reference))
